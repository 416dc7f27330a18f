"""What is written down about the project agrees with itself."""

import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from memlib.hub import files as checksums

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(r) for r in sum(EXTRAS.values(), PROJECT["dependencies"])]
PINNED = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if (path := ROOT / name).is_file()]


def test_conda_users_get_the_same_project():
    """environment.yml holds Python and pip; every other version comes from our two files."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python, pip, through_pip = dependencies
    assert re.fullmatch(r"python=(\d+\.\d+)", python)
    assert python.removeprefix("python=") + ".0" in SpecifierSet(PROJECT["requires-python"])
    assert pip == "pip"
    assert through_pip == {"pip": ["-c constraints.txt", "-e .[book,test]"]}
    assert {"book", "test"} <= set(EXTRAS)


def test_every_dependency_is_pinned_within_its_range():
    pins = {canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in PINNED}
    for requirement in DECLARED:
        if requirement.name == PROJECT["name"]:  # an extra that contains another
            continue
        if requirement.marker:  # pinned where it is declared
            assert str(requirement.specifier).startswith("==")
            continue
        assert pins[canonical(requirement.name)] in requirement.specifier, requirement


def test_what_colab_brings_is_admitted():
    """All of it, torch included, by what the first cell of a notebook installs there."""
    lines = (ROOT / "constraints-colab.txt").read_text().splitlines()
    theirs = [Requirement(line) for line in lines if not line.startswith("#")]
    needs = {canonical(n.name): n.specifier for n in map(Requirement, PROJECT["dependencies"])}
    for pin in theirs:
        version = str(pin.specifier).removeprefix("==")
        assert version in needs.get(canonical(pin.name), SpecifierSet()), pin
    assert {"torch", "numpy", "ipykernel"} <= {pin.name for pin in theirs}


def test_what_is_installed_is_what_is_pinned():
    for pin in PINNED:
        try:
            installed = metadata.version(pin.name)
        except metadata.PackageNotFoundError:
            continue  # an extra, or a dependency of another platform
        assert installed.split("+")[0] in pin.specifier, pin.name


def test_versions_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == metadata.version("memlib")
    assert "2509.25705" in (ROOT / "CITATION.cff").read_text()


def test_licences_are_there():
    licence = (ROOT / "LICENSE").read_text()
    assert "MIT License" in licence
    assert "CC BY 4.0" in licence
    assert "Copyright (c) Microsoft Corporation" in (ROOT / "THIRD_PARTY_NOTICES.md").read_text()


def test_the_repository_is_small():
    """90 MB; 12 for the flow lab, 29 for its twin and two of its earlier steps, all on one VAE."""
    assert sum(path.lstat().st_size for path in tracked()) < 131e6


def test_no_file_names_a_machine():
    names = ("home", "root", "Users", "work")
    folders = re.compile(r"(?<![\w.:/$}])/(" + "|".join(names) + r")/\w")
    hosts = re.compile(r"\b(pypi|npmjs|debian|anaconda)\." + "(org|com)")
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for pattern in (folders, hosts):
            found = pattern.search(text)
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_a_clone_by_git_for_windows_holds(tmp_path):
    """The last commit as Git for Windows checks it out: line ends are ours, checksums hold."""
    tracked()
    git = ["git", "clone", "-q", "--depth=1", "-c", "core.autocrlf=true"]
    subprocess.run([*git, f"file://{ROOT}", tmp_path / "clone"], check=True)
    checksums.verify(tmp_path / "clone/data/lab", lambda name: True)
    for name in ("Makefile", ".ci/run", "pyproject.toml"):
        assert b"\r" not in (tmp_path / "clone" / name).read_bytes(), name


def test_make_alone_lists_the_targets():
    text = (ROOT / "Makefile").read_text()
    shown = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True).stdout
    for target in re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split():
        assert re.search(rf"make {target} +\w", shown), target


# Making the environment: the real Makefile with a made-up Python.
FAKE_PYTHON = """#!/bin/sh
echo "${{PYTHONPATH-none}}" >seen
case "$*" in
  -c*) exit {old} ;;
  -V) echo "Python 3.8.1" ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *pip*) echo "ERROR: no space left" >&2; exit {pip} ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def run(old=0, pip=0, disk=9_000_000):
        for name, script in {
            "python": FAKE_PYTHON.format(old=old, pip=pip),
            "df": f"#!/bin/sh\necho 'name used'\necho /dev/x 1 1 {disk} 1% /\n",
        }.items():
            (tmp_path / name).write_text(script)
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["make", "-s", ".venv/installed", f"PYTHON={tmp_path}/python"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def test_an_environment_is_made_once(make):
    first = make()
    assert first.returncode == 0, first.stderr
    assert "making the environment" in first.stdout
    assert make().stdout == ""


def test_packages_of_elsewhere_are_not_seen(make, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    assert make().returncode == 0
    assert (tmp_path / "seen").read_text() == "none\n"


def test_an_old_python_is_told_in_one_line(make, tmp_path):
    result = make(old=1)
    assert result.returncode
    assert "Python 3.11, 3.12 or 3.13 is needed" in result.stderr.splitlines()[0]
    assert "Python 3.8.1" in result.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


def test_a_full_disk_is_told_in_one_line(make, tmp_path):
    result = make(disk=1000)
    assert result.returncode
    assert "3 GB of disk" in result.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


def test_a_failed_install_does_not_count(make, tmp_path):
    result = make(pip=1)
    assert result.returncode
    assert "no space left" in result.stderr
    assert not (tmp_path / ".venv/installed").exists()
    assert make().returncode == 0
    assert (tmp_path / ".venv/installed").exists()
