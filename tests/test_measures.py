"""Similarity of pictures: copies against others, and how pictures are fed to the network."""

import numpy as np
import pytest
from PIL import Image
from test_lists import LAB

import memlib
from memlib import measures


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
