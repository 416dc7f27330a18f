"""One look for every figure: colours and line styles per meaning, and a few kinds of picture.

Functions take `ax=None` and return the axes. Captions and alt text belong to the chapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr

from memlib.prompts import copies_or_kind, groups

plt.style.use(Path(__file__).with_name("memlib.mplstyle"))

# Okabe and Ito's colours, distinct to colour-blind eyes; a line style each as well.
VERMILION, ORANGE, SKY, GREEN = "#D55E00", "#E69F00", "#56B4E9", "#009E73"
BLUE, PURPLE, GREY, LIGHT = "#0072B2", "#CC79A7", "#888888", "#999999"
GUIDE = {"color": GREY, "lw": 0.8, "ls": ":"}  # a line to compare with
GROUPS = {
    "planted, ≥ 32 copies": (VERMILION, "-"),
    "planted, 8-16 copies": (ORANGE, "--"),
    "planted, 1-4 copies": (SKY, "-."),
    "named": ("#A6761D", (0, (3, 1, 1, 1))),  # ordinary captions, planted
    "memorized": (VERMILION, "-"),  # of a list that does not count copies
    "template": (PURPLE, (0, (5, 1, 1, 1, 1, 1))),
    "control": (GREEN, (0, (4, 2))),
    "normal": (BLUE, ":"),
    "held-out": ("#666666", (0, (1, 1))),
}
CONTRAST = ("planted, ≥ 32 copies", "planted, 1-4 copies", "memorized", "control")
BRANCHES = {
    "conditional": (VERMILION, "-"),
    "unconditional": (BLUE, "--"),
    "guided": (GREEN, "-."),
}
REFERENCES = {"schedule": ("#222222", ":"), "oracle": ("#222222", "--")}


def new_axes(width: float = 4.6, height: float = 3.0):
    return plt.subplots(figsize=(width, height))[1]


def bands(
    values: xr.DataArray,
    group: np.ndarray,
    x: np.ndarray,
    ax=None,
    show: Sequence[str] = CONTRAST,
):
    """Median over prompts, and the band from the 10th to the 90th percentile, one line a group.

    `values` has the dims (prompt, step); `x` is the abscissa of each step.
    """
    ax = ax or new_axes()
    for name in show:
        part = values.values[group == name]
        if not len(part):
            continue
        colour, style = GROUPS[name]
        low, middle, high = np.nanquantile(part, [0.1, 0.5, 0.9], axis=0)
        ax.plot(x, middle, color=colour, ls=style, label=f"{name} (n = {len(part)})")
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    return ax


def severity_by_multiplicity(table: pd.DataFrame, column: str = "severity", ax=None):
    """One point a prompt, a bar at each median. Columns: kind, `column`, multiplicity if known."""
    ax = ax or new_axes(6.4, 3.2)
    label, names = copies_or_kind(table)
    places = [(name, table[label == name]) for name in names]
    rng = np.random.default_rng(0)
    for x, (_, part) in enumerate(places):
        colour = GROUPS[groups(part)[0]][0]
        ax.plot(x + rng.uniform(-0.16, 0.16, len(part)), part[column], "o", ms=4, alpha=0.65,
                color=colour, mew=0)  # fmt: skip
        ax.plot([x - 0.3, x + 0.3], [part[column].median()] * 2, color=colour, lw=2.4)
    ax.set_xticks(range(len(places)), [name for name, _ in places])
    for label in ax.get_xticklabels()[-4:]:
        label.set_rotation(20)
    known = (table.kind == "planted").any()
    ax.set_xlabel("copies of a pair in an epoch, and other kinds" if known else "kind")
    return ax


def sheet(
    rows: Sequence[np.ndarray],
    labels: Sequence[str],
    columns: Sequence[str] = (),
    scale: float = 0.62,
):
    """Pictures in rows: `rows` are uint8 [picture, y, x, rgb], `labels` stand at the left.

    Labels are plain text: captions may hold a dollar sign.
    """
    count = max(len(row) for row in rows)
    figure, axes = plt.subplots(
        len(rows), count, figsize=(count * scale + 1.5, len(rows) * scale), squeeze=False
    )
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for j, ax in enumerate(axes[i]):
            ax.set_axis_off()
            if j < len(row):
                ax.imshow(row[j], interpolation="lanczos")
            if i == 0 and j < len(columns):
                ax.set_title(columns[j], fontsize=7)
        axes[i][0].text(-0.12, 0.5, label, parse_math=False, transform=axes[i][0].transAxes,
                        ha="right", va="center", fontsize=7.5)  # fmt: skip
    return figure
