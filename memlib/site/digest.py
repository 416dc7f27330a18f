"""What a chapter's outputs depend on: its code, the code that it uses, the lab, the versions."""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from memlib import HOMES, RENAMED
from memlib.hub.files import code
from memlib.runs import MAKES

# Imports are followed through the core, these rooms and this module. The other modules bring and
# keep numbers, they do not make them: one counts only where a chapter itself names it, or where it
# makes a trace's bits (`MAKES`).
FOLLOWED = ("memlib/lab/", "memlib/bench/", "memlib/runs/tracing.py")
DATA = {
    "memlib/claims.py": "memlib/claims.toml",
    "memlib/plot.py": "memlib/memlib.mplstyle",
    "memlib/hub/names.py": "memlib/hub/checkpoints.toml",
    "memlib/bench/measure.py": "data/bench.json",
    "memlib/bench/phase.py": "data/phase.csv",
    "memlib/lab/train.py": "data/redrawn/SHA256SUMS",
    "memlib/lab/flow.py": "data/lab-flow/SHA256SUMS",
}
dumped = functools.cache(ast.dump)
ALWAYS = ("data/lab/SHA256SUMS", "data/traces/SHA256SUMS", "constraints.txt")


def of_chapter(root: Path, notebook: NotebookNode, chosen: dict) -> str:
    """Hash of all that the outputs of a chapter depend on, with these parameters."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    trees = [tree_of(cell.source) for cell in cells]
    # a semicolon hides what a cell returns, and is not in its tree
    tags = [[cell.source.count(";"), cell.metadata.get("tags")] for cell in cells]
    own = [dumped(tree) for tree in trees]
    return of_files(root, [*modules(root, trees), *ALWAYS], own, tags, chosen)


def of_files(root: Path, files: Iterable[str | Path], *more) -> str:
    """Hash of files by their names, paths below `root`, Python's by what it does; and of `more`."""
    total = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for file in sorted(files, key=str):
        path = root / file
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".py":
                content = does_and_uses(path, content)[0].encode()
            total.update(str(file).encode() + content)
    return total.hexdigest()


@functools.cache
def does_and_uses(path: Path, _content: bytes) -> tuple[str, set[str]]:
    """A module's code, and what it names of memlib; kept as long as its content is the same."""
    return code(path), names(ast.parse(path.read_text()))


@functools.cache
def tree_of(source: str) -> ast.AST:
    """A cell's syntax tree; where it is no Python, which running it will tell, just its text."""
    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return ast.Constant(source)


def modules(root: Path, trees: Iterable[ast.AST]) -> set[str]:
    """Files of the modules that a chapter uses, itself or through others, and of their data."""
    found, waiting = set(), [(name, True) for tree in trees for name in names(tree)]
    while waiting:
        name, by_chapter = waiting.pop()
        first, *rest = name.split(".")[1:3]
        public = HOMES.get(RENAMED.get(first, first))
        parts = public.split(".") if public else [first, *rest]
        for depth in range(1, len(parts) + 1):
            file = "/".join(["memlib", *parts[:depth]]) + ".py"
            counts = depth == 1 or file.startswith(FOLLOWED) or (by_chapter and not public)
            path = root / file
            if counts and file not in found and path.is_file():
                found.add(file)
                waiting += [(name, False) for name in does_and_uses(path, path.read_bytes())[1]]
    if "memlib/runs/tracing.py" in found:
        found |= {f"memlib/{name}.py" for name in MAKES}
    return found | {data for start, data in DATA.items() if any(f.startswith(start) for f in found)}


@functools.cache
def names(tree: ast.AST) -> set[str]:
    """What code imports of memlib, and what it reaches from there by attributes, dotted."""
    imported, nodes = [("memlib", "memlib")], [*ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imported += [(alias.asname or alias.name, origin + alias.name) for alias in node.names]
    bound, found = dict(imported), [name for _, name in imported]
    found += [dotted(node, bound) for node in nodes if isinstance(node, ast.Attribute)]
    return {name for name in found if name.startswith("memlib.")}


def dotted(node: ast.AST, bound: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, bound)}.{node.attr}"
    return bound.get(node.id, "") if isinstance(node, ast.Name) else ""
