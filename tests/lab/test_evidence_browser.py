"""The page of `torchgrow report` in a real browser: nothing is wrong, blank, or wider than the screen."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from measured import results_file, row, run_folder
from torchgrow.lab.evidence import page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; it is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long names, several budgets, grown networks with temperatures: all that could be too wide."""
    place = tmp_path_factory.mktemp("page")
    long = "default:" + ",".join(f"a_setting_with_a_long_name_{number}=0.123456" for number in range(4))
    rows = [row(method, seed, 90.0 - seed) for method in ("dense", "uniform", "default", long) for seed in range(3)]
    rows += [row(method, 0, 89.0) for method in ("paper", "paper:temperature=global")]
    rows += [row(method, 0, 93.0, budget="params <= 80%") for method in ("uniform", "default")]
    page.write([results_file(place / "mine.jsonl", rows), run_folder(place / "run")], place / "report.html")
    return place / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_in_a_browser(made: Path, browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    said, asked = list[str](), list[str]()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(made.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [made.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width < 250).length"
    assert tab.evaluate("document.querySelectorAll('svg').length") > 20
    assert tab.evaluate(wide) == 0, "a picture that is too small to read"
    small = """[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height).filter(h => h > 0)
        .reduce((a, b) => Math.min(a, b), 99)"""
    assert tab.evaluate(small) >= 8, "letters that are too small to read"
    screens = seen(tab)
    assert {screen.shape[1] for screen in screens} == {width}
    shade = np.mean([screen.mean() for screen in screens])
    assert (shade > 200) if scheme == "light" else (shade < 60), "a ground of the other theme"
    assert min(screen.std() for screen in screens) > 3, "a part of the page is blank"
    context.close()


def seen(tab: Any) -> list[Any]:
    """The page in parts, grey; screen by screen where one picture of all of it is more than the browser can make."""
    try:
        whole = grey(tab.screenshot(full_page=True))
        return np.array_split(whole, whole.shape[0] // 900)
    except playwright.Error:
        height, screens = tab.evaluate("document.documentElement.scrollHeight"), []
        for top in range(0, height, 900):
            tab.evaluate(f"window.scrollTo(0, {top})")
            screens.append(grey(tab.screenshot()))
        return screens


def grey(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_letters_stand_out_from_their_ground(made: Path, browser: Any) -> None:
    """Contrast of text as WCAG counts it: 4.5 and more, in both themes."""
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
        tab = context.new_page()
        tab.goto(made.as_uri())
        colours = tab.evaluate(
            """['body', '.muted', 'a', '.badge', 'th', '.lead', 'summary', 'figcaption a'].map(name => {
                const one = document.querySelector(name);
                let ground = one;
                while (getComputedStyle(ground).backgroundColor.endsWith(', 0)')) ground = ground.parentElement;
                return [name, getComputedStyle(one).color, getComputedStyle(ground).backgroundColor];
            })"""
        )
        poor = [(name, contrast(ink, ground)) for name, ink, ground in colours if contrast(ink, ground) < 4.5]
        assert poor == [], scheme
        context.close()


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)
