"""Stable Diffusion's real architectures with random weights: the proof that needs no checkpoint."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import memlib
from memlib import models, paths, schedule
from memlib.models import ModelError
from memlib.sampler import sample

SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
CAPTIONS = ["a red apple on a blue background", "a dog", ""]

# The published configurations; FAMILIES change the widths alone.
UNET = dict(
    in_channels=4, out_channels=4, layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)  # fmt: skip
SD1 = UNET | dict(attention_head_dim=8)
SD2 = UNET | dict(use_linear_projection=True, upcast_attention=True)
FAMILIES = {  # unet, text encoder, prediction type
    "sd14": (SD1, dict(hidden_act="quick_gelu", num_hidden_layers=3), "epsilon"),
    "sd21": (
        SD2 | dict(attention_head_dim=(2, 4, 8, 8)),
        dict(hidden_act="gelu", num_hidden_layers=4), "v_prediction",
    ),
    "sd21-base": (
        SD2 | dict(attention_head_dim=(2, 4, 8, 8)),
        dict(hidden_act="gelu", num_hidden_layers=4), "epsilon",
    ),
}  # fmt: skip


def make_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4,
        sample_size=128, scaling_factor=0.18215,
    )  # fmt: skip


def make_pipeline(family: str) -> StableDiffusionPipeline:
    unet, text, prediction = FAMILIES[family]
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(paths.LAB / "tokenizer", model_max_length=77)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **text,
    ))  # fmt: skip
    network = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, **unet
    )
    config = models.stable_diffusion_schedule() | {"prediction_type": prediction}
    config.pop("_use_default_values")  # it would undo the line above
    return StableDiffusionPipeline(
        vae=make_vae(), text_encoder=encoder, tokenizer=tokenizer, unet=network,
        scheduler=DDIMScheduler.from_config(config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A function that saves a family's pipeline and returns its folder."""

    @functools.cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoints") / family
        make_pipeline(family).save_pretrained(folder)
        return folder

    return save


def theirs(folder, captions, sampler, guidance_scale, steps=4):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(s) for s in range(len(captions))]
    return pipe(
        captions, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators,
        output_type="latent",
    ).images  # fmt: skip


def ours(model, captions, sampler, guidance_scale, steps=4):
    scheduler = schedule.make_scheduler(model.scheduler_config, sampler, steps)
    guidance = schedule.guidance_values(guidance_scale, steps)
    return sample(model, captions, range(len(captions)), scheduler, guidance)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_equal_the_pipeline(folders, family, sampler, guidance_scale, batch):
    model = memlib.load(folders(family))
    kept = ours(model, CAPTIONS[:batch], sampler, guidance_scale)
    assert torch.equal(
        kept["x_t"][-1], theirs(folders(family), CAPTIONS[:batch], sampler, guidance_scale)
    )


def test_v_is_recorded_as_epsilon(folders):
    """The update of DDIM, written out, takes the recorded noise from state to state."""
    model = memlib.load(folders("sd21"))
    kept = ours(model, CAPTIONS[:1], "ddim", 7.5)
    scheduler = schedule.make_scheduler(model.scheduler_config, "ddim", 4)
    _, alpha_bar = schedule.state_levels(scheduler)
    for i in range(4):
        cond, uncond = kept["eps_cond"][i].double(), kept["eps_uncond"][i].double()
        eps = uncond + 7.5 * (cond - uncond)
        x, a, after = kept["x_t"][i].double(), alpha_bar[i], alpha_bar[i + 1]
        x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        expected = after**0.5 * x_0 + (1 - after) ** 0.5 * eps
        torch.testing.assert_close(kept["x_t"][i + 1].double(), expected, rtol=1e-4, atol=1e-4)
    raw = model.predict(kept["x_t"][0], 751, model.encode_text(CAPTIONS[:1])[0])
    assert (kept["eps_cond"][0] - raw).abs().max() > 0.1  # it is not what the network put out


def test_a_trace_of_a_checkpoint(folders, tmp_path):
    """Through the public API: a prompt with an image, one without."""
    file = tmp_path / "pairs.csv"
    lab = memlib.load_pairs("lab")
    file.write_text(f"caption,image\na dog,{lab.image[0]}\nno picture,\n")
    model = memlib.load(folders("sd14"))
    trace = memlib.reverse_trace(model, memlib.load_pairs(file), seeds=[0, 1], steps=3)
    assert trace.image.shape == (2, 2, 128, 128, 3)
    assert np.isfinite(trace.severity[0]).all()
    assert np.isnan(trace.severity[1]).all()
    blind = memlib.deviations(trace, basis="x_gen")
    assert np.isfinite(blind[["D1", "D2"]]).all(axis=None)
    assert np.isnan(memlib.deviations(trace).D1[1])
    forward = memlib.forward_trace(model, memlib.load_pairs(file).iloc[:1], [500], draws=2)
    assert np.isfinite(memlib.noise_loss(forward)).all()


def test_an_external_vae(folders, tmp_path):
    vae = make_vae(seed=5)
    vae.save_pretrained(tmp_path / "vae")
    plain, other = memlib.load(folders("sd14")), memlib.load(folders("sd14"), vae=tmp_path / "vae")
    x = torch.randn(1, *other.latent_shape)
    with torch.no_grad():
        out = vae.eval().decode(x / vae.config.scaling_factor).sample
    expected = ((out / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(other.decode(x), expected, atol=1)
    assert (plain.decode(x) != other.decode(x)).any()
    assert plain.fingerprint != other.fingerprint
    with pytest.raises(ModelError, match=r"the VAE .* cannot be loaded"):
        memlib.load(folders("sd14"), vae=folders("sd14") / "unet")


# ------------------------------------------------------------------------------- half precision


def test_half_precision_is_the_network_alone(folders):
    """bfloat16: states, noise and text in float32; the numbers near those of float32."""
    full, half = memlib.load(folders("sd14")), memlib.load(folders("sd14"), dtype="bfloat16")
    a, b = (ours(m, CAPTIONS[:2], "ddpm", 7.5) for m in (full, half))
    assert {t.dtype for t in b.values()} == {torch.float32}
    assert torch.equal(a["x_t"][0], b["x_t"][0])
    assert torch.equal(a["noise"], b["noise"])
    assert half.encode_text(["a dog"])[0].dtype == torch.float32
    assert not torch.equal(a["eps_cond"], b["eps_cond"])
    torch.testing.assert_close(a["eps_cond"][0], b["eps_cond"][0], rtol=0.1, atol=0.05)


def test_fp16_overflow_is_done_again_in_float32(folders):
    pairs = pd.DataFrame(
        {"prompt_id": ["0", "1"], "caption": ["a dog", "a cat"], "image": ["", ""]}
    )
    options = dict(seeds=[0, 1], steps=2, similarity=None, images=False, progress=False)
    full, half = memlib.load(folders("sd14")), memlib.load(folders("sd14"), dtype="float16")
    for model in (full, half):  # a huge weight on the way in, taken back on the way out
        with torch.no_grad():
            model.unet.conv_in.weight *= 2**18
            model.unet.conv_in.bias *= 2**18
    with pytest.warns(UserWarning, match=r"not finite in float16; this batch is done in float32"):
        trace = memlib.reverse_trace(half, pairs, batch_size=2, **options)
    assert int(trace.float32_fallback.sum()) == 4
    assert half.unet.dtype == torch.float16
    expected = memlib.reverse_trace(full, pairs, batch_size=2, **options)
    assert int(expected.float32_fallback.sum()) == 0
    np.testing.assert_allclose(
        memlib.norm(trace, "x_gen"), memlib.norm(expected, "x_gen"), rtol=1e-2
    )


def test_attention_is_upcast():
    """SD v2.1's scores overflow float16; torch's fused attention keeps them in float32."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, 8, 64, dtype=torch.float16) * 200
    v = torch.randn(1, 2, 8, 64, dtype=torch.float16)
    assert not torch.isfinite(q @ q.mT).all()
    out = torch.nn.functional.scaled_dot_product_attention(q, q, v)
    wide = torch.nn.functional.scaled_dot_product_attention(q.float(), q.float(), v.float())
    torch.testing.assert_close(out.float(), wide, rtol=1e-2, atol=1e-2)


def test_memory_halves_the_batch(folders, monkeypatch):
    """Nothing that was sampled is lost, and nothing is sampled twice."""
    model = memlib.load(folders("sd14"))
    pairs = pd.DataFrame({"prompt_id": ["0"], "caption": ["a dog"], "image": [""]})
    options = dict(seeds=range(7), steps=1, similarity=None, images=False, progress=False)
    expected = memlib.reverse_trace(model, pairs, batch_size=2, **options)
    sizes, predict = [], model.predict

    def small_card(x_t, timestep, text):
        sizes.append(len(x_t) // 2)
        if len(x_t) > 4:
            raise torch.OutOfMemoryError("a pretended card")
        return predict(x_t, timestep, text)

    monkeypatch.setattr(model, "predict", small_card)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = memlib.reverse_trace(model, pairs, batch_size=5, **options)
    assert sizes == [5, 2, 2, 2, 1]
    np.testing.assert_array_equal(found.gram, expected.gram)
    monkeypatch.setattr(
        model, "predict", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError())
    )
    with pytest.raises(MemoryError, match="a single image does not fit"):
        memlib.reverse_trace(model, pairs, **options)


def test_a_card_too_small_for_the_weights(folders, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("a pretended card")

    monkeypatch.setattr(torch.nn.Module, "to", no_room)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    with pytest.raises(ModelError, match=r"does not fit .* 1\.0 of 2\.0 GiB are free"):
        memlib.load(folders("sd14"))


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "a StableDiffusionXLPipeline; supported"),
        (
            {"_class_name": "FluxPipeline"},
            "a FluxPipeline: its guidance is distilled, .*; supported",
        ),
        (
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            "its scheduler is a flow's",
        ),
    ],
)
def test_other_models_are_refused(folders, tmp_path, change, pattern):
    index = json.loads((folders("sd14") / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ModelError, match=pattern) as error:
        memlib.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (dict(dtype="fp16"), "unknown dtype 'fp16': did you mean 'float16'"),
        (dict(device="gpu"), "unknown device 'gpu'"),
        (dict(device="cuda"), "torch finds no GPU here"),
    ],
)
def test_device_and_dtype(folders, options, pattern):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match=pattern):
        memlib.load(folders("sd14"), **options)


# ------------------------------------------------------------------------------------- a fake Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


CHAPTERS = ["index", "predictions", "convergence", "decomposition", "overestimation"]
SIZES = (
    "steps=3 seeds=2 ddpm_seeds=2 uncaptioned=2 many=3 "
    "scales=(3,) sweep_every=2 sweep_seeds=1 unguided_seeds=1"
)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as downloading needs. `folder` holds owner/name."""

    folder: Path
    stalled: str = ""  # the file whose download stops half way

    def log_message(self, *_):
        pass

    def refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        repository = self.folder / owner / name
        if owner == "gated":
            return self.refuse(403, "GatedRepo")
        if not repository.is_dir():
            return self.refuse(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        files = sorted(p for p in repository.rglob("*") if p.is_file())
        names = [p.relative_to(repository).as_posix() for p in files]
        if api:
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n}
                    for n, p in zip(names, files, strict=True)]  # fmt: skip
            info = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": COMMIT,
                    "siblings": [{"rfilename": n} for n in names]}  # fmt: skip
            data = json.dumps(tree if rest[:1] == ["tree"] else info).encode()
        else:
            file = repository.joinpath(*rest[2:])
            if not file.is_file():
                return self.refuse(404, "EntryNotFound")
            data = file.read_bytes()
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            stall = bool(self.stalled) and self.path.endswith(self.stalled)
            self.wfile.write(data[begin : len(data) // 2 if stall else None])
            self.begun.append((self.path.rsplit("/", 1)[-1], begin))
            if stall:
                self.wfile.flush()
                self.killed.wait(60)


@pytest.fixture
def hub(folders, tmp_path, forks, hub_of_ours):
    """Run a script with a fake Hub as the Hub; returns (exit status, output, error output)."""
    shutil.rmtree(hub_of_ours["HF_HOME"], ignore_errors=True)
    shutil.copytree(folders("sd14"), tmp_path / "hub/some/model")
    shutil.copytree(folders("sd14") / "vae", tmp_path / "hub/some/vae")
    (tmp_path / "hub/some/nothing").mkdir()
    (tmp_path / "hub/some/nothing/README.md").write_text("no pipeline")
    pickled = tmp_path / "hub/some/pickled"
    shutil.copytree(folders("sd14"), pickled)
    for file in pickled.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    xl = tmp_path / "hub/some/xl"
    xl.mkdir()
    (xl / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    own = {"folder": tmp_path / "hub", "begun": [], "killed": threading.Event()}
    handler = type("OneHub", (Hub,), own)
    port = int(hub_of_ours["HF_ENDPOINT"].rsplit(":", 1)[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    environment = os.environ | hub_of_ours | {"MEMLIB_CACHE": str(tmp_path / "cache")}

    def run(script: str, **more):
        read = {name: value for name, value in more.items() if name.startswith("HF_")}
        result = subprocess.run(
            [*forks(**hub_of_ours, **read), "-c", f"import memlib\n{script}"],
            env=environment | more, capture_output=True, text=True,
        )  # fmt: skip
        return result.returncode, result.stdout, result.stderr.strip().splitlines()[-1:]

    run.handler, run.server, run.environment = handler, server, environment
    run.home = Path(hub_of_ours["HF_HOME"])
    yield run
    server.shutdown()
    server.server_close()


AT_ONCE = "import time; time.sleep = lambda seconds: None\n"  # the Hub's library tries for 23 s
RECORD = """
import pandas as pd
pairs = pd.DataFrame({"prompt_id": ["0"], "caption": ["a dog"], "image": [""]})
trace = memlib.cached(memlib.reverse_trace, memlib.load("some/model"), pairs, seeds=[0], steps=2,
                        similarity=None)
import os
from memlib.sampler import sample
from memlib.schedule import guidance_values, make_scheduler
model = memlib.load("some/model")  # and what chapters ask directly
scheduler = make_scheduler(model.scheduler_config, "ddpm", 2)
kept = sample(model, ["a dog"], [1], scheduler, guidance_values(7.5, 2))
pictures = model.decode(kept["x_t"][-1] + float(os.environ.get("WOBBLE", 0)))
eps = model.predict(kept["x_t"][0], scheduler.timesteps[0], model.encode_text(["a dog"])[0])
eps = model.to_epsilon(eps, kept["x_t"][0], 0.5)
print(float(memlib.norm(trace, "x_gen")[0, 0, 0]), trace.attrs["fingerprint"],
      float(kept["x_t"].sum()), int(pictures.sum()), float(eps.sum()))
"""


def test_a_model_of_the_hub(hub):
    """Downloaded once, then read without a network; its traces even without its weights."""
    status, out, error = hub(RECORD)
    assert status == 0, error
    fingerprint, first = out.split()[1], out.split()
    assert fingerprint == f"some/model@{COMMIT}"
    script = 'print(memlib.load("some/model@main", vae="some/vae").fingerprint)'
    status, out, error = hub(script)
    assert status == 0, error
    assert out.strip() == f"some/model@{COMMIT} vae some/vae@{COMMIT}"
    hub.server.shutdown()
    hub.server.server_close()
    status, out, error = hub(AT_ONCE + 'print(memlib.load("some/model").fingerprint)')  # no server
    assert (status, out.strip()) == (0, fingerprint), error
    shutil.rmtree(hub.home)
    for wobble in ("0", "1e-6"):  # no weights: what was recorded is found, also if rounded anew
        status, out, error = hub(RECORD, HF_HUB_OFFLINE="1", WOBBLE=wobble)
        assert status == 0, error
        assert out.split() == first
    status, out, error = hub(RECORD, HF_HUB_OFFLINE="1", WOBBLE="0.5")  # another picture
    assert "this was not recorded" in error[0]
    # Nor is it a crash where the run is there in part: one piece of its own folder is lost.
    cache = Path(hub.handler.folder).parent / "cache"
    lost = next(cache.glob("reverse_trace-*/sha256/0.0.0.0"), None) or next(
        cache.rglob("sha256/0*")
    )
    kept = lost.read_bytes()
    lost.unlink()
    status, out, error = hub(RECORD, HF_HUB_OFFLINE="1")
    assert "this was not recorded" in error[0]
    lost.write_bytes(kept)
    status, out, error = hub(RECORD.replace("steps=2", "steps=3"), HF_HUB_OFFLINE="1")
    assert status
    assert "this was not recorded, and the weights of some/model are not here" in error[0]
    assert "memlib fetch some/model" in error[0]


def test_sampling_keeps_no_states(hub):
    """`reverse_trace` on a Hub model returns inner products; nothing is left on the disk."""
    settings = "seeds=[0], steps=2, similarity=None"
    call = f'memlib.reverse_trace(memlib.load("some/model"), pairs, {settings})'
    status, _, error = hub(RECORD.split("trace =")[0] + call)
    assert status == 0, error
    assert not (Path(hub.handler.folder).parent / "cache").exists()


def test_another_revision_is_another_model(hub):
    """The traces of one do not stand in for the other's."""
    status, _, error = hub(RECORD)
    assert status == 0, error
    shutil.rmtree(hub.home)
    for option in ('revision="v9"', 'vae="some/vae"'):
        status, _, error = hub(f'memlib.load("some/model", {option})', HF_HUB_OFFLINE="1")
        assert status
        assert "cannot be downloaded" in error[0]


def test_fetching_weights(hub):
    """What has a card but no weights is read from its traces, until they are fetched."""
    status, _, error = hub(RECORD)
    assert status == 0, error
    shutil.rmtree(hub.home)
    kind = 'print(type(memlib.load("some/model").uncached).__name__)'
    assert hub(kind)[1].strip() == "RecordedModel"
    fetch = 'from memlib import cli; raise SystemExit(cli.main(["fetch", "some/model"]))'
    status, out, error = hub(fetch)
    assert status == 0, error
    assert out.strip().endswith(COMMIT)
    assert hub(kind)[1].strip() == "AcceleratedModel"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gated/model", "gated/model is gated: accept its licence"),
        ("some/other", "the Hub has no repository 'some/other'"),
        ("some/model@v9", "some/model has no revision 'v9'"),
        ("some/nothing", "some/nothing has no file model_index.json"),
        ("some/pickled", "no weights in safetensors format (unet/)"),
        ("some/xl", "some/xl is a StableDiffusionXLPipeline; supported"),
    ],
)
def test_what_the_hub_refuses(hub, name, pattern):
    status, _, error = hub(f"memlib.load({name!r})")
    assert status
    assert "ModelError" in error[0]
    assert pattern in error[0], error[0]


def test_without_a_network(hub):
    hub.server.shutdown()
    hub.server.server_close()
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        status, _, error = hub(AT_ONCE + 'memlib.load("sd14")', **more)
        assert status
        assert "CompVis/stable-diffusion-v1-4@133a221b" in error[0]
        assert "is not on this machine and cannot be downloaded" in error[0], error[0]


def test_a_killed_download_goes_on(hub):
    """Half a file is no model; the next run fetches what is missing."""
    hub.handler.stalled = "unet/diffusion_pytorch_model.safetensors"
    script = 'import memlib; memlib.load("some/model")'
    with subprocess.Popen([sys.executable, "-c", script], env=hub.environment) as process:
        while hub.handler.begun[-1:] != [("diffusion_pytorch_model.safetensors", 0)]:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        process.kill()
    hub.handler.stalled = ""
    hub.handler.killed.set()
    status, _, error = hub('memlib.load("some/model")', HF_HUB_OFFLINE="1")
    assert status
    assert "ModelError" in error[0]
    status, _, error = hub('memlib.load("some/model")')
    assert status == 0, error


@pytest.mark.slow
def test_a_book_travels(hub, tmp_path):
    """Chapters on a model of the Hub; then once more on a machine without its weights."""
    pairs = memlib.load_pairs("lab").query("kind in ('template', 'control')")
    pairs.iloc[:6].assign(kind=["memorized"] * 2 + ["template"] + ["control"] * 3).drop(
        columns="multiplicity"
    ).to_csv(tmp_path / "pairs.csv", index=False)
    script = f"""
import json, os, pathlib
from memlib.paths import ROOT
from memlib.site import chapters, forked, run
read = chapters.read(ROOT)
defaults = {{name: chapters.parameters(name, read[name]) for name in {CHAPTERS}}}
sizes = "{SIZES} pairs={tmp_path / "pairs.csv"}"
chosen = chapters.choose(defaults, "full", {{}}, sizes, "some/model")
with forked.python(os.environ | run.of_kernels()) as python:
    for name in defaults:
        made = pathlib.Path("{tmp_path / "made"}")
        run.execute(name, read[name], chosen[name], made, python=python)
"""

    def results() -> dict:
        found = {
            p.name: json.loads(p.read_text())
            for p in (tmp_path / "made/work/results/model").rglob("*.json")
        }
        shutil.rmtree(tmp_path / "made")
        return found

    status, _, error = hub(script)
    assert status == 0, error
    there = results()
    assert {"converge-earlier.json", "conditional-aligned.json"} <= there.keys()
    shutil.rmtree(hub.home)
    status, _, error = hub(script, HF_HUB_OFFLINE="1")
    assert status == 0, error
    assert results() == there
    status, _, error = hub(script.replace("steps=3", "steps=4"), HF_HUB_OFFLINE="1")
    assert "this was not recorded, and the weights of some/model are not here" in error[0]


# -------------------------------------------------------------------------------------- full size

FULL = """
import resource, sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from memlib import models, paths, schedule
from memlib.sampler import sample
sys.path.insert(0, sys.argv[1])
from test_checkpoints import SD1, make_vae
torch.manual_seed(0)
with torch.device("meta"):  # filled once, not twice: random weights of this size take a while
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **SD1)
unet = unet.to_empty(device="cpu").requires_grad_(False)
for p in unet.parameters():
    p.uniform_(-0.02, 0.02)
tokenizer = CLIPTokenizer.from_pretrained(paths.LAB / "tokenizer", model_max_length=77)
text = CLIPTextModel(CLIPTextConfig(
    vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
    num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
pipe = StableDiffusionPipeline(
    vae=make_vae(), text_encoder=text, tokenizer=tokenizer, unet=unet,
    scheduler=DDIMScheduler.from_config(models.stable_diffusion_schedule()),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False)
model = models.DiffusersModel(pipe, "full", "full")
assert model.latent_shape == (4, 64, 64)
scheduler = schedule.make_scheduler(model.scheduler_config, "ddim", 2)
kept = sample(model, ["a dog"], [0], scheduler, schedule.guidance_values(7.5, 2))
latents = pipe(["a dog"], num_inference_steps=2, guidance_scale=7.5, output_type="latent",
               generator=[torch.Generator().manual_seed(0)]).images
assert torch.isfinite(latents).all() and latents.std() > 0.1
assert torch.equal(kept["x_t"][-1], latents)
million = sum(p.numel() for p in unet.parameters()) / 1e6
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{million:.0f} {peak:.1f}")
"""


@pytest.mark.slow
def test_full_width():
    """SD v1.4's U-Net at its own size, two updates, equal to diffusers, within 12 GB."""
    command = [sys.executable, "-c", FULL, str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    million, peak = run.stdout.split()
    assert million == "860"
    assert float(peak) < 12
