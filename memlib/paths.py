"""Where things are: the checkout, what it ships, and what is kept for later."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
LAB, REDRAWN, CONFIGS, TRACES = (DATA / name for name in ("lab", "redrawn", "configs", "traces"))
LAB_FLOW, REDRAWN_FLOW, STEPS_FLOW = (DATA / f"{n}-flow" for n in ("lab", "redrawn", "steps"))
BENCH, TRAININGS, JUDGE = (DATA / n for n in ("bench.json", "trainings.csv", "judge.safetensors"))


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
