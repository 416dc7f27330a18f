"""Load a model by name: the lab, Stable Diffusion from the Hub, a folder or one file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from memlib.errors import first_line, nearest
from memlib.hub import checkpoints, names
from memlib.hub.answers import CachedModel, RecordedModel, card_file
from memlib.hub.manifests import load_pairs
from memlib.models import HALF, DiffusersModel, ExactModel, ModelError, quiet

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
    name : ``lab`` (shipped with the book), ``exact`` (the optimal denoiser of the lab's pairs),
        ``sd14``, ``sd21``, ``sd21-base``, ``realvis14``, ``realvis20``, ``realvis51`` (see
        `checkpoints.toml`), a Hub id ``owner/name``, or a local folder in the diffusers format; one
        file with a whole model in the original layout: ``owner/name/file.safetensors`` or a
        local ``.safetensors`` file. After a Hub id, ``@revision``.
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
    if dtype not in (None, "float32", *HALF):
        raise ModelError(f"unknown dtype {dtype!r}{nearest(dtype, ('float32', *HALF))}")
    if timestep_spacing not in (None, *SPACINGS):
        hint = nearest(timestep_spacing, SPACINGS)
        raise ModelError(f"unknown timestep_spacing {timestep_spacing!r}{hint}")
    recipe = {"name": str(Path(name).resolve()) if Path(name).exists() else str(name)}
    recipe |= {"device": device, "dtype": dtype, "revision": revision, "vae": vae and str(vae)}
    recipe |= {"config": config and str(config), "timestep_spacing": timestep_spacing}
    device = _device(device)
    checkpoints.packages()
    if str(name) == "exact":
        given = dict(dtype=dtype, revision=revision, vae=vae, config=config)
        given |= {"timestep_spacing": timestep_spacing}
        if said := [option for option, value in given.items() if value is not None]:
            raise ModelError(f"the exact model has no {said[0]}: it is computed, in float64")
        return _exact(recipe)
    known = names.checkpoint(str(name)) if str(name) != "lab" else None
    whole = known is not None or Path(name).is_file()
    if dtype is None:
        dtype = "float16" if whole and torch.device(device).type == "cuda" else "float32"
    source = _source(name, known, revision, vae)
    if known:
        known = names.at(known, revision)
        known = replace(known, config=str(config)) if config else known
        vae = vae or known.vae
        card = _card(source)
        if card and not checkpoints.downloaded(known):
            return CachedModel(RecordedModel(card))
        place = checkpoints.on_hub(known, half=dtype != "float32", own_vae=not vae)
    elif revision:
        raise ModelError(f"a revision is for models of the Hub, and {name} is none")
    else:
        place = checkpoints.local(name, config)
    fingerprint = place.fingerprint
    network, mark = checkpoints.load_vae(vae) if vae else (None, "")
    fingerprint += f" vae {mark}" if vae else ""
    try:
        pipe = checkpoints.pipeline(place, network, half=dtype != "float32")
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            kind = HALF.get(dtype, torch.float32) if part is pipe.unet else torch.float32
            torch.nn.Module.to(part, device, kind)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{name} does not fit into the GPU's memory: {_memory()}") from error
    except ModelError:
        raise
    except checkpoints.BROKEN as error:
        path = place.file or place.folder
        where = f"{name}: the copy in {path}" if known else path
        advice = "; delete it to download it anew" if known else ""
        raise ModelError(f"{where} cannot be loaded: {first_line(error)}{advice}") from error
    model = DiffusersModel(pipe, source, fingerprint, dtype)
    if timestep_spacing:
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
    if str(name) == "lab":
        return "lab"
    # A folder is the same by its relative and its absolute path, and no folder is "lab".
    own = Path(name).resolve().name
    return f"./{own}" if own in names.NAMES else own


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}: 'cuda', 'cuda:0', ... or 'cpu'") from error
    if kind not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r}: inner products need float64, so 'cuda' or 'cpu'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch finds no GPU here; 'cpu' works, slowly")
    return device


def _memory() -> str:
    free, total = torch.cuda.mem_get_info()
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"


def _card(name: str) -> dict | None:
    """What earlier runs, perhaps on another machine, left to know of a Hub model."""
    file = card_file(name)
    return json.loads(file.read_text()) if file.exists() else None


@torch.no_grad()
def training_step(model: DiffusersModel, folder: str | Path) -> DiffusersModel:
    """The same pipeline with the U-Net and text encoder of an earlier training step."""
    folder = Path(folder)
    with quiet():
        own = {n: checkpoints.load_part(folder / n, n) for n in ("unet", "text_encoder")}
    torch.nn.Module.to(own["text_encoder"], torch.float32)
    parts = model.pipe.components | own
    pipe = type(model.pipe)(**parts, requires_safety_checker=False).to(model.device)
    name, fingerprint = f"{model.source}/{folder.name}", checkpoints.hash_files(folder)
    return DiffusersModel(pipe, name, f"{model.fingerprint} {fingerprint}", model.precision)
