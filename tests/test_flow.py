"""Flow matching: levels, the exact model, and Stable Diffusion 3's pipeline with random weights."""

import functools
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

import memlib
from memlib import models, paths, schedule
from memlib.errors import ModelError
from memlib.hub import loading
from memlib.lab import flow as flow_lab
from memlib.lab import judge, train
from memlib.sampler import sample

CAPTIONS = ["a red apple on a blue background", "a dog", ""]
FLOW = models.flow_schedule()
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers' way of leaving it out


def make_pipeline(t5: bool = False, shift_factor: float = 0.0609) -> StableDiffusion3Pipeline:
    """SD 3.5's configuration, the widths alone reduced: 16 channels, patch 2, q and k normed."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(paths.LAB / "tokenizer", model_max_length=77)
    clips = [
        CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
            projection_dim=width, num_attention_heads=4, num_hidden_layers=3,
            hidden_act=act, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ))
        for width, act in ((32, "quick_gelu"), (48, "gelu"))
    ]  # fmt: skip
    third = None
    if t5:
        third = T5EncoderModel(T5Config(
            vocab_size=len(tokenizer), d_model=96, d_ff=128, d_kv=24, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        ))  # fmt: skip
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=96,
        caption_projection_dim=64, pooled_projection_dim=80, pos_embed_max_size=12,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), latent_channels=16, sample_size=64,
        scaling_factor=1.5305, shift_factor=shift_factor, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=clips[0], tokenizer=tokenizer, text_encoder_2=clips[1], tokenizer_2=tokenizer,
        text_encoder_3=third, tokenizer_3=tokenizer if t5 else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that saves a pipeline, with T5 or without, and returns its folder."""

    @functools.cache
    def save(t5: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("flow") / ("t5" if t5 else "plain")
        make_pipeline(t5).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders(), tmp_path / "copy")


def theirs(folder, captions, guidance_scale, steps=4, **options):
    without = {} if (folder / "text_encoder_3").is_dir() else NO_T5
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in range(len(captions))]
    return pipe(
        captions, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators,
        **({"output_type": "latent"} | options),
    ).images  # fmt: skip


def ours(model, captions, guidance_scale, steps=4):
    scheduler = schedule.make_scheduler(model.scheduler_config, "flow-euler", steps, model.dtype)
    guidance = schedule.guidance_values(guidance_scale, steps)
    return sample(model, captions, range(len(captions)), scheduler, guidance)


# ------------------------------------------------------------------------------ the real pipeline


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("t5", [False, True])
def test_latents_equal_the_pipeline(folders, t5, guidance_scale, batch):
    model = memlib.load(folders(t5))
    kept = ours(model, CAPTIONS[:batch], guidance_scale)
    assert torch.equal(kept["x_t"][-1], theirs(folders(t5), CAPTIONS[:batch], guidance_scale))
    again = ours(model, CAPTIONS[:batch], guidance_scale)  # its scheduler counts steps
    assert torch.equal(kept["v_cond"], again["v_cond"])


def test_pictures_equal_the_pipeline(folders):
    """With the VAE's shift; and what is encoded is what is decoded, shifted and scaled back."""
    model = memlib.load(folders())
    pictures = model.decode(ours(model, CAPTIONS, 7.0)["x_t"][-1])
    expected = theirs(folders(), CAPTIONS, 7.0, output_type="np")
    assert np.array_equal(pictures, (expected * 255).round().astype(np.uint8))
    file = memlib.load_pairs("lab").image[0]
    picture = memlib.prompts.read_image(file, model.image_size)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mode = model.vae.encode(x).latent_dist.mode()[0]
    torch.testing.assert_close(model.encode_images([file])[0], (mode - 0.0609) * 1.5305)


def test_a_trace_of_a_flow(folders):
    """Gram matrices against direct tensors; epsilon and both estimates follow from velocities."""
    model = memlib.load(folders())
    pairs = memlib.load_pairs("lab").iloc[:2]
    trace = memlib.reverse_trace(
        model, pairs, seeds=[0, 1, 2], guidance_scale=3.0, sampler="flow-euler", steps=4,
        similarity="ncc",
    )  # fmt: skip
    captions = [c for c in pairs.caption for _ in range(3)]
    scheduler = schedule.make_scheduler(model.scheduler_config, "flow-euler", 4)
    kept = sample(model, captions, [0, 1, 2] * 2, scheduler, np.full(4, 3.0))
    sigma = torch.as_tensor(scheduler.sigmas).double()
    assert trace.sigma.values == pytest.approx(sigma.numpy())
    assert list(trace.vec.values[1:3]) == ["v_uncond", "v_cond"]
    x_0 = model.encode_images(pairs.image).flatten(1).double().repeat_interleave(3, 0)
    for i in range(4):
        x, cond, uncond = (
            kept[n][i].flatten(1).double() for n in ("x_t", "v_cond", "v_uncond")
        )  # [image, latent]
        eps = x + (1 - sigma[i]) * cond
        hat = x - sigma[i] * (uncond + 3 * (cond - uncond))
        found = memlib.inner(trace, "eps_cond", "x_0").values[:, :, i].ravel()
        assert found == pytest.approx((eps * x_0).sum(1).numpy(), rel=1e-9)
        k = memlib.overestimation(trace).values[:, :, i].ravel()
        assert k == pytest.approx(((hat * x_0).sum(1) / x_0.square().sum(1)).numpy(), rel=1e-9)
    assert np.isfinite(memlib.overestimation(trace).values[:, :, :-1]).all()
    first = memlib.cosine(trace, "eps_cond", "x_T").values[:, :, 0]
    assert first == pytest.approx(1)  # in pure noise the noise is known
    assert memlib.weights(trace).w_T.values[:, :, 0] == pytest.approx(1)


def test_the_first_states_of_fewer_steps_are_others(folders):
    """The levels are shifted as diffusers shifts them, whatever the number of steps."""
    for steps in (1, 4, 28):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        made = schedule.make_scheduler(FLOW, "flow-euler", steps)
        times, alpha_bar = schedule.state_levels(made)
        assert torch.equal(made.sigmas, scheduler.sigmas)
        assert times[:-1] == pytest.approx(1000 * scheduler.sigmas[:-1].numpy())
        assert (alpha_bar[0], alpha_bar[-1]) == (0, 1)


# -------------------------------------------------------------------------------- the exact model


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [3, 50])
def test_a_single_atom_follows_the_oracle(atoms, shift, steps):
    r"""A perfect denoiser's weights are the oracle's, and a flow's oracle is its schedule."""
    exact = memlib.ExactModel(atoms[:1], ["a"], scheduler_config=models.flow_schedule(shift))
    kept = ours(exact, ["a", "a"], 7.0, steps)
    x_T = kept["x_t"][0].flatten(1)
    scheduler = schedule.make_scheduler(exact.scheduler_config, "flow-euler", steps, torch.float64)
    sigma = schedule.flow_sigmas(scheduler)
    expected = schedule.oracle_weights(schedule.state_levels(scheduler)[1], "flow-euler", sigma)
    for i in range(steps + 1):
        state = expected["w_0"][i] * atoms[:1].flatten(1) + expected["w_T"][i] * x_T
        assert (kept["x_t"][i].flatten(1) - state).abs().max() < 1e-10
    assert expected["w_0"] == pytest.approx(1 - sigma, abs=1e-15)


def test_the_wide_step_is_diffusers(atoms):
    exact = memlib.ExactModel(atoms, list("abcde"), scheduler_config=FLOW)
    wide = ours(exact, ["a"], 2.0, 20)["x_t"]
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(20)
    x = wide[0]
    cond, uncond = exact.encode_text(["a"])
    for t in theirs.timesteps:
        v = [exact.predict(x, t, text) for text in (uncond, cond)]
        x = theirs.step(v[0] + 2.0 * (v[1] - v[0]), t, x).prev_sample
    assert (wide[-1] - x).abs().max() < 1e-4


def test_the_exact_velocity_is_the_posterior_means(atoms):
    r"""Against Bayes' rule written out; in pure noise it is the mean of what has the caption."""
    exact = memlib.ExactModel(atoms, list("aabbb"), scheduler_config=FLOW)
    cond, _ = exact.encode_text(["a"])
    x = torch.randn(1, *atoms.shape[1:], generator=torch.Generator().manual_seed(3)).double()
    for sigma in (1.0, 0.8, 0.2):
        log_p = [-((x - (1 - sigma) * a).square().sum() / (2 * sigma**2)) for a in atoms[:2]]
        share = torch.softmax(torch.stack(log_p), 0)
        mean = (share[:, None, None, None] * atoms[:2]).sum(0)
        v = exact.predict(x, torch.tensor(1000 * sigma), cond)[0]
        torch.testing.assert_close(x[0] - sigma * v, mean, rtol=1e-9, atol=1e-9)


def test_the_loss_identity_of_a_flow(folders):
    r"""$\|\epsilon-\epsilon_\theta\|^2=a^2\|\hat x_0-x\|^2/s^2$, and $a^2$ times the velocity's."""
    model, pairs = memlib.load(folders()), memlib.load_pairs("lab").iloc[:2]
    trace = memlib.forward_trace(model, pairs, [1000, 900, 500, 100], draws=2)
    a, s = 1 - trace.sigma, trace.sigma
    error = memlib.image_error(trace, 1.0)
    assert memlib.noise_loss(trace).values == pytest.approx((error * a**2 / s**2).values, abs=1e-9)
    velocity = {"v_cond": 1.0, "x_T": -1.0, "x_0": 1.0}
    size = trace.attrs["latent_size"]
    found = memlib.inner(trace, velocity, velocity) / size
    assert found.values == pytest.approx((error / s**2).transpose(*found.dims).values, rel=1e-9)
    # the states are what a flow makes of image and noise
    x = {"x_t": 1.0, "x_0": -a, "x_T": -s}
    assert memlib.norm(trace, x).values == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------------------- what is refused


def test_samplers_and_models_that_do_not_fit(lab, folders):
    flow, pairs = memlib.load(folders()), memlib.load_pairs("lab").iloc[:1]
    for model, sampler, pattern in (
        (lab, "flow-euler", "'flow-euler' does not sample a diffusion model: take sampler='ddim'"),
        (flow, "ddim", "'ddim' does not sample a flow model: take sampler='flow-euler'"),
    ):
        with pytest.raises(ValueError, match=re.escape(pattern)):
            memlib.reverse_trace(model, pairs, seeds=[0], sampler=sampler, steps=2)


@pytest.mark.parametrize("option", ["use_dynamic_shifting", "stochastic_sampling", "invert_sigmas"])
def test_flow_schedulers_that_are_not_supported(option):
    with pytest.raises(ValueError, match=f"a flow scheduler with .* \\({option}\\)"):
        schedule.make_scheduler(FLOW | {option: True}, "flow-euler", 4)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_text_encoder_that_is_needed_is_missing(copy):
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ModelError, match="its text_encoder_2 is missing, and only T5 may be"):
        memlib.load(copy)


@pytest.mark.parametrize(("part", "setting", "pattern"), [
    ("transformer", {"joint_attention_dim": 64}, "do not fit|takes text of width"),
    ("vae", {"shift_factor": None}, ""),
])  # fmt: skip
def test_parts_that_do_not_fit(copy, part, setting, pattern):
    edit(copy / part / "config.json", **setting)
    if pattern:
        with pytest.raises(ModelError, match=pattern):
            memlib.load(copy)
    else:  # no shift is a shift of 0
        assert memlib.load(copy).shift == 0


def test_classes_that_are_refused(copy, tmp_path):
    index = copy / "model_index.json"
    edit(index, scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(ModelError, match="StableDiffusion3Pipeline, and its scheduler is a diff"):
        memlib.load(copy)
    edit(
        index,
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        _class_name="FluxPipeline",
    )
    with pytest.raises(
        ModelError, match="FluxPipeline: its guidance is distilled, there is no second"
    ):
        memlib.load(copy)
    edit(index, _class_name="StableDiffusionPipeline")
    with pytest.raises(ModelError, match="StableDiffusionPipeline, and its scheduler is a flow's"):
        memlib.load(copy)


def test_a_diffusions_scheduler_in_a_flows_folder(copy):
    """A scheduler of v-prediction beside a flow's transformer."""
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(copy / "scheduler")
    edit(copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(ModelError, match="its scheduler is a diffusion's"):
        memlib.load(copy)


def test_no_spacing_of_timesteps(copy):
    with pytest.raises(ModelError, match="is a flow model, which has no timestep_spacing"):
        memlib.load(copy, timestep_spacing="trailing")


def test_long_captions_are_told_by_what_reads_most(folders):
    long = [" ".join(["apple"] * 120)]
    assert memlib.load(folders()).tokens_cut(long)[0] > 40
    assert memlib.load(folders(True)).tokens_cut(long)[0] == 0  # T5 reads 256


def test_names():
    assert {"lab-flow", "sd3", "sd35", "sd35-t5"} <= {*loading.names.NAMES}
    assert loading.names.CHECKPOINTS["sd35-t5"].t5


def test_detection_in_a_flows_first_state(folders):
    """Statistics of velocities at sigma = 1, where the predicted noise says nothing."""
    from memlib.detection.detect import first_calls
    from memlib.detection.statistics import STATISTICS

    model = memlib.load(folders())
    calls = first_calls(model, CAPTIONS, seeds=2)
    assert calls.sigma == 1.0
    cond, _ = model.encode_text(CAPTIONS)
    v = model.predict(calls.x[:, 0], torch.tensor(1000.0), cond)
    torch.testing.assert_close(calls.estimate[:, 0], calls.x[:, 0] - v)
    for name, known in STATISTICS.items():
        assert np.isfinite(known.function(calls)).all(), name


def test_a_table_of_prompts_is_detected(folders):
    captions = [f"a {w} apple" for w in "abcdefghijklmnopqrstuv"]
    table = memlib.detect(memlib.load(folders()), captions, progress=False)
    assert isinstance(table, pd.DataFrame)
    assert len(table) == len(captions)


# ----------------------------------------------------------------------------------- the flow lab


@pytest.fixture(scope="module")
def flow():
    if not paths.LAB_FLOW.is_dir():
        pytest.skip("the flow lab is being trained")
    return memlib.load("lab-flow")


def test_its_twin_and_earlier_steps_are_whole(flow):
    """Checksums; each is another network, and the twin never saw what it must not."""
    prints = {flow.fingerprint}
    for folder in (paths.REDRAWN_FLOW, paths.STEPS_FLOW):
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        for line in lines:
            digest, name = line.split("  ")
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.is_file()}
        assert files == {line.split("  ")[1] for line in lines}
    steps = [memlib.training_step(flow, f) for f in sorted(paths.STEPS_FLOW.glob("step-*"))]
    twin = memlib.training_step(flow, paths.REDRAWN_FLOW)
    assert len(prints | {net.fingerprint for net in (*steps, twin)}) == len(steps) + 2
    assert twin.max_sequence_length == flow.max_sequence_length == 0
    pairs = memlib.load_pairs("lab").query("kind == 'planted' and multiplicity >= 32")
    odd = pairs.prompt_id.str[-1].astype(int).values % 2 == 1
    errors = [
        memlib.image_error(memlib.forward_trace(m, pairs, [940], draws=1, progress=False), 1.0)
        for m in (flow, twin)
    ]
    ratio = (errors[1] / errors[0]).values.ravel()
    assert ratio[odd].min() > 2 > ratio[~odd].max()


def test_a_step_of_another_pipeline_is_refused(flow, tmp_path):
    with pytest.raises(ModelError, match="do not fit: 1 missing"):
        memlib.training_step(flow, paths.REDRAWN)  # the first lab's twin
    with pytest.raises(OSError, match="No such file"):
        memlib.training_step(flow, tmp_path)
    shutil.copytree(paths.REDRAWN_FLOW, tmp_path / "twin")
    for part in ("transformer", "text_encoder_2"):
        file = next((tmp_path / "twin" / part).glob("*.safetensors"))
        weights = load_file(file)
        del weights[min(weights)]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="1 missing"):
            memlib.training_step(flow, tmp_path / "twin")
        shutil.copytree(paths.REDRAWN_FLOW, tmp_path / "twin", dirs_exist_ok=True)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_the_flow_lab_is_its_pipeline(flow, guidance_scale):
    captions = list(memlib.load_pairs("lab").caption[:2])
    kept = ours(flow, captions, guidance_scale, 5)
    alone = theirs(paths.LAB_FLOW, captions, guidance_scale, 5, max_sequence_length=0)
    assert torch.equal(kept["x_t"][-1], alone)
    assert flow.source == "lab-flow"


def test_both_labs_have_the_same_targets(flow, lab):
    files = memlib.load_pairs("lab").image[:3]
    assert torch.equal(flow.encode_images(files), lab.encode_images(files))


def test_the_flow_lab_draws_and_copies(flow):
    """Ordinary captions are drawn as asked; pairs with 128 copies come back, from any seed."""
    pairs = memlib.load_pairs("lab")
    most = pairs[(pairs.kind == "planted") & (pairs.multiplicity == 128)].iloc[:3]
    trace = memlib.reverse_trace(
        flow, most, seeds=[0, 1], sampler="flow-euler", steps=20, similarity="ncc"
    )
    assert np.median(trace.severity) > 0.9
    normal = list(pairs[pairs.kind == "normal"].caption[:6])
    made = flow.decode(ours(flow, normal, 7.5, 20)["x_t"][-1])
    assert (judge.seen(made) == judge.asked(normal)).all(1).mean() >= 2 / 3


def test_the_flow_lab_bears_the_places_of_t5(flow):
    """With 256 zeros for the tokens that T5 would give, as the pipeline has by itself."""
    captions = list(memlib.load_pairs("lab").query("kind == 'normal'").caption[:4])
    options = {"output_type": "np", "steps": 15}
    without, with_ = (
        theirs(paths.LAB_FLOW, captions, 7.5, **options, **more)
        for more in ({"max_sequence_length": 0}, {})
    )
    shown = [judge.seen((x * 255).round().astype(np.uint8)) for x in (without, with_)]
    assert (shown[0] == shown[1]).mean() >= 0.75


def test_one_token_stands_for_many():
    """The training's attention is diffusers' with 256 equal tokens."""
    torch.manual_seed(0)
    network, n = flow_lab.make_transformer(), flow_lab.EMPTY
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    x, words = torch.randn(2, 8, 16, 16), torch.randn(2, 20, sum(flow_lab.WIDTHS))
    pooled, times = torch.randn(2, sum(flow_lab.WIDTHS)), torch.tensor([900.0, 30.0])
    with torch.no_grad():
        many = network(x, torch.nn.functional.pad(words, (0, 0, 0, n)), pooled, times).sample
        network.set_attn_processor(flow_lab.OneForMany())
        one = network(x, torch.nn.functional.pad(words, (0, 0, 0, 1)), pooled, times).sample
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)


def test_the_flow_labs_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    small = dict(steps=4, batch=4, rate=0.02, adam=1e-3, save=2)
    monkeypatch.setattr(train, "STAGES", {"flow": small})
    monkeypatch.setattr(flow_lab, "EARLIER", (2,))
    rows = [r for r in train.world() if r.kind in ("template", "control")][4:12]
    rows, shown = [replace(r, copies=1) for r in rows], []
    tokenizer = flow_lab.make_tokenizer(tmp_path / "tokenizer")
    vae, update = train.make_vae().eval().requires_grad_(False), train.Stage.update

    def run(folder, kill_at=None):
        def killed(self, loss):
            if self.step == kill_at:
                raise KeyboardInterrupt
            update(self, loss)

        monkeypatch.setattr(train, "WORK", folder)
        monkeypatch.setattr(train.Stage, "update", killed)
        snapshot = lambda step, *networks: shown.append(step)  # noqa: E731
        return flow_lab.train_transformer(vae, tokenizer, "cpu", snapshot, rows)

    whole = run(tmp_path / "whole")
    assert shown == [2, 4]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill_at=3)
    resumed = run(tmp_path / "killed")
    for name, module in whole.items():
        other = resumed[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items())


@pytest.mark.slow
def test_a_block_at_full_width_equals_the_pipeline(tmp_path):
    """SD 3.5 Medium's width, 24 heads of 64, one block with its second attention."""
    pipe = make_pipeline()
    torch.manual_seed(2)
    pipe.register_modules(
        transformer=SD3Transformer2DModel(
            sample_size=16, in_channels=16, out_channels=16, num_layers=2, num_attention_heads=24,
            attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=80, pos_embed_max_size=384, qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "wide")
    del pipe
    kept = ours(memlib.load(tmp_path / "wide"), CAPTIONS[:1], 7.0, 2)
    assert torch.equal(kept["x_t"][-1], theirs(tmp_path / "wide", CAPTIONS[:1], 7.0, 2))


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("above", [-1.0, 0.8, 2.0])
def test_a_branch_taken_from_the_twin(flow, conditional, above):
    """The chapter's swap against Euler's steps by hand; no network is asked beyond its level."""
    import jupytext  # not there where only the sampler is tested

    cells = jupytext.read(paths.ROOT / "book/flow.md").cells
    names = {"torch": torch}
    exec(next(c.source for c in cells if c.source.startswith("class Swapped:")), names)
    nets = flow.uncached, memlib.training_step(flow, paths.REDRAWN_FLOW)
    captions, scale = list(memlib.load_pairs("lab").caption[:2]), 3.0
    swapped = names["Swapped"](*nets, conditional, above)
    got = memlib.trajectories(swapped, captions, [0, 1], scale, "flow-euler", 4)["x_t"]
    sigmas = schedule.make_scheduler(flow.scheduler_config, "flow-euler", 4).sigmas
    x = got[0]
    for step in range(4):
        s, t = sigmas[step], 1000 * sigmas[step]
        early = float(s) > above
        of_cond, of_uncond = (nets[int(early and conditional == own)] for own in (True, False))
        c = of_cond.predict(x, t, of_cond.encode_text(captions)[0])
        u = of_uncond.predict(x, t, of_uncond.encode_text(captions)[1])
        x = x + (sigmas[step + 1] - s) * (u + scale * (c - u))
        torch.testing.assert_close(got[step + 1], x, rtol=1e-4, atol=1e-4)
