"""Classification and probes from a checkpoint and shards to a report; embeddings are kept and used again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mmcl.concatenated import AnyModel, open_model
from mmcl.distributed import Comm
from mmcl.evaluation.class_labels import COLUMN, Labelled, check_classes, labelled, spoken_names
from mmcl.evaluation.embed import default_clips, embed_shards, own_device
from mmcl.evaluation.embedding_store import EmbeddedShards
from mmcl.evaluation.informative import embed_informative
from mmcl.evaluation.pages import Table
from mmcl.evaluation.probes.linear import PENALTIES, Kind
from mmcl.evaluation.protocols import ClassificationProtocol, fingerprint
from mmcl.evaluation.run import evaluate_checkpoint
from mmcl.evaluation.tables import COLUMNS, table
from mmcl.evaluation.task_report import LeftOut, TaskReport
from mmcl.evaluation.tasks import TaskResult, few_shot_task, linear_task, neighbours_task, zero_shot_task
from mmcl.evaluation.zero_shot import Average, Prompts, fill_prompts
from mmcl.folders import check_writable
from mmcl.types import DEFAULT_DECODER, ConfigError, Decoder, Modality, VectorSpec

Task = Literal["classify", "knn", "linear", "few-shot"]
TASKS: tuple[Task, ...] = ("classify", "knn", "linear", "few-shot")
Features: TypeAlias = Literal["joint", "pooled", "informative"]
PROMPTS = ("{}", "a video of {}.", "a sound of {}.", "this is {}.")
"""what is said of a class where nothing else is asked for"""
LABELS = "labels"
"""the name of what is asked without a protocol"""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """How tasks are done."""

    modalities: tuple[Modality, ...] = ()
    """or sets such as ``video+audio``; none: every one that the model has a tower for"""
    column: str = COLUMN
    """of the metadata, with the class names of a sample"""
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
    prompt_average: Prompts = "mean"
    clips: int | None = None
    """windows per sample; default: as the checkpoint's run says"""
    crops: int = 1
    average: Average | None = None
    """what is averaged over windows and crops; default: scores by the linear probe, embeddings by zero-shot; k-NN and
    episodes always embeddings"""
    train_clips: int = 1
    """windows of a training sample: for the linear probe each is a row"""
    level: Features = "pooled"
    """what probes look at: before every head, the joint space, or the states of a cMIM's decoder"""
    neighbours: int = 200
    temperature: float = 0.1
    kind: Kind = "logistic"
    penalties: tuple[float, ...] = PENALTIES
    ways: int = 5
    shots: int = 1
    episodes: int = 600
    seed: int = 0

    def but(self, **given: Any) -> TaskOptions:
        """The same but for what is given."""
        return replace(self, **given)


def options_of(protocol: ClassificationProtocol, options: TaskOptions) -> TaskOptions:
    """Options as a protocol says; of windows and crops, what was asked for goes first."""
    return replace(
        options,
        modalities=(protocol.modality,),
        column=protocol.label,
        classes=protocol.classes or options.classes,
        prompts=protocol.prompts,
        prompt_average=protocol.prompt_average,
        clips=options.clips or protocol.clips,
        crops=options.crops if options.crops > 1 else protocol.crops,
    )


@dataclass(frozen=True, eq=False)
class TaskRun:
    """A checkpoint, its shards, and where embeddings are kept."""

    checkpoint: Path
    shards: str
    options: TaskOptions
    protocol: ClassificationProtocol | None = None
    """whose options these are, for the report"""
    train: str | None = None
    cache: Path | None = None
    workers: int = 2
    decoder: Decoder = DEFAULT_DECODER
    batch: int = 64

    @cached_property
    def model(self) -> AnyModel:
        return open_model(self.checkpoint)

    @cached_property
    def clips(self) -> int:
        return self.options.clips or default_clips(self.checkpoint)

    @cached_property
    def modalities(self) -> tuple[Modality, ...]:
        """Those asked for, else all but text. Raises ``ConfigError`` where the model lacks one."""
        for modality in self.options.modalities:
            for part in modality.split("+"):
                self.model.tower_of(part)
        specs = [self.model.tower(name).spec for name in self.model.towers]
        own = dict.fromkeys(
            each.modality for each in specs if each.modality != "text" and not isinstance(each, VectorSpec)
        )
        return self.options.modalities or tuple(own)

    def tests(self, modality: Modality, *, level: Features, each_view: bool = False) -> Labelled:
        """The labelled rows to be told apart. Raises ``ConfigError`` as :func:`labelled` does."""
        several = self.clips * self.options.crops > 1
        found = self._embedded(modality, self.shards, self.clips, self.options.crops, level, each_view and several)
        return labelled(found, modality, self.shards, self.options.column).to(own_device())

    def bank(self, modality: Modality, *, each_view: bool = False) -> Labelled:
        """The labelled rows to learn from."""
        if self.train is None:
            raise ConfigError("no training shards are given: --train SHARDS")
        clips = self.options.train_clips
        found = self._embedded(modality, self.train, clips, 1, self.options.level, each_view and clips > 1)
        return labelled(found, modality, self.train, self.options.column).to(own_device())

    def _embedded(
        self, modality: Modality, shards: str, clips: int, crops: int, level: Features, each_view: bool
    ) -> EmbeddedShards:
        asked: tuple[Any, ...] = (shards, clips, crops, level, each_view)
        common: dict[str, Any] = {"clips": clips, "each_view": each_view}
        common |= {"workers": self.workers, "decoder": self.decoder, "batch": self.batch}
        if level == "informative":
            if crops > 1:
                raise ConfigError(f"crops={crops}: informative features are of the centre, as cmim was trained")
            asked += (modality,)
            if asked not in self._made:
                self._made[asked] = embed_informative(self.checkpoint, shards, modality=modality, **common)
        elif asked not in self._made:
            self._made[asked] = embed_shards(self.model, shards, crops=crops, level=level, cache=self.cache, **common)
        return self._made[asked]

    @cached_property
    def _made(self) -> dict[tuple[Any, ...], EmbeddedShards]:
        return {}

    def classify(self, modality: Modality) -> TaskResult:
        """Zero-shot classification."""
        options = self.options
        self.model.tower_of("text")
        average = options.average or "embeddings"
        tests = self.tests(modality, level="joint", each_view=average == "scores")
        if not options.classes:
            check_classes(tests, self.shards)
        names, spoken = spoken_names(tests.names(), options.classes, self.shards)
        texts = fill_prompts(spoken, options.prompts)
        rows = self.model.encode_text(texts).view(len(names), len(options.prompts), -1).to(tests.rows.device)
        settings: dict[str, Any] = {
            "windows": self.clips,
            "crops": options.crops,
            "views averaged by": average,
            "prompts averaged by": options.prompt_average,
            "prompts": list(options.prompts),
        }
        scale = self._scale(modality)
        return zero_shot_task(
            modality,
            tests,
            names,
            spoken,
            rows,
            prompts=options.prompt_average,
            average=average,
            scale=scale,
            settings=settings,
        )

    def _scale(self, modality: Modality) -> float:
        """The model's own multiplier of the cosine of these towers, else the largest there may be."""
        scales = self.model.scales()
        towers = [self.model.tower_of(part) for part in modality.split("+")]
        text = self.model.tower_of("text")
        found = [
            float(value.detach())
            for name, value in scales.items()
            if text in name and any(tower in name for tower in towers)
        ]
        return found[0] if found else 100.0

    def knn(self, modality: Modality) -> TaskResult:
        """Weighted nearest neighbours in the training shards."""
        found = neighbours_task(
            modality,
            self.bank(modality),
            self.tests(modality, level=self.options.level),
            neighbours=self.options.neighbours,
            temperature=self.options.temperature,
        )
        return self._with_views(found, "embeddings")

    def linear(self, modality: Modality) -> TaskResult:
        """A linear probe of the training shards."""
        average = self.options.average or "scores"
        found = linear_task(
            modality,
            self.bank(modality, each_view=True),
            self.tests(modality, level=self.options.level, each_view=average == "scores"),
            kind=self.options.kind,
            penalties=self.options.penalties,
            seed=self.options.seed,
            quiet=Comm.current().rank > 0,
        )
        return self._with_views(found, average)

    def few_shot(self, modality: Modality) -> TaskResult:
        """Few-shot episodes within the shards."""
        options = self.options
        tests = self.tests(modality, level=options.level)
        found = few_shot_task(
            modality, tests, ways=options.ways, shots=options.shots, episodes=options.episodes, seed=options.seed
        )
        return self._with_views(found, "embeddings")

    def _with_views(self, found: TaskResult, average: Average) -> TaskResult:
        views = {"windows": self.clips, "crops": self.options.crops, "views averaged by": average}
        return replace(found, settings={**found.settings, "features": self.options.level, **views})

    def task(self, task: Task) -> Callable[[Modality], TaskResult]:
        return {"classify": self.classify, "knn": self.knn, "linear": self.linear, "few-shot": self.few_shot}[task]

    def report(
        self,
        results: Sequence[TaskResult],
        left_out: Sequence[LeftOut] = (),
        retrieval: Sequence[Table] = (),
    ) -> TaskReport:
        """The report of what was found, with a fingerprint of what was asked and of all samples."""
        name = LABELS if self.protocol is None else self.protocol.name
        options = {**dataclasses.asdict(self.options), "clips": self.clips, "name": name}
        asked = {**options, "tasks": [result.name for result in results]}
        keys = sorted({item.key for embedded in self._made.values() for item in embedded.items})
        return TaskReport(
            name, fingerprint(asked, keys), tuple(results), tuple(left_out), self._facts(results), tuple(retrieval)
        )

    def _facts(self, results: Sequence[TaskResult]) -> dict[str, str]:
        """What people should know before they compare figures."""
        skipped = {(asked[0], *skip[:2]) for asked, made in self._made.items() for skip in made.skipped}
        facts = {"checkpoint": self.checkpoint.absolute().name}
        facts |= {"unreadable samples": str(len(skipped))} if skipped else {}
        if self.protocol is None:
            return facts
        facts |= {"asked": self.protocol.about} if self.protocol.about else {}
        samples = {int(result.metrics["samples"]) for result in results}
        classes = {int(result.metrics["classes"]) for result in results}
        for what, here, whole in (
            ("samples", samples, self.protocol.items),
            ("classes", classes, self.protocol.num_classes),
        ):
            if whole is not None and here - {whole}:
                facts[f"not all {what}"] = f"{min(here)} here, the protocol has {whole}: figures do not compare"
        return facts


def evaluate_task(run: TaskRun, task: Task, out: Path) -> TaskReport:
    """One task on every modality, and its report in ``out``.

    In a process group every process calls this; embedding is shared, and the first writes.

    Raises:
        ConfigError: what the task needs is not there: a label, two classes, a modality, a tower, training shards.
        RunError: nothing could be read, or ``out`` cannot be written.
    """
    check_writable(out)
    attempts = {modality: _attempt(run, task, modality) for modality in run.modalities}
    results = [found for found in attempts.values() if isinstance(found, TaskResult)]
    for modality, found in attempts.items():
        if isinstance(found, ConfigError) and (not results or modality in run.options.modalities):
            raise found
    return written(run, run.report(results, _left_out(task, attempts)), out)


def _attempt(run: TaskRun, task: Task, modality: Modality) -> TaskResult | ConfigError:
    try:
        return run.task(task)(modality)
    except ConfigError as error:
        return error


def _left_out(task: Task, attempts: Mapping[Modality, TaskResult | ConfigError]) -> list[LeftOut]:
    return [LeftOut(f"{task} of {name}", str(why)) for name, why in attempts.items() if isinstance(why, ConfigError)]


def evaluate_all(run: TaskRun, out: Path) -> TaskReport:
    """Everything that the labels of the shards and the modalities of the model allow; what is left out, and why.

    That is retrieval, zero-shot classification, k-NN, linear and few-shot probes.

    Raises:
        ConfigError: nothing at all could be done; the first reason.
        RunError: nothing could be read, or ``out`` cannot be written.
    """
    check_writable(out)
    results: list[TaskResult] = []
    left_out: list[LeftOut] = []
    tables: list[Table] = []
    for task in TASKS:
        attempts = {modality: _attempt(run, task, modality) for modality in run.modalities}
        results += [found for found in attempts.values() if isinstance(found, TaskResult)]
        left_out += _left_out(task, attempts)
    try:
        found = evaluate_checkpoint(
            run.checkpoint,
            run.shards,
            out / "retrieval",
            clips=run.clips,
            workers=run.workers,
            decoder=run.decoder,
            cache=run.cache,
        )
        tables = [Table(each.title, ("direction", *COLUMNS), _rows(table(each))) for each in found.report.lists]
    except ConfigError as error:
        left_out.append(LeftOut("retrieval", str(error)))
    if not results and not tables:
        raise ConfigError(left_out[0].why)
    return written(run, run.report(results, left_out, tables), out)


def _rows(cells: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row) for row in cells)


def written(run: TaskRun, report: TaskReport, out: Path) -> TaskReport:
    """The report, once the first process has written it."""
    comm = Comm.current()
    if comm.rank == 0:
        report.write(out)
    comm.barrier()
    return report
