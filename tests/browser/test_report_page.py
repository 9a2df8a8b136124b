"""The report in a real browser: it fits, asks for nothing, runs nothing of a caption, and its filters work."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from support.reports import shape_items, shape_report

from mmcl.evaluation.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = (
    "<script>document.title='taken'</script><img src='https://mmcl.invalid/x.png' onerror=\"document.title='taken'\">",
    "</script ><script>document.title='taken'</script>",
    "x" * 10_000,
    "مرحبا بالعالم: قطة تعزف على البيانو",
    "\"quoted\" & 'quoted' &lt;b&gt;",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report in which every other caption is hostile."""
    items = [
        dataclasses.replace(item, captions=(HOSTILE[number // 2 % 5],)) if number % 2 else item
        for number, item in enumerate(shape_items())
    ]
    report = dataclasses.replace(shape_report(items, noise=0.9), note=HOSTILE[0], facts={"checkpoint": HOSTILE[2]})
    return write_report(report, items, tmp_path_factory.mktemp("report")).as_uri()


def look(browser: Any, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def pick(browser: Any, name: str, text: str) -> None:
    browser.execute_script(
        "const [name, text] = arguments;"
        "[...document.getElementsByName(name)].find(i => i.nextSibling.textContent === text).click()",
        name,
        text,
    )


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(node => node.textContent)", selector
    )


@pytest.mark.parametrize("width", [1280, 820, 400, 320])
def test_no_horizontal_scroll(browser: Any, page: str, width: int) -> None:
    look(browser, width)
    browser.get(page)
    directions = texts(browser, "fieldset.directions span")
    assert len(directions) == 6
    for kind in ("random", "worst", "best"):
        for direction in directions:
            pick(browser, "direction", direction)
            pick(browser, "kind", kind)
            wide, inside = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide <= inside == width, (direction, kind)


def test_nothing_is_requested_and_nothing_goes_wrong(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page)
    for direction in texts(browser, "fieldset.directions span"):
        pick(browser, "direction", direction)
    browser.execute_script("scrollTo(0, document.documentElement.scrollHeight)")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert page in asked
    assert not [url for url in asked if url != page and not url.startswith("data:")]
    entries = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert not [url for url in entries if not url.startswith("data:")]


def test_captions_are_text(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get(page)
    pick(browser, "direction", "video → text")
    shown = texts(browser, ".words")
    assert HOSTILE[0] in shown and HOSTILE[1] in shown and HOSTILE[4] in shown
    assert "taken" not in browser.title
    assert texts(browser, ".note") == [HOSTILE[0]]
    assert max(map(len, shown)) <= 280
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2
    directions = browser.execute_script(
        "return [...document.querySelectorAll('.words')].filter(n => n.textContent.startsWith('مرحبا'))"
        ".map(n => n.matches(':dir(rtl)'))"
    )
    assert directions and all(directions)


def test_filters(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get(page)
    assert len(texts(browser, ".card")) == 12
    first = texts(browser, ".card")
    pick(browser, "kind", "worst")
    worst = [float(text.removeprefix("rank ")) for text in texts(browser, ".verdict b")]
    assert worst == sorted(worst, reverse=True) and texts(browser, ".card") != first
    assert len(texts(browser, ".tile.later")) == sum(rank > 5 for rank in worst) > 0
    pick(browser, "direction", "text → audio")
    assert browser.execute_script("return document.querySelectorAll('.tile img.waveform').length") > 0
    pick(browser, "direction", "audio → text")
    assert len(texts(browser, ".found.lines")) == 12
    assert browser.execute_script("return document.querySelectorAll('.tile img').length") == 0
    pick(browser, "list", "Zero-shot: new shapes")
    assert "of 12" in texts(browser, ".verdict")[0]
    assert browser.execute_script("return document.querySelector('[name=direction]:checked').value") == "0"


def test_pictures_load_and_have_words(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get(page)
    for direction in ("text → video", "video → audio"):
        pick(browser, "direction", direction)
        found = browser.execute_async_script(
            "const done = arguments[0]; const all = [...document.images]; all.forEach(i => i.loading = 'eager');"
            "Promise.all(all.map(i => i.decode().then(() => true, () => false)))"
            ".then(ok => done(all.map((i, n) => [ok[n], i.naturalWidth, i.alt])))"
        )
        assert len(found) > 50
        assert all(ok and width > 0 and alt for ok, width, alt in found)


def test_keyboard(browser: Any, page: str) -> None:
    """Tab reaches the filters, arrows change them, and where the focus is can be seen."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    look(browser, 1280)
    browser.get(page)
    keys = ActionChains(browser)
    keys.send_keys(Keys.TAB, Keys.TAB, Keys.ARROW_RIGHT).perform()
    name, value, outline = browser.execute_script(
        "const e = document.activeElement; return [e.name, e.value, getComputedStyle(e.nextSibling).outlineStyle]"
    )
    assert (name, value, outline) == ("direction", "1", "solid")
    assert len(texts(browser, ".found.lines")) == 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, page: str, scheme: str) -> None:
    """Contrast of at least 4.5 between every colour of text and what is behind it (WCAG 2, level AA)."""
    look(browser, 1280, scheme)
    browser.get(page)
    pairs = browser.execute_script(
        "const s = getComputedStyle(document.documentElement), v = n => s.getPropertyValue(n).trim();"
        "return [['--ink','--paper'],['--soft','--paper'],['--accent','--paper'],['--right','--right-soft'],"
        "['--soft','--well'],['--ink','--right-soft'],['--soft','--right-soft']].map(([a, b]) => [v(a), v(b)])"
    )

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text, behind in pairs:
        low, high = sorted((luminance(text), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, behind)
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 23, 26)") == (scheme == "dark")
