"""Load a model by name: the lab, Stable Diffusion from the Hub, a folder or one file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from memlib.errors import ModelError, first_line, nearest
from memlib.hub import names, weights
from memlib.hub.accelerated import HALF, AcceleratedModel
from memlib.hub.answers import CachedModel, RecordedModel, card
from memlib.hub.checkpoints import downloaded
from memlib.hub.flow import EMPTY, FlowModel
from memlib.hub.manifests import load_pairs
from memlib.models import DiffusersModel, ExactModel

SPACINGS = ("leading", "trailing", "linspace")


def load(
    name: str | Path = "lab",
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    vae: str | Path | None = None,
    config: str | Path | None = None,
    timestep_spacing: str | None = None,
):
    """Load a model by name.

    Parameters
    ----------
    name : ``lab`` and ``lab-flow`` (shipped with the book; the second is a flow-matching
        transformer), ``exact`` (the optimal denoiser of the lab's pairs), ``sd14``, ``sd21``,
        ``sd21-base``, ``realvis14``, ``realvis20``, ``realvis51``, ``sd3``, ``sd35``, ``sd35-t5``
        (see `checkpoints.toml`), a Hub id ``owner/name``, or a local folder in the diffusers
        format; one file with a whole model in the original layout:
        ``owner/name/file.safetensors`` or a local ``.safetensors`` file. After a Hub id,
        ``@revision``.
    device : ``cuda`` where there is a GPU, else ``cpu``.
    dtype : of the U-Net, ``float32``, ``float16`` or ``bfloat16``. On a GPU float16 for models
        from the Hub and for one file, else float32. States and scheduler are float32 in any case.
        Half precision takes the Hub's half-precision files where there are some.
    revision : a commit, tag or branch on the Hub instead of the pinned one.
    vae : a Hub id, local folder or ``.safetensors`` file of an `AutoencoderKL` instead of the
        pipeline's own.
    config : of one file whose kind its shapes do not tell: ``sd14``, ``sd21`` (predicts v),
        ``sd21-base`` (epsilon), or a folder in the diffusers format, whose weights are not read.
    timestep_spacing : ``leading``, ``trailing`` or ``linspace`` instead of the scheduler's own.

    The Hub's own settings apply (``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_ENDPOINT``).
    Only safetensors are loaded, and never a safety checker.

    Raises
    ------
    ModelError
        Unknown name, no such repository or revision, no access, no network, a folder or file that
        is no whole model or of a kind that is not supported; weights that are damaged, pickled,
        missing, or more than the networks take.
    ImportError
        diffusers or transformers cannot be used here; the message says what they lack.
    """
    for option, value, valid in (
        ("dtype", dtype, ("float32", *HALF)), ("timestep_spacing", timestep_spacing, SPACINGS),
    ):  # fmt: skip
        if value not in (None, *valid):
            raise ModelError(f"unknown {option} {value!r}{nearest(value, valid)}")
    special = {
        "dtype": dtype, "revision": revision, "vae": vae, "config": config,
        "timestep_spacing": timestep_spacing,
    }  # fmt: skip
    path = Path(name).resolve() if Path(name).exists() else name
    recipe = {"name": path, "device": device, **special}
    device = _device(device)
    if str(name) == "exact":
        if said := [option for option, value in special.items() if value is not None]:
            raise ModelError(f"the exact model has no {said[0]}: it is computed, in float64")
        return _exact(recipe)
    known = names.checkpoint(str(name)) if str(name) not in names.SHIPPED else None
    if revision and not known:
        raise ModelError(f"a revision is for models of the Hub, and {name} is none")
    whole = device.startswith("cuda") and (known or Path(name).is_file())
    dtype = dtype or ("float16" if whole else "float32")
    half, source = dtype != "float32", _source(name, known, revision, vae)
    where = str(name)
    try:
        if known:
            known = names.at(known, revision)
            known = replace(known, config=str(config)) if config else known
            vae = vae or known.vae
            if (found := card(source)) and not downloaded(known):
                return CachedModel(RecordedModel(found))
            place = weights.on_hub(known, half, own_vae=not vae)
        else:
            place = weights.local(name, config)
        where = f"the VAE {vae}"
        network, mark = weights.load_vae(vae) if vae else (None, "")
        copy = f"{name}: the copy in {place.path} (delete it to download it anew)"
        where = copy if known else place.path
        pipe = weights.pipeline(place, network, half)
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        for part in (p for p in pipe.components.values() if isinstance(p, torch.nn.Module)):
            kind = HALF.get(dtype, torch.float32) if part is denoiser else torch.float32
            torch.nn.Module.to(part, device, kind)
    except torch.OutOfMemoryError as error:
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
        memory = f"{free:.1f} of {total:.1f} GiB are free"
        raise ModelError(f"{name} does not fit into the GPU's memory: {memory}") from error
    except ModelError:
        raise
    except weights.BROKEN as error:
        raise ModelError(f"{where} cannot be loaded: {first_line(error)}") from error
    fingerprint = f"{place.fingerprint} vae {mark}" if vae else place.fingerprint
    if hasattr(pipe, "unet"):
        model = AcceleratedModel(pipe, source, fingerprint, dtype)
    else:
        model = FlowModel(pipe, source, fingerprint, dtype, _places(place.path))
    if timestep_spacing:
        if isinstance(model, FlowModel):
            raise ModelError(f"{name} is a flow model, which has no timestep_spacing")
        model.scheduler_config["timestep_spacing"] = timestep_spacing
    model.recipe = recipe
    return CachedModel(model) if known else model


def _exact(recipe: dict) -> ExactModel:
    lab = load("lab", "cpu")
    pairs = load_pairs("lab").query("kind != 'held-out'")
    atoms = lab.encode_images(pairs.image)
    counts = np.maximum(pairs.multiplicity, 1)
    exact = ExactModel(atoms, pairs.caption, counts, lab.scheduler_config, codec=lab)
    exact.recipe = recipe
    return exact


def _source(name: str | Path, known, revision: str | None, vae) -> str:
    """What traces and tables call a model: its exact name, whatever it was asked for by."""
    if known:  # another revision or VAE is another model: it has traces and a name of its own
        name = names.ALIASES.get(str(name), str(name))
        return name + (f"@{revision}" if revision else "") + ("+vae" if vae else "")
    if str(name) in names.SHIPPED:
        return str(name)
    # A folder is the same by its relative and its absolute path, and no folder is "lab".
    own = Path(name).resolve().name
    return f"./{own}" if own in names.NAMES else own


def _places(folder: Path) -> int:
    """`max_sequence_length`, where a folder's training says so."""
    facts = folder / "training.json"
    return json.loads(facts.read_text())["max_sequence_length"] if facts.exists() else EMPTY


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", device):
        valid = "'cuda', 'cuda:0', ... or 'cpu'; inner products need float64"
        raise ModelError(f"unknown device {device!r}: {valid}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch finds no GPU here; 'cpu' works, slowly")
    return device


@torch.no_grad()
def training_step(model: DiffusersModel, folder: str | Path) -> DiffusersModel:
    """The same pipeline with all networks but the VAE of an earlier training step, or a twin's."""
    model, folder = model.uncached, Path(folder)
    parts, own = model.pipe.components, {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            own[name] = weights.load_part(folder / name, name, kind=type(part))
    options = {"requires_safety_checker": False} if "unet" in parts else {}
    pipe = type(model.pipe)(**parts | own, **options).to(model.device)
    more = [model.max_sequence_length] if isinstance(model, FlowModel) else []
    name, fingerprint = f"{model.source}/{folder.name}", weights.hash_files(folder)
    return type(model)(pipe, name, f"{model.fingerprint} {fingerprint}", model.precision, *more)
