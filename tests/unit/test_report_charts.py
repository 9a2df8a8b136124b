"""The pictures of a report say what its figures say."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from support.reports import shape_rows

from mmcl.evaluation.charts import gap_picture, guessed_hits, recall_curves, similarity_histogram
from mmcl.evaluation.diagnostics import OCCURRENCE_RANKS, hubness, occurrences
from mmcl.evaluation.ranking import ranks
from mmcl.evaluation.report import ModalityRows, evaluate_list


def lines(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<path class="{kind}[^"]*" d="M([\d.L -]+)"', svg)
    return [[tuple(map(float, place.split())) for place in each.split("L")] for each in found]


def test_any_recall_is_that_of_the_figures() -> None:
    rows = shape_rows(range(60), 2.0)
    result = ranks(rows["text"].embeddings, rows["video"].embeddings)
    figures = result.metrics()
    for k in (1, 5, 10, 50):
        assert result.hits_at(k) == pytest.approx(figures[f"R@{k}"], abs=1e-9)
    assert result.hits_at(60) == 100
    constant = ranks(np.ones((7, 1)), np.ones((7, 1)))
    assert [constant.hits_at(k) for k in (1, 3, 7)] == [100 / 7, 300 / 7, 100]


def test_guessing_is_what_constant_scores_get() -> None:
    relevant = [[0], [0, 1, 2], [3, 4], list(range(9)), []]
    constant = ranks(np.ones((5, 1)), np.ones((9, 1)), relevant)
    for k in (1, 2, 5, 9):
        assert guessed_hits(constant, k) == pytest.approx(constant.hits_at(k), abs=1e-9)


def test_recall_curves_rise_to_all_and_begin_at_the_headline() -> None:
    found = evaluate_list("all", shape_rows(range(40), 1.5))
    svg = recall_curves(found)
    curves = [each for each in lines(svg, "line") if len(each) > 2]
    assert len(curves) == 6
    for curve, direction in zip(curves, found.directions.values(), strict=True):
        heights = [(244 - y) / 2.24 for _, y in curve]
        assert heights[0] == pytest.approx(direction.metrics["R@1"], abs=0.1)
        assert heights == sorted(heights) and all(b[0] > a[0] for a, b in itertools.pairwise(curve))
        assert f"{direction.name.replace('>', '&gt;')}: R@1 {direction.metrics['R@1']:.0f} %" in svg
    assert max(curve[-1][0] for curve in curves) == 510 and heights[-1] == pytest.approx(100, abs=0.1)
    one = recall_curves(evaluate_list("one", shape_rows(range(1), 0.0)))
    ElementTree.fromstring(one)


def test_the_gap_is_seen() -> None:
    """Two modalities that lie apart come out apart, and their mean distance is told."""
    random = torch.Generator().manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(300, 16, generator=random), dim=1)
    apart = torch.nn.functional.normalize(base + 3 * torch.eye(16)[0], dim=1)
    items = np.arange(300)
    found = evaluate_list("all", {"text": ModalityRows(base, items), "video": ModalityRows(apart, items)})
    tree = ElementTree.fromstring(gap_picture(found))
    discs = [float(each.get("cx", "")) for each in tree.iter("circle") if each.get("cx") != "14.0"]
    squares = [
        float(re.findall(r"[\d.-]+", each.get("transform", ""))[0])
        for each in tree.iter("path")
        if each.get("class") == "mark c1"
    ][:-1]
    assert len(discs) == len(squares) == 150
    assert abs(np.mean(discs) - np.mean(squares)) > 2 * np.std(squares)
    gap = found.diagnostics["pairs"]["text-video"]["modality_gap"]
    assert f"{gap:.2f}" in (tree.find("svg").get("aria-label") or "")
    for flat in (base[:1], base[:2] * 0 + base[:1]):
        rows = ModalityRows(flat, np.arange(len(flat)))
        ElementTree.fromstring(gap_picture(evaluate_list("flat", {"text": rows, "video": rows})))


def test_similarities() -> None:
    found = evaluate_list("all", {name: shape_rows(range(60), 0.3)[name] for name in ("text", "video")})
    figures = found.diagnostics["pairs"]["text-video"]
    tree = ElementTree.fromstring(similarity_histogram("text-video", figures))
    drawn = {each.get("class"): each.get("d") or "" for each in tree.iter("path")}
    for kind in ("positives", "negatives"):
        heights = [100 - float(value) for value in re.findall(r"V([\d.]+)h", drawn[kind])]
        assert np.argmax(heights) == np.argmax(figures[kind]["counts"]) and len(heights) == 40
    assert f"positives: mean {figures['positives']['mean']:.2f}" in (tree.find("svg").get("aria-label") or "")


def test_occurrences_are_what_hubness_is_of() -> None:
    rows = shape_rows(range(60), 1.0)
    result = ranks(rows["text"].embeddings, rows["video"].embeddings)
    counts = occurrences(result)
    order = (rows["text"].embeddings @ rows["video"].embeddings.T).argsort(1, descending=True)[:, :OCCURRENCE_RANKS]
    assert counts.tolist() == np.bincount(order.flatten().numpy(), minlength=60).tolist()
    deviations = counts - counts.mean()
    assert hubness(result) == pytest.approx((deviations**3).mean() / (deviations**2).mean() ** 1.5)
