"""The search app in a real browser: a text, an uploaded file, a clip that moves, a sound that plays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import CHROMIUM, DRIVER, look, open_browser
from support.served import Served, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
_ = served
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium.webdriver")
    driver = open_browser(tmp_path_factory.mktemp("profile"), "--autoplay-policy=no-user-gesture-required")
    yield driver
    driver.quit()


def until(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(f"return {script}"))


def requested(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_search_play_upload(browser: Any, served: Served, media_folder: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, 1000)
    browser.get(served.url)
    until(browser, "document.querySelector('.modalities')")
    browser.find_element("name", "text").send_keys("a red clip", Keys.ENTER)
    assert until(browser, "document.querySelectorAll('.tile').length") >= 5
    assert "nearest to “a red clip”" in browser.find_element("id", "status").text
    until(browser, "[...document.querySelectorAll('.tile img')].every(image => image.naturalWidth > 0)")

    browser.find_element("css selector", "button.frame").click()
    until(browser, "document.querySelector('.tile img').currentSrc.endsWith('/clip')")
    until(browser, "document.getElementById('sound').currentTime > 0")
    browser.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    until(browser, "document.getElementById('sound').paused")

    clip = sorted(media_folder.rglob("*.mp4"))[0]
    browser.find_element("name", "file").send_keys(str(clip))
    until(browser, f"document.getElementById('status').textContent.includes('nearest to {clip.name}')")

    box = browser.find_element("name", "text")
    box.send_keys(HOSTILE, Keys.ENTER)
    until(browser, "document.getElementById('status').textContent.includes('onerror')")
    assert browser.title == "Search · mmcl"
    wrong = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not wrong, wrong
    away = [url for url in requested(browser) if not url.startswith((served.url, "data:", "blob:", "chrome:"))]
    assert not away, away


def test_a_file_that_is_no_media_is_said_and_it_fits_a_phone(browser: Any, served: Served, tmp_path: Path) -> None:
    look(browser, 400)
    browser.get(served.url)
    until(browser, "document.querySelector('.modalities')")
    page = tmp_path / "page.mp4"
    page.write_text("<script>alert(1)</script>")
    browser.find_element("name", "file").send_keys(str(page))
    until(browser, "document.getElementById('status').textContent.includes('cannot be read as a picture')")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
