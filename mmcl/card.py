"""The card of a model folder: what is known of a model, for people and, as ``model-index``, for hubs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcl.config import read_yaml
from mmcl.folders import model_folder, read_report
from mmcl.types import ConfigError, redact

BLANK = "—"
"""what stands where a fact is not known"""

FACTS = ("towers", "parameters", "joint space", "training data", "recipe", "steps", "limits")
"""what every card tells, or visibly does not"""

MEASURED = ("R@1", "R@5", "R@10", "MedR", "mAP@10", "nDCG@10")


def card_text(
    name: str,
    preprocessing: Mapping[str, Any] | None = None,
    *,
    facts: Mapping[str, str] | None = None,
    report: Mapping[str, Any] | None = None,
) -> str:
    """The text of ``README.md``.

    Args:
        preprocessing: of each tower, as in ``preprocessor.json``.
        facts: answers to ``FACTS``, and further ones; what is missing is shown as a dash.
        report: what ``report.json`` of an evaluation holds.
    """
    given = {**dict.fromkeys(FACTS, ""), **(facts or {})}
    lines = ["---", _front_matter(name, report), "---", "", f"# {_plain(name)}", "", "A model trained with mmcl.", ""]
    lines += [f"- {fact}: {_plain(value) or BLANK}" for fact, value in given.items()]
    lines += ["", "## Inputs", "", *(_inputs(preprocessing or {}) or [BLANK])]
    lines += ["", "## Measured", "", *(_measured(report) if report else [BLANK])]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import mmcl",
        f'model = mmcl.MultimodalModel.from_pretrained("{_plain(name)}")',
        'rows = model.encode_text(["a caption"])  # float32 (1, D), unit rows',
        "```",
        "",
    ]
    return "\n".join(lines)


def _plain(value: object) -> str:
    """One line without anything that Markdown or HTML would act on."""
    return " ".join(redact(str(value)).split()).replace("<", "‹").replace(">", "›").replace("`", "'").replace("|", "/")


def _front_matter(name: str, report: Mapping[str, Any] | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="retrieval",
            task_name=f"{direction} retrieval",
            dataset_type="webdataset",
            dataset_name=str((report or {}).get("fingerprint") or BLANK),
            metric_type=figure,
            metric_name=f"{direction} {figure}",
            metric_value=value,
        )
        for direction, figure, value in _figures(report or {})
    ]
    measured = {"model_name": name or BLANK, "eval_results": results} if results else {}
    text: str = ModelCardData(library_name="mmcl", tags=["mmcl"], **measured).to_yaml()
    return f"{text}\n# license: not stated"


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    directions = report.get("directions")
    for direction, figures in directions.items() if isinstance(directions, Mapping) else ():
        for figure in MEASURED:
            if isinstance(figures.get(figure), (int, float)):
                yield str(direction), figure, round(float(figures[figure]), 4)


def _measured(report: Mapping[str, Any]) -> list[str]:
    table: dict[str, dict[str, float]] = {}
    for direction, figure, value in _figures(report):
        table.setdefault(direction, {})[figure] = value
    named = [_plain(report.get(key) or BLANK) for key in ("protocol", "fingerprint")]
    lines = [
        f"Protocol {named[0]}, fingerprint of protocol and gallery {named[1]}.",
        "",
        f"| direction | {' | '.join(MEASURED)} | queries | gallery |",
        f"| --- |{' ---: |' * (len(MEASURED) + 2)}",
    ]
    for direction, figures in table.items():
        counts = [str(report["directions"][direction].get(key, BLANK)) for key in ("queries", "gallery")]
        cells = [f"{figures[each]:g}" if each in figures else BLANK for each in MEASURED]
        lines.append(f"| {_plain(direction).replace('-›', '→')} | {' | '.join([*cells, *counts])} |")
    return lines


def _inputs(preprocessing: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, values in preprocessing.get("towers", {}).items():
        told = [f"{key} {_plain(json.dumps(value, ensure_ascii=False))}" for key, value in values.items()]
        lines.append(f"- {name}: {', '.join(told)}")
    return lines


def recipe_facts(checkpoint: Path | str) -> dict[str, str]:
    """What the run that wrote a checkpoint tells of its data and recipe; nothing for a folder without its run.

    Of paths and URLs only the last part is told.
    """
    folder = model_folder(Path(checkpoint))
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    train: dict[str, Any] = config.get("train") or {}
    data: dict[str, Any] = config.get("data") or {}
    sources = data.get("sources") or ([{"shards": data["shards"]}] if data.get("shards") else [])
    shards = [str(each.get("shards", "")) for each in sources if isinstance(each, dict)]
    names = [each.partition("?")[0].rstrip("/").rpartition("/")[2] for each in shards]
    objectives = [str(each.get("name")) for each in config.get("objectives") or [] if isinstance(each, dict)]
    recipe = [
        *([f"objectives {', '.join(objectives)}"] if objectives else []),
        *(f"{key.replace('_', ' ')} {train[key]}" for key in ("global_batch", "precision", "seed") if key in train),
    ]
    return {"training data": ", ".join(filter(None, names)), "recipe": "; ".join(recipe), "steps": _steps(folder)}


def _steps(folder: Path) -> str:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return f"{int(state['progress']['step']):,}"
    except (OSError, ValueError, KeyError, TypeError):  # a model that is no checkpoint
        return ""


def card_report(path: Path) -> dict[str, Any]:
    """``report.json`` of an evaluation, for the card.

    Raises:
        ConfigError: there is none, or it holds no directions.
    """
    report = read_report(path, option="--report")
    if not any(_figures(report)):
        raise ConfigError(f"--report {path}: holds no figures of retrieval")
    return report
