"""Multiple-choice questions: the JSONL reader, their file in shards, and the texts that a tower reads of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.shards import read_shards, write_shards

from mmcl.data import ClipStream
from mmcl.data.questions import blank_question, question_texts
from mmcl.media.augment import augment
from mmcl.media.augmentation import Augmentation, TextAugmentation
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.shards.members import parse_sample
from mmcl.shards.questions import Question, Subtitle, parse_member, read_questions, write_member
from mmcl.shards.reader import RawSample
from mmcl.shards.reshard import ReshardOptions, reshard
from mmcl.types import ConfigError, QuestionSpec, SampleError, Source, View

GOOD = {
    "clip": "a",
    "question": "What is it?",
    "answers": ["a dog", "a cat", "a bird"],
    "answer": 1,
    "subtitles": [{"start": 3, "end": 9, "text": "later"}, {"start": -1, "end": 2.5, "text": "first"}],
    "span": [1, 4],
    "duration_seconds": 6,
}
WORDS = (0, 0, 1)


def read(folder: Path, *lines: object) -> dict[str, tuple[Question, ...]]:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return read_questions(path)


def test_a_line_becomes_a_question_with_its_times_cut_to_the_clip(tmp_path: Path) -> None:
    (question,) = read(tmp_path, GOOD)["a"]
    assert question.answers[question.answer] == "a cat" and question.span == (1.0, 4.0)
    assert question.subtitles == (Subtitle(0.0, 2.5, "first"), Subtitle(3.0, 6.0, "later"))
    assert question.type == "what"
    assert parse_member(write_member([question])) == (question,)


def test_the_names_of_tvqa_are_known(tmp_path: Path) -> None:
    line = {"vid_name": "s01", "q": "Who spoke?", "a0": "Ann", "a1": "Bo", "answer_idx": "1", "ts": "76.01-84.2"}
    (question,) = read(tmp_path, line)["s01"]
    assert (question.answers, question.answer, question.span) == (("Ann", "Bo"), 1, (76.01, 84.2))
    assert read(tmp_path, {**line, "ts": "nan-nan"})["s01"][0].span is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 3}, "answer must be a number from 0 to 2, got 3"),
        ({"answer": True}, "answer must be a number"),
        ({"answer": None}, "answer must be a number"),
        ({"answers": ["one"], "answer": 0}, "two answers at least"),
        ({"answers": "abc"}, "answers must be a list of texts"),
        ({"answers": ["a", " "]}, "answers must be a list of texts"),
        ({"span": [4, 1]}, "span ends at 1 s, before it starts, at 4 s"),
        ({"span": [7, 9]}, "span, 7 to 9 s, lies outside the clip of 6 s"),
        ({"span": [1, None]}, "span: end must be a number"),
        ({"ts": "soon", "span": None}, "ts must be START-END"),
        ({"subtitles": [{"start": 8, "end": 9, "text": "x"}]}, "subtitles.0, 8 to 9 s, lies outside"),
        ({"subtitles": ["x"]}, "subtitles.0 must have start, end and text"),
        ({"question": ""}, "question must be a text"),
        ({"clip": 5}, "clip must be a text"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, GOOD, "", {**GOOD, **change})
    assert str(error.value).startswith(f"{tmp_path}/questions.jsonl:3: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_json_and_a_file_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"questions.jsonl:2: "):
        read(tmp_path, GOOD, '{"clip": ')
    with pytest.raises(ConfigError, match="an object is needed"):
        read(tmp_path, "[1]")
    with pytest.raises(ConfigError, match="no questions"):
        read(tmp_path, "")
    with pytest.raises(ConfigError, match=r"none.jsonl: cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_distractors_are_never_of_the_same_clip_or_of_the_same_words(tmp_path: Path) -> None:
    lines = [{**GOOD, "clip": f"c{i % 20}", "question": f"Question {i % 30}?"} for i in range(40)]
    found = read(tmp_path, *lines)
    for questions in found.values():
        own = {question.question for question in questions}
        for question in questions:
            assert len(question.distractors) == 30 - len(own) == len(set(question.distractors))
            assert not own & set(question.distractors)
    assert len({questions[0].distractors[:5] for questions in found.values()}) > 10, "each clip has its own order"
    assert read(tmp_path, *lines) == found


def test_a_member_that_is_damaged_costs_its_sample() -> None:
    for content in (b"{", b"{}", b'[{"question": "?"}]', b"[5]", b'[{"distractors": 5}]'):
        with pytest.raises(SampleError, match="bad_questions"):
            parse_sample(RawSample("k", {"mp4": b"", "qa.json": content}, Source(0, 0)))


def test_the_texts_and_times_of_a_question() -> None:
    said = tuple(Subtitle(i, i + 1.5, f"s{i}") for i in range(5))
    question = Question("q?", ("a", "b"), 1, said, (1.0, 9.0), "what", ("x?", "y?", "z?"))
    spec = QuestionSpec(ByteTokenizer(), candidates=2, sentences=2)
    texts, params = question_texts(spec, question, WORDS, 4.0)
    assert texts == ("q? | a", "q? | b", "s0 s1", "s2 s3"), "what begins after the end of the clip is left out"
    assert params["sentence_seconds"].tolist() == [[0.0, 2.5], [2.0, 4.0]]
    assert params["span_seconds"].tolist() == [1.0, 4.0] and params["target"] == 1
    assert bytes(params["type"]).rstrip(b"\0") == b"what"
    truth, params = question_texts(dataclasses.replace(spec, part="truth", sentences=6), question, WORDS, None)
    assert truth == ("q? | b", "s0", "s1", "s2", "s3", "s4", "") and params["target"] == 0
    assert np.isnan(params["sentence_seconds"][5]).all()
    silent = dataclasses.replace(question, subtitles=())
    texts, params = question_texts(spec, silent, WORDS, 4.0)
    assert texts[2:] == ("", "") and params["sentence_seconds"][0].tolist() == [0.0, 4.0]
    blank = blank_question(spec)
    assert blank[1].keys() == params.keys() and len(blank[0]) == len(texts) == spec.texts
    assert all(blank[1][name].shape == value.shape for name, value in params.items())


def test_candidate_questions_have_no_answer_and_change_with_the_epoch() -> None:
    question = Question("own?", ("dog", "cat"), 1, distractors=tuple(f"other {i}?" for i in range(6)))
    spec = QuestionSpec(ByteTokenizer(), candidates=4, sentences=1, part="questions")
    drawn = set()
    for epoch in range(8):
        texts, params = question_texts(spec, question, (0, epoch, 1), 4.0)
        heads = texts[:4]
        assert heads[int(params["target"])] == "own?" and len(set(heads)) == 4
        assert not any("dog" in text or "cat" in text for text in texts)
        drawn.add(heads)
    assert len(drawn) > 4
    with pytest.raises(SampleError, match="distractors: 6 questions of other clips, 7 needed"):
        question_texts(dataclasses.replace(spec, candidates=8), question, WORDS, 4.0)
    with pytest.raises(SampleError, match="answers: 2 answers, the view asks for 5"):
        question_texts(QuestionSpec(ByteTokenizer()), question, WORDS, 4.0)


@pytest.fixture(scope="module")
def asked(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training shards with two questions about each clip but the first, named by key or by the file's path."""
    folder = tmp_path_factory.mktemp("asked")
    lines = []
    for number, (key, members) in enumerate(list(read_shards(shards_folder / "train").items())[1:]):
        path = json.loads(members["json"])["source"]["path"]
        clip = key if number % 2 else path
        lines += [{**GOOD, "clip": clip, "question": f"Which {number} {i}?", "duration_seconds": 9} for i in range(2)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    report = reshard([shards_folder / "train"], folder / "shards", ReshardOptions(questions=str(folder / "q.jsonl")))
    assert "qa.json: 15 of 16 samples" in report.lines()
    return folder / "shards"


def test_questions_about_other_clips_are_not_attached_in_silence(asked: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({**GOOD, "clip": "elsewhere"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="none about the 16 samples"):
        reshard([asked], tmp_path / "out", ReshardOptions(questions=str(tmp_path / "q.jsonl")))


def stream(shards: Path, views: list[View], **options: object) -> ClipStream:
    masked = Augmentation(text=TextAugmentation(mask=0.5))
    options = {"global_batch": 8, "in_process": True, "augmentations": {"masked": masked}, **options}
    return ClipStream(load_manifest(shards), views, **options)


def test_batches_are_the_same_from_any_number_of_workers_and_draw_questions_anew(asked: Path) -> None:
    spec = QuestionSpec(ByteTokenizer(), candidates=3, sentences=2)
    views = [View(spec), View(dataclasses.replace(spec, part="truth"), augmentation="masked")]
    one, two = (stream(asked, views, workers=workers, in_process=workers == 0) for workers in (0, 2))
    asked_of: dict[str, set[str]] = {}
    for _, a, b in zip(range(8), one, two, strict=False):
        assert a.keys == b.keys
        for view in views:
            x, y = a.views[view], b.views[view]
            assert x.data.shape == (8, view.spec.texts, x.data.shape[2])
            assert torch.equal(x.data, y.data) and torch.equal(x.mask, y.mask) and torch.equal(x.present, y.present)
            assert all(torch.equal(x.params[n].nan_to_num(), y.params[n].nan_to_num()) for n in x.params)
        for row, key in enumerate(a.keys):
            if a.views[views[0]].present[row]:
                asked_of.setdefault(key, set()).add(str(a.views[views[0]].data[row, 0].tolist()))
    assert sum(len(texts) == 2 for texts in asked_of.values()) > 8, "both questions of most clips in four epochs"
    held = a.views[views[0]]
    assert held.data[~held.present].sum() == 0


def test_masks_fall_on_the_right_answer_alike_in_every_row(asked: Path) -> None:
    truth = QuestionSpec(ByteTokenizer(), candidates=3, sentences=2, part="truth")
    views = [View(truth), View(truth, augmentation="masked")]
    batch = next(iter(stream(asked, views, shuffle=False, rule="even")))
    done = augment(batch)
    plain, masked = (done.views[view] for view in views)
    assert plain.data.shape == masked.data.shape and torch.equal(plain.mask, masked.mask)
    share = ((masked.data != plain.data) & plain.mask).sum() / (plain.mask & plain.present[:, None, None]).sum()
    assert 0.4 < float(share) < 0.6
    assert (masked.data[(masked.data != plain.data)] == 0).all()
    assert torch.equal(done.views[views[0]].data, batch.views[views[0]].data)


def test_shards_without_questions_are_read_as_before(asked: Path, tmp_path: Path) -> None:
    members = next(iter(read_shards(asked).values()))
    assert "qa.json" not in members
    write_shards(tmp_path / "plain", {"k": members})
    spec = QuestionSpec(ByteTokenizer(), candidates=3, sentences=2)
    batch = next(iter(stream(tmp_path / "plain", [View(spec)], shuffle=False, global_batch=2)))
    assert not batch.views[View(spec)].present.any()
