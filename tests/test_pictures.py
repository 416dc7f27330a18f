"""Pictures in files and archives: whose each is, and what is none."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import memlib
from memlib.hub import pictures


def noise(seed, file=None, kind="PNG"):
    """Another picture for every seed; its bytes, and in a file."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 90, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(out.getvalue())
    return out.getvalue()


def found(table, folder):
    """The names of the pictures that are found for a list's rows, and the notes."""
    pairs = pictures.find_images(pd.DataFrame(table).astype(str), folder)
    names = [str(Path(i).relative_to(folder.resolve())) if i else "" for i in pairs.image]
    return names, list(pairs.image_note)


FOUR = {"prompt_id": ["12", "13", "14", "15"], "caption": list("abcd")}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"00000/000000012.jpg": 1, "00000/000000013.jpg": 2, "00001/000010003.jpg": 3},
         ["00000/000000012.jpg", "00000/000000013.jpg", "", ""]),
        ({"12.avif": "AVIF", "13.jfif": "JPEG", "14.JPG": "JPEG", "15.jp2": "JPEG2000"},
         ["12.avif", "13.jfif", "14.JPG", "15.jp2"]),
        ({"12.0.png": 1, "0014.PNG": 2, "13.pgm": "PPM", "15.webp": "AVIF"},  # by its content
         ["12.0.png", "13.pgm", "0014.PNG", "15.webp"]),
        ({"12.jpg": 1, "._12.jpg": b"\0\5\x16\7", "__MACOSX/._13.jpg": b"\0\5", ".cache/14.png": 3,
          "set-aside/15.png": 4}, ["12.jpg", "", "", ""]),
        ({"12.jpg": 1, "12.gif": b"<html>gone</html>", "13.png": 2, "13.jpg": b"", "14.gif": b"",
          "deep/er/14.png": 3}, ["12.jpg", "13.png", "deep/er/14.png", ""]),
    ],
)  # fmt: skip
def test_pictures_as_other_tools_leave_them(tmp_path, files, expected):
    folder, copy = tmp_path / "left", tmp_path / "copy"
    for n, (name, content) in enumerate(files.items()):
        data = noise(n, folder / name, content if isinstance(content, str) else "PNG")
        (folder / name).write_bytes(content if isinstance(content, bytes) else data)
    names, notes = found(FOUR, folder)
    assert names == expected
    assert all(bool(name) != bool(note) for name, note in zip(names, notes, strict=True))
    pictures.copy_pictures(folder, copy)
    assert found(FOUR, copy) == (names, notes)


def test_a_picture_is_whose_its_address_says(tmp_path):
    """img2dataset numbers the rows that it was given; its JSON files say which these were."""
    rows = {"prompt_id": ["1", "2", "3", "4"], "caption": ["a", "b", "b", "d"],
            "url": ["u1", "u2", "u3", ""]}  # fmt: skip
    told = {0: ("u1", "a"), 1: ("u3", "b"), 2: ("gone", "b"), 3: ("", "d"), 4: ("u9", "z")}
    for key, (url, caption) in told.items():
        noise(key, tmp_path / f"00000/{key:09}.jpg")
        (tmp_path / f"00000/{key:09}.json").write_text(
            json.dumps({"url": url, "caption": caption, "key": f"{key:09}", "status": "success"})
        )
    names, notes = found(rows, tmp_path)
    assert [Path(n).stem[-1:] for n in names] == ["0", "2", "1", "3"]  # 2: by number and caption
    assert notes == [""] * 4
    (tmp_path / "00000/000000001.json").write_text("[broken")  # then its number is all there is
    assert Path(found(rows, tmp_path)[0][0]).stem == "000000000"
    del rows["url"]
    assert [Path(n).stem[-1:] for n in found(rows, tmp_path)[0]] == ["0", "2", "2", "3"]


def test_rows_without_ids_are_counted(tmp_path):
    for n in range(3):
        noise(n, tmp_path / f"images/{n:04}.png")
    (tmp_path / "list.csv").write_text("caption\na\nb\n")
    pairs = memlib.load_pairs(tmp_path / "list.csv", tmp_path / "images")
    assert [Path(i).name for i in pairs.image] == ["0000.png", "0001.png"]
    assert pairs.prompt_id.str.match(r"[ab]-[0-9a-f]{8}$").all()
    (tmp_path / "list.csv").write_text("caption,index\na,\nb,7\n")  # 1 would be another's index
    pairs = memlib.load_pairs(tmp_path / "list.csv", tmp_path / "images")
    assert list(pairs.image) == ["", ""]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("123", "123"), ("012", "012"), ("01", ["0", "1", ""]), ("0123", "012"),
        ("3", ["", "", "3"]), ("12", None), ("1234", None), ("2", None),
    ],
)  # fmt: skip
def test_rows_without_ids_are_counted_from_0_or_1(tmp_path, names, expected):
    for n in names:
        noise(int(n), tmp_path / f"{n}.png")
    stems, notes = found({"prompt_id": [""] * 3, "caption": list("abc")}, tmp_path)
    assert stems == ([f"{n}.png" if n else "" for n in expected] if expected else [""] * 3)
    if expected is None:
        assert notes == ["no picture: are they counted from 0 or from 1? None is 0 or 3"] * 3


@pytest.mark.parametrize(
    ("ids", "files", "expected"),
    [
        (["1", "2"], ["001.png", "1.png", "02.png"], ["1.png", "02.png"]),
        (["007", "7"], ["007.png", "7.png"], ["007.png", "7.png"]),
        (["007", "7"], ["7.png"], ["", "7.png"]),
        (["dog.png", "x/y"], ["dog.png", "x/y.png", "z/y.png"], ["dog.png", "x/y.png"]),
        (["a/1", "b/1.png"], ["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"]),
    ],
)
def test_the_name_as_it_is_goes_before_leading_zeros(tmp_path, ids, files, expected):
    for n, file in enumerate(files):
        noise(n, tmp_path / file)
    assert found({"prompt_id": ids, "caption": ["a", "b"]}, tmp_path)[0] == expected


def test_a_folder_fills_in_what_the_manifest_does_not_name(tmp_path):
    for n, name in enumerate(("own.png", "in/1.png", "in/2.png")):
        noise(n, tmp_path / name)
    shutil.copy(tmp_path / "own.png", tmp_path / "in/4.png")
    text = "prompt_id,caption,image\n1,a,own.png\n2,b,\n3,c,own.png\n4,d,\n"
    (tmp_path / "list.csv").write_text(text)
    pairs = memlib.load_pairs(tmp_path / "list.csv", tmp_path / "in")
    assert [Path(i).name for i in pairs.image] == ["own.png", "2.png", "own.png", ""]
    assert list(pairs.image_note[:3]) == [""] * 3
    assert pairs.image_note[3].startswith("a placeholder")


def test_a_text_beside_a_picture_may_say_whose_it_is(tmp_path):
    texts = {"12": "b\n", "13": "a", "14": "a picture of something", "15": "d", "16": ""}
    for n, (name, text) in enumerate(texts.items()):
        noise(n, tmp_path / f"in/{name}.png")
        (tmp_path / f"in/{name}.txt").write_text(text)
    assert found(FOUR, tmp_path / "in")[0] == ["13.png", "12.png", "14.png", "15.png"]
    pictures.copy_pictures(tmp_path / "in", tmp_path / "copy")
    (tmp_path / "copy/13.png").unlink()
    (tmp_path / "copy/16.json").write_text('{"caption": "z"}')
    rows = {"prompt_id": ["12", "13", "16"], "caption": list("abc")}
    names, notes = found(rows, tmp_path / "copy")
    assert names == ["", "12.png", ""]
    other = "no picture: the JSON or text beside the one of its name is of another"
    assert notes[::2] == [other, other]


@pytest.mark.parametrize("name", ["00000.tar", "deep/er/00000.parquet", "x.ZIP"])
def test_a_folder_of_archives_is_said_to_be_one(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    note = f"no picture: the folder holds archives ({Path(name).name}); unpack them, or "
    assert all(n.startswith(note) and len(n) < 300 for n in found(FOUR, tmp_path)[1])
    with pytest.raises(ValueError, match=r"no picture in .*: the folder holds archives"):
        pictures.copy_pictures(tmp_path, tmp_path.parent / "copy")
    noise(0, tmp_path / "00000/12.jpg")  # then it is img2dataset's table of what it downloaded
    assert found(FOUR, tmp_path)[1] == ["", *["no picture"] * 3]


@pytest.mark.parametrize(
    ("captions", "urls", "kept"),
    [
        (["a cat", "two dogs", "x"], None, False),
        (["a cat", "two dogs", "x"], ["http://a/1", "http://a/2", "z"], False),
        (["a cat", "two dogs", "x"], ["http://a/1", "http://a/1", "z"], True),
        (["a cat", "two dogs", "x"], ["http://a/1", "HTTPS://a/1#top", "z"], True),
        (["A cat, asleep", "a CAT (asleep)", "x"], ["http://a/1", "http://b/2", "z"], True),
    ],
)
def test_one_picture_for_several_prompts(tmp_path, captions, urls, kept):
    table = {"prompt_id": ["1", "2", "3"], "caption": captions} | ({"url": urls} if urls else {})
    for n in (1, 2, 3):
        noise(max(n, 2), tmp_path / f"{n}.png")
    names, notes = found(table, tmp_path)
    assert names == (["1.png", "2.png", "3.png"] if kept else ["", "", "3.png"])
    reason = "a placeholder: the same picture came for "
    assert notes == (["", "", ""] if kept else [reason + "2", reason + "1", ""])


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives(tmp_path, kind):
    picture = noise(0)
    archive = tmp_path / f"images.{kind}"
    members = {"._7.png": b"", "deep/7.png": picture, "8.png": picture, "notes.txt": b"",
               "00000/9.png": picture, "00000/9.json": b"{}"}  # fmt: skip
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as pack:
            for name, data in (members | {"../../evil.png": picture}).items():
                pack.writestr(name, data)
    else:
        with tarfile.open(archive, "w:gz") as pack:
            for name, data in members.items():
                item = tarfile.TarInfo(name)
                item.size = len(data)
                pack.addfile(item, io.BytesIO(data))
    folder = tmp_path / "out" / "images"
    pictures.unpack(archive, folder)
    kept = {"deep/7.png", "8.png", "00000/9.png", "00000/9.json"}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} == kept
    assert (folder / "deep/7.png").read_bytes() == picture
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        pictures.unpack(archive, folder)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["images"]


@pytest.mark.parametrize("name", ["../../evil.png", "link.png"])
def test_an_archive_cannot_leave_the_folder(tmp_path, name):
    with tarfile.open(tmp_path / "images.tar", "w") as pack:
        item = tarfile.TarInfo(name)
        if name == "link.png":
            item.type, item.linkname = tarfile.SYMTYPE, "/etc/passwd"
        pack.addfile(item)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        pictures.unpack(tmp_path / "images.tar", tmp_path / "out/images")
    assert not list(tmp_path.rglob("*.png"))


def test_a_usable_picture_is_known_by_its_content(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"  # a name says nothing
    assert pictures.look_at(file).reason == "no such file"
    noise(0, file)
    assert pictures.look_at(file) == (None, ".png", (90, 80))
    file.write_bytes(b"\0" * 2000)
    assert "not an image of a kind that Pillow reads" in pictures.look_at(file).reason
    noise(0, file, "AVIF")  # of which an older Pillow knows nothing
    monkeypatch.setattr(pictures, "readable", lambda: ("JPEG", "PNG"))
    assert pictures.look_at(file).reason.endswith("reads here (JPEG, PNG)")
