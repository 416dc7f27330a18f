"""What chapters share: the setting they begin with, and numbers for the prose around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from memlib import load, load_pairs
from memlib.prompts import by_memorization, groups, in_words


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

    def glue_groups(self, statistic: Callable = np.median, **values: Any) -> None:
        """Glue a statistic of memorized prompts, of those in between, and of control prompts.

        ``ahead=values`` gives ``ahead_memorized``, ``ahead_middle`` and ``ahead_control``; `values`
        begins with the axis of the prompts.
        """
        parts = {"memorized": self.memorized, "middle": self.between, "control": self.control}
        for name, each in values.items():
            for part, which in parts.items():
                glue(**{f"{name}_{part}": statistic(np.asarray(each)[which])})


def begin(model: str, pairs: str, every: int = 1) -> Setting:
    """Load a model and every n-th prompt that has an image; glue what the text calls them."""
    listed = load_pairs(pairs)
    prompts = listed.query("image != ''").iloc[::every]
    glue(left_out=(listed.image == "").sum(), listed=len(listed), **in_words(prompts))
    return Setting(load(model), prompts, groups(prompts), *by_memorization(prompts))
