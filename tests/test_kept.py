"""Results of a chapter's experiments: kept by the source of what made them, and compared."""

import linecache
from itertools import count

import numpy as np
import pytest
import xarray as xr

import memlib
from memlib.mitigation import methods
from memlib.paths import cache_folder
from memlib.runs import kept as kept_module
from memlib.runs.kept import kept
from memlib.runs.store import StoreError

CHAPTER = '''
import numpy as np
import xarray as xr

factor, CALLS = 2.0, None


class Scaled:
    """Has a method that uses a global."""

    def of(self, x):
        return factor * x


def halved(x):
    return x / 2


def shifted(by):
    return lambda x: x + by


def measured(rows, change, seeds):
    """An experiment."""
    np.random.calls.append(len(rows))
    lengths = np.array([[len(c)] * seeds for c in rows.caption], float) * np.random.machine
    return xr.Dataset({"v": (("prompt", "seed"), change(Scaled().of(halved(lengths))))})
'''
NUMBERS = count()


def chapter(old: str = "", new: str = "") -> dict:
    """The names of a chapter whose code has been edited once; Python finds its source."""
    assert old in CHAPTER
    source, file = CHAPTER.replace(old, new), f"<chapter {next(NUMBERS)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    names = {"__name__": "__main__"}
    exec(compile(source, file, "exec"), names)
    return names


@pytest.fixture
def calls(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_module, "TRACES", tmp_path / "shipped")
    found = []
    monkeypatch.setattr(np.random, "calls", found, raising=False)
    monkeypatch.setattr(np.random, "machine", 1.0, raising=False)  # what no key knows of
    return found


@pytest.fixture
def rows():
    return memlib.load_pairs("lab").iloc[:4]


def ask(names, rows, by=1.0, seeds=2):
    return kept(names["measured"], rows, names["shifted"](by), seeds)


def test_what_was_computed_is_read(calls, rows):
    first, again = ask(chapter(), rows), ask(chapter(), rows)
    assert calls == [4]
    assert again.identical(first)
    assert first.v.values[:, 0] == pytest.approx(rows.caption.str.len() + 1)


@pytest.mark.parametrize(("old", "new"), [
    ("x / 2", "x / 4"), ("factor * x", "factor + x"), ("2.0", "2.5"), ("x + by", "x - by"),
    ("lengths = ", "lengths = 1 + "), ("* seeds", "* seeds * 1"),
])  # fmt: skip
def test_another_source_is_computed(calls, rows, old, new):
    ask(chapter(), rows)
    ask(chapter(old, new), rows)
    assert calls == [4, 4]


@pytest.mark.parametrize(("old", "new"), [
    ("    return x / 2", "    # a comment\n\n    return (x / 2)"),
    ("CALLS = 2.0, None", "CALLS = 2.0, 5"),
    ("import xarray as xr", "import xarray as xr\n\nunused = 1"),
])  # fmt: skip
def test_what_makes_no_number_computes_nothing(calls, rows, old, new):
    ask(chapter(), rows)
    ask(chapter(old, new), rows)
    assert calls == [4]


def test_other_arguments_are_computed(calls, rows, tmp_path):
    names, picture = chapter(), tmp_path / "other.png"
    ask(names, rows)
    ask(names, rows, by=2.0)
    ask(names, rows, seeds=3)
    ask(names, rows.iloc[:3])
    ask(names, rows.assign(caption="a cat"))
    picture.write_bytes(b"another picture")
    ask(names, rows.assign(image=str(picture)))
    assert calls == [4, 4, 4, 3, 4, 4]


def test_models_are_told_by_their_weights(calls, rows):
    names = chapter("change(Scaled()", "(lambda x: x)(Scaled()")
    models = [memlib.ExactModel([[[[value]]]], ["a"]) for value in (1.0, 1.0, 2.0)]
    for model in models:
        kept(names["measured"], rows, model, 2)
    assert calls == [4, 4]


def test_what_cannot_be_told_apart_is_refused(calls, rows):
    with pytest.raises(TypeError, match="a result cannot be kept by a object"):
        kept(chapter()["measured"], rows, object(), 2)


def test_a_function_that_holds_values_is_refused():
    """Its name would say nothing of them; a module that a chapter uses is known by its code."""
    until, met = methods.static(700), []
    with pytest.raises(TypeError, match="holds values"):
        kept_module._said(until, met)
    assert kept_module._said(methods, met) == "memlib.mitigation.methods"
    assert met == ["memlib.mitigation.methods"]


def test_a_damaged_file_is_computed_anew(calls, rows):
    first = ask(chapter(), rows)
    (file,) = cache_folder().glob("kept-measured-*.zip")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="cannot be used .*computed anew"):
        assert ask(chapter(), rows).identical(first)
    assert ask(chapter(), rows).identical(first)
    assert calls == [4, 4]


@pytest.fixture
def shipped(calls, rows, tmp_path, monkeypatch):
    """A result that comes with the book; all of it is computed again."""
    first = ask(chapter(), rows)
    (file,) = cache_folder().glob("kept-measured-*.zip")
    (tmp_path / "shipped").mkdir()
    file.rename(tmp_path / "shipped" / f"{file.stem.rsplit('-', 1)[0]}.zip")
    monkeypatch.setattr(kept_module, "DRAWN", 0.0)
    monkeypatch.setattr(kept_module, "CHECKED", 1.0)
    monkeypatch.setattr(kept_module, "SHARE", 1.0)
    calls.clear()
    return first


def test_what_comes_with_the_book_is_compared(calls, rows, shipped, monkeypatch):
    found = ask(chapter(), rows)
    assert calls == [4]
    assert found.attrs == {"again": 4, "largest": 0.0}
    monkeypatch.setattr(kept_module, "CHECKED", 0.0)
    assert ask(chapter(), rows).attrs["again"] == 0
    assert calls == [4]
    monkeypatch.setenv("MEMLIB_FRESH", "1")
    assert ask(chapter(), rows).equals(shipped)
    assert calls == [4, 4, 1]  # and a row alone


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_a_part_of_the_rows_is_computed_again(calls, rows, shipped, monkeypatch, share):
    """Others each time, and as many, in the mean, as the share says."""
    monkeypatch.setattr(kept_module, "SHARE", share)
    found = [ask(chapter(), rows).attrs["again"] for _ in range(60)]
    assert [n for n in found if n] == calls
    assert {*found} <= {int(share * len(rows)), int(share * len(rows)) + 1}
    assert np.mean(found) == pytest.approx(share * len(rows), abs=0.25)


def test_few_results_are_computed_again(rows, monkeypatch):
    """Of a kernel that is drawn one result in ten; of any other none."""
    rows, asked = rows.iloc[[0] * 20], []

    def again(part):
        asked.append(len(part))
        return xr.Dataset({"v": ("prompt", np.ones(len(part)))})

    known = xr.Dataset({"v": ("prompt", np.ones(20))})
    generator = np.random.default_rng(0)
    monkeypatch.setattr(np.random, "default_rng", lambda: generator)
    for drawn, least, most in ((kept_module.KERNELS - 0.01, 2, 25), (kept_module.KERNELS, 0, 0)):
        asked.clear()
        monkeypatch.setattr(kept_module, "DRAWN", drawn)
        for _ in range(100):
            kept_module._compared(known, cache_folder() / "kept-x.zip", again, rows, ())
        assert {*asked} <= {2, 3}
        assert least <= len(asked) <= most


@pytest.mark.parametrize(("others", "passes"), [(1, True), (3, False)])
def test_one_picture_may_take_another_way(monkeypatch, others, passes):
    """Of a row's five numbers one may differ, and most may not."""
    rows = memlib.load_pairs("lab").iloc[:3]
    known = xr.Dataset({"v": (("prompt", "seed"), np.ones((3, 5)))})
    made = known.copy(deep=True)
    made["v"][1, :others] = 0.5
    monkeypatch.setattr(kept_module, "DRAWN", 0.0)
    monkeypatch.setattr(kept_module, "CHECKED", 1.0)
    monkeypatch.setattr(kept_module, "SHARE", 1.0)
    file = cache_folder() / "kept-x.zip"
    if passes:
        found = kept_module._compared(known, file, lambda rows: made, rows, ())
        assert found.attrs == {"again": 3, "largest": 0.0}
    else:
        with pytest.raises(StoreError, match=r"v differs by 0\.5"):
            kept_module._compared(known, file, lambda rows: made, rows, ())


def test_what_this_code_does_not_make_is_an_error(calls, rows, shipped, monkeypatch):
    monkeypatch.setattr(np.random, "machine", 1.1)
    with pytest.raises(
        StoreError, match=r"make traces.* is not what this code makes: v differs by 0\.0"
    ):
        ask(chapter(), rows)


def test_a_row_that_hangs_on_the_others_is_refused(calls, rows, monkeypatch):
    """It could not be computed again; found where everything is made from nothing."""
    monkeypatch.setenv("MEMLIB_FRESH", "1")
    together = chapter("np.random.machine\n", "np.random.machine * len(rows)\n")
    with pytest.raises(StoreError, match="other numbers alone than among others: v differs"):
        ask(together, rows)
    assert not [*cache_folder().glob("kept-*.zip")]
    assert calls == [4, 1]
    ask(together, rows.iloc[:1])  # there are no others
    assert calls == [4, 1, 1]
