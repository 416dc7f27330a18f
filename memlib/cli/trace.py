"""``memlib trace``: sample every prompt with every seed, as far as it is not recorded yet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from memlib.findings import deviations
from memlib.hub.answers import leave_card
from memlib.hub.files import whole
from memlib.hub.lists import webster
from memlib.hub.loading import load
from memlib.hub.manifests import load_pairs
from memlib.runs import cache
from memlib.runs.store import open_run
from memlib.runs.tracing import reverse_trace
from memlib.runs.work import record


def trace(options) -> int:
    if options.out and (options.out.is_dir() or not options.out.resolve().parent.is_dir()):
        raise ValueError(f"--out {options.out}: it must name a file in a folder that is there")
    model = load(
        options.model, options.device, options.dtype, options.revision, options.vae,
        options.config, options.timestep_spacing,
    )  # fmt: skip
    pairs = load_pairs(options.pairs or default_pairs(options.model), options.images)
    if options.only_with_images:
        pairs = pairs[pairs.image != ""]
    pairs = pairs.iloc[:: options.every].iloc[: options.prompts]
    if pairs.empty:
        raise ValueError("no prompt is left to sample: --every, --prompts or the images say so")
    seeds = range(options.seeds)
    pictured = (pairs.image != "").sum()
    print(
        f"{len(pairs)} prompts ({pictured} with an image), {len(seeds)} seeds, {options.sampler}, "
        f"{options.steps} steps, {model.source} in {model.precision} on {model.device}"
    )
    settings = dict(
        seeds=seeds, guidance_scale=options.guidance_scale, sampler=options.sampler,
        steps=options.steps, similarity=options.similarity, images=not options.no_images,
    )  # fmt: skip
    address = options.store or cache.run_folder(model, pairs, **settings)
    summary = record(
        reverse_trace, model, pairs, address=address, engine=options.engine,
        workers=options.workers, ray_address=options.ray_address, threads=options.threads,
        progress="lines", batch_size=options.batch_size, compile=options.compile, **settings,
    )  # fmt: skip
    leave_card(model)
    print(summary)
    if not summary.done and not summary.skipped:
        return 1
    found = open_run(address).sel(prompt=list(pairs.prompt_id), seed=seeds, seed_=seeds)
    table = deviations(found, basis="x_0" if pictured else "x_gen")
    if options.out:
        write_table(table, options.out.resolve())
        print(f"D1, D2 and severity of each prompt: {options.out}")
    else:
        columns = [c for c in ("prompt_id", "kind", "D1", "D2", "severity") if c in table]
        print(table[columns].to_string(index=False, max_rows=20, float_format="{:.3f}".format))
    if count := int(found.float32_fallback.sum()):
        print(f"{count} images were not finite in half precision and done in float32")
    return 1 if summary.failed else 0


def default_pairs(model: str) -> str:
    """The list that goes with a model: Webster's where it was made for it, else the lab's."""
    return webster(model) or "lab"


def write_table(table: pd.DataFrame, out: Path) -> None:
    """A CSV file, as a whole or not at all; into a device or a pipe directly."""
    if out.exists() and not out.is_file():
        table.to_csv(out, index=False)
        return
    with whole(out) as partial:
        table.to_csv(partial, index=False)
