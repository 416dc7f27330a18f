"""Published lists and their images: on a stand-in, for none can be shipped."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

import memlib
from memlib.hub import lists
from memlib.prompts import PairsError

LAB = memlib.load_pairs("lab").query("kind == 'planted'").reset_index(drop=True)


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
    for note, word in zip(pairs.image_note, ("", "colour", "HTML", "truncated", "9"), strict=True):
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
