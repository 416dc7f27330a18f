"""The book's chapters, and the parameters that each of them is given."""

import ast
import shlex
import tomllib
from pathlib import Path

import jupytext
from nbformat import NotebookNode
from sphinx_external_toc.parsing import parse_toc_yaml

from memlib.errors import nearest
from memlib.hub.lists import webster
from memlib.hub.names import FLOWS


class BookError(ValueError):
    """What went wrong and what to do, in one line."""


def read(root: Path) -> dict[str, NotebookNode]:
    """The pages of ``_toc.yml`` that have a kernel in their front matter, in reading order."""
    chapters = {}
    for name in parse_toc_yaml(root / "_toc.yml"):
        path = root / "book" / f"{name}.md"
        if not path.exists():
            raise BookError(f"_toc.yml lists {name!r}, but book/{name}.md does not exist")
        notebook = jupytext.read(path, fmt="md:myst")
        if "kernelspec" in notebook.metadata:
            for number, cell in enumerate(notebook.cells):
                cell["id"] = f"cell-{number}"  # jupytext draws random ones
            chapters[name] = notebook
    return chapters


def profiles(root: Path) -> dict[str, dict]:
    """Sizes other than the full ones: profile → chapter → parameter → value."""
    try:
        return tomllib.loads((root / "book" / "profiles.toml").read_text())
    except tomllib.TOMLDecodeError as error:
        raise BookError(f"book/profiles.toml: {error}") from None


def tagged(cell: NotebookNode, tag: str = "parameters") -> bool:
    return tag in cell.metadata.get("tags", [])


def parameters(name: str, notebook: NotebookNode) -> dict:
    """Names and defaults from the cell tagged ``parameters``: plain literals only."""
    found = {}
    for cell in filter(tagged, notebook.cells):
        try:
            for node in ast.parse(cell.source).body:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                found[target.id] = ast.literal_eval(node.value)
        except (SyntaxError, AttributeError, ValueError) as error:
            raise BookError(
                f"chapter {name!r}: the parameters cell takes lines name = plain literal: {error}"
            ) from None
    return found


def choose(defaults: dict, profile: str, sizes: dict, assignments: str, model: str) -> dict:
    """What to pass to each chapter: the profile's values, the model's, then the command line's.

    Another model brings its own list of prompts, and its pictures are scored as photographs. The
    chapter on the lab stays about the lab, unless the model is a folder (a lab of one's own); a
    flow model is for the chapter on flows, which has no other. An assignment is ``name=value``, for
    every chapter that has the parameter, or ``chapter.name=value``.
    """
    if profile not in ("full", *sizes):
        raise BookError(f"unknown profile {profile!r}{nearest(profile, ['full', *sizes])}")
    given = []
    for chapter, values in sizes.get(profile, {}).items():
        if not isinstance(values, dict):
            raise BookError(f"profiles.toml, [{profile}]: write chapter.{chapter} = {values!r}")
        given += [(f"{chapter}.{name}", value) for name, value in values.items()]
    if model in FLOWS:
        given.append(("flow.flow_model", model))
        given += [("flow.similarity", "sscd")] if model != "lab-flow" else []
    elif model in ("lab", "exact") or (model and Path(model).is_dir()):
        given.append(("model", model))
    elif model:
        for chapter, known in defaults.items():
            own = {"model": model, "pairs": webster(model), "similarity": "sscd"}
            own = own if chapter not in ("lab", "flow") else {}
            given += [(f"{chapter}.{n}", value) for n, value in own.items() if value and n in known]
    try:
        words = [word.partition("=") for word in shlex.split(assignments)]
    except ValueError:
        raise BookError(f"a quotation mark is not closed in {assignments!r}") from None
    for key, equals, text in words:
        if not equals:
            raise BookError(f"{key!r} is not name=value (quote values that contain spaces)")
        try:
            given.append((key, ast.literal_eval(text)))
        except (ValueError, SyntaxError):
            given.append((key, text))
    chosen = {chapter: {} for chapter in defaults}
    for key, value in given:
        _assign(chosen, defaults, key, list(value) if isinstance(value, tuple) else value)
    return chosen


def _assign(chosen: dict, defaults: dict, key: str, value) -> None:
    """Set one parameter where it is known; refuse a name or a type that is not."""
    only, dot, name = key.rpartition(".")
    if dot and only not in defaults:
        raise BookError(f"unknown chapter {only!r}{nearest(only, defaults)}")
    targets = {c: known for c, known in defaults.items() if c == only or not dot}
    valid = sorted({name for known in targets.values() for name in known})
    if name not in valid:
        where = f" of chapter {only!r}" if dot else ""
        raise BookError(f"unknown parameter {name!r}{where}{nearest(name, valid)}")
    for chapter in (c for c, known in targets.items() if name in known):
        default = targets[chapter][name]
        kind = {float: (int, float), tuple: list}.get(type(default), type(default))
        right = isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)
        if default is not None and not right:
            raise BookError(
                f"parameter {name!r} of chapter {chapter!r} must be of type "
                f"{type(default).__name__}, like {default!r}; {value!r} is not"
            )
        chosen[chapter][name] = value
