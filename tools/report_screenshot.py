"""Photographs a report with headless Chromium: python tools/report_screenshot.py report.html --out picture.png"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def photograph(page: Path, out: Path, width: int, height: int, scheme: str, choose: list[str]) -> None:
    """Saves the top ``height`` pixels of ``page`` (0: all of it), after clicking the filters named in ``choose``."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            _set_size(browser, width, height or 1000)
            browser.get(page.resolve().as_uri())
            for text in choose:
                browser.find_element(By.XPATH, f"//form//label[span[normalize-space()={text!r}]]").click()
            if not height:
                _set_size(browser, width, browser.execute_script("return document.documentElement.scrollHeight"))
            out.parent.mkdir(parents=True, exist_ok=True)
            if not browser.save_screenshot(str(out)):
                raise OSError(f"cannot write {out}")
        finally:
            browser.quit()


def _set_size(browser: Any, width: int, height: int) -> None:
    """The size of the page's viewport, whatever the window around it; below a window's smallest width too."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0, help="pixels from the top; 0: the whole page")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument(
        "--choose", action="append", default=[], help="a filter to click by its text, e.g. worst; repeatable"
    )
    options = parser.parse_args()
    if not options.page.is_file():
        print(f"{options.page}: no such file", file=sys.stderr)
        return 2
    photograph(options.page, options.out, options.width, options.height, options.scheme, options.choose)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
