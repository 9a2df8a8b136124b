"""Photographs a report with headless Chromium: python tools/report_screenshot.py report.html --out picture.png"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def photograph(
    page: Path, out: Path, width: int, height: int, scheme: str = "light", choose: list[str] | None = None, at: str = ""
) -> None:
    """Saves the first ``height`` pixels of ``page`` (0: all of it) from the element ``at`` (a CSS selector) on, after
    clicking the tabs and filters named in ``choose``."""
    sys.path.insert(0, str(ROOT / "tests"))
    from selenium.webdriver.common.by import By
    from support.browser import look, open_browser

    with tempfile.TemporaryDirectory() as profile:
        browser = open_browser(profile, "--hide-scrollbars")
        try:
            look(browser, width, height or 1000, scheme)
            browser.get(page.resolve().as_uri())
            for text in choose or []:
                named = f"[normalize-space()={text!r}]"
                browser.find_element(By.XPATH, f"//form//label[span{named}] | //button{named}").click()
            if not height:
                look(browser, width, browser.execute_script("return document.documentElement.scrollHeight"), scheme)
            browser.execute_script("scrollTo(0, 0)")
            if at:
                browser.execute_script("document.querySelector(arguments[0]).scrollIntoView()", at)
            out.parent.mkdir(parents=True, exist_ok=True)
            if not browser.save_screenshot(str(out)):
                raise OSError(f"cannot write {out}")
        finally:
            browser.quit()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0, help="pixels; 0: the whole page")
    parser.add_argument("--at", default="", help="CSS selector of the element at the top, e.g. section.gallery")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument(
        "--choose", action="append", default=[], help="a tab or filter to click by its text, e.g. Hubs; repeatable"
    )
    given = parser.parse_args()
    if not given.page.is_file():
        print(f"{given.page}: no such file", file=sys.stderr)
        return 2
    photograph(given.page, given.out, given.width, given.height, given.scheme, given.choose, given.at)
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
