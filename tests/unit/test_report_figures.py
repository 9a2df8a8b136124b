"""Figures beside the plain ones: groups, transductive scores, diagnostics, duplicates, an older report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.reports import shape_items, shape_report, shape_rows

from mmcl.evaluation.against import compare
from mmcl.evaluation.diagnostics import effective_rank, hubness, modality_figures, pair_figures
from mmcl.evaluation.ranking import ranks
from mmcl.evaluation.report import ModalityRows, RetrievalReport, evaluate_list, write_report
from mmcl.evaluation.transductive import transductive_ranks
from mmcl.folders import read_report
from mmcl.types import ConfigError


def fixture_rows() -> tuple[np.ndarray, np.ndarray]:
    """Four pairs whose plain ranks, counted from 0, are 0, 0, 2, 2."""
    number = np.arange(1.0, 5.0)
    a = np.stack([np.sin(number), np.cos(2 * number), np.sin(3 * number + 0.5)], 1)
    b = np.stack([np.cos(number), np.sin(2 * number + 0.3), np.cos(3 * number)], 1)
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    return a, b


@pytest.mark.parametrize(("beta", "places"), [(0, [0, 0, 2, 2]), (1, [0, 0, 2, 2]), (100, [0, 0, 3, 2])])
def test_dual_softmax_of_known_ranks(beta: float, places: list[int]) -> None:
    found = transductive_ranks(*fixture_rows(), method="dual_softmax", beta=beta)
    assert (found.expected_rank - 1).tolist() == places


@pytest.mark.parametrize("method", ["dual_softmax", "inverted_softmax", "qb_norm"])
def test_transductive_scores_equal_the_written_formula(method: str) -> None:
    random = np.random.default_rng(0)
    a, b, bank = (random.normal(size=(rows, 5)) for rows in (30, 20, 15))
    a[7], b[9] = a[3], b[2]  # each of equal queries counts
    right = [[row % 20] for row in range(30)]
    scores, beta = a @ b.T, 3.0
    others = bank if method == "qb_norm" else a
    sums = np.exp(beta * (others @ b.T)).sum(0)
    expected = np.exp(beta * scores) / sums
    if method == "dual_softmax":
        expected = scores * expected
    if method == "qb_norm":
        hubs = set((bank @ b.T).argmax(1).tolist())
        plain = [row for row in range(30) if scores[row].argmax() not in hubs]
        assert 0 < len(plain) < 30
        expected[plain] = scores[plain]
    given = {"bank": bank} if method == "qb_norm" else {}
    found = transductive_ranks(a, b, right, method=method, beta=beta, **given)  # type: ignore[arg-type]
    own = expected[np.arange(30), np.arange(30) % 20][:, None]
    tolerance = 1e-9 * np.abs(own)
    assert found.better.tolist() == (expected > own + tolerance).sum(1).tolist()
    assert found.tied.tolist() == (np.abs(expected - own) <= tolerance).sum(1).tolist()


def test_one_query_and_a_missing_bank() -> None:
    a, b = fixture_rows()
    alone = transductive_ranks(a[:1], b, [[2]], method="dual_softmax", beta=9)
    assert alone.expected_rank.tolist() == ranks(a[:1], b, [[2]]).expected_rank.tolist()
    with pytest.raises(ConfigError, match="needs a bank"):
        transductive_ranks(a, b, method="qb_norm")
    with pytest.raises(ConfigError, match="takes no bank"):
        transductive_ranks(a, b, method="dual_softmax", bank=a)


def test_transductive_figures_stay_apart(tmp_path: Path) -> None:
    rows = shape_rows(range(60), 1.1)
    plain = evaluate_list("all", rows)
    more = evaluate_list(
        "all", rows, post=("dual_softmax", "inverted_softmax", "qb_norm"), banks={"text": rows["text"].embeddings}
    )
    for name, direction in more.directions.items():
        assert dict(direction.metrics) == dict(plain.directions[name].metrics)
        methods = {"dual_softmax", "inverted_softmax"} | ({"qb_norm"} if name.startswith("text") else set())
        assert set(direction.transductive) == methods
        assert direction.transductive["dual_softmax"] != dict(direction.metrics)
    page = write_report(RetrievalReport("p", "f", (more,)), shape_items(60), tmp_path)
    assert "Transductive" in page.read_text() and "Transductive" in (tmp_path / "report.md").read_text()
    assert "transductive" not in plain.directions["text->video"].as_json()


def test_groups_are_the_queries_of_each_in_the_whole_gallery() -> None:
    rows = shape_rows(range(40), 0.8)
    names = [None if number == 5 else "even" if number % 2 == 0 else "odd" for number in range(40)]
    found = evaluate_list("all", rows, groups=names).directions["text->video"]
    assert list(found.groups) == ["even", "odd"]
    assert (found.groups["odd"]["queries"], found.groups["even"]["queries"]) == (19, 20)
    assert found.groups["odd"]["gallery"] == 40
    own = [row for row in range(40) if names[row] == "odd"]
    alone = ranks(rows["text"].embeddings[own], rows["video"].embeddings, [[row] for row in own]).metrics()
    assert dict(found.groups["odd"]) == pytest.approx(alone)


def test_duplicates_are_found_and_said(tmp_path: Path) -> None:
    rows = shape_rows(range(10), 0.5)
    video = rows["video"].embeddings.clone()
    video[4] = video[7]
    text = rows["text"].embeddings[[0, 0, *range(1, 10)]]  # two captions of one item, alike: nothing to say
    rows = {
        "text": ModalityRows(text, np.array([0, 0, *range(1, 10)]), np.array([0, 1, *[0] * 9])),
        "video": ModalityRows(video, rows["video"].items),
    }
    result = evaluate_list("all", rows)
    assert result.duplicates == {"video": 2}
    write_report(RetrievalReport("p", "f", (result,)), shape_items(10), tmp_path)
    assert "2 clips share their picture with another" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["lists"]["all"]["duplicates"] == {"video": 2}


def keyed(noise: float) -> RetrievalReport:
    items = shape_items(60)
    return dataclasses.replace(shape_report(items, 12, noise), keys=[item.key for item in items])


def test_an_older_report_beside(tmp_path: Path) -> None:
    worse, better = keyed(0.9), keyed(0.3)
    write_report(worse, shape_items(60), tmp_path / "old")
    old = read_report(tmp_path / "old")
    found = compare(old, better.as_json())["known"]["text->video"]
    assert (found["queries"], found["same_gallery"]) == (48, True)
    first = found["figures"]["R@1"]
    assert first["verdict"] == found["figures"]["MnR"]["verdict"] == "better"
    assert first["new"] == pytest.approx(better.headline.directions["text->video"].metrics["R@1"])
    assert first["old"] == pytest.approx(worse.headline.directions["text->video"].metrics["R@1"])
    low, high = first["ci95"]
    assert 0 < low <= first["new"] - first["old"] <= high
    assert found["rose"][0]["old"] > found["rose"][0]["new"] and found["rose"][0]["query"].startswith("shapes/")
    back = compare(better.as_json(), worse.as_json())["known"]["text->video"]
    assert back["figures"]["R@1"]["verdict"] == back["figures"]["MnR"]["verdict"] == "worse"
    same = compare(old, worse.as_json())["known"]["text->video"]
    assert {each["verdict"] for each in same["figures"].values()} == {"unclear"}
    assert same["rose_count"] == same["fell_count"] == 0
    beside = dataclasses.replace(better, against=compare(old, better.as_json()))
    write_report(beside, shape_items(60), tmp_path / "new")
    assert "Against the older report" in (tmp_path / "new/report.md").read_text()


def test_an_older_report_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_report(tmp_path / "none")
    (tmp_path / "report.json").write_text('{"lists": {"all": {}}}')
    with pytest.raises(ConfigError, match="not a report that names its queries"):
        read_report(tmp_path)
    other = dataclasses.replace(keyed(0.3), keys=[f"else/{number}" for number in range(60)])
    with pytest.raises(ConfigError, match="share no query"):
        compare(keyed(0.3).as_json(), other.as_json())


def test_diagnostics_of_known_rows() -> None:
    eye = torch.eye(6)
    found = modality_figures(eye, np.arange(6))
    assert found["uniformity"] == pytest.approx(-4) and found["tolerance"] == 0
    assert found["effective_rank"] == pytest.approx(6)
    assert effective_rank(torch.ones(9, 4) / 2) == pytest.approx(1)
    shares = np.array([3, 1]) / 4
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(-shares @ np.log(shares)))
    pair = pair_figures(eye, eye.roll(1, 1), [np.array([row]) for row in range(6)])
    assert pair["alignment"] == pytest.approx(2) and pair["modality_gap"] == pytest.approx(0)
    assert pair["positives"]["mean"] == 0 and sum(pair["positives"]["counts"]) == 6
    assert sum(pair["negatives"]["counts"]) == 30 and pair["negatives"]["mean"] == pytest.approx(0.2)
    assert pair_figures(eye, -eye, [np.array([0])] * 6)["modality_gap"] == pytest.approx(2 / math.sqrt(6))


def test_hubness_is_the_skewness_of_how_often_rows_are_found() -> None:
    assert hubness(ranks(torch.eye(5), torch.eye(5), top=1), 1) == 0
    hub = ranks(torch.ones(8, 1), torch.tensor([[1.0], [0.1], [0.2], [0.3]]), [[0]] * 8, top=1)
    assert hubness(hub, 1) == pytest.approx((3 * (-2) ** 3 + 6**3) / 4 / 12**1.5)
