"""The house: which way imports point, how large the core is, what a trace depends on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memlib
from memlib.hub.files import code
from memlib.paths import ROOT
from memlib.runs import cache

PACKAGE = ROOT / "memlib"
ROOMS = (
    "core",
    "hub",
    "detection",
    "mitigation",
    "runs",
    "site",
    "bench",
    "cli",
)  # each may import those before it
MADE_IN_HUB = ("hub/sscd.py", "hub/accelerated.py", "hub/flow.py")  # scores; half precision; flows
METHODS, METHOD_LINES = ("detection", "mitigation"), 970
CORE_LINES, TOTAL_LINES, LOOP_LINES = 1900, 8375, 60


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of memlib that a module imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    homes = {f"memlib.{public}": f"memlib.{home}" for public, home in memlib.HOMES.items()}
    return {homes.get(module, module) for module in found} & FILES.keys() - {name, "memlib"}


def room_of(name: str) -> str:
    parts = name.split(".")
    if name == "memlib.cli" or len(parts) > 2 or name.removeprefix("memlib.") in ROOMS:
        return parts[1] if parts[1] in (*ROOMS, "lab") else "core"
    return "lab" if parts[-1] == "lab" else "core"


GRAPH = {name: imports_of(name) for name in FILES}


def test_there_is_no_circle():
    left = dict(GRAPH)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_point_one_way(name):
    room = room_of(name)
    allowed = {"core", "lab"} if room == "lab" else {*ROOMS[: ROOMS.index(room) + 1]}
    wrong = [other for other in GRAPH[name] if room_of(other) not in allowed]
    assert not wrong, f"{name} ({room}) imports {wrong}"


def lines(files) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def test_the_core_is_read_in_one_sitting():
    assert lines(PACKAGE.glob("*.py")) <= CORE_LINES
    rooms = [f for name, f in FILES.items() if room_of(name) not in ("lab", "bench", *METHODS)]
    assert lines(rooms) <= TOTAL_LINES
    methods = [f for name, f in FILES.items() if room_of(name) in METHODS]
    assert lines(methods) <= METHOD_LINES


def test_the_loop_stands_alone():
    tree = ast.parse((PACKAGE / "sampler.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "sample")
    assert loop.end_lineno - loop.lineno < LOOP_LINES
    assert GRAPH["memlib.sampler"] == {"memlib.schedule"}


def test_one_module_says_where_things_are():
    places = [n for n, f in FILES.items() if "__file__).resolve().parents" in f.read_text()]
    assert places in (["memlib.paths"], ["memlib.paths", "memlib.site.colab"])


def trace_key(lab, monkeypatch, changed: str = "", by: str = "") -> str:
    """The part of a trace's key that is of code, were `changed` followed by the text `by`."""
    real = cache.code

    def edited(path):
        if Path(path) != PACKAGE / changed:
            return real(path)
        copy = Path(path).read_text() + by
        return ast.dump(ast.parse(copy)) if "=" in by else real(path)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "code", edited)
        pairs = memlib.load_pairs("lab").iloc[:1]
        return cache.run_folder(lab, pairs, seeds=[0], steps=2).name


def test_a_trace_depends_on_what_makes_its_bits(monkeypatch):
    lab = memlib.load("lab", "cpu")
    before = trace_key(lab, monkeypatch)
    for made_by in ("sampler.py", "schedule.py", "trace.py", "models.py", "measures.py"):
        assert trace_key(lab, monkeypatch, made_by, "\nX = 1\n") != before
    for file in FILES.values():
        place = file.relative_to(PACKAGE).as_posix()
        bring = place.startswith(("hub/", "site/", "bench/")) and place not in MADE_IN_HUB
        if bring or place in ("plot.py", "findings.py"):
            assert trace_key(lab, monkeypatch, place, "\nX = 1\n") == before, place


def test_comments_and_docstrings_change_nothing(tmp_path):
    file, text = tmp_path / "a.py", '"""What it does."""\n\n\ndef f(x):\n    return x + 1\n'
    file.write_text(text)
    before = code(file)
    file.write_text(text.replace("What", "All that").replace("return", '"""Doc."""\n    return'))
    assert code(file) == before
    file.write_text(f"# a comment\n{text}".replace("\n\n\n", "\n\n\n\n"))
    assert code(file) == before
    file.write_text(text.replace("+ 1", "+ 2"))
    assert code(file) != before


@pytest.mark.parametrize(("name", "new"), memlib.RENAMED.items())
def test_old_names_warn(name, new):
    with pytest.warns(FutureWarning, match=f"memlib.{name} is now called memlib.{new}"):
        assert getattr(memlib, name) is getattr(memlib, new)


def test_an_old_argument_warns():
    exact = memlib.ExactModel([[[[1.0]]]], ["a"])
    pairs = memlib.load_pairs("lab").iloc[:1].assign(caption="a", image="")
    options = dict(seeds=[0], steps=1, progress=False)
    with pytest.warns(FutureWarning, match=r"severity= is now called similarity="):
        trace = memlib.reverse_trace(exact, pairs, severity=None, **options)
    assert "severity" not in trace


def test_public_names_load_when_they_are_used():
    check = "import memlib, sys; assert 'torch' not in sys.modules; print(len(dir(memlib)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(memlib.__all__) <= set(dir(memlib))
