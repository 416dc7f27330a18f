"""Manifests: as many people write them, and what is wrong with one in one clear line."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import memlib
from memlib.hub import manifests
from memlib.paths import LAB
from memlib.prompts import PairsError


def one_line(error, pattern):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 300
    assert re.search(pattern, message), message


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
        ("caption,kind\na,x\n,x\n", "utf-8", "row 2: caption .* is empty"),
        ("caption,multiplicity\na,1\nb,many\n", "utf-8", "row 2: multiplicity 'many'"),
        ("caption,image\na,1\n", "utf-8", "1 is missing"),
        ("caption\na\nb, c\n", "utf-8", "more fields .* in line 3, saw 2.: quote captions"),
        (
            "index,caption,kind\n1,red, green,MV\n2,blue,N\n",
            "utf-8",
            "than columns, .*the first row.: quote",
        ),
        ("index,caption,kind\n1,blue,N\n\n2,red, green,MV", "utf-8", "in line 4, saw 4.: quote"),
        ('caption\na\n"b\nc\nd\n', "utf-8", "a quote that is not closed .EOF inside string"),
        ('caption,"kind\na,b\n', "utf-8", "a quote that is not closed .EOF inside string"),
        ("caption\n1, two\n3, four\n", "utf-8", "than columns, .*the first row.: quote"),
        ("kind;caption\nx;a;b\ny;c;d\n", "utf-8", "quote captions that hold ';'"),
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
    ("blank-at-the-end.csv", "caption,index\na,7\n,\n\n", ["a"], ["7"]),
    ("blank-lines.csv", "caption\na\n\nb\n\n", ["a", "b"], None),
    ("missing.csv", "caption,index,multiplicity\nNA,7,NA\nb,NA,2\n", ["NA", "b"], ["7", ""]),
    ("blank-at-the-start.csv", "\n\ncaption,index\na,7\n", ["a"], ["7"]),
    ("wide.csv", f"caption,index,picture\na,7,{'x' * 200_000}\n", ["a"], ["7"]),
    ("old-mac.csv", "caption,index\ra,7\rb,8\r", ["a", "b"], ["7", "8"]),
    ("mark.csv", '\ufeff"caption","index"\n"a",3\n', ["a"], ["3"]),
    ("mark.jsonl", '\ufeff{"caption": "a", "index": 3}\n', ["a"], ["3"]),
    ("array.json", '[{"Caption": "a", "Index": 3},\n {"Caption": "b", "Index": 4}]', ["a", "b"],
     ["3", "4"]),
    ("pandas.json", '{"caption":{"0":"a","1":"b"},"index":{"0":7,"1":8}}', ["a", "b"], ["7", "8"]),
    ("lines.json", '{"caption": "a\u2028b"}\n\n{"caption": "c"}\n', ["a\u2028b", "c"], None),
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
        ('{"caption": ["a", "b"]}', "row 1: caption .* is no text"),
        ('{"captions": ["a", "b"]}', "did you mean 'captions'"),
        ('{"caption": {"en": "a"}, "kind": "x"}', "row 1: caption .* is no text"),
        ('{"caption": "a"}\n["b"]', "row 2 is no JSON object"),
        ('{"caption": "a"}\n{"caption"', "cannot be read: Expecting .* line 2"),
        ('[{"caption": "a"},', "cannot be read: Expecting value"),
        ('[{"caption": "a"}, 3]', "row 2 is no JSON object"),
        ('{"caption": "a", "url": ["u"]}', "row 1: url .* is no text"),
        (
            '{"caption": "a", "image": {"bytes": "' + "QUJD" * 9999 + '"}}',
            "row 1: image .* cannot be decoded",
        ),
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
    pd.DataFrame({"caption": [data]}).to_parquet(tmp_path / "hub.parquet")
    with pytest.raises(PairsError, match=r"row 1: caption .* is no text"):
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


def test_numbers_stay_text_where_they_are_names(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt_id": "0001", "caption": "12", "multiplicity": 3}\n'
        '{"prompt_id": "1", "caption": "012"}\n'
    )
    found = memlib.load_pairs(tmp_path / "p.jsonl")
    assert list(found.prompt_id) == ["0001", "1"]
    assert list(found.caption) == ["12", "012"]
    assert found.multiplicity[0] == 3


def test_a_changed_reference_picture_is_named(tmp_path, monkeypatch):
    copy = tmp_path / "lab"
    shutil.copytree(LAB, copy, ignore=shutil.ignore_patterns("unet", "vae", "checkpoints"))
    monkeypatch.setattr(manifests, "LAB_PAIRS", copy / "pairs.csv")
    assert len(memlib.load_pairs("lab"))
    Image.new("RGB", (64, 64), "red").save(copy / "pairs" / "control-0.png")
    with pytest.raises(PairsError) as error:
        memlib.load_pairs("lab")
    one_line(error, "control-0.png is missing or damaged")


def test_json_lines_and_csv_with_an_index(tmp_path):
    """Wen's format: caption, index, url. Images from any folder."""
    file = tmp_path / "list.jsonl"
    rows = [
        {"caption": "a", "index": 3, "url": "http://x"},
        {"caption": "b", "index": 4, "url": ""},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(memlib.load_pairs("lab").image[0], folder / "003.png")
    for source in (file, tmp_path / "list.csv"):
        if source.suffix == ".csv":
            pd.DataFrame(rows).to_csv(source, index=False)
        pairs = memlib.load_pairs(source, images=folder)
        assert list(pairs.prompt_id) == ["3", "4"]
        assert [bool(i) for i in pairs.image] == [True, False]
    with pytest.raises(PairsError, match="no folder"):
        memlib.load_pairs(file, images=tmp_path / "nowhere")
