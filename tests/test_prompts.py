"""Published lists, their images, and the official SSCD: on stand-ins, for none can be shipped."""

import dataclasses
import hashlib
import io
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import memlib
from memlib import cli, measures
from memlib.cli.fetch import addresses
from memlib.cli.trace import default_pairs
from memlib.hub import lists, sscd
from memlib.hub.checkpoints import VAE_REVISION
from memlib.hub.names import CHECKPOINTS
from memlib.prompts import PairsError

LAB = memlib.load_pairs("lab").query("kind == 'planted'").reset_index(drop=True)


@pytest.fixture
def webster(tmp_path, monkeypatch):
    """A list in Webster's format, where `memlib fetch` would put it, and its folder of images."""
    table = pd.DataFrame({
        "caption": ["A cat, sleeping", "a CAT sleeping!", "Two dogs", "A poster", "A tree"],
        "index": [7, 12, 12, 40, 41],
        "url": ["http://a/1", "http://a/2", "http://a/3", "http://a/1", None],
        "overfit_type": ["MV", "RV", "N", "TV", "MV"],
        "retrieved_urls": [["http://b/1", "http://a/1"], [], None, ["http://b/4"], None],
    })  # fmt: skip
    monkeypatch.setenv("MEMLIB_DATA", str(tmp_path))
    file = lists.list_file("webster-sd14")
    (file.parent / "images").mkdir(parents=True)
    table.to_parquet(file)
    known = lists.PromptList(file.name, hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setitem(lists.LISTS, "webster-sd14", known)
    return file.parent


def test_a_published_list(webster):
    pairs = memlib.load_pairs("webster-sd14")
    assert list(pairs.prompt_id) == ["7", "12", "12-2", "40", "41"]  # a repeated index stays apart
    assert list(pairs.kind) == ["memorized", "memorized", "control", "template", "memorized"]
    assert list(pairs.group) == [0, 0, 1, 0, 2]  # the same words; the same address; on their own
    assert set(pairs.image_note) == {"no picture"}


def test_images_of_a_list(webster):
    """Named plainly or with zeros; what is no usable picture is set aside with its reason."""
    images = webster / "images"
    shutil.copy(LAB.image[0], images / "0007.png")
    Image.new("RGB", (200, 200)).save(images / "12.png")
    (images / "12-2.jpg").write_text("<html><body>404</body></html>")
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    (images / "40.jpg").write_bytes(whole.getvalue()[:5000])
    Image.fromarray(noise[:9, :9]).save(images / "41.png")
    pairs = memlib.load_pairs("webster-sd14")
    assert pairs.image[0] == str(images / "0007.png")
    assert list(pairs.image[1:]) == [""] * 4
    for note, word in zip(pairs.image_note, ("", "black", "HTML", "truncated", "9"), strict=True):
        assert word.lower() in note.lower(), note
    assert pairs.image_note[0] == ""


def test_a_repeated_index_takes_no_picture_of_the_other_row(webster):
    shutil.copy(LAB.image[0], webster / "images" / "12.png")
    pairs = memlib.load_pairs("webster-sd14")
    assert [bool(i) for i in pairs.image] == [False, True, False, False, False]


def test_a_changed_list_is_refused(webster):
    file = lists.list_file("webster-sd14")
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(PairsError, match="is not the published list"):
        memlib.load_pairs("webster-sd14")
    with pytest.raises(PairsError, match="memlib fetch webster-sd21"):
        memlib.load_pairs("webster-sd21")
    with pytest.raises(PairsError, match="did you mean 'webster-sd"):
        memlib.load_pairs("webster-sd1")


# ------------------------------------------------------------------------------------------ SSCD


class Stand(torch.nn.Module):
    """In place of SSCD: colour means of a 2 x 2 grid, so that scale, order and shape all matter."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture
def official(tmp_path, monkeypatch):
    """The stand-in by the names of both networks, with its checksum in place of theirs."""
    file = tmp_path / "sscd.pt"
    torch.jit.script(Stand()).save(str(file))
    for network in sscd.OFFICIAL.values():
        monkeypatch.setenv(network.variable, str(file))
        monkeypatch.setenv(f"{network.variable}_SHA256", sha256_of(file))
    measures.descriptor.cache_clear()
    yield file
    measures.descriptor.cache_clear()


def sha256_of(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("measure", "size"),
    [
        ("sscd-small288", (432, 288)),
        ("sscd-skew320", (320, 320)),
        ("sscd-large288", (288, 288)),
    ],
)
def test_official_preprocessing(official, measure, size):
    """Against PIL and ImageNet's numbers, written out; on a picture that is not square."""
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (6, 9, 3)), np.ones((100, 100, 1))).astype(np.uint8)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR)) / 255.0
    x = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    height, width = x.shape[0] // 2, x.shape[1] // 2
    cells = [x[i * height : (i + 1) * height, j * width : (j + 1) * width].mean((0, 1))
             for i in (0, 1) for j in (0, 1)]  # fmt: skip
    expected = np.array(cells).T.flatten()
    fed = sscd.official_input(image, sscd.PREPROCESSING[measure][1])
    assert fed.shape == (3, *reversed(size))
    found = measures.descriptor(measure)(image[None])[0]
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, atol=2e-4)  # means in float32


@pytest.mark.parametrize(
    ("measure", "preprocessing", "side"),
    [("sscd-skew320", "skew_320", 320), ("sscd-large288", "skew_288", 288)],
)
def test_the_trace_says_which_sscd(official, measure, preprocessing, side):
    lab, pairs = memlib.load("lab"), memlib.load_pairs("lab").iloc[:1]
    trace = memlib.reverse_trace(lab, pairs, [0], steps=2, similarity=measure, progress=False)
    assert trace.severity.attrs == {
        "measure": measure, "preprocessing": preprocessing, "sscd_side": side,
        "sha256": sha256_of(official),
    }  # fmt: skip
    describe = measures.descriptor(measure)
    image = np.asarray(Image.open(pairs.image.iloc[0]).convert("RGB"))[None]
    expected = describe(trace.image.values[0])[0] @ describe(image)[0]
    np.testing.assert_allclose(trace.severity[0, 0], expected, atol=1e-9)


def test_the_large_sscd_is_a_file_of_its_own(official, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLIB_SSCD_LARGE", str(tmp_path / "none.pt"))
    measures.descriptor("sscd-small288")
    with pytest.raises(FileNotFoundError, match="memlib fetch sscd-large --sha256"):
        measures.descriptor("sscd-large288")
    assert set(measures.MEASURES) - set(sscd.available()) == {"sscd-large288"}


def test_a_missing_or_wrong_sscd(official, monkeypatch):
    assert set(sscd.available()) == set(measures.MEASURES)
    official.write_bytes(b"no TorchScript")
    monkeypatch.setenv("MEMLIB_SSCD_SHA256", sha256_of(official).upper())
    with pytest.raises(ValueError, match="is no TorchScript file"):
        measures.descriptor("sscd-small288")
    official.unlink()
    with pytest.raises(FileNotFoundError, match="memlib fetch sscd brings it"):
        measures.descriptor("sscd-small288")


@pytest.mark.parametrize("measure", sscd.PREPROCESSING)
def test_an_unknown_torchscript_is_not_run(official, monkeypatch, measure):
    """It is code. Only the environment, or a checksum given to `memlib fetch`, lets it in."""
    network = sscd.OFFICIAL[sscd.PREPROCESSING[measure][0]]
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for wrong in ("0" * 64, ""):
        monkeypatch.setenv(f"{network.variable}_SHA256", wrong)
        with pytest.raises(ValueError, match=f"has the sha256 {sha256_of(official)}, (not|and no)"):
            measures.descriptor(measure)
        assert measure not in sscd.available()
    monkeypatch.setenv("MEMLIB_DATA", str(official.parent))
    note = official.parent / f"{network.file}.sha256"
    note.write_text(sha256_of(official))  # lies where fetch puts it, but the file does not
    with pytest.raises(ValueError, match="has the sha256"):
        measures.descriptor(measure)
    monkeypatch.delenv(network.variable)
    official.rename(official.parent / network.file)
    with pytest.raises(pytest.fail.Exception, match="it was loaded"):
        measures.descriptor(measure)


@pytest.fixture
def meta(official, monkeypatch):
    """Meta's server, with the stand-in on it; what was asked for."""
    asked = []

    async def save(self, url, partial, bar):
        asked.append((url, self.max_bytes))
        shutil.copy(official, partial)

    monkeypatch.setattr("memlib.hub.fetch.Client.save", save)
    monkeypatch.setenv("MEMLIB_DATA", str(official.parent / "data"))
    for network in sscd.OFFICIAL.values():
        monkeypatch.delenv(network.variable)
        monkeypatch.delenv(f"{network.variable}_SHA256")
    return asked


def test_the_official_sscd_is_checked_by_the_built_in_checksum(meta, official, monkeypatch, capsys):
    published = sscd.OFFICIAL["sscd"]
    assert published.sha256 == "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"
    assert cli.main(["fetch", "sscd"]) == 1  # the stand-in is another file
    assert "it was removed" in capsys.readouterr().err
    assert not published.path.exists()
    address = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
    assert meta == [(address, 98_791_638)]
    same = dataclasses.replace(published, sha256=sha256_of(official))
    monkeypatch.setitem(sscd.OFFICIAL, "sscd", same)
    assert cli.main(["fetch", "sscd"]) == 0
    assert capsys.readouterr().out.strip() == str(same.path)
    measures.descriptor("sscd-small288")


def test_a_checksum_of_ones_own_is_kept_for_the_file(meta, official, capsys):
    """The large network has no published one; the other's is replaced, until the next fetch."""
    assert cli.main(["fetch", "sscd-large"]) == 1
    assert "--sha256" in capsys.readouterr().err
    assert meta == []
    for name, measure in (("sscd-large", "sscd-large288"), ("sscd", "sscd-skew320")):
        assert cli.main(["fetch", name, "--sha256", sha256_of(official).upper()]) == 0
        measures.descriptor(measure)
        file = sscd.OFFICIAL[name].path
        file.write_bytes(file.read_bytes() + b" ")
        measures.descriptor.cache_clear()
        with pytest.raises(ValueError, match="has the sha256"):
            measures.descriptor(measure)
    assert cli.main(["fetch", "sscd"]) == 1
    assert sscd.OFFICIAL["sscd"].trusted == sha256_of(official)  # nothing came: as it was


def test_our_preprocessing_against_the_published_ones():
    """The int8 network, fed at one side (288) as we do and as its authors do: nearly the same.

    Ours resizes by bicubic interpolation, theirs by bilinear. On the lab's scenes, blown up 4.5
    times, descriptors have a cosine of at least 0.9 and scores differ by at most 0.1.
    """
    ours = measures.descriptor("sscd", 288)
    images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in LAB.image[:12]])

    def bilinear(image):
        return np.asarray(Image.fromarray(image).resize((288, 288), Image.BILINEAR))

    a, b = ours(images), ours(np.stack([bilinear(i) for i in images]))
    assert (a * b).sum(1).min() > 0.9
    assert np.abs(a @ a.T - b @ b.T).max() < 0.1


# ---------------------------------------------------------------------------------- command line


def test_fetching_from_a_folder(webster, tmp_path, capsys):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "00000").mkdir()
    shutil.copy(LAB.image[0], source / "00000/40.png")
    assert cli.main(["fetch", "webster-sd14", "--images", str(source)]) == 0
    assert "webster-sd14: 5 prompts, 1 with an image" in capsys.readouterr().out
    pack = tmp_path / "pack.zip"
    with zipfile.ZipFile(pack, "w") as archive:
        archive.write(LAB.image[1], "x/41.png")
    assert cli.main(["fetch", "webster-sd14", "--images", str(pack)]) == 0
    assert "5 prompts, 2 with an image" in capsys.readouterr().out
    table = addresses(lists.list_file("webster-sd14"))
    assert list(table.url) == [["http://a/1", "http://b/1"], ["http://a/2"], ["http://a/3"],
                               ["http://a/1", "http://b/4"], []]  # fmt: skip


def test_trace_from_the_command_line(webster, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "cache"))
    shutil.copy(LAB.image[0], webster / "images" / "40.png")
    command = ["trace", "--model", "lab", "--pairs", "webster-sd14", "--seeds", "2", "--steps", "3",
               "--out", str(tmp_path / "out.csv")]  # fmt: skip
    assert cli.main(command) == 0
    assert "5 prompts (1 with an image), 2 seeds, ddim, 3 steps, lab in float32 on cpu" in (
        capsys.readouterr().out
    )
    table = pd.read_csv(tmp_path / "out.csv", dtype={"prompt_id": str})
    assert list(table.prompt_id) == ["7", "12", "12-2", "40", "41"]
    assert list(table.D1.notna()) == [False, False, False, True, False]
    pairs = memlib.load_pairs("webster-sd14")
    trace = memlib.cached(memlib.reverse_trace, memlib.load("lab"), pairs, seeds=range(2), steps=3)
    np.testing.assert_allclose(table.D1[3], memlib.deviations(trace).D1[3])
    assert cli.main([*command[:5], "--seeds", "1", "--steps", "2", "--only-with-images"]) == 0
    assert "1 prompts (1 with an image)" in capsys.readouterr().out


def test_two_lists_are_recorded_with_equal_settings(tmp_path, monkeypatch, capsys):
    """Whether their ids are made up, or their own: then each has a run, and both are found."""
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "cache"))

    def trace(text):
        (tmp_path / "list.csv").write_text(text)
        code = cli.main(["trace", "--pairs", str(tmp_path / "list.csv"), "--seeds", "1",
                         "--steps", "2", "--severity", "ncc"])  # fmt: skip
        out = capsys.readouterr()
        assert code == 0, out.err
        return re.search(r"(\d+) pieces recorded, (\d+) were there", out.out).groups()

    assert trace("caption\na red boat\na green tree\n") == ("2", "0")
    assert trace("caption\ntwo blue cars\na red boat\n") == ("1", "1")
    assert trace("caption\na read boat\na green tree\n") == ("1", "1")  # a typo
    assert trace("caption,kind\na green tree,control\n") == ("1", "0")
    assert len(list((tmp_path / "cache").glob("run-*/plan.json"))) == 1
    assert trace("caption,prompt_id\na,1\nb,2\n") == ("2", "0")
    assert trace("caption,prompt_id\nc,1\nd,2\n") == ("2", "0")
    assert trace("caption,prompt_id\nd,2\ne,3\n") == ("1", "1")
    assert trace("caption,prompt_id\nb,2\n") == ("0", "1")
    assert len(list((tmp_path / "cache").glob("run-*/plan.json"))) == 2
    sampled = []
    monkeypatch.setattr("memlib.runs.tracing.sample", lambda *_: sampled.append(1))
    for text in ("caption,prompt_id\nc,1\n", "caption,prompt_id\na,1\n"):
        (tmp_path / "list.csv").write_text(text)
        pairs = memlib.load_pairs(tmp_path / "list.csv")
        lab = memlib.load("lab")
        memlib.cached(memlib.reverse_trace, lab, pairs, seeds=[0], steps=2, similarity="ncc")
    assert not sampled


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["trace", "--model", "sd"], "unknown model 'sd'"),
        (["trace", "--sampler", "dim", "--prompts", "1"], "did you mean 'ddim'"),
        (["trace", "--only-with-images", "--pairs", "list.csv"], "no prompt is left"),
        (["trace", "--pairs", "webster-sd21"], "memlib fetch webster-sd21"),
        (["trace", "--device", "cuda:7"], "torch finds no GPU here"),
        (["fetch", "webster-sd15"], "did you mean 'webster-sd"),
        (["fetch", "sscd-large"], "Meta publishes no checksum of sscd_disc_large"),
        (["fetch", "sscd-lrge"], "did you mean 'sscd-large'"),
        (["fetch", "sd21-bse"], "did you mean 'sd21-base'"),
        (["book", "--model", "sd14", "--profile", "smal"], "did you mean 'smoke'"),
    ],
)
def test_wrong_commands(arguments, pattern, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLIB_DATA", str(tmp_path))
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("caption\na\n")
    assert cli.main(arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert pattern in errors[0]


def test_the_doctor(webster, official, monkeypatch, capsys):
    """Each model by its exact repository and commit, each score by its file and checksum."""
    monkeypatch.setenv("MEMLIB_SSCD_LARGE_SHA256", "")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("Python", "GPU", "5 prompts, 0 with an image", "T4",
                  "not here: memlib fetch webster-sd21"):  # fmt: skip
        assert words in out
    for name, checkpoint in CHECKPOINTS.items():
        assert f"  {name:<16} {checkpoint}: not here: memlib fetch {name}\n" in out
        assert checkpoint.note in out
    assert out.count("VAE stabilityai/sd-vae-ft-mse@31f26fde") == 3
    assert out.count("\n  realvis ") == 1
    assert "  realvis          an older name of realvis14\n" in out
    large, mixup = (sscd.OFFICIAL[name].file for name in ("sscd-large", "sscd"))
    assert out.count(f"{mixup} (sha256 {sha256_of(official)[:12]}): here\n") == 2
    assert f"{large} (no published sha256): refused, see MEMLIB_SSCD_LARGE_SHA256" in out
    official.unlink()
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert f"{large} (no published sha256): not here: memlib fetch sscd-large --sha256 ..." in out
    assert out.count("): not here: memlib fetch sscd\n") == 2


def test_the_doctor_says_which_commit_is_here(official, tmp_path, monkeypatch, capsys):
    """In a cache as the Hub's library lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(repository, commit, file, ref=""):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        place = folder / "snapshots" / commit / file
        place.parent.mkdir(parents=True)
        place.touch()
        if ref:
            (folder / "refs").mkdir()
            (folder / "refs" / ref).write_text(commit)

    sd, realvis = CHECKPOINTS["sd14"], CHECKPOINTS["realvis20"]
    put(sd.repository, sd.revision, "model_index.json")
    put(realvis.repository, "a1b2c3d4" * 5, realvis.half, "main")
    for state in (", but not its VAE: memlib fetch brings it", ""):
        assert cli.main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert f"{sd}: here\n" in out
        assert f"{realvis}: here, at a1b2c3d4{state}\n" in out
        if state:
            put(realvis.vae, VAE_REVISION, "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("gpu", [False, True])
def test_weights_are_fetched_in_the_precision_they_will_be_used_in(gpu, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        "memlib.hub.checkpoints.download", lambda *a: asked.append(a) or ["somewhere"]
    )
    for arguments in (["realvis"], ["sd14", "--dtype", "float32"], ["a/b", "--dtype", "float16"]):
        assert cli.main(["fetch", *arguments]) == 0
    assert asked == [("realvis", None, gpu), ("sd14", None, False), ("a/b", None, True)]
    assert capsys.readouterr().out == 3 * "somewhere\n"


def test_help_lists_every_model(capsys):
    for command in ("trace", "book", "fetch"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert ", ".join(CHECKPOINTS) in words
        assert "a Hub id" in words


def test_a_model_brings_its_list():
    names = {"sd14": "webster-sd14", "sd21-base": "webster-sd21", "realvis": "webster-realvis",
             "realvis20": "webster-realvis", "lab": "lab", "a/b": "lab"}  # fmt: skip
    assert {name: default_pairs(name) for name in names} == names
