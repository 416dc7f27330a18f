"""Chapters are executed by papermill, each in a fresh kernel; what is unchanged is kept."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import click
import jupytext
import nbformat
import papermill
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from traitlets.config import Config

from memlib.hub.files import whole
from memlib.site import digest, forked
from memlib.site.chapters import BookError, tagged


def run_changed(
    root: Path, build: Path, chapters: dict, chosen: dict, fresh: bool = False, meanwhile=None
) -> list[str]:
    """Run the chapters whose digest changed, or all; return their names.

    It is done within `meanwhile`, which is told what part of all chapters that is.

    On several cores they run beside each other. A chapter on a model or manifest of the reader's
    own always runs: only the cache of traces can tell whether its data changed.
    """
    if todo := changed(root, build, chapters, chosen, fresh):
        with meanwhile(len(todo) / len(chapters)) if meanwhile else contextlib.nullcontext():
            run_these(todo, build, chapters, chosen)
    return list(todo)


def run_these(todo: dict[str, str], build: Path, chapters: dict, chosen: dict) -> None:
    """Run these chapters, whose digests are given, beside each other where there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    small = all(chosen[name].get("model", "lab") in ("lab", "exact") for name in todo)
    workers = max(1, min(len(todo), cores, 4)) if small else 1
    titles = {name: f"[{n}/{len(chapters)}] {name} … " for n, name in enumerate(chapters, 1)}

    def run_one(name: str, *how) -> float:
        start, record = time.monotonic(), build / "executed" / f"{name}.json"
        text = execute(name, chapters[name], chosen[name], build, *how)
        seconds = round(time.monotonic() - start, 1)
        record.unlink(missing_ok=True)  # no moment at which it speaks of another notebook
        with whole(record.with_suffix(".ipynb")) as partial:
            partial.write_text(text)
        with whole(record) as partial:
            partial.write_text(json.dumps({"digest": todo[name], "seconds": seconds}))
        return seconds

    if workers == 1:
        again = ""
        with contextlib.suppress(OSError, AttributeError):  # stdout is no terminal, no Unix one
            os.environ["MEMLIB_PROGRESS"] = os.ttyname(sys.stdout.fileno())
            again = "\r"  # a kernel's progress bar has been where the title was
        for name in todo:
            print(titles[name], end="", flush=True)
            try:
                seconds = run_one(name)
            except BookError:
                print("failed", flush=True)
                raise
            print(f"{again and again + titles[name]}{seconds} s", flush=True)
        return
    print(f"{len(todo)} chapters, {workers} at once", flush=True)
    pool = ThreadPoolExecutor(workers)
    order = sorted(todo, key=lambda name: (records(chapters[name]), -len(str(chapters[name]))))
    threads = max(1, cores // workers)
    with forked.python(os.environ | of_kernels(threads), begin=len(todo) > workers) as python:
        futures = {pool.submit(run_one, name, threads, python): name for name in order}
        try:
            for future in as_completed(futures):
                name = futures[future]
                print(titles[name], end="", flush=True)
                if future.exception():
                    print("failed", flush=True)
                print(f"{future.result()} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "ipykernel_launcher" in child.cmdline():
                        child.kill()
            raise
        finally:
            pool.shutdown()


def records(chapter: NotebookNode) -> bool:
    """Whether a chapter records traces; those that share one would wait for each other."""
    return any(".cached(" in cell.source for cell in code_cells(chapter))


def changed(root: Path, build: Path, chapters: dict, chosen: dict, fresh: bool) -> dict[str, str]:
    """The chapters that have to run, with their digests; paths in `chosen` become a kernel's."""
    (build / "executed").mkdir(parents=True, exist_ok=True)
    todo = {}
    for name, notebook in chapters.items():
        outside = place_paths(chosen[name], build / "work")
        wanted = digest.of_chapter(root, notebook, chosen[name])
        record = build / "executed" / f"{name}.json"
        known = record.exists() and json.loads(record.read_text())["digest"] == wanted
        if known and not outside and not fresh:
            kept = nbformat.read(record.with_suffix(".ipynb"), as_version=4)
            if not missing_figure(notebook, kept):
                continue
        todo[name] = wanted
    return todo


def place_paths(values: dict, work: Path) -> bool:
    """Rewrite paths given from this folder as seen from a kernel's; whether there are any.

    A bare word (``lab``) is a name, a path has a slash or an ending.
    """
    found = False
    for name in {"model", "pairs"} & values.keys():
        path = Path(values[name])
        if ("/" in values[name] or path.suffix) and path.exists():
            values[name] = os.path.relpath(path.resolve(), work.resolve())
            found = True
    return found


def of_kernels(threads: int | None = None) -> dict[str, str]:
    """What the environment of all kernels has of ours: nothing of a user's reaches them."""
    own = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": os.devnull,  # matplotlib's defaults, on which memlib.mplstyle goes
        "PYTHONSTARTUP": "",
    }
    return own | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def execute(
    name: str, notebook: NotebookNode, chosen: dict, build: Path, threads: int | None = None,
    python: Sequence[str] = (sys.executable,),
) -> str:  # fmt: skip
    """Run one chapter; return the notebook as text, without times and host names.

    Its kernel is this very Python with its packages, or a fork of it (`memlib.site.forked`), and
    shows figures inline: a user's kernelspecs, matplotlibrc, IPython profile and startup file do
    not reach it.
    """
    log, work = build / f"{name}.traceback.txt", build / "work"
    log.unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    as_ipynb = nbformat.reads(jupytext.writes(notebook, fmt="ipynb"), as_version=4)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            environment, spec = of_kernels(threads) | {"IPYTHONDIR": scratch}, get_kernel_dict()
            spec["argv"] = [*python, *spec["argv"][spec["argv"].index("-m") :]]
            own = {"kernel_spec": KernelSpec(**spec, env=environment)}
            result = papermill.execute_notebook(
                as_ipynb, None, parameters=chosen, cwd=work, progress_bar=False,
                kernel_name="python3", language="python",  # asked for, not looked up
                kernel_manager_class=type("OwnKernel", (AsyncKernelManager,), own),
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
                shutdown_kernel="immediate",  # nothing is left to do, and Python is slow to end
                config=Config({"KernelManager": {"transport_encryption": "required"}}),
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        log.write_text(click.unstyle("\n".join(error.traceback)) + "\n")
        sources = [cell.source for cell in code_cells(notebook)]
        cell, first = sources.index(error.source) + 1, error.source.strip().splitlines()[0]
        reason = (error.evalue.strip().splitlines() or [""])[-1]
        raise BookError(
            f"chapter {name!r} failed in code cell {cell} ({first!r}): {error.ename}: {reason}"
            f" · traceback in {os.path.relpath(log)}"
        ) from None
    except DeadKernelError:
        raise BookError(f"chapter {name!r}: the kernel died (out of memory?)") from None
    if figure := missing_figure(notebook, result):
        raise BookError(f"chapter {name!r}: the cell of figure {figure!r} left no picture")
    del result.metadata["papermill"]
    for cell in result.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":  # warnings name this machine's folders
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        if tagged(cell, "injected-parameters"):
            cell["id"] = "injected-parameters"
            cell.metadata.tags.append("hide-input")
            cell.metadata["mystnb"] = {"code_prompt_show": "Show the parameters of this run"}
    return nbformat.writes(result) + "\n"


def code_cells(notebook: NotebookNode, injected: bool = False) -> list[NotebookNode]:
    """The chapter's own code cells, or those that papermill put in."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if tagged(cell, "injected-parameters") == injected]


def missing_figure(notebook: NotebookNode, executed: NotebookNode) -> str:
    """The first figure of a chapter of which its run left no picture; '' if all are there."""
    for cell, made in zip(code_cells(notebook), code_cells(executed), strict=True):
        figure = cell.metadata.get("mystnb", {}).get("figure")
        kinds = [kind for output in made.outputs for kind in output.get("data", {})]
        if figure and not any(kind.startswith("image/") for kind in kinds):
            return figure.get("name", "without a name")
    return ""
