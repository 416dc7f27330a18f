"""A pipeline that looks at its first call, and does otherwise where a prompt is memorized."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from memlib.detection.detect import RATE, false_alarms
from memlib.detection.statistics import STATISTICS, Calls
from memlib.errors import nearest
from memlib.mitigation.methods import Method, Request, Step, late_and_smoothed
from memlib.models import DiffusersModel

DEFAULT = late_and_smoothed()
LOGGED = 10_000  # images that the log remembers
TOGETHER = 16  # captions in a call that calibrates


def guard(
    pipe,
    calibrate: Sequence[str] | None = None,
    method: Method | None = DEFAULT,
    threshold: int | float | None = None,
    statistic: str = "detail",
    rate: float = RATE,
) -> Guard:
    """Make a pipeline detect memorized prompts in its first call, and mitigate those alone.

    Images that pass are made by the same calls as before and have the same bits. Images that are
    flagged get `method`; the pipeline's own guidance rescale does not apply to them. Works with
    any scheduler whose networks see states of unit variance (DDIM, PNDM, Euler, DPM++), batches,
    callbacks and `torch.compile`; embeddings that a callback replaces are ours in a flagged image.
    Not for several threads at once. Guard again when weights have changed (LoRA).

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline`; it is changed in place, until `Guard.remove`.
    calibrate : captions of which none is memorized; an image is flagged if at most `rate` of them
        score as much. They are asked once for each first timestep and size of picture, one call
        each (`memlib.detect` says more). Their words are those that `smoothed` puts in.
    method : what is done, as of `mitigation.methods`; None reports only.
    threshold : the score from which an image is flagged, instead of `calibrate`.
    statistic : of `detection.statistics.STATISTICS`, one that the first conditional call is enough
        for: it does not see a negative prompt.
    rate : of false alarms that is admitted.

    Returns
    -------
    Guard, whose `log` says what was done and whose `remove()` undoes it; a context manager, too.

    Raises
    ------
    TypeError
        Not a `StableDiffusionPipeline`.
    ValueError
        A pipeline that is guarded already, or has no unconditional branch; no way to tell what is
        flagged; too few captions for the rate; a statistic of more calls. In a run: clip_skip, or
        image prompts.
    """
    if not isinstance(pipe, StableDiffusionPipeline):
        own = " (its .pipe is one)" if hasattr(pipe, "pipe") else ""
        raise TypeError(
            f"only a StableDiffusionPipeline is guarded, not {type(pipe).__name__}{own}"
        )
    if hasattr(pipe, "_memlib_guard"):
        raise ValueError("this pipeline is guarded already: remove() that guard first")
    if pipe.unet.config.time_cond_proj_dim is not None and method and method.scale:
        raise ValueError(
            "a distilled model has no unconditional branch whose guidance could change: "
            "method=None reports only"
        )
    known = STATISTICS.get(statistic)
    if known is None:
        raise ValueError(f"unknown statistic {statistic!r}{nearest(statistic, STATISTICS)}")
    if known.cost > 1 or known.seeds > 1:
        raise ValueError(f"{statistic} needs more than an image's first conditional call")
    if not 0 < rate < 1:
        raise ValueError(f"a rate of false alarms lies between 0 and 1, not at {rate:g}")
    calibrate = list(dict.fromkeys(calibrate or ()))
    if threshold is None and len(calibrate) < 1 / rate - 1:
        raise ValueError(
            f"{len(calibrate)} captions to calibrate with tell no rate of {rate:g}: give "
            f"{int(np.ceil(1 / rate)) - 1} or more that are not memorized, or a threshold"
        )
    return Guard(pipe, method, calibrate, threshold, statistic, rate)


@dataclass
class _Run:
    """What is known of the pictures that are being made."""

    prompts: list[str] | None  # one for each image; None where embeddings were given
    flagged: torch.Tensor | None = None  # [image]
    text: torch.Tensor | None = None  # embeddings of the flagged ones, [image, token, width]
    places: list[int] = field(default_factory=list)  # of the flagged ones
    kept: dict = field(default_factory=dict)  # what a schedule keeps from step to step
    calls: int = 0  # of the U-Net for a flagged image, more than without a guard


class Guard:
    """A guarded pipeline; see `guard`."""

    def __init__(self, pipe, method, calibrate, threshold, statistic, rate):
        self.pipe, self.method, self.statistic = pipe, method, STATISTICS[statistic]
        self.calibrate, self.threshold, self.rate = calibrate, threshold, rate
        self._run, self._asking, self._nulls = None, False, {}
        self._rows = deque(maxlen=LOGGED)
        self._unet, self._class = pipe.unet, type(pipe)
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._hooks = [
            self._unet.register_forward_pre_hook(before, with_kwargs=True),
            self._unet.register_forward_hook(after, with_kwargs=True),
        ]
        # A run is a call of the pipeline, and only a class can say what a call does.
        pipe.__class__ = type(self._class.__name__, (self._class,), {"__call__": _call})
        pipe._memlib_guard = self

    @property
    def log(self) -> pd.DataFrame:
        """The latest images: score, expected false alarms, whether flagged, what was done."""
        columns = ["prompt", "score", "false_alarms", "memorized", "done", "calls"]
        return pd.DataFrame(list(self._rows), columns=columns)

    def remove(self) -> None:
        """Leave the pipeline as it was."""
        for hook in self._hooks:
            hook.remove()
        if getattr(self.pipe, "_memlib_guard", None) is self:
            del self.pipe._memlib_guard
            self.pipe.__class__ = self._class

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def __deepcopy__(self, _):
        raise TypeError("a guarded pipeline cannot be copied: remove() the guard first")

    def _begin(self, prompt=None, num_images_per_prompt=1, clip_skip=None, **options) -> _Run:
        if _eager(self.pipe.unet) is not _eager(self._unet):
            raise ValueError("the guarded U-Net was replaced: remove() the guard, and guard again")
        if clip_skip is not None:
            raise ValueError("a guard knows no clip_skip")
        if any(options.get(n) is not None for n in ("ip_adapter_image", "ip_adapter_image_embeds")):
            raise ValueError("a guard knows no image prompts")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is not None:
            prompts = [text for text in prompts for _ in range(num_images_per_prompt or 1)]
        return _Run(prompts)

    def _before(self, unet, args, kwargs):
        """Other embeddings for flagged images."""
        run = self._run
        if run is None or self._asking or run.text is None:
            return None
        return args, kwargs | {"encoder_hidden_states": self._replaced(args, kwargs)}

    def _replaced(self, args, kwargs) -> torch.Tensor:
        run, given = self._run, kwargs["encoder_hidden_states"].clone()
        text = run.text
        if self.method.vary:
            text = self.method.vary(text, float(args[1]), run.places)
        given[len(given) - len(run.flagged) :][run.flagged] = text.to(given)
        return given

    def _after(self, unet, args, kwargs, output):
        """The first call is looked at; guidance is replaced for flagged images."""
        run = self._run
        if run is None or self._asking:
            return None
        guided = self.pipe.do_classifier_free_guidance
        out = first = output[0] if isinstance(output, tuple) else output.sample
        if run.flagged is None:
            out = self._first(unet, args, kwargs, out, guided)
        if guided and run.flagged.any() and self.method and self.method.scale:
            step = self._step(args, out, guided)
            scale = torch.as_tensor(self.method.scale(step)).to(out).reshape(-1, 1, 1, 1)
            uncond, cond = out.chunk(2)
            wanted, chosen = uncond + scale * (cond - uncond), run.flagged.reshape(-1, 1, 1, 1)
            # Both branches alike: whatever scale the pipeline has makes just that of them.
            out = torch.cat([torch.where(chosen, wanted, branch) for branch in (uncond, cond)])
        if out is first:
            return None
        return (out, *output[1:]) if isinstance(output, tuple) else type(output)(sample=out)

    def _first(self, unet, args, kwargs, out, guided) -> torch.Tensor:
        """Flag images; the prediction, asked again if embeddings are to be others."""
        run, step = self._run, self._step(args, out, guided)
        score = self.statistic.function(_calls(step))
        alarms = np.full(len(score), np.nan)
        if self.threshold is None:
            alarms = false_alarms(score, self._null(unet, args, kwargs, step))
        flagged = score >= self.threshold if self.threshold is not None else alarms <= self.rate
        run.flagged = torch.from_numpy(flagged).to(out.device)
        done = []
        if flagged.any() and self.method:
            method = self.method
            if (method.embed or method.vary) and (run.prompts or not method.embed):
                run.text = kwargs["encoder_hidden_states"][-len(flagged) :][run.flagged]
                run.places = np.flatnonzero(flagged).tolist()
                if method.embed:
                    run.text = method.embed(self._request(unet, args, kwargs, step))
                with self._own_call():
                    again = kwargs | {"encoder_hidden_states": self._replaced(args, kwargs)}
                    out = unet(*args, **again | {"return_dict": False})[0]
                run.calls += len(out) // len(flagged)
                done.append("embedding")
            elif method.embed:
                warnings.warn("a caption given as embeddings is not replaced", stacklevel=2)
            if method.scale and guided:
                done.append("guidance")
            elif method.scale:
                warnings.warn("without guidance there is no scale to change", stacklevel=2)
        for i, one in enumerate(flagged):
            what = (" and ".join(done) or "–", run.calls) if one else ("–", 0)
            self._rows.append(
                (run.prompts[i] if run.prompts else "", score[i], alarms[i], one, *what)
            )
        return out

    def _step(self, args, out, guided) -> Step:
        """What one call said, with predictions as epsilon."""
        x, timestep, scheduler = args[0], float(args[1]), self.pipe.scheduler
        a = float(scheduler.alphas_cumprod[round(timestep)])
        if a < 1e-6:
            raise ValueError("a schedule that begins without any signal has no first estimate")
        said = SimpleNamespace(
            prediction_type=scheduler.config.get("prediction_type", "epsilon"),
            source="the pipeline",
        )
        eps = DiffusersModel.to_epsilon(said, out, x, a)
        uncond, cond = eps.chunk(2) if guided else (None, eps)
        x = x[len(x) - len(cond) :]
        return Step(timestep, x, a, uncond, cond, self.pipe.guidance_scale, self._run.kept)

    def _null(self, unet, args, kwargs, step) -> np.ndarray:
        """Scores of the captions to calibrate with, at this timestep and size."""
        shape, more = tuple(step.x.shape[1:]), kwargs.get("cross_attention_kwargs")
        key = (step.timestep, shape, step.x.dtype, str(more))
        if key not in self._nulls:
            scores = []
            for n in tqdm(range(0, len(self.calibrate), TOGETHER), "calibrating", disable=None):
                part = self.calibrate[n : n + TOGETHER]
                seeds = [torch.Generator().manual_seed(n + i) for i in range(len(part))]
                x = torch.stack([torch.randn(shape, generator=g) for g in seeds]).to(step.x)
                text = self.pipe.encode_prompt(part, x.device, 1, False)[0]
                out = self._ask(unet, x, args[1], text, more)
                scores.append(self.statistic.function(_calls(self._step((x, args[1]), out, False))))
            self._nulls[key] = np.concatenate(scores)
        return self._nulls[key]

    def _request(self, unet, args, kwargs, step: Step) -> Request:
        """What a method makes embeddings of the flagged images from."""
        run, pipe = self._run, self.pipe
        tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
        length = tokenizer.model_max_length

        def tokens(captions):
            return tokenizer(
                list(captions), padding="max_length", max_length=length, truncation=True,
                return_tensors="pt",
            ).input_ids  # fmt: skip

        def read(rows):
            return encoder(rows.to(encoder.device))[0]

        def predict(text):
            x = step.x[run.flagged]
            run.calls += 1
            out = self._ask(unet, x, args[1], text.to(x), kwargs.get("cross_attention_kwargs"))
            return self._step((x, args[1]), out, False).eps_cond

        special = torch.tensor(tokenizer.all_special_ids)
        words = tokens(self.calibrate) if self.calibrate else torch.arange(len(tokenizer))
        words = words[~torch.isin(words, special)]
        prompts = pipe.maybe_convert_prompt([run.prompts[n] for n in run.places], tokenizer)
        usual = float(np.median(self._null(unet, args, kwargs, step))) if self.calibrate else np.nan
        return Request(
            tokens(prompts), run.text, _calls(step, run.flagged), read, predict, words, special,
            run.places, self.statistic.function, usual,
        )  # fmt: skip

    def _ask(self, unet, x, timestep, text, more) -> torch.Tensor:
        with self._own_call():
            options = {"cross_attention_kwargs": more, "return_dict": False}
            return unet(x, timestep, encoder_hidden_states=text, **options)[0]

    @contextmanager
    def _own_call(self):
        """A call of ours, which is not looked at."""
        self._asking = True
        try:
            yield
        finally:
            self._asking = False


def _call(pipe, *args, **options):
    """`__call__` of a guarded pipeline."""
    watch = pipe._memlib_guard
    known = inspect.signature(watch._class.__call__).bind(pipe, *args, **options).arguments
    before, watch._run = watch._run, watch._begin(**{k: v for k, v in known.items() if k != "self"})
    try:
        return watch._class.__call__(pipe, *args, **options)
    finally:
        watch._run = before


def _calls(step: Step, rows=slice(None)) -> Calls:
    """As a statistic takes it: a seed for each image."""
    parts = (step.x, step.eps_uncond, step.eps_cond)
    x, uncond, cond = (v if v is None else v[rows].unsqueeze(1) for v in parts)
    return Calls(x, round(step.timestep), step.alpha_bar, uncond, cond, None)


def _eager(unet):
    """Without what `torch.compile` put around it."""
    return getattr(unet, "_orig_mod", unet)
