"""The chapters as notebooks without outputs, for Colab and for readers who go on by themselves."""

import copy
import re
import subprocess
from pathlib import Path

import jupytext
import yaml
from nbformat.v4 import new_code_cell

from memlib.site.chapters import profiles, tagged

INSTALL = """\
# On Colab: get the book as it was when this page was built, then look for a GPU.
# As it stands this notebook runs the lab: minutes, with or without a GPU. The cell after the
# parameters has sizes for Stable Diffusion on a T4: at most 20 minutes (computed, not measured).
import os, subprocess, sys
book = "how-diffusion-models-memorize"
if not os.path.isdir(book):
    !git clone -q {url} {{book}}
!git -C {{book}} checkout -q {commit}
# Adds what is missing here; torch, numpy and ipykernel of this runtime stay as they are.
install = [sys.executable, "-m", "memlib.site.colab"]
done = subprocess.run(install, cwd=book, capture_output=True, text=True)
if done.returncode:
    raise SystemExit(done.stderr)
sys.path.insert(0, os.path.abspath(book))
import torch
gpu = torch.cuda.is_available()
print(torch.cuda.get_device_name() if gpu else "no GPU: the lab needs none")"""


def git(root: Path, *words: str) -> str:
    command = ["git", "-C", root, *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def repository(root: Path) -> str:
    """``https://github.com/owner/name`` from ``_config.yml`` or git's origin; '' where unknown."""
    known = yaml.safe_load((root / "_config.yml").read_text()).get("repository") or {}
    url = known.get("url") or git(root, "remote", "get-url", "origin")
    match = re.search(r"github\.com[:/]([\w.-]+)/([\w.-]+?)(?:\.git)?/?$", url)
    return f"https://github.com/{match[1]}/{match[2]}" if match else ""


def write(root: Path, chapters: dict, folder: Path) -> None:
    """Notebooks that run the lab as they are; a first cell installs the book from its address.

    A cell after the parameters has the sizes of the profile ``t4`` for Stable Diffusion, to be
    taken by deleting a hash.
    """
    folder.mkdir()
    url, sizes = repository(root), profiles(root).get("t4", {})
    install = INSTALL.format(url=url, commit=git(root, "rev-parse", "HEAD"))
    for name, chapter in chapters.items():
        cells = [new_code_cell(install, id="install")] if url else []
        for cell in chapter.cells:
            cells.append(cell)
            if tagged(cell) and name in sizes:
                lines = ["# Stable Diffusion on a T4 (20 minutes at most, computed): delete #."]
                lines += [f"# {key} = {value!r}" for key, value in sizes[name].items()]
                cells.append(new_code_cell("\n".join(lines), id="t4"))
        notebook = copy.copy(chapter)
        notebook.cells = cells
        jupytext.write(notebook, folder / f"{name}.ipynb")
