"""Classification and probes of checkpoints: the figures of the parts, one report, one line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.recipes import tiny_config
from support.shards import read_shards, write_shards
from typer.testing import CliRunner

import mmcl.evaluation.embed
from mmcl.cli import app
from mmcl.evaluation.class_labels import item_classes, read_class_names, read_prompts, spoken_names
from mmcl.evaluation.classification import classify
from mmcl.evaluation.embed import EmbeddedItem, EmbeddedShards, embed_shards
from mmcl.evaluation.probes import choose_probe, neighbour_accuracy
from mmcl.evaluation.run_tasks import TaskOptions, TaskRun, evaluate_task
from mmcl.evaluation.zero_shot import zero_shot_scores
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.types import ConfigError

HOSTILE = "blue <script>alert(1)</script>"


def relabelled(folder: Path, out: Path, **changes: object) -> Path:
    """The samples of a folder of shards, each of the class of its colour; values of ``changes`` stand for all."""
    samples = read_shards(folder)
    for members in samples.values():
        facts = json.loads(members["json"])
        colour = str(facts.pop("group"))
        facts["label_name"], facts["label"] = HOSTILE if colour == "blue" else colour, len(colour)
        facts |= changes
        members["json"] = json.dumps({name: value for name, value in facts.items() if value is not None}).encode()
    write_shards(out, samples, max_count=5)
    return out


@pytest.fixture(scope="module")
def places(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """MODEL with three towers, SILENT without text; TRAIN and TEST of eight classes, and shards that lack something."""
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    config = tiny_config("model.towers.video.fit=crop")
    build_model(config)[0].save_pretrained(folder / "model")
    towers = {name: tower for name, tower in config.model.towers.items() if name != "text"}
    MultimodalModel(config.model.model_copy(update={"towers": towers})).save_pretrained(folder / "silent")
    test = shards_folder / "test"
    return {
        "KEPT": str(folder / "kept"),
        "MODEL": str(folder / "model"),
        "SILENT": str(folder / "silent"),
        "TRAIN": str(relabelled(shards_folder / "train", folder / "train")),
        "TEST": str(relabelled(test, folder / "test")),
        "PLAIN": str(test),
        "ONE": str(relabelled(test, folder / "one", label_name="game")),
        "NUMBERS": str(relabelled(test, folder / "numbers", label_name=None)),
        "OTHERS": str(relabelled(shards_folder / "train", folder / "others", label_name=["a", "b"])),
    }


def command(places: dict[str, str], *arguments: object) -> str:
    words = [places.get(str(argument), str(argument)) for argument in arguments]
    done = CliRunner().invoke(app, ["evaluate", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each stream was asked for."""
    asked: list[int] = []
    stream = mmcl.evaluation.embed.ClipStream

    def watched(*args: object, samples: list[int], **options: object) -> object:
        asked.append(sum(number >= 0 for number in samples))
        return stream(*args, samples=samples, **options)

    monkeypatch.setattr(mmcl.evaluation.embed, "ClipStream", watched)
    return asked


def test_everything_in_one_report(places: dict[str, str], tmp_path: Path, encoded: list[int]) -> None:
    arguments = ["all", "MODEL", "TEST", "--train", "TRAIN", "--neighbours", 2, "--workers", 1, "--prompts", "a {}."]
    said = command(places, *arguments, "--out", tmp_path / "a", "--cache", tmp_path / "kept")
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert set(report["tasks"]) == {
        f"{task}:{m}" for task in ("zero-shot", "k-nn", "linear") for m in ("video", "audio")
    }
    reasons = {each["task"]: each["why"] for each in report["left_out"]}
    assert reasons == dict.fromkeys(
        ("few-shot of video", "few-shot of audio"), "0 classes have at least 2 rows; 5 are needed"
    )
    assert "left out: few-shot of video" in said
    for result in report["tasks"].values():
        assert result["classes"] and HOSTILE in result["classes"] and len(result["confusion"]) == 8
        assert sum(map(sum, result["confusion"])) == result["samples"] <= 8
        low, high = result["ci95"]["top-1"]
        assert low <= result["top-1"] <= high and len(result["per_class"]) == 8
    page, text = ((tmp_path / "a" / name).read_text() for name in ("report.html", "report.md"))
    assert "purple" in page and "<script>" not in page and "&lt;script&gt;" in page and "<script>" not in text
    assert "Linear probe of video: what was taken for what" in text and "few-shot" in text
    assert 'href="retrieval/report.html"' in page and (tmp_path / "a/retrieval/report.html").exists()
    assert "text->video" in json.loads((tmp_path / "a/retrieval/report.json").read_text())["directions"]
    # test shards at both levels, training shards at one: nothing twice
    assert sorted(encoded) == [8, 8, 16]
    encoded.clear()
    command(places, *arguments, "--out", tmp_path / "b", "--cache", tmp_path / "kept")
    assert encoded == [], "embeddings were kept"
    again = json.loads((tmp_path / "b/report.json").read_text())
    assert again == report


def rows_of(places: dict[str, str], shards: str, **options: object) -> EmbeddedShards:
    return embed_shards(MultimodalModel.from_pretrained(places["MODEL"]), places[shards], in_process=True, **options)


def test_figures_are_those_of_the_parts(places: dict[str, str], tmp_path: Path) -> None:
    """Over 2 windows × 3 crops; the embeddings are made here once more, and judged by the pure functions."""
    views = ["--clips", 2, "--crops", 3, "--modality", "video", "--workers", 1, "--cache", "KEPT"]
    out = ["--out", tmp_path / "out"]
    tests = rows_of(places, "TEST", level="pooled", clips=2, crops=3, each_view=True)
    bank = rows_of(places, "TRAIN", level="pooled", clips=2, each_view=True)
    names = sorted({str(item.metadata["label_name"]) for item in bank.items})

    def found() -> dict[str, float]:
        return next(iter(json.loads((tmp_path / "out/report.json").read_text())["tasks"].values()))

    def labels(embedded: EmbeddedShards) -> torch.Tensor:
        return torch.tensor([names.index(str(item.metadata["label_name"])) for item in embedded.items])

    command(places, "linear", "MODEL", "TEST", "--train", "TRAIN", "--train-clips", 2, *views, *out)
    learned = bank.rows["video"].flatten(0, 1)
    probe = choose_probe(
        "logistic", learned, labels(bank).repeat_interleave(2), classes=8, groups=[i // 2 for i in range(32)]
    )
    wanted = classify(probe.scores(tests.rows["video"]), labels(tests))
    assert found()["confusion"] == wanted.confusion.tolist() and found()["top-1"] == wanted.metrics()["top-1"]
    assert found()["settings"]["views averaged by"] == "scores" and wanted.metrics()["top-1"] > 40

    command(places, "knn", "MODEL", "TEST", "--train", "TRAIN", "--neighbours", 3, *views, *out)
    bank = rows_of(places, "TRAIN", level="pooled")
    mean = tests.rows["video"].mean(1)
    accuracy = neighbour_accuracy(mean, labels(tests), bank.rows["video"], labels(bank), neighbours=3)
    assert found()["top-1"] == pytest.approx(accuracy) and accuracy > 40

    command(places, "classify", "MODEL", "TEST", "--prompts", "a {}", "--prompts", "{}", *views, *out)
    joint = rows_of(places, "TEST", clips=2, crops=3)
    texts = [prompt.replace("{}", name) for name in names for prompt in ("a {}", "{}")]
    sentences = MultimodalModel.from_pretrained(places["MODEL"]).encode_text(texts).view(8, 2, -1)
    wanted = classify(zero_shot_scores(joint.rows["video"], sentences), labels(joint))
    assert found()["confusion"] == wanted.confusion.tolist()


@pytest.mark.slow
def test_few_shot_and_sets_of_modalities(places: dict[str, str], tmp_path: Path) -> None:
    options = ["--ways", 3, "--episodes", 50, "--modality", "video+audio", "--workers", 1, "--cache", "KEPT"]
    command(places, "few-shot", "MODEL", "TRAIN", *options, "--features", "joint", "--out", tmp_path)
    result = json.loads((tmp_path / "report.json").read_text())["tasks"]["few-shot:video+audio"]
    assert result["settings"]["ways"] == 3 and result["episodes"] == 50
    assert result["samples"] == 14, "two clips are silent"
    command(places, "knn", "MODEL", "TRAIN", "--train", "TRAIN", "--workers", 1, "--cache", "KEPT", "--out", tmp_path)
    result = json.loads((tmp_path / "report.json").read_text())["tasks"]["k-nn:video"]
    assert result["also in training"] == 16 and "also in training" in (tmp_path / "report.md").read_text()
    low, high = result["ci95"]["top-1"]
    assert 33 < low <= result["top-1"] <= high


def test_a_protocol_says_what_is_asked(places: dict[str, str], tmp_path: Path) -> None:
    protocol = tmp_path / "mine.yaml"
    classes = ["red", "green", HOSTILE, "yellow", "purple", "orange", "white", "cyan", "one that never occurs"]
    protocol.write_text(
        json.dumps(
            {
                "name": "mine",
                "task": "classification",
                "modality": "audio",
                "classes": classes,
                "prompts": ["{}!"],
                "items": 9,
            }
        )
    )
    command(
        places,
        "classify",
        "MODEL",
        "TEST",
        "--protocol",
        protocol,
        "--workers",
        1,
        "--cache",
        "KEPT",
        "--out",
        tmp_path / "out",
    )
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["facts"]["not all samples"].startswith("8 here, the protocol has 9")
    assert report["protocol"] == "mine" and list(report["tasks"]) == ["zero-shot:audio"]
    found = report["tasks"]["zero-shot:audio"]
    assert found["classes"] == classes and found["settings"]["prompts"] == ["{}!"] and found["per_class"][-1] is None


def test_samples_of_several_classes_have_average_precision(places: dict[str, str], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nnever\n")
    arguments = ["--classes", names, "--modality", "video", "--workers", 1, "--out", tmp_path / "out"]
    assert "mAP 100.0" in command(places, "classify", "MODEL", "OTHERS", *arguments)
    found = json.loads((tmp_path / "out/report.json").read_text())["tasks"]["zero-shot:video"]
    assert found["per_class"] == [100.0, 100.0, None] and found["classes-with-samples"] == 2
    assert found["confusion"] is None


PROGRAM = "from mmcl.cli import main; main()"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["classify", "MODEL", "PLAIN"], "no sample has a class: neither a label nor 'label_name'"),
        (["classify", "MODEL", "ONE"], "all 8 labelled samples are of one class, 'game'"),
        (["knn", "MODEL", "ONE", "--train", "TRAIN"], "test samples: all 8 labelled samples are of one class"),
        (["linear", "MODEL", "TEST", "--train", "ONE"], "training samples: all 8 labelled samples are of one class"),
        (["classify", "MODEL", "TEST", "--modality", "depth"], "the model has no depth tower; it has: video"),
        (["classify", "SILENT", "TEST"], "the model has no text tower"),
        (["classify", "MODEL", "NUMBERS"], "labels are numbers; name them: --classes"),
        (["few-shot", "MODEL", "TEST", "--modality", "video"], "0 classes have at least 2 rows"),
        (["linear", "MODEL", "TEST", "--train", "OTHERS"], "samples have several classes each"),
        (["knn", "MODEL", "TEST", "--train", "PLAIN"], "no sample has a class"),
        (["classify", "MODEL", "TEST", "--crops", "2"], "crops=2; allowed: 1, 3"),
        (
            ["knn", "MODEL", "TEST", "--train", "TRAIN", "--features", "informative"],
            "a model without its objectives; give a checkpoint of the run",
        ),
        (["few-shot", "MODEL", "TEST", "--features", "informative", "--crops", "3"], "features are of the centre"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    places: dict[str, str], tmp_path: Path, arguments: list[str], part: str
) -> None:
    words = [places.get(argument, argument) for argument in arguments]
    done = CliRunner().invoke(
        app, ["evaluate", *words, "--out", str(tmp_path / "out"), "--workers", "1", "--cache", places["KEPT"]]
    )
    assert isinstance(done.exception, ConfigError) and done.exception.exit_code == 2
    assert part in str(done.exception) and "\n" not in str(done.exception)
    assert not (tmp_path / "out/report.json").exists()


def test_a_wrong_place_is_said_before_torch_is_imported(places: dict[str, str], tmp_path: Path) -> None:
    program = "import sys\nfrom mmcl.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    words = ["evaluate", "knn", places["MODEL"], places["TEST"], "--train", "none", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert "none is not a folder of shards" in done.stderr and len(done.stderr.splitlines()) == 1


def test_empty_shards_are_refused(places: dict[str, str], tmp_path: Path) -> None:
    write_shards(tmp_path / "empty", {})
    run = TaskRun(Path(places["MODEL"]), str(tmp_path / "empty"), TaskOptions(), workers=0)
    with pytest.raises(ConfigError, match="empty: holds no samples"):
        evaluate_task(run, "classify", tmp_path / "out")


def test_classes_of_a_sample() -> None:
    def classes(label: int = -1, column: str = "label_name", **metadata: object) -> tuple[str, ...]:
        return item_classes(EmbeddedItem("k", 0, (), label, metadata), column)

    assert classes() == () and classes(label=0) == ("0",)
    assert classes(label=2, label_name="dog") == ("dog",)
    assert classes(label_name=["b", "a", "b"]) == ("b", "a")
    assert classes(label=2, column="kind") == () and classes(column="kind", kind=7) == ("7",)
    assert classes(label_name={"x": 1}) == () and classes(label_name=" ") == ()


def test_names_of_classes(tmp_path: Path) -> None:
    assert spoken_names(["brush_hair", "run"], [], "s") == (["brush_hair", "run"], ["brush hair", "run"])
    assert spoken_names(["0", "2"], ["a", "b", "c_d"], "s") == (["0", "1", "2"], ["a", "b", "c d"])
    assert spoken_names(["7"], ["7", "8"], "s") == (["7", "8"], ["7", "8"]), "names that are numbers"
    with pytest.raises(ConfigError, match="s: class 'x' is none of the 2 classes that are named"):
        spoken_names(["x"], ["a", "b"], "s")
    with pytest.raises(ConfigError, match="class '2' is none of the 2"):
        spoken_names(["2"], ["a", "b"], "s")
    lines, labels, bad = tmp_path / "c.txt", tmp_path / "labels.json", tmp_path / "bad.json"
    lines.write_text("\ufeffa\n\n b \n", encoding="utf-8")
    labels.write_text('{"classes": ["x", "y"]}')
    assert read_class_names(lines) == ["a", "b"] and read_class_names(labels) == ["x", "y"]
    for text, words in (
        ('["x", "y"]', "not"),
        ('{"classes": ["x"]}', "two names"),
        ('{"classes": ["x", "x"]}', "twice"),
    ):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_class_names(bad)


def test_prompts_inline_and_of_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a {}.\n\nthe {}\n")
    assert read_prompts(["so {}", str(tmp_path / "p.txt")]) == ["so {}", "a {}.", "the {}"]
    for given, words in ((["{} and {}"], "exactly once"), ([str(tmp_path / "none")], "cannot be read"), ([], "once")):
        with pytest.raises(ConfigError, match=words):
            read_prompts(given)
