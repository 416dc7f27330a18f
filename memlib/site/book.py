"""Build the book: MyST-Markdown chapters → papermill → jupyter-book. Run by ``make book``.

Everything made lies in ``_build``: per profile, the executed chapters (``executed/``), the folder
they run in (``work/``), what Sphinx reads (``stage/``); the site of the full profile is
``_build/html``, that of another profile ``_build/<profile>/html``. What is unchanged is kept:
a chapter runs again when what it depends on changed (`memlib.site.digest`); new prose alone is
merged with the outputs at hand.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import nbformat
from filelock import FileLock, Timeout
from nbformat import NotebookNode

from memlib.site import about, chapters, digest, ledger, notebooks, run
from memlib.site.chapters import BookError, tagged

COMPARE = [sys.executable, "-m", "memlib.bench.traces", "--compare"]
LIVE = [sys.executable, "-m", "memlib.site.live"]


def build(
    root: Path, profile: str = "full", assignments: str = "", model: str = "", fresh: bool = False
) -> Path:
    """Execute what changed, build the site, return its folder.

    With `fresh` everything runs, and no trace is taken that was recorded before.
    """
    read = chapters.read(root)
    defaults = {name: chapters.parameters(name, chapter) for name, chapter in read.items()}
    chosen = chapters.choose(defaults, profile, chapters.profiles(root), assignments, model)
    made = root / "_build" / profile
    made.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(made / "lock", timeout=0):
            if fresh:
                traces = root / "_build" / "fresh"
                shutil.rmtree(traces, ignore_errors=True)
                os.environ |= {"MEMLIB_CACHE": str(traces), "MEMLIB_FRESH": "1"}
            check = functools.partial(sampled_again, root, made, fresh or profile != "full")
            with live_lab(root, made):
                run.run_changed(root, made, read, chosen, fresh, check)
            stage(root, made, read)
            return build_site(root, made)
    except Timeout:
        raise BookError(f"another build of {profile!r} is running here: wait for it") from None


@contextlib.contextmanager
def sampled_again(root: Path, made: Path, fresh: bool, part: float) -> Iterator[None]:
    """Meanwhile, some of the traces that come with the book are sampled again, and compared.

    `part` : of the chapters, those that run; as many fewer are sampled.

    Raises
    ------
    BookError
        They are not what this code makes.
    """
    if fresh or not (root / "data/traces/SHA256SUMS").exists():
        yield
        (made / "compared.json").unlink(missing_ok=True)
        return
    command = [*COMPARE, made / "compared.json", "--part", str(part)]
    with beside(root, command, "the comparison failed"):
        yield


@contextlib.contextmanager
def live_lab(root: Path, made: Path) -> Iterator[None]:
    """Meanwhile, the scripts of the lab in the page are written, where they changed."""
    sources = [*root.glob("book/_live/*")]
    wanted = digest.of_files(root, [*sources, "memlib/site/live.py", "data/lab/SHA256SUMS"])
    record, folder = made / "live.digest", made / "live"
    if not sources or (folder.is_dir() and record.exists() and record.read_text() == wanted):
        yield
        return
    record.unlink(missing_ok=True)
    with beside(root, [*LIVE, folder], "the live lab failed"):
        yield
    record.write_text(wanted)


@contextlib.contextmanager
def beside(root: Path, command: list, failed: str) -> Iterator[None]:
    """Meanwhile, another process does this; the last line it leaves is the error if it fails."""
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    try:
        yield
        errors = process.communicate()[1]
        if process.returncode:
            raise BookError((errors.strip().splitlines() or [failed])[-1])
    finally:
        process.kill()


def stage(root: Path, made: Path, read: dict[str, NotebookNode]) -> Path:
    """Gather what Sphinx reads: executed chapters, plain pages, bibliography, static files.

    A file that is as it was keeps its time, by which Sphinx knows what to read again.
    """
    folder = made / "stage"
    before = {f: (f.read_bytes(), f.stat()) for f in folder.rglob("*") if f.is_file()}
    shutil.rmtree(folder, ignore_errors=True)
    unread = shutil.ignore_patterns(
        "_ext", "_live", "*.toml", "__pycache__", *(f"{n}.md" for n in read)
    )
    shutil.copytree(root / "book", folder, ignore=unread, copy_function=shutil.copyfile)
    for name, chapter in read.items():
        executed = nbformat.read(made / "executed" / f"{name}.ipynb", as_version=4)
        page = nbformat.from_dict(merge(about.with_times(made, name, chapter), executed))
        (folder / f"{name}.ipynb").write_text(nbformat.writes(page) + "\n")
    ledger.write_pages(made / "work" / "results", folder, made / "compared.json")
    about.write_pages(root, made, read, notebooks.repository(root))
    notebooks.write(root, read, folder / "notebooks")
    for file, (content, stat) in before.items():
        if file.is_file() and file.read_bytes() == content:
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return folder


def merge(chapter: NotebookNode, executed: NotebookNode) -> dict:
    """Today's prose and metadata with the outputs of the run."""
    runs, cells = iter(run.code_cells(executed)), []
    for cell in chapter.cells:
        made = next(runs) if cell.cell_type == "code" else {}
        ran = cell | {key: made[key] for key in ("outputs", "execution_count") if made}
        cells.append(folded(ran))
        cells += run.code_cells(executed, injected=True) if tagged(cell) else []
    return executed | {"cells": cells}


def folded(cell: dict) -> dict:
    """A code cell of more than four lines with its source folded, but the one of parameters."""
    tags = cell["metadata"].get("tags", [])
    if cell["cell_type"] != "code" or cell["source"].count("\n") < 4 or "parameters" in tags:
        return cell
    if any(tag.startswith(("hide", "remove")) for tag in tags):
        return cell
    return cell | {"metadata": cell["metadata"] | {"tags": [*tags, "hide-input"]}}


def build_site(root: Path, made: Path) -> Path:
    """Build the site beside the old one and swap, unless nothing changed; return its folder.

    Where pages alone changed since a build that succeeded, Sphinx reads those again, and writes
    them or, if they changed what other pages show, all (``book/_ext/book.py``).
    """
    site = (root / "_build" if made.name == "full" else made) / "html"
    folder, record, log, output = (made / n for n in ("stage", "site.digest", "site.log", "site"))
    url = notebooks.repository(root)
    pages = {f for f in folder.rglob("*") if f.suffix in (".md", ".ipynb", ".csv")}
    others = {*folder.rglob("*"), *root.glob("book/_ext/*.py"), *(made / "live").glob("*")} - pages
    settings = ["_config.yml", "_toc.yml", "constraints.txt"]
    wanted = [digest.of_files(root, [*others, *settings], url), digest.of_files(root, pages)]
    known = record.read_text().split() if record.exists() else []
    if (site / "index.html").exists() and known == wanted:
        return site
    print("[site] … ", end="", flush=True)
    start, html = time.monotonic(), output / "_build/html"
    record.unlink(missing_ok=True)  # as long as a build has not succeeded, the next one is whole
    shutil.rmtree(output if known[:1] != wanted[:1] else html / "_static", ignore_errors=True)
    command = [Path(sys.executable).parent / "jupyter-book", "build", folder]
    command += ["--config", root / "_config.yml", "--toc", root / "_toc.yml"]
    command += ["--path-output", output, "-W", "-n", "--keep-going"]
    environment = {**os.environ, "BOOK_REPOSITORY": url, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    log.write_text(messages := click.unstyle(done.stdout + done.stderr))
    if done.returncode:
        print("failed", flush=True)
        told = messages.replace(f"{folder}/", "")
        found = re.findall(r"^.*(?:WARNING|ERROR|Error):.*$", told, re.MULTILINE)
        print(*list(dict.fromkeys(found))[:10], sep="\n", file=sys.stderr)
        raise BookError(f"the site was not built; all messages are in {log}")
    with tempfile.TemporaryDirectory(dir=made) as scratch:
        new = shutil.copytree(html, Path(scratch, "new"))
        # Among the static files jupyter-book would have every page load the scripts in "live".
        for part in filter(Path.is_dir, (folder / "notebooks", made / "live")):
            shutil.copytree(part, new / part.name)
        if site.exists():
            site.rename(Path(scratch, "old"))
        new.rename(site)
    record.write_text("\n".join(wanted))
    print(f"{time.monotonic() - start:.1f} s", flush=True)
    return site
