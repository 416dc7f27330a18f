"""Helps for the reader: definitions where terms stand, panels below each other on a phone."""

import functools
import re
from html import escape
from pathlib import Path

import numpy as np
from docutils import nodes
from PIL import Image

GLOSSARY = "glossary"
# Words that mean other things as well: no definition is put where they stand.
COMMON = {
    "copies",
    "copy",
    "detail",
    "flow",
    "law",
    "levels",
    "magnitude",
    "named",
    "normal",
    "reference",
    "rest",
    "threshold",
    "update",
}
NARROW = 960  # pixels of a plot whose letters can still be read at the width of a phone
PLAIN = (nodes.reference, nodes.literal, nodes.strong, nodes.emphasis, nodes.caption, nodes.raw)


def forget(app, env, docname):
    """Before the glossary is read, or read again, there are no definitions."""
    if docname == GLOSSARY or not hasattr(env, "definitions"):
        env.definitions = {}


def read_glossary(app, doctree):
    """Give each term of the glossary an address, and keep its definition."""
    if app.env.docname != GLOSSARY:
        return
    for item in doctree.findall(nodes.definition_list_item):
        name, definition = item[0].astext(), item[1]
        item[0]["ids"] = ["term-" + re.sub(r"\W+", "-", name.lower())]
        for term in name.split(", "):
            app.env.definitions[term] = (item[0]["ids"][0], words_of(definition[0]))


def words_of(paragraph) -> str:
    """A definition as HTML of words and formulas, without links to other places."""
    found = []
    for part in paragraph.findall():
        if any(n.tagname in ("pending_xref", "math_reference") for n in ancestors(part)):
            continue
        if isinstance(part, nodes.math):
            found.append(rf'<span class="math">\({escape(part.astext())}\)</span>')
        elif isinstance(part, nodes.Text) and not isinstance(part.parent, nodes.math):
            found.append(escape(part.astext()))
    return re.sub(r"\s*(\(\s*\))?\s+(?=[.;,])|\s*\(\s*\)(?=[.;,])", "", "".join(found).strip())


def define(app, doctree, docname):
    """Put a definition at the first place where a page's text uses a term."""
    if docname == GLOSSARY or not (Path(app.srcdir) / f"{docname}.ipynb").exists():
        return
    formulas = app.env.get_domain("math").has_equations(docname)  # else a page draws none
    wanted = {
        term: found
        for term, found in app.env.definitions.items()
        if term not in COMMON and (formulas or "math" not in found[1])
    }
    for text in list(doctree.findall(nodes.Text)):
        paragraph = text.parent
        if not isinstance(paragraph, nodes.paragraph) or not wanted:
            continue
        if any(isinstance(n, PLAIN) for n in ancestors(paragraph)):
            continue
        pieces, rest = [], text.astext()
        pattern = "|".join(re.escape(t) for t in sorted(wanted, key=len, reverse=True))
        while wanted and (match := re.search(rf"\b({pattern})(?:s|es)?\b", rest)):
            identity, definition = wanted.pop(match[1])
            place = f"{identity}-{len(app.env.definitions) - len(wanted)}"
            pieces += [nodes.Text(rest[: match.start()]), nodes.raw("", (
                f'<span class="term"><a href="{GLOSSARY}.html#{identity}" '
                f'aria-describedby="{place}">{escape(match[0])}</a>'
                f'<span role="tooltip" id="{place}">{definition}</span></span>'
            ), format="html")]  # fmt: skip
            rest = rest[match.end() :]
            pattern = "|".join(re.escape(t) for t in sorted(wanted, key=len, reverse=True))
        if pieces:
            paragraph.replace(text, [*pieces, nodes.Text(rest)])


def ancestors(node):
    while node is not None:
        yield node
        node = node.parent


@functools.cache
def panels(file: Path) -> list[tuple[float, float]]:
    """Where a plot's panels begin and end, as shares of its width.

    They stand apart where columns of pixels are empty near a half, or near both thirds. A picture
    with many equal gaps is a sheet of small ones and has no panels.
    """
    picture = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    dark = 255 - np.asarray(Image.alpha_composite(white, picture))[..., :3].min(-1)
    columns = np.flatnonzero((dark < 8).all(0))
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    gaps = {run.mean() / picture.width: len(run) for run in runs if len(run) >= 8}
    if sum(n >= 18 and 0.12 < x < 0.98 for x, n in gaps.items()) >= 4:
        return []
    for count in (3, 2):
        near = [[x for x in gaps if abs(x - n / count) < 0.09] for n in range(1, count)]
        if all(near):
            cuts = [max(each, key=gaps.get) for each in near]
            return list(zip([0.0, *cuts], [*cuts, 1.0], strict=True))
    return [(0.0, 1.0)]


def stack(app, pagename, templatename, context, doctree):
    """Pictures only when they are seen, and beside a plot its panels, for narrow screens."""
    if doctree is None or "body" not in context:
        return
    sources = {name: path for path, name in app.builder.images.items()}

    def beside(match) -> str:
        file = Path(app.srcdir) / sources.get(Path(match["src"]).name, "")
        parts = panels(file) if file.suffix == ".png" else []
        if not parts:
            return match[0]
        width, height = Image.open(file).size
        if len(parts) == 1:
            fits = "<img data-fits " if width <= NARROW else "<img "
            return match[0].replace("<img ", fits)
        boxes = "".join(
            f'<span style="aspect-ratio:{(end - start) * width:.0f}/{height};'
            f"background:url({match['src']}) {100 * start / (1 - end + start):.2f}% 0/"
            f'{100 / (end - start):.2f}% auto"></span>'
            for start, end in parts
        )
        label = escape(re.search('alt="([^"]*)"', match[0])[1])
        return f'{match[0]}<span class="panels" role="img" aria-label="{label}">{boxes}</span>'

    pattern = r'<img [^>]*?src="(?P<src>_images/[^"]+)"[^>]*>(?=\s*<figcaption)'
    context["body"] = re.sub(pattern, beside, context["body"])
    lazy = r'<img (?![^>]*loading=)(?=[^>]*src="_images/)'
    context["body"] = re.sub(lazy, '<img loading="lazy" ', context["body"])
    pasted = r'<span class="pasted-text">(?=[^<]{1,9}</span>)(?=[^<]*\d)'
    context["body"] = re.sub(pasted, '<span class="pasted-text number">', context["body"])


def setup(app):
    app.connect("env-purge-doc", forget)
    app.connect("doctree-read", read_glossary)
    app.connect("doctree-resolved", define)
    app.connect("html-page-context", stack)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
