"""Protocols: what they say, that a report follows them, and that its fingerprint tells them and galleries apart."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recipes import tiny_config

from mmcl.cli import app, guarded
from mmcl.evaluation.best import ranks_by_best
from mmcl.evaluation.embed import EmbeddedItem, EmbeddedShards, embed_to_folder
from mmcl.evaluation.embedding_store import open_embeddings
from mmcl.evaluation.protocols import (
    RetrievalProtocol,
    classification_protocol,
    load_protocol,
    parse_direction,
    protocol_names,
    retrieval_protocol,
)
from mmcl.evaluation.ranking import ranks
from mmcl.evaluation.run import Evaluation, evaluate_checkpoint, evaluate_embeddings, identity
from mmcl.evaluation.sides import sides_of, wanted_directions
from mmcl.recipe import build_model
from mmcl.shards import MakeOptions, make_shards
from mmcl.shards.importers import import_annotations
from mmcl.types import ConfigError


@pytest.mark.parametrize("name", protocol_names())
def test_shipped_protocols_say_what_they_are(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.about
    assert protocol.source or name == "paired"
    if protocol.task == "classification":
        assert protocol.num_classes and "rain" in protocol.sentences("rain")[0]


def test_what_is_no_protocol_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ncaption: 1\n")
    (tmp_path / "task.yaml").write_text("name: mine\ntask: retrieve\n")
    for wrong, name in (
        (r"protocol: unknown name 'mvsd' \(did you mean 'msvd'\?\)", "mvsd"),
        (r"mine\.yaml: caption: unknown key \(did you mean 'captions'\?\)", tmp_path / "mine.yaml"),
        (r"task\.yaml: task: unknown name 'retrieve' \(did you mean 'retrieval'\?\)", tmp_path / "task.yaml"),
        (r"none\.yaml: no such file", tmp_path / "none.yaml"),
        (r"ucf101 is one of classification: use `mmcl evaluate classify`", "ucf101"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            retrieval_protocol(name)
    with pytest.raises(ConfigError, match="msvd is one of retrieval: use `mmcl evaluate retrieval`"):
        classification_protocol("msvd")


@pytest.mark.parametrize("text", ["T2V", "text", "text->", "->video", "text->video->audio", "text->video+video"])
def test_a_direction_that_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write QUERY->GALLERY|stands twice"):
        parse_direction(text)
    with pytest.raises(ConfigError, match="directions"):
        retrieval_protocol(directions=[text])


def test_the_fingerprint_tells_every_part_of_a_protocol_apart() -> None:
    plain = RetrievalProtocol(name="a")
    changes = {
        "name": "b",
        "split": "test",
        "items": 5,
        "clips": 2,
        "directions": ("text->video",),
        "captions": 1,
        "text_gallery": "best",
        "right": "caption",
        "post": ("dual_softmax",),
        "fusion": "learned",
        "figures": ("R@1",),
    }
    same = {"about", "source", "task", "ties"}
    assert {*changes} | same == {*RetrievalProtocol.model_fields}
    prints = {plain.model_copy(update={name: value}).fingerprint(["x"]) for name, value in changes.items()}
    prints |= {plain.fingerprint(["x"]), plain.fingerprint(["y"])}
    assert len(prints) == len(changes) + 2
    assert plain.model_copy(update={"about": "words", "source": "words"}).fingerprint(["x"]) == plain.fingerprint(["x"])


def embedded_by_hand() -> EmbeddedShards:
    """Three items; the second has no sound, the first two captions."""
    items = tuple(EmbeddedItem(str(n), n, ("a", "b")[: 2 - min(n, 1)], -1, {}) for n in range(3))
    unit = torch.nn.functional.normalize
    rows = {
        "video": unit(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), dim=1),
        "audio": unit(torch.tensor([[0.0, 1, 0], [1.0, 0, 0]]), dim=1),
        "text": unit(torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]]), dim=1),
    }
    owners = {"video": torch.arange(3), "audio": torch.tensor([0, 2]), "text": torch.tensor([0, 0, 1, 2])}
    return EmbeddedShards(items, rows, owners)


def test_sets_of_modalities_are_the_mean_of_what_an_item_has() -> None:
    embedded = embedded_by_hand()
    directions = wanted_directions(["text->video+audio", "text+audio->video"], list(embedded.rows))
    sides = sides_of(embedded, np.arange(3), directions)
    assert [*sides] == ["text", "video+audio", "text+audio", "video"]
    half = 2**-0.5
    assert sides["video+audio"].items.tolist() == [0, 2]
    assert torch.allclose(sides["video+audio"].embeddings, torch.tensor([[half, half, 0], [half, 0, half]]))
    assert (sides["text+audio"].items.tolist(), sides["text+audio"].captions.tolist()) == ([0, 0, 2], [0, 1, 0])
    wanted = torch.nn.functional.normalize(embedded.rows["text"][1] + embedded.rows["audio"][0], dim=0)
    assert torch.allclose(sides["text+audio"].embeddings[1], wanted)
    assert sides_of(embedded, np.arange(3), directions, captions=1)["text"].items.tolist() == [0, 1, 2]


def test_directions_of_all_sets() -> None:
    names = [each.name for each in wanted_directions(["all"], ["video", "audio", "text"])]
    assert len(names) == len(set(names)) == 12
    assert {"text->video+audio", "video+audio->text", "audio->text+video"} < {*names}
    assert [each.name for each in wanted_directions([], ["video", "text"])] == ["text->video", "video->text"]
    with pytest.raises(ConfigError, match=r"direction text->motion: no motion was embedded; there are: text, video"):
        wanted_directions(["text->motion"], ["video", "text"])


def brute_by_best(scores: np.ndarray, groups: np.ndarray, right: list[list[int]]) -> list[tuple[int, int]]:
    """(better, tied) of each query's best right group, one loop after the other."""
    found = []
    for row, relevant in zip(scores, right, strict=True):
        best = {group: max(row[groups == group]) for group in set(groups.tolist())}
        own = max(best[groups[place]] for place in relevant)
        found.append((sum(score > own for score in best.values()), sum(score == own for score in best.values())))
    return found


@pytest.mark.parametrize("steps", [0, 2])
def test_ranks_by_the_best_caption_equal_a_loop(steps: int) -> None:
    """``steps``: rows of whole numbers, so that scores tie, also between groups."""
    random = np.random.default_rng(steps)
    queries, gallery = random.standard_normal((23, 4)), random.standard_normal((61, 4))
    if steps:
        queries, gallery = queries.round(), gallery.round()
    gallery[5] = gallery[40]
    groups = random.integers(0, 17, 61)
    right = [[int(random.integers(61))] if row % 3 else random.choice(61, 4, False).tolist() for row in range(23)]
    found = ranks_by_best(queries, gallery, right, groups)
    wanted = brute_by_best(queries @ gallery.T, groups, right)
    assert list(zip(found.better, found.tied, strict=True)) == wanted
    assert found.gallery == len(set(groups.tolist()))
    assert steps == 0 or (found.tied > 1).any()
    scores = queries @ gallery.T
    for row in range(23):
        order = groups[found.top_indices[row]]
        assert len(set(order.tolist())) == len(order), "a group stands once in a top list"
        best = sorted((max(scores[row][groups == group]) for group in set(groups.tolist())), reverse=True)
        assert np.allclose(found.top_scores[row], best[: len(order)])
        assert np.allclose(scores[row][found.top_indices[row]], found.top_scores[row])
        assert groups[found.best_index[row]] in groups[right[row]]


def test_a_group_of_one_row_each_is_plain_ranking() -> None:
    random = torch.Generator().manual_seed(3)
    a, b = (torch.nn.functional.normalize(torch.randn(40, 8, generator=random), dim=1) for _ in range(2))
    plain = ranks(a, b)
    found = ranks_by_best(a, b, [[row] for row in range(40)], np.arange(40))
    assert found.metrics() == plain.metrics()
    assert (found.top_indices == plain.top_indices).all()


CAPTIONS = ("clip of one colour", "stripes of one colour that move", "something")
"""of each colour's clips, besides the colour"""


@pytest.fixture(scope="module")
def msvd(tmp_path_factory: pytest.TempPathFactory, media_folder: Path) -> dict[str, Path]:
    """MSVD in miniature: five clips, two of the same bytes, with two or three captions; shards and a model."""
    root = tmp_path_factory.mktemp("msvd")
    (root / "media").mkdir()
    lines, names = ["# clips"], []
    for number, colour in enumerate(("red", "green", "blue", "yellow", "red")):
        names.append(f"abcdefghij{number}_0_3")
        shutil.copy(media_folder / f"{colour}_1.mp4", root / "media" / f"{names[-1]}.avi")
        lines += [f"{names[-1]} {colour} {number} {text}" for text in CAPTIONS[: 2 + number % 2]]
    (root / "AllVideoDescriptions.txt").write_text("\n".join([*lines, "unlisted_0_1 nothing", ""]))
    (root / "test_list.txt").write_text("\n".join([*names, "gone_1_2"]))
    (root / "AllVideoDescriptions.txt").open("a").write("gone_1_2 no longer to be had\n")
    torch.manual_seed(0)
    build_model(tiny_config())[0].export(root / "model")
    return {"root": root, "model": root / "model", "shards": root / "shards"}


@pytest.fixture(scope="module")
def evaluation(msvd: dict[str, Path]) -> Evaluation:
    """Annotations → table → shards → report."""
    root = msvd["root"]
    imported = import_annotations(
        "msvd",
        root / "AllVideoDescriptions.txt",
        root / "media",
        root / "table.jsonl",
        only=root / "test_list.txt",
    )
    assert (imported.items, imported.missing) == (5, ("gone_1_2",))
    make_shards(root / "table.jsonl", msvd["shards"], MakeOptions(workers=1))
    return evaluate_checkpoint(
        msvd["model"], str(msvd["shards"]), root / "report", protocol=retrieval_protocol("msvd"), workers=1
    )


def test_from_annotations_to_the_report_of_a_protocol(msvd: dict[str, Path], evaluation: Evaluation) -> None:
    saved = json.loads((msvd["root"] / "report/report.json").read_text())
    assert (saved["protocol"], saved["fingerprint"]) == ("msvd", evaluation.report.fingerprint)
    assert saved["asked"]["text_gallery"] == "best"
    assert [*saved["directions"]] == ["text->video", "video->text"]
    forward, backward = saved["directions"]["text->video"], saved["directions"]["video->text"]
    assert (forward["queries"], forward["gallery"]) == (12, 5), "every caption asks"
    assert (backward["queries"], backward["gallery"]) == (5, 5), "a clip's captions are one answer"
    assert saved["facts"]["not the whole set"].startswith("5 items, the protocol has 670")
    assert saved["lists"]["all"]["duplicates"]["media"] == 2, "two clips of the same bytes"
    assert "2 clips share their media with another" in (msvd["root"] / "report/report.md").read_text()


def test_video_to_text_takes_the_best_caption_as_clip4clip_does(evaluation: Evaluation) -> None:
    """Its multi-sentence evaluation, written from its description: the largest score over a clip's sentences."""
    embedded = evaluation.embedded
    video, text = embedded.rows["video"].double().numpy(), embedded.rows["text"].double().numpy()
    owners = embedded.owners["text"].numpy()
    scores = np.stack([(video @ text[owners == item].T).max(1) for item in range(5)], axis=1)
    wanted = [1 + int((row > row[number]).sum()) for number, row in enumerate(scores)]
    found = evaluation.report.headline.directions["video->text"]
    alike = found.ranks.tied == 1
    assert alike.any()
    assert found.ranks.expected_rank[alike].tolist() == [rank for rank, one in zip(wanted, alike, strict=True) if one]


def test_embedding_files_give_the_same_report(msvd: dict[str, Path], evaluation: Evaluation) -> None:
    root = msvd["root"]
    embed_to_folder(msvd["model"], str(msvd["shards"] / "test"), root / "emb", workers=1)
    found = evaluate_embeddings(root / "emb", root / "again", protocol=retrieval_protocol("msvd"), per="group")
    first, again = (json.loads((root / name / "report.json").read_text()) for name in ("report", "again"))
    for name, direction in first["directions"].items():
        assert {key: again["directions"][name][key] for key in direction} == direction
    assert again["lists"]["all"]["duplicates"] == first["lists"]["all"]["duplicates"]
    assert found.report.headline.directions["text->video"].groups
    sides = (open_embeddings(root / "emb").joint(), evaluation.embedded)
    items, wanted = ([dataclasses.asdict(item) for item in side.items] for side in sides)
    assert items == wanted


def test_the_command_takes_protocol_directions_and_embeddings(
    msvd: dict[str, Path], evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    emb = tmp_path / "emb"
    embed_to_folder(msvd["model"], str(msvd["shards"] / "test"), emb, workers=1)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            guarded(lambda: app(["evaluate", "retrieval", "--out", str(tmp_path / "out"), *arguments]))
        return int(ended.value.code or 0)

    assert run("--embeddings", str(emb), "--directions", "text->video+audio, video+audio -> text") == 0
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert [*saved["directions"]] == ["text->video+audio", "video+audio->text"]
    assert saved["protocol"] == "paired"
    shown = capsys.readouterr()
    assert "text->video+audio" in shown.out
    for wrong, arguments in (
        ("needs CHECKPOINT and SHARDS, or --embeddings", ()),
        ("need neither CHECKPOINT and SHARDS nor --clips", (str(msvd["model"]), "--embeddings", str(emb))),
        ("not a folder that `mmcl embed` wrote", ("--embeddings", str(tmp_path))),
        ("qb_norm needs --bank", ("--embeddings", str(emb), "--protocol", str(tmp_path / "post.yaml"))),
        ("V2T", ("--embeddings", str(emb), "--directions", "V2T")),
    ):
        (tmp_path / "post.yaml").write_text("name: mine\npost: [qb_norm]\n")
        assert run(*arguments) == 2
        line = capsys.readouterr().err
        assert wrong in line and line.count("\n") == 1


def test_rows_that_are_not_for_retrieval_are_refused(msvd: dict[str, Path], tmp_path: Path) -> None:
    for number, options in enumerate(({"each_view": True, "clips": 2}, {"level": "pooled"})):
        emb = tmp_path / f"emb{number}"
        embed_to_folder(msvd["model"], str(msvd["shards"] / "test"), emb, workers=1, **options)
        with pytest.raises(ConfigError, match="without --pooled and --each-view"):
            evaluate_embeddings(emb, tmp_path / "out")


def test_the_fingerprint_is_of_what_takes_part_not_of_the_order_of_the_shards(evaluation: Evaluation) -> None:
    item = evaluation.embedded.items[0]
    other = dataclasses.replace(item, key="another", draw=9)
    assert identity(other, None) == identity(item, None), "the name in the data set counts, not the key of the shards"
    assert identity(item, 1) != identity(item, None)


@pytest.mark.slow
def test_a_report_of_another_machine_and_order_has_the_same_fingerprint(
    msvd: dict[str, Path], evaluation: Evaluation, tmp_path: Path
) -> None:
    root = msvd["root"]
    (tmp_path / "elsewhere").mkdir()
    import_annotations(
        "msvd",
        root / "AllVideoDescriptions.txt",
        root / "media",
        tmp_path / "elsewhere/table.jsonl",
        only=root / "test_list.txt",
    )
    make_shards(tmp_path / "elsewhere/table.jsonl", tmp_path / "shards", MakeOptions(workers=1, shuffle=7))
    found = evaluate_checkpoint(
        msvd["model"], str(tmp_path / "shards"), tmp_path / "out", protocol=retrieval_protocol("msvd"), workers=1
    )
    assert [item.key for item in found.embedded.items] != [item.key for item in evaluation.embedded.items]
    assert found.report.fingerprint == evaluation.report.fingerprint


def test_protocols_are_read_before_torch_is() -> None:
    code = "import sys, mmcl.evaluation.protocols as p; p.load_protocol('msvd'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
