"""What recording costs, measured side by side: ``make bench``.

    python -m memlib.bench                              # everything, half an hour
    python -m memlib.bench --only recording --rounds 3  # a part
    python -m memlib.bench --only gpu                   # on a card, five minutes; else a rehearsal

Ways that are compared alternate within one run and change their order from round to round, so
that a drifting machine favours neither; memory is measured in processes of its own. The results
go into ``data/bench.json``, which the chapter *Cost and scale* shows. The section *gpu* is part of
them only where it ran on a card.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm import tqdm

import memlib
from memlib import claims
from memlib.gram import VECTORS
from memlib.hub.accelerated import AcceleratedModel
from memlib.hub.files import whole
from memlib.paths import BENCH as RESULTS
from memlib.paths import LAB
from memlib.runs import cost
from memlib.runs.engines import Job, OnRay, cores
from memlib.runs.store import Run, Task, prompt_rows
from memlib.runs.tracing import reverse_trace, sample_trace
from memlib.runs.work import identity
from memlib.sampler import sample
from memlib.schedule import (
    SAMPLERS,
    ddpm_noise_coefficients,
    guidance_values,
    make_scheduler,
    oracle_weights,
    schedule_weights,
    state_levels,
)
from memlib.trace import contract, seed_distances

FIRSTS = (1, 2, 3, 5, 8, 10, 15, 20, 25, 30, 40)  # states that D1 is summed over, in parts
T4 = int(15e9)  # bytes of a T4 that are free
GRID = dict(prompts=436, seeds=50, steps=50)  # the paper's, for one model, sampler and scale


def machine() -> dict:
    """The machine and the versions, as far as they can be told."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": name, "cores": cores(), "gpu": gpu, "torch": torch.__version__}


def peak(reset: bool = False) -> float:
    """Megabytes of memory: what this process uses now (`reset`), or the most since then."""
    if reset:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
    wanted = "VmRSS" if reset else "VmHWM"
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(wanted)).split()[1]) / 1024


def forget(folder: Path) -> None:
    """Take a folder's files out of the system's cache, as if they were read another day."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def keep_memory() -> None:
    """Memory that this process has used once stays its own, for whatever comes next.

    Else a large array is given back and its pages are touched anew in every round; on a virtual
    machine that took from 0.02 to 0.2 s for 90 MB, more than the work that was to be timed.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc, (trim, maps) = ctypes.CDLL(None), (-1, -4)  # M_TRIM_THRESHOLD, M_MMAP_MAX
        libc.mallopt(trim, 2**31 - 1)
        libc.mallopt(maps, 0)


def alternate(
    ways: dict[str, Callable], rounds: int, name: str, before: Callable = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one untimed call of each.

    Garbage is collected before, not in the way that happens to fill the last bin: torch alone
    makes that 0.2 s.
    """
    times: dict = {way: [] for way in ways}
    for function in ways.values():
        function()
    for n in tqdm(range(rounds), desc=name, leave=False, disable=None):
        for way in list(ways) if n % 2 == 0 else reversed(ways):
            before()
            gc.collect()
            start = time.perf_counter()
            ways[way]()
            times[way].append(time.perf_counter() - start)
    return times


def ratio(times: dict, over: str, under: str) -> dict:
    """Medians of two ways, and the median and range of their ratios round by round."""
    each = [a / b for a, b in zip(times[over], times[under], strict=True)]
    medians = {way: statistics.median(times[way]) for way in (over, under)}
    return {"seconds": medians, "ratio": statistics.median(each), "range": [min(each), max(each)]}


class Workload:
    """A model, prompts and seeds, and the ways to sample them."""

    def __init__(self, model: str, prompts: int, seeds: int = 10, steps: int = 50):
        self.model = memlib.load(model).uncached
        from diffusers import StableDiffusionPipeline  # loaded by now, and quiet

        # A pipeline of its own, so that nothing of ours is switched on in it.
        parts = {**self.model.pipe.components, "scheduler": self.model.pipe.scheduler}
        self.pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.pairs = memlib.load_pairs("lab").iloc[:prompts]
        self.seeds, self.steps = range(seeds), steps
        self.together = max(1, 20 // seeds)  # prompts in a batch of 20
        self.folder = Path(tempfile.mkdtemp(prefix="memlib-bench-"))

    def batches(self):
        for n in range(0, len(self.pairs), self.together):
            captions = [c for c in self.pairs.caption[n : n + self.together] for _ in self.seeds]
            yield n, captions, [*self.seeds] * (len(captions) // len(self.seeds))

    def plain(self, sampler: str) -> None:
        """diffusers' own pipeline, its decoder as it comes."""
        self.pipe.scheduler = SAMPLERS[sampler].from_config(self.model.scheduler_config)
        for _, captions, seeds in self.batches():
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            self.pipe(captions, num_inference_steps=self.steps, generator=generators,
                      output_type="np")  # fmt: skip

    def recorded(self, sampler: str) -> Path:
        """Everything the book needs, in a run on disk."""
        target = self.folder / "run"
        shutil.rmtree(target, ignore_errors=True)
        memlib.record(
            reverse_trace, self.model, self.pairs, address=target, seeds=self.seeds,
            sampler=sampler, steps=self.steps, similarity=None, batch_size=20, progress=False,
        )  # fmt: skip
        return target

    @torch.no_grad()
    def everything(self, sampler: str) -> Path:
        """How published code does it: all latents and both predictions, a file for each prompt."""
        model, target = self.model, self.folder / "everything"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for n, captions, seeds in self.batches():
            scheduler = make_scheduler(model.scheduler_config, sampler, self.steps, model.dtype)
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            x = torch.cat([torch.randn(1, *model.latent_shape, generator=g) for g in generators])
            x = x.to(model.device)
            cond, uncond = model.encode_text(captions)
            latents, unconds, conds = [x.cpu()], [], []
            for t in scheduler.timesteps:
                eps_uncond, eps_cond = model.predict(
                    torch.cat([x, x]), t, torch.cat([uncond, cond])
                ).chunk(2)
                unconds.append(eps_uncond.cpu())
                conds.append(eps_cond.cpu())
                more = {"generator": generators} if sampler == "ddpm" else {}
                x = scheduler.step(eps_uncond + 7.5 * (eps_cond - eps_uncond), t, x, **more)
                x = x.prev_sample
                latents.append(x.cpu())
            pictures = model.vae.decode(x / model.vae.config.scaling_factor).sample
            pictures = self.pipe.image_processor.postprocess(pictures, output_type="np")
            pictures = (pictures * 255).round().astype(np.uint8)
            kept = {"latents": latents, "eps_uncond": unconds, "eps_cond": conds}
            kept = {name: torch.stack(value) for name, value in kept.items()}
            for p in range(len(captions) // len(self.seeds)):
                mine = slice(p * len(self.seeds), (p + 1) * len(self.seeds))
                part = {name: value[:, mine].clone() for name, value in kept.items()}
                part["pictures"] = torch.from_numpy(pictures[mine])
                torch.save(part, target / f"{n + p}.pt")
        return target

    def analyse_trace(self, run: Path) -> pd.DataFrame:
        """What the chapter on severity needs of each prompt, from a run."""
        return predictors(memlib.open_run(run))

    def analyse_everything(self, folder: Path, targets: list | None = None) -> pd.DataFrame:
        """The same numbers of DDIM from the vectors, by dot products of all states at once.

        `targets` are the training latents; by default they are encoded from the images.
        """
        scheduler = make_scheduler(self.model.scheduler_config, "ddim", self.steps)
        alpha_bar = state_levels(scheduler)[1]
        expected = {"schedule": schedule_weights(alpha_bar)}
        expected["oracle"] = oracle_weights(alpha_bar, "ddim")
        a = torch.from_numpy(alpha_bar)[:, None]
        rows = []
        targets = targets or [self.model.encode_images([f])[0] for f in self.pairs.image]
        for n, x_0 in enumerate(targets):
            x_0 = x_0.flatten().double().cpu()
            kept = torch.load(folder / f"{n}.pt", weights_only=True, mmap=True)
            x, u, c = (
                kept[name].flatten(2).double()  # state, seed, latent
                for name in ("latents", "eps_uncond", "eps_cond")
            )
            x_T, x_gen = x[0], x[-1]

            def dot(v, w):
                return torch.einsum("...d,...d->...", v, w)

            along, noise = x @ x_0, dot(x, x_T)  # state, seed
            w_0, w_T = _two(dot(x_0, x_0), dot(x_T, x_0), dot(x_T, x_T), along, noise)
            own, _ = _two(dot(x_gen, x_gen), noise[-1], dot(x_T, x_T), dot(x, x_gen), noise)
            d = {name: _sums(w_0 - torch.from_numpy(table["w_0"])[:, None])
                 for name, table in expected.items()}  # fmt: skip
            guided, alone = ((u + g * (c - u)) @ x_0 for g in (7.5, 1.0))
            norm = (c - u).norm(dim=-1)
            last = torch.cdist(x_gen, x_gen)
            row = {"gap": norm.mean(), "gap, first": norm[0].mean()}
            for name, e in (("k", guided), ("k, first", alone)):
                k = (along[:-1] - (1 - a[:-1]).sqrt() * e) / a[:-1].sqrt() / dot(x_0, x_0)
                row[name] = k.mean() if name == "k" else k[0].mean()
            row["spread"] = -last.sum() / (len(last) * (len(last) - 1))
            row["end"] = (along[-1] / x_gen.norm(dim=-1) / x_0.norm()).mean()
            for name, table in expected.items():
                row[f"D1, {name}"] = d[name][-1]
                row[f"D2, {name}"] = -_sums(w_T - torch.from_numpy(table["w_T"])[:, None])[-1]
            schedule = torch.from_numpy(expected["schedule"]["w_0"])[:, None]
            row["D1, own end"] = _sums(own - schedule)[-1]
            row |= {f"D1, first {f}": d["schedule"][f - 1] for f in FIRSTS if f < self.steps}
            rows.append({name: float(value) for name, value in row.items()})
        return pd.DataFrame(rows)


def _two(aa, ab, bb, xa, xb) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of x along a and b, from inner products."""
    determinant = aa * bb - ab * ab
    return (xa * bb - xb * ab) / determinant, (xb * aa - xa * ab) / determinant


def _sums(gap: torch.Tensor) -> torch.Tensor:
    """Mean over seeds, summed over the first, the first two, ... states after an update."""
    return gap[1:].mean(1).cumsum(0)


def folder_bytes(folder: Path, without: tuple[str, ...] = ()) -> int:
    """Bytes of all files, but those under `without`."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files if f.relative_to(folder).parts[0] not in without)


# --- the sections -------------------------------------------------------------------------------


def recording(model: str, rounds: int) -> dict:
    """A run on disk against the plain pipeline."""
    load = Workload(model, prompts=2)
    found: dict = {"images": len(load.pairs) * len(load.seeds), "steps": load.steps}
    for sampler in SAMPLERS:
        ways = {w: partial(getattr(load, w), sampler) for w in ("recorded", "plain")}
        found[sampler] = ratio(alternate(ways, 3 * rounds, sampler), "recorded", "plain")
        found[sampler]["apart"] = apart(load, ways, 2 * rounds)
    once = found["ddim"]["apart"]
    found["share of the U-Net"] = once["network"] / once["whole"]["plain"]
    shutil.rmtree(load.folder)
    return found


def in_network(load: Workload, way: Callable) -> tuple[float, int]:
    """Seconds that a way spends in calls of the U-Net, and how many there are."""
    begun, spent = [], []
    hooks = (
        load.pipe.unet.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())),
        load.pipe.unet.register_forward_hook(
            lambda *_: spent.append(time.perf_counter() - begun[-1])
        ),
    )
    way()
    for hook in hooks:
        hook.remove()
    return sum(spent, 0.0), len(spent)


@contextlib.contextmanager
def without_network(load: Workload):
    """The U-Net replaced by a multiplication: what is left is all that the ways differ in."""
    load.pipe.unet.forward = lambda x, *_, **__: (x * 0.5,)
    try:
        yield
    finally:
        del load.pipe.unet.forward


def apart(load: Workload, ways: dict[str, Callable], rounds: int) -> dict:
    """Two ways without the network's time, and their ratio with the same network time in both.

    They make the same calls of the U-Net. On a machine that is shared these vary by more than all
    the rest takes, so a ratio near 1 is seen here first.
    """
    with without_network(load):
        rest = ratio(alternate(ways, rounds, "apart"), *ways)
    calls = [in_network(load, way) for way in [*ways.values()] * 3]
    count = {count for _, count in calls}
    if len(count) > 1:
        raise RuntimeError(f"the ways differ in their calls of the network: {count}")
    network = statistics.median(seconds for seconds, _ in calls)
    whole = {way: network + seconds for way, seconds in rest["seconds"].items()}
    over, under = whole.values()
    return {"rest": rest, "network": network, "calls": count.pop(), "whole": whole,
            "ratio": over / under}  # fmt: skip


def everything(model: str, rounds: int) -> dict:
    """A run on disk against keeping every vector on disk: time, memory, bytes, numbers."""
    load = Workload(model, prompts=8)
    ways = {w: partial(getattr(load, w), "ddim") for w in ("recorded", "everything")}
    found: dict = {"sampling": ratio(alternate(ways, rounds, "keep"), "recorded", "everything")}
    run, folder = load.recorded("ddim"), load.everything("ddim")
    found["analysis"] = _analyses(load, run, folder, rounds)
    found["apart"] = apart(load, ways, 2 * rounds)
    for name, sampled in (
        ("whole", found["sampling"]["seconds"]), ("whole, apart", found["apart"]["whole"])
    ):  # fmt: skip
        whole = {w: sampled[w] + found["analysis"]["warm"]["seconds"][w] for w in ways}
        found[name] = {"seconds": whole, "ratio": whole["recorded"] / whole["everything"]}
    states = len(load.pairs) * len(load.seeds) * (load.steps + 1)
    kept = folder_bytes(run, without=("image",)) / states
    theirs = folder_bytes(folder) / states
    sizes = {"the lab's": (load.model.latent_shape, 436), "SD": ((4, 64, 64), 32)}
    for size, (shape, prompts) in sizes.items():
        found[f"analysis at {size} size"] = _invented_vectors(load, rounds, shape, prompts)
    latent = 4 * 64 * 64
    vectors = 4 * latent * (1 + 2 * load.steps / (load.steps + 1))
    found["bytes a state"] = {"recorded": kept, "everything": theirs, "at 16,384": vectors}
    found["bytes ratio at 16,384"] = vectors / kept
    shutil.rmtree(load.folder)
    found["peak MB"] = {w: measured("memory", w, model) for w in ("recorded", "everything")}
    found["peak ratio"] = found["peak MB"]["recorded"] / found["peak MB"]["everything"]
    return found


def _analyses(load: Workload, run: Path, folder: Path, rounds: int, targets=None) -> dict:
    """Both analyses, from the system's file cache and from disk; they must agree."""
    ways = {
        "everything": lambda: load.analyse_everything(folder, targets),
        "recorded": lambda: load.analyse_trace(run),
    }
    cold = partial(lambda *folders: [forget(f) for f in folders], run, folder)
    keep_memory()
    os.sync()  # what is still being written would be paid by whoever comes first
    found = {}
    for name, before in (("warm", lambda: None), ("cold", cold)):
        times = alternate(ways, rounds, name, before)
        found[name] = ratio(times, "everything", "recorded")
    gap = (load.analyse_everything(folder, targets) - load.analyse_trace(run)).abs().max()
    prompts = memlib.open_run(run).sizes["prompt"]
    return found | {"prompts": prompts, "largest difference": float(gap.max())}


def _invented_vectors(load: Workload, rounds: int, shape: tuple, prompts: int) -> dict:
    """Both analyses on random vectors of this shape; no network is run."""
    folder, targets = load.folder / "vectors", []
    folder.mkdir()
    random, count = torch.Generator().manual_seed(0), len(load.seeds)

    def piece(template: xr.Dataset, number: int) -> xr.Dataset:
        kept = {
            name: torch.randn(states, count, *shape, generator=random)
            for name, states in (("latents", 51), ("eps_uncond", 50), ("eps_cond", 50))
        }
        targets.append(torch.randn(shape, generator=random))
        torch.save(kept, folder / f"{number}.pt")
        kept["x_t"] = kept.pop("latents")
        noise = torch.zeros(1, count, *shape).expand_as(kept["x_t"])
        gram = contract(kept | {"noise": noise}, torch.stack([targets[-1]] * count))
        values = {
            "gram": (("seed", "step", "vec", "vec_"), gram),
            "seed_distance": (
                ("step", "seed", "seed_"),
                seed_distances(list(kept["x_t"].unbind(1))),
            ),
            "severity": (("seed",), np.zeros(count)),
            "float32_fallback": (("seed",), np.zeros(count, np.uint8)),
            "tokens_cut": (("seed",), np.zeros(count, np.uint16)),
        }
        return xr.Dataset(values)

    run = load.folder / "invented"
    synthetic(run, prompts, count, 50, piece=piece)
    found = _analyses(load, run, folder, rounds, targets)
    shutil.rmtree(folder)
    shutil.rmtree(run)
    return found


def memory(way: str, model: str, prompts: int = 8, steps: int = 50) -> float:
    """Megabytes at the peak of one way, sampling and analysis, over the loaded model."""
    small = Workload(model, prompts=1, seeds=2, steps=2)
    small.analyse_trace(small.recorded("ddim"))  # imports and first calls are not counted
    small.analyse_everything(small.everything("ddim"))
    load = Workload(model, prompts, steps=steps)
    before = peak(reset=True)
    if way == "recorded":
        load.analyse_trace(load.recorded("ddim"))
    else:
        load.analyse_everything(load.everything("ddim"))
    return peak() - before


def workers(model: str, rounds: int) -> dict:
    """Two workers of Ray of one thread each, against one; their start is timed apart."""
    load = Workload(model, prompts=16, steps=20)
    settings = dict(
        similarity=None, sampler="ddim", steps=load.steps, guidance_scale=7.5, images=True,
        compile=False,
    )  # fmt: skip
    job = Job(reverse_trace, settings, load.model.recipe | {"device": "cpu"}, threads=1)
    rows = load.pairs.reset_index(drop=True)

    def run(pool: OnRay, count: int) -> float:
        tasks = [Task(n, (2 * n, 2 * n + 1), tuple(load.seeds), 20) for n in range(count)]
        start, futures = time.perf_counter(), set()
        while tasks or futures:
            while tasks and pool.room(len(tasks)):
                task = tasks.pop()
                futures.add(pool.submit(task, rows.iloc[list(task.prompts)], list(load.seeds)))
            if not futures:  # workers start
                time.sleep(0.1)
            done, futures = wait(futures, 1.0, FIRST_COMPLETED)
            assert all(isinstance(pool.result(future), xr.Dataset) for future in done)
        return time.perf_counter() - start

    times: dict = {1: [], 2: []}
    started, pools = {}, {}
    for count in (2, 1):  # the first starts Ray, too
        begun = time.perf_counter()
        pools[count] = OnRay(job, count)
        run(pools[count], 2)
        started[count] = time.perf_counter() - begun
    for n in tqdm(range(rounds), desc="workers", leave=False, disable=None):
        for count in (1, 2) if n % 2 == 0 else (2, 1):
            times[count].append(run(pools[count], 8))
    for count in (1, 2):
        pools[count].close()
    found = ratio(times, 1, 2)
    shutil.rmtree(load.folder)
    return found | {"speed-up": found.pop("ratio"), "first two tasks": started}


def scaling(model: str, rounds: int) -> dict:
    """Seconds and memory against prompts, seeds and steps."""
    base = dict(prompts=2, seeds=10, steps=10)
    grid = {"prompts": (2, 4, 8, 16), "seeds": (10, 20, 40), "steps": (5, 10, 20, 40)}
    settings = {tuple((base | {k: v}).items()) for k, values in grid.items() for v in values}
    settings = [dict(s) for s in sorted(settings)]
    seconds: dict = {}
    for n in tqdm(range(max(2, rounds)), desc="scaling", leave=False, disable=None):
        for s in settings if n % 2 else settings[::-1]:
            load = Workload(model, **s)
            load.recorded("ddim") if n == 0 else None
            start = time.perf_counter()
            load.recorded("ddim")
            seconds.setdefault(tuple(s.items()), []).append(time.perf_counter() - start)
            shutil.rmtree(load.folder)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    found: dict = {}
    for name, values in grid.items():
        y = [median[tuple((base | {name: v}).items())] for v in values]
        slope, start = np.polyfit(values, y, 1)
        worst = max(abs(start + slope * v - t) / t for v, t in zip(values, y, strict=True))
        found[name] = dict(values=values, seconds=y, slope=slope, intercept=start, worst=worst)
    # seconds = fixed + pictures x (decode + updates x update): fitted to all, checked on one more
    rows = [dict(key) | {"seconds": t} for key, t in median.items()]
    table = pd.DataFrame(rows)
    pictures = table.prompts * table.seeds
    design = np.stack([np.ones(len(table)), pictures, pictures * table.steps], 1)
    weight = 1 / table.seconds.values
    fit = np.linalg.lstsq(design * weight[:, None], table.seconds * weight)[0]
    load = Workload(model, prompts=8, seeds=20, steps=30)
    start = time.perf_counter()
    load.recorded("ddim")
    actual = time.perf_counter() - start
    predicted = float(np.dot(fit, [1, 160, 160 * 30]))
    found["model"] = dict(zip(("fixed", "picture", "update"), map(float, fit), strict=True))
    found["check"] = {"predicted": predicted, "measured": actual, "images": 160, "steps": 30}
    shutil.rmtree(load.folder)
    found["peak MB by prompts"] = {
        n: measured("memory", "recorded", model, n, 5) for n in (4, 8, 16, 32)
    }
    return found


def network(model: str, rounds: int) -> dict:
    """Operations a second: the lab's U-Net, and one of Stable Diffusion's size, random weights."""
    from diffusers import UNet2DConditionModel

    lab = memlib.load(model).uncached
    side, options = cost.UNETS["sd14"]
    large = UNet2DConditionModel(sample_size=side, **options).eval().to(lab.device)
    cases = {
        "lab": (lab.unet, 40, lab.unet.config.cross_attention_dim),
        "sd14": (large, 2, options["cross_attention_dim"]),
    }
    found: dict = {}
    for name, (unet, batch, width) in cases.items():
        config = unet.config
        x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
        text = torch.randn(batch, 77 if name == "sd14" else 16, width)
        x, text = x.to(lab.device), text.to(lab.device)

        def call(unet=unet, x=x, text=text) -> None:
            with torch.no_grad():
                unet(x, torch.tensor(500), encoder_hidden_states=text)
            if x.is_cuda:
                torch.cuda.synchronize()

        seconds = statistics.median(alternate({"call": call}, rounds, name)["call"])
        with torch.device("meta"):  # fused kernels are not counted; there are none of them there
            empty = UNet2DConditionModel.from_config(unet.config)
            flops = cost.count_flops(empty, x.to("meta"), text.to("meta"))
        found[name] = {"batch": batch, "seconds": seconds, "operations": flops,
                       "rate": flops / seconds}  # fmt: skip
    return found


def synthetic(
    address: Path,
    prompts: int,
    seeds: int,
    steps: int,
    sampler: str = "ddim",
    piece: Callable | None = None,
) -> float:
    """A run of invented vectors: as many numbers as a real one, and as hard to compress.

    Returns the seconds that were spent on writing.

    `piece(template, prompt number)` makes the values of a prompt; by default states follow the
    schedule towards a mixture of the image and noise of their own.
    """
    lab = memlib.load("lab")
    pairs = memlib.load_pairs("lab").iloc[[0] * prompts].reset_index(drop=True)
    pairs["prompt_id"] = [f"p{n}" for n in range(prompts)]
    settings = dict(
        seeds=range(seeds), steps=steps, images=False, sampler=sampler, similarity="ncc"
    )
    agreed, _ = identity(reverse_trace, lab, pairs, settings)
    template = reverse_trace(lab, pairs.iloc[:0], **settings)
    run, rng, wrote = Run(address), np.random.default_rng(0), 0.0
    piece = piece or (lambda template, _: _invented(template, seeds, sampler, rng))
    with run.work():
        run.open_plan(agreed, prompt_rows(pairs), list(range(seeds)), 20, template)
        for task in tqdm(run.tasks(), desc="synthetic", leave=False, disable=None):
            for p in task.prompts:
                values = piece(template, p)
                for name, v in template.data_vars.items():  # what an invented piece has nothing of
                    if v.dims == ("prompt", "seed") and name not in values:
                        values[name] = ("seed", np.zeros(seeds, v.dtype))
                start = time.perf_counter()
                run.put(task, p, values)
                wrote += time.perf_counter() - start
    return wrote


def _invented(template: xr.Dataset, seeds: int, sampler: str, rng) -> xr.Dataset:
    states, size = template.sizes["step"], 48
    alpha_bar = template.alpha_bar.values
    x_0, x_T = rng.normal(size=size), rng.normal(size=(seeds, 1, size))
    strength = rng.uniform(0.2, 1.2)
    fresh = np.zeros((seeds, states, size))
    if sampler == "ddpm":
        keep, new = (np.asarray(c) for c in ddpm_noise_coefficients(alpha_bar))
        for i in range(states - 1):
            fresh[:, i + 1] = keep[i] * fresh[:, i] + new[i] * rng.normal(size=(seeds, size))
    wobble = rng.normal(size=(seeds, states, size)) * 0.1
    x_t = np.sqrt(alpha_bar)[:, None] * strength * x_0 + np.sqrt(1 - alpha_bar)[:, None] * x_T
    x_t = x_t + wobble + fresh
    eps = [x_T + 0.1 * rng.normal(size=x_t.shape) for _ in range(2)]
    for e in eps:
        e[:, -1] = np.nan
    wide = {"x_0": x_0, "x_T": x_T, "x_gen": x_t[:, -1:]}
    vectors = {"x_t": x_t, "eps_uncond": eps[0], "eps_cond": eps[1], "noise": fresh}
    vectors |= {name: np.broadcast_to(v, x_t.shape) for name, v in wide.items()}
    stacked = np.stack([vectors[v] for v in VECTORS], 2)
    gap = np.linalg.norm(x_t[:, None] - x_t[None], axis=-1)  # seed, seed_, step
    severity = np.clip(0.5 * strength + 0.1 * rng.normal(size=seeds), 0, 1)
    values = {
        "gram": (("seed", "step", "vec", "vec_"), stacked @ stacked.swapaxes(-1, -2)),
        "seed_distance": (("step", "seed", "seed_"), np.moveaxis(gap, -1, 0)),
        "severity": (("seed",), severity),
        "float32_fallback": (("seed",), np.zeros(seeds, np.uint8)),
        "tokens_cut": (("seed",), np.zeros(seeds, np.uint16)),
    }
    return xr.Dataset(values)


def predictors(trace: xr.Dataset) -> pd.DataFrame:
    """The numbers of each prompt that the chapter on severity correlates with its copies."""
    gap = memlib.norm(trace, "eps_delta")
    table = {"gap": gap.mean(("seed", "step")), "gap, first": gap[:, :, 0].mean("seed")}
    table["k"] = memlib.overestimation(trace).mean(("seed", "step"))
    table["k, first"] = memlib.overestimation(trace.isel(step=slice(1)), 1.0).mean(("seed", "step"))
    table["spread"] = -memlib.mean_seed_distance(trace.isel(step=slice(-1, None)))[:, 0]
    table["end"] = memlib.cosine(trace.isel(step=slice(1)), "x_gen", "x_0").mean(("seed", "step"))
    found = memlib.weights(trace)[["w_0", "w_T"]].mean("seed")
    own = memlib.weights(trace, "x_gen")[["w_0"]].mean("seed")
    for name in ("schedule", "oracle"):
        expected = memlib.reference_weights(trace, name)
        sums = (found - expected).isel(step=slice(1, None)).cumsum("step", skipna=False)
        table |= {f"D1, {name}": sums.w_0[:, -1], f"D2, {name}": -sums.w_T[:, -1]}
        if name == "schedule":
            table["D1, own end"] = (own.w_0 - expected.w_0)[:, 1:].sum("step")
            table |= {
                f"D1, first {n}": sums.w_0[:, n - 1] for n in FIRSTS if n < sums.sizes["step"]
            }
    return pd.DataFrame({name: np.asarray(values) for name, values in table.items()})


def correlations(trace: xr.Dataset) -> dict[str, float]:
    """The numbers of the chapter on severity: every predictor, with intervals and by seeds."""
    found, rng = {}, np.random.default_rng(0)
    score = trace.severity.mean("seed").values
    for name, values in predictors(trace).items():
        r, low, high = claims.interval(claims.pearson, values.values, score, paired=True)
        found |= {name: r, f"{name}, low": low, f"{name}, high": high}
    w_0 = memlib.weights(trace).w_0 - memlib.reference_weights(trace).w_0
    each = w_0.isel(step=slice(1, None)).sum("step").values
    for count in (n for n in (1, 2, 3, 5, 10, 20, 35, 50) if n <= trace.sizes["seed"]):
        for n in range(30):
            p = rng.choice(trace.sizes["seed"], count, replace=False)
            r = claims.pearson(each[:, p].mean(1), trace.severity.values[:, p].mean(1))
            found[f"{count} seeds, {n}"] = r
    return found


def open_and_correlate(address: str) -> dict:
    """Seconds and megabytes of all correlations of a run, from a cold process."""
    before = peak(reset=True)
    start = time.perf_counter()
    trace = memlib.open_run(address)
    opened = time.perf_counter() - start
    numbers = correlations(trace)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "of it opening": opened, "peak MB": peak(),
            "over the start MB": peak() - before, "numbers": len(numbers)}  # fmt: skip


def analysis(model: str, rounds: int) -> dict:
    """A run of the size of the paper's grid: writing, bytes, verifying, analysing."""
    folder = Path(tempfile.mkdtemp(prefix="memlib-bench-"))
    found: dict = {**GRID}
    for sampler in SAMPLERS:
        run = folder / sampler
        wrote = synthetic(run, **GRID, sampler=sampler)
        states = GRID["prompts"] * GRID["seeds"] * (GRID["steps"] + 1)
        start = time.perf_counter()
        report = memlib.verify(run)
        if not report.ok:
            raise RuntimeError(str(report))
        found[sampler] = {
            "write, ms a piece": 1000 * wrote / GRID["prompts"],
            "verify s": time.perf_counter() - start,
            "bytes": folder_bytes(run),
            "bytes a state": folder_bytes(run) / states,
            "files": sum(1 for f in run.rglob("*") if f.is_file()),
            **measured("open_and_correlate", str(run)),
        }
    shutil.rmtree(folder)
    return found


# --- on a card ----------------------------------------------------------------------------------


def random_pipeline(device: torch.device, precision: str, small: bool):
    """Stable Diffusion v1.4's architecture with random weights, made on the device.

    `small` keeps the kinds of its parts and their order, for a rehearsal on a CPU.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    lab, width = memlib.load("lab", device="cpu").uncached, 64 if small else 768
    side, options = cost.UNETS["sd14"]
    options = options | {"cross_attention_dim": width}
    if small:
        side, options = 8, options | {"block_out_channels": (64,) * 4, "layers_per_block": 1}
    widths = (32,) * 4 if small else (128, 256, 512, 512)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=side, **options)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths, layers_per_block=2, scaling_factor=0.18215,
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
            num_hidden_layers=2 if small else 12,
        ))  # fmt: skip
    tokenizer = type(lab.pipe.tokenizer).from_pretrained(LAB / "tokenizer", model_max_length=77)
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    for part in parts.values():
        torch.nn.Module.to(part.eval(), getattr(torch, precision))
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=SAMPLERS["ddim"].from_config(lab.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


class OnCard:
    """The same prompts by diffusers' pipeline in half precision, and by ours in all its ways."""

    def __init__(self, device: torch.device, small: bool):
        precision = "float32" if small else "float16"
        self.seeds, self.steps = (range(2), 2) if small else (range(10), 50)
        self.pipe = random_pipeline(device, "float32", small)
        self.model = AcceleratedModel(self.pipe, "sd14-random", "random", precision)
        self.pairs = memlib.load_pairs("lab").iloc[: 4 if small else 9]
        self.folder, self.compile = Path(tempfile.mkdtemp(prefix="memlib-bench-")), not small
        self.device, self.small, self.plain_pipe = device, small, None

    def recorded(self, batch: int, images: bool = True, prompts: int | None = None) -> float:
        """Seconds to record everything on disk."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        start = time.perf_counter()
        memlib.record(
            reverse_trace, self.model, self.pairs.iloc[:prompts], address=self.folder / "run",
            seeds=self.seeds, steps=self.steps, similarity=None, images=images, batch_size=batch,
            compile=self.compile, workers=1, progress=False, strict=True,
        )  # fmt: skip
        return time.perf_counter() - start

    def plain(self, batch: int, steps: int | None = None) -> float:
        """Seconds of diffusers' pipeline for a batch, in the precision of its users."""
        precision = "float32" if self.small else "float16"
        self.plain_pipe = self.plain_pipe or random_pipeline(self.device, precision, self.small)
        captions, seeds = self.batch(batch)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        start = time.perf_counter()
        self.plain_pipe(captions, num_inference_steps=steps or self.steps, generator=generators,
                        output_type="np")  # fmt: skip
        return time.perf_counter() - start

    def batch(self, batch: int) -> tuple[list[str], list[int]]:
        work = [(c, s) for c in self.pairs.caption for s in self.seeds] * batch
        captions, seeds = zip(*work[:batch], strict=True)
        return list(captions), list(seeds)

    def sampled(self, batch: int) -> tuple[float, float]:
        """Seconds of a batch's loop alone, and with all that is recorded of it, in memory."""
        captions, seeds = self.batch(batch)
        # without images: they are encoded once a prompt, whatever the seeds
        rows = self.pairs.iloc[: max(1, batch // len(self.seeds))].assign(image="")
        guidance = guidance_values(7.5, self.steps)
        scheduler = make_scheduler(self.model.scheduler_config, "ddim", self.steps)
        start = time.perf_counter()
        with self.model.compiling() if self.compile else contextlib.nullcontext():
            sample(self.model, captions, seeds, scheduler, guidance)["x_t"][-1].cpu()
        alone, start = time.perf_counter() - start, time.perf_counter()
        sample_trace(self.model, rows, self.seeds, 7.5, "ddim", self.steps, None, False, batch,
                     False, self.compile)  # fmt: skip
        return alone, time.perf_counter() - start

    def compiled(self, batch: int) -> float:
        """Seconds to compile for a batch."""
        if not self.compile:
            return 0.0
        x = torch.randn(2 * batch, *self.model.latent_shape, device=self.device)
        text = torch.cat(self.model.encode_text([""] * batch))
        start = time.perf_counter()
        with self.model.compiling():
            self.model.predict(x, torch.tensor(500), text).cpu()
        if self.model._network is self.model.unet:
            raise RuntimeError("the network does not compile here: see the warning above")
        return time.perf_counter() - start


def small_card(load: OnCard) -> dict:
    """The default batch of a T4 and the memory it takes, on a larger card, without compiling."""
    if load.small:
        return {"batch": 4, "peak GB": float("nan")}
    whole = torch.cuda.mem_get_info(load.device)[0] + torch.cuda.memory_allocated(load.device)
    found = cost.trial(load.model, load.steps, len(load.seeds), beside=max(0, whole - T4))
    load.model.together = found.together
    batch = cost.equal_batches(found.batch, len(load.seeds))
    total = torch.cuda.get_device_properties(load.device).total_memory
    torch.cuda.reset_peak_memory_stats(load.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, T4 / total))
    load.compile = False
    load.recorded(batch, prompts=max(1, 2 * batch // len(load.seeds)))
    load.compile = True
    torch.cuda.set_per_process_memory_fraction(1.0)
    found = {"batch": batch, "together": found.together}
    return found | {"peak GB": torch.cuda.max_memory_reserved(load.device) / 1e9}


def gpu(rounds: int) -> dict:
    """Ours and diffusers' own pipeline on a card: SD v1.4's architecture, random weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = OnCard(device, small=device.type == "cpu")
    warnings.filterwarnings("error", ".*(float32|not compile).*")  # another way than is measured
    found: dict = {"on a card": not load.small, "images": len(load.pairs) * len(load.seeds)}
    found["as on a T4"] = small_card(load)
    batch, _ = cost.decide(
        load.model, "reverse", 4 if load.small else None, False, 10**6, len(load.seeds), load.steps
    )
    found |= {"batch": batch, "compile s": load.compiled(batch)}
    others = []
    for size in sorted({max(1, batch // 2), batch}):
        with contextlib.suppress(torch.OutOfMemoryError):  # it decodes a whole batch at once
            load.plain(size, 2)  # what is done once is not timed
            others.append(size)
    count = found["images"]
    ways = {f"diffusers, {n} at once": lambda n=n: n / load.plain(n) for n in others}
    ways["ours"] = lambda: count / load.recorded(batch)
    ways["ours, without pictures"] = lambda: count / load.recorded(batch, False)
    rates: dict = {way: [] for way in ways}
    shares = []
    for n in range(min(2, rounds)):
        for way in list(ways) if n % 2 == 0 else reversed(ways):
            rates[way].append(ways[way]())
        alone, whole = load.sampled(batch)
        shares.append(whole / alone)
    shutil.rmtree(load.folder)
    found["machine"] = machine()  # the rest of the table may be another's
    found["images a second"] = {name: statistics.median(values) for name, values in rates.items()}
    return found | summary(load, found["images a second"], statistics.median(shares))


def summary(load: OnCard, rate: dict, recording: float) -> dict:
    """The ratios that have a goal."""
    best = max(value for name, value in rate.items() if name.startswith("diffusers"))
    name = torch.cuda.get_device_name() if not load.small else ""
    card = cost.gpu_of(name)
    unet = load.model.unet
    with torch.device("meta"):
        empty = type(unet).from_config(unet.config)
        x = torch.empty(1, *load.model.latent_shape)
        flops = cost.count_flops(empty, x, torch.empty(1, 77, unet.config.cross_attention_dim))
    done = 2 * load.steps * flops * rate["ours, without pictures"]
    return {
        "ratio": rate["ours"] / best, "operations a second": done,
        "share of the peak": done / card.peak if card else float("nan"),
        "recording": recording, "decoding": rate["ours, without pictures"] / rate["ours"],
    }  # fmt: skip


def measured(function: str, *arguments):
    """`function(*arguments)` of this module in a process of its own."""
    code = f"from {__spec__.name} import *; print(json.dumps({function}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return json.loads(done.stdout.splitlines()[-1])


SECTIONS = {f.__name__: f for f in (recording, everything, workers, scaling, network, analysis)}
GOALS = {  # of the design: path in the results, sign, limit
    "recorded / plain, DDIM": (("recording", "ddim", "ratio"), "≤", 1.05),
    "recorded / plain, DDPM": (("recording", "ddpm", "ratio"), "≤", 1.05),
    "recorded / everything, whole": (("everything", "whole", "ratio"), "≤", 1.0),
    **{
        f"everything / recorded, analysis, {state}": (
            ("everything", "analysis at SD size", state, "ratio"),
            "≥",
            20,
        )
        for state in ("warm", "cold")
    },
    "recorded / everything, peak memory": (("everything", "peak ratio"), "≤", 0.5),
    "everything / recorded, bytes at 16,384": (("everything", "bytes ratio at 16,384"), "≥", 300),
    "one worker / two": (("workers", "speed-up"), "≥", 1.8),
    "grid, DDIM: all correlations, s": (("analysis", "ddim", "seconds"), "≤", 10),
    "grid, DDIM: peak memory, MB": (("analysis", "ddim", "peak MB"), "≤", 2000),
    "grid, DDIM: bytes a state": (("analysis", "ddim", "bytes a state"), "≤", 400),
    "grid, DDPM: bytes a state": (("analysis", "ddpm", "bytes a state"), "≤", 400),
}


GPU_GOALS = {
    "ours / diffusers, images a second": (("gpu", "ratio"), "≥", 1.35),
    "share of the dense peak": (("gpu", "share of the peak"), "≥", 0.38),
    "recording / sampling alone": (("gpu", "recording"), "≤", 1.02),
    "with pictures / without": (("gpu", "decoding"), "≤", 1.05),
    "a T4's batch: peak memory, GB": (("gpu", "as on a T4", "peak GB"), "≤", T4 / 1e9),
}


def goals(results: dict, wanted: dict = GOALS) -> pd.DataFrame:
    """Each goal of the design with what was measured: a median, whose seconds, over which range."""
    rows = []
    for name, (path, sign, limit) in wanted.items():
        *folder, key = path
        part = results
        for step in folder:
            part = part.get(step, {})
        if key not in part:
            continue
        value, seconds = part[key], part.get("seconds")
        seconds = seconds.values() if isinstance(seconds, dict) else ()
        rows.append({
            "quantity": name, "measured": value, "goal": f"{sign} {limit:g}",
            "met": "yes" if (value <= limit if sign == "≤" else value >= limit) else "NO",
            "medians, s": " / ".join(f"{s:.3g}" for s in seconds),
            "rounds": " to ".join(f"{r:.3g}" for r in part.get("range", ())),
        })  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=(*SECTIONS, "gpu"), default=[*SECTIONS, "gpu"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    others = [name for name in options.only if name != "gpu"]
    if others and results.get("machine") != machine():  # never two machines in one table
        results = {"gpu": results["gpu"]} if "gpu" in results else {}
    if others or not results:
        results["machine"], results["model"] = machine(), options.model
    print(", ".join(f"{k}: {v}" for k, v in machine().items()))
    for name in options.only:
        if name == "gpu" and not torch.cuda.is_available() and options.only != ["gpu"]:
            print("\ngpu: not run, torch finds no GPU here")
            continue
        start = time.perf_counter()
        section = SECTIONS.get(name)
        found = section(options.model, options.rounds) if section else gpu(options.rounds)
        results[name] = found | {"threads": torch.get_num_threads()}
        results[name]["took s"] = time.perf_counter() - start
        if name != "gpu" or found["on a card"]:
            write(results, options.out)
        print(f"\n{name}: {(section or gpu).__doc__}")
        print(json.dumps(results[name], indent=1))
    print("\n" + goals(results).to_string(index=False, float_format="{:.3f}".format))
    if "gpu" in results:
        if not results["gpu"]["on a card"]:
            print(
                "\na rehearsal on a CPU with a small network: it was not written and does not count"
            )
        print("\n" + goals(results, GPU_GOALS).to_string(index=False, float_format="{:.3f}".format))


def write(results: dict, target: Path) -> None:
    """The results into their file, as a whole or not at all."""
    with whole(target) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")
