"""What `book/_ext/reading.py` and `site/page.py` put into pages, apart from a browser."""

import importlib.util
import itertools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

import memlib
from memlib import plot
from memlib.paths import ROOT
from memlib.site import about, chapters, page

spec = importlib.util.spec_from_file_location("reading", ROOT / "book/_ext/reading.py")
reading = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reading)


def drawn(tmp_path, *shape, sharey=False):
    figure, axes = plt.subplots(*shape, figsize=(8, 3), sharey=sharey, squeeze=False)
    for ax in axes.flat:
        ax.plot(np.random.default_rng(0).normal(size=30))
        ax.set(xlabel="step", ylabel="height")
    figure.savefig(tmp_path / "drawn.png", dpi=160)
    plt.close(figure)
    return tmp_path / "drawn.png", [ax.get_position() for ax in axes[0]]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sharey", [False, True])
def test_a_plot_is_cut_between_its_panels(tmp_path, count, sharey):
    file, places = drawn(tmp_path, 1, count, sharey=sharey)
    parts = reading.panels(file)
    assert len(parts) == count
    assert parts[0][0] == 0
    assert parts[-1][1] == 1
    for (_, cut), left, right in zip(parts, places, places[1:], strict=False):
        assert left.x1 < cut < right.x0


def test_a_sheet_of_pictures_stays_whole(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    plot.sheet([pictures] * 3, ["a", "b", "c"]).savefig(tmp_path / "sheet.png", dpi=160)
    assert reading.panels(tmp_path / "sheet.png") == []


def test_a_question_knows_its_answer():
    html = page.ask("How many, on <this> run?", np.float64(3.14159), 0.01).data
    assert 'data-answer="3.14159"' in html
    assert 'data-tolerance="0.01"' in html
    assert "&lt;this&gt;" in html
    html = page.ask("Which?", "the first", choices=("the first", "the second")).data
    assert re.findall("<option>(.*?)</option>", html) == ["", "the first", "the second"]
    with pytest.raises(ValueError, match="'third' is none of the choices the first, the second"):
        page.ask("Which?", "third", choices=("the first", "the second"))


def test_a_sweep_has_a_frame_for_each_label():
    frames = [np.full((20, 30, 3), v, np.uint8) for v in (0, 120, 250)]
    html = page.sweep(frames, ["one", "two", "<three>"], "size", "A picture,", 2).data
    labels = re.search('data-labels="(.*?)"', html)[1].replace("&quot;", '"')
    assert json.loads(labels.replace("&lt;", "<").replace("&gt;", ">")) == ["one", "two", "<three>"]
    assert "aspect-ratio:30/20" in html
    assert "background-position:0 100%" in html
    few = page.sweep(frames[:2], ["one", "two"], "size", "A picture,", 2).data
    assert 'value="1"' in few
    with pytest.raises(ValueError, match="3 figures and 2 labels"):
        page.sweep(frames, ["one", "two"], "size", "A picture,")


def test_times_are_said_where_a_chapter_says_what_it_needs(tmp_path):
    (tmp_path / "executed").mkdir()
    (tmp_path / "executed/loss.json").write_text('{"digest": "", "seconds": 61.4}')
    chapter = chapters.read(ROOT)["loss"]
    text = "".join(cell.source for cell in about.with_times(tmp_path, "loss", chapter).cells)
    found = re.search(r"Needs no GPU. (\d+) minutes to read; ran in 61 seconds for this page", text)
    assert 5 <= int(found[1]) <= 30


@pytest.mark.parametrize("name", [name for name in chapters.read(ROOT) if name != "index"])
def test_a_chapter_says_what_it_needs_and_what_comes_next(name):
    text = (ROOT / f"book/{name}.md").read_text()
    assert f"\n{about.LINE}\n" in text
    assert "\n**Next:** [](" in text


def test_lines_are_named_where_they_end():
    """In their order, apart from each other, and at the last number of a line that breaks off."""
    plt.switch_backend("agg")
    figure, (ax, empty) = plt.subplots(2, 1)
    ends = {"low": 0.0, "beside it": 0.01, "a name that needs two lines": 0.02, "high": 1.0}
    for name, end in ends.items():
        ax.plot([0, 1, 2], [0.5, end, np.nan if name == "high" else end], label=name)
    ax.axhline(0.5)  # has no name
    ax.plot([], [], label="has no points")
    page.label_lines(ax)
    figure.canvas.draw()
    boxes = {text.get_text().replace("\n", " "): text.get_window_extent() for text in ax.texts}
    assert sorted(boxes, key=lambda name: boxes[name].y0) == list(ends)
    for lower, upper in itertools.pairwise(boxes[name] for name in ends):
        assert lower.y1 <= upper.y0 + 1
    middle = (boxes["high"].y0 + boxes["high"].y1) / 2
    assert abs(ax.transAxes.inverted().transform((0, middle))[1] - 0.95) < 0.06
    assert min(box.x0 for box in boxes.values()) > ax.get_window_extent().x1
    page.label_lines(empty)
    assert not empty.texts
    plt.close(figure)


def test_pictures_are_scored_once(tmp_path, monkeypatch):
    """A second chapter reads what the first one found, of the same pictures by the same measure."""
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    pairs = memlib.load_pairs("lab").iloc[:2]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    trace = xr.Dataset({"image": (("prompt", "seed", "y", "x", "rgb"), pictures)})
    asked = []

    def score(*arguments):
        asked.append(arguments[2])
        return memlib.trace.score(*arguments)

    monkeypatch.setattr(page, "score", score)
    first, again = (page.rescored(trace, pairs, "ncc") for _ in range(2))
    assert again.identical(first)
    assert first.identical(memlib.trace.score(trace, pairs, "ncc"))
    assert asked == ["ncc"]
    page.rescored(trace, pairs.iloc[::-1], "ncc")
    page.rescored(trace.assign(image=trace.image + 1), pairs, "ncc")
    page.rescored(trace, pairs, "sscd")
    assert asked == ["ncc", "ncc", "ncc", "sscd"]
    trace["severity"] = memlib.trace.score(trace, pairs, "ncc").severity
    assert page.both_measures(trace, pairs)[1].severity.attrs["measure"] == "sscd"
    assert asked == ["ncc", "ncc", "ncc", "sscd"]
    assert np.isnan(page.rescored(trace.drop_vars("image"), pairs, "sscd").severity).all()
