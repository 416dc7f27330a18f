"""Build the book: MyST-Markdown chapters → papermill → jupyter-book. Run by ``make book``.

Everything made lies in ``_build``: per profile, the executed chapters (``executed/``), the folder
they run in (``work/``), what Sphinx reads (``stage/``); the site of the full profile is
``_build/html``, that of another profile ``_build/<profile>/html``. What is unchanged is kept:
a chapter runs again when its code, its parameters, ``memlib``, the lab's data or the pinned
versions change; new prose alone is merged with the outputs at hand.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from html import escape
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from memlib.claims import CLAIMS, RESULTS
from memlib.hub.lists import webster
from memlib.hub.names import ALIASES, CHECKPOINTS
from memlib.paths import ROOT

PATHS = {"model", "pairs"}  # parameters that may hold a path
LAB_NAMES = ("lab", "exact")


class BookError(Exception):
    """What went wrong and what to do, in one line."""


# --- chapters and their parameters ------------------------------------------------------------


def read_chapters(root: Path) -> dict:
    """The notebooks of the table of contents, in its order: name → notebook.

    Pages without a kernel in their front matter are plain Markdown and left out.
    """
    import jupytext

    chapters = {}
    for name in toc_pages(root):
        path = root / "book" / f"{name}.md"
        if not path.exists():
            raise BookError(f"_toc.yml lists {name!r}, but book/{name}.md does not exist")
        notebook = jupytext.read(path, fmt="md:myst")
        if "kernelspec" in notebook.metadata:
            for number, cell in enumerate(notebook.cells):
                cell["id"] = f"cell-{number}"  # jupytext draws random ones
            chapters[name] = notebook
    return chapters


def toc_pages(root: Path) -> list[str]:
    """Page names of ``_toc.yml``, in reading order."""
    import yaml

    def walk(node):
        if isinstance(node, dict):
            yield from (node[key] for key in ("root", "file") if key in node)
            for key in ("parts", "chapters", "sections"):
                yield from walk(node.get(key))
        elif isinstance(node, list):
            for child in node:
                yield from walk(child)

    return list(walk(yaml.safe_load((root / "_toc.yml").read_text())))


def parameters(name: str, notebook) -> dict:
    """Names and defaults from the cell tagged ``parameters``: plain literals only."""
    found = {}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            try:
                lines = ast.parse(cell.source).body
            except SyntaxError as error:
                raise BookError(f"chapter {name!r}, parameters cell: {error}") from None
            for node in lines:
                try:
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    found[target.id] = ast.literal_eval(node.value)
                except (AttributeError, ValueError):
                    raise BookError(
                        f"chapter {name!r}: the parameters cell takes lines name = plain literal, "
                        f"not {ast.unparse(node)!r}"
                    ) from None
    return found


def choose(defaults: dict, profile: str, profiles: dict, assignments: str, model: str) -> dict:
    """What to pass to each chapter: the profile's values, then the command line's."""
    if profile != "full" and profile not in profiles:
        raise BookError(unknown("profile", profile, ["full", *profiles]))
    chosen = {name: {} for name in defaults}
    for chapter, values in profiles.get(profile, {}).items():
        if not isinstance(values, dict):
            raise BookError(f"profiles.toml, [{profile}]: write chapter.{chapter} = {values!r}")
        for key, value in values.items():
            assign(chosen, defaults, f"{chapter}.{key}", value)
    try:
        pairs = shlex.split(assignments)
    except ValueError:
        raise BookError(f"a quotation mark is not closed in {assignments!r}") from None
    for pair in [*model_parameters(defaults, model), *pairs]:
        key, equals, text = pair.partition("=")
        if not equals:
            raise BookError(f"{pair!r} is not name=value (quote values that contain spaces)")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        assign(chosen, defaults, key, value)
    return chosen


def model_parameters(defaults: dict, model: str) -> list[str]:
    """What another model means for the chapters: the model, and its own list of prompts.

    The chapter on the lab stays about the lab, unless the model is a folder (a lab of one's own).
    """
    if not model:
        return []
    if Path(model).is_dir() or model in LAB_NAMES:
        return [f"model={model}"]
    values = {"model": model} | ({"pairs": webster(model)} if webster(model) else {})
    return [
        f"{chapter}.{name}={value}"
        for chapter, known in defaults.items() if chapter != "lab"
        for name, value in values.items() if name in known
    ]  # fmt: skip


def assign(chosen: dict, defaults: dict, key: str, value) -> None:
    """Set ``name`` in every chapter that has it, ``chapter.name`` in one; refuse unknown ones."""
    chapter, dot, name = key.rpartition(".")
    if dot and chapter not in defaults:
        raise BookError(unknown("chapter", chapter, defaults))
    targets = {chapter: defaults[chapter]} if dot else defaults
    if not any(name in known for known in targets.values()):
        valid = {key for known in targets.values() for key in known}
        raise BookError(
            unknown(f"parameter of chapter {chapter!r}" if dot else "parameter", name, valid)
        )
    value = list(value) if isinstance(value, tuple) else value  # papermill has no tuples
    for chapter, known in targets.items():
        if name in known:
            default = known[name]
            kind = (list, tuple) if isinstance(default, list | tuple) else type(default)
            kind = (int, float) if kind is float else kind
            wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
            if default is not None and wrong:
                raise BookError(
                    f"parameter {name!r} of chapter {chapter!r} must be of type "
                    f"{type(default).__name__}, like {default!r}; {value!r} is not"
                )
            chosen[chapter][name] = value


def unknown(what: str, name: str, valid) -> str:
    nearest = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0)
    hint = f"; did you mean {nearest[0]!r}? (valid: {', '.join(sorted(valid))})" if nearest else ""
    return f"unknown {what}: {name!r}{hint}"


# --- execution --------------------------------------------------------------------------------


def place_paths(chosen: dict, work: Path) -> set[str]:
    """Rewrite paths given from this folder as seen from a kernel's; the chapters that have some.

    A bare word (``lab``) is a name, a path has a slash or an ending.
    """
    outside = set()
    for chapter, values in chosen.items():
        for name in PATHS & values.keys():
            path = Path(values[name])
            if ("/" in values[name] or path.suffix) and path.exists():
                values[name] = os.path.relpath(path.resolve(), work.resolve())
                outside.add(chapter)
    return outside


def digest(root: Path, notebook, chosen: dict) -> str:
    """Hash of everything a chapter's outputs depend on."""
    code = [(c.source, c.metadata.get("tags")) for c in notebook.cells if c.cell_type == "code"]
    files = [*root.glob("memlib/**/*.py"), *root.glob("memlib/*.mplstyle")]
    files += [
        *root.glob("memlib/**/*.toml"),
        root / "data/lab/SHA256SUMS",
        root / "constraints.txt",
    ]
    files = [path for path in files if path != root / "memlib/site/book.py"]
    if any("bench." in source for source, _ in code):
        files.append(root / "data/bench.json")
    return fingerprint(root, files, json.dumps([code, chosen], sort_keys=True))


def fingerprint(root: Path, files, more: str) -> str:
    total = hashlib.sha256(more.encode())
    for path in sorted(files):
        if path.is_file():
            total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def execute_chapters(root: Path, profile: str, chapters: dict, chosen: dict) -> list[str]:
    """Run the chapters whose digest changed, one after the other; return their names.

    A chapter on a model or manifest of the reader's own always runs: only the cache of traces
    can tell whether its data changed.
    """
    import nbformat

    build = root / "_build" / profile
    outside = place_paths(chosen, build / "work")
    executed = []
    for number, (name, notebook) in enumerate(chapters.items(), start=1):
        record = build / "executed" / f"{name}.json"
        wanted = digest(root, notebook, chosen[name])
        known = record.exists() and json.loads(record.read_text())["digest"] == wanted
        if known and name not in outside:
            kept = nbformat.read(record.with_suffix(".ipynb"), as_version=4)
            if not missing_figure(notebook, kept):
                continue
        start = time.monotonic()
        try:
            with progress(f"[{number}/{len(chapters)}] {name} …", build / "progress"):
                text = execute(name, notebook, chosen[name], build)
        except BookError:
            print("failed", flush=True)
            raise
        seconds = time.monotonic() - start
        print(f"{seconds:.1f} s", flush=True)
        record.unlink(missing_ok=True)  # no moment at which it speaks of another notebook
        write(record.with_suffix(".ipynb"), text)
        write(record, json.dumps({"digest": wanted, "seconds": round(seconds, 1)}))
        executed.append(name)
    return executed


@contextlib.contextmanager
def progress(title: str, file: Path):
    """Print the title and, on a terminal, what the kernel's progress bar writes to `file`."""
    print(title, end=" ", flush=True)
    if not sys.stdout.isatty():
        yield
        return
    over = threading.Event()

    def watch():
        while not over.wait(0.5):
            if file.exists():
                bar = file.read_text(errors="replace").rsplit("\r", 1)[-1].strip()
                print(f"\r{title} {bar}\x1b[K", end="", flush=True)

    os.environ["MEMLIB_PROGRESS"] = str(file)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        file.unlink(missing_ok=True)
        print(f"\r{title}\x1b[K", end=" ", flush=True)


def own_kernel(scratch: Path) -> type:
    """A kernel of this very Python, with this process's packages, that shows figures inline.

    A user's kernelspecs, matplotlibrc, IPython profile and startup file do not reach it.
    """
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": os.devnull,  # matplotlib's defaults, on which memlib.mplstyle goes
        "IPYTHONDIR": str(scratch.resolve() / "ipython"),
        "PYTHONSTARTUP": "",
    }

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict(), env=environment)

    return OwnKernel


def execute(name: str, notebook, chosen: dict, build: Path) -> str:
    """Run one chapter in a fresh kernel; return the notebook without times and host names."""
    import jupytext
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    work, scratch = build / "work", build / "scratch"
    log = build / f"{name}.traceback.txt"
    log.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    work.mkdir(exist_ok=True)
    jupytext.write(notebook, scratch / "in.ipynb")
    try:
        result = papermill.execute_notebook(
            scratch / "in.ipynb",
            scratch / "out.ipynb",
            parameters=chosen,
            kernel_name="python3",  # asked for, not looked up
            kernel_manager_class=own_kernel(scratch),
            language="python",
            cwd=work,
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            config=Config({"KernelManager": {"transport_encryption": "required"}}),
        )
    except papermill.PapermillExecutionError as error:
        write(log, uncoloured("\n".join(error.traceback)) + "\n")
        sources = [c.source for c in notebook.cells if c.cell_type == "code"]
        cell, first = sources.index(error.source) + 1, error.source.strip().splitlines()[0]
        reason = (error.evalue.strip().splitlines() or [""])[-1]
        raise BookError(
            f"chapter {name!r} failed in code cell {cell} ({first!r}): {error.ename}: {reason}"
            f" · traceback in {os.path.relpath(log)}"
        ) from None
    except DeadKernelError:
        raise BookError(f"chapter {name!r}: the kernel died (out of memory?)") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if figure := missing_figure(notebook, result):
        raise BookError(f"chapter {name!r}: the cell of figure {figure!r} left no picture")
    result.metadata.pop("papermill", None)
    for cell in result.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":  # warnings name this machine's folders
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
            cell.metadata.tags.append("hide-input")
            cell.metadata["mystnb"] = {"code_prompt_show": "Show the parameters of this run"}
    return nbformat.writes(result) + "\n"


def code_cells(notebook, injected: bool = False) -> list:
    """The chapter's own code cells, or those that papermill put in."""
    return [
        cell for cell in notebook.cells
        if cell.cell_type == "code"
        and ("injected-parameters" in cell.metadata.get("tags", [])) == injected
    ]  # fmt: skip


def missing_figure(notebook, executed) -> str:
    """The first figure of a chapter of which its run left no picture; '' if all are there."""
    for cell, run in zip(code_cells(notebook), code_cells(executed), strict=True):
        figure = cell.metadata.get("mystnb", {}).get("figure")
        kinds = [kind for output in run.outputs for kind in output.get("data", {})]
        if figure and not any(kind.startswith("image/") for kind in kinds):
            return figure.get("name", "without a name")
    return ""


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def write(path: Path, text: str) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# --- the site ---------------------------------------------------------------------------------


def merge(notebook, executed):
    """Today's prose and metadata with the outputs of the run."""
    runs, injected, merged = iter(code_cells(executed)), code_cells(executed, True), []
    for cell in notebook.cells:
        merged.append(cell)
        if cell.cell_type == "code":
            run = next(runs)
            cell.outputs, cell.execution_count = run.outputs, run.execution_count
        if "parameters" in cell.metadata.get("tags", []):
            merged.extend(injected)
    return {**executed, "cells": merged}


def stage(root: Path, profile: str, chapters: dict) -> Path:
    """Gather what Sphinx reads: executed chapters, plain pages, bibliography, static files."""
    import nbformat

    folder = root / "_build" / profile / "stage"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        root / "book", folder, ignore=shutil.ignore_patterns("_ext", "*.toml", "__pycache__")
    )
    for name, notebook in chapters.items():
        (folder / f"{name}.md").unlink()
        executed = nbformat.read(folder.parent / "executed" / f"{name}.ipynb", as_version=4)
        merged = nbformat.from_dict(merge(notebook, executed))
        (folder / f"{name}.ipynb").write_text(nbformat.writes(merged) + "\n")
    write_ledger(root, folder.parent / "work" / "results", folder)
    return folder


TITLES = {"lab": "the lab"} | {name: c.title for name, c in CHECKPOINTS.items()}
PAPER = ("sd14", "sd21", "sd21-base", "realvis14", "realvis20")  # what the paper may mean
SIGNS = {"holds": "✓ ", "does not hold": "✗ ", "not decided": "? ", "not run": ""}


def write_ledger(root: Path, results: Path, folder: Path) -> None:
    """What the chapters left in their results folder, as a matrix, as a list and as a CSV file.

    A column is of one model, to the commit, the VAE and the precision; a line of the matrix is of
    one claim and, where the number depends on it, of one score. The latest row is shown.
    """
    table = root / "memlib" / "claims.toml"
    if not table.exists():
        return
    claims = tomllib.loads(table.read_text())
    found = read_rows(claims, results)
    rows = {(r["claim"], r["measure"], build_of(r), r["sampler"]): r for r in found}
    builds = dict.fromkeys(build_of(row) for row in found)
    if not any(title == TITLES["lab"] for title, *_ in builds):
        builds[TITLES["lab"], "", ""] = None
    order = [*TITLES.values()]
    builds = sorted(builds, key=lambda b: order.index(b[0]) if b[0] in order else len(order))
    lines = [
        (name, measure)
        for name, claim in claims.items()
        for measure in sorted(
            {row["measure"] for row in found if row["claim"] == name}
            or {"sscd" if claim.get("score") else ""}
        )
    ]

    def row_of(line: tuple, build: tuple, sampler: str) -> dict | None:
        return rows.get((*line, build, sampler)) or rows.get((*line, build, "any"))

    (folder / "_matrix.md").write_text(matrix(claims, lines, builds, row_of))
    (folder / "_ledger.md").write_text(ledger(claims, lines, builds, row_of))
    found.sort(key=lambda row: (list(claims).index(row["claim"]), row["model"]))
    with (folder / "_static" / "results.csv").open("w", newline="") as file:
        rows_of = csv.writer(file, lineterminator="\n")
        rows_of.writerow(
            ["claim", "model", "checkpoint", "fingerprint", "precision", "sampler", "measure",
             "measure_sha256", "value", "low", "high", "verdict", "prompts", "seeds", "draws",
             "states", "guidance", "versions"]
        )  # fmt: skip
        for row in found:
            rows_of.writerow([
                row["claim"], row["model"], build_of(row)[0], row["fingerprint"], row["precision"],
                row["sampler"], row["measure"], row["measure_sha256"],
                *(f"{row[key]:.6g}" for key in ("value", "low", "high")), row["verdict"],
                "+".join(map(str, row["prompts"])),
                *(row["sizes"].get(key, "") for key in ("seed", "draw", "step")),
                json.dumps(row["guidance"]).replace(",", " "),
                "; ".join(f"{name} {version}" for name, version in row["versions"].items()),
            ])  # fmt: skip


def read_rows(claims: dict, folder: Path) -> list[dict]:
    """All rows of a results folder, the oldest first; what earlier versions left out filled in."""
    files = sorted(folder.glob("*/*/*.json"), key=lambda f: (f.stat().st_mtime_ns, f))
    rows = [json.loads(file.read_text()) for file in files]
    rows = [row for row in rows if row["claim"] in claims]
    for row in rows:
        if "@" in row["fingerprint"].split()[0]:  # of the Hub, and no folder that is called so
            row["model"] = ALIASES.get(row["model"], row["model"])
        row.setdefault("measure", "sscd" if claims[row["claim"]].get("score") else "")
        row.setdefault("measure_sha256", "")
        row.setdefault("precision", "")
    return rows


def read(folder: str | Path = RESULTS) -> pd.DataFrame:
    """All rows that runs have left in a results folder, in the order of the ledger."""
    order = list(CLAIMS)
    key = ("model", "sampler", "measure")
    rows = read_rows(CLAIMS, Path(folder))
    return pd.DataFrame(sorted(rows, key=lambda r: (order.index(r["claim"]), *(r[k] for k in key))))


def build_of(row: dict) -> tuple[str, str, str]:
    """Which model a row is of, exactly: title, fingerprint, precision.

    The title follows the repository, whatever name a row was recorded under; a folder has its own.
    """
    origin, name = row["fingerprint"], row["model"]
    titles = [c.title for c in CHECKPOINTS.values() if origin.startswith(f"{c.repository}@")]
    if not titles and (name == "lab" or "@" in origin.split()[0]):
        titles = [TITLES.get(name, name)]
    return (titles or [name])[0], origin, row["precision"]


def short(build: tuple[str, str, str], builds: list) -> str:
    """What tells a build from others of its title: commit, VAE, precision; '' if none has to."""
    title, origin, precision = build
    if "@" not in origin and sum(title == other for other, *_ in builds) < 2:
        return ""
    text = re.sub(r" [^@]*\.safetensors config \w+", "", origin)
    text = re.sub(r"[\w./-]+@([\w.-]{1,8})[\w.@-]*", r"@\1", text).replace(" vae ", ", VAE ")
    return f"{text}, {precision}" if precision else text


def matrix(claims: dict, lines: list, builds: list, row_of) -> str:
    """The table claims × (model, sampler); a cell links to the figure behind it."""
    head = ""
    for build in builds:
        note = short(build, builds)
        note = note and f'<br><small title="{escape(build[1])}">{escape(note)}</small>'
        head += f'<th colspan="2">{escape(build[0])}{note}</th>'
    under = "<th>DDIM</th><th>DDPM</th>" * len(builds)
    text = ['<div class="ledger"><table>', f'<thead><tr><th rowspan="2">claim</th>{head}</tr>']
    text += [f"<tr>{under}</tr></thead><tbody>"]
    for name, measure in lines:
        claim = claims[name]
        notes = [] if claim["by"] == "paper" else ["ours"]
        notes += [f"score: {escape(measure)}"] if measure else []
        by = f" <small>({'; '.join(notes)})</small>" if notes else ""
        link = f'<a href="ledger.html#{name}">{escape(claim["title"])}</a>'
        cells = [f'<th scope="row">{link}{by}</th>']
        for build in builds:
            pair = [row_of((name, measure), build, sampler) for sampler in ("ddim", "ddpm")]
            if not any(pair):
                cells.append('<td colspan="2" class="not-run">not run</td>')
                continue
            for row in pair:
                word = row["verdict"] if row else "not run"
                cell = SIGNS[word] + word
                if row:
                    address = f"{claim['chapter']}.html#{claim['figure']}"
                    cell = f'<a href="{address}">{cell}</a><br><small>{row["value"]:.3g}</small>'
                cells.append(f'<td class="{word.replace(" ", "-")}">{cell}</td>')
        text.append(f"<tr>{''.join(cells)}</tr>")
    text += ["</tbody></table></div>", ""]
    for build in builds:
        if short(build, builds):
            text.append(f"- {escape(build[0])}: `{build[1]}` {build[2]}")
    missing = [TITLES[n] for n in PAPER if not any(TITLES[n] == title for title, *_ in builds)]
    text += ["", f"Not run yet: {', '.join(missing)}." if missing else "", ""]
    return "\n".join(text)


def ledger(claims: dict, lines: list, builds: list, row_of) -> str:
    """Every claim with its words, its number and line, and what each run found."""
    text = []
    for name, claim in claims.items():
        side = "above" if "above" in claim else "below"
        who = "The paper" if claim["by"] == "paper" else "The paper, on which it bears"
        text += [f"({name})=", f"## {claim['title']}", ""]
        text += [f"{claim['ours']}\\", f"{who}: {claim['words']}\\"]
        text += [f"Judged by: {claim['statistic']}; holds {side} {claim[side]:g}.\\"]
        text += [f"Figure: {{numref}}`{claim['figure']}` in [](/{claim['chapter']}).", ""]
        runs = {
            json.dumps(row): build
            for line in lines if line[0] == name
            for build in builds
            for sampler in ("ddim", "ddpm") if (row := row_of(line, build, sampler))
        }  # fmt: skip
        for row, build in ((json.loads(row), build) for row, build in runs.items()):
            sampler = {"ddim": "DDIM", "ddpm": "DDPM"}.get(row["sampler"], "no sampling")
            sizes = [f"{' and '.join(map(str, row['prompts']))} prompts"]
            units = {"seed": "seed", "draw": "noise", "step": "state"}
            sizes += [f"{n} {units[dim]}{'s' * (n != 1)}" for dim, n in row["sizes"].items()]
            note = short(build, builds)
            model = escape(build[0]) + (f" ({escape(note)})" if note else "")
            score = f", scored by {escape(row['measure'])}" if row["measure"] else ""
            text += [
                f"- **{row['verdict']}** on {model}, {sampler}{score}: "
                f"{row['value']:.3g} (95 %: {row['low']:.3g} to {row['high']:.3g}; "
                f"{', '.join(sizes)})"
            ]
        text += ["" if runs else "- not run", ""]
    return "\n".join(text)


def build_site(root: Path, profile: str, chapters: dict) -> Path:
    """Build the site beside the old one and swap, unless nothing changed; return its folder."""
    build = root / "_build" / profile
    site = root / "_build" / "html" if profile == "full" else build / "html"
    folder = stage(root, profile, chapters)
    environment = {**os.environ, "BOOK_REPOSITORY": repository(root), "PYTHONHASHSEED": "0"}
    files = [*folder.rglob("*"), *root.glob("book/_ext/*.py")]
    files += [root / name for name in ("_config.yml", "_toc.yml", "constraints.txt")]
    wanted = fingerprint(root, files, environment["BOOK_REPOSITORY"])
    record = build / "site.digest"
    if (site / "index.html").exists() and record.exists() and record.read_text() == wanted:
        return site

    print("[site] …", end=" ", flush=True)
    start = time.monotonic()
    output = build / "site"
    shutil.rmtree(output, ignore_errors=True)
    command = [Path(sys.executable).parent / "jupyter-book", "build", folder, "--all"]
    command += ["--config", root / "_config.yml", "--toc", root / "_toc.yml"]
    command += ["--path-output", output, "-W", "-n", "--keep-going"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    log = build / "site.log"
    messages = uncoloured(run.stdout + run.stderr)
    write(log, messages)
    if run.returncode:
        print("failed", flush=True)
        found = re.findall(r"^.*(?:WARNING|ERROR|Error):.*$", messages, re.MULTILINE)
        lines = [line.replace(f"{folder}/", "") for line in dict.fromkeys(found)]
        print(*lines[:10], sep="\n", file=sys.stderr)
        raise BookError(f"the site was not built; all messages are in {os.path.relpath(log)}")
    write_notebooks(root, chapters, output / "_build/html/notebooks")
    record.unlink(missing_ok=True)
    if site.exists():
        site.rename(output / "old")
    (output / "_build/html").rename(site)
    shutil.rmtree(output)
    write(record, wanted)
    print(f"{time.monotonic() - start:.1f} s", flush=True)
    return site


# --- Colab ------------------------------------------------------------------------------------


def repository(root: Path) -> str:
    """``https://github.com/owner/name`` from ``_config.yml`` or git's origin; '' where unknown."""
    import yaml

    url = (yaml.safe_load((root / "_config.yml").read_text()).get("repository") or {}).get("url")
    if not url:
        git = ["git", "-C", root, "remote", "get-url", "origin"]
        url = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    match = re.search(r"github\.com[:/]([\w.-]+)/([\w.-]+?)(?:\.git)?/?$", url)
    return f"https://github.com/{match[1]}/{match[2]}" if match else ""


INSTALL = """\
# On Colab: get the book as it was when this page was built, then look for a GPU.
# As it stands this notebook runs the lab: minutes, with or without a GPU. The cell after the
# parameters has sizes for Stable Diffusion on a T4: at most 20 minutes (computed, not measured).
import os, subprocess, sys
if not os.path.isdir("how-diffusion-models-memorize"):
    !git clone -q {url} how-diffusion-models-memorize
!git -C how-diffusion-models-memorize checkout -q {commit}
# Adds what is missing here; torch, numpy and ipykernel of this runtime stay as they are.
script = [sys.executable, "-P", "how-diffusion-models-memorize/memlib/site/colab.py"]
done = subprocess.run(script, capture_output=True, text=True)
if done.returncode:
    raise SystemExit(done.stderr)
sys.path.insert(0, os.path.abspath("how-diffusion-models-memorize"))
import torch
gpu = torch.cuda.is_available()
print(torch.cuda.get_device_name() if gpu else "no GPU: the lab needs none")"""


def write_notebooks(root: Path, chapters: dict, folder: Path) -> None:
    """Unexecuted notebooks for Colab; if the address is known, a first cell installs the book.

    They run the lab as they are. A cell after the parameters has the sizes of the profile ``t4``
    for Stable Diffusion, to be taken by deleting a hash.
    """
    import jupytext
    import nbformat

    folder.mkdir()
    url = repository(root)
    git = ["git", "-C", root, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    table = root / "book" / "profiles.toml"
    sizes = tomllib.loads(table.read_text()).get("t4", {}) if table.exists() else {}
    for name, chapter in chapters.items():
        notebook = nbformat.from_dict(json.loads(json.dumps(chapter)))
        cells = []
        for cell in notebook.cells:
            cells.append(cell)
            if cell.cell_type != "code":
                continue
            cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", []) and name in sizes:
                lines = [f"# {key} = {value!r}" for key, value in sizes[name].items()]
                text = "# Stable Diffusion on a T4 (20 minutes at most, computed): delete #."
                cells.append(nbformat.v4.new_code_cell("\n".join([text, *lines]), id="t4"))
        if url:
            source = INSTALL.format(url=url, commit=commit)
            cells.insert(0, nbformat.v4.new_code_cell(source, id="install"))
        notebook.cells = cells
        jupytext.write(notebook, folder / f"{name}.ipynb")


def build(root: Path, profile: str = "full", assignments: str = "", model: str = "") -> Path:
    """Execute what changed, build the site, return its folder."""
    chapters = read_chapters(root)
    defaults = {name: parameters(name, notebook) for name, notebook in chapters.items()}
    table = root / "book" / "profiles.toml"
    try:
        profiles = tomllib.loads(table.read_text()) if table.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise BookError(f"book/profiles.toml: {error}") from None
    chosen = choose(defaults, profile, profiles, assignments, model)
    lock = root / "_build" / profile / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            execute_chapters(root, profile, chapters, chosen)
            return build_site(root, profile, chapters)
    except Timeout:
        raise BookError(
            f"another build of profile {profile!r} is running here: wait for it"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memlib.book", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the book's folder")
    parser.add_argument("--profile", default="full", help="full, or one of book/profiles.toml")
    parser.add_argument("--set", default="", help='parameters: "name=value chapter.name=value"')
    parser.add_argument("--model", default="", help="short for --set model=…")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        site = build(options.root.resolve(), options.profile, options.set, options.model)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; finished chapters are kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: finished chapters are kept", file=sys.stderr)
        return 130
    print(f"{os.path.relpath(site / 'index.html')} ({time.monotonic() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
