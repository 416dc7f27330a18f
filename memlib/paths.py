"""Where things are: the checkout, what it ships, and what is kept for later."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAB, REDRAWN, LAB_FLOW, REDRAWN_FLOW, CONFIGS = (
    ROOT / "data" / name for name in ("lab", "redrawn", "lab-flow", "redrawn-flow", "configs")
)
BENCH, TRAININGS = (ROOT / "data" / name for name in ("bench.json", "trainings.csv"))
TRACES, JUDGE = ROOT / "data" / "traces", ROOT / "data" / "judge.safetensors"


def cache_folder() -> Path:
    """Traces: ``$MEMLIB_CACHE``, or ``_build/traces`` in a checkout, or ``~/.cache/memlib``."""
    return _kept("MEMLIB_CACHE", "traces", "")


def data_folder(name: str = "") -> Path:
    """Lists, images, networks: ``$MEMLIB_DATA``, ``_build/data`` or ``~/.cache/memlib/data``."""
    return _kept("MEMLIB_DATA", "data", "data") / name


def _kept(variable: str, in_checkout: str, at_home: str) -> Path:
    if variable in os.environ:
        return Path(os.environ[variable])
    if (ROOT / "pyproject.toml").exists():
        return ROOT / "_build" / in_checkout
    return Path.home() / ".cache" / "memlib" / at_home
