"""Wrong input: one clear line that says what is wrong, and nothing half-written."""

import os
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import memlib
from memlib import cli, measures
from memlib.cli.trace import write_table
from memlib.models import ModelError
from memlib.paths import LAB, cache_folder


def one_line(error, pattern):
    message = str(error.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


@pytest.fixture(scope="module")
def lab():
    return memlib.load("lab")


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda lab, p: memlib.reverse_trace(lab, p, sampler="dim"), "did you mean 'ddim'"),
        (lambda lab, p: memlib.reverse_trace(lab, p, similarity="ssdc"), "did you mean 'sscd'"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=1001), "1000 timesteps"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=0), "steps=0"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=-5), "steps=-5"),
        (lambda lab, p: memlib.forward_trace(lab, p, [1], draws=0), "draws=0"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=1000), "at most 999"),
        (lambda lab, p: memlib.reverse_trace(lab, p, batch_size=0), "at least 1"),
        (lambda lab, p: memlib.reverse_trace(lab, p, seeds=[1, 1]), "distinct"),
        (lambda lab, p: memlib.reverse_trace(lab, p, seeds=[]), "at least one"),
        (
            lambda lab, p: memlib.reverse_trace(lab, p, guidance_scale=[1.0, 2.0]),
            "2 guidance scales",
        ),
        (lambda lab, p: memlib.reverse_trace(lab, p, guidance_scale=float("nan")), "finite"),
        (lambda lab, p: memlib.forward_trace(lab, p, [1000]), r"0 \.\.\. 999"),
        (lambda lab, p: memlib.forward_trace(lab, p.assign(image=""), [1]), "has none"),
    ],
)
def test_wrong_arguments(lab, call, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        call(lab, memlib.load_pairs("lab").iloc[:1])
    one_line(error, pattern)


def test_unknown_names_in_the_algebra(lab):
    pairs = memlib.load_pairs("lab").iloc[:1]
    trace = memlib.reverse_trace(lab, pairs, seeds=[0], steps=2, similarity=None, progress=False)
    for call, pattern in (
        (lambda: memlib.cosine(trace, "eps_con", "x_0"), "did you mean 'eps_cond'"),
        (lambda: memlib.reference_weights(trace, "schedul"), "did you mean 'schedule'"),
        (lambda: memlib.weights(trace, "x_gan"), "did you mean 'x_gen'"),
        (lambda: memlib.noise_loss(trace), "forward trace"),
        (lambda: memlib.deviations(trace, first=0), "must lie in 1"),
        (lambda: memlib.x0_hat(trace.drop_vars("guidance_scale")), "give one"),
        (lambda: memlib.mean_seed_distance(trace), "at least 2 seeds"),
        (lambda: memlib.reference_weights(trace.isel(step=[1, 2]), "oracle"), "first state"),
        (lambda: memlib.deviations(trace.isel(step=[1, 2])), "first state"),
        (
            lambda: memlib.norm(trace.isel(step=[0, 2]), memlib.x0_hat(trace.isel(step=[0, 1]))),
            "cut the trace first",
        ),
    ):
        with pytest.raises((KeyError, ValueError)) as error:
            call()
        one_line(error, pattern)


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


def test_the_encoding_is_the_posterior_mode(lab):
    file = memlib.load_pairs("lab").image[0]
    x = (
        torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None] / 127.5
        - 1
    )
    with torch.no_grad():
        direct = lab.vae.encode(x).latent_dist.mean * lab.vae.config.scaling_factor
    torch.testing.assert_close(lab.encode_images([file]), direct)


def test_severity_tells_copies_from_others():
    first, second = memlib.load_pairs("lab").image[:2]
    a, b = (memlib.prompts.read_image(f, 64) for f in (first, second))
    shifted = np.roll(a, 3, axis=1)
    for measure, low in (("sscd", 0.7), ("sscd-distilled", 0.7), ("ncc", 0.3)):
        scores = memlib.similarity(np.stack([a, shifted, b]), a, measure)
        assert scores[0] == pytest.approx(1, abs=1e-6)
        assert scores[1] > low > scores[2]
    direct = np.corrcoef(*(i.astype(float)[..., 0].ravel() for i in (a, b)))[0, 1]
    grey = [np.repeat(i[..., :1], 3, axis=-1) for i in (a, b)]
    assert measures.similarity(grey[0][None], grey[1], "ncc")[0] == pytest.approx(direct, abs=1e-9)


def test_the_cache_computes_once_and_sees_every_change(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    calls = []

    def reverse_trace(model, pairs, seeds=(0,), steps=2, guidance_scale=7.5):
        calls.extend([steps] * (len(pairs) > 0))  # asked for no prompts, it tells its shapes
        return memlib.reverse_trace(
            model, pairs, seeds=seeds, steps=steps, similarity=None, progress=False
        )

    pairs = memlib.load_pairs("lab").iloc[:1]
    first = memlib.cached(reverse_trace, lab, pairs)
    again = memlib.cached(reverse_trace, lab, pairs)
    assert calls == [2]
    assert first.identical(again)
    memlib.cached(reverse_trace, lab, pairs, steps=3)
    memlib.cached(reverse_trace, lab, pairs.assign(caption="other"))
    memlib.cached(reverse_trace, lab, pairs, guidance_scale=lambda step: step)
    assert calls == [2, 3, 2, 2]
    # which prompt an image belongs to, and what is in it
    two = memlib.load_pairs("lab").iloc[:2]
    first_only, second_only = (
        two.assign(image=[f if i == n else "" for i, f in enumerate(two.image)]) for n in (0, 1)
    )
    other = two.assign(image=list(two.image[::-1]))
    for changed in (first_only, second_only, other):
        memlib.cached(reverse_trace, lab, changed)
    monkeypatch.setattr(lab, "fingerprint", "other weights")
    memlib.cached(reverse_trace, lab, pairs)
    monkeypatch.undo()
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    assert len(calls) == 11  # without a batch size, each of two prompts is a task

    def broken(model, pairs):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        memlib.cached(broken, lab, pairs)
    assert not [p for p in tmp_path.glob("broken*") if p.is_dir()]
    # a piece that lost its checksums is not read: it is recorded again
    entries = [p for p in tmp_path.glob("reverse_trace*") if p.is_dir()]
    assert len(entries) == 8
    for entry in entries:
        (entry / "sha256" / "0.0.0.0").unlink()
    assert memlib.cached(reverse_trace, lab, pairs).identical(first)
    assert len(calls) == 12
    assert cache_folder() == tmp_path


def test_captions_longer_than_the_model_reads(lab, tmp_path, capfd):
    """One warning, and the trace says how much was not read; nothing of it on the terminal."""
    long = "a red apple on a blue background near the old harbour " * 3
    pairs = pd.DataFrame(
        {"prompt_id": list("abc"), "caption": [f"{long} one", f"{long} two", "a red apple"]}
    )
    options = dict(seeds=[0, 1], steps=2, similarity=None, images=False, progress=False)
    pattern = (
        r"2 of 3 captions are longer than lab reads .*\(a, b\); 2 of them are alike .*\(a, b\)"
    )
    with pytest.warns(UserWarning, match=pattern):
        trace = memlib.reverse_trace(lab, pairs, **options)
    limit = lab.pipe.tokenizer.model_max_length
    whole = [len(lab.pipe.tokenizer(caption).input_ids) for caption in pairs.caption]
    assert trace.tokens_cut.values.tolist() == [[max(0, n - limit)] * 2 for n in whole]
    assert trace.tokens_cut.values[:, 0].tolist()[2] == 0 < trace.tokens_cut.values[0, 0]
    np.testing.assert_array_equal(trace.gram[0], trace.gram[1])  # what is read is the same
    with pytest.warns(UserWarning, match=pattern) as told:
        memlib.record(
            model=lab, pairs=pairs, address=tmp_path / "run",
            **{k: v for k, v in options.items() if k != "progress"}, progress=False,
        )  # fmt: skip
    assert len(told) == 1
    kept = memlib.open_run(tmp_path / "run").tokens_cut
    np.testing.assert_array_equal(kept, trace.tokens_cut)
    assert capfd.readouterr().err == ""


def test_a_table_without_a_place(tmp_path, capsys):
    arguments = ["trace", "--prompts", "1", "--out", str(tmp_path / "nowhere" / "out.csv")]
    assert cli.main(arguments) == 1
    assert "must name a file in a folder that is there" in capsys.readouterr().err


def test_a_table_goes_where_it_is_told(tmp_path):
    """Into a pipe it is written, a link is followed, and nothing else in the folder is touched."""
    table = pd.DataFrame({"prompt_id": ["a"], "D1": [0.5]})
    real, link = tmp_path / "real.csv", tmp_path / "out.csv"
    real.write_text("old")
    (tmp_path / "out.partial").write_text("mine")
    link.symlink_to(real)
    write_table(table, link.resolve())
    assert real.read_text() == "prompt_id,D1\na,0.5\n"
    assert link.is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_table(table, tmp_path / "pipe")
    assert reader.communicate()[0] == real.read_text()
    assert not (tmp_path / "pipe").is_file()
    names = {"real.csv", "out.csv", "out.partial", "pipe"}
    assert {f.name for f in tmp_path.iterdir()} == names
    assert (tmp_path / "out.partial").read_text() == "mine"


@pytest.mark.parametrize("option", ["--prompts", "--every", "--threads", "--workers", "--seeds"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_counts_are_at_least_one(option, value, capsys):
    with pytest.raises(SystemExit):
        cli.main(["trace", option, value])
    assert "no whole number of at least 1" in capsys.readouterr().err
