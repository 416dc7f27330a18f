"""Mitigation: closed forms of the methods, and what a guard may and may not change."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

import memlib
from memlib.detection import statistics
from memlib.detection.statistics import Calls
from memlib.lab import judge
from memlib.lab.scenes import world
from memlib.mitigation import methods
from memlib.mitigation.methods import Method, Request, Step
from memlib.paths import CONFIGS

CAPTIONS = {row.prompt_id: row.caption for row in world()}
MEMORIZED = CAPTIONS["planted-128-0"]
NULL = [row.caption for row in world() if row.kind in ("normal", "control")]
OTHER = NULL[1]
NULL = [caption for caption in NULL if caption != OTHER]


@pytest.fixture
def pipe():
    return memlib.load("lab", "cpu").pipe


def made(pipe, captions=(MEMORIZED, OTHER), steps=4, scale=7.5, **options):
    seeds = range(len(captions) * options.get("num_images_per_prompt", 1))
    return pipe(
        list(captions), num_inference_steps=steps, guidance_scale=scale, output_type="latent",
        generator=[torch.Generator().manual_seed(s) for s in seeds], **options,
    ).images  # fmt: skip


def counted(pipe) -> list:
    """Sizes of the U-Net's calls, as they come."""
    sizes = []
    pipe.unet.register_forward_hook(lambda unet, args, out: sizes.append(len(args[0])))
    return sizes


def step(timestep=800.0, scale=7.5, **kept) -> Step:
    generator = torch.Generator().manual_seed(3)
    x, uncond, cond = torch.randn(3, 5, 2, 4, 4, generator=generator)
    return Step(timestep, x, 0.3, uncond, cond, scale, kept)


# ------------------------------------------------------------------------------------- the methods


@pytest.mark.parametrize(
    ("method", "values"),
    [
        (methods.static(700), {900: 0, 701: 0, 700: 7.5, 20: 7.5}),
        (methods.opposite(-2, 650), {900: -2, 650: 7.5}),
        (methods.interval(200, 700), {900: 1, 700: 7.5, 201: 7.5, 200: 1}),
    ],
)
def test_schedules(method, values):
    assert {t: method.scale(step(t)) for t in values} == values


def test_the_cap_bounds_what_the_estimate_holds():
    given = step()
    scale = methods.capped(1.2).scale(given).reshape(-1, 1, 1, 1)
    eps = given.eps_uncond + scale * (given.eps_cond - given.eps_uncond)
    guided, cond = (((given.x - 0.7**0.5 * e) / 0.3**0.5).flatten(1) for e in (eps, given.eps_cond))
    held = (guided * cond).sum(1) / cond.square().sum(1)
    free = scale.flatten() == 7.5
    assert (held <= 1.2 + 1e-5).all() or free.any()
    capped = (scale.flatten() > 1) & ~free
    assert capped.any()
    torch.testing.assert_close(held[capped], torch.full_like(held[capped], 1.2))


def test_guidance_begins_after_the_first_minimum():
    method, kept, found = methods.dynamic(), {}, []
    for length in (3.0, 2.0, 2.5, 1.0):
        x = torch.zeros(1, 1, 1, 1)
        found.append(float(method.scale(Step(800, x, 0.3, x, x + length, 7.5, kept))))
    assert found == [0, 0, 7.5, 7.5]


def request(
    read, tokens=((9, 1, 2, 3, 8, 8),), cond=None, usual=float("nan"), **options
) -> Request:
    tokens, x = torch.tensor(tokens), torch.zeros(1, 1, 1, 1, 1)
    given = {
        "first": Calls(x, 981, 0.01, x, x, None),
        "predict": lambda text: text,
        "statistic": statistics.detail,
        "places": list(range(len(tokens))),
    } | options
    cond = read(tokens) if cond is None else cond
    words, special = torch.arange(1, 8), torch.tensor([8, 9])
    return Request(
        tokens=tokens, cond=cond, read=read, words=words, special=special, usual=usual, **given
    )


def alone(tokens):
    """Each token's own vector: what a word means hangs on no other."""
    return torch.nn.functional.one_hot(tokens, 10).float()


def together(tokens):
    """Each place sees the whole caption."""
    return alone(tokens) + alone(tokens).sum(1, keepdim=True)


def test_smoothing_leaves_what_is_of_each_word():
    asked = request(alone)
    torch.testing.assert_close(methods.smoothed(0.5).embed(asked), asked.cond)
    asked = request(together)
    found = methods.smoothed(0.5, variants=20_000).embed(asked)[0]
    # At a place, its own word twice; of the two others half is left, and half a word of seven.
    share, word = 0.5 / 7, 1
    want = torch.zeros(10)
    want[[8, 9]], want[1:8] = torch.tensor([2.0, 1.0]), 2 * share
    want[word] += 2
    want[[2, 3]] += 0.5
    torch.testing.assert_close(found[1], want, atol=0.03, rtol=0)


def test_smoothing_takes_the_least_that_is_enough():
    asked_for = []

    def score(calls):
        return calls.eps_cond.flatten(1).sum(1).numpy()

    def predict(text):
        asked_for.append(text)
        return torch.full((1, 1, 1, 1), [5.0, 4.0, 3.0][len(asked_for) - 1])

    asked = request(together, predict=predict, statistic=score, usual=4.5)
    found = methods.smoothed().embed(asked)
    assert len(asked_for) == 2
    torch.testing.assert_close(found, methods.smoothed(methods.LADDER[1]).embed(asked))


def test_noise_has_the_size_that_is_asked_for():
    asked = request(together, tokens=[[9, 1, 2, 3, 8, 8]] * 400)
    moved = methods.noised(0.3).embed(asked) - asked.cond
    assert float(moved.std()) == pytest.approx(0.3 * float(asked.cond[0].std()), rel=0.02)
    vary = methods.annealed(0.25, 600, 900).vary
    torch.testing.assert_close(vary(asked.cond, 500.0, asked.places), asked.cond)
    late = vary(asked.cond, 950.0, asked.places)
    torch.testing.assert_close(late.std((1, 2)), asked.cond.std((1, 2)))
    ours, theirs = (v[0] - v[0].mean() for v in (late, asked.cond))
    assert abs(float((ours * theirs).sum() / ours.norm() / theirs.norm())) < 0.4  # noise alone


def test_words_are_put_between_begin_and_end():
    asked = request(lambda tokens: tokens[..., None].float())
    found = methods.more_words(1).embed(asked)[0, :, 0].long().tolist()
    assert found[0] == 9
    assert found[5] == 8
    assert [t for t in found[1:5] if t in (1, 2, 3)] == [1, 2, 3] or len(set(found[1:5])) < 4
    full = request(lambda tokens: tokens[..., None].float(), tokens=[[9, 1, 2, 3, 4, 8]])
    assert methods.more_words(2).embed(full)[0, -1, 0] == 8  # a full caption loses its last words


@pytest.mark.parametrize("statistic", ["magnitude", "detail"])
def test_an_embedding_is_moved_until_the_target(statistic):
    cond = torch.full((2, 3, 16), 2.0)
    x = torch.zeros(2, 1, 1, 4, 4)
    first = Calls(x, 981, 0.25, torch.zeros_like(x), None, None)
    ramp = torch.arange(16.0).reshape(1, 1, 4, 4)

    def predict(text):
        return text[:, 0].reshape(-1, 1, 4, 4) * ramp / 10

    asked = request(alone, cond=cond, first=first, predict=predict)
    moved = methods.optimized(statistic, 1.0, rate=0.3, most=30).embed(asked)
    value = {
        "magnitude": lambda e: e.flatten(1).norm(dim=1).numpy(),
        "detail": lambda e: statistics.detail(Calls(x, 981, 0.25, None, e[:, None], None)),
    }[statistic]
    assert (value(predict(cond)) > 1).all()
    assert (value(predict(moved)) <= 1).all()
    assert (value(predict(moved)) > 0.3).all()  # and no further than that


# --------------------------------------------------------------------------------------- the guard


def test_pictures_that_pass_keep_their_bits_and_their_calls(pipe):
    sizes = counted(pipe)
    before, usual = made(pipe), list(sizes)
    with memlib.guard(pipe, threshold=np.inf):
        sizes.clear()
        torch.testing.assert_close(made(pipe), before, rtol=0, atol=0)
        assert sizes == usual
    with memlib.guard(pipe, NULL) as watch:
        found = made(pipe)
    assert watch.log.memorized.tolist() == [True, False]
    assert watch.log.prompt.tolist() == [MEMORIZED, OTHER]
    assert watch.log.calls.tolist()[1] == 0 < watch.log.calls.tolist()[0]
    assert torch.equal(found[1], before[1])
    assert not torch.allclose(found[0], before[0], atol=0.1)


def test_a_schedule_is_that_of_the_sampler(pipe, lab):
    """What a guard makes of guidance, `memlib.trajectories` makes, too."""
    with memlib.guard(pipe, method=methods.opposite(-2, 650), threshold=-np.inf):
        found = made(pipe, steps=6)
    scheduler = memlib.schedule.make_scheduler(lab.scheduler_config, "ddim", 6)
    scales = [-2.0 if t > 650 else 7.5 for t in scheduler.timesteps.tolist()]
    assert len(set(scales)) == 2
    states = memlib.trajectories(lab.uncached, [MEMORIZED, OTHER], [0, 1], scales, "ddim", 6)
    torch.testing.assert_close(found, states["x_t"][-1], rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_detect(pipe, lab):
    """The first state of 50 steps is what `memlib.detect` asks in, with the same noise."""
    with memlib.guard(pipe, threshold=np.inf) as watch:
        made(pipe, [MEMORIZED, OTHER][:1], steps=50)
    found = memlib.detect(lab, [MEMORIZED], calibrate=NULL).score
    assert watch.log.score.tolist() == pytest.approx(found.tolist(), rel=1e-4)


def test_images_of_a_batch_do_not_meet(pipe):
    """What is done to one image does not hang on the others, and nothing on pictures before."""
    with memlib.guard(pipe, NULL) as watch:
        both = made(pipe)
        torch.testing.assert_close(made(pipe), both, rtol=0, atol=0)
        one = made(pipe, [MEMORIZED])
        torch.testing.assert_close(one[0], both[0], rtol=1e-3, atol=1e-3)
        several = made(pipe, [OTHER, MEMORIZED], num_images_per_prompt=2)
    assert len(several) == 4
    assert watch.log.memorized.tail(4).tolist() == [False, False, True, True]
    assert watch.log.prompt.tail(2).tolist() == [MEMORIZED] * 2


def test_any_guidance_of_the_pipeline_gives_the_same(pipe):
    """Flagged images have the schedule's scale, whatever the pipeline does with two branches."""
    with memlib.guard(pipe, method=Method(lambda _: 3.0), threshold=-np.inf):
        found = made(pipe, scale=9.0, guidance_rescale=0.7)
    torch.testing.assert_close(found, made(pipe, scale=3.0), rtol=1e-3, atol=1e-3)


def test_removed_it_is_as_before(pipe):
    before, names = made(pipe), set(vars(pipe))
    watch = memlib.guard(pipe, NULL)
    made(pipe)
    watch.remove()
    watch.remove()  # twice does no harm
    assert set(vars(pipe)) == names
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    torch.testing.assert_close(made(pipe), before, rtol=0, atol=0)
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_gradients_are_left_nowhere(pipe):
    with memlib.guard(pipe, NULL, methods.optimized("detail", 0.3)) as watch:
        made(pipe)
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert 0 < watch.log.calls[0] <= 13


def test_callbacks_see_what_they_saw(pipe):
    seen = []

    def each(pipe, i, t, values):
        seen.append(values["latents"].clone())
        return values

    before = made(pipe, callback_on_step_end=each)
    with memlib.guard(pipe, NULL):
        found = made(pipe, callback_on_step_end=each)
    assert len(seen) == 8
    assert torch.equal(seen[3], before)
    assert torch.equal(seen[7], found)
    assert torch.equal(seen[7][1], before[1])


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["compiled before", "compiled after"])
def test_compiled(pipe, first):
    before = made(pipe)
    if first:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    with memlib.guard(pipe, NULL) as watch:
        if not first:
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        found = made(pipe)
    assert watch.log.memorized.tolist() == [True, False]
    torch.testing.assert_close(found[1], before[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], before[0], atol=0.1)


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_other_schedulers(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    before = made(pipe, steps=6)
    with memlib.guard(pipe, NULL) as watch:
        found = made(pipe, steps=6)
    assert watch.log.memorized.tolist() == [True, False]
    assert torch.equal(found[1], before[1])
    assert found.isfinite().all()


def test_a_network_that_says_v(pipe):
    with memlib.guard(pipe, NULL) as watch:
        want = made(pipe)
    levels = pipe.scheduler.alphas_cumprod

    def says_v(unet, args, out):
        a = levels[int(args[1])]
        return ((out[0] - (1 - a).sqrt() * args[0]) / a.sqrt(),)

    pipe.unet.register_forward_hook(says_v)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    with memlib.guard(pipe, NULL) as found:
        torch.testing.assert_close(made(pipe), want, rtol=1e-2, atol=1e-2)
    assert found.log.score.tolist() == pytest.approx(watch.log.score.tolist(), rel=1e-3)


def test_what_cannot_be_done_is_said(pipe):
    with memlib.guard(pipe, NULL) as watch:
        with pytest.warns(UserWarning, match="without guidance there is no scale"):
            made(pipe, [MEMORIZED], scale=1.0)
        assert watch.log.done.tolist() == ["embedding"]
        cond, uncond = pipe.encode_prompt([MEMORIZED], "cpu", 1, True)[:2]
        with pytest.warns(UserWarning, match="given as embeddings"):
            pipe(
                prompt_embeds=cond, negative_prompt_embeds=uncond, num_inference_steps=2,
                output_type="latent", generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        assert watch.log.done.tolist()[-1] == "guidance"
        assert watch.log.prompt.tolist()[-1] == ""
    with memlib.guard(pipe, NULL, method=None) as watch:
        before = made(pipe)
    assert watch.log.done.tolist() == ["–", "–"]
    assert watch.log.memorized.tolist() == [True, False]
    torch.testing.assert_close(made(pipe), before, rtol=0, atol=0)


def test_the_network_may_be_asked_directly(pipe, lab):
    """A call that is not of a run is none of the guard's business."""
    x = torch.randn(1, *lab.latent_shape, generator=torch.Generator().manual_seed(0))
    text = pipe.encode_prompt([MEMORIZED], "cpu", 1, False)[0]
    want = pipe.unet(x, 981, encoder_hidden_states=text).sample
    with memlib.guard(pipe, threshold=-np.inf) as watch:
        torch.testing.assert_close(pipe.unet(x, 981, encoder_hidden_states=text).sample, want)
        made(pipe, steps=2)
        torch.testing.assert_close(pipe.unet(x, 981, encoder_hidden_states=text).sample, want)
    assert len(watch.log) == 2


class StoppedError(Exception):
    """What a user's Ctrl-C or a callback may raise in the middle of a run."""


def test_a_stopped_run_leaves_nothing_behind(pipe, lab):
    x = torch.randn(2, *lab.latent_shape, generator=torch.Generator().manual_seed(0))
    text = pipe.encode_prompt([MEMORIZED, OTHER], "cpu", 1, False)[0]
    want = pipe.unet(x, 500, encoder_hidden_states=text).sample

    def stop(*_):
        raise StoppedError

    with memlib.guard(pipe, NULL):
        with pytest.raises(StoppedError):
            made(pipe, callback_on_step_end=stop)
        pipe.prepare_latents(1, 8, 64, 64, torch.float32, "cpu", None)  # somebody's own loop
        assert torch.equal(pipe.unet(x, 500, encoder_hidden_states=text).sample, want)


def test_a_run_within_a_run(pipe):
    with memlib.guard(pipe, NULL) as watch:
        want = made(pipe, [MEMORIZED])

        def another(pipe, i, t, values):
            if i == 0 and len(watch.log) == 2:
                made(pipe, [OTHER])
            return values

        found = made(pipe, [MEMORIZED], callback_on_step_end=another)
    assert watch.log.prompt.tolist() == [MEMORIZED, MEMORIZED, OTHER]
    assert torch.equal(found, want)


def test_what_is_drawn_hangs_on_the_place_alone(pipe):
    other = CAPTIONS["planted-128-1"]
    with memlib.guard(pipe, NULL, methods.late("noised", sigma=0.3)) as watch:
        found = [made(pipe, [first, MEMORIZED])[1] for first in (OTHER, other)]
    assert watch.log.memorized.tolist() == [False, True, True, True]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_wrong_input_is_told_in_a_line(pipe, lab):
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    for wrong, say in ((other, "not StableDiffusionImg2Img"), (lab, r"\.pipe is one")):
        with pytest.raises(TypeError, match=say):
            memlib.guard(wrong, NULL)
    for options, say in (
        ({}, "0 captions to calibrate with"),
        ({"calibrate": NULL[:50]}, "50 captions .* give 99 or more"),
        ({"calibrate": NULL, "rate": 1.0}, "between 0 and 1"),
        ({"calibrate": NULL, "statistic": "detial"}, "did you mean 'detail'"),
        ({"calibrate": NULL, "statistic": "sharpness"}, "more than an image's first conditional"),
        ({"calibrate": NULL, "statistic": "magnitude"}, "more than an image's first conditional"),
        ({"calibrate": NULL, "statistic": "agreement"}, "more than an image's first conditional"),
    ):
        with pytest.raises(ValueError, match=say):
            memlib.guard(pipe, **options)
    with memlib.guard(pipe, NULL), pytest.raises(ValueError, match="guarded already"):
        memlib.guard(pipe, NULL)
    with memlib.guard(pipe, NULL):
        for options, say in (
            ({"clip_skip": 1}, "clip_skip"),
            ({"ip_adapter_image": 1}, "image prompts"),
        ):
            with pytest.raises(ValueError, match=say):
                made(pipe, **options)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(pipe)
    with memlib.guard(pipe, NULL):
        pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
        with pytest.raises(ValueError, match="was replaced"):
            made(pipe)


def test_a_distilled_model_is_only_reported_on(pipe):
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="method=None reports only"):
        memlib.guard(pipe, NULL)
    pipe.unet.register_to_config(time_cond_proj_dim=None)


@pytest.mark.slow
def test_on_the_architecture_of_stable_diffusion():
    """SD v1.4's U-Net with random weights, and the lab's words in its width."""
    with torch.device("meta"):  # filled once, not twice: random weights of this size take a while
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(CONFIGS / "sd14" / "unet")
        ).eval()
    unet = unet.to_empty(device="cpu")
    with torch.no_grad():
        for p in unet.parameters():
            p.uniform_(-0.02, 0.02)
    config = CLIPTextConfig.from_pretrained(CONFIGS / "sd14" / "text_encoder")
    tokenizer = memlib.load("lab", "cpu").pipe.tokenizer
    config.num_hidden_layers, config.vocab_size = 1, len(tokenizer)
    config.max_position_embeddings = tokenizer.model_max_length
    blocks = dict(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
    )
    vae = AutoencoderKL(block_out_channels=[32] * 4, latent_channels=4, **blocks)
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(config).eval(), tokenizer, unet,
        PNDMScheduler.from_pretrained(CONFIGS / "sd14" / "scheduler"), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    size = dict(steps=4, height=64, width=64)
    before = made(pipe, **size)
    with memlib.guard(pipe, threshold=np.inf) as watch:
        assert torch.equal(made(pipe, **size), before)
    middle = float(watch.log.score.mean())
    with memlib.guard(pipe, NULL[:4], threshold=middle) as watch:
        found = made(pipe, **size)
    assert sorted(watch.log.memorized.tolist()) == [False, True]
    passes = watch.log.memorized.tolist().index(False)
    assert torch.equal(found[passes], before[passes])
    assert not torch.equal(found[1 - passes], before[1 - passes])


# --------------------------------------------------------------------------------------- the judge


def test_the_judge_names_what_is_drawn():
    pictures, shown = judge.drawn(300, seed=99)
    right = (judge.seen(pictures) == shown).all(1)
    assert right.mean() >= 0.99
    captions = [row.caption for row in world() if row.kind == "named"]
    asked = judge.asked(captions)
    words = [f"{judge.OBJECTS[o]} on a {judge.GROUNDS[g]}" for o, g in asked]
    for caption, pair in zip(captions, words, strict=True):
        assert pair.replace(" a orange", " an orange") in caption


def test_a_wrong_picture_is_not_right():
    """What a judge that always says yes would score."""
    pictures, shown = judge.drawn(300, seed=7)
    assert (judge.seen(pictures) == np.roll(shown, 1, 0)).all(1).mean() < 0.03
