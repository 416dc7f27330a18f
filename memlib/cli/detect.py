"""``memlib detect``: which prompts of a list are memorized, from the first call of the network."""

from __future__ import annotations

import time

import torch

from memlib.cli.trace import default_pairs
from memlib.detection import detect as detection
from memlib.detection.statistics import STATISTICS
from memlib.errors import nearest
from memlib.hub.loading import load
from memlib.hub.manifests import load_pairs
from memlib.hub.spread import SpreadModel


def detect(options) -> int:
    if options.statistic not in STATISTICS:
        names = nearest(options.statistic, STATISTICS) or f": {', '.join(STATISTICS)}"
        raise ValueError(f"unknown statistic {options.statistic!r}{names}")
    if options.out and not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out {options.out}: it must name a file in a folder that is there")
    model = _on_devices(options)
    devices = [str(each.device) for each in getattr(model, "models", [model])]
    prompts = load_pairs(options.prompts or default_pairs(options.model))
    null = load_pairs(options.calibrate) if options.calibrate else None
    count = len(prompts) + (0 if null is None else len(null))
    calls = STATISTICS[options.statistic].cost * options.seeds
    # One call of one caption, after one that warms up.
    for _ in range(2):
        start = time.monotonic()
        detection.first_calls(model, list(prompts.caption[:1]), 1, branches=1)
        seconds = time.monotonic() - start
    print(
        f"{count} prompts, {options.seeds} seeds, {options.statistic}: {count * calls} calls of "
        f"{model.source} in {model.precision} on {', '.join(devices)}, at most "
        f"{max(1, round(count * calls * seconds / 60))} min"
    )
    if hasattr(model, "tokens_cut") and (
        cut := (model.tokens_cut(list(prompts.caption)) > 0).sum()
    ):
        print(f"{cut} captions are longer than the text encoder reads: their ends are not seen")
    table = detection.detect(
        model, prompts, null, options.statistic, options.seeds, options.rate,
        options.batch_size * len(devices), options.out,
    )  # fmt: skip
    flagged = (table.verdict == "memorized").sum()
    print(
        f"{flagged} of {len(table)} memorized; {options.rate * len(table):.1f} expected by chance"
    )
    if options.out:
        print(f"all prompts: {options.out}")
    print(table.head(max(flagged, 10)).to_string(index=False, max_rows=30, max_colwidth=60))
    return 0


def _on_devices(options):
    """The model, on all devices that are named, or on all GPUs."""
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    asked = options.device.split(",") if options.device else gpus if len(gpus) > 1 else [None]
    each = [load(options.model, on, options.dtype, options.revision) for on in asked]
    return SpreadModel(each) if len(each) > 1 else each[0]
