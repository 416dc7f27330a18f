"""What the Hub has of a model, and how it is downloaded: safetensors only, in one precision."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from memlib.errors import ModelError, first_line
from memlib.hub.names import Checkpoint, at, checkpoint

VAE, VAE_REVISION = "stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493"
VAE_SHA256 = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"
PARTS = ("unet", "vae", "text_encoder")
FLOW, FLOW_PARTS = (
    "StableDiffusion3Pipeline",
    ("transformer", "vae", "text_encoder", "text_encoder_2"),
)
ALONE = ("",)  # the folder of a network that has a repository of its own
TENSORS = r"(diffusion_pytorch_)?model(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors"
REFUSALS = {  # what is said of the Hub's errors, the narrower ones first
    errors.GatedRepoError: "{name} is gated: accept its licence on its page on the Hub, then log "
    "in with `hf auth login` or set HF_TOKEN",
    errors.RevisionNotFoundError: "{repository} has no revision {revision!r}: give another one",
    errors.RepositoryNotFoundError: "the Hub has no repository {repository!r}, or it is private "
    "(then set HF_TOKEN)",
    errors.LocalEntryNotFoundError: "{name} is not on this machine and cannot be downloaded: no "
    "network, or HF_HUB_OFFLINE is set; give a local folder, or the name 'lab'",
    errors.EntryNotFoundError: "{name} has no file {file}",
    Exception: "{name} cannot be downloaded: {reason}",
}


def fetch(known: Checkpoint, half: bool, parts: Collection[str] = PARTS) -> Path:
    """The snapshot of a repository (or one file of it), downloaded as far as it is not here."""
    where = {"repo_id": known.repository, "revision": known.revision}
    name = known.repository + f"@{known.revision}" * (known.revision != "main")
    file = known.file or ("config.json" if parts == ALONE else "model_index.json")
    try:
        if half and known.half:
            with suppress(errors.EntryNotFoundError):
                return Path(huggingface_hub.hf_hub_download(filename=known.half, **where))
        path = Path(huggingface_hub.hf_hub_download(filename=file, **where))
        if known.file:
            return path
        if parts != ALONE and check_class(name, path):
            parts = FLOW_PARTS + ("text_encoder_3",) * known.t5
        try:
            names = [f.rfilename for f in huggingface_hub.model_info(**where).siblings]
        except Exception:  # no network, whatever its library calls that: what is here will do
            names = [f.relative_to(path.parent).as_posix() for f in path.parent.rglob("*.*")]
        patterns = _wanted(names, half, parts)
        return Path(huggingface_hub.snapshot_download(**where, allow_patterns=patterns))
    except ModelError:
        raise
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        text = next(text for kind, text in REFUSALS.items() if isinstance(error, kind))
        said = {"repository": known.repository, "revision": known.revision, "file": file}
        raise ModelError(text.format(name=name, reason=first_line(error), **said)) from error


def _wanted(names: list[str], half: bool, parts: Collection[str]) -> list[str]:
    """Which files of a repository make up these parts of a pipeline; ValueError if one has none."""
    wanted = ["model_index.json", "vae/config.json"]
    wanted += [n for n in names if n.startswith(("tokenizer", "scheduler/"))]
    for part in parts:
        files = [n for n in names if n.rpartition("/")[0] == part]
        tensors = [n for n in files if re.fullmatch(TENSORS, n.rpartition("/")[2])]
        if not tensors:
            raise ValueError(f"no weights in safetensors format ({part}/)")
        fp16 = takes_half(tensors, half)
        wanted += [n for n in tensors if (".fp16" in n) == fp16]
        wanted += [n for n in files if n.endswith(".json")]
    return wanted


def takes_half(names: Iterable[str], half: bool) -> bool:
    """Whether a part is read from half-precision files: if asked for, or for want of others."""
    fp16 = [".fp16" in name for name in names if name.endswith(".safetensors")]
    return any(fp16) and (half or all(fp16))


def check_class(name: str, index: Path) -> bool:
    """Whether a pipeline is Stable Diffusion 3's; what is neither that nor SD's is refused."""
    found, names = json.loads(index.read_text()), ("StableDiffusionPipeline", FLOW)
    kind, flow = str(found.get("_class_name")), "FlowMatch" in str(found.get("scheduler"))
    if kind not in names:
        distilled = ": its guidance is distilled, there is no second branch" * ("Flux" in kind)
        raise ModelError(f"{name} is a {kind}{distilled}; supported are {' and '.join(names)}")
    if flow != (kind == FLOW):
        what = "a flow's" if flow else "a diffusion's"
        raise ModelError(f"{name} is a {kind}, and its scheduler is {what}")
    return flow


def named_vae(name: str) -> Checkpoint | None:
    """A VAE on the Hub, Stability AI's at the commit that is known."""
    known = checkpoint(name)
    if known and known.repository == VAE and known.revision in ("main", VAE_REVISION):
        return replace(known, revision=VAE_REVISION, sha256=VAE_SHA256)
    return known


def download(name: str, revision: str | None = None, half: bool = False) -> list[Path]:
    """Bring the weights of a Hub model to this machine; return where they are."""
    known = at(checkpoint(name), revision)
    paths = [fetch(known, half, [part for part in PARTS if part != "vae" or not known.vae])]
    return paths + ([fetch(named_vae(known.vae), False, ALONE)] if known.vae else [])


def downloaded(known: Checkpoint, *names: str) -> list[Path]:
    """Which files of a repository are on this machine: by default one that stands for all."""
    names = names or [n for n in (known.file, known.half) if n] or ["model_index.json"]
    find = huggingface_hub.try_to_load_from_cache
    found = [find(known.repository, name, revision=known.revision) for name in names]
    return [Path(file) for file in found if isinstance(file, str)]


def snapshot(path: Path) -> Path:
    """The snapshot folder that a path of the Hub's cache lies in; its name is the commit."""
    return next(p for p in (path, *path.parents) if p.parent.name == "snapshots")
