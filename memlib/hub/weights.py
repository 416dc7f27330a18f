"""How weights are read and checked: diffusers folders, single files, snapshots of the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from memlib.errors import ModelError, first_line, nearest
from memlib.hub import checkpoints
from memlib.hub.checkpoints import PARTS, takes_half
from memlib.hub.files import sha256, verify
from memlib.hub.names import NAMES, SHIPPED, Checkpoint
from memlib.models import quiet
from memlib.paths import CONFIGS

try:  # a fault of a package is not said to be a model's
    with quiet():
        from diffusers import (
            AutoencoderKL,
            StableDiffusion3Pipeline,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )
        from diffusers.loaders.single_file_utils import SingleFileComponentError
        from transformers import CLIPTextModel, CLIPTokenizer

        from memlib.hub import flow
except (ImportError, RuntimeError) as error:  # the latter of diffusers' late imports
    raise ImportError(f"diffusers cannot be used here: {first_line(error)}") from error

KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
WEIGHTS = (".safetensors", ".json", ".txt")  # what makes a model what it is
BROKEN = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
ORIGINAL = {  # where a file in the original layout has the parts, and what of them is not read
    "unet": "model.diffusion_model.", "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}  # fmt: skip
UNUSED = r"^first_stage_model\.loss\.|\.(text_projection(\.weight)?|logit_scale)$|position_ids$"
BESIDE = ("lora_", "control_model.", "embedding_manager.")  # weights that would not be used
VAE_ALONE = ("encoder.", "decoder.", "quant", "post_quant")
INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "addition_embed_type")


@dataclass(frozen=True)
class Place:
    """The weights of one model on this machine: a diffusers folder, or one file and its config."""

    path: Path
    config: Path  # a folder in the diffusers format; with one file its weights are not read
    fingerprint: str
    sha256: str = ""  # of the U-Net's weights, where it is known
    t5: bool = True  # whether T5 is taken where it is there


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
    folders = [path / part for part in parts if (path / part).is_dir()]
    fp16 = any(takes_half(os.listdir(folder), half) for folder in folders)
    return Place(path, path, stamp + " t5" * known.t5 + " fp16" * fp16, known.sha256, known.t5)


def local(name: str | Path, config: str | Path | None = None) -> Place:
    """A folder in the diffusers format, or one ``.safetensors`` file with a whole model."""
    path = SHIPPED.get(str(name), Path(name))
    if path.is_file():
        refuse(path, (path.suffix != ".safetensors", " is no .safetensors: a pickle can run code"))
        folder = _config(path, config)
        return Place(path, folder, f"{sha256(path)} config {hash_files(folder)}")
    missing = f"unknown model {str(name)!r}, and no such file or folder{nearest(str(name), NAMES)}"
    if str(name) in SHIPPED:
        missing = f"the lab's weights are not here ({path}): install memlib from a clone"
    index = path / "model_index.json"
    refuse(
        "",
        (not path.is_dir(), missing),
        (config is not None, f"config is for one .safetensors file, and {name} is none"),
        (not index.exists(), f"{path} is no diffusers pipeline: it has no {index.name}"),
    )
    checkpoints.check_class(str(path), index)
    if str(name) in SHIPPED or (path / "SHA256SUMS").exists():
        verify(path, lambda name: name.endswith(WEIGHTS))
    return Place(path, path, hash_files(path))


def _config(file: Path, config: str | Path | None) -> Path:
    """The folder with the configuration of one file: the one that is named, or told by shapes."""
    with safe_open(file, "pt") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    blocks = f"{ORIGINAL['unet']}input_blocks."
    first = shapes.get(f"{blocks}0.0.weight")
    text = shapes.get(f"{blocks}1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None or text is None:
        found = f"but perhaps SDXL, a LoRA or a VAE: it has {min(shapes, default='nothing')}"
        raise ModelError(f"{file} is no whole model of SD v1 or v2, {found}")
    folder = CONFIGS / (config or "sd14")
    folder = folder if folder.is_dir() else Path(config)
    refuse(
        f"{file}: ",
        (first[1] != 4, f"its U-Net takes {first[1]} channels, as for inpainting, not 4"),
        (config is None and text[1] != 768,
         "its kind is unknown, or whether it predicts v or epsilon: give config='sd21' for v, "
         "config='sd21-base' for epsilon, or a folder with its model_index.json"),
        (not (folder / "model_index.json").is_file(),
         f"unknown config {str(config)!r}: give sd14, sd21, sd21-base or a diffusers folder"),
    )  # fmt: skip
    return folder


@quiet()
def pipeline(place: Place, vae=None, half: bool = False):
    """diffusers' pipeline of these weights, every tensor of which was used, and none is missing."""
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options |= {"vae": vae} if vae else {}
    parts = [part for part in PARTS if part not in options]
    if place.path.is_dir() and checkpoints.check_class(str(place.path), _index(place.path)):
        return _flow(place, vae, half)
    if place.path.is_file():
        pipe = _of_file(place, parts, options)
    else:
        for part in parts:
            published = place.sha256 if part == "unet" else ""
            options[part] = load_part(place.path / part, part, half, published)
        pipe = StableDiffusionPipeline.from_pretrained(place.path, local_files_only=True, **options)
    _check(place, pipe)
    return pipe


def _index(folder: Path) -> Path:
    return folder / "model_index.json"


def _flow(place: Place, vae, half: bool) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's pipeline; T5 is left out where it is not in the folder."""
    t5 = place.t5 and (place.path / "text_encoder_3").is_dir()
    options = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    for part, kind in flow.KINDS.items():
        if part == "vae" and vae:
            options[part] = vae
        elif part not in options and not (place.path / part).is_dir():
            raise ModelError(f"{place.path}: its {part} is missing, and only T5 may be")
        elif part not in options:
            options[part] = load_part(place.path / part, part, half, kind=kind)
    pipe = StableDiffusion3Pipeline.from_pretrained(place.path, local_files_only=True, **options)
    _whole(place, pipe, [part for part in flow.KINDS if options[part]])
    refuse(f"{place.path}: ", *flow.faults(pipe, _sides(pipe.transformer)))
    return pipe


@quiet()
def load_part(folder: Path, part: str, half: bool = False, published: str = "", kind=None):
    """One network of a diffusers folder, loaded strictly; `published` is a sha256 to have."""
    options = {"variant": "fp16"} if takes_half(os.listdir(folder), half) else {}
    file = folder / "diffusion_pytorch_model.safetensors"
    if published and not options and sha256(file) != published:
        raise ModelError(f"{file} is not the published one (its sha256 differs): delete it")
    if part.startswith("text_encoder"):  # else its config may say to round what the file holds
        options["dtype"] = torch.float32
    model, report = (kind or KINDS[part]).from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True,
        ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    found = {
        "missing": report["missing_keys"],
        "too many": [k for k in report["unexpected_keys"] if not k.endswith("position_ids")],
        "of another shape": [key[0] for key in report["mismatched_keys"]],
    }
    faults = [f"{len(keys)} {what} ({min(keys)})" for what, keys in found.items() if keys]
    if faults:  # what is missing would be random
        raise ModelError(f"{folder}: its weights do not fit: {', '.join(faults)}")
    return model


def _of_file(place: Place, parts: list[str], options: dict):
    """A file in the original layout, through diffusers' own reader; nothing is asked of the Hub."""
    file = place.path
    with safe_open(file, "pt") as opened:
        keys = opened.keys()
        levels = opened.get_tensor("alphas_cumprod").float() if "alphas_cumprod" in keys else None
    if beside := [key for key in keys if key.startswith(BESIDE)]:
        what = f"{len(beside)} weights beside the model ({beside[0]}) that are not read"
        raise ModelError(f"{file}: {what}: merge them, or leave them out")
    if "vae" in parts and not any(key.startswith(ORIGINAL["vae"]) for key in keys):
        raise ModelError(f"{file} holds no vae: give one as vae")
    if place.config.parent == CONFIGS:  # these share one vocabulary
        words = json.loads((place.config / "tokenizer" / "tokenizer_config.json").read_text())
        words = {key: words[key] for key in ("pad_token", "model_max_length")}
        options["tokenizer"] = CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer", **words)
    pipe = _single(StableDiffusionPipeline, file, parts, config=str(place.config), **options)
    table, predicts = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type
    levels = table if levels is None else levels
    same = levels.shape == table.shape and torch.allclose(levels, table, atol=1e-4)
    if "ztsnr" in keys or not same or ("v_pred" in keys and predicts != "v_prediction"):
        what = "another prediction or noise schedule than its configuration"
        raise ModelError(f"{file} says {what}: give config, 'sd21' for v, or a folder")
    return pipe


def _single(kind, file: Path, parts: list[str], **options):
    """What diffusers reads of one file; it ignores tensors that it does not know, so count them."""
    try:
        loaded = kind.from_single_file(str(file), local_files_only=True, **options)
    except (NotImplementedError, SingleFileComponentError) as error:
        what = "weights are missing, or under names that are not SD's"
        raise ModelError(f"{file}: {what}") from error
    with safe_open(file, "pt") as opened:
        keys = [key for key in opened.keys() if not re.search(UNUSED, key)]  # noqa: SIM118
    for part in parts:
        network = loaded if kind is AutoencoderKL else getattr(loaded, part)
        mine = [key for key in keys if key.startswith(ORIGINAL[part])]
        mine = mine or [key for key in keys if key.startswith(VAE_ALONE)]
        wanted = len(network.state_dict())
        if any(".resblocks." in key for key in mine):  # OpenCLIP packs three matrices in one,
            layers = network.config.num_hidden_layers  # and has a layer that SD v2 leaves out
            wanted -= 4 * layers
            mine = [key for key in mine if f".resblocks.{layers}." not in key]
        if more := len(mine) - wanted:
            what = "missing" if more < 0 else "too many"
            raise ModelError(f"{file}: {abs(more)} of its {part}'s weights {what}")
    return loaded


@quiet()
def load_vae(vae: str | Path):
    """A VAE of its own and its fingerprint: a folder, a ``.safetensors`` file, or from the Hub."""
    path, known = Path(vae), checkpoints.named_vae(str(vae))
    if known:
        path = checkpoints.fetch(known, False, checkpoints.ALONE)
    if path.is_file():
        config = str(CONFIGS / "sd14")
        network = _single(AutoencoderKL, path, ["vae"], config=config, subfolder="vae")
    else:
        network = load_part(path, "vae", published=known.sha256 if known else "")
    if known:
        return network, f"{vae}@{checkpoints.snapshot(path).name}"
    return network, sha256(path) if path.is_file() else hash_files(path)


def _check(place: Place, pipe) -> None:
    """Refuse parts that do not fit each other, and what diffusers would use in another way."""
    unet, vae, scheduler = pipe.unet.config, pipe.vae.config, pipe.scheduler.config
    words, text = pipe.tokenizer, pipe.text_encoder.config
    own = place.config / "vae" / "config.json"
    own = json.loads(own.read_text()) if own.is_file() else {}
    own_scale = own.get("scaling_factor", vae.scaling_factor)
    sides = _sides(pipe.unet)
    channels = (unet.in_channels, unet.out_channels, vae.latent_channels)
    _whole(place, pipe, PARTS)
    refuse(
        f"{place.path}: ",
        (not vae.scaling_factor or vae.scaling_factor != own_scale,
         f"its VAE's scaling_factor is {vae.scaling_factor}, the pipeline's own has {own_scale}"),
        (any(vae.get(name) for name in ("shift_factor", "latents_mean", "latents_std")),
         "its VAE shifts latents, as no Stable Diffusion does"),
        (not {"beta_start", "beta_end", "beta_schedule"} <= {*scheduler}
         or scheduler.get("use_flow_sigmas") or scheduler.prediction_type == "flow_prediction",
         f"its scheduler ({type(pipe.scheduler).__name__}) states no noise schedule"),
        *((unet.get(name), f"its U-Net takes more than latents, timestep and text ({name})")
          for name in INPUTS),
        (len({*channels}) > 1,
         "its U-Net takes {} channels and gives {}, its VAE has {}".format(*channels)),
        (unet.cross_attention_dim != text.hidden_size,
         f"its U-Net takes text of width {unet.cross_attention_dim}, its text encoder gives "
         f"{text.hidden_size}"),
        (not 3 <= len(words) <= text.vocab_size
         or words.model_max_length > text.max_position_embeddings,
         f"its tokenizer has {len(words)} words and {words.model_max_length} places, its text "
         f"encoder {text.vocab_size} and {text.max_position_embeddings}"),
        (len(sides) > 1 or min(sides) < 1,
         f"its sample_size is {unet.sample_size}; supported is one side of square latents, as 64"),
    )  # fmt: skip


def _sides(network) -> set[int]:
    return {*np.ravel(network.config.sample_size or 0).tolist()}


def _whole(place: Place, pipe, parts) -> None:
    for part in parts:
        tensors = getattr(pipe, part).state_dict().values()
        if any(tensor.is_meta or not tensor.isfinite().all() for tensor in tensors):
            raise ModelError(f"{place.path}: its {part} has weights missing or not finite")
