"""A notebook as Colab runs it: an empty folder, a fresh environment, the project from git."""

import json
import os
import subprocess
import sys
import tomllib

import nbformat
import pytest
from papermill import inspect_notebook

from memlib import book

URL = "https://github.com/someone/a-book"


@pytest.mark.slow
def test_a_notebook_from_nothing(tmp_path, monkeypatch):
    """What it runs is the last commit: on a checkout with changes, those are not tested here."""
    monkeypatch.setattr(book, "repository", lambda root: URL)
    chapters = {"convergence": book.read_chapters(book.ROOT)["convergence"]}
    book.write_notebooks(book.ROOT, chapters, tmp_path / "notebooks")
    notebook = nbformat.read(tmp_path / "notebooks/convergence.ipynb", as_version=4)
    sizes = tomllib.loads((book.ROOT / "book/profiles.toml").read_text())["smoke"]["convergence"]
    place = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    lines = [f"{name} = {value!r}" for name, value in sizes.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))

    empty, fresh = tmp_path / "content", tmp_path / "fresh"
    empty.mkdir()
    nbformat.write(notebook, empty / "convergence.ipynb")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MEMLIB"))}
    environment = clean | {
        "PIP_CONSTRAINT": str(book.ROOT / "constraints.txt"),
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{book.ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": URL, "JUPYTER_PATH": "", "IPYTHONDIR": str(tmp_path / "ipython"),
    }  # fmt: skip
    options = dict(env=environment, cwd=empty, check=True, capture_output=True, text=True)
    subprocess.run([sys.executable, "-m", "venv", fresh], **options)
    python = fresh / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "nbclient", "ipykernel"], **options)
    run = subprocess.run(
        [fresh / "bin/jupyter", "execute", "convergence.ipynb", "--output=out.ipynb"],
        **(options | {"check": False}),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    done = json.loads((empty / "out.ipynb").read_text())
    text = "".join("".join(o.get("text", "")) for c in done["cells"] for o in c.get("outputs", []))
    assert "no GPU: the lab needs none" in text
    rows = [json.loads(p.read_text()) for p in (empty / "results/lab").rglob("*.json")]
    assert {row["claim"] for row in rows} >= {"converge-earlier", "decided-early"}
    assert (empty / "how-diffusion-models-memorize/data/lab").is_dir()


def test_papermill_lists_the_parameters(tmp_path):
    """`papermill --help-notebook` on what Colab gets: every parameter, with a word on it."""
    chapters = book.read_chapters(book.ROOT)
    book.write_notebooks(book.ROOT, chapters, tmp_path / "notebooks")
    for name, chapter in chapters.items():
        found = inspect_notebook(str(tmp_path / "notebooks" / f"{name}.ipynb"))
        assert found.keys() == book.parameters(name, chapter).keys(), name
        for parameter in found.values():
            assert parameter["help"].strip(), (name, parameter)
