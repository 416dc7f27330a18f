"""Models: the exact denoiser against Bayes' rule, a pipeline from a folder, folders with damage."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import memlib
from memlib import schedule
from memlib.models import ModelError, stable_diffusion_schedule
from memlib.paths import LAB

SHAPE = (2, 3, 3)


def one_line(error, pattern):
    message = str(error.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


def test_the_exact_prediction_is_the_posterior_mean(atoms):
    """Against Bayes' rule written out with scipy's normal densities, atom by atom."""
    from scipy.stats import multivariate_normal

    counts = [1, 4, 1, 2, 8]
    model = memlib.ExactModel(atoms, list("abcab"), counts)
    table = schedule.make_scheduler(stable_diffusion_schedule(), "ddim", 50).alphas_cumprod.double()
    x_t = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cond, uncond = model.encode_text(["a", "b", "c", "unknown"])
    for t in (0, 300, 981):
        a = float(table[t])
        for text, groups in ((cond, ["a", "b", "c", "abc"]), (uncond, ["abc"] * 4)):
            out = model.predict(x_t, t, text)
            for i, group in enumerate(groups):
                inside = [k for k, c in enumerate("abcab") if c in group]
                log_p = np.array([
                    multivariate_normal.logpdf(
                        x_t[i].flatten(), np.sqrt(a) * atoms[k].flatten(), 1 - a)
                    + np.log(counts[k]) for k in inside
                ])  # fmt: skip
                p = np.exp(log_p - log_p.max())
                mean = sum(w * atoms[k].numpy() for w, k in zip(p / p.sum(), inside, strict=True))
                eps = (x_t[i].numpy() - np.sqrt(a) * mean) / np.sqrt(1 - a)
                np.testing.assert_allclose(out[i], eps, rtol=1e-9, atol=1e-9)


def test_the_exact_model_of_the_lab_copies_every_caption_it_knows():
    """One atom has the caption, so sampling returns it; a caption nobody has is unconditional."""
    exact = memlib.load("exact")
    pairs = memlib.load_pairs("lab").iloc[[0, 44]]
    trace = memlib.reverse_trace(exact, pairs, seeds=[0, 1], steps=10, progress=False)
    for n, file in enumerate(pairs.image):  # as alike as what the VAE leaves of the picture
        target = memlib.prompts.read_image(file, 64)
        best = memlib.similarity(exact.decode(exact.encode_images([file])), target)
        assert float(trace.severity[n].min()) > best - 0.1
    assert (
        float(memlib.mean_seed_distance(trace)[:, -1].max() / memlib.norm(trace, "x_0")[0, 0, 0])
        < 0.1
    )
    cond, uncond = exact.encode_text(["a caption of no atom"])
    assert torch.equal(cond, uncond)


def test_the_conversion_of_predictions():
    """epsilon, v and sample predictions of the same estimate give the same epsilon."""
    model = memlib.load("lab")
    x, eps, a = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), 0.3
    x_t = a**0.5 * x + (1 - a) ** 0.5 * eps
    outputs = {"epsilon": eps, "sample": x, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x}
    for kind, output in outputs.items():
        model.prediction_type = kind
        torch.testing.assert_close(model.to_epsilon(output, x_t, a), eps, rtol=1e-5, atol=1e-5)


def test_the_encoding_is_the_posterior_mode(lab):
    file = memlib.load_pairs("lab").image[0]
    x = (
        torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None] / 127.5
        - 1
    )
    with torch.no_grad():
        direct = lab.vae.encode(x).latent_dist.mean * lab.vae.config.scaling_factor
    torch.testing.assert_close(lab.encode_images([file]), direct)


def test_unknown_models(tmp_path):
    with pytest.raises(ModelError) as error:
        memlib.load("labb")
    one_line(error, "did you mean 'lab'")
    with pytest.raises(ModelError) as error:
        memlib.load(tmp_path)
    one_line(error, r"no model_index\.json")


@pytest.fixture
def copy(tmp_path):
    skip = shutil.ignore_patterns("checkpoints", "sprites", "pairs")
    return shutil.copytree(LAB, tmp_path / "copy", ignore=skip)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damaged_weights_are_named(copy, harm):
    (copy / "SHA256SUMS").write_text("".join(
        line for line in (copy / "SHA256SUMS").read_text().splitlines(True)
        if not line.split("  ")[1].startswith(("checkpoints", "sprites", "pairs/"))
    ))  # fmt: skip
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-1000] ^= 1
    if harm == "truncate":
        data = data[: len(data) // 2]
    file.unlink() if harm == "remove" else file.write_bytes(data)
    with pytest.raises(ModelError) as error:
        memlib.load(copy)
    one_line(error, "unet/diffusion_pytorch_model.safetensors is (damaged|missing)")


def test_truncated_weights_without_checksums(copy):
    (copy / "SHA256SUMS").unlink()
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError) as error:
        memlib.load(copy)
    one_line(error, "cannot be loaded")


def test_pickled_weights_are_refused(copy):
    (copy / "SHA256SUMS").unlink()
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        memlib.load(copy)
    one_line(error, "cannot be loaded")
