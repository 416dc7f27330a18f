"""How weights are read and checked: diffusers folders, single files, snapshots of the Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from memlib.errors import ModelError, first_line, nearest
from memlib.hub import checkpoints
from memlib.hub.checkpoints import PARTS, TENSORS, takes_half
from memlib.hub.files import sha256, verify
from memlib.hub.names import NAMES, Checkpoint
from memlib.models import quiet
from memlib.paths import CONFIGS, LAB

try:  # a fault of a package is not said to be a model's
    with quiet():
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
        from diffusers.loaders.single_file_utils import SingleFileComponentError
        from transformers import CLIPTextModel, CLIPTokenizer
except (ImportError, RuntimeError) as error:  # the latter of diffusers' late imports
    raise ImportError(f"diffusers cannot be used here: {first_line(error)}") from error

KINDS = dict(zip(PARTS, (UNet2DConditionModel, AutoencoderKL, CLIPTextModel), strict=True))
WEIGHTS = (".safetensors", ".json", ".txt")  # what makes a model what it is
BROKEN = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
ORIGINAL = {  # where a file in the original layout has the parts, and what of them is not read
    "unet": "model.diffusion_model.", "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}  # fmt: skip
UNUSED = r"^first_stage_model\.loss\.|\.(text_projection(\.weight)?|logit_scale)$|position_ids$"
BESIDE = ("lora_", "control_model.", "embedding_manager.")  # weights that would not be used
VAE_ALONE = ("encoder.", "decoder.", "quant", "post_quant")
SIGNS = {  # what a file of tensors is, by their names, the more telling ones first
    "lora": "a LoRA", r"conditioner\.embedders": "an SDXL model", "joint_blocks": "an SD3 model",
    "double_blocks": "a Flux model", r"^model\.diffusion_model\.": "another kind of U-Net",
    r"^(decoder|encoder\.conv_in|first_stage_model)\.": "a VAE, not a whole model",
    r"down_blocks\.": "one part of a diffusers pipeline, not a whole model",
    r"encoder\.layers": "a text encoder, not a whole model", "": "no model that is known here",
}  # fmt: skip
INPUTS = (  # settings of a U-Net that is fed more than latents, timestep and text
    "time_cond_proj_dim", "class_embed_type", "num_class_embeds", "addition_embed_type",
    "encoder_hid_dim_type", "dual_cross_attention",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The weights of one model on this machine: a diffusers folder, or one file and its config."""

    path: Path
    config: Path  # a folder in the diffusers format; with one file its weights are not read
    fingerprint: str
    sha256: str = ""  # of the U-Net's weights, where it is known


def refuse(where, *faults: tuple[object, str]) -> None:
    """Raise the first of some faults that is there."""
    for there, text in faults:
        if there:
            raise ModelError(f"{where}{text}")


def hash_files(folder: Path) -> str:
    """sha256 over the names and contents of a folder's weights and configs."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in WEIGHTS):
        total.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


def on_hub(known: Checkpoint, half: bool, own_vae: bool = True) -> Place:
    """The weights of a Hub model on this machine, downloaded where they are not there yet."""
    parts = [part for part in PARTS if own_vae or part != "vae"]
    path = checkpoints.fetch(known, half, parts)
    root = checkpoints.snapshot(path)
    stamp = f"{known.repository}@{root.name}"
    if path.is_file():
        config = _config(path, known.config or None)
        stamp += f" {path.relative_to(root).as_posix()} config {hash_files(config)[:12]}"
        return Place(path, config, stamp)
    variant = " fp16" if any(takes_half(_names(path / part), half) for part in parts) else ""
    return Place(path, path, stamp + variant, known.sha256)


def local(name: str | Path, config: str | Path | None = None) -> Place:
    """A folder in the diffusers format, or one ``.safetensors`` file with a whole model."""
    path = LAB if str(name) == "lab" else Path(name)
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise ModelError(f"{path} is a pickle, which can run code: give it as .safetensors")
    if path.is_file():
        refuse(path, (path.suffix != ".safetensors", ": one file must end in .safetensors"))
        folder = _config(path, config)
        return Place(path, folder, f"{sha256(path)} config {hash_files(folder)}")
    unknown = f"unknown model {str(name)!r}, and no such folder{nearest(str(name), NAMES)}"
    unknown = f"there is no file {path}" if path.suffix == ".safetensors" else unknown
    if str(name) == "lab":
        unknown = f"the lab's weights are not here ({path}): they come with the repository, so "
        unknown += "clone it and install from there"
    refuse(
        "",
        (config is not None, f"config is for one .safetensors file, and {name} is none"),
        (not path.is_dir(), unknown),
        (not (path / "model_index.json").exists(),
         f"{path} is no diffusers pipeline: it has no model_index.json"),
    )  # fmt: skip
    checkpoints.check_class(str(path), path / "model_index.json")
    if str(name) == "lab" or (path / "SHA256SUMS").exists():
        verify(path, lambda name: name.endswith(WEIGHTS))
    return Place(path, path, hash_files(path))


def _config(file: Path, config: str | Path | None) -> Path:
    """The folder with the configuration of one file: the one that is named, or told by shapes."""
    with safe_open(file, "pt") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    first = shapes.get(f"{ORIGINAL['unet']}input_blocks.0.0.weight")
    text = shapes.get(f"{ORIGINAL['unet']}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None or text is None:
        what = next(w for sign, w in SIGNS.items() if any(re.search(sign, key) for key in shapes))
        raise ModelError(f"{file} holds {what}; supported is one file of SD v1 or v2")
    folder = CONFIGS / (config or "sd14")
    folder = folder if folder.is_dir() else Path(config or "sd14")
    known = sorted(path.parent.name for path in CONFIGS.glob("*/model_index.json"))
    refuse(
        f"{file}: ",
        (first[1] != 4, f"its U-Net takes {first[1]} channels, as for inpainting, not 4"),
        (config is None and text[1] != 768,
         "its kind is unknown, or whether it predicts v or epsilon: give config='sd21' for v, "
         "config='sd21-base' for epsilon, or a folder with its model_index.json"),
        (not (folder / "model_index.json").is_file(),
         f"unknown config {str(config)!r}{nearest(str(config), known)}"),
    )  # fmt: skip
    return folder


@quiet()
def pipeline(place: Place, vae=None, half: bool = False):
    """diffusers' pipeline of these weights, every tensor of which was used, and none is missing."""
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options |= {"vae": vae} if vae else {}
    if place.path.is_file():
        pipe = _of_file(place, options)
    else:
        for part in [part for part in PARTS if part not in options]:
            published = place.sha256 if part == "unet" else ""
            options[part] = load_part(place.path / part, part, half, published)
        pipe = StableDiffusionPipeline.from_pretrained(place.path, local_files_only=True, **options)
    _check(place, pipe)
    return pipe


def _names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.glob("*") if f.suffix in (".safetensors", ".bin"))


@quiet()
def load_part(folder: Path, part: str, half: bool = False, published: str = ""):
    """One network of a diffusers folder, loaded strictly; `published` is a sha256 to have."""
    names, file = _names(folder), folder / "diffusion_pytorch_model.safetensors"
    found = f"only {names[0]}" if names else "no weights"
    refuse(
        folder,
        (not any(re.fullmatch(TENSORS, name) for name in names),
         f" cannot be loaded: it has {found}; read are safetensors of the usual names, no pickles"),
        (not (folder / "config.json").is_file(), " has no config.json"),
    )  # fmt: skip
    options = {"variant": "fp16"} if takes_half(names, half) else {}
    if published and not options and sha256(file) != published:
        raise ModelError(f"{file} is not the published one (its sha256 differs): delete it")
    if part == "text_encoder":  # else its config may say to round what the file holds
        options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        model, report = KINDS[part].from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except ValueError as error:  # the rest of diffusers' message is advice for its own callers
        found = re.search(r"\S+ expected shape .*?, but got [^.]*", str(error))
        raise ModelError(f"{folder}: {found[0]}") if found else error from error
    faults = {
        "missing": report["missing_keys"],
        "too many": [k for k in report["unexpected_keys"] if not k.endswith("position_ids")],
        "of another shape": [key[0] for key in report["mismatched_keys"]],
    }
    lora = any("base_layer" in key or "lora" in key for key in faults["too many"])
    hint = ": it was saved with a LoRA that is not merged, merge it first" if lora else ""
    texts = [
        f"{len(keys)} weight{'s' * (len(keys) > 1)} {what} ({min(keys)}{', …' * (len(keys) > 1)})"
        for what, keys in faults.items() if keys
    ]  # fmt: skip
    refuse(folder, (texts, f": {'; '.join(texts)}{hint}"))  # what is missing would be random
    return model


def _of_file(place: Place, options: dict):
    """A file in the original layout, through diffusers' own reader; nothing is asked of the Hub."""
    with safe_open(place.path, "pt") as opened:
        keys = set(opened.keys())
        levels = opened.get_tensor("alphas_cumprod") if "alphas_cumprod" in keys else None
    beside = sorted(key for key in keys if key.startswith(BESIDE))
    refuse(
        place.path,
        (beside, f": {len(beside)} weights beside the model ({''.join(beside[:1])}, …) that are "
         "not read: merge them, or leave them out"),
        ("vae" not in options and not any(key.startswith(ORIGINAL["vae"]) for key in keys),
         " holds no vae: give one as vae"),
    )  # fmt: skip
    own = place.config / "tokenizer"
    words = json.loads((own / "tokenizer_config.json").read_text())
    words = {key: words[key] for key in ("pad_token", "model_max_length") if key in words}
    whole = {f.name for f in own.glob("*")} & {"vocab.json", "tokenizer.json"}
    tokenizer = CLIPTokenizer.from_pretrained(own if whole else CONFIGS / "tokenizer", **words)
    said = {"config": str(place.config), "tokenizer": tokenizer}
    pipe = _single(StableDiffusionPipeline, place.path, **said, **options)
    for part in [part for part in PARTS if part not in options]:
        _count(place.path, part, keys, getattr(pipe, part))
    table, predicts = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type
    same = levels is None or (
        levels.shape == table.shape and torch.allclose(levels.float(), table.float(), atol=1e-4)
    )
    other = "ztsnr" in keys or not same or ("v_pred" in keys and predicts != "v_prediction")
    what = " says another prediction or noise schedule than its configuration: give config"
    refuse(place.path, (other, f"{what}, 'sd21' for v, or a folder"))
    return pipe


def _single(kind, file: Path, **options):
    try:
        return kind.from_single_file(str(file), local_files_only=True, **options)
    except (NotImplementedError, SingleFileComponentError) as error:
        what = "weights are missing, or under names that are not SD's"
        raise ModelError(f"{file}: {what}") from error


def _count(file: Path, part: str, keys: Iterable[str], network) -> None:
    """As many tensors in the file as a part has: diffusers' reader ignores others."""
    tensors = network.state_dict()
    mine = [k for k in keys if k.startswith(ORIGINAL[part]) and not re.search(UNUSED, k)]
    mine = mine or [k for k in keys if k.startswith(VAE_ALONE)]
    wanted = len(tensors)
    if any(".resblocks." in key for key in mine):  # OpenCLIP packs three matrices in one
        layers = network.config.num_hidden_layers
        wanted -= 4 * layers
        mine = [key for key in mine if f".resblocks.{layers}." not in key]  # which SD v2 leaves out
    what = "missing" if len(mine) < wanted else "too many"
    refuse(
        f"{file}: ",
        (len(mine) != wanted, f"{abs(len(mine) - wanted)} of its {part}'s weights {what}"),
        (any(t.is_meta for t in tensors.values()), f"its {part} has names that are not SD's"),
    )  # fmt: skip


@quiet()
def load_vae(vae: str | Path):
    """A VAE of its own and its fingerprint: a folder, a ``.safetensors`` file, or from the Hub."""
    path, known = Path(vae), checkpoints.named_vae(str(vae))
    if known:
        path = checkpoints.fetch(known, False, checkpoints.ALONE)
    elif not path.exists():
        raise ModelError(f"no VAE at {path}: there is no such file or folder")
    path = path / "vae" if (path / "vae" / "config.json").is_file() else path  # of a pipeline
    if path.is_file():
        network = _single(AutoencoderKL, path, config=str(CONFIGS / "sd14"), subfolder="vae")
        with safe_open(path, "pt") as opened:
            _count(path, "vae", list(opened.keys()), network)
    else:
        network = load_part(path, "vae", published=known.sha256 if known else "")
    if known:
        return network, f"{vae}@{checkpoints.snapshot(path).name}"
    return network, sha256(path) if path.is_file() else hash_files(path)


def _check(place: Place, pipe) -> None:
    """Refuse parts that do not fit each other, and what diffusers would use in another way."""
    unet, vae, scheduler = pipe.unet.config, pipe.vae.config, pipe.scheduler.config
    words, text, kind = pipe.tokenizer, pipe.text_encoder.config, type(pipe.scheduler).__name__
    own = place.config / "vae" / "config.json"
    own = json.loads(own.read_text()) if own.is_file() else {}
    scale, own_scale = vae.scaling_factor, own.get("scaling_factor", vae.scaling_factor)
    betas, steps = scheduler.get("trained_betas"), scheduler.get("num_train_timesteps")
    stated = {"beta_start", "beta_end", "beta_schedule"} <= {*scheduler}
    flow = scheduler.get("use_flow_sigmas") or scheduler.get("prediction_type") == "flow_prediction"
    widths = {*np.ravel(unet.encoder_hid_dim or unet.cross_attention_dim).tolist()}
    sides = {*np.ravel(unet.sample_size or 0).tolist()}
    channels = (unet.in_channels, unet.out_channels, vae.latent_channels)
    refuse(
        f"{place.path}: ",
        *((not all(t.isfinite().all() for t in getattr(pipe, part).state_dict().values()),
           f"its {part} has weights that are not finite") for part in PARTS),
        (own_scale != scale or not 0 < (scale or 0) < np.inf,
         f"its VAE's scaling_factor is {scale}, the pipeline's own has {own_scale}"),
        (any(vae.get(name) for name in ("shift_factor", "latents_mean", "latents_std")),
         "its VAE shifts latents, as no Stable Diffusion does"),
        (flow or (not stated if betas is None else len(betas) != steps),
         f"its scheduler ({kind}) states no noise schedule of {steps} betas"),
        *((unet.get(name) not in (None, False, "text_proj"),
           f"its U-Net takes more than latents, timestep and text ({name}); this is not supported")
          for name in INPUTS),
        (len({*channels}) > 1 or (vae.in_channels, vae.out_channels) != (3, 3),
         "its U-Net takes {} channels and gives {}, its VAE has {}".format(*channels)
         + f" for pictures of {vae.in_channels}"),
        (widths != {text.hidden_size},
         f"its U-Net takes text of width {', '.join(map(str, sorted(widths)))}, its text encoder "
         f"gives {text.hidden_size}"),
        (not 3 <= len(words) <= text.vocab_size
         or words.model_max_length > text.max_position_embeddings,
         f"its tokenizer has {len(words)} words and {words.model_max_length} places, its text "
         f"encoder {text.vocab_size} and {text.max_position_embeddings}"),
        (len(sides) > 1 or min(sides) < 1,
         f"its sample_size is {unet.sample_size}; supported is one side of square latents, as 64"),
    )  # fmt: skip
