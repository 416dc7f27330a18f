"""The official SSCD: on a stand-in, for the networks cannot be shipped."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import memlib
from memlib import cli, measures
from memlib.hub import sscd


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
