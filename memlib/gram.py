r"""Linear algebra on vectors of which only the inner products were kept.

A trace holds, for each prompt, seed and state, the Gram matrix of the vectors in `VECTORS`.
Any linear combination of them has a norm, an angle to any other, and a least-squares fit, all
computed from that small matrix. A combination is a dict from vector name to coefficient; a
coefficient is a number or a DataArray (over `step`, say). A plain name stands for itself.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from memlib.errors import nearest

VECTORS = ("x_t", "eps_uncond", "eps_cond", "x_0", "x_T", "x_gen", "noise")

Number = float | int | xr.DataArray
Combination = dict[str, Number]


def combination(trace: xr.Dataset, vector: str | Combination) -> Combination:
    """A vector by name or as a combination of recorded ones.

    Besides the recorded names there are ``eps_delta`` (conditional minus unconditional prediction)
    and ``eps_cfg`` (the guided prediction at the trace's own guidance scale).
    """
    if isinstance(vector, dict):
        total: Combination = {}
        for name, factor in vector.items():
            total = add(total, combination(trace, name), factor)
        return total
    if vector == "eps_delta":
        return {"eps_cond": 1.0, "eps_uncond": -1.0}
    if vector == "eps_cfg":
        return eps_cfg(own_scale(trace))
    if vector not in VECTORS:
        raise KeyError(
            f"unknown vector {vector!r}{nearest(vector, (*VECTORS, 'eps_delta', 'eps_cfg'))}"
        )
    return {vector: 1.0}


def own_scale(trace: xr.Dataset) -> xr.DataArray:
    """The guidance scale of every update of a reverse trace, over `step`."""
    if "guidance_scale" not in trace:
        raise ValueError("a forward trace was not sampled with any guidance scale: give one")
    return trace.guidance_scale


def eps_cfg(guidance_scale: Number) -> Combination:
    r"""$\tilde\epsilon=\epsilon_\varnothing+g(\epsilon_c-\epsilon_\varnothing)$."""
    return {"eps_uncond": 1 - guidance_scale, "eps_cond": guidance_scale}


def add(first: Combination, second: Combination, factor: Number = 1.0) -> Combination:
    """`first + factor * second`."""
    total = dict(first)
    for name, value in second.items():
        total[name] = total.get(name, 0.0) + factor * value
    return total


def inner(trace: xr.Dataset, u: str | Combination, v: str | Combination) -> xr.DataArray:
    """Inner product of two vectors, over (prompt, seed or draw, step)."""
    u, v = combination(trace, u), combination(trace, v)
    terms = (
        a * b * trace.gram.sel(vec=i, vec_=j, drop=True) for i, a in u.items() for j, b in v.items()
    )
    dims = [dim for dim in trace.gram.dims if dim not in ("vec", "vec_")]
    return sum(terms).transpose(*dims)


def norm(trace: xr.Dataset, u: str | Combination) -> xr.DataArray:
    """Euclidean norm; where rounding leaves a tiny negative square it is 0."""
    return np.sqrt(inner(trace, u, u).clip(min=0))


def cosine(trace: xr.Dataset, u: str | Combination, v: str | Combination) -> xr.DataArray:
    """Cosine of the angle between two vectors; NaN where one of them is 0 or was not recorded."""
    size = norm(trace, u) * norm(trace, v)
    return inner(trace, u, v) / size.where(size > 0)


def least_squares(
    trace: xr.Dataset, target: str | Combination, basis: list[str]
) -> tuple[xr.DataArray, xr.DataArray]:
    """Coefficients of `basis` nearest to `target`, and the residual's norm over the target's.

    A basis vector that is 0 (fresh noise before the first update) gets coefficient 0. Where a
    vector was not recorded the result is NaN.
    """
    normal = trace.gram.sel(vec=basis, vec_=basis).values
    right = xr.concat([inner(trace, b, target) for b in basis], "vec").transpose(..., "vec").values
    square = inner(trace, target, target)
    known = np.isfinite(normal).all((-2, -1)) & np.isfinite(right).all(-1)
    normal = np.where(known[..., None, None], normal, 0.0)
    # Unit vectors first: the fit is then well conditioned whatever the sizes.
    size = np.sqrt(np.einsum("...ii->...i", normal))
    size = np.where(size > 0, size, 1.0)
    inverse = np.linalg.pinv(
        normal / size[..., :, None] / size[..., None, :], rcond=1e-12, hermitian=True
    )
    fit = np.einsum("...ij,...j->...i", inverse, np.nan_to_num(right) / size) / size
    fit = np.where(known[..., None], fit, np.nan)
    coefficients = xr.DataArray(
        fit, dims=(*square.dims, "vec"), coords={**square.coords, "vec": basis}
    )
    explained = np.einsum("...i,...ij,...j->...", fit, normal, fit)
    missing = square - 2 * (coefficients.values * right).sum(-1) + explained
    return coefficients, np.sqrt((missing / square).clip(min=0))
