"""Prompts: their groups, and how the pixels of a picture are read."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image, ImageCms

import memlib
from memlib import prompts
from memlib.hub import pictures
from memlib.prompts import PairsError, read_image

LIST = pd.DataFrame({"kind": ["memorized", "template", "control", "control"]})


def test_groups_need_no_copies():
    assert list(prompts.groups(LIST)) == list(LIST.kind)
    assert list(prompts.groups(LIST.assign(multiplicity=np.nan))) == list(LIST.kind)
    trace = xr.Dataset(coords={"kind": ("prompt", LIST.kind)})
    for mask, expected in zip(
        prompts.by_memorization(trace), ("1000", "0100", "0011"), strict=True
    ):
        assert list(mask) == [c == "1" for c in expected]
    assert prompts.most_copied(trace).tolist() == [True, False, False, False]
    assert prompts.least_copied(trace).tolist() == [False, False, True, True]
    assert (
        prompts.to_correlate(LIST.assign(kind=["memorized", "template", "control", "normal"])).sum()
        == 3
    )
    assert prompts.copies_or_kind(LIST)[1] == ["memorized", "template", "control"]


def test_the_labs_groups_are_by_copies():
    pairs = memlib.load_pairs("lab")
    memorized, between, control = prompts.by_memorization(pairs)
    planted = pairs.kind == "planted"
    assert (memorized == (planted & (pairs.multiplicity >= 32))).all()
    assert (between == (planted & pairs.multiplicity.isin([8, 16]))).all()
    assert (control == (pairs.kind == "control")).all()
    assert set(pairs.kind[prompts.to_correlate(pairs)]) == {
        "planted",
        "named",
        "template",
        "control",
    }
    assert (prompts.least_copied(pairs) == (planted & (pairs.multiplicity == 1))).all()
    assert (prompts.most_copied(pairs) == (planted & (pairs.multiplicity == 128))).all()
    assert prompts.copies_or_kind(pairs)[1][:8] == [str(2**i) for i in range(8)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (["memorised", "control"], "did you mean 'memorized'"),
        (["planted", "control"], "need their multiplicity"),
        (["control", "template"], "no prompt is"),
    ],
)
def test_a_list_that_no_chapter_can_use_is_refused(kind, said):
    with pytest.raises(ValueError, match=said):
        prompts.by_memorization(pd.DataFrame({"kind": kind}))


def test_a_list_without_kinds_is_refused():
    with pytest.raises(ValueError, match="column 'kind'"):
        prompts.by_memorization(pd.DataFrame({"caption": ["a"]}))


def pixels(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return read_image(tmp_path / name, None)


RGB = np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)
LAYERED = np.dstack([RGB, np.zeros((70, 80), np.uint8)])
LAYERED[20:50, 20:60, 3] = 255


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "avif"), ("RGBA", "jp2"), ("RGBA", "tif"),
        ("LA", "png"), ("P", "png"), ("RGBA", "gif"), ("animation", "gif"), ("animation", "webp"),
        ("animation", "png"),
    ],
)  # fmt: skip
def test_transparency_is_laid_on_white(tmp_path, mode, ending):
    image, options = Image.fromarray(LAYERED), {}
    if mode == "animation":
        options = {
            "save_all": True,
            "lossless": True,
            "append_images": [Image.new("RGBA", image.size, "red")],
        }
    elif mode == "P":
        image = image.quantize(64)
    elif mode != "RGBA":
        image = image.convert(mode)
    found = pixels(tmp_path, f"x.{ending}", image, **options)
    assert (found[:16, :16] == 255).all()
    assert (found[60:, 66:] == 255).all()
    middle = found[22:48, 22:58].astype(float)
    assert middle.std() > 20
    if mode == "RGBA" and ending in ("png", "jp2", "tif"):
        assert (middle == RGB[22:48, 22:58]).all()
    assert pictures.look_at(tmp_path / f"x.{ending}").reason is None


def test_half_transparent_is_half_white(tmp_path):
    half = Image.new("RGBA", (64, 64), (100, 0, 50, 128))
    found = pixels(tmp_path, "x.png", half)
    assert np.abs(found[0, 0] - np.array([177, 127, 152])).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_one_colour_may_be_the_transparent_one(tmp_path, mode):
    grey = np.uint16(RGB[..., 0]) * 257 if mode == "I;16" else RGB[..., 0]
    image = Image.fromarray(RGB if mode == "RGB" else grey)
    clear = tuple(map(int, RGB[3, 5])) if mode == "RGB" else int(grey[3, 5])
    found = pixels(tmp_path, "x.png", image, transparency=clear)
    there = (RGB[3, 5] == RGB).all(-1) if mode == "RGB" else RGB[..., 0] == RGB[3, 5, 0]
    assert (found[there] == 255).all()
    whole = RGB if mode == "RGB" else np.repeat(RGB[..., :1], 3, -1)
    assert (found[~there] == whole[~there]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_fully_transparent_is_set_aside(tmp_path, mode):
    image = Image.fromarray(LAYERED * np.uint8([1, 1, 1, 0]))
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    with pytest.raises(PairsError) as error:
        pixels(tmp_path, "x.png", image)
    assert "fully transparent" in str(error.value)
    assert "fully transparent" in pictures.look_at(tmp_path / "x.png").reason


@pytest.mark.parametrize(
    ("ending", "order"),
    [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2"), ("jp2", "<u2")],
)
def test_sixteen_bits_are_scaled(tmp_path, ending, order):
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = pixels(tmp_path, f"x.{ending}", Image.fromarray(deep.astype(order)))
    assert (found == np.round(deep / 257)[..., None]).all()
    assert pictures.look_at(tmp_path / f"x.{ending}").reason is None


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_no_known_range_are_refused(tmp_path, kind):
    deep = np.arange(64 * 64).reshape(64, 64).astype(kind)
    with pytest.raises(PairsError) as error:
        pixels(tmp_path, "x.tif", Image.fromarray(deep))
    assert "32 bits a pixel, whose range is not known: save it with 8 or 16" in str(error.value)


@pytest.mark.parametrize(("mode", "near"), [("CMYK", 0), ("YCbCr", 3), ("LAB", 6)])
def test_other_colour_spaces(tmp_path, mode, near):
    smooth = np.asarray(Image.fromarray(RGB).resize((8, 8)).resize((80, 70), Image.BICUBIC))
    image = Image.fromarray(smooth)
    if mode == "LAB":
        to = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *to, outputMode="LAB")
    found = pixels(tmp_path, "x.tif", image if mode == "LAB" else image.convert(mode))
    assert np.abs(found.astype(int) - smooth).max() <= near


def test_images_are_turned_upright_cropped_and_made_rgb(tmp_path):
    image = Image.new("L", (40, 80), 10)
    image.paste(200, (0, 0, 40, 40))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "x.png", exif=exif)
    picture = read_image(tmp_path / "x.png", 20)
    assert picture.shape == (20, 20, 3)
    assert picture[0, 0, 0] < 50 < picture[-1, 0, 0]
