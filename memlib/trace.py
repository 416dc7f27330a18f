"""The trace: inner products instead of vectors, and all that is recorded beside them."""

from __future__ import annotations

import contextlib
import functools
import json
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
import xarray as xr
from einops import einsum
from jaxtyping import Float

from memlib.gram import FLOW_VECTORS, VECTORS
from memlib.measures import provenance, similarity
from memlib.models import tf32
from memlib.prompts import image_files, read_image
from memlib.schedule import flow_sigmas, state_levels

SCHEMA = "memlib-trace-2"
CPU = torch.device("cpu")


def gram_matrix(
    vectors: Float[torch.Tensor, "step vec latent"],
) -> Float[torch.Tensor, "step vec vec"]:
    """Inner products in float64: a float32 Gram gets a residual of 0.1 % wrong by 40 %."""
    v = vectors.double()
    gram = einsum(v, v, "step i latent, step j latent -> step i j")
    # Some processors round the two halves differently: the lower one counts for both.
    return gram.tril() + gram.tril(-1).mT


def contract(kept: dict, x_0: torch.Tensor) -> np.ndarray:
    """Gram matrices [image, state, vec, vec_] of a batch; `x_0` is [image, ...]."""
    states, images = kept["x_t"].shape[:2]
    x = kept["x_t"].flatten(2)
    # One image at a time, in place: float64 copies of a batch would be the most memory of all.
    names = FLOW_VECTORS if "v_cond" in kept else VECTORS
    vectors = x.new_empty((states, len(names), x.shape[-1]), dtype=torch.float64)
    column = {name: vectors[:, n] for n, name in enumerate(names)}
    grams = []
    for n in range(images):
        fixed = {"x_0": x_0[n].flatten().to(x.device), "x_T": x[0, n], "x_gen": x[-1, n]}
        for name, value in (
            fixed | {"x_t": x[:, n], "noise": kept["noise"][:, n].flatten(1)}
        ).items():
            column[name][:] = value
        for name in names[1:3]:
            column[name][:-1] = kept[name][:, n].flatten(1)
            column[name][-1] = torch.nan  # no prediction at the last state
        grams.append(gram_matrix(vectors))
    return torch.stack(grams).cpu().numpy()


def seed_distances(states: list[torch.Tensor]) -> np.ndarray:
    """Distances between the seeds of one prompt, [state, seed, seed_], from each one's states.

    On the device that the states are on; where it lacks the memory, on the CPU.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        return _distances(torch.stack(states, 1)).cpu().numpy()
    return _distances(torch.stack([x.cpu() for x in states], 1)).numpy()


def _distances(x: torch.Tensor) -> torch.Tensor:
    count = x.shape[1]
    distances = x.new_zeros((len(x), count, count), dtype=torch.float64)
    above = torch.triu_indices(count, count, 1)
    for between, state in zip(distances, x.flatten(2), strict=True):
        between[*above] = torch.pdist(state.double())
    return distances + distances.mT


def empty_trace(model, pairs, seeds, scheduler, guidance, sampler) -> xr.Dataset:
    """The trace before anything was sampled, with room for it."""
    timesteps, alpha_bar = state_levels(scheduler)
    states, seeds_ = len(alpha_bar), len(seeds)
    shape = (len(pairs), seeds_, states, len(VECTORS), len(VECTORS))
    trace = xr.Dataset(
        {
            "gram": (("prompt", "seed", "step", "vec", "vec_"), np.empty(shape)),
            "seed_distance": (
                ("prompt", "step", "seed", "seed_"), np.empty((len(pairs), states, seeds_, seeds_)),
            ),
        },
        {"seed": seeds, "seed_": seeds,
         **coords(pairs, timesteps, alpha_bar, flow_sigmas(scheduler))},
    )  # fmt: skip
    trace["guidance_scale"] = ("step", np.append(guidance, np.nan))
    # half precision could not do these
    trace["float32_fallback"] = (("prompt", "seed"), np.zeros((len(pairs), seeds_), np.uint8))
    if hasattr(model, "tokens_cut"):
        cut = model.tokens_cut(list(pairs.caption)).astype(np.uint16)
        trace["tokens_cut"] = (("prompt", "seed"), np.repeat(cut[:, None], seeds_, 1))
    setting = sorted({float(g) for g in guidance})
    trace.attrs = attributes(model, "reverse", sampler) | {
        "guidance": setting[0] if len(setting) == 1 else [float(g) for g in guidance],
    }
    return trace


def score(trace: xr.Dataset, pairs: pd.DataFrame, measure: str, device=CPU) -> xr.Dataset:
    """The trace with `severity` (prompt, seed): how near each `image` is to the training image.

    NaN where there is no picture or no training image; its attributes name measure and network.
    """
    scores = np.full((trace.sizes["prompt"], trace.sizes["seed"]), np.nan)
    side = trace.sizes["y"] if "image" in trace else 0
    for p, file in enumerate(image_files(pairs) if side else []):
        if file:
            target = read_image(file, side)
            scores[p] = similarity(trace.image.values[p], target, measure, str(device))
    note = provenance(measure, side, str(device))
    return trace.assign(severity=(("prompt", "seed"), scores, note))


def coords(pairs: pd.DataFrame, timesteps: np.ndarray, alpha_bar: np.ndarray, sigma=None) -> dict:
    names = VECTORS if sigma is None else FLOW_VECTORS
    coords = {
        "prompt": list(pairs.prompt_id),
        "step": range(len(timesteps)),
        "timestep": ("step", timesteps),
        "alpha_bar": ("step", alpha_bar),
        "vec": list(names),
        "vec_": list(names),
    }
    if sigma is not None:
        coords["sigma"] = ("step", sigma)
    for name in ("caption", "kind", "multiplicity", "group"):
        if name in pairs:
            coords[name] = ("prompt", list(pairs[name]))
    return coords


def attributes(model, direction: str, sampler: str) -> dict:
    return {
        "schema": SCHEMA,
        "direction": direction,
        "model": model.source,
        "fingerprint": model.fingerprint,
        "sampler": sampler,
        "scheduler": json.dumps(dict(model.scheduler_config), default=str),
        "dtype": model.precision,
        "decoder": getattr(model, "decoder", "float32"),
        "tf32": str(tf32(model.device)),
        "latent_size": int(np.prod(model.latent_shape)),
        "versions": _versions(),
    }


@functools.cache  # reading them takes as long as to write a prompt
def _versions() -> str:
    packages = ("memlib", "torch", "diffusers", "transformers", "numpy")
    return json.dumps({name: version(name) for name in packages})
