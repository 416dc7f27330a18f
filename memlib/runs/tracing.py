"""Traces of many prompts: batches on a device, pictures decoded and scored beside them."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence

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
from memlib.schedule import Guidance, guidance_values, is_flow, make_scheduler, signal_and_noise
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
    while part := work[done : done + batch_size]:
        filled, result = part + part[-1:] * (batch_size - len(part)) * equal, None
        with contextlib.suppress(torch.OutOfMemoryError):
            result = function(filled)
        if result is not None:
            yield part, result
            done += len(part)
        elif len(filled) == 1:
            raise MemoryError("a single image does not fit into the device's memory")
        else:
            torch.cuda.empty_cache()
            batch_size = len(filled) // 2
            if model is not None:
                model.fits = batch_size


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
    )()  # fmt: skip


def tell_of_long_captions(model, pairs: pd.DataFrame) -> None:
    """One warning for all captions that the text encoder does not read to their end."""
    cut = model.tokens_cut(list(pairs.caption)) if hasattr(model, "tokens_cut") else np.zeros(0)
    if not cut.any():
        return
    long = pairs[cut > 0]
    read = pd.Series(model.read(list(long.caption)), long.prompt_id)
    alike = read.index[read.duplicated(keep=False)]

    def some(names) -> str:
        return f"({', '.join(map(str, names[:3]))}{', …' * (len(names) > 3)})"

    text = f"{len(long)} of {len(pairs)} captions are longer than {model.source} reads"
    text += f" and are cut {some(long.prompt_id)}"
    if len(alike):
        text += f"; {len(alike)} of them are alike as far as it reads {some(alike)}"
        text += ": they are one prompt, not several"
    warnings.warn(text, stacklevel=3)


def sample_trace(
    model, pairs, seeds, guidance_scale, sampler, steps, similarity, images, batch_size, progress,
    compile,
) -> Callable[[], xr.Dataset]:  # fmt: skip
    """`reverse_trace`, as far as the device has to sample; what it returns does the rest.

    That is to decode and to score. It needs nothing but the decoder, and the last states wait on
    the CPU: another thread may do it while the device samples the next.
    """
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
    work = [(p, s) for p in range(len(pairs)) for s in range(len(seeds))]
    size, compile = cost.decide(
        model, "reverse", batch_size, compile, len(work), len(seeds), steps, decoding
    )
    # A size that was given is kept though there are fewer images: others may have compiled for it.
    size = size if batch_size else max(1, min(size, len(work)))
    size = min(size, getattr(model, "fits", None) or size)
    x_0 = _targets(model, pairs)

    def record(batch):
        def run(part=batch):
            captions = [pairs.caption[p] for p, _ in part]
            return sample(model, captions, [seeds[s] for _, s in part], scheduler, guidance)

        def halves():  # float32 needs twice the memory
            done = [kept for _, kept in _batches(batch, -(-len(batch) // 2), run)]
            return {name: torch.cat([kept[name] for kept in done], 1) for name in done[0]}

        again = halves if model.device.type == "cuda" else None
        kept, in_float32 = in_float32_where_needed(model, run, again)
        return contract(kept, x_0[[p for p, _ in batch]]), kept["x_t"], in_float32

    last = torch.empty((len(pairs), len(seeds), *model.latent_shape), dtype=model.dtype)
    batches: list[list[tuple[int, int]]] = []
    waiting: list[torch.Tensor] = []  # states of the prompt whose seeds are not all done yet
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.compiling() if compile else contextlib.nullcontext())
        bar = stack.enter_context(progress_bar(len(work), f"sample {sampler}", progress))
        for batch, (gram, x_t, in_float32) in _batches(work, size, record, compile, model):
            batches.append(batch)
            final = x_t[-1].cpu()
            for n, (p, s) in enumerate(batch):
                trace.gram.values[p, s], trace.float32_fallback.values[p, s] = gram[n], in_float32
                if decoding:
                    last[p, s] = final[n]
                if "compiled" in trace:
                    trace.compiled.values[p, s] = model.compiled and not in_float32
                # On a GPU a copy: a part of the batch's tensor would keep all of it.
                waiting.append(x_t[:, n].clone() if x_t.is_cuda else x_t[:, n])
                if s == len(seeds) - 1:
                    trace.seed_distance.values[p] = seed_distances(waiting)
                    waiting.clear()
            bar.update(len(batch))
            del gram, x_t, final  # not beside those of the next batch
    return functools.partial(
        _finish, trace, model, pairs, last, batches if decoding else None, similarity, images
    )


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


def _finish(trace, model, pairs, last, batches, similarity, images) -> xr.Dataset:
    """The whole trace: pictures, batch by batch as they were sampled, and scores."""

    def decode(part):
        return model.decode(torch.stack([last[p, s] for p, s in part]))

    splits = getattr(model, "decoder", "float32") == "float32"
    with beside(model.device):
        if batches is not None:
            pictures = np.empty((*last.shape[:2], *[model.image_size] * 2, 3), np.uint8)
            for batch in batches:
                together = len(batch) if splits else model.together
                for part, decoded in _batches(batch, together, decode):
                    pictures[tuple(zip(*part, strict=True))] = decoded
            trace = trace.assign(image=(("prompt", "seed", "y", "x", "rgb"), pictures))
        if similarity is not None:
            trace = score(trace, pairs, similarity, model.device)
    return trace if images else trace.drop_vars("image", errors="ignore")


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
    timesteps : training timesteps, 0 ... 999; the dim `step` has one entry for each. Of a flow
        model up to 1000, where there is noise alone.
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
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1")
    levels, flow = torch.as_tensor(list(timesteps)), is_flow(model.scheduler_config)
    if flow:
        sigma = levels.double() / model.scheduler_config["num_train_timesteps"]
        alpha_bar, last = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2), 1000
    else:
        table = make_scheduler(model.scheduler_config, "ddim", 1, model.dtype).alphas_cumprod
        sigma, last = None, len(table) - 1
    if levels.is_floating_point() or levels.min() < 0 or levels.max() > last:
        raise ValueError(f"timesteps must be whole numbers in 0 ... {last}")
    alpha_bar = alpha_bar if flow else table.double()[levels]
    signal, share = (v[:, None, None, None] for v in signal_and_noise(alpha_bar, sigma))
    x_0 = _targets(model, pairs).double()
    generators = [torch.Generator().manual_seed(d) for d in range(draws)]
    noise = torch.stack(
        [torch.randn(model.latent_shape, generator=g, dtype=torch.float64) for g in generators]
    )
    grams = np.empty((len(pairs), draws, len(levels), len(VECTORS), len(VECTORS)))
    total = len(pairs) * draws * len(levels)
    batch_size, _ = cost.decide(model, "forward", batch_size, False, total, 1, 0, decoding=False)

    def record(part):  # all of one prompt
        p, d, i = (torch.tensor(index) for index in zip(*part, strict=True))
        t = levels[i]
        x_t = signal[i] * x_0[p] + share[i] * noise[d]  # [row, c, h, w], float64
        cond, uncond = model.encode_text([pairs.caption[int(p[0])]])
        text = torch.cat([c.expand(len(part), *c.shape[1:]) for c in (uncond, cond)])
        x, t = x_t.to(model.device, model.dtype), t.to(model.device)

        def run():
            out = model.predict(torch.cat([x, x]), torch.cat([t, t]), text)
            if not torch.isfinite(out).all():
                raise FloatingPointError(not_finite(model))
            return out

        out, _ = in_float32_where_needed(model, run)
        said = out.double().cpu().chunk(2)
        if not flow:
            a = alpha_bar[i][:, None, None, None]
            said = [model.to_epsilon(o, x_t, a) for o in said]
        zero = torch.zeros_like(x_t)
        vectors = (x_t, *said, x_0[p], noise[d], zero * torch.nan, zero)  # in the order of VECTORS
        return gram_matrix(torch.stack([v.flatten(1) for v in vectors], 1)).numpy()

    with progress_bar(total, "forward", progress) as bar:
        for p in range(len(pairs)):
            rows = [(p, d, i) for d in range(draws) for i in range(len(levels))]
            for part, gram in _batches(rows, batch_size, record, model=model):
                grams[tuple(zip(*part, strict=True))] = gram
                bar.update(len(part))
    trace = xr.Dataset(
        {"gram": (("prompt", "draw", "step", "vec", "vec_"), grams)},
        {"draw": range(draws), **coords(pairs, levels.numpy(), alpha_bar.numpy(), sigma)},
    )
    trace.attrs = attributes(model, "forward", "none")
    return trace


def progress_bar(total: int, name: str, progress: bool) -> tqdm:
    """A progress bar on a terminal, nothing elsewhere.

    A kernel has no terminal: the book's driver lends it its own, by name.
    """
    where = {"disable": None if progress else True}
    if progress and (terminal := os.environ.get("MEMLIB_PROGRESS")):
        where = {"file": open(terminal, "w"), "ncols": 70, "leave": False}  # noqa: SIM115
    return tqdm(total=total, desc=name, unit="image", **where)


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
