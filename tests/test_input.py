"""Wrong input: one clear line that says what is wrong, and nothing half-written."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageCms

import memlib
from memlib import cli, measures
from memlib.hub import pictures
from memlib.models import ModelError
from memlib.paths import LAB, cache_folder
from memlib.prompts import PairsError
from memlib.runs.commands import write_table


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


def manifest(tmp_path, text, encoding="utf-8"):
    file = tmp_path / "pairs.csv"
    file.write_bytes(text.encode(encoding))
    return file


@pytest.mark.parametrize(
    ("text", "encoding", "pattern"),
    [
        ("captoin\na\n", "utf-8", "no column 'caption': did you mean 'captoin'"),
        ("caption\n", "utf-8", "no rows"),
        ('caption\na\n" "\n', "utf-8", "row 2: caption .* is empty"),
        ("caption\na\na\n", "utf-8", "row 2: caption 'a' is duplicated"),
        ("prompt_id,caption\n1,a\n1,b\n", "utf-8", "prompt_id '1' is duplicated"),
        ("caption\ncafé\n", "latin-1", "cannot be read: 'utf-8' codec can't decode"),
        ("caption,image\na,gone.png\n", "utf-8", "gone.png is missing"),
        ("", "utf-8", "cannot be read"),
        ("caption,kind\na dog, on a mat,normal\n", "utf-8", "quote captions"),
        ("caption\na\n\nb\n", "utf-8", "row 2: caption .* is empty"),
        ("caption,multiplicity\na,1\nb,many\n", "utf-8", "row 2: multiplicity 'many'"),
        ("caption,image\na,1\n", "utf-8", "1 is missing"),
        ("caption\na\nb, c\n", "utf-8", "more fields than columns in line 3: quote captions"),
        ("index,caption,kind\n1,red, green,MV\n2,blue,N\n", "utf-8", "columns in line 2: quote"),
        ("index,caption,kind\n1,blue,N\n\n2,red, green,MV", "utf-8", "columns in line 4: quote"),
        ("sep=;\ncaption\na;b", "utf-8", "columns in line 3: quote captions that hold ';'"),
        ('caption\na\n"b\nc\nd\n', "utf-8", "a quote that is not closed, in the row from line 3"),
        ('caption,"kind\na,b\n', "utf-8", "a quote that is not closed, in the row from line 1"),
        ("caption,index\na\rb,7\nc,8\n", "utf-8", "cannot be read: new-line character"),
        ("caption\n1, two\n3, four\n", "utf-8", "columns in line 2: quote"),
        ("kind;caption\nx;a;b\ny;c;d\n", "utf-8", "quote captions that hold ';'"),
        ("Caption,CAPTION\na,b\n", "utf-8", "the column 'caption' twice"),
        ("caption_0,caption_1\na,b\n", "utf-8", "did you mean 'caption_."),
        ("caption\n" + 2 * ("x" * 5000 + "\n"), "utf-8", "row 2: caption 'xxx.*xxx' is duplicated"),
        ("caption,image\na," + "x" * 5000, "utf-8", "row 1: image .* cannot be decoded"),
        (",".join(f"column_{n}" for n in range(200)) + "\n1", "utf-8", "no column 'caption'"),
    ],
)
def test_broken_manifests(tmp_path, text, encoding, pattern):
    with pytest.raises(PairsError) as error:
        memlib.load_pairs(manifest(tmp_path, text, encoding))
    one_line(error, pattern)
    assert len(str(error.value)) <= 300


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


LISTS = [  # name, text, caption and prompt_id of the rows
    ("LIST.CSV", "caption\na boat\n", ["a boat"], None),
    ("semicolon.csv", ';Caption;URL;type;Index\n0;"A ""b"", c";u;VM;1030700001\n1;d;v;TM;7\n',
     ['A "b", c', "d"], ["1030700001", "7"]),
    ("tab.csv", "Index\tCAPTION\n7\ta, b; c\n", ["a, b; c"], ["7"]),
    ("tab.tsv", "caption\tindex\na, b\t7\n", ["a, b"], ["7"]),
    ("one.csv", "caption\na; b\nc; d\n", ["a; b", "c; d"], None),
    ("one.tsv", "caption\na, b; c\n", ["a, b; c"], None),
    ("numbered.csv", "caption,url\n0,a,u\n1,b,v\n", ["a", "b"], None),
    ("numbered-by-r.csv", '"caption","index"\n"1","a",7\n"2","b",8\n', ["a", "b"], ["7", "8"]),
    ("comma-at-the-end.csv", "index,caption\n7,a,\n8,b,\n", ["a", "b"], ["7", "8"]),
    ("blank-at-the-end.csv", "caption,index\na,7\n,\n\n", ["a"], ["7"]),
    ("blank-lines.csv", "caption\na\n\n\n", ["a"], None),
    ("missing.csv", "caption,index,multiplicity\nNA,7,NA\nb,NA,2\n", ["NA", "b"], ["7", ""]),
    ("excel.csv", "sep=;\r\nCaption;Index\r\na, b;7\r\n", ["a, b"], ["7"]),
    ("excel-bar.csv", "sep=|\ncaption|index\na, b|7\n", ["a, b"], ["7"]),
    ("blank-at-the-start.csv", "\n\ncaption,index\na,7\n", ["a"], ["7"]),
    ("wide.csv", f"caption,index,picture\na,7,{'x' * 200_000}\n", ["a"], ["7"]),
    ("old-mac.csv", "caption,index\ra,7\rb,8\r", ["a", "b"], ["7", "8"]),
    ("mark.csv", '\ufeff"caption","index"\n"a",3\n', ["a"], ["3"]),
    ("mark.jsonl", '\ufeff{"caption": "a", "index": 3}\n', ["a"], ["3"]),
    ("array.json", '[{"Caption": "a", "Index": 3},\n {"Caption": "b", "Index": 4}]', ["a", "b"],
     ["3", "4"]),
    ("pandas.json", '{"caption":{"0":"a","1":"b"},"index":{"0":7,"1":8}}', ["a", "b"], ["7", "8"]),
    ("lines.json", '{"caption": "a\u2028b"}\n\n{"caption": ["c"]}\n', ["a\u2028b", "c"], None),
    ("gap.csv", "caption,index\na,12\nb,\nc,14.0\n", ["a", "b", "c"], ["12", "", "14"]),
    ("gap.jsonl", '{"caption": "a", "index": 9007199254740993}\n{"caption": "b"}\n', ["a", "b"],
     ["9007199254740993", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "captions", "ids"), LISTS, ids=[x[0] for x in LISTS])
def test_lists_as_others_write_them(tmp_path, name, text, captions, ids):
    (tmp_path / name).write_bytes(text.encode())
    pairs = memlib.load_pairs(tmp_path / name)
    assert list(pairs.caption) == captions
    for found, wanted in zip(pairs.prompt_id, ids or [""] * len(captions), strict=True):
        assert re.fullmatch(wanted or r"([a-z0-9]+-)*[0-9a-f]{8}", found)


@pytest.mark.parametrize("index", [["index"], ["caption"], ["index", "caption"]])
def test_columns_that_were_made_the_index(tmp_path, index):
    table = pd.DataFrame({"caption": ["a", "b"], "index": [7, 8], "kind": ["x", "y"]})
    table.set_index(index).to_parquet(tmp_path / "p.parquet")
    pairs = memlib.load_pairs(tmp_path / "p.parquet")
    assert list(pairs.prompt_id) == ["7", "8"]
    assert list(pairs.caption) == ["a", "b"]


def test_a_list_from_a_spreadsheet(tmp_path):
    (tmp_path / "p.csv").write_text("caption\nein Bär\n", encoding="utf-16")
    assert list(memlib.load_pairs(tmp_path / "p.csv").caption) == ["ein Bär"]


def test_kinds_of_another_list_keep_their_words(tmp_path):
    pairs = memlib.load_pairs(manifest(tmp_path, "caption,overfit_type\na,VM\nb,TM\nc,MV\n"))
    assert list(pairs.kind) == ["VM", "TM", "memorized"]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('{"caption": ["a", "b"]}', "row 1: the caption is no text but list"),
        ('{"captions": ["a", "b"]}', "did you mean 'captions'"),
        ('{"caption": {"en": "a"}}', "no text but dict"),
        ('{"caption": "a"}\n["b"]', "row 2 is no JSON object"),
        ('{"caption": "a"}\n{"caption"', "row 2 is no JSON object"),
        ('[{"caption": "a"},', "cannot be read: Expecting value"),
        ('{"caption": {"0": "a", "1": "b"}, "kind": {"0": "x"}}', "no text but dict"),
        ('[{"caption": "a"}, 3]', "row 2 is no JSON object"),
        ('{"caption": "a", "url": ["u"]}', "the url is no text but list"),
        ('{"caption": "a", "image": {"bytes": "' + "QUJD" * 9999 + '"}}', "no path but dict"),
        ('{"caption": "a", "image": "a\\u0000b"}', "no path"),
        ('{"caption": "a"}\n{"caption": "b \\ud83d"}', "row 2 holds half a character"),
        ('{"caption": "a", "kind": "\\udc00"}', "row 1 holds half a character"),
        ('{"caption": "a", "image": "\\udc00"}', "row 1 holds half a character"),
        ('{"caption": "a", "image": "https://e.com/x.png"}', "an address, 'https://e.com/x.png'"),
        (
            '{"caption": "a", "image": {"url": "HTTP://e.com/x.png"}}',
            "row 1: the image is an address",
        ),
        ('{"caption": "a", "image": {"src": "http://e.com/x"}}', "row 1: the image is an address"),
        ('{"caption": "a", "image": "s3://' + "x" * 500 + '"}', "the image is an address"),
        ('{"caption": "a", "image": "data:image/png;base64,QUJD"}', "the image is an address"),
    ],
)
def test_broken_json(tmp_path, text, pattern):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(PairsError) as error:
        memlib.load_pairs(tmp_path / "p.jsonl")
    one_line(error, pattern)
    assert len(str(error.value)) <= 300


def test_pictures_in_a_parquet_column(tmp_path, monkeypatch):
    """As data sets of the Hub have them: kept once, by their checksum."""
    monkeypatch.setenv("MEMLIB_DATA", str(tmp_path / "data"))
    file = memlib.load_pairs("lab").image[0]
    data = Path(file).read_bytes()
    shutil.copy(file, tmp_path / "beside.png")
    column = [{"bytes": data, "path": "x.png"}, {"bytes": None, "path": "beside.png"}, None,
              {"bytes": data, "path": None}]  # fmt: skip
    table = pd.DataFrame({"Caption": list("abcd"), "Image": column})
    table.to_parquet(tmp_path / "hub.parquet")
    table.assign(Image=[data, None, None, data]).to_parquet(tmp_path / "raw.parquet")
    for name in ("hub", "raw"):
        pairs = memlib.load_pairs(tmp_path / f"{name}.parquet")
        assert [bool(i) for i in pairs.image] == [True, name == "hub", False, True]
        assert Path(pairs.image[0]).read_bytes() == data
        assert pairs.image[0] == pairs.image[3]
        assert len(list((tmp_path / "data/pictures").iterdir())) == 1
    broken = {"row 1: image .* decoded": {"bytes": b"<html>" * 9999}, "no path but": [data, data]}
    for pattern, value in broken.items():
        pd.DataFrame({"caption": ["a"], "image": [value]}).to_parquet(tmp_path / "hub.parquet")
        with pytest.raises(PairsError) as error:
            memlib.load_pairs(tmp_path / "hub.parquet")
        one_line(error, pattern)
        assert len(str(error.value)) <= 300
    pd.DataFrame({"caption": [data]}).to_parquet(tmp_path / "hub.parquet")
    with pytest.raises(PairsError, match="row 1: the caption is no text but bytes"):
        memlib.load_pairs(tmp_path / "hub.parquet")


def test_ids_that_are_made_up(tmp_path):
    """They name what is recorded of a row, wherever it stands: so two lists never collide."""
    file = memlib.load_pairs("lab").image[0]
    shutil.copy(file, tmp_path / "a.png")

    def ids(text):
        return list(memlib.load_pairs(manifest(tmp_path, text)).prompt_id)

    one, two = ids('caption\nA red boat!\n"图, 图"\n')
    assert re.fullmatch("a-red-boat-[0-9a-f]{8}", one)
    assert re.fullmatch("[0-9a-f]{8}", two)
    assert ids('caption\n"图, 图"\na green tree\nA red boat!\n')[::2] == [two, one]
    typo = ids("caption\nA red boat?\n")
    near = ids("caption\n A red boat!\nA red boat! \nboat 2\nboat 2.0\n")
    kinds = ids("caption,kind\nA red boat!,memorized\n")
    counted = ids("caption,multiplicity\nA red boat!,3\nb,\n")[:1]
    assert counted == ids("caption,multiplicity\nA red boat!,3\n")
    pictured = ids("caption,image\nA red boat!,a.png\n")
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    replaced = ids("caption,image\nA red boat!,a.png\n")
    every = [one, *typo, *near, *kinds, *counted, *pictured, *replaced]
    assert len(set(every)) == len(every)
    assert ids("caption,prompt_id\nx,7\nA red boat!,\n") == ["7", one]
    twice = ids("caption,overfit_type\na,MV\na,MV\n")  # a published list may hold a row twice
    assert twice[1] == twice[0] + "-2"


def pixels(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return memlib.prompts.read_image(tmp_path / name, None)


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
    assert pictures.check_image(tmp_path / f"x.{ending}") is None


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
    one_line(error, "fully transparent")
    assert "fully transparent" in pictures.check_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("ending", "order"),
    [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2"), ("jp2", "<u2")],
)
def test_sixteen_bits_are_scaled(tmp_path, ending, order):
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = pixels(tmp_path, f"x.{ending}", Image.fromarray(deep.astype(order)))
    assert (found == np.round(deep / 257)[..., None]).all()
    assert pictures.check_image(tmp_path / f"x.{ending}") is None


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_no_known_range_are_refused(tmp_path, kind):
    deep = np.arange(64 * 64).reshape(64, 64).astype(kind)
    with pytest.raises(PairsError) as error:
        pixels(tmp_path, "x.tif", Image.fromarray(deep))
    one_line(error, "32 bits a pixel, whose range is not known: save it with 8 or 16")


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
    picture = memlib.prompts.read_image(tmp_path / "x.png", 20)
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


def test_a_changed_reference_picture_is_named(tmp_path, monkeypatch):
    from memlib.hub import manifests as pairs

    copy = tmp_path / "lab"
    shutil.copytree(LAB, copy, ignore=shutil.ignore_patterns("unet", "vae", "checkpoints"))
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
