"""Wrong input: one clear line that says what is wrong, and nothing half-written."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import memlib
from memlib import cache, models, severity
from memlib.models import ModelError
from memlib.pairs import PairsError


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
        (lambda lab, p: memlib.reverse_trace(lab, p, severity="ssdc"), "did you mean 'sscd'"),
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
    trace = memlib.reverse_trace(lab, pairs, seeds=[0], steps=2, severity=None, progress=False)
    for call, pattern in (
        (lambda: memlib.cosine(trace, "eps_con", "x_0"), "did you mean 'eps_cond'"),
        (lambda: memlib.reference_weights(trace, "schedul"), "did you mean 'schedule'"),
        (lambda: memlib.weights(trace, "x_gan"), "did you mean 'x_gen'"),
        (lambda: memlib.noise_loss(trace), "forward trace"),
        (lambda: memlib.deviations(trace, first=0), "must lie in 1"),
        (lambda: memlib.x0_hat(trace.drop_vars("guidance_scale")), "give one"),
        (lambda: memlib.spread(trace), "at least 2 seeds"),
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
    return shutil.copytree(models.LAB, tmp_path / "copy", ignore=skip)


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


def manifest(tmp_path, text, encoding="utf-8"):
    file = tmp_path / "pairs.csv"
    file.write_bytes(text.encode(encoding))
    return file


@pytest.mark.parametrize(
    ("text", "encoding", "pattern"),
    [
        ("captoin\na\n", "utf-8", "no column 'caption': did you mean 'captoin'"),
        ("caption\n", "utf-8", "no rows"),
        ('caption\na\n" "\n', "utf-8", "row 2: the caption is empty"),
        ("caption\na\na\n", "utf-8", "row 2: caption 'a' stands twice"),
        ("prompt_id,caption\n1,a\n1,b\n", "utf-8", "prompt_id '1' stands twice"),
        ("caption\ncafé\n", "latin-1", "not UTF-8"),
        ("caption,image\na,gone.png\n", "utf-8", "gone.png is missing"),
        ("", "utf-8", "cannot be read"),
        ("caption,kind\na dog, on a mat,normal\n", "utf-8", "quote captions"),
        ("caption\na\n\nb\n", "utf-8", "row 2: the caption is empty"),
        ("caption,multiplicity\na,1\nb,many\n", "utf-8", "row 2: multiplicity 'many'"),
        ("caption,image\na,1\n", "utf-8", "1 is missing"),
    ],
)
def test_broken_manifests(tmp_path, text, encoding, pattern):
    with pytest.raises(PairsError) as error:
        memlib.load_pairs(manifest(tmp_path, text, encoding))
    one_line(error, pattern)


def test_a_missing_manifest_and_a_wrong_type(tmp_path):
    with pytest.raises(PairsError) as error:
        memlib.load_pairs("la")
    one_line(error, "did you mean 'lab'")
    (tmp_path / "pairs.xlsx").touch()
    with pytest.raises(PairsError) as error:
        memlib.load_pairs(tmp_path / "pairs.xlsx")
    one_line(error, r"one of \.csv")


def test_bad_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.png").write_text("<html>gone</html>")
    for name, pattern in (("black", "all black"), ("cut", "decoded"), ("page", "decoded")):
        file = manifest(tmp_path, f"caption,image\na,{name}.png\n")
        with pytest.raises(PairsError) as error:
            memlib.load_pairs(file)
        one_line(error, rf"{name}\.png.*{pattern}")


def test_manifests_in_three_formats_and_plain_captions(tmp_path):
    frame = pd.DataFrame({"caption": ["a <b>", "NA"]})
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_json(tmp_path / "p.jsonl", lines=True, orient="records")
    frame.to_parquet(tmp_path / "p.parquet")
    for name in ("p.csv", "p.jsonl", "p.parquet"):
        assert list(memlib.load_pairs(tmp_path / name).caption) == ["a <b>", "NA"]


def test_images_are_turned_upright_cropped_and_made_rgb(tmp_path):
    image = Image.new("L", (40, 80), 10)
    image.paste(200, (0, 0, 40, 40))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "x.png", exif=exif)
    picture = memlib.pairs.read_image(tmp_path / "x.png", 20)
    assert picture.shape == (20, 20, 3)
    assert picture[0, 0, 0] < 50 < picture[-1, 0, 0]


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
    a, b = (memlib.pairs.read_image(f, 64) for f in (first, second))
    shifted = np.roll(a, 3, axis=1)
    for measure, low in (("sscd", 0.7), ("sscd-distilled", 0.7), ("ncc", 0.3)):
        scores = memlib.similarity(np.stack([a, shifted, b]), a, measure)
        assert scores[0] == pytest.approx(1, abs=1e-6)
        assert scores[1] > low > scores[2]
    direct = np.corrcoef(*(i.astype(float)[..., 0].ravel() for i in (a, b)))[0, 1]
    grey = [np.repeat(i[..., :1], 3, axis=-1) for i in (a, b)]
    assert severity.severity(grey[0][None], grey[1], "ncc")[0] == pytest.approx(direct, abs=1e-9)


def test_the_cache_computes_once_and_sees_every_change(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    calls = []

    def reverse_trace(model, pairs, seeds=(0,), steps=2, guidance_scale=7.5):
        calls.extend([steps] * (len(pairs) > 0))  # asked for no prompts, it tells its shapes
        return memlib.reverse_trace(
            model, pairs, seeds=seeds, steps=steps, severity=None, progress=False
        )

    pairs = memlib.load_pairs("lab").iloc[:1]
    first = memlib.recorded(reverse_trace, lab, pairs)
    again = memlib.recorded(reverse_trace, lab, pairs)
    assert calls == [2]
    assert first.identical(again)
    memlib.recorded(reverse_trace, lab, pairs, steps=3)
    memlib.recorded(reverse_trace, lab, pairs.assign(caption="other"))
    memlib.recorded(reverse_trace, lab, pairs, guidance_scale=lambda step: step)
    assert calls == [2, 3, 2, 2]
    # which prompt an image belongs to, and what is in it
    two = memlib.load_pairs("lab").iloc[:2]
    first_only, second_only = (
        two.assign(image=[f if i == n else "" for i, f in enumerate(two.image)]) for n in (0, 1)
    )
    other = two.assign(image=list(two.image[::-1]))
    for changed in (first_only, second_only, other):
        memlib.recorded(reverse_trace, lab, changed)
    monkeypatch.setattr(lab, "fingerprint", "other weights")
    memlib.recorded(reverse_trace, lab, pairs)
    monkeypatch.undo()
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    assert len(calls) == 11  # without a batch size, each of two prompts is a task

    def broken(model, pairs):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        memlib.recorded(broken, lab, pairs)
    assert not [p for p in tmp_path.glob("broken*") if p.is_dir()]
    # a piece that lost its checksums is not read: it is recorded again
    entries = [p for p in tmp_path.glob("reverse_trace*") if p.is_dir()]
    assert len(entries) == 8
    for entry in entries:
        (entry / "sha256" / "0.0.0.0").unlink()
    assert memlib.recorded(reverse_trace, lab, pairs).identical(first)
    assert len(calls) == 12
    assert cache.cache_folder() == tmp_path


def test_a_changed_reference_picture_is_named(tmp_path, monkeypatch):
    from memlib import pairs

    copy = tmp_path / "lab"
    shutil.copytree(models.LAB, copy, ignore=shutil.ignore_patterns("unet", "vae", "checkpoints"))
    monkeypatch.setattr(pairs, "LAB_PAIRS", copy / "pairs.csv")
    assert len(memlib.load_pairs("lab"))
    Image.new("RGB", (64, 64), "red").save(copy / "pairs" / "control-0.png")
    with pytest.raises(PairsError) as error:
        memlib.load_pairs("lab")
    one_line(error, "control-0.png is damaged")


def test_numbers_stay_text_where_they_are_names(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt_id": "0001", "caption": "12", "multiplicity": 3}\n'
        '{"prompt_id": "1", "caption": "012"}\n'
    )
    found = memlib.load_pairs(tmp_path / "p.jsonl")
    assert list(found.prompt_id) == ["0001", "1"]
    assert list(found.caption) == ["12", "012"]
    assert found.multiplicity[0] == 3
