"""A pipeline that looks at its first call, and does otherwise where a prompt is memorized."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
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
WRAPPED = ("encode_prompt", "prepare_latents", "maybe_free_model_hooks")  # of a pipeline


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
    callbacks and `torch.compile`. Not for several threads at once.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline`; it is changed in place, until `Guard.remove`.
    calibrate : captions of which none is memorized; an image is flagged if at most `rate` of them
        score as much. They are asked once for each first timestep and size of picture, one call
        each (`memlib.detect` says more). Their words are those that `smoothed` puts in.
    method : what is done, as of `mitigation.methods`; None reports only.
    threshold : the score from which an image is flagged, instead of `calibrate`.
    statistic : of `detection.statistics.STATISTICS`, one that the first call is enough for.
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
        flagged; too few captions for the rate; a statistic of more than the first call.
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
    if known.first != known.cost or known.seeds > 1:
        raise ValueError(f"{statistic} needs more than one image's first call")
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
    clip_skip: int | None
    flagged: torch.Tensor | None = None  # [image]
    text: torch.Tensor | None = None  # embeddings of the flagged ones, [image, token, width]
    kept: dict = field(default_factory=dict)  # what a schedule keeps from step to step
    calls: int = 0  # of the U-Net for a flagged image, more than without a guard


class Guard:
    """A guarded pipeline; see `guard`."""

    def __init__(self, pipe, method, calibrate, threshold, statistic, rate):
        self.pipe, self.method, self.statistic = pipe, method, STATISTICS[statistic]
        self.calibrate, self.threshold, self.rate = calibrate, threshold, rate
        self._run, self._asked, self._asking, self._nulls = None, (None, None), False, {}
        self._rows = deque(maxlen=LOGGED)
        self._unet, self._own = pipe.unet, {name: getattr(pipe, name) for name in WRAPPED}
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._hooks = [
            self._unet.register_forward_pre_hook(before, with_kwargs=True),
            self._unet.register_forward_hook(after, with_kwargs=True),
        ]
        for name in WRAPPED:
            setattr(pipe, name, getattr(self, f"_{name}"))
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
            for name in ("_memlib_guard", *WRAPPED):
                delattr(self.pipe, name)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    # What the pipeline calls: its own methods, at the begin of a run and at its end.

    def _encode_prompt(self, prompt=None, device=None, num_images_per_prompt=1, *args, **options):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is not None:
            prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        self._asked = prompts, options.get("clip_skip")
        return self._own["encode_prompt"](prompt, device, num_images_per_prompt, *args, **options)

    def _prepare_latents(self, *args, **options):
        if _eager(self.pipe.unet) is not _eager(self._unet):
            raise ValueError("the guarded U-Net was replaced: remove() the guard, and guard again")
        self._run = _Run(*self._asked)
        return self._own["prepare_latents"](*args, **options)

    def _maybe_free_model_hooks(self):
        self._run = None
        return self._own["maybe_free_model_hooks"]()

    # What the U-Net calls.

    def _before(self, unet, args, kwargs):
        """Other embeddings for flagged images."""
        run = self._run
        if run is None or self._asking or run.text is None:
            return None
        return args, kwargs | {"encoder_hidden_states": self._replaced(args, kwargs)}

    def _replaced(self, args, kwargs) -> torch.Tensor:
        run, given = self._run, kwargs["encoder_hidden_states"].clone()
        text = self.method.vary(run.text, float(args[1])) if self.method.vary else run.text
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
        if not guided and self.statistic.first > 1:
            raise ValueError("this statistic compares branches, and without guidance there is one")
        score = self.statistic.function(_calls(step))
        alarms = np.full(len(score), np.nan)
        if self.threshold is None:
            alarms = false_alarms(score, self._null(unet, args, step))
        flagged = score >= self.threshold if self.threshold is not None else alarms <= self.rate
        run.flagged = torch.from_numpy(flagged).to(out.device)
        done = []
        if flagged.any() and self.method:
            method = self.method
            if (method.embed or method.vary) and (run.prompts or not method.embed):
                run.text = kwargs["encoder_hidden_states"][-len(flagged) :][run.flagged]
                if method.embed:
                    run.text = method.embed(self._request(unet, args, step))
                out = self._ask(
                    unet, *args, **kwargs | {"encoder_hidden_states": self._replaced(args, kwargs)}
                )
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

    def _null(self, unet, args, step) -> np.ndarray:
        """Scores of the captions to calibrate with, at this timestep and size."""
        shape, branches = tuple(step.x.shape[1:]), self.statistic.first
        key = (step.timestep, shape, step.x.dtype)
        if key not in self._nulls:
            scores, ask = [], self._own["encode_prompt"]
            for n in tqdm(range(0, len(self.calibrate), TOGETHER), "calibrating", disable=None):
                part = self.calibrate[n : n + TOGETHER]
                seeds = [torch.Generator().manual_seed(n + i) for i in range(len(part))]
                x = torch.stack([torch.randn(shape, generator=g) for g in seeds]).to(step.x)
                x = x.repeat(branches, 1, 1, 1)
                text = torch.cat(ask(part, x.device, 1, True)[1::-1][-branches:])
                out = self._ask(unet, x, args[1], encoder_hidden_states=text)
                first = _calls(self._step((x, args[1]), out, branches > 1))
                scores.append(self.statistic.function(first))
            self._nulls[key] = np.concatenate(scores)
        return self._nulls[key]

    def _request(self, unet, args, step: Step) -> Request:
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
            found = encoder(rows.to(encoder.device), output_hidden_states=run.clip_skip is not None)
            if run.clip_skip is None:
                return found[0]
            return encoder.text_model.final_layer_norm(found.hidden_states[-run.clip_skip - 1])

        def predict(text):
            x = step.x[run.flagged]
            run.calls += 1
            out = self._ask(unet, x, args[1], encoder_hidden_states=text.to(x))
            return self._step((x, args[1]), out, False).eps_cond

        special = torch.tensor(tokenizer.all_special_ids)
        words = tokens(self.calibrate) if self.calibrate else torch.arange(len(tokenizer))
        words = words[~torch.isin(words, special)]
        chosen = run.flagged.cpu()
        prompts = [text for text, one in zip(run.prompts, chosen.tolist(), strict=True) if one]
        usual = float(np.median(self._null(unet, args, step))) if self.calibrate else np.nan
        return Request(
            tokens(prompts), run.text, _calls(step, run.flagged), read, predict, words, special,
            self.statistic.function, usual,
        )  # fmt: skip

    def _ask(self, unet, x, timestep, **options) -> torch.Tensor:
        """A call of our own."""
        self._asking = True
        try:
            return unet(x, timestep, **options | {"return_dict": False})[0]
        finally:
            self._asking = False


def _calls(step: Step, rows=slice(None)) -> Calls:
    """As a statistic takes it: a seed for each image."""
    parts = (step.x, step.eps_uncond, step.eps_cond)
    x, uncond, cond = (v if v is None else v[rows].unsqueeze(1) for v in parts)
    return Calls(x, round(step.timestep), step.alpha_bar, uncond, cond, None)


def _eager(unet):
    """Without what `torch.compile` put around it."""
    return getattr(unet, "_orig_mod", unet)
