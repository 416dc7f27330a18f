"""What pages say of themselves: the time they take, and how the book is cited."""

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbformat import NotebookNode

LINE = "*Needs no GPU.*"  # in a chapter, where its times are put
WORDS = 200  # that are read in a minute, formulas and figures not counted


def minutes_to_read(chapter: NotebookNode) -> int:
    prose = [cell.source for cell in chapter.cells if cell.cell_type == "markdown"]
    return max(1, round(len(re.findall(r"[^\W\d_]{2,}", " ".join(prose))) / WORDS))


def seconds_of(made: Path, name: str) -> float:
    """How long the chapter ran for the page at hand."""
    return json.loads((made / "executed" / f"{name}.json").read_text())["seconds"]


def with_times(made: Path, name: str, chapter: NotebookNode) -> NotebookNode:
    """The chapter with its times where it says what it needs."""
    took = f"{LINE[:-1]} {minutes_to_read(chapter)} minutes to read; "
    took += f"ran in {seconds_of(made, name):.0f} seconds for this page ([all times](times)).*"
    cells = [cell | {"source": cell.source.replace(LINE, took)} for cell in chapter.cells]
    return nbformat.from_dict(chapter | {"cells": cells})


def write_pages(root: Path, made: Path, read: dict[str, NotebookNode], url: str) -> None:
    """Write ``_times.md`` and ``_cite.md`` for the pages that include them."""
    lines = ["| chapter | minutes to read | seconds to run |", "|---|--:|--:|"]
    total = [0.0, 0.0]
    for name, chapter in read.items():
        times = (minutes_to_read(chapter), seconds_of(made, name))
        lines.append(f"| [](/{name}) | {times[0]} | {times[1]:.0f} |")
        total = [a + b for a, b in zip(total, times, strict=True)]
    lines.append(f"| all, one after the other | {total[0]:.0f} | {total[1]:.0f} |")
    lines += ["", f"Where they ran: {processor()}."]
    (made / "stage" / "_times.md").write_text("\n".join(lines) + "\n")
    told = subprocess.run(
        ["git", "log", "-1", "--format=%h %cs"], cwd=root, capture_output=True, text=True
    )
    commit, _, day = told.stdout.strip().partition(" ")
    fields = {
        "title": "{How Diffusion Models Memorize, the executable book}",
        "author": "{{The authors of How Diffusion Models Memorize, the executable book}}",
        "year": f"{{{day[:4]}}}" if day else "", "version": f"{{{version('memlib')}}}",
        "note": f"{{Commit {commit}, {day}}}" if commit else "", "url": f"{{{url}}}" if url else "",
    }  # fmt: skip
    entry = ",\n".join(f"  {name} = {value}" for name, value in fields.items() if value)
    book = f"```bibtex\n@software{{how-diffusion-models-memorize,\n{entry}\n}}\n```\n"
    (made / "stage" / "_cite.md").write_text(book)


def processor() -> str:
    """What this machine computes with, as it calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (names or [platform.machine()])[0]
