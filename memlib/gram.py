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
FLOW_VECTORS = tuple(name.replace("eps_", "v_") for name in VECTORS)  # velocities are kept

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
    known = list(trace.vec.values)
    if vector in VECTORS and vector not in known:  # of a flow: v = eps - x_0
        return {"x_t": 1.0, vector.replace("eps", "v"): 1 - trace.sigma}
    if vector not in known:
        raise KeyError(
            f"unknown vector {vector!r}{nearest(vector, (*known, 'eps_delta', 'eps_cfg'))}"
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
    """Inner product of two vectors, over (prompt, seed or draw, step).

    Raises
    ------
    ValueError
        A coefficient is over other steps, prompts or seeds than the trace.
    """
    u, v = combination(trace, u), combination(trace, v)
    known = trace.gram.isel(vec=0, vec_=0, drop=True)
    u, v = ({name: _bare(c, known) for name, c in part.items()} for part in (u, v))
    terms = (a * b * _entry(trace, i, j) for i, a in u.items() for j, b in v.items())
    return known.copy(data=sum(terms).transpose(*known.dims).values)


def _entry(trace: xr.Dataset, i: str, j: str) -> xr.Variable:
    """One inner product without its coordinates: to align them takes longer than to add."""
    row, column = (trace[d].to_index().get_loc(n) for d, n in (("vec", i), ("vec_", j)))
    return trace.gram.variable.isel(vec=row, vec_=column)


def _bare(coefficient: Number, known: xr.DataArray) -> float | xr.Variable:
    if not isinstance(coefficient, xr.DataArray):
        return coefficient
    try:
        xr.align(known, coefficient, join="exact", copy=False)
    except ValueError as error:
        raise ValueError(
            "a coefficient is over other steps, prompts or seeds than the trace: cut the trace "
            "first, then compute the coefficient from it"
        ) from error
    return coefficient.variable


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
    gram = [[_entry(trace, i, j).values for j in basis] for i in basis]
    right = [inner(trace, b, target) for b in basis]
    square = inner(trace, target, target)
    fit, explained = _solve(gram, [r.values for r in right])
    known = np.isfinite(square.values + sum(fit))
    coefficients = xr.DataArray(
        np.stack([np.where(known, f, np.nan) for f in fit], -1),
        dims=(*square.dims, "vec"),
        coords={**square.coords, "vec": basis},
    )
    return coefficients, np.sqrt((1 - explained / square).clip(min=0))


def _solve(gram: list[list[np.ndarray]], right: list[np.ndarray]):
    """Least squares by Cholesky, all states at once; returns coefficients and what they explain.

    Unit vectors first, so that it is well conditioned whatever the sizes. A vector that is 0, or a
    combination of those before it (to 1e-12), gets coefficient 0.
    """
    size = [np.sqrt(gram[i][i]) for i in range(len(gram))]
    size = [np.where(s > 0, s, 1.0) for s in size]
    lower: list[list[np.ndarray]] = []
    z: list[np.ndarray] = []  # the target along the orthogonalised vectors
    for i, row in enumerate(gram):
        lower.append([])
        for j in range(i):
            rest = row[j] / size[i] / size[j]
            rest = rest - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i].append(rest / lower[j][j])
        pivot = row[i] / size[i] ** 2 - sum(v * v for v in lower[i])
        lower[i].append(np.where(pivot > 1e-12, np.sqrt(np.abs(pivot)), np.inf))
        rest = right[i] / size[i] - sum(lower[i][k] * z[k] for k in range(i))
        z.append(rest / lower[i][i])
    fit = list(z)
    for i in reversed(range(len(z))):
        rest = z[i] - sum(lower[k][i] * fit[k] for k in range(i + 1, len(z)))
        fit[i] = rest / lower[i][i]
    return [f / s for f, s in zip(fit, size, strict=True)], sum(v * v for v in z)
