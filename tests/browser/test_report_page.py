"""The report in a real browser: it fits, asks for nothing, runs nothing of a caption, and its gallery works."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import CHROMIUM, DRIVER, look, open_browser
from support.reports import shape_items, shape_report, shape_rows

from mmcl.evaluation.confusion import confusion_section
from mmcl.evaluation.gallery import GalleryItem
from mmcl.evaluation.pages import page as render_page
from mmcl.evaluation.report import RetrievalReport, evaluate_list, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]

HOSTILE = (
    "<script>document.title='taken'</script><img src='https://mmcl.invalid/x.png' onerror=\"document.title='taken'\">",
    "</script ><script>document.title='taken'</script>",
    "x" * 10_000,
    "مرحبا بالعالم: قطة تعزف على البيانو",
    "\"quoted\" & 'quoted' &lt;b&gt;",
)
TABS = ("All queries", "Worst first", "Hubs")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium.webdriver")
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report in which every other caption is hostile, with moving and sounding items."""
    items = [
        dataclasses.replace(item, captions=(HOSTILE[number // 2 % 5],)) if number % 2 else item
        for number, item in enumerate(shape_items(media=True))
    ]
    report = dataclasses.replace(
        shape_report(items, noise=0.9), title=HOSTILE[4], note=HOSTILE[0], facts={"checkpoint": HOSTILE[2]}
    )
    return write_report(report, items, tmp_path_factory.mktemp("report")).as_uri()


def pick(browser: Any, name: str, text: str) -> None:
    browser.execute_script(
        "const [name, text] = arguments;"
        "[...document.getElementsByName(name)].find(i => i.nextSibling.textContent === text).click()",
        name,
        text,
    )


def tab(browser: Any, text: str) -> None:
    found = browser.find_elements("css selector", "[role=tab]")
    next(each for each in found if each.text == text).click()


def search(browser: Any, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    box = browser.find_element("name", "search")
    box.send_keys(Keys.CONTROL + "a")
    box.send_keys(Keys.DELETE, text)


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(node => node.textContent)", selector
    )


def wait(browser: Any, condition: str) -> Any:
    """What a piece of script returns once that is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, 0.05).until(lambda driver: driver.execute_script(f"return {condition}"))


@pytest.mark.parametrize("width", [1280, 820, 400, 320])
def test_no_horizontal_scroll(browser: Any, page: str, width: int) -> None:
    look(browser, width)
    browser.get(page)
    directions = texts(browser, "fieldset.directions span")
    assert len(directions) == 6
    for name in TABS:
        tab(browser, name)
        for direction in directions:
            pick(browser, "direction", direction)
            wide, inside = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide <= inside == width, (direction, name)


def test_nothing_is_requested_and_nothing_goes_wrong(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page)
    for name in TABS:
        tab(browser, name)
        for direction in texts(browser, "fieldset.directions span"):
            pick(browser, "direction", direction)
    search(browser, "<script> https://mmcl.invalid")
    assert len(texts(browser, ".card"))
    tab(browser, "All queries")
    browser.find_element("css selector", "button.frame").click()
    wait(browser, "document.getElementById('sound').currentTime > 0")
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
    for part in ("taken", "quoted", "مرحبا"):
        search(browser, part)
        shown += texts(browser, ".words")
    assert HOSTILE[0] in shown and HOSTILE[1] in shown and HOSTILE[4] in shown
    assert "taken" not in browser.title and browser.title.startswith(HOSTILE[4])
    assert texts(browser, "h1") == [HOSTILE[4]] and texts(browser, ".note") == [HOSTILE[0]]
    assert max(map(len, shown)) <= 280
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2
    directions = browser.execute_script(
        "return [...document.querySelectorAll('.words')].filter(n => n.textContent.startsWith('مرحبا'))"
        ".map(n => n.matches(':dir(rtl)'))"
    )
    assert directions and all(directions)


def test_search_looks_through_the_captions_of_the_queries(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get(page)
    pick(browser, "direction", "video → text")
    search(browser, "MIDDLE  yellow")
    asked = texts(browser, ".asked .words")
    assert asked and all("yellow" in text and "middle" in text for text in asked)
    assert len(asked) == int(texts(browser, "#status")[0].split("–")[1].split(" ")[2])
    search(browser, "قطة")
    assert set(texts(browser, ".asked .words")) == {HOSTILE[3]}
    search(browser, "no such word")
    assert texts(browser, "#status") == ["None of 108 queries match."] and texts(browser, ".card") == []
    search(browser, "")
    assert len(texts(browser, ".card")) == 10


def test_filters_and_pages(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get(page)
    bounds = {"1": (1, 1), "2–5": (1.1, 5), "6–10": (5.1, 10), "over 10": (10.1, 108)}
    counted = 0
    pick(browser, "direction", "text → audio")
    for name, (low, high) in bounds.items():
        pick(browser, "rank", name)
        ranks = [float(text.removeprefix("rank ")) for text in texts(browser, ".verdict b")]
        assert ranks and low <= min(ranks) <= max(ranks) <= high
        counted += int(texts(browser, "#status")[0].split(" of ")[1].split(" ")[0])
    assert counted == 104  # those that are silent have no rank
    assert browser.execute_script("return document.querySelectorAll('.tile img.waveform').length") > 0
    pick(browser, "rank", "any")
    seen: list[str] = []
    for number in range(1, 12):
        assert texts(browser, "#pages span") == [f"page {number} of 11"]
        seen += texts(browser, ".asked .words")
        if number < 11:
            browser.find_element("name", "next").click()
    assert len(seen) == 104 and not browser.find_element("name", "next").is_enabled()
    pick(browser, "list", "Zero-shot: new shapes")
    assert "of 12" in texts(browser, ".verdict")[0]
    assert browser.execute_script("return document.querySelector('[name=direction]:checked').value") == "0"
    pick(browser, "direction", "audio → text")
    assert browser.execute_script("return document.querySelectorAll('.tile img').length") == 0


def test_tabs(browser: Any, page: str) -> None:
    """Worst failures first; hubs with how often they are found."""
    look(browser, 1280)
    browser.get(page)
    assert texts(browser, "[role=tab]") == list(TABS)
    tab(browser, "Worst first")
    worst = [float(text.removeprefix("rank ")) for text in texts(browser, ".verdict b")]
    assert worst == sorted(worst, reverse=True) and len(worst) == 10
    assert len(texts(browser, ".tile.later")) == sum(rank > 5 for rank in worst) > 0
    tab(browser, "Hubs")
    counts = [int(text.removesuffix(" queries")) for text in texts(browser, ".verdict b")]
    assert counts == sorted(counts, reverse=True) and counts[0] > 10
    assert texts(browser, ".asked .kind")[0] == "hub: video" and "found by" in texts(browser, ".place")
    assert not browser.find_element("css selector", "fieldset.ranks").is_displayed()
    named = browser.execute_script("return document.getElementById('panel').getAttribute('aria-labelledby')")
    assert browser.find_element("id", named).get_attribute("aria-selected") == "true"


def test_pictures_load_and_have_words(browser: Any, page: str) -> None:
    look(browser, 1280)
    browser.get(page)
    for direction in ("text → video", "video → audio"):
        pick(browser, "direction", direction)
        found = browser.execute_async_script(
            "const done = arguments[0]; const all = [...document.images];"
            "Promise.all(all.map(i => i.decode().then(() => true, () => false)))"
            ".then(ok => done(all.map((i, n) => [ok[n], i.naturalWidth, i.alt])))"
        )
        assert len(found) >= 50
        assert all(ok and width > 0 and alt for ok, width, alt in found)


def test_hovering_moves_and_clicking_sounds(browser: Any, page: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    look(browser, 1280)
    browser.get(page)
    search(browser, "middle")
    frames = browser.find_elements("css selector", "button.frame")
    button = next(each for each in frames if "♪" in each.text)
    image = button.find_element("tag name", "img")
    poster = image.get_attribute("src")
    assert poster.startswith("data:image/jpeg")
    ActionChains(browser).move_to_element(button).perform()
    assert image.get_attribute("src").startswith("data:image/webp")
    moving = browser.execute_async_script(
        "const [image, done] = arguments; (async () => {"
        "await image.decode(); const data = Uint8Array.from(atob(image.src.split(',')[1]), c => c.charCodeAt(0));"
        "const decoder = new ImageDecoder({data, type: 'image/webp'}); await decoder.tracks.ready;"
        "done([image.naturalWidth, decoder.tracks.selectedTrack.frameCount, decoder.tracks.selectedTrack.animated])"
        "})().catch(error => done(String(error)))",
        image,
    )
    assert moving == [128, 8, True]
    ActionChains(browser).move_to_element(browser.find_element("tag name", "h1")).perform()
    assert image.get_attribute("src") == poster
    button.click()
    state = wait(
        browser,
        "(s => s.currentTime > 0 && !s.paused && [s.readyState, s.duration, s.src.slice(0, 15)])"
        "(document.getElementById('sound'))",
    )
    assert state[0] >= 2 and state[1] == pytest.approx(1, abs=0.1) and state[2] == "data:audio/webm"
    assert button.get_attribute("aria-pressed") == "true" and image.get_attribute("src").startswith("data:image/webp")
    wait(browser, "document.getElementById('sound').ended")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    wait(browser, "!document.getElementById('sound').paused")
    button.click()
    assert browser.execute_script("return document.getElementById('sound').paused")


def test_keyboard(browser: Any, page: str) -> None:
    """Everything is reached by Tab and worked by keys, and where the focus is can be seen."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    look(browser, 1280)
    browser.get(page)
    browser.execute_script("document.querySelector('[aria-selected=true]').focus()")
    press(Keys.ARROW_RIGHT)
    about = "const e = document.activeElement; return [e.textContent, getComputedStyle(e).outlineStyle]"
    assert browser.execute_script(about) == ["Worst first", "solid"]
    press(Keys.END)
    assert browser.execute_script(about)[0] == "Hubs" and "hub: video" in texts(browser, ".kind")
    press(Keys.ARROW_RIGHT)
    assert browser.execute_script(about)[0] == "All queries"
    press(Keys.TAB, "disc")
    assert browser.execute_script("return document.activeElement.value") == "disc"
    press(Keys.TAB, Keys.TAB, Keys.ARROW_RIGHT)
    name, value, outline = browser.execute_script(
        "const e = document.activeElement; return [e.name, e.value, getComputedStyle(e.nextSibling).outlineStyle]"
    )
    assert (name, value, outline) == ("direction", "1", "solid")
    press(Keys.ARROW_LEFT, Keys.TAB, Keys.TAB)
    has, outline = browser.execute_script(
        "const e = document.activeElement; return [e.className, getComputedStyle(e).outlineStyle]"
    )
    assert (has, outline) == ("frame", "solid")
    assert browser.execute_script("return document.activeElement.querySelector('img').src.slice(5, 15)") == "image/webp"
    press(Keys.SPACE)
    assert browser.execute_script("return document.activeElement.getAttribute('aria-pressed')") == "true"
    press(Keys.ESCAPE)
    assert browser.execute_script("return document.activeElement.getAttribute('aria-pressed')") == "false"


def test_five_thousand_queries(browser: Any, tmp_path: Path) -> None:
    """All of them are searched, while the page holds ten: nothing grows with their number but the JSON."""
    names = ("disc", "ring", "cross", "square")
    rows = shape_rows(range(5000), 1.2)
    small, kinds = shape_items(8, media=True), ("poster", "waveform", "clip", "sound")
    items = [
        GalleryItem(f"{n}", (f"{names[n % 4]} number {n}",), **{kind: getattr(small[n % 8], kind) for kind in kinds})
        for n in range(5000)
    ]
    report = RetrievalReport("large", "", (evaluate_list("all", {n: rows[n] for n in ("text", "video")}),))
    path = write_report(report, items, tmp_path)
    assert 10e6 < path.stat().st_size < 15e6
    look(browser, 1280)
    browser.get(path.as_uri())

    def nodes() -> int:
        return browser.execute_script("return document.getElementsByTagName('*').length")

    assert texts(browser, "#status") == ["1–10 of 5000 queries, in random order."]
    first = nodes()
    browser.execute_script(
        "window.made = 0; new MutationObserver(all => all.forEach(m => m.addedNodes.forEach(n =>"
        "{ window.made += 1 + (n.querySelectorAll ? n.querySelectorAll('*').length : 0); })))"
        ".observe(document.body, {childList: true, subtree: true})"
    )
    search(browser, "number 4321")
    assert texts(browser, ".asked .words") == ["ring number 4321"]
    search(browser, "cross")
    assert "of 1250 that match, of 5000" in texts(browser, "#status")[0]
    tab(browser, "Worst first")
    browser.find_element("name", "next").click()
    assert texts(browser, "#status")[0].startswith("11–20 of 1250")
    assert "kept below 12 MiB, each clip below 48 KiB" in texts(browser, "#budget")[0]
    caption = browser.execute_script(
        "const { items } = JSON.parse(document.getElementById('data').textContent);"
        "return Object.values(items).find(item => item.left && item.poster).captions[0]"
    )
    pick(browser, "direction", "video → text")
    search(browser, caption)
    assert texts(browser, ".asked .frame .left")[0] == "no room for the clip and sound"
    tab(browser, "Hubs")
    assert nodes() < 1500 and first < 1500
    redraws = len("number 4321" + "cross" + caption) + 2 * 3 + 5  # letters, deletions, clicks
    assert browser.execute_script("return window.made") < 700 * redraws


def test_a_page_of_other_sections(browser: Any, tmp_path: Path) -> None:
    """The confusion picture on a page without gallery: it fits, and runs no script."""
    matrix = np.random.default_rng(0).integers(0, 9, (20, 20)) + 40 * np.eye(20, dtype=np.int64)
    part = confusion_section(matrix, [HOSTILE[number % 5][:60] for number in range(20)])
    path = tmp_path / "page.html"
    path.write_text(render_page(HOSTILE[0], [part]), encoding="utf-8")
    browser.get_log("browser")
    for width in (1280, 400):
        look(browser, width)
        browser.get(path.as_uri())
        wide, inside = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inside
    assert browser.execute_script("return document.querySelectorAll('.confusion .cell').length") > 300
    assert browser.title.startswith(HOSTILE[0]) and browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, page: str, scheme: str) -> None:
    """Contrast of at least 4.5 between every colour of text and what is behind it (WCAG 2, level AA)."""
    look(browser, 1280, scheme=scheme)
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
