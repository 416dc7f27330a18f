"""What recording costs: `reverse_trace` against plain `StableDiffusionPipeline`, alternating.

    python -m memlib.bench            # or: make bench

Same prompts, seeds, batch, sampler and guidance; severity is not scored, pictures are decoded by
both. The order of the two changes from round to round, so that a drifting machine favours neither.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import torch
from tqdm import tqdm

import memlib
from memlib.schedule import SAMPLERS


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=20, help="in one batch: 2 prompts")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="lab")
    args = parser.parse_args()
    model = memlib.load(args.model)
    pairs = memlib.load_pairs("lab").iloc[:2]
    seeds = range(args.images // 2)
    captions = [caption for caption in pairs.caption for _ in seeds]

    def plain(sampler: str) -> None:
        model.pipe.scheduler = SAMPLERS[sampler].from_config(model.scheduler_config)
        generators = [torch.Generator().manual_seed(s) for _ in range(2) for s in seeds]
        model.pipe(captions, num_inference_steps=args.steps, generator=generators, output_type="np")

    def recorded(sampler: str) -> None:
        memlib.reverse_trace(
            model, pairs, seeds=seeds, sampler=sampler, steps=args.steps, severity=None,
            batch_size=len(captions), progress=False,
        )  # fmt: skip

    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; {len(captions)} images, "
        f"{args.steps} steps, g = 7.5")  # fmt: skip
    print(f"{'sampler':8} {'plain':>9} {'recorded':>9} {'ratio':>7}   range of the rounds")
    for sampler in SAMPLERS:
        times: dict = {plain: [], recorded: []}
        for function in (plain, recorded):
            function(sampler)  # warm up
        for n in tqdm(range(args.rounds), desc=sampler, leave=False, disable=None):
            for function in (plain, recorded) if n % 2 == 0 else (recorded, plain):
                start = time.perf_counter()
                function(sampler)
                times[function].append(time.perf_counter() - start)
        a, b = (statistics.median(times[f]) for f in (plain, recorded))
        ratios = [r / p for p, r in zip(times[plain], times[recorded], strict=True)]
        print(f"{sampler:8} {a:8.2f}s {b:8.2f}s {statistics.median(ratios):7.3f}   "
              f"{min(ratios):.3f} ... {max(ratios):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
