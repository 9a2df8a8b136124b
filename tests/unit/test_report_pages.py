"""The parts that all reports share: page, Markdown, files, and the picture of a confusion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from mmcl.evaluation.confusion import confusion_picture, confusion_section
from mmcl.evaluation.pages import Section, Table, json_in_html, markdown_page, page, write_files
from mmcl.types import RunError

SCRIPT = "<script>alert(1)</script>"


def test_a_page_of_sections(tmp_path: Path) -> None:
    table = Table("Figures", ("class", "top-1"), ((SCRIPT, "3.5"), ("قطة", "9.0")))
    parts = [Section(SCRIPT, table.html(), table.markdown()), Section("Pictures", "<p>only on the page</p>")]
    html = page(SCRIPT, parts, note=SCRIPT, facts={SCRIPT: SCRIPT})
    assert "<script" not in html and html.count("&lt;script&gt;") == 7
    assert "script-src" not in html and "default-src 'none'" in html
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", html) == ["&lt;script&gt;alert(1)&lt;/script&gt;", "Pictures"]
    text = markdown_page("a title", parts, note="a note", facts={"checkpoint": "run_1"})
    assert "only on the page" not in text and "<script" not in text
    assert text.splitlines()[0] == "# Evaluation report: a title" and text.splitlines()[-1] == "- checkpoint: run\\_1"
    assert "| --- | ---: |\n" in text
    written = write_files(tmp_path / "deep", html, text, {"top-1": 3.5})
    assert written.read_text(encoding="utf-8") == html
    assert json.loads((tmp_path / "deep/report.json").read_text()) == {"top-1": 3.5}
    with pytest.raises(RunError, match="cannot write the report to"):
        write_files(written / "below", html, text, {})


def test_a_script_runs_only_with_data() -> None:
    html = page("title", [], data=json_in_html({"caption": "</script>&<!--"}))
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'", html)
    assert json.loads(html.split('id="data">')[1].split("<")[0]) == {"caption": "</script>&<!--"}


def test_confusion_picture() -> None:
    counts = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    svg = confusion_picture(counts, ["cat", SCRIPT, "قطة"])
    tree = ElementTree.fromstring(svg)
    cells = [each for each in tree.iter("rect") if each.get("class", "").startswith("cell")]
    spoken = [cell.findtext("title") for cell in cells]
    assert spoken == [
        "cat taken for cat: 8 (80.0 %)",
        f"cat taken for {SCRIPT}: 2 (20.0 %)",
        f"{SCRIPT} taken for cat: 1 (10.0 %)",
        f"{SCRIPT} taken for {SCRIPT}: 9 (90.0 %)",
    ]
    assert [cell.get("class") for cell in cells] == ["cell own", "cell", "cell", "cell own"]
    shades = [float(cell.get("fill-opacity", "")) for cell in cells]
    assert shades[2] < shades[1] < shades[0] < shades[3]
    assert cells[1].get("y") == cells[0].get("y") and cells[1].get("x") == cells[3].get("x")
    assert "85.0 % right" in tree.get("aria-label", "") and "<script" not in svg


def test_confusion_of_many_classes_shows_the_worst() -> None:
    counts = 9 * np.eye(60, dtype=np.int64)
    counts[50, 7] = 4
    tree = ElementTree.fromstring(confusion_picture(counts, [f"class {number}" for number in range(60)], shown=3))
    names = [each.text for each in tree.iter("text") if each.get("class") == "row"]
    assert names == ["class 0", "class 7", "class 50"]
    assert "the 3 of 60 classes with most mistakes" in tree.get("aria-label", "")


def test_confusion_section() -> None:
    part = confusion_section([[8, 2], [5, 5]], ["cat", "dog"])
    rows = part.markdown.splitlines()[2:]
    assert rows == ["| dog | cat | 5 | 50.0 |", "| cat | dog | 2 | 20.0 |"]
    assert "<svg" in part.html and "Commonest mistakes" in part.html
    assert confusion_section([[1, 0], [0, 1]], ["cat", "dog"]).markdown == "No mistakes."


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        ([[1, 2]], ["a"], r"must be \(C, C\)"),
        ([[1, 2], [3, -1]], ["a", "b"], "at least 0"),
        ([[0.5, 0], [0, 1]], ["a", "b"], "integer counts"),
        ([[1, 0], [0, 1]], ["a"], "2 classes have 1 names"),
    ],
)
def test_wrong_confusion(matrix: list, names: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_picture(matrix, names)
