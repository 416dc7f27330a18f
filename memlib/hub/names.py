"""Models by their names: which repository, at which commit, and what is known of it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memlib.paths import LAB, LAB_FLOW


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies on the Hub; `checkpoints.toml` says what each field is."""

    title: str
    repository: str
    revision: str = "main"
    file: str = ""
    half: str = ""
    config: str = ""
    vae: str = ""
    sha256: str = ""
    flow: bool = False
    t5: bool = False
    note: str = ""
    aliases: Sequence[str] = ()

    def __str__(self) -> str:
        commit = self.revision if self.revision == "main" else self.revision[:8]
        return f"{self.repository}@{commit}{self.file and f' ({self.file})'}"


TABLE = tomllib.loads(Path(__file__).with_name("checkpoints.toml").read_text())
CHECKPOINTS = {name: Checkpoint(**fields) for name, fields in TABLE.items()}
ALIASES = {alias: name for name, known in CHECKPOINTS.items() for alias in known.aliases}
SHIPPED = {"lab": LAB, "lab-flow": LAB_FLOW}
NAMES = (*SHIPPED, "exact", *CHECKPOINTS, *ALIASES)
FLOWS = ("lab-flow", *(name for name, known in CHECKPOINTS.items() if known.flow))


def checkpoint(name: str) -> Checkpoint | None:
    """Of a name of ours, or ``owner/name[/file.safetensors][@revision]``; None for a local path."""
    if Path(name).exists():
        return None
    name = ALIASES.get(name, name)
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    pattern = r"([\w-][\w.-]*/[\w.-]+?)(?:/([\w./ -]+\.safetensors))?(?:@([\w./-]+))?"
    found = re.fullmatch(pattern, name)
    if not found or found[1].endswith(".safetensors"):
        return None
    return Checkpoint(name, found[1], found[3] or "main", file=found[2] or "", half=found[2] or "")


def at(known: Checkpoint, revision: str | None) -> Checkpoint:
    """The same at another revision, whose checksum is not known."""
    return replace(known, revision=revision, sha256="") if revision else known
