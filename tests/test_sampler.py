"""The instrumented sampler against diffusers' own pipeline, and against kept tensors."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline

import memlib
from memlib import schedule
from memlib.gram import VECTORS, add, eps_cfg
from memlib.sampler import sample

SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
CAPTIONS = ["a red apple on a blue background", "a dog on a pink background", ""]


@pytest.fixture(scope="module")
def lab():
    return memlib.load("lab")


def pipeline_latents(lab, captions, seeds, sampler, guidance_scale, steps, pipe=None):
    """The independent path: diffusers' pipeline from the folder, with its own scheduler."""
    pipe = pipe or StableDiffusionPipeline.from_pretrained(memlib.paths.LAB)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(
        captions, num_inference_steps=steps, guidance_scale=guidance_scale,
        generator=generators, output_type="latent",
    ).images  # fmt: skip


def our_latents(lab, captions, seeds, sampler, guidance_scale, steps):
    scheduler = schedule.make_scheduler(lab.scheduler_config, sampler, steps)
    guidance = schedule.guidance_values(guidance_scale, steps)
    return sample(lab, captions, seeds, scheduler, guidance)["x_t"][-1]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [7.5, 3.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_latents_equal_the_pipeline_bit_for_bit(lab, sampler, guidance_scale, steps):
    args = (CAPTIONS, [0, 5, 5], sampler, guidance_scale, steps)
    assert torch.equal(our_latents(lab, *args), pipeline_latents(lab, *args))


def test_fifty_steps_equal_the_pipeline(lab):
    for sampler in SCHEDULERS:
        args = (CAPTIONS[:2], [1, 2], sampler, 7.5, 50)
        assert torch.equal(our_latents(lab, *args), pipeline_latents(lab, *args))


def test_images_equal_the_pipeline(lab):
    pipe = StableDiffusionPipeline.from_pretrained(memlib.paths.LAB)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(
        CAPTIONS[:2], num_inference_steps=5, output_type="pil",
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
    ).images  # fmt: skip
    ours = lab.decode(our_latents(lab, CAPTIONS[:2], [3, 4], "ddim", 7.5, 5))
    np.testing.assert_array_equal(ours, np.stack([np.asarray(i) for i in theirs]))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_batch_size_changes_no_noise_and_rounds_latents_only(lab, sampler):
    pairs = memlib.load_pairs("lab").iloc[[0, 50]]
    kw = dict(seeds=[0, 1, 2], sampler=sampler, steps=6, similarity=None, progress=False)
    one = memlib.reverse_trace(lab, pairs, batch_size=6, **kw)
    for batch_size in (1, 4):
        other = memlib.reverse_trace(lab, pairs, batch_size=batch_size, **kw)
        for vec in ("x_T", "noise"):  # drawn, not computed: the same bits
            np.testing.assert_array_equal(
                one.gram.sel(vec=vec, vec_=vec), other.gram.sel(vec=vec, vec_=vec)
            )
        # Convolutions sum in another order in another batch: float32 rounding, amplified by
        # guidance over the steps.
        np.testing.assert_allclose(one.gram, other.gram, rtol=2e-3, atol=2e-1)
        np.testing.assert_allclose(one.seed_distance, other.seed_distance, rtol=2e-3, atol=2e-2)
        # and the pictures belong to their own prompt and seed
        np.testing.assert_allclose(one.image.astype(int), other.image.astype(int), atol=3)


def test_gram_equals_direct_tensors(lab):
    """Norms, cosines, weights, residual and x0_hat at three scales from kept tensors, 1e-9."""
    pairs = memlib.load_pairs("lab").iloc[[0]]
    for sampler in SCHEDULERS:
        trace = memlib.reverse_trace(
            lab, pairs, seeds=[4], sampler=sampler, steps=8, similarity=None, progress=False
        )
        scheduler = schedule.make_scheduler(lab.scheduler_config, sampler, 8)
        kept = sample(lab, list(pairs.caption), [4], scheduler, np.full(8, 7.5))
        kept = {k: v[:, 0].flatten(1).double().numpy() for k, v in kept.items()}
        x_0 = lab.encode_images(pairs.image)[0].flatten().double().numpy()
        x, x_T, x_gen = kept["x_t"], kept["x_t"][0], kept["x_t"][-1]

        def get(result):
            return result.isel(prompt=0, seed=0).values

        np.testing.assert_array_equal(trace.gram, trace.gram.values.swapaxes(-1, -2))
        close = dict(rtol=1e-9, atol=1e-12)
        vectors = {"x_t": x, "x_0": np.tile(x_0, (9, 1)), "x_T": np.tile(x_T, (9, 1)),
                   "x_gen": np.tile(x_gen, (9, 1)), "noise": kept["noise"]}  # fmt: skip
        for name in ("eps_uncond", "eps_cond"):
            vectors[name] = np.vstack([kept[name], np.full_like(x_0, np.nan)])
        vectors["eps_delta"] = vectors["eps_cond"] - vectors["eps_uncond"]
        for a in vectors:
            direct = np.linalg.norm(vectors[a], axis=1)
            np.testing.assert_allclose(get(memlib.norm(trace, a)), direct, **close)
            for b in ("x_0", "x_T", "eps_cond"):
                size = direct * np.linalg.norm(vectors[b], axis=1)
                size[size == 0] = np.nan
                expected = (vectors[a] * vectors[b]).sum(1) / size
                np.testing.assert_allclose(get(memlib.cosine(trace, a, b)), expected, **close)

        found = memlib.weights(trace)
        names = ["w_0", "w_T"] + (["w_noise"] if sampler == "ddpm" else [])
        basis = [x_0, x_T]
        for i in range(9):
            columns = np.stack(basis + ([kept["noise"][i]] if sampler == "ddpm" else []), 1)
            fit, *_ = np.linalg.lstsq(columns, x[i], rcond=None)
            left = np.linalg.norm(x[i] - columns @ fit) / np.linalg.norm(x[i])
            ours = [get(found[n])[i] for n in names]
            np.testing.assert_allclose(ours, fit, rtol=1e-9, atol=1e-10)
            # The square of the residual is a difference: at state 0 it is rounding, 1e-8.
            np.testing.assert_allclose(get(found.residual)[i], left, rtol=1e-9, atol=3e-8)

        alpha_bar = trace.alpha_bar.values[:, None]
        for g in (0.0, 3.0, 7.5):
            eps = vectors["eps_uncond"] + g * vectors["eps_delta"]
            direct = (x - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)
            estimate = memlib.x0_hat(trace, g)
            np.testing.assert_allclose(
                get(memlib.norm(trace, estimate)), np.linalg.norm(direct, axis=1), **close
            )
            np.testing.assert_allclose(
                get(memlib.inner(trace, estimate, "x_0")), direct @ x_0, **close
            )
            np.testing.assert_allclose(
                get(memlib.overestimation(trace, g)), direct @ x_0 / (x_0 @ x_0), **close
            )
            np.testing.assert_allclose(
                get(memlib.image_error(trace, g)),
                ((direct - x_0) ** 2).mean(1), rtol=1e-9,
            )  # fmt: skip


def test_seed_distances_are_the_states_own(lab):
    pairs = memlib.load_pairs("lab").iloc[[3]]
    trace = memlib.reverse_trace(
        lab, pairs, seeds=[0, 9, 4], steps=5, similarity=None, progress=False
    )
    scheduler = schedule.make_scheduler(lab.scheduler_config, "ddim", 5)
    kept = sample(lab, list(pairs.caption) * 3, [0, 9, 4], scheduler, np.full(5, 7.5))["x_t"]
    direct = torch.linalg.vector_norm(
        kept[:, :, None].double() - kept[:, None].double(), dim=(3, 4, 5)
    )
    np.testing.assert_allclose(trace.seed_distance[0], direct, rtol=1e-12)
    off = direct[:, [0, 0, 1], [1, 2, 2]].mean(1)
    np.testing.assert_allclose(memlib.mean_seed_distance(trace)[0], off, rtol=1e-12)
    part = memlib.mean_seed_distance(trace.isel(seed=[0, 1]))
    np.testing.assert_allclose(part[0], direct[:, 0, 1], rtol=1e-12)


def test_guidance_may_change_with_the_step(lab):
    pairs = memlib.load_pairs("lab").iloc[[3]]
    kw = dict(seeds=[0], steps=4, similarity=None, images=False, progress=False)
    constant = memlib.reverse_trace(lab, pairs, guidance_scale=7.5, **kw)
    sequence = memlib.reverse_trace(lab, pairs, guidance_scale=[7.5] * 4, **kw)
    function = memlib.reverse_trace(lab, pairs, guidance_scale=lambda i: 0 if i < 2 else 7.5, **kw)
    np.testing.assert_array_equal(constant.gram, sequence.gram)
    assert list(function.guidance_scale[:4]) == [0, 0, 7.5, 7.5]
    # Guidance 0 follows the unconditional branch: one DDIM step by hand.
    a, b = constant.alpha_bar.values[:2]
    x0 = memlib.x0_hat(function, 0.0)
    step = add({k: np.sqrt(b) * v for k, v in x0.items()}, eps_cfg(0.0), np.sqrt(1 - b))
    at_zero = memlib.norm(function, step).isel(step=0)
    np.testing.assert_allclose(memlib.norm(function, "x_t").isel(step=1), at_zero, rtol=1e-6)
    assert a < b


def test_the_schema(lab):
    pairs = memlib.load_pairs("lab").iloc[[0, 1]].assign(image=lambda p: [p.image.iloc[0], ""])
    trace = memlib.reverse_trace(
        lab, pairs, seeds=[0, 1], steps=3, similarity="ncc", progress=False
    )
    assert trace.gram.dims == ("prompt", "seed", "step", "vec", "vec_")
    assert trace.gram.dtype == np.float64
    assert list(trace.vec.values) == list(VECTORS)
    assert trace.sizes["step"] == 4 == len(trace.alpha_bar)
    assert trace.image.shape == (2, 2, 64, 64, 3)
    per_state = trace.gram[0, 0, 0].nbytes
    assert per_state <= 400
    known = trace.isel(prompt=0)
    assert np.isfinite(known.gram.isel(step=slice(3))).all()
    assert np.isnan(known.gram.isel(step=3).sel(vec="eps_cond")).all()
    unknown = trace.isel(prompt=1)  # a prompt without an image still runs, on its own result
    assert np.isnan(unknown.gram.sel(vec="x_0")).all()
    assert np.isnan(unknown.severity).all()
    assert np.isfinite(memlib.weights(trace, "x_gen").w_0).all()
    assert np.isnan(memlib.weights(trace).w_0.isel(prompt=1)).all()
    for name in ("model", "fingerprint", "sampler", "scheduler", "dtype", "versions", "schema"):
        assert trace.attrs[name]


def test_the_conversion_of_predictions():
    """epsilon, v and sample predictions of the same estimate give the same epsilon."""
    model = memlib.load("lab")
    x, eps, a = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), 0.3
    x_t = a**0.5 * x + (1 - a) ** 0.5 * eps
    outputs = {"epsilon": eps, "sample": x, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x}
    for kind, output in outputs.items():
        model.prediction_type = kind
        torch.testing.assert_close(model.to_epsilon(output, x_t, a), eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(direction, monkeypatch):
    lab = memlib.load("lab")
    pairs = memlib.load_pairs("lab").iloc[[0, 50]]

    def record(batch_size):
        if direction == "forward":
            return memlib.forward_trace(
                lab, pairs, [100, 900], draws=3, batch_size=batch_size, progress=False
            )
        return memlib.reverse_trace(
            lab, pairs, seeds=[0, 1, 2], steps=3, similarity=None, batch_size=batch_size,
            progress=False,
        )  # fmt: skip

    expected = record(batch_size=1)
    predict, sizes = lab.predict, []

    def small(x, t, text):
        sizes.append(len(x))
        if len(x) > 2:  # one image, two branches
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(x, t, text)

    monkeypatch.setattr(lab, "predict", small)
    found = record(batch_size=6)
    assert max(sizes) > 2
    np.testing.assert_array_equal(found.gram, expected.gram)
    monkeypatch.setattr(lab, "predict", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(MemoryError, match="single image"):
        record(batch_size=2)


@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_predictions_that_are_not_finite_are_refused(branch, monkeypatch):
    lab = memlib.load("lab")
    pairs = memlib.load_pairs("lab").iloc[:1]
    predict = lab.predict

    def broken(x, t, text):
        out = predict(x, t, text)
        out.chunk(2)[branch == "cond"].fill_(torch.nan)
        return out

    monkeypatch.setattr(lab, "predict", broken)
    with pytest.raises(FloatingPointError, match=r"not finite in float32: are its weights whole"):
        memlib.reverse_trace(lab, pairs, seeds=[0], steps=2, similarity=None, progress=False)
    with pytest.raises(FloatingPointError, match="not finite"):
        memlib.forward_trace(lab, pairs, [500], draws=1, progress=False)


def test_samplers_that_would_be_misread_are_refused():
    config = dict(memlib.models.stable_diffusion_schedule())
    config.pop("_use_default_values", None)  # else diffusers puts defaults in their place
    with pytest.raises(ValueError, match="with timestep_spacing='leading'"):
        schedule.make_scheduler({**config, "timestep_spacing": "linspace"}, "ddim", 50)
    with pytest.raises(ValueError, match="only 'fixed_small'"):
        schedule.make_scheduler({**config, "variance_type": "learned"}, "ddpm", 50)
    del config["clip_sample"]
    assert not schedule.make_scheduler(config, "ddpm", 50).config.clip_sample


def test_the_algebra_keeps_working_on_a_part_of_a_trace(lab):
    pairs = memlib.load_pairs("lab").iloc[:2]
    trace = memlib.reverse_trace(lab, pairs, seeds=[0, 1], steps=3, similarity=None, progress=False)
    whole = memlib.cosine(trace, "eps_cfg", "x_0").isel(prompt=1)
    np.testing.assert_array_equal(memlib.cosine(trace.isel(prompt=1), "eps_cfg", "x_0"), whole)
    difference = memlib.norm(trace, {"eps_cfg": 1, "eps_uncond": -1})
    np.testing.assert_allclose(difference, 7.5 * memlib.norm(trace, "eps_delta"), rtol=1e-9)
