"""Which prompts of a list are memorized, before any picture is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers.utils.torch_utils import randn_tensor
from scipy.stats import norm
from tqdm import tqdm

from memlib.detection.statistics import STATISTICS, Calls
from memlib.errors import nearest
from memlib.hub.files import whole
from memlib.schedule import is_flow, make_scheduler, state_levels

RATE = 0.01  # false alarms among prompts that are not memorized
COLUMNS = ("prompt_id", "caption", "score", "false_alarms", "verdict", "calls")


def first_calls(
    model, captions: Sequence[str], seeds: int = 1, branches: int = 2, steps: int = 50
) -> Calls:
    """The network's predictions in pure noise, at the first timestep of `steps` updates.

    Parameters
    ----------
    model : as of `memlib.load`.
    captions : one or more texts; every one meets the same noises, of the seeds 0, 1, ...
    branches : 2, or 1 for the conditional one alone, or 0 for neither.

    Raises
    ------
    FloatingPointError
        A prediction is not finite.
    """
    model, count = model.uncached, len(captions)
    flow = is_flow(model.scheduler_config)
    scheduler = make_scheduler(
        model.scheduler_config, "flow-euler" if flow else "ddim", steps, model.dtype
    )
    levels, timestep = None if flow else scheduler.alphas_cumprod, scheduler.timesteps[0].item()
    generators = [torch.Generator().manual_seed(n) for n in range(seeds)]
    noises = randn_tensor((seeds, *model.latent_shape), generators, model.device, model.dtype)
    x = noises.expand(count, *noises.shape)
    cond, uncond = model.encode_text(list(captions))

    def predicted(x: torch.Tensor, timestep: int | float, text: torch.Tensor) -> torch.Tensor:
        flat, t = x.flatten(0, 1), torch.tensor(timestep, device=model.device)
        with torch.no_grad():
            out = model.predict(flat, t, text.repeat_interleave(x.shape[1], 0))
            said = out if flow else model.to_epsilon(out, flat, levels[timestep].to(flat))
            found = said.reshape(x.shape)
        if not found.isfinite().all():
            raise FloatingPointError(f"a prediction of {model.source} is not finite")
        return found

    return Calls(
        x, timestep, float(state_levels(scheduler)[1][0]),
        predicted(x, timestep, uncond) if branches > 1 else None,
        predicted(x, timestep, cond) if branches else None,
        lambda x, t: (predicted(x, t, uncond), predicted(x, t, cond)),
        float(scheduler.sigmas[0]) if flow else None,
    )  # fmt: skip


def detect(
    model,
    prompts: Sequence[str] | pd.DataFrame,
    calibrate: Sequence[str] | pd.DataFrame | None = None,
    statistic: str = "detail",
    seeds: int = 1,
    rate: float = RATE,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score prompts by a statistic of the first calls, and say which ones stand out.

    Parameters
    ----------
    model : as of `memlib.load`; any pipeline that samples here.
    prompts : captions, or a table as of `memlib.load_pairs`. Images and truth are not needed.
    calibrate : captions like the others of which none is memorized, to compare with: new ones that
        nobody trained on. A score's rate of false alarms is then the share of them that score as
        much, the prompt counted in: right for any distribution, and no finer than one over their
        number. Without, the list is compared with itself: most of it must not be memorized, and the
        rate is that of a normal distribution with the list's median and spread (the median of
        distances from it), an estimate.
    statistic : a name of `statistics.STATISTICS`.
    seeds : noises for each prompt.
    rate : of false alarms that a verdict admits.
    batch_size : captions at a time.
    out : a CSV file; what it has of another run with equal settings is not asked again.

    Returns
    -------
    DataFrame, highest score first: prompt_id, caption, score, false_alarms (the expected share of
    prompts without memory that score as much), verdict (memorized, or –), calls of the network.

    Raises
    ------
    ValueError
        An unknown statistic, a rate that is none, no prompts, an empty one, too few to compare
        with, too few seeds, a file of other settings.
    """
    known = STATISTICS.get(statistic)
    if known is None:
        raise ValueError(f"unknown statistic {statistic!r}{nearest(statistic, STATISTICS)}")
    if seeds < known.seeds:
        raise ValueError(f"{statistic} compares seeds: it needs {known.seeds} or more")
    if not 0 < rate < 1:
        raise ValueError(f"a rate of false alarms lies between 0 and 1, not at {rate:g}")
    table, null = _table(prompts), None if calibrate is None else _table(calibrate)
    if null is not None and len(null) < 1 / rate - 1:
        raise ValueError(
            f"{len(null)} captions to calibrate with tell no rate under {1 / (len(null) + 1):.2g}; "
            f"give {int(np.ceil(1 / rate)) - 1} or more, or allow a higher rate"
        )
    if null is None and len(table) < 20:
        raise ValueError(
            f"{len(table)} prompts are too few to be compared with each other; give captions that "
            "are not memorized to calibrate with"
        )
    settings = f"{model.fingerprint} {model.precision} {statistic} seeds={seeds}"
    scores = _read_scores(out, settings) if out else {}
    wanted = [*table.caption, *(null.caption if null is not None else ())]
    todo = [c for c in dict.fromkeys(wanted) if c not in scores]
    for captions, values in _scored(model, todo, known, seeds, batch_size, progress):
        scores |= dict(zip(captions, values, strict=True))
        if out:
            _write(
                pd.DataFrame({"caption": scores.keys(), "score": scores.values()}), out, settings
            )
    found = table.assign(score=[scores[c] for c in table.caption], calls=known.cost * seeds)
    compared = table if null is None else null
    against = np.array([scores[c] for c in compared.caption])
    alarms = false_alarms(found.score.to_numpy(), against, own=null is None)
    found = found.assign(
        false_alarms=alarms, verdict=np.where(alarms <= rate, "memorized", "–")
    ).sort_values("score", ascending=False, kind="stable", ignore_index=True)[[*COLUMNS]]
    if out:
        _write(found, out, settings)
    return found


def false_alarms(scores: np.ndarray, null: np.ndarray, own: bool = False) -> np.ndarray:
    """The expected share of prompts without memory that score as much; see `detect`.

    `own` : `null` are the scores themselves, among which some are memorized.
    """
    if own:
        middle = np.median(null)
        spread = 1.4826 * np.median(np.abs(null - middle))  # of a normal distribution
        return norm.sf((scores - middle) / max(spread, 1e-12))
    higher = len(null) - np.searchsorted(np.sort(null), scores, side="left")
    return (1 + higher) / (1 + len(null))


def _scored(model, captions, known, seeds, batch_size, progress) -> Iterator:
    """Batches of captions with their scores."""
    with tqdm(total=len(captions), desc="prompts", disable=None if progress else True) as bar:
        for n in range(0, len(captions), batch_size):
            part = captions[n : n + batch_size]
            yield part, known.function(first_calls(model, part, seeds, known.first))
            bar.update(len(part))


def _table(prompts) -> pd.DataFrame:
    if not isinstance(prompts, pd.DataFrame):
        captions = [prompts] if isinstance(prompts, str) else list(prompts)
        prompts = pd.DataFrame({"caption": captions})
        prompts["prompt_id"] = [f"{n}" for n in range(len(captions))]
    if prompts.empty:
        raise ValueError("no prompts")
    if empty := [n for n, text in enumerate(prompts.caption, 1) if not str(text).strip()]:
        raise ValueError(f"prompt {empty[0]} is empty: it asks for nothing that could be memorized")
    return prompts[["prompt_id", "caption"]]


def _read_scores(out: str | Path, settings: str) -> dict[str, float]:
    """Scores of an earlier run; the first line of its file says of which settings."""
    out = Path(out)
    if not out.exists():
        return {}
    with out.open(encoding="utf-8") as lines:
        first = lines.readline().removeprefix("# ").strip()
    if first != settings:
        raise ValueError(f"{out} is of other settings ({first[:120]}): name another file")
    kept = pd.read_csv(out, comment=None, skiprows=1, keep_default_na=False)
    return dict(zip(kept.caption, kept.score.astype(float), strict=True))


def _write(table: pd.DataFrame, out: str | Path, settings: str) -> None:
    with whole(out) as partial:
        text = table.to_csv(index=False, lineterminator="\n")
        partial.write_text(f"# {settings}\n{text}", encoding="utf-8")
