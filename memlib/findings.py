r"""The paper's quantities, as functions of a trace.

Shapes: every result has the dims of the trace's `gram` without `vec`: (prompt, seed, step) for a
reverse trace, (prompt, draw, step) for a forward trace, unless its docstring says otherwise.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from memlib import schedule
from memlib.errors import nearest
from memlib.gram import Combination, Number, add, eps_cfg, inner, least_squares, own_scale

REFERENCES = ("schedule", "oracle")
BRANCHES = {"cond": "eps_cond", "uncond": "eps_uncond"}


def x0_hat(trace: xr.Dataset, guidance_scale: Number | None = None) -> Combination:
    r"""Estimated latents, $(x_t-\sqrt{1-\bar\alpha_t}\,\tilde\epsilon)/\sqrt{\bar\alpha_t}$.

    Of a flow model $x_t-\sigma_t\tilde v$, with its velocity.

    Parameters
    ----------
    guidance_scale : any scale, 1 = the conditional and 0 = the unconditional prediction. By
        default the scale the trace was sampled at. The inputs $x_t$ are those of the trace.

    Returns
    -------
    A linear combination of recorded vectors: `norm`, `inner`, `cosine` and `overestimation`
    work on it. Song et al. 2021, Eq. 9.
    """
    if guidance_scale is None:
        guidance_scale = own_scale(trace)
    said = eps_cfg(guidance_scale)
    if (sigma := trace.coords.get("sigma")) is not None:
        return {"x_t": 1.0, **{n.replace("eps", "v"): -sigma * c for n, c in said.items()}}
    scale = 1 / np.sqrt(trace.alpha_bar)
    noise = {name: -np.sqrt(1 - trace.alpha_bar) * scale * c for name, c in said.items()}
    return {"x_t": scale, **noise}


def overestimation(trace: xr.Dataset, guidance_scale: Number | None = None) -> xr.DataArray:
    r"""$k_t=\langle\tilde x_0,x\rangle/\|x\|^2$: how many times the estimate contains the image.

    1 is a perfect estimate; above 1 the training image is overestimated (Kim et al. 2025).
    """
    return inner(trace, x0_hat(trace, guidance_scale), "x_0") / inner(trace, "x_0", "x_0")


def noise_loss(trace: xr.Dataset, branch: str = "cond") -> xr.DataArray:
    r"""$\|\epsilon-\epsilon_\theta\|^2/d$ on a forward trace: the unweighted loss of one branch.

    Mean over the d latent numbers, as in training; 1 is what predicting 0 costs.
    `branch`: ``cond`` or ``uncond``. The guided prediction has no training loss; for its error
    multiply `image_error` by the signal-to-noise ratio.
    """
    if trace.attrs["direction"] != "forward":
        raise ValueError(
            "the training loss needs a forward trace: a sampled state has no true noise"
        )
    if branch not in BRANCHES:
        raise ValueError(f"unknown branch {branch!r}{nearest(branch, BRANCHES)}")
    error = {"x_T": 1.0, BRANCHES[branch]: -1.0}
    return inner(trace, error, error) / trace.attrs["latent_size"]


def image_error(trace: xr.Dataset, guidance_scale: Number | None = None) -> xr.DataArray:
    r"""$\|\hat x_0-x\|^2/d$: squared distance of the estimate from the image, per number."""
    error = add(x0_hat(trace, guidance_scale), {"x_0": 1.0}, -1.0)
    return inner(trace, error, error) / trace.attrs["latent_size"]


def weights(trace: xr.Dataset, basis: str = "x_0") -> xr.Dataset:
    r"""The decomposition $x_t\approx w_0 x+w_T x_T$ (Kim et al. 2025), by least squares.

    Parameters
    ----------
    basis : ``x_0``, the training image, or ``x_gen``, the seed's own result, for prompts
        whose training image is not known.

    Returns
    -------
    Dataset with `w_0`, `w_T` and `residual` (norm of what is left over norm of $x_t$). DDPM adds
    fresh noise at every update; its accumulated vector is the third component, `w_noise`.
    """
    if basis not in ("x_0", "x_gen"):
        raise ValueError(f"unknown basis {basis!r}{nearest(basis, ('x_0', 'x_gen'))}")
    names = {basis: "w_0", "x_T": "w_T"}
    if trace.attrs["sampler"] == "ddpm":
        names["noise"] = "w_noise"
    fit, residual = least_squares(trace, "x_t", list(names))
    parts = {name: fit.sel(vec=vec, drop=True) for vec, name in names.items()}
    return xr.Dataset({**parts, "residual": residual}, attrs={"basis": basis})


def reference_weights(trace: xr.Dataset, reference: str = "schedule") -> xr.Dataset:
    """What the weights would be, over `step`: `w_0` and `w_T`, and for the DDPM oracle `w_noise`.

    ``schedule``: the paper's square roots of alpha_bar. ``oracle``: a sampler whose every
    prediction is perfect, which is not the same (see `memlib.schedule.oracle_weights`).
    """
    if reference not in REFERENCES:
        raise ValueError(f"unknown reference {reference!r}{nearest(reference, REFERENCES)}")
    if reference == "oracle":
        _whole(trace)
    alpha_bar, sigma = trace.alpha_bar.values, trace.get("sigma")
    sigma = None if sigma is None else sigma.values
    table = (
        schedule.schedule_weights(alpha_bar, sigma)
        if reference == "schedule"
        else schedule.oracle_weights(alpha_bar, trace.attrs["sampler"], sigma)
    )
    coords = {name: trace[name] for name in ("step", "timestep", "alpha_bar")}
    return xr.Dataset({k: ("step", v) for k, v in table.items()}, coords, {"reference": reference})


def _whole(trace: xr.Dataset) -> None:
    if int(trace.step[0]) != 0:
        raise ValueError("the trace's first state is missing: cut steps off at the end only")


def deviations(
    trace: xr.Dataset,
    reference: str = "schedule",
    basis: str = "x_0",
    first: int | None = None,
) -> pd.DataFrame:
    r"""D1, D2 and the severity of each prompt (Kim et al. 2025).

    $D_1=\sum_t(\mathbb E[w_0]-w_0^{ref})$ and $D_2=-\sum_t(\mathbb E[w_T]-w_T^{ref})$, mean over
    seeds, sum over the states after each update (the `first` so many of them, if given).

    Returns
    -------
    One row a prompt: prompt_id, caption, kind, multiplicity and group where known, D1, D2,
    severity (mean over seeds).
    """
    if trace.attrs["direction"] != "reverse":
        raise ValueError("deviations belong to sampled states: give a reverse trace")
    _whole(trace)
    if first is not None and not 1 <= first < trace.sizes["step"]:
        raise ValueError(f"first={first} must lie in 1 ... {trace.sizes['step'] - 1}")
    after = slice(1, None if first is None else 1 + first)
    found = weights(trace, basis).mean("seed").isel(step=after)
    expected = reference_weights(trace, reference).isel(step=after)
    table = pd.DataFrame({"prompt_id": trace.prompt.values})
    for name in ("caption", "kind", "multiplicity", "group"):
        if name in trace.coords:
            table[name] = trace[name].values
    table["D1"] = (found.w_0 - expected.w_0).sum("step", skipna=False).values
    table["D2"] = -(found.w_T - expected.w_T).sum("step", skipna=False).values
    if "severity" in trace:
        table["severity"] = trace.severity.mean("seed").values
    return table


def mean_seed_distance(trace: xr.Dataset) -> xr.DataArray:
    """Mean distance between the seeds of a prompt, over (prompt, step): small = converged.

    Over the pairs of seeds that were recorded together; NaN where there is none.
    """
    if trace.sizes["seed"] < 2:
        raise ValueError("the mean_seed_distance of seeds needs at least 2 seeds")
    distance = trace.seed_distance
    if not np.array_equal(trace.seed, trace.seed_):  # a part of the seeds, say
        distance = distance.sel(seed_=trace.seed.values)
    values = distance.transpose("prompt", "step", "seed", "seed_").values
    known = np.isfinite(values)
    count = known.sum((-2, -1)) - np.trace(known, axis1=-2, axis2=-1)  # not to itself
    total = values.sum((-2, -1), where=known)
    mean = np.divide(total, count, where=count > 0, out=np.full(total.shape, np.nan))
    return distance.isel(seed=0, seed_=0, drop=True).copy(data=mean)
