"""What makes a run on a GPU fast, tried on a CPU: pretended cards, small networks, small pictures.

What only a GPU can show is skipped without one; `make bench` measures it on a card.
"""

import contextlib
import copy
import threading
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from test_sampler import CAPTIONS, our_latents, pipeline_latents
from test_store import same

import memlib
from memlib import cli, models, trace
from memlib.hub.accelerated import AcceleratedModel
from memlib.runs import cost, engines, tracing
from memlib.runs.store import StoreError

PROMPTS = 3
SMALL = dict(seeds=range(4), steps=3, similarity="ncc", threads=1, progress=False)


@pytest.fixture
def lab():
    return memlib.load("lab", device="cpu")


@pytest.fixture
def pairs():
    return memlib.load_pairs("lab").iloc[:PROMPTS].copy()


def tiny(lab) -> AcceleratedModel:
    """The lab with a network of one block, whose compilation takes seconds."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=(8,),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=lab.unet.config.cross_attention_dim,
    )  # fmt: skip
    parts = lab.pipe.components | {"unet": unet}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    model = AcceleratedModel(pipe, "tiny", "of this test")
    model.recipe = lab.recipe
    return model


# ---------------------------------------------------------------------------------- batch and card


class Card:
    """A pretended card and network: what a call takes is said, and torch.cuda's figures follow."""

    def __init__(self, model, monkeypatch, gigabytes: float):
        self.total, self.peak, self.sizes = int(gigabytes * 2**30), 0, []
        self.held = 2**30  # the weights
        cuda = dict(
            mem_get_info=lambda _: (self.total - self.held, self.total),
            memory_allocated=lambda _: self.held, memory_reserved=lambda _: self.held,
            max_memory_allocated=lambda _: self.held + self.peak, synchronize=lambda _: None,
            reset_peak_memory_stats=lambda _: setattr(self, "peak", 0), empty_cache=lambda: None,
        )  # fmt: skip
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(model, "predict", lambda x, *_: self.take(x, 100))
        monkeypatch.setattr(model, "decode", lambda x: self.take(x, 0))
        monkeypatch.setattr(model, "decoder", "float16")

    def take(self, x, fixed: int):
        """Fixed megabytes, and 50 for each latent or picture."""
        count = len(x)
        self.sizes.append(count)
        self.peak = max(self.peak, (fixed + 50 * count) * 2**20)
        if self.held + self.peak > self.total:
            raise torch.OutOfMemoryError("a pretended card")
        return x


@pytest.mark.parametrize("gigabytes", [4, 8, 16, 1000])
def test_the_batch_is_what_the_card_holds(lab, monkeypatch, gigabytes):
    card = Card(lab, monkeypatch, gigabytes)
    found = cost.trial(lab, steps=50, seeds=10)
    room = 0.85 * (gigabytes - 1) * 1024  # MB
    pictures = min(640, room / 4 // 50)
    state = 4 * 8 * 16 * 16 / 2**20
    fits = (room - 50 * pictures - 100 - state * 51 * 34) // (100 + state * 202)
    most = min(256, 30 * 4 * 64**2 // (8 * 16 * 16))
    assert found.batch == min(most, fits)
    assert found.together == pictures
    assert found.seconds > 0
    # It would have run: the largest call, beside the decoder, is within the card.
    used = 1024 + 100 + 100 * found.batch + 50 * found.together
    assert used < gigabytes * 1024
    batch = found.batch  # which was tried, where it is larger; no more calls than these
    assert card.sizes == [1, 1, 1, 4, 4, 16, 16] + [2 * batch] * 2 * (batch > 8)
    beside = cost.trial(lab, 50, 10, beside=2**30)
    assert beside.batch < found.batch or found.batch == most


def test_a_card_that_holds_next_to_nothing(lab, monkeypatch):
    Card(lab, monkeypatch, 1.3)  # two images and not eight
    assert cost.trial(lab, steps=50) == cost.Trial(2, 1, 0.0)


def test_equal_batches():
    for batch in range(1, 60):
        for seeds in (1, 4, 10, 50):
            size = cost.equal_batches(batch, seeds)
            assert 1 <= size <= batch
            left = seeds % size if seeds > size else 0
            assert left == 0 or size - left < -(-seeds // size)  # hardly anything is filled up
            if seeds <= batch:
                assert size % seeds == 0


def test_what_is_decided(monkeypatch):
    """Given is given; a CPU is as ever; a GPU is asked once; long runs compile."""
    cpu, gpu = (SimpleNamespace(device=torch.device(d)) for d in ("cpu", "cuda"))
    tried = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(cost, "trial", lambda *a: tried.append(a) or cost.Trial(37, 5, 6e-3))
    assert cost.decide(cpu, "reverse", None, None, 10**6, 10, 50) == (20, False)
    assert cost.decide(cpu, "forward", None, None, 10**6, 1, 0) == (64, False)
    assert cost.decide(cpu, "reverse", 7, True, 3, 10, 50) == (7, True)
    assert cost.decide(gpu, "reverse", 7, False, 10**6, 10, 50) == (7, False)
    assert cost.decide(gpu, "reverse", None, None, 0, 10, 50) == (20, False)  # a template
    assert not tried
    assert cost.decide(gpu, "reverse", None, None, 10_000, 10, 50) == (30, True)
    assert cost.decide(gpu, "reverse", None, None, 40, 10, 50) == (30, False)
    assert cost.decide(gpu, "reverse", 20, None, 10_000, 10, 50) == (20, True)
    assert gpu.together == 5
    assert len(tried) == 3
    with pytest.raises(ValueError, match="at least 1"):
        cost.decide(cpu, "reverse", 0, None, 1, 1, 1)


def test_when_compiling_pays(monkeypatch):
    """At the H200's rate, 119 ms a call of 40 latents, from some 820 images on."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not cost.pays(10**6, 50, 0.119 / 20, gpu)  # a T4
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert not cost.pays(800, 50, 0.119 / 20, gpu)
    assert cost.pays(840, 50, 0.119 / 20, gpu)
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 2)  # as on Colab
    assert not cost.pays(3200, 50, 0.119 / 20, gpu)
    assert cost.pays(3400, 50, 0.119 / 20, gpu)


def test_the_card_is_told_by_its_name():
    names = {"NVIDIA H100 80GB HBM3": "H100", "Tesla T4": "T4", "NVIDIA A100-SXM4-40GB": "A100"}
    assert {name: cost.gpu_of(name).name for name in names} == names
    assert cost.gpu_of("NVIDIA L40S") is None


def test_distances_where_the_device_lacks_memory(monkeypatch):
    states = [torch.randn(5, 2, 3, 3) for _ in range(4)]
    expected = trace.seed_distances(states)
    stack, calls = torch.stack, []

    def small(tensors, dim):
        calls.append(dim)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("a pretended card")
        return stack(tensors, dim)

    monkeypatch.setattr(torch, "stack", small)
    np.testing.assert_array_equal(trace.seed_distances(states), expected)
    assert len(calls) == 2


# ----------------------------------------------------------------------------------------- compile


def pretend(monkeypatch, shapes: list, fails: bool = False):
    """torch.compile, as far as we see it: called with shapes, or not able to."""

    def compile(network, dynamic):
        assert dynamic is False

        def call(x, timestep, **arguments):
            if fails:
                raise RuntimeError("no compiler here\nand a long story")
            assert x.is_contiguous(memory_format=torch.channels_last)
            shapes.append(len(x))
            return network(x, timestep, **arguments)

        return call

    monkeypatch.setattr(torch, "compile", compile)


def test_compiled_batches_are_of_one_size(lab, pairs, monkeypatch):
    """The last one is filled up, and what fills it is dropped; noise and places are the same."""
    options = dict(seeds=range(3), steps=3, similarity=None, progress=False, batch_size=4)
    expected = memlib.reverse_trace(lab, pairs, **options)
    assert "compiled" not in expected
    shapes: list = []
    pretend(monkeypatch, shapes)
    found = memlib.reverse_trace(lab, pairs, compile=True, **options)
    assert shapes == [8] * 9
    assert (found.compiled == 1).all()
    np.testing.assert_array_equal(found.gram.sel(vec="x_T"), found.gram.sel(vec_="x_T"))
    np.testing.assert_allclose(found.gram, expected.gram, rtol=2e-3, atol=2e-1)
    np.testing.assert_allclose(found.seed_distance, expected.seed_distance, rtol=2e-3, atol=2e-2)
    np.testing.assert_allclose(found.image.astype(int), expected.image.astype(int), atol=3)
    # afterwards the model is what it was, bit for bit
    again = memlib.reverse_trace(lab, pairs, compile=False, **options)
    assert not again.compiled.any()
    np.testing.assert_array_equal(again.gram, expected.gram)


def test_where_compiling_fails(lab, pairs, monkeypatch):
    """One line, and the run goes on; it is not tried twice."""
    options = dict(seeds=[0, 1], steps=2, similarity=None, images=False, progress=False)
    expected = memlib.reverse_trace(lab, pairs, batch_size=2, **options)
    pretend(monkeypatch, [], fails=True)
    with pytest.warns(UserWarning, match=r"lab does not compile here.*no compiler here$"):
        found = memlib.reverse_trace(lab, pairs, batch_size=2, compile=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = memlib.reverse_trace(lab, pairs, batch_size=2, compile=True, **options)
    assert not found.compiled.any()
    np.testing.assert_allclose(found.gram, expected.gram, rtol=2e-3, atol=2e-1)
    np.testing.assert_array_equal(again.gram, expected.gram)


def test_memory_halves_compiled_batches(lab, pairs, monkeypatch):
    """They are of one size again, a smaller one."""
    shapes: list = []
    pretend(monkeypatch, shapes)
    real = lab._call

    def small(x_t, timestep, text):
        if len(x_t) > 6:
            raise torch.OutOfMemoryError("a pretended card")
        return real(x_t, timestep, text)

    monkeypatch.setattr(lab, "_call", small)
    options = dict(seeds=range(4), steps=1, similarity=None, images=False, progress=False)
    found = memlib.reverse_trace(lab, pairs.iloc[:2], batch_size=6, compile=True, **options)
    assert shapes == [6] * 3  # 3 + 3 + 2 images, two branches each
    assert (found.compiled == 1).all()


def test_the_float32_fallback_is_not_compiled(lab, pairs, monkeypatch):
    """float32 by the network itself: code that was compiled for half precision is not asked."""
    half, asked = memlib.load("lab", device="cpu", dtype="float16"), []
    pretend(monkeypatch, asked)
    forward = half.unet.forward

    def overflow(x, *rest, **more):
        out = forward(x, *rest, **more)
        return (out[0] * (torch.inf if x.dtype == torch.float16 else 1),)

    monkeypatch.setattr(half.unet, "forward", overflow)
    options = dict(seeds=[0], steps=2, similarity=None, images=False, progress=False)
    with pytest.warns(UserWarning, match="done in float32"):
        found = memlib.reverse_trace(half, pairs.iloc[:1], compile=True, **options)
    assert asked == [2, 2]  # the first attempt alone
    assert (found.float32_fallback == 1).all()
    assert not found.compiled.any()
    assert half.unet.dtype == torch.float16
    expected = memlib.reverse_trace(lab, pairs.iloc[:1], **options)
    np.testing.assert_allclose(found.gram, expected.gram, rtol=2e-3, atol=2e-1)


def test_a_run_says_which_images_were_compiled(lab, pairs, tmp_path, monkeypatch):
    """Begun compiled it grows without; begun without it has no place for it, and says so."""
    pretend(monkeypatch, [])
    one = dict(model=lab, pairs=pairs, address=tmp_path / "run") | SMALL
    assert memlib.record(**one | {"seeds": [0, 1]}, compile=True).done == PROMPTS
    assert memlib.record(**one).done == PROMPTS
    trace = memlib.open_run(tmp_path / "run")
    assert (trace.compiled == [1, 1, 0, 0]).all()
    assert memlib.verify(tmp_path / "run").ok
    assert memlib.record(**one, compile=True).skipped == 2 * PROMPTS  # it is the same run
    one["address"] = tmp_path / "other"
    memlib.record(**one | {"seeds": [0]})
    before = (tmp_path / "other" / "plan.json").read_bytes()
    assert "compiled" not in memlib.open_run(tmp_path / "other")
    with pytest.raises(StoreError, match="begun without compiling"):
        memlib.record(**one, compile=True)
    assert (tmp_path / "other" / "plan.json").read_bytes() == before


def test_a_run_on_a_gpu_keeps_its_batch(lab, pairs, tmp_path, monkeypatch):
    """Found out once, by the trial; what is added later is of the same size."""
    one = dict(model=lab, pairs=pairs, address=tmp_path / "run") | SMALL
    real, asked = cost.decide, []

    def decide(model, direction, batch_size, *more, **rest):
        asked.append(batch_size)
        return (8, False) if "cuda" in asked else real(model, direction, batch_size, *more, **rest)

    monkeypatch.setattr(engines, "on_gpu", lambda _: True)
    monkeypatch.setattr(cost, "decide", decide)
    asked.append("cuda")
    memlib.record(**one | {"seeds": [0, 1]})
    assert asked[2] is None  # after the template
    asked.clear()
    memlib.record(**one)
    assert set(asked[1:]) == {8}
    plan = memlib.runs.store.Run(tmp_path / "run").read_plan()
    assert {work["batch_size"] for work in plan["work"]} == {8}
    assert [len(work["prompts"]) for work in plan["work"]] == [3, 3]


def test_the_command_line_compiles(lab, pairs, tmp_path, monkeypatch, capsys):
    shapes: list = []
    pretend(monkeypatch, shapes)
    command = "trace --prompts 2 --seeds 2 --steps 2 --severity ncc --compile --device cpu --store"
    assert cli.main([*command.split(), str(tmp_path / "run")]) == 0
    assert shapes == [40, 40]  # two prompts are one task, filled up to the batch of 20
    assert (memlib.open_run(tmp_path / "run").compiled == 1).all()
    capsys.readouterr()


@pytest.mark.slow
def test_truly_compiled(lab, pairs):
    """By torch's own compiler; the tolerance is float32 rounding, amplified by guidance."""
    model = tiny(lab)
    options = dict(seeds=[0, 1], steps=4, similarity=None, images=False, progress=False)
    eager = memlib.reverse_trace(model, pairs, batch_size=4, **options)
    found = memlib.reverse_trace(model, pairs, batch_size=4, compile=True, **options)
    assert (found.compiled == 1).all()  # two batches, the second filled up
    np.testing.assert_allclose(found.gram, eager.gram, rtol=1e-4, atol=1e-2)
    assert not (found.gram.values == eager.gram.values).all()  # it was other code
    after = memlib.reverse_trace(model, pairs, batch_size=4, **options)
    np.testing.assert_array_equal(after.gram, eager.gram)


# -------------------------------------------------------------------------------- the next batch


class Deep(engines.InProcess):
    """This process with two tasks in hand, as on a GPU."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.depth = 2


@pytest.fixture
def whole(lab, pairs, tmp_path):
    memlib.record(model=lab, pairs=pairs, address=tmp_path / "whole", batch_size=4, **SMALL)
    return tmp_path / "whole"


def test_the_next_task_is_sampled_while_the_first_is_decoded(
    lab, pairs, whole, tmp_path, monkeypatch
):
    """The first decoding ends only when the second sampling has begun; the bits are the same."""
    monkeypatch.setattr(engines, "InProcess", Deep)
    real, decode, events, begun = memlib.runs.tracing.sample, lab.decode, [], threading.Event()

    def sample_(*arguments):
        events.append("sample")
        if events.count("sample") == 2:
            begun.set()
        return real(*arguments)

    def decode_(latents):
        assert begun.wait(60)
        pictures = decode(latents)
        events.append("decoded")
        assert threading.current_thread() is not threading.main_thread()
        return pictures

    monkeypatch.setattr(memlib.runs.tracing, "sample", sample_)
    monkeypatch.setattr(lab, "decode", decode_)
    summary = memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", batch_size=4, **SMALL)
    assert (summary.done, summary.failed) == (PROMPTS, {})
    assert events[:2] == ["sample", "sample"]
    assert events.count("decoded") == PROMPTS
    same(tmp_path / "run", whole)


def test_a_decoder_that_fails_costs_its_task_alone(lab, pairs, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "InProcess", Deep)
    decode, calls = lab.decode, []

    def decode_(latents):
        calls.append(len(latents))
        if len(calls) == 2:
            raise ValueError("the decoder is broken")
        return decode(latents)

    with monkeypatch.context() as patch:
        patch.setattr(lab, "decode", decode_)
        summary = memlib.record(
            model=lab, pairs=pairs, address=tmp_path / "run", batch_size=4, **SMALL
        )
    assert summary.done == PROMPTS - 1
    assert summary.failed == {pairs.prompt_id[1]: "the decoder is broken"}
    memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", batch_size=4, **SMALL)
    same(tmp_path / "run", whole)


def test_a_decoder_without_memory_waits_for_the_device(lab, pairs, whole, tmp_path, monkeypatch):
    """Fewer at once, then alone on the device: nothing is sampled twice, and nothing is lost."""
    monkeypatch.setattr(engines, "InProcess", Deep)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    real, decode, sampled, sizes = memlib.runs.tracing.sample, lab.decode, [], []

    def decode_(latents):
        sizes.append(len(latents))
        if len(sizes) <= 3:
            raise torch.OutOfMemoryError("a pretended card")
        return decode(latents)

    monkeypatch.setattr(lab, "decode", decode_)
    monkeypatch.setattr(memlib.runs.tracing, "sample", lambda *a: sampled.append(1) or real(*a))
    summary = memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", batch_size=4, **SMALL)
    assert (summary.done, summary.failed) == (PROMPTS, {})
    assert sizes == [4, 2, 1, 4, 4, 4]
    assert len(sampled) == PROMPTS
    same(tmp_path / "run", whole)


# ------------------------------------------------------------------------------- half precision


def test_pictures_in_half_precision(lab, monkeypatch):
    """A copy of the decoder; at most a few of 256 levels off; the encoder and the model stay."""
    x = our_latents(lab, CAPTIONS, [0, 1, 2], "ddim", 3.0, 10)
    expected = lab.decode(x)
    weights = copy.deepcopy(lab.vae.state_dict())
    monkeypatch.setattr(lab, "decoder", "float16")
    monkeypatch.setattr(lab, "together", 2)
    found = lab.decode(x)
    assert found.dtype == np.uint8
    gap = np.abs(found.astype(int) - expected)
    assert 0 < gap.max() <= 3
    assert gap.mean() < 0.1
    assert lab._half_vae.decoder.conv_in.weight.dtype == torch.float16
    assert lab.vae.encoder.conv_in.weight.dtype == torch.float32
    assert all(torch.equal(v, weights[k]) for k, v in lab.vae.state_dict().items())
    with pytest.warns(UserWarning, match="not finite in float16 and decoded in float32"):
        huge = lab.decode(x * 1e5)
    monkeypatch.setattr(lab, "decoder", "float32")
    np.testing.assert_array_equal(huge[2:], lab.decode(x[2:] * 1e5))
    np.testing.assert_array_equal(huge[:2], lab.decode(x[:2] * 1e5))


def test_a_trace_names_its_decoder(lab, pairs, monkeypatch):
    options = dict(seeds=range(4), steps=2, similarity=None, batch_size=4, progress=False)
    expected = memlib.reverse_trace(lab, pairs.iloc[:1], **options)
    assert expected.attrs["decoder"] == "float32"
    assert expected.attrs["tf32"] == "False"
    monkeypatch.setattr(lab, "decoder", "float16")
    monkeypatch.setattr(lab, "together", 4)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    real, sizes = lab._decode_half, []

    def small(latents):
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("a pretended card")
        return real(latents)

    monkeypatch.setattr(lab, "_decode_half", small)
    found = memlib.reverse_trace(lab, pairs.iloc[:1], **options)
    assert found.attrs["decoder"] == "float16"
    assert sizes == [4, 2, 2]
    np.testing.assert_array_equal(found.gram, expected.gram)
    assert np.abs(found.image.astype(int) - expected.image.astype(int)).max() <= 3


@pytest.mark.slow
def test_half_precision_changes_latents_little(lab):
    """50 DDIM updates at g = 7.5: 0.1 to 0.8 % here, by prompt; about 0.1 % on an H200."""
    half = memlib.load("lab", device="cpu", dtype="float16")
    captions = list(memlib.load_pairs("lab").caption.iloc[[0, 20]])
    a, b = (our_latents(m, captions, [0, 0], "ddim", 7.5, 50) for m in (lab, half))
    gap = (a - b).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)
    assert (gap > 0).all()
    assert (gap < 0.02).all()


# ------------------------------------------------------------------------------------------- TF32


def test_float32_is_float32(recwarn):
    """By the flags that torch's compiler reads, too, and without a warning."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        assert models.tf32(torch.device("cuda"))
        models.exact_float32()
        assert not models.tf32(torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert not recwarn.list


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_latents_equal_the_pipeline_on_a_gpu(sampler):
    """In float32, eight updates: bit for bit, as on a CPU."""
    lab = memlib.load("lab", device="cuda", dtype="float32")
    ours = our_latents(lab, CAPTIONS, [0, 5, 5], sampler, 7.5, 8)
    pipe = lab.pipe  # the same weights, on the same device; its loop is diffusers' own
    theirs = pipeline_latents(lab, CAPTIONS, [0, 5, 5], sampler, 7.5, 8, pipe)
    assert torch.equal(ours, theirs)


def test_the_first_try_is_forgotten():
    """Its tensors must not stand in the way of the second, which needs twice the memory."""
    kept = []

    def first():
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise FloatingPointError("not finite")

    def again():
        assert kept[0]() is None
        return "done"

    model = SimpleNamespace(precision="float16", full_precision=contextlib.nullcontext)
    with pytest.warns(UserWarning, match="not finite; this batch is done in float32"):
        assert tracing.in_float32_where_needed(model, first, again) == ("done", True)


def test_what_fits_is_kept_in_mind(lab, pairs, monkeypatch):
    """The next task does not run out of memory again."""
    sizes, predict = [], lab.predict

    def small_card(x_t, timestep, text):
        sizes.append(len(x_t) // 2)
        if len(x_t) > 4:
            raise torch.OutOfMemoryError("a pretended card")
        return predict(x_t, timestep, text)

    monkeypatch.setattr(lab, "predict", small_card)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(lab, "fits", None)
    options = dict(seeds=[0, 1, 2, 3], steps=1, similarity=None, images=False, progress=False)
    for _ in range(2):
        memlib.reverse_trace(lab, pairs[:1], batch_size=4, **options)
    assert sizes == [4, 2, 2, 2, 2]
