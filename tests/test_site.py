"""The site in a real browser, from file:// and without a network.

Building it executes every chapter that changed, so this file is also the chapters' test.
"""

import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlencode, urlsplit

import numpy as np
import pytest
from sphinx_external_toc.parsing import parse_toc_yaml

import memlib
from memlib import claims
from memlib.paths import ROOT
from memlib.site import book, chapters, forked, ledger
from memlib.site.run import of_kernels

PAGES = list(parse_toc_yaml(ROOT / "_toc.yml"))
EXPECTED = tomllib.loads((ROOT / "tests/verdicts.toml").read_text())
BUILT = ROOT / "_build/full"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = "headless no-sandbox disable-gpu disable-background-networking disable-component-update"
FLAGS += " disable-sync no-first-run hide-scrollbars host-resolver-rules=MAP\u00a0*\u00a0~NOTFOUND"

LOOK = """
const article = document.querySelector("article") || document.body;
const images = [...article.querySelectorAll("img")];
const formulas = [...document.querySelectorAll(".math")];
const absolute = (a) => new URL(a.getAttribute("href"), document.baseURI).href; // of drawings, too
const links = [...document.querySelectorAll("a[href]")].map(absolute);
return {
  unrendered: formulas.filter(m => !m.querySelector("mjx-container")).length,
  broken: document.querySelectorAll('[data-mml-node="merror"], mjx-merror').length,
  noalt: images.filter(i => !i.alt.trim() || /_images|\\.png$/.test(i.alt)).map(i => i.src),
  missing: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
  width: document.documentElement.scrollWidth,
  links: links.filter(href => href.startsWith("file:")),
  unresolved: (article.innerText.match(/\\{(glue|cite|eq|numref|doc)[^}]*\\}|\\?\\?\\?/g) || []),
}
"""
READY = """
const done = arguments[arguments.length - 1];
const maths = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
const asked = () => performance.getEntriesByType("resource").map(e => e.name);
let first;
const seen = () => Promise.all([...document.images].map((image) => {
  image.loading = "eager"; // those below the fold, too
  return image.decode().catch(() => null);
}));
const wait = (milliseconds) => new Promise((then) => setTimeout(then, milliseconds));
maths.then(() => wait(100)).then(() => { first = asked(); }).then(seen).then(() => done(first));
"""
LARGEST = 1_500_000  # bytes of a page at first view, compressed


@functools.cache
def sent(file: str) -> int:
    """Bytes of a file as a server would send it."""
    return len(gzip.compress(Path(file).read_bytes()))


@pytest.fixture(scope="session")
def site() -> Path:
    return book.build(ROOT)


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM or not DRIVER:
        give_up = pytest.fail if os.environ.get("CHROMIUM_REQUIRED") else pytest.skip
        give_up("chromium and chromedriver are not installed (Debian: chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split(" "):
        options.add_argument("--" + flag.replace("\u00a0", " "))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def problems(browser, page: Path, width: int = 1280, scheme: str = "light") -> list[str]:
    """Everything a reader without a network would stumble over."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for log in ("browser", "performance"):
        browser.get_log(log)  # forget the page before
    browser.get(page.as_uri())
    asked = browser.execute_async_script(READY)  # before anybody scrolls or clicks
    seen = browser.execute_script(LOOK)
    found = [
        f"console: {entry['message']}"
        for entry in browser.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:")):
                found.append(f"request: {url}")
    found += [f"{seen[key]} formulas {key}" for key in ("unrendered", "broken") if seen[key]]
    found += [f"no alternative text: {src}" for src in seen["noalt"]]
    found += [f"missing image: {src}" for src in seen["missing"]]
    found += [f"unresolved: {text}" for text in seen["unresolved"]]
    names = {url for url in asked if url.startswith("file:")} | {page.as_uri()}
    sizes = {name: sent(unquote(urlsplit(name).path)) for name in names}
    if sum(sizes.values()) > LARGEST:
        found.append(f"too much at first: {sorted(sizes.items(), key=lambda x: -x[1])[:5]}")
    if seen["width"] > width:
        found.append(f"{seen['width']} px wide on a screen of {width}")
    for url in {link.split("#")[0].split("?")[0] for link in seen["links"]}:
        if not Path(url.removeprefix("file://")).exists():
            found.append(f"dead link: {url}")
    return found


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_a_page_reads_well(site, browser, page, width, scheme):
    assert problems(browser, site / f"{page}.html", width, scheme) == []


AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, { resultTypes: ["violations"], ...arguments[0] }).then(
  (found) => done(found.violations.map((v) => `${v.id}: ${v.nodes[0].html.slice(0, 200)}`)),
  (error) => done([String(error)]),
);
"""
# The theme's logo stands outside of all landmarks; docutils writes citations as it likes.
THEIRS = ("region", "aria-allowed-role", "aria-required-children", "aria-roles")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_accessible(site, browser, page, scheme):
    """By axe-core's rules, but for what the theme and docutils write; in the dark those of colour.

    All else is the same in the light.
    """
    assert [p for p in problems(browser, site / f"{page}.html", 1280, scheme) if "px" in p] == []
    browser.execute_script((files("axe_core_python") / "axe.min.js").read_text())
    rules = {"runOnly": ["color-contrast", "link-in-text-block"]} if scheme == "dark" else {}
    found = browser.execute_async_script(AXE, rules)
    assert [v for v in found if not v.startswith(THEIRS)] == []


def test_a_definition_is_shown_to_the_keyboard(site, browser):
    browser.get((site / "severity.html").as_uri())
    term = browser.find_element("css selector", ".term")
    box = term.find_element("css selector", "[role=tooltip]")
    assert not box.is_displayed()
    link = term.find_element("css selector", "a")
    assert link.get_attribute("aria-describedby") == box.get_attribute("id")
    browser.execute_script("arguments[0].focus()", link)
    assert box.is_displayed()
    link.send_keys("\ue00c")  # Escape
    assert not box.is_displayed()


def test_code_is_shown_and_folded_for_all_pages(site, browser):
    opened = "return [...document.querySelectorAll('details.hide')].map(d => d.open)"
    browser.get((site / "severity.html").as_uri())
    assert not any(browser.execute_script(opened))
    browser.find_element("css selector", ".code-switch").click()
    assert all(browser.execute_script(opened))
    browser.get((site / "loss.html").as_uri())
    assert all(browser.execute_script(opened))
    browser.find_element("css selector", ".code-switch").click()
    assert not any(browser.execute_script(opened))


def test_sliders_show_what_they_say(site, browser):
    pages = [page for page in PAGES if 'class="sweep"' in (site / f"{page}.html").read_text()]
    assert len(pages) >= 4
    for page in pages:
        browser.get((site / f"{page}.html").as_uri())
        sweep = browser.find_element("css selector", ".sweep")
        labels = json.loads(sweep.get_attribute("data-labels"))
        slider, frame = (sweep.find_element("css selector", s) for s in ("input", ".frame"))
        for _ in labels:
            slider.send_keys("\ue012")  # left
        assert sweep.find_element("css selector", "output").text == labels[0]
        first = browser.execute_script("return arguments[0].style.backgroundPosition", frame)
        slider.send_keys("\ue014")  # right
        assert frame.get_attribute("aria-label").endswith(labels[1])
        assert first == "0px 0%" != frame.value_of_css_property("background-position")


def test_answers_are_checked_against_the_run(site, browser):
    pages = [page for page in PAGES if 'class="ask"' in (site / f"{page}.html").read_text()]
    assert len(pages) >= 4
    for page in pages:
        browser.get((site / f"{page}.html").as_uri())
        for form in browser.find_elements("css selector", "form.ask"):
            field, button, told = (
                form.find_element("css selector", s) for s in ("[name=answer]", "button", "output")
            )
            button.click()
            assert told.text == "Give an answer first."
            right = form.get_attribute("data-answer")
            options = [o.text for o in field.find_elements("css selector", "option")[1:]]
            wrong = next(o for o in options if o != right) if options else str(float(right) + 7)
            for given, said in ((wrong, "Not on this run"), (right, "Right: ")):
                if field.tag_name == "input":
                    field.clear()
                field.send_keys(given)
                button.click()
                assert told.text.startswith(said), (page, given)


def test_the_pages_have_formulas_and_figures(site, browser):
    """So that the test above looks at something."""
    formulas = figures = 0
    for page in ("loss", "overestimation", "decomposition"):
        problems(browser, site / f"{page}.html")
        formulas += len(browser.find_elements("css selector", "mjx-container svg"))
        figures += len(browser.find_elements("css selector", "article figure img"))
    assert formulas > 20
    assert figures > 3


def test_pages_can_be_reached_and_searched(site, browser):
    browser.get((site / "index.html").as_uri())
    links = browser.execute_script("return [...document.links].map(a => a.href.split('#')[0])")
    for page in PAGES:
        assert (site / f"{page}.html").as_uri() in links
    browser.get((site / "search.html").as_uri() + "?q=guidance")
    browser.execute_async_script("setTimeout(arguments[0], 1500)")
    assert browser.find_elements("css selector", "#search-results li a")


def test_each_chapter_has_a_description_and_a_notebook_to_run(site):
    for page in chapters.read(ROOT):
        assert 'name="description"' in (site / f"{page}.html").read_text(), page
        notebook = json.loads((site / f"notebooks/{page}.ipynb").read_text())
        assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.slow
def test_the_chapters_repeat_their_own_results(site, tmp_path):
    """nbval runs the executed notebooks again, from recorded traces, and compares tables.

    REPEAT_FROM names a cache that `make book FRESH=1` has filled, as in CI: then from that one, and
    not from the traces that come with the book.
    """
    executed = sorted((BUILT / "executed").glob("*.ipynb"))
    assert len(executed) == len(chapters.read(ROOT))
    fresh = {"MEMLIB_CACHE": os.environ.get("REPEAT_FROM", ""), "MEMLIB_FRESH": "1"}
    environment = os.environ | of_kernels() | (fresh if fresh["MEMLIB_CACHE"] else {})
    copies = [shutil.copy(notebook, tmp_path) for notebook in executed]  # each runs in its folder
    with forked.python(environment) as python:
        (tmp_path / "kernels/forked").mkdir(parents=True)
        arguments = [*python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": arguments, "display_name": "forked", "language": "python"}
        (tmp_path / "kernels/forked/kernel.json").write_text(json.dumps(spec))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider",
             "--nbval-lax", "--nbval-kernel-name=forked", *copies],
            env=environment | {"JUPYTER_PATH": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    first, again = (ledger.read(f) for f in (BUILT / "work/results", tmp_path / "results"))
    names = ["claim", "model", "sampler", "measure", "verdict", "prompts", "fingerprint"]
    assert again[names].to_dict("records") == first[names].to_dict("records")
    for name in ("value", "low", "high"):
        np.testing.assert_allclose(again[name], first[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_every_verdict_links_to_a_figure_that_is_there(site):
    links = re.findall(r'<td[^>]*><a href="([^"#]+)#([^"]+)"', (site / "index.html").read_text())
    assert len(links) >= 30
    for page, anchor in set(links):
        assert f'id="{anchor}"' in (site / page).read_text(), (page, anchor)
    entries = re.findall(r'href="ledger.html#([^"]+)"', (site / "index.html").read_text())
    ledger = (site / "ledger.html").read_text()
    assert set(claims.CLAIMS) <= set(entries)
    assert all(f'id="{name}"' in ledger for name in entries)


def flips() -> list[str]:
    """Claims whose verdict on one of the labs is not the expected one."""
    table = ledger.read(BUILT / "work/results")
    sampler = table.sampler.where(table.model == "lab", "flow")
    column = sampler.where(table.measure == "", sampler + "-" + table.measure)
    rows = table.assign(column=column)[table.model.isin(["lab", "lab-flow"])].itertuples()
    found = {(row.claim, row.column): row.verdict for row in rows}
    wanted = {(c, s): v for c, row in EXPECTED.items() for s, v in row.items()}
    return [
        f"{claim} ({column}): {wanted.get((claim, column))} → {found.get((claim, column))}"
        for claim, column in sorted({*found, *wanted})
        if found.get((claim, column)) != wanted.get((claim, column))
    ]


def test_no_claim_flips_on_the_labs(site):
    assert flips() == []


def test_a_flip_is_named(site, monkeypatch):
    monkeypatch.setitem(EXPECTED, "overestimated", {"any": "does not hold"})
    assert "overestimated (any): does not hold → holds" in flips()


WAIT = """
const done = arguments[arguments.length - 1], until = Date.now() + 50000;
const look = () => live.running || !live.last
  ? Date.now() < until ? setTimeout(look, 100) : done(null)
  : done({ state: [...live.last.state], status: document.querySelector(".live-status").textContent,
           answer: document.querySelector(".live-answer").textContent,
           rows: document.querySelectorAll(".live-table tr").length });
look();
"""


def test_the_lab_runs_in_the_page(site, browser):
    """From its address, by the keyboard, without a request; its latents are memlib's."""
    pair = memlib.load_pairs("lab").query("multiplicity == 128").iloc[0]
    asked = {"caption": pair.caption, "g": 7.5, "seeds": "0 1", "steps": 10}
    blank = site / "references.html"
    browser.get_log("browser")  # forget the page before
    browser.get(blank.as_uri())  # else only the part after # changes, and nothing is read anew
    browser.get((site / "live.html").as_uri() + "#" + urlencode(asked))
    assert browser.execute_script("return globalThis.LIVE_DATA === undefined")
    run = browser.find_element("css selector", "#live button[type=submit]")
    assert re.fullmatch(r"Run \(loads \d+ MB once\)", run.text)
    browser.find_element("css selector", "#live input[name=guess][value=yes]").send_keys(" ")
    run.send_keys("\n")
    found = browser.execute_async_script(WAIT)
    lab = memlib.load("lab", "cpu")
    went = memlib.trajectories(lab, [pair.caption] * 2, [0, 1], 7.5, "ddim", 10)
    last = went["x_t"][-1].flatten().double().numpy()
    assert np.linalg.norm(np.array(found["state"]) - last) < 1e-4 * np.linalg.norm(last)
    assert found["status"].startswith("Done. Largest k 7.")
    assert found["answer"] == (
        "You were right. It is memorized: its picture was shown 128 times in every epoch."
    )
    assert found["rows"] == 1 + 2 * 11
    for network, experiment in (("live-step-00500.js", 0), ("live-final.js", 4)):
        browser.execute_script(
            "live.last = null; live.fields.network.value = arguments[0];"
            "live.fields.steps.value = 5; live.experiment(arguments[1]);",
            network, experiment,
        )  # fmt: skip
        other = browser.execute_async_script(WAIT)
        assert other["status"].startswith("Done.")
        assert " apart" in other["answer"]
        assert other["state"] != found["state"]
    severe = [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    assert not severe


def test_nothing_private_is_in_the_site(site):
    private = [str(ROOT), str(Path.home())]
    for path in site.rglob("*"):
        if path.suffix in (".html", ".js", ".ipynb", ".md"):
            text = path.read_text(errors="replace")
            assert not [word for word in private if word in text], path


def test_a_bad_page_is_found_out(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LARGEST", 100)
    page = tmp_path / "bad.html"
    page.write_text(
        "<article><img src='https://example.org/a.png' alt='a'><img src='gone.png'>"
        "<div class='math'>x^2</div><p style='width:2000px'>{glue:text}`n`</p>"
        "<a href='nowhere.html'>a</a></article><script>undefined.call()</script>"
    )
    found = " ".join(problems(browser, page, 390))
    for word in (
        "request: https://example.org/a.png",
        "missing image",
        "no alternative text",
        "1 formulas unrendered",
        "wide on a screen of 390",
        "unresolved: {glue:text}",
        "dead link",
        "console: ",
        "too much at first: ",
    ):
        assert word in found
