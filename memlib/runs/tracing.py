"""Traces of many prompts: batches on a device, pictures decoded and scored beside them."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm import tqdm

from memlib.errors import renamed
from memlib.gram import VECTORS
from memlib.measures import descriptor
from memlib.prompts import image_files
from memlib.runs import cost
from memlib.sampler import not_finite, sample
from memlib.schedule import Guidance, guidance_values, make_scheduler
from memlib.trace import (
    attributes,
    contract,
    coords,
    empty_trace,
    gram_matrix,
    score,
    seed_distances,
)


def in_float32_where_needed(model, function: Callable, again: Callable | None = None):
    """`function()`; where half precision gives no finite numbers, `again()` in float32.

    Returns what they return, and whether float32 was needed.
    """
    try:
        return function(), False
    except FloatingPointError as error:
        if model.precision not in ("float16", "bfloat16"):
            raise
        text = f"{error}; this batch is done in float32"
    # Not in `except`: the error would keep all tensors of the first try in memory.
    warnings.warn(text, stacklevel=2)
    with model.full_precision():
        return (again or function)(), True


def _targets(model, pairs: pd.DataFrame) -> torch.Tensor:
    """x_0 of every pair, [prompt, channel, height, width]; NaN where there is no image."""
    x_0 = torch.full((len(pairs), *model.latent_shape), torch.nan, dtype=model.dtype)
    for n, file in enumerate(image_files(pairs)):
        if file:
            x_0[n] = model.encode_images([file])[0].cpu()
    return x_0


def _batches(work: list, batch_size: int, function: Callable, equal: bool = False, model=None):
    """Call `function` on one slice of `work` after the other; yield the slice and its result.

    Where the device runs out of memory the slice is halved; nothing that was done is done again,
    and `model` keeps in mind what fits.
    `equal` fills up the last slice with its last entry, for compiled code; that is not yielded.
    """
    done = 0
    while done < len(work):
        part, result = work[done : done + batch_size], None
        filled = part + part[-1:] * (batch_size - len(part)) if equal else part
        with contextlib.suppress(torch.OutOfMemoryError):
            result = function(filled)
        if result is None:
            if len(filled) == 1:
                raise MemoryError("a single image does not fit into the device's memory")
            torch.cuda.empty_cache()
            batch_size = len(filled) // 2
            if model is not None:
                model.fits = batch_size
            continue
        yield part, result
        done += len(part)


@renamed(severity="similarity")
def reverse_trace(
    model,
    pairs: pd.DataFrame,
    seeds: Iterable[int] = range(10),
    guidance_scale: Guidance = 7.5,
    sampler: str = "ddim",
    steps: int = 50,
    similarity: str | None = "sscd",
    images: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
    compile: bool | None = None,
) -> xr.Dataset:
    """Sample every prompt with every seed and record the Gram matrix of each state.

    Parameters
    ----------
    model, pairs : from `memlib.load` and `memlib.load_pairs`.
    seeds : each seed fixes the initial noise and the sampler's noise of every prompt, whatever
        the batch size.
    guidance_scale : as in diffusers, 1 = none; a number, one per step, or a function of the step.
        Unlike there, values below 1 are used as they are (0 = the unconditional branch).
    sampler : ``ddim`` or ``ddpm``; steps : number of updates.
    similarity : one of `memlib.measures.MEASURES`, or None.
    images : keep the pictures (uint8).
    batch_size : images sampled at once; halved when the device runs out of memory. By default 20
        on a CPU, and on a GPU what a few calls say that it holds (`memlib.runs.cost.trial`).
    compile : compile the U-Net. By default on a GPU where that saves more time than it takes.

    Returns
    -------
    Dataset: `gram` (prompt, seed, step, vec, vec_), `seed_distance` (prompt, step, seed, seed_),
    `severity` and `float32_fallback` (prompt, seed), `image` (prompt, seed, y, x, rgb); `step`
    counts states 0 ... steps. `tokens_cut` (prompt, seed): tokens of a caption that is too long to
    be read whole. Where compiling was possible `compiled` (prompt, seed) says what was.

    Raises
    ------
    ValueError
        Unknown sampler or measure, impossible steps, repeated seeds.
    FloatingPointError
        Predictions that are not finite in float32. A batch that is not finite in half precision
        is sampled again in float32, with a warning; variable `float32_fallback` marks its images.
    MemoryError
        One image alone does not fit into the device's memory.
    """
    tell_of_long_captions(getattr(model, "uncached", model), pairs)
    return sample_trace(
        model, pairs, seeds, guidance_scale, sampler, steps, similarity, images, batch_size,
        progress, compile,
    ).finish()  # fmt: skip


def tell_of_long_captions(model, pairs: pd.DataFrame) -> None:
    """One warning for all captions that the text encoder does not read to their end."""
    cut = model.tokens_cut(list(pairs.caption)) if hasattr(model, "tokens_cut") else np.zeros(0)
    if not cut.any():
        return
    long = pairs[cut > 0]
    read = pd.Series(model.read(list(long.caption)), long.prompt_id)
    alike = list(read.index[read.duplicated(keep=False)])
    text = f"{len(long)} of {len(pairs)} captions are longer than {model.source} reads"
    text += f" and are cut ({', '.join(map(str, long.prompt_id[:3]))}{', …' * (len(long) > 3)})"
    if alike:
        text += f"; {len(alike)} of them are alike as far as it reads ({', '.join(alike[:3])}"
        text += f"{', …' * (len(alike) > 3)}): they are one prompt, not several"
    warnings.warn(text, stacklevel=3)


@dataclass
class Sampled:
    """A reverse trace whose pictures are not decoded and scored yet: its `finish` does it.

    That needs nothing but the decoder, and the last states wait on the CPU: another thread may
    do it while the device samples the next.
    """

    model: object
    pairs: pd.DataFrame
    similarity: str | None
    images: bool
    decoding: bool
    trace: xr.Dataset
    last: torch.Tensor  # [prompt, seed, channel, height, width]
    batches: list[list[tuple[int, int]]] = field(default_factory=list)  # prompt and seed numbers

    def keep(self, batch: list, gram: np.ndarray, last: torch.Tensor, again: bool) -> None:
        """Put the results of a batch into their places."""
        self.batches.append(batch)
        compiled = self.model.compiled and not again if "compiled" in self.trace else None
        last = last.cpu()
        for n, (p, s) in enumerate(batch):
            self.trace.gram.values[p, s], self.trace.float32_fallback.values[p, s] = gram[n], again
            if compiled is not None:
                self.trace.compiled.values[p, s] = compiled
            if self.decoding:
                self.last[p, s] = last[n]

    def finish(self) -> xr.Dataset:
        """The whole trace: pictures, batch by batch as they were sampled, and scores."""
        trace = self.trace
        if self.decoding:
            side = self.model.image_size
            pictures = np.empty((*self.last.shape[:2], side, side, 3), np.uint8)
            for batch in self.batches:
                together = self.model.together if _half_decoder(self.model) else len(batch)
                with beside(self.model.device):
                    for part, decoded in _batches(batch, together, self._decode):
                        pictures[tuple(zip(*part, strict=True))] = decoded
            trace = trace.assign(image=(("prompt", "seed", "y", "x", "rgb"), pictures))
        if self.similarity is not None:
            with beside(self.model.device):
                trace = score(trace, self.pairs, self.similarity, self.model.device)
        return trace if self.images else trace.drop_vars("image", errors="ignore")

    def _decode(self, part: list) -> np.ndarray:
        return self.model.decode(torch.stack([self.last[p, s] for p, s in part]))


def _half_decoder(model) -> bool:
    return getattr(model, "decoder", "float32") != "float32"


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(device: torch.device):
    """On a GPU work of this context does not wait for that of other threads, nor they for it."""
    if device.type != "cuda":
        yield
        return
    # A stream alone would leave the thread on device 0, and begin a context there.
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        yield


def sample_trace(
    model, pairs, seeds, guidance_scale, sampler, steps, similarity, images, batch_size, progress,
    compile,
) -> Sampled:  # fmt: skip
    """`reverse_trace`, as far as the device has to sample."""
    model = getattr(model, "uncached", model)  # a trace is kept as a whole, not call by call
    seeds = [int(s) for s in seeds]
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError("seeds must be distinct and at least one")
    if similarity is not None:
        descriptor(similarity)  # an unknown name fails now, not after the sampling
    pairs = pairs.reset_index(drop=True)
    scheduler = make_scheduler(model.scheduler_config, sampler, steps, model.dtype)
    guidance = guidance_values(guidance_scale, steps)
    decoding = bool((images or similarity) and model.image_size)
    trace = empty_trace(model, pairs, seeds, scheduler, guidance, sampler)
    if compile is not None or model.device.type == "cuda":
        trace["compiled"] = trace.float32_fallback.copy(deep=True)
    last = torch.empty((len(pairs), len(seeds), *model.latent_shape) if decoding else 0)
    found = Sampled(model, pairs, similarity, images, decoding, trace, last.to(model.dtype))
    count = len(pairs) * len(seeds)
    size, compile = cost.decide(
        model, "reverse", batch_size, compile, count, len(seeds), steps, decoding
    )
    # A size that was given is kept though there are fewer images: others may have compiled for it.
    size = size if batch_size else max(1, min(size, count))
    size = min(size, getattr(model, "fits", None) or size)
    with model.compiling() if compile else contextlib.nullcontext():
        _sample_all(found, seeds, scheduler, guidance, size, compile, progress)
    return found


def _sample_all(found: Sampled, seeds, scheduler, guidance, batch_size, equal, progress) -> None:
    model, pairs = found.model, found.pairs
    x_0 = _targets(model, pairs)
    work = [(p, s) for p in range(len(pairs)) for s in range(len(seeds))]
    waiting: list[torch.Tensor] = []  # states of the prompt whose seeds are not all done yet

    def record(batch):
        def run(part=batch):
            captions = [pairs.caption[p] for p, _ in part]
            return sample(model, captions, [seeds[s] for _, s in part], scheduler, guidance)

        def halves():  # float32 needs twice the memory
            done = [kept for _, kept in _batches(batch, -(-len(batch) // 2), run)]
            return {name: torch.cat([kept[name] for kept in done], 1) for name in done[0]}

        kept, again = in_float32_where_needed(
            model, run, halves if model.device.type == "cuda" else None
        )
        return contract(kept, x_0[[p for p, _ in batch]]), kept["x_t"], again

    with progress_bar(len(work), f"sample {found.trace.sampler}", progress) as bar:
        for batch, (gram, x_t, again) in _batches(work, batch_size, record, equal, model):
            found.keep(batch, gram, x_t[-1], again)
            for n, (p, s) in enumerate(batch):
                # On a GPU a copy: a part of the batch's tensor would keep all of it.
                waiting.append(x_t[:, n].clone() if x_t.is_cuda else x_t[:, n])
                if s == len(seeds) - 1:
                    found.trace.seed_distance.values[p] = seed_distances(waiting)
                    waiting.clear()
            bar.update(len(batch))
            del gram, x_t  # not beside those of the next batch


@torch.no_grad()
def forward_trace(
    model,
    pairs: pd.DataFrame,
    timesteps: Sequence[int],
    draws: int = 16,
    batch_size: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    r"""Noise every training image to every timestep and record what the model predicts.

    $x_t=\sqrt{\bar\alpha_t}x+\sqrt{1-\bar\alpha_t}\epsilon$ (Ho et al. 2020, Eq. 4), formed in
    float64. Draw d of every prompt and timestep uses the same noise: comparisons are paired.

    Parameters
    ----------
    timesteps : training timesteps, 0 ... 999; the dim `step` has one entry for each.
    draws : noises for each image and timestep.
    batch_size : noisy images at once; by default 64 on a CPU, and what fits on a GPU.

    Returns
    -------
    Dataset with `gram` (prompt, draw, step, vec, vec_): `x_T` is the true noise, `noise` is zero,
    `x_gen` does not exist (NaN).
    """
    model = getattr(model, "uncached", model)
    pairs = pairs.reset_index(drop=True)
    missing = [i for i, f in zip(pairs.prompt_id, image_files(pairs), strict=True) if not f]
    if missing:
        raise ValueError(f"a forward trace noises training images, and {missing[0]} has none")
    scheduler = make_scheduler(model.scheduler_config, "ddim", 1, model.dtype)
    table = scheduler.alphas_cumprod.double()
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1")
    levels = torch.as_tensor(list(timesteps))
    if levels.is_floating_point():
        raise ValueError("timesteps must be whole numbers")
    if len(levels) == 0 or levels.min() < 0 or levels.max() >= len(table):
        raise ValueError(f"timesteps must lie in 0 ... {len(table) - 1}")
    x_0 = _targets(model, pairs).double()
    generators = [torch.Generator().manual_seed(d) for d in range(draws)]
    noise = torch.stack(
        [torch.randn(model.latent_shape, generator=g, dtype=torch.float64) for g in generators]
    )
    grams = np.full((len(pairs), draws, len(levels), len(VECTORS), len(VECTORS)), np.nan)
    rows = [(d, i) for d in range(draws) for i in range(len(levels))]
    batch_size, _ = cost.decide(
        model, "forward", batch_size, False, len(pairs) * len(rows), 1, 0, decoding=False
    )
    with progress_bar(len(pairs) * len(rows), "forward", progress) as bar:
        for p, caption in enumerate(pairs.caption):
            cond, uncond = model.encode_text([caption])

            def record(part, p=p, cond=cond, uncond=uncond):
                d, i = (torch.tensor(index) for index in zip(*part, strict=True))
                t, a = levels[i], table[levels[i]][:, None, None, None]
                x_t = a.sqrt() * x_0[p] + (1 - a).sqrt() * noise[d]  # [row, c, h, w], float64
                x = x_t.to(model.device, model.dtype)
                text = torch.cat([c.expand(len(part), *c.shape[1:]) for c in (uncond, cond)])
                t = t.to(model.device)

                def run():
                    out = model.predict(torch.cat([x, x]), torch.cat([t, t]), text)
                    if not torch.isfinite(out).all():
                        raise FloatingPointError(not_finite(model))
                    return out

                out, _ = in_float32_where_needed(model, run)
                eps_uncond, eps_cond = (
                    model.to_epsilon(o.double().cpu(), x_t, a) for o in out.chunk(2)
                )
                columns = {
                    "x_t": x_t, "eps_uncond": eps_uncond, "eps_cond": eps_cond,
                    "x_0": x_0[p].expand_as(x_t), "x_T": noise[d],
                    "x_gen": torch.full_like(x_t, torch.nan), "noise": torch.zeros_like(x_t),
                }  # fmt: skip
                vectors = torch.stack([columns[v].flatten(1) for v in VECTORS], 1)
                return d.numpy(), i.numpy(), gram_matrix(vectors).numpy()

            for part, (d, i, gram) in _batches(rows, batch_size, record, model=model):
                grams[p, d, i] = gram
                bar.update(len(part))
    trace = xr.Dataset(
        {"gram": (("prompt", "draw", "step", "vec", "vec_"), grams)},
        {"draw": range(draws), **coords(pairs, levels.numpy(), table[levels].numpy())},
    )
    trace.attrs = attributes(model, "forward", "none")
    return trace


def progress_bar(total: int, name: str, progress: bool) -> tqdm:
    """A progress bar on a terminal, nothing elsewhere.

    A kernel has no terminal: the book's driver lends it its own, by name.
    """
    file = os.environ.get("MEMLIB_PROGRESS") if progress else None
    if file:
        return tqdm(
            total=total, desc=name, unit="image", ncols=70, leave=False, file=open(file, "w")
        )
    return tqdm(total=total, desc=name, unit="image", disable=None if progress else True)


def trajectories(model, captions, seeds, guidance_scale: Guidance, sampler: str, steps: int):
    """`sample` by settings: the whole trajectories of a few captions, each with its seed.

    Of a Hub model they are kept on disk, as its traces are (`memlib.hub.answers`).
    """
    scheduler = make_scheduler(model.scheduler_config, sampler, steps, model.dtype)
    guidance = guidance_values(guidance_scale, steps)

    def run(model):
        return sample(model, captions, seeds, scheduler, guidance)

    if not hasattr(model, "ask"):
        return run(model)
    question = [list(captions), [int(s) for s in seeds], guidance.tolist()]
    question += [type(scheduler).__name__, scheduler.timesteps.tolist()]
    return model.ask("sample", question, {}, run)
