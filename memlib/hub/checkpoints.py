"""Where the weights of a model lie, and how they are read: folders, single files, the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from memlib.errors import first_line, nearest
from memlib.files import sha256, verify
from memlib.hub.names import CHECKPOINTS, NAMES, Checkpoint, at, checkpoint
from memlib.models import ModelError, quiet
from memlib.paths import CONFIGS, LAB

SUPPORTED = "StableDiffusionPipeline with a U-Net that predicts epsilon, v or the sample"
WEIGHTS = (".safetensors", ".json", ".txt")  # what makes a model what it is
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
ORIGINAL = {  # where a file in the original layout has them
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
TENSORS = r"(diffusion_pytorch_)?model(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors"
UNUSED = (".text_projection", ".text_projection.weight", ".logit_scale")  # of a text encoder
INDEX = {"": "model_index.json", "vae": "config.json"}  # what a repository of its kind has
BROKEN = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


VAE, VAE_REVISION = "stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493"
VAE_SHA256 = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"


@dataclass(frozen=True)
class Place:
    """The weights of one model on this machine: a diffusers folder, or one file and its config."""

    folder: Path  # with one file: where its configuration is
    fingerprint: str
    file: Path | None = None
    sha256: str = ""  # of the U-Net's weights, where it is known


def hash_files(folder: Path) -> str:
    """sha256 over the names and contents of a folder's weights and configs."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in WEIGHTS):
        total.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


def packages() -> None:
    """Import what reads weights, so that a fault of a package is not said to be a model's."""
    try:
        with quiet():
            from diffusers import StableDiffusionPipeline  # noqa: F401
            from transformers import CLIPTextModel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter of diffusers' late imports
        raise ImportError(f"diffusers cannot be used here: {first_line(error)}") from error


# --- where a name leads ---------------------------------------------------------------------------


def local(name: str | Path, config: str | Path | None = None) -> Place:
    """A folder in the diffusers format, or one ``.safetensors`` file with a whole model."""
    path = LAB if str(name) == "lab" else Path(name)
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise ModelError(f"{path} is a pickle, which can run code: give it as .safetensors")
    if path.is_file() and path.suffix != ".safetensors":
        raise ModelError(f"{path}: one file with a model must end in .safetensors")
    if path.is_file():
        config = _config(path, config)
        return Place(config, f"{sha256(path)} config {hash_files(config)}", path)
    if config is not None:
        raise ModelError(f"config is for one .safetensors file, and {name} is none")
    _check_folder(name, path)
    return Place(path, hash_files(path))


def _check_folder(name: str | Path, folder: Path) -> None:
    """A local folder must be a supported pipeline, whole where it has a list of checksums."""
    if str(name) == "lab" and not folder.is_dir():
        raise ModelError(
            f"the lab's weights are not here ({folder}): they come with the repository, so clone "
            "it and install from there"
        )
    if folder.suffix == ".safetensors" and not folder.is_dir():
        raise ModelError(f"there is no file {folder}")
    if not folder.is_dir():
        raise ModelError(f"unknown model {str(name)!r}, and no such folder{nearest(name, NAMES)}")
    if not (folder / "model_index.json").exists():
        raise ModelError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    _check_class(str(folder), folder / "model_index.json")
    if str(name) == "lab" or (folder / "SHA256SUMS").exists():
        try:
            verify(folder, lambda name: name.endswith(WEIGHTS))
        except ValueError as error:
            raise ModelError(str(error)) from error


def _check_class(name: str, index: Path) -> None:
    """Refuse SDXL, flow matching and whatever else is no `StableDiffusionPipeline`."""
    try:
        found = json.loads(index.read_text())
        kind, scheduler = str(found.get("_class_name")), str(found.get("scheduler"))
        classes = {part: (found.get(part) or [None, None])[1] for part in PARTS}
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise ModelError(f"{name}: model_index.json cannot be read") from error
    if kind != "StableDiffusionPipeline" or "FlowMatch" in scheduler:
        kind = "a flow-matching model" if "FlowMatch" in scheduler else f"a {kind}"
        raise ModelError(f"{name} is {kind}; supported is a {SUPPORTED}")
    for part, wanted in PARTS.items():
        if classes[part] not in (wanted, None if part == "vae" else wanted):
            raise ModelError(f"{name}: its {part} is {classes[part]}; supported is {wanted}")


# --- one file in the original layout --------------------------------------------------------------


def _config(file: Path, config: str | Path | None) -> Path:
    """The folder with the configuration of one file: the one that is named, or told by shapes."""
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}") from error
    unet = ORIGINAL["unet"]
    first = shapes.get(f"{unet}input_blocks.0.0.weight")
    text = shapes.get(f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None or text is None:
        raise ModelError(f"{file} holds {_what(shapes)}; supported is one file of SD v1 or v2")
    if first[1] != 4:
        raise ModelError(f"{file}: its U-Net takes {first[1]} channels, as for inpainting, not 4")
    if config is None and text[1] != 768:
        unknown = "its kind is unknown: give config, a folder with its model_index.json"
        if text[1] == 1024:
            unknown = "it is SD v2, and the file does not say whether it predicts v or epsilon: "
            unknown += "give config='sd21' for v, config='sd21-base' for epsilon"
        raise ModelError(f"{file}: {unknown}")
    config = config or "sd14"
    folder = CONFIGS / config if (CONFIGS / config).is_dir() else Path(config)
    if not (folder / "model_index.json").is_file():
        known = sorted(path.parent.name for path in CONFIGS.glob("*/model_index.json"))
        raise ModelError(f"unknown config {str(config)!r}{nearest(config, known)}")
    return folder


def _what(keys) -> str:
    """What a file of tensors is, by their names."""
    signs = {
        "lora": "a LoRA", "conditioner.embedders": "an SDXL model", "joint_blocks": "an SD3 model",
        "double_blocks": "a Flux model", "model.diffusion_model.": "another kind of U-Net",
        "down_blocks.": "one part of a diffusers pipeline, not a whole model", "decoder.":
        "a VAE, not a whole model", "encoder.layers": "a text encoder, not a whole model",
    }  # fmt: skip
    found = [what for sign, what in signs.items() if any(sign in key for key in keys)]
    if any(key.startswith(("decoder.", "encoder.conv_in", "first_stage_model.")) for key in keys):
        found = [signs["decoder."]]
    return found[0] if found else "no model that is known here"


# --- the parts ------------------------------------------------------------------------------------


def pipeline(place: Place, vae=None, half: bool = False):
    """diffusers' pipeline of these weights, every tensor of which was used, and none is missing.

    Raises
    ------
    ModelError
        A part whose weights are missing, pickled, of another shape or more than it takes; a U-Net
        that diffusers' pipeline would feed more than latents, timestep and text.
    """
    with quiet():
        from diffusers import StableDiffusionPipeline

        if place.file:
            pipe = _of_one_file(place, vae)
        else:
            parts = {"vae": vae} if vae else {}
            parts |= {
                part: load_part(place.folder / part, part, half)
                for part in PARTS if part not in parts
            }  # fmt: skip
            if place.sha256 and not takes_half(place.folder / "unet", half):
                _check_sum(place.folder / "unet/diffusion_pytorch_model.safetensors", place.sha256)
            pipe = StableDiffusionPipeline.from_pretrained(
                place.folder, safety_checker=None, feature_extractor=None, local_files_only=True,
                requires_safety_checker=False, **parts,
            )  # fmt: skip
    where = place.file or place.folder
    for part in PARTS:
        if not all(tensor.isfinite().all() for tensor in getattr(pipe, part).state_dict().values()):
            raise ModelError(f"{where}: its {part} has weights that are not finite")
    own = place.folder / "vae" / "config.json"
    _check_vae(where, pipe.vae, json.loads(own.read_text()) if own.is_file() else {})
    _check_scheduler(where, pipe.scheduler)
    _check_fit(where, pipe)
    return pipe


def load_part(folder: Path, part: str, half: bool = False):
    """One network of a diffusers folder, loaded strictly."""
    import diffusers
    import torch
    import transformers

    kind = getattr(transformers if part == "text_encoder" else diffusers, PARTS[part])
    files = sorted(f.name for f in folder.glob("*") if f.suffix in (".safetensors", ".bin"))
    tensors = [f for f in files if f.endswith(".safetensors")]
    if not tensors:
        other = f"only {files[0]}, a pickle, which can run code" if files else "nor any others"
        raise ModelError(
            f"{folder} cannot be loaded: it has no weights in safetensors format, {other}"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json")
    if not any(re.fullmatch(TENSORS, name) for name in tensors):
        raise ModelError(f"{folder} holds only {tensors[0]}, a variant that is not read")
    options = {"variant": "fp16"} if takes_half(folder, half) else {}
    if part == "text_encoder":  # else its config may say to round what the file holds
        options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except ValueError as error:  # the rest of diffusers' message is advice for its own callers
        found = re.search(r"\S+ expected shape .*?, but got [^.]*", str(error))
        raise ModelError(f"{folder}: {found[0]}") if found else error from error
    check(folder, report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    return model


def takes_half(folder: Path, half: bool) -> bool:
    """Whether a part is read from half-precision files: if asked for, or for want of others."""
    tensors = [f.name for f in folder.glob("*.safetensors")]
    fp16 = [name for name in tensors if ".fp16" in name]
    return bool(fp16) and (half or len(fp16) == len(tensors))


def check(where, missing, unexpected=(), mismatched=()) -> None:
    """Refuse a part whose weights are not just those of the file: the rest would be random."""
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]  # of old files
    mismatched = [key if isinstance(key, str) else key[0] for key in mismatched]
    texts = []
    for keys, what in (
        (missing, "missing"), (unexpected, "too many"),
        (mismatched, "of another shape"),
    ):  # fmt: skip
        if keys:
            number = f"{len(keys)} weight{'s' * (len(keys) > 1)} {what}"
            texts.append(f"{number} ({min(map(str, keys))}{', …' * (len(keys) > 1)})")
    if texts:
        lora = any(sign in str(key) for key in unexpected for sign in ("base_layer", "lora"))
        hint = ": it was saved with a LoRA that is not merged, merge it first" if lora else ""
        raise ModelError(f"{where}: {'; '.join(texts)}{hint}")


def _of_one_file(place: Place, vae):
    """A file in the original layout, through diffusers' own reader; nothing is asked of the Hub."""
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from transformers import CLIPTokenizer

    _count(place, [part for part in PARTS if not (part == "vae" and vae)])
    own = place.folder / "tokenizer"
    options = json.loads((own / "tokenizer_config.json").read_text())
    options = {key: options[key] for key in ("pad_token", "model_max_length") if key in options}
    whole = {f.name for f in own.glob("*")} & {"vocab.json", "tokenizer.json"}
    tokenizer = CLIPTokenizer.from_pretrained(own if whole else CONFIGS / "tokenizer", **options)
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(place.file), config=str(place.folder), local_files_only=True, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False, tokenizer=tokenizer,
            **({"vae": vae} if vae else {}),
        )  # fmt: skip
    except (NotImplementedError, SingleFileComponentError) as error:
        raise ModelError(f"{place.file}: weights under names that are not SD's") from error
    for part in PARTS:
        tensors = getattr(pipe, part).state_dict()
        check(f"{place.file}, {part}", [name for name, t in tensors.items() if t.is_meta])
    _check_marks(place.file, pipe.scheduler)
    return pipe


def _check_marks(file: Path, scheduler) -> None:
    """What a file itself says of its noise schedule must be what its configuration says."""
    import torch

    with safe_open(file, "pt") as opened:
        keys = set(opened.keys())
        levels = opened.get_tensor("alphas_cumprod") if "alphas_cumprod" in keys else None
    if "v_pred" in keys and scheduler.config.prediction_type != "v_prediction":
        raise ModelError(f"{file} says that it predicts v: give config='sd21', or a folder's")
    same = levels is None or (
        levels.shape == scheduler.alphas_cumprod.shape
        and torch.allclose(levels.float(), scheduler.alphas_cumprod.float(), atol=1e-4)
    )
    if "ztsnr" in keys or not same:
        raise ModelError(f"{file} has another noise schedule than its configuration: give config")


def _count(place: Place, parts: list[str]) -> None:
    """As many tensors in the file as its parts have: diffusers' reader lets some be missing."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    with safe_open(place.file, "pt") as opened:
        keys = [key for key in opened.keys() if not key.endswith("position_ids")]  # noqa: SIM118
    for sign in ("lora_", "control_model.", "embedding_manager."):
        if found := [key for key in keys if key.startswith(sign)]:
            raise ModelError(
                f"{place.file}: {len(found)} weights beside the model ({found[0]}, …) that are not "
                "read: merge them, or leave them out"
            )
    for part in parts:
        mine = [k for k in keys if k.startswith(ORIGINAL[part]) and not k.endswith(UNUSED)]
        mine = [k for k in mine if not k.startswith(f"{ORIGINAL['vae']}loss.")]
        if not mine:
            hint = ": give one as vae" if part == "vae" else ""
            raise ModelError(f"{place.file} holds no {part}{hint}")
        packed = part == "text_encoder" and any(".resblocks." in key for key in mine)
        with torch.device("meta"):
            if part == "text_encoder":
                config = CLIPTextConfig.from_pretrained(place.folder / part)
                network = CLIPTextModel(config)
            else:
                kind = getattr(diffusers, PARTS[part])
                network = kind.from_config(kind.load_config(place.folder / part))
        wanted = len(network.state_dict())
        if packed:  # OpenCLIP packs three matrices in one, and SD v2 leaves out its last layer
            layers = config.num_hidden_layers
            wanted -= 4 * layers
            beyond = [f".resblocks.{n}." for n in range(layers, layers + 9)]
            mine = [key for key in mine if not any(name in key for name in beyond)]
        if len(mine) != wanted:
            what = "missing" if len(mine) < wanted else "too many"
            raise ModelError(
                f"{place.file}: {abs(len(mine) - wanted)} of its {part}'s weights {what}"
            )


def _check_fit(where, pipe) -> None:
    """Refuse a U-Net that diffusers would feed more than we do, and parts that do not fit."""
    config = pipe.unet.config
    more = {
        "time_cond_proj_dim": "the guidance scale (a consistency model)",
        "class_embed_type": "class labels", "num_class_embeds": "class labels",
        "addition_embed_type": "added conditions",
        "encoder_hid_dim_type": "projected conditions",
        "dual_cross_attention": "a second text",
    }  # fmt: skip
    for name, what in more.items():
        if config.get(name) not in (None, False, "text_proj"):
            raise ModelError(
                f"{where}: its U-Net also takes {what} ({name}); this is not supported"
            )
    channels = {config.in_channels, config.out_channels, pipe.vae.config.latent_channels}
    if len(channels) > 1:
        raise ModelError(
            f"{where}: its U-Net takes {config.in_channels} channels and gives "
            f"{config.out_channels}, its VAE has {pipe.vae.config.latent_channels}"
        )
    width, takes = pipe.text_encoder.config.hidden_size, config.cross_attention_dim
    takes = {takes} if isinstance(takes, int) else {*takes}
    takes = {config.encoder_hid_dim} if config.encoder_hid_dim else takes
    if takes != {width}:
        raise ModelError(
            f"{where}: its U-Net takes text of width {', '.join(map(str, sorted(takes)))}, its "
            f"text encoder gives {width}"
        )
    words, text = pipe.tokenizer, pipe.text_encoder.config
    if len(words) < 3 or words.model_max_length > 10**6:
        what = "words" if len(words) < 3 else "number of places (model_max_length)"
        raise ModelError(f"{where}: its tokenizer has no {what}")
    if len(words) > text.vocab_size or words.model_max_length > text.max_position_embeddings:
        raise ModelError(
            f"{where}: its tokenizer has {len(words)} words and {words.model_max_length} places, "
            f"its text encoder {text.vocab_size} and {text.max_position_embeddings}"
        )
    size = config.sample_size
    size = {size} if isinstance(size, int) else {*size} if isinstance(size, list | tuple) else set()
    if len(size) != 1 or min(size) < 1:
        what = (
            "pictures that are not square"
            if len(size) > 1
            else "unet/config.json has no sample_size"
        )
        raise ModelError(f"{where}: {what}; supported is one side of square latents, such as 64")


def load_vae(vae: str | Path):
    """A VAE of its own and its fingerprint: a folder, a ``.safetensors`` file, or from the Hub."""
    path, known = Path(vae), _vae(str(vae))
    if known:
        path = _fetch(known, half=False, part="vae")
    elif not path.exists():
        raise ModelError(f"no VAE at {path}: there is no such file or folder")
    path = path / "vae" if (path / "vae" / "config.json").is_file() else path  # of a pipeline
    try:
        with quiet():
            network = _vae_of_one_file(path) if path.is_file() else load_part(path, "vae")
    except ModelError:
        raise
    except BROKEN as error:
        raise ModelError(f"the VAE {path} cannot be loaded: {first_line(error)}") from error
    if not known:
        return network, sha256(path) if path.is_file() else hash_files(path)
    if known.sha256:
        _check_sum(path / "diffusion_pytorch_model.safetensors", known.sha256)
    return network, f"{vae}@{_snapshot(path).name}"


def _vae_of_one_file(file: Path):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        network = AutoencoderKL.from_single_file(
            str(file), config=str(CONFIGS / "sd14"), subfolder="vae", local_files_only=True
        )
    except (NotImplementedError, SingleFileComponentError) as error:
        raise ModelError(f"{file} is no VAE of Stable Diffusion, or lacks weights") from error
    with safe_open(file, "pt") as opened:
        keys = [key.removeprefix(ORIGINAL["vae"]) for key in opened.keys()]  # noqa: SIM118
    mine = [key for key in keys if key.startswith(("encoder.", "decoder.", "quant", "post_quant"))]
    if len(mine) != len(network.state_dict()):
        many = abs(len(mine) - len(network.state_dict()))
        what = "missing" if len(mine) < len(network.state_dict()) else "too many"
        raise ModelError(f"{file}: {many} of the VAE's weights {what}")
    return network


def _check_vae(where, vae, own: dict) -> None:
    """Refuse a VAE that scales latents in another way than the U-Net was trained with."""
    config, scale = vae.config, vae.config.scaling_factor
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise ModelError(f"{where}: its VAE's scaling_factor is {scale}")
    if any(config.get(name) for name in ("shift_factor", "latents_mean", "latents_std")):
        raise ModelError(f"{where}: its VAE shifts latents, as no Stable Diffusion does")
    if (config.in_channels, config.out_channels) != (3, 3):
        raise ModelError(
            f"{where}: its VAE is for pictures of {config.in_channels} channels, not 3"
        )
    if own.get("scaling_factor", scale) != scale:
        raise ModelError(
            f"{where}: the VAE's scaling_factor is {scale}, the pipeline's own has "
            f"{own['scaling_factor']}"
        )


def _check_scheduler(where, scheduler) -> None:
    """Refuse a scheduler whose noise levels are not those of a diffusion with betas."""
    config, kind = scheduler.config, type(scheduler).__name__
    betas, steps = config.get("trained_betas"), config.get("num_train_timesteps")
    if not betas and not {"beta_start", "beta_end", "beta_schedule"} <= {*config}:
        raise ModelError(f"{where}: its scheduler ({kind}) states no noise schedule (betas)")
    if betas is not None and len(betas) != steps:
        raise ModelError(f"{where}: its scheduler has {len(betas)} betas for {steps} timesteps")
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        raise ModelError(f"{where}: its scheduler ({kind}) is for flow matching")


def _vae(name: str) -> Checkpoint | None:
    """A VAE on the Hub, Stability AI's at the commit that is known."""
    known = checkpoint(name)
    if known and known.repository == VAE and known.revision in ("main", VAE_REVISION):
        known = replace(known, revision=VAE_REVISION, sha256=VAE_SHA256 * (not known.file))
    return known


def _check_sum(file: Path, wanted: str) -> None:
    if sha256(file) != wanted:
        raise ModelError(f"{file} is not the published one (its sha256 differs): delete it")


# --- the Hub --------------------------------------------------------------------------------------


def on_hub(known: Checkpoint, half: bool, own_vae: bool = True) -> Place:
    """The weights of a Hub model on this machine, downloaded where they are not there yet."""
    path = _fetch(known, half, own_vae=own_vae)
    root = _snapshot(path)
    stamp = f"{known.repository}@{root.name}"
    if path.is_file():
        config = _config(path, known.config or None)
        stamp += f" {path.relative_to(root).as_posix()} config {hash_files(config)[:12]}"
        return Place(config, stamp, path)
    parts = [part for part in PARTS if own_vae or part != "vae"]
    variant = " fp16" if any(takes_half(path / part, half) for part in parts) else ""
    return Place(path, stamp + variant, sha256=known.sha256)


def download(name: str, revision: str | None = None, half: bool = False) -> list[Path]:
    """Bring the weights of a Hub model to this machine; return where they are."""
    known = at(checkpoint(name), revision)
    paths = [_fetch(known, half, own_vae=not known.vae)]
    return paths + ([_fetch(_vae(known.vae), half=False, part="vae")] if known.vae else [])


def downloaded(known: Checkpoint) -> bool:
    """Whether a model's weights, or a part of them, are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    names = {known.file, known.half} - {""} or {"model_index.json"}
    found = [try_to_load_from_cache(known.repository, n, revision=known.revision) for n in names]
    return any(isinstance(file, str) for file in found)


def _snapshot(path: Path) -> Path:
    """The snapshot folder that a path of the Hub's cache lies in; its name is the commit."""
    return next(p for p in (path, *path.parents) if p.parent.name == "snapshots")


def _wanted(names: list[str], half: bool, part: str, own_vae: bool) -> list[str]:
    """Which files of a repository make up the pipeline (or its VAE): safetensors, one precision.

    Raises
    ------
    ValueError
        A part has none.
    """
    if part:  # alone in its repository, or in that of a pipeline
        wanted, folders = [], [f"{part}/" if f"{part}/config.json" in names else ""]
    else:
        wanted = [n for n in names if n.startswith(("tokenizer/", "scheduler/"))]
        wanted = ["model_index.json", "vae/config.json", *wanted]
        folders = [f"{name}/" for name in PARTS]
        folders = [folder for folder in folders if own_vae or folder != "vae/"]
    for folder in folders:
        mine = [n for n in names if n.startswith(folder) and "/" not in n.removeprefix(folder)]
        tensors = [n for n in mine if re.fullmatch(TENSORS, n.removeprefix(folder))]
        fp16 = [n for n in tensors if ".fp16" in n]
        full = [n for n in tensors if n not in fp16]
        chosen = fp16 if half and fp16 else full or fp16
        if not chosen:
            raise ValueError(f"it has no weights in safetensors format ({folder or 'at all'})")
        wanted += chosen + [n for n in mine if n.endswith(".json")]
    return wanted


def _fetch(known: Checkpoint, half: bool, part: str = "", own_vae: bool = True) -> Path:
    """The snapshot of a repository (or one file of it), downloaded as far as it is not here."""
    from huggingface_hub import errors, hf_hub_download, list_repo_files, snapshot_download

    repository, revision = known.repository, known.revision
    name = f"{repository}@{revision}" if revision != "main" else repository
    try:
        if known.file:
            if half and known.half not in ("", known.file):
                with contextlib.suppress(errors.EntryNotFoundError):
                    return Path(hf_hub_download(repository, known.half, revision=revision))
            return Path(hf_hub_download(repository, known.file, revision=revision))
        index = hf_hub_download(repository, INDEX[part], revision=revision)
        if not part:
            _check_class(name, Path(index))
        try:
            names = list_repo_files(repository, revision=revision)
        except Exception:  # no network, whatever its library calls that: what is here may do
            here = Path(index).parent
            names = [f.relative_to(here).as_posix() for f in here.rglob("*") if f.is_file()]
            with contextlib.suppress(ValueError):
                _wanted(names, half, part, own_vae)
                return here
            raise errors.LocalEntryNotFoundError(name) from None
        wanted = _wanted(names, half, part, own_vae)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence on its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {revision!r}: give another one") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the Hub has no repository {repository!r}, or it is private (then set HF_TOKEN)"
            f"{_note(repository)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name} is not on this machine and cannot be downloaded: no network, or "
            "HF_HUB_OFFLINE is set; give a local folder, or the name 'lab'"
        ) from error
    except errors.EntryNotFoundError as error:
        lacks = f"is no diffusers pipeline: it has no {INDEX[part]}"
        raise ModelError(
            f"{name} {f'has no file {known.file}' if known.file else lacks}"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        reason = f"{name} cannot be downloaded: {first_line(error)}"
        raise ModelError(f"{reason}{_note(repository)}") from error


def _note(repository: str) -> str:
    """What is known of a repository, for a message."""
    notes = [c.note for c in CHECKPOINTS.values() if c.repository == repository]
    return f" ({notes[0]})" if notes else ""
