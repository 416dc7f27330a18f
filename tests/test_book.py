"""The driver, on a book of two tiny chapters; what the real ones depend on."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock

from memlib import cli
from memlib.paths import ROOT
from memlib.runs import MAKES
from memlib.site import book, chapters, digest, forked, notebooks, run

FRONT = "---\nkernelspec: {name: python3, display_name: Python 3}\n---\n# A chapter\n\nProse.\n\n"
CELL = "```{{code-cell}} ipython3\n{}\n```\n\n"
ONE = (
    FRONT
    + CELL.format(":tags: [parameters]\nseeds: int = 10\nmodel = 'lab'")
    + CELL.format("print('ran with', seeds, model)")
)
TWO = (
    FRONT
    + CELL.format(":tags: [parameters]\ndraws = 16\nmodel = 'lab'\nscales = [1.0]")
    + CELL.format(
        "if draws == 7:\n    raise ValueError('first line\\nlast line')\n"
        "if draws == 8:\n    import os; os._exit(1)\nprint('ran with', draws, scales)"
    )
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "book").mkdir()
    (tmp_path / "memlib").mkdir()
    (tmp_path / "memlib/sample.py").write_text("")
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: one\nparts: [{chapters: [{file: two}, {file: plain}]}]\n"
    )
    (tmp_path / "_config.yml").write_text("repository: {url: ''}\n")
    (tmp_path / "book/one.md").write_text(ONE)
    (tmp_path / "book/two.md").write_text(TWO)
    (tmp_path / "book/plain.md").write_text("# A page without code\n")
    (tmp_path / "book/profiles.toml").write_text("[smoke]\none.seeds = 2\n")
    return tmp_path


def execute(root: Path, profile: str = "full", assignments: str = "") -> list[str]:
    """Names of the chapters that ran."""
    read = chapters.read(root)
    defaults = {name: chapters.parameters(name, notebook) for name, notebook in read.items()}
    chosen = chapters.choose(defaults, profile, chapters.profiles(root), assignments, "")
    return run.run_changed(root, root / "_build" / profile, read, chosen)


@pytest.fixture
def build(root, monkeypatch, capfd):
    """`memlib book` in that folder: its status, what it printed, its errors."""
    monkeypatch.setattr("memlib.cli.book.ROOT", root)

    def build(*arguments: str) -> tuple[int, str, str]:
        return cli.main(["book", *arguments]), *capfd.readouterr()

    return build


FORKED = "real = f.python; f.PACKAGES = ('matplotlib.pyplot',); f.python = lambda e, begin: real(e)"


@pytest.fixture(params=["", FORKED], ids=["started", "forked"])
def kernels(request, monkeypatch):
    """How kernels begin; a build of two chapters starts them, and they do not use torch."""
    for name in ("python", "PACKAGES"):
        monkeypatch.setattr(forked, name, getattr(forked, name))  # and back
    exec(request.param, {"f": forked})
    return request.param


def outputs(root: Path, name: str, profile: str = "full") -> str:
    notebook = nbformat.read(root / f"_build/{profile}/executed/{name}.ipynb", as_version=4)
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))


@pytest.mark.parametrize(
    ("arguments", "wrong", "nearest"),
    [
        (["--profile", "smok"], "smok", "smoke"),
        (["--set", "seed=3"], "seed", "seeds"),
        (["--set", "tow.draws=3"], "tow", "two"),
        (["--set", "two.draw=3"], "draw", "draws"),
        (["--set", "seeds=many"], "many", "10"),
        (["--set", "seeds=True"], "True", "10"),
        (["--set", "seeds"], "seeds", "name=value"),
        (["--set", "seeds='3"], "seeds='3", "quot"),
    ],
)
def test_a_wrong_name_or_value_is_refused_in_one_line(root, build, arguments, wrong, nearest):
    status, out, err = build(*arguments)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert wrong in err
    assert nearest in err
    assert not (root / "_build").exists()


def test_two_builds_of_one_profile_do_not_mix(root, build):
    (root / "_build/full").mkdir(parents=True)
    with FileLock(root / "_build/full/lock"):
        status, _, err = build()
    assert status == 1
    assert err.startswith("error: ")
    assert "running" in err
    assert err.count("\n") == 1


def test_a_profile_with_an_unknown_name_is_refused(root, build):
    (root / "book/profiles.toml").write_text("[smoke]\none.sedes = 2\n")
    assert "did you mean 'seeds'?" in build("--profile", "smoke")[2]


def test_only_what_changed_runs_again(root):
    assert execute(root) == ["one", "two"]
    assert execute(root) == []
    (root / "book/two.md").write_text(TWO.replace("'ran with'", "'RAN with'"))
    assert execute(root) == ["two"]
    assert execute(root, assignments="seeds=3") == ["one"]
    assert outputs(root, "one") == "ran with 3 lab\n"
    assert execute(root, assignments="seeds=3 model=exact") == ["one", "two"]
    assert execute(root) == ["one", "two"]
    assert execute(root) == []


USES = "import memlib\nfrom memlib import plot\n\n\ndef f():\n    return memlib.reverse_trace\n"
MODULES = {
    "plot.py": "import memlib.prompts as p\n", "prompts.py": "X = 1\n", "gram.py": "X = 1\n",
    "sampler.py": "def sample():\n    return 1\n", "errors.py": "X = 1\n",
    "runs/tracing.py": "from memlib.runs import cost\n\n\ndef f():\n    import memlib.sampler\n",
    "runs/cost.py": "X = 1\n", "hub/fetch.py": "X = 1\n",
    "hub/loading.py": "from memlib import errors", "hub/names.py": "X = 1\n",
}  # fmt: skip


def test_a_chapter_depends_on_the_code_that_it_uses(root):
    """Through public names and imports in functions, but not on what brings or keeps numbers."""
    for name, text in MODULES.items():
        (root / "memlib" / name).parent.mkdir(exist_ok=True)
        (root / "memlib" / name).write_text(text)

    def found(source: str) -> set[str]:
        files = digest.modules(root, [digest.tree_of(source)])
        return {file.removeprefix("memlib/") for file in files}

    sampling = {"runs/tracing.py", *(f"{name}.py" for name in MAKES)}
    assert found(USES) == {"plot.py", "memlib.mplstyle", "prompts.py"} | sampling
    assert found("import memlib as m\nm.cosine(m.load('lab'))") == {"gram.py"}
    assert found("%matplotlib inline\nfrom memlib import cosine") == {"gram.py"}
    assert found("from memlib.hub.names import X") == {"hub/names.py", "hub/checkpoints.toml"}
    assert found("from memlib.hub import loading") == {"hub/loading.py", "errors.py"}
    assert found("from memlib.runs import cost") == {"runs/cost.py"}
    assert found("print('memlib.plot')") == found("x = (1") == set()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A copy of this book's code, and a function: the chapters that an edit of a file changes."""
    root = tmp_path_factory.mktemp("real")
    for name in (
        "memlib",
        "book",
        "data/lab/SHA256SUMS",
        "data/bench.json",
        "data/phase.csv",
        "_toc.yml",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)

    def digests() -> dict[str, str]:
        read = chapters.read(root)
        return {name: digest.of_chapter(root, chapter, {}) for name, chapter in read.items()}

    before = digests()

    def changed(file: str, old: str, new: str) -> set[str]:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))
        after = digests()
        (root / file).write_text(text)
        return {name for name in before if after[name] != before[name]}

    return changed


def using(*words: str) -> set[str]:
    """Chapters that have one of these words in their code."""
    found = set()
    for name, chapter in chapters.read(ROOT).items():
        text = "\n".join(cell.source for cell in chapter.cells if cell.cell_type == "code")
        found |= {name for word in words if re.search(rf"\b{word}\b", text)}
    return found


def test_what_makes_no_numbers_runs_nothing(real):
    """A comment, a downloader, prose."""
    assert real("memlib/hub/fetch.py", "\nimport ", "\n# a comment\nimport ") == set()
    assert real("memlib/hub/fetch.py", "\nimport ", "\nX = 1\nimport ") == set()
    assert real("memlib/runs/store.py", "\nimport ", "\nX = 1\nimport ") == set()
    assert real("memlib/sampler.py", "\nimport ", "\n# a comment\nimport ") == set()
    assert real("book/loss.md", "\nimport numpy", "\n# a comment\nimport numpy") == set()
    assert real("book/loss.md", "# ", "# More on ") == set()


def test_a_changed_line_runs_the_chapters_that_use_it(real):
    samples = using("reverse_trace", "forward_trace", "trajectories", "bench")
    assert "stable-diffusion" not in samples
    assert real("memlib/sampler.py", "in enumerate(", "in enumerate(1 * ") == samples
    for scored_or_halved in ("memlib/hub/sscd.py", "memlib/hub/accelerated.py"):
        assert real(scored_or_halved, "\nimport ", "\nX = 1\nimport ") == samples
    assert real("memlib/plot.py", "\nimport ", "\nX = 1\nimport ") == using("plot")
    assert real("memlib/memlib.mplstyle", "\n", "\n\n") == using("plot")
    assert real("memlib/claims.toml", "below = ", "below = 1") >= using("claims")
    assert real("memlib/hub/checkpoints.toml", "title", "# a\ntitle") == using("CHECKPOINTS")
    assert real("data/bench.json", " ", "  ") == {"scale"}
    assert real("data/phase.csv", ",", ";") == {"causes"}
    assert real("book/loss.md", "\nimport numpy", "\nimport math\nimport numpy") == {"loss"}
    assert real("data/lab/SHA256SUMS", "\n", "\n\n") == {*chapters.read(ROOT)}


def test_new_prose_is_shown_with_the_outputs_at_hand(root):
    execute(root, assignments="seeds=3")
    (root / "book/one.md").write_text(ONE.replace("Prose.", "Better prose.") + "\nAnd an end.\n")
    assert execute(root, assignments="seeds=3") == []
    folder = book.stage(root, root / "_build/full", chapters.read(root))
    page = nbformat.read(folder / "one.ipynb", as_version=4)
    text = [cell.source for cell in page.cells if cell.cell_type == "markdown"]
    assert "Better prose." in text[0]
    assert text[-1] == "And an end."
    tags = [cell.metadata.get("tags") for cell in page.cells if cell.cell_type == "code"]
    assert tags[:2] == [["parameters"], ["injected-parameters", "hide-input"]]
    assert page.cells[-2].outputs[0].text == "ran with 3 lab\n"
    assert (folder / "plain.md").exists()


def test_profiles_are_kept_apart_and_the_command_line_wins(root):
    assert execute(root) == ["one", "two"]
    assert execute(root, "smoke") == ["one", "two"]
    assert (outputs(root, "one"), outputs(root, "one", "smoke")) == (
        "ran with 10 lab\n",
        "ran with 2 lab\n",
    )
    assert execute(root, "smoke", "seeds=4 two.scales=(1,2.5)") == ["one", "two"]
    assert outputs(root, "one", "smoke") == "ran with 4 lab\n"
    assert outputs(root, "two", "smoke") == "ran with 16 [1, 2.5]\n"
    assert execute(root) == []


def test_a_path_is_the_callers_and_its_chapter_always_runs(root, monkeypatch):
    (root / "pipe").mkdir()
    monkeypatch.chdir(root)
    assert execute(root, assignments="one.model=./pipe") == ["one", "two"]
    assert outputs(root, "one") == "ran with 10 ../../../pipe\n"
    assert execute(root, assignments="one.model=./pipe") == ["one"]


def test_a_full_disk_is_one_line(root, monkeypatch, build):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memlib.hub.files.os.replace", full)
    status, _, err = build()
    assert status == 1
    assert "No space left" in err
    assert err.count("\n") == 1
    assert not list(root.rglob("*.partial"))


def test_a_shipped_trace_that_is_no_longer_made_fails_the_build(root, build, monkeypatch):
    (root / "data/traces").mkdir(parents=True)
    (root / "data/traces/SHA256SUMS").write_text("")
    wrong = "import sys; sys.exit('data/traces/x.zip is not what this code makes')"
    monkeypatch.setattr(book, "COMPARE", [sys.executable, "-c", wrong])
    status, _, errors = build()
    assert status == 1
    assert errors.splitlines()[-1] == "error: data/traces/x.zip is not what this code makes"


@pytest.mark.parametrize(
    ("draws", "reason"), [(7, "ValueError: last line"), (8, "the kernel died")]
)
def test_a_failing_chapter_leaves_the_previous_result(root, kernels, draws, reason):
    execute(root)
    kept = {path: path.read_bytes() for path in (root / "_build").rglob("*") if path.is_file()}
    with pytest.raises(chapters.BookError) as error:
        execute(root, assignments=f"draws={draws}")
    assert "chapter 'two'" in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    left = {path: path.read_bytes() for path in (root / "_build").rglob("*") if path.is_file()}
    assert {p: b for p, b in left.items() if p.suffix != ".txt"} == kept
    assert execute(root) == []


def test_the_same_run_gives_the_same_bytes(root, kernels):
    execute(root, assignments="seeds=3")
    path = root / "_build/full/executed/one.ipynb"
    first = path.read_bytes()
    path.with_suffix(".json").unlink()
    assert execute(root, assignments="seeds=3") == ["one"]
    assert path.read_bytes() == first


FIGURE = ":mystnb:\n:  figure:\n:    name: fig-one\n:    caption: Points.\n"
PLOT = (
    FRONT
    + CELL.format(
        "import os, sys\nimport matplotlib.pyplot as plt\n"
        "print(sys.executable, plt.rcParams['text.usetex'], plt.rcParams['lines.linewidth'])"
    )
    + CELL.format(FIGURE + "plt.plot([1, 2])\nif CLOSED:\n    plt.close()")
)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """What a user's or a cluster's environment may hold against the figures of a chapter."""
    place = tmp_path / "hostile"
    for name, text in {
        "matplotlibrc": "text.usetex: True\nlines.linewidth: 9\nbackend: pdf\n",
        "startup.py": "raise SystemExit('of the user')\n",
        "ipython/profile_default/startup/1.py": "__import__('matplotlib').use('pdf')\n",
        "ipython/profile_default/ipython_kernel_config.py":
            "c.InlineBackend.figure_formats = {'svg'}\n",
        "jupyter/kernels/python3/kernel.json": json.dumps(
            {"argv": ["/bin/false", "{connection_file}"], "display_name": "3", "language": "python"}
        ),
    }.items():  # fmt: skip
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    for name, value in {
        "MPLBACKEND": "Agg", "MATPLOTLIBRC": place / "matplotlibrc", "MPLCONFIGDIR": place,
        "PYTHONSTARTUP": place / "startup.py", "IPYTHONDIR": place / "ipython",
        "JUPYTER_PATH": place / "jupyter",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("hostile", "kernels")
def test_chapters_run_in_this_python_and_show_their_figures(root):
    (root / "book/one.md").write_text(PLOT.replace("CLOSED", "False"))
    assert execute(root) == ["one", "two"]
    assert outputs(root, "one") == f"{sys.executable} False 1.5\n"
    page = nbformat.read(root / "_build/full/executed/one.ipynb", as_version=4)
    assert "image/png" in page.cells[-1].outputs[-1].data


def test_a_chapter_without_its_figure_is_not_done(root):
    """Neither now nor when it is found among what an earlier build has kept."""
    (root / "book/one.md").write_text(PLOT.replace("CLOSED", "False"))
    execute(root)
    path = root / "_build/full/executed/one.ipynb"
    page = nbformat.read(path, as_version=4)
    page.cells[-1].outputs = []
    nbformat.write(page, path)
    assert execute(root) == ["one"]
    assert execute(root) == []
    before = path.read_bytes()
    (root / "book/one.md").write_text(PLOT.replace("CLOSED", "True"))
    with pytest.raises(chapters.BookError, match=r"^chapter 'one': .* 'fig-one' left no picture$"):
        execute(root)
    assert path.read_bytes() == before


SHOWN = FRONT.replace("Prose.", "Prose, and a [](two).") + CELL.format(
    FIGURE + "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
)
MORE = SHOWN[SHOWN.index("```") :].replace("fig-one", "fig-new")
GLOSSARY = "# Glossary\n\n## Terms\n\n"
GLOSSARY += "**loss**\n: What is made small.\n\n**seed**\n: What fixes the noise.\n"
OTHER = "# A page\n\nSee [](one), {numref}`fig-two` and {eq}`law` {cite}`kim2025memorize`.\n"
OTHER += "\nAnd [](glossary.md#terms).\n"
SIZE = CELL.format(":tags: [parameters]\nseeds: int = 10")
FORMULA = "\n$$a = b$$ (law)\n\nOf a seed.\n\n"


def write(root: Path, name: str, old: str = "", new: str = "") -> None:
    file = root / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new) if old else text + new)


# What is edited, and the pages that are then written (the root is one of them; None is all). After
# the last of a group the site is built whole and compared.
EDITS = [
    {
        "prose": (("book/one.md", "Prose", "Better prose"), {"one"}),
        "a plain page": (("book/plain.md", "", "\nMore of a seed.\n"), {"one", "plain"}),
        "a picture": (("book/one.md", "[1, 2]", "[1, 3]"), {"one"}),
    },
    {"a title": (("book/one.md", "# A chapter", "# A first chapter"), None)},
    {
        "a figure before": (("book/one.md", "", MORE), None),
        "a heading": (("book/glossary.md", "## Terms", "## TERMS"), None),
        "a citation": (("book/plain.md", "", "\n{cite}`song2021ddim`\n"), None),
        "a definition": (("book/glossary.md", "the noise", "the first noise"), None),
        "no picture": (("book/one.md", FIGURE + "import", "import"), None),
        "a size": (("book/profiles.toml", "", "[t4]\ntwo.seeds = 4\n"), {"one"}),
    },
    {
        "a style": (("book/_static/custom.css", "", "\nbody {top: 0}\n"), None),
        "fewer pages": (
            ("_toc.yml", ", {file: spare}", ""),
            {"one", "two", "plain", "glossary", "references"},
        ),
    },
]


@pytest.mark.slow
def test_a_site_of_which_parts_are_built_is_that_built_whole(root):
    """To the byte, after edits; and a warning is not forgotten where nothing was edited."""
    for name in ("_config.yml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / name, root / "book" / name)
    shutil.copy(ROOT / "book/references.bib", root / "book")
    shutil.copy(ROOT / "book/references.md", root / "book")
    pages = {"one": SHOWN, "two": SHOWN.replace("one", "two") + FORMULA + SIZE, "plain": OTHER}
    for name, text in (pages | {"glossary": GLOSSARY, "spare": "# Spare\n\nOne.\n"}).items():
        (root / f"book/{name}.md").write_text(text)
    files = ", ".join(f"{{file: {n}}}" for n in ("two", "plain", "glossary", "references", "spare"))
    (root / "_toc.yml").write_text(
        f"format: jb-book\nroot: one\nparts: [{{chapters: [{files}]}}]\n"
    )
    subprocess.run(["git", "init", "-q", root], check=True)
    url = "https://github.com/someone/a-book"
    subprocess.run(["git", "-C", root, "remote", "add", "origin", url], check=True)
    made = root / "_build/full"
    (made / "live").mkdir(parents=True)
    (made / "live/lab.js").write_text("")

    def build() -> tuple[dict[str, bytes], set[str]]:
        """All files of the site, and the pages that were written."""
        execute(root)
        book.stage(root, made, chapters.read(root))
        site = book.build_site(root, made)
        files = {str(f.relative_to(site)): f.read_bytes() for f in site.rglob("*") if f.is_file()}
        written = re.findall(
            r"writing output\.\.\. \[ *\d+%\] (\S+)", (made / "site.log").read_text()
        )
        return files, set(written)

    files, every = build()
    assert files.keys() >= {"sitemap.xml", "notebooks/one.ipynb", *(f"{n}.html" for n in every)}
    for group in EDITS:
        for name, (edit, pages) in group.items():
            write(root, *edit)
            before = files
            files, written = build()
            assert files != before, name
            assert written == (pages or every), name
        shutil.rmtree(made / "site")
        (made / "site.digest").write_text("")  # as a full disk leaves it
        whole, every = build()
        assert [n for n in files | whole if files.get(n) != whole.get(n)] == [], [*group]
    write(root, "book/two.md", "(law)", "(rule)")
    for _ in range(2):
        with pytest.raises(chapters.BookError, match="site was not built"):
            build()
    write(root, "book/plain.md", "`law`", "`rule`")
    assert build()[1] == every


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("git@github.com:someone/a-book.git", "https://github.com/someone/a-book"),
        ("https://github.com/someone/a.book/", "https://github.com/someone/a.book"),
        ("../elsewhere", ""),
        (None, ""),
    ],
)
def test_colab_needs_an_address(root, remote, expected):
    subprocess.run(["git", "init", "-q", root], check=True)
    if remote:
        subprocess.run(["git", "-C", root, "remote", "add", "origin", remote], check=True)
    assert notebooks.repository(root) == expected
    notebooks.write(root, chapters.read(root), root / "notebooks")
    cells = json.loads((root / "notebooks/one.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    assert bool(expected) == ("git clone" in "".join(cells[0]["source"]))


def test_colab_offers_the_sizes_of_a_small_gpu(root):
    (root / "book/profiles.toml").write_text("[t4]\none.model = 'sd14'\none.seeds = 4\n")
    notebooks.write(root, chapters.read(root), root / "notebooks")
    cells = json.loads((root / "notebooks/one.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    place = next(i for i, text in enumerate(sources) if text.startswith("seeds: int = 10"))
    assert sources[place + 1].splitlines()[1:] == ["# model = 'sd14'", "# seeds = 4"]
    two = (root / "notebooks/two.ipynb").read_text()
    assert "T4" not in two


def test_another_model_brings_its_list():
    """Stable Diffusion for every chapter but the lab's; what the command line says comes last."""
    known = {"model": "lab", "pairs": "lab"}
    defaults = {"lab": known, "loss": known, "cost": {"seeds": 3}}
    chosen = chapters.choose(defaults, "full", {}, "", "sd14")
    assert chosen == {"lab": {}, "loss": {"model": "sd14", "pairs": "webster-sd14"}, "cost": {}}
    chosen = chapters.choose(defaults, "full", {}, "pairs=mine.csv", "sd21")
    assert chosen["loss"] == {"model": "sd21", "pairs": "mine.csv"}
    names = {"sd21-base": "sd21", "realvis14": "realvis", "realvis20": "realvis"}
    for name, webster in (names | {"realvis": "realvis"}).items():
        chosen = chapters.choose(defaults, "full", {}, "", name)
        assert chosen["loss"] == {"model": name, "pairs": f"webster-{webster}"}
    chosen = chapters.choose(defaults, "full", {}, "", "owner/name")
    assert chosen["loss"] == {"model": "owner/name"}
    chosen = chapters.choose(defaults, "full", {}, "", "exact")
    assert chosen["lab"] == {"model": "exact"}
    flow = {"flow_model": "lab-flow", "similarity": "ncc", "pairs": "lab"}
    chosen = chapters.choose(defaults | {"flow": flow}, "full", {}, "", "sd35")
    assert chosen["flow"] == {"flow_model": "sd35", "similarity": "sscd"}
    assert chosen["loss"] == chosen["lab"] == {}  # diffusion's chapters are not for it
    assert chapters.choose(defaults | {"flow": flow}, "full", {}, "", "sd14")["flow"] == {}


def test_ctrl_c_stops_all_chapters_at_once(root, kernels):
    """Two chapters that sleep are beside each other; what was made before stays."""
    execute(root)
    kept = outputs(root, "one")
    for name, text in {"one": ONE, "two": TWO}.items():
        waits = f"import os, pathlib, time\npathlib.Path('{root}/{name}.pid').write_text("
        waits += "str(os.getpid()))\ntime.sleep(120)"
        (root / f"book/{name}.md").write_text(text + CELL.format(waits))
    code = f"import memlib.cli.book as b, pathlib, sys; b.ROOT = pathlib.Path('{root}'); "
    code += f"from memlib import cli; from memlib.site import forked as f; {kernels}"
    code += "\nsys.exit(cli.main(['book']))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    files = [root / f"{name}.pid" for name in ("one", "two")]
    deadline = time.monotonic() + 90
    while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < deadline:
        time.sleep(0.2)
    pids = [int(f.read_text()) for f in files]
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors
    gone = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < gone:
        time.sleep(0.2)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert outputs(root, "one") == kept
