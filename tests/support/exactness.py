"""The two tests of every objective: the same numbers on 1, 2 and 3 processes, and with holes or without those rows.

The first cannot see a statistic that counts holes, the second cannot see one that is local to a rank. Both look at the
loss, every gradient and all state over several optimizer steps. A caller brings ``build() -> Subject``, a function at
the top of its test module; ``assert_exact(gloo, build)`` does the rest.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmcl.distributed import Comm, few
from mmcl.encoders.fusion import Fusion, LearnedFusionOptions
from mmcl.media.mixing import GLOBAL, ring
from mmcl.objectives.base import ObjectiveMix, Term
from mmcl.training.momentum import advance
from mmcl.types import (
    TIMED,
    AudioSpec,
    Batch,
    Embeddings,
    Level,
    MotionSpec,
    QuestionSpec,
    TextSpec,
    TowerInfo,
    VideoSpec,
    View,
    ViewBatch,
)

INPUT_WIDTH, WIDTH, JOINT_WIDTH, TOKENS, VOCABULARY = 8, 10, 6, 4, 9


class _NoTokens:
    mask_id, vocabulary = 0, VOCABULARY

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the towers here eat float rows, whatever their modality")


TOWERS = {
    name: TowerInfo(name, spec, WIDTH, JOINT_WIDTH)
    for name, spec in {"video": VideoSpec(), "audio": AudioSpec(), "text": TextSpec(_NoTokens())}.items()
}

MOTION = {"motion": TowerInfo("motion", MotionSpec(), WIDTH, JOINT_WIDTH)}
"""for the objectives that ask for it"""


class _Ids(_NoTokens):
    """… but with token numbers: what decoders predict."""


RAW = {
    "video": TowerInfo("video", VideoSpec(frames=4, size=2), WIDTH, JOINT_WIDTH, causal_patch=(1, 2, 2)),
    "audio": TowerInfo("audio", AudioSpec(sample_rate_hz=8, seconds=1), WIDTH, JOINT_WIDTH, causal_patch=(2,)),
    "text": TowerInfo("text", TextSpec(_Ids()), WIDTH, JOINT_WIDTH, causal_patch=(1,)),
}
"""towers that eat what real ones do, tiny; their tokens are causal"""

KINDS = ("mixed", "rank_1_of_2_empty", "rank_2_of_3_empty", "no_audio", "full", "all_absent")
"""batches: uneven masks; no row at all on one rank; a modality absent everywhere; nothing absent; nothing present"""


class Tower(nn.Module):
    """Any view as float ``(B, INPUT_WIDTH)``, run on the present rows alone; owns the parts that ``levels`` use."""

    def __init__(self, levels: set[Level]) -> None:
        super().__init__()
        if levels & {"pooled", "joint"}:
            self.pool = nn.Linear(INPUT_WIDTH, WIDTH)
        if levels & {"joint", "joint_tokens"}:
            self.joint = nn.Linear(WIDTH, JOINT_WIDTH)
        if levels & {"tokens", "joint_tokens"}:
            self.token = nn.Linear(INPUT_WIDTH // TOKENS, WIDTH)

    def forward(self, view: ViewBatch, level: Level) -> Tensor:
        rows = view.present.nonzero()[:, 0]
        dummy = len(rows) == 0
        x = as_rows(view.data[:1] if dummy else view.data[rows], next(self.parameters()).dtype)
        if level in ("tokens", "joint_tokens"):
            out = torch.tanh(self.token(x.unflatten(1, (TOKENS, -1))))
            out = F.normalize(self.joint(out), dim=-1) if level == "joint_tokens" else out
        else:
            out = torch.tanh(self.pool(x))
            out = F.normalize(self.joint(out), dim=-1) if level == "joint" else out
        full = out.new_zeros(len(view), *out.shape[1:])
        return full + 0 * out.sum() if dummy else full.index_copy(0, rows, out)


def as_rows(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Any view as ``(B, INPUT_WIDTH)``; of four frames, or tokens, each makes two numbers of its own."""
    if data.is_floating_point():
        return data
    x = data.to(dtype)
    return x.view(len(x), INPUT_WIDTH, 6).mean(2) / 64 if x.ndim == 5 else x.repeat_interleave(2, 1) / VOCABULARY


def raw(view: View, x: Tensor, step: int) -> Tensor:
    """What a tower of ``RAW`` eats in place of rows ``(B, INPUT_WIDTH)``; those of other towers as they are."""
    if view.spec == RAW["video"].spec:
        random = torch.Generator().manual_seed(700 + 10 * step + 2 * view.clip + view.copy)
        return torch.randint(0, 256, (len(x), 4, 3, 2, 2), generator=random, dtype=torch.uint8)
    if view.spec == RAW["audio"].spec:
        return 0.02 * x.exp() * x.sign()
    return (3 * x[:, ::2]).long() % VOCABULARY if view.spec == RAW["text"].spec else x


class Subject(nn.Module):
    """Small towers and the objectives under test, in one module as a run has them."""

    def __init__(self, mix: ObjectiveMix, towers: Mapping[str, TowerInfo] = TOWERS) -> None:
        super().__init__()
        self.mix = mix
        levels = {name: {x for need in mix.needs if need.tower == name for x in need.levels} for name in towers}
        self.towers = nn.ModuleDict({name: Tower(wanted) for name, wanted in levels.items() if wanted})
        for name, tower in self.towers.items():
            tower.requires_grad_(towers[name].trainable)
            online = {x for need in mix.needs if (need.tower, need.kind) == (name, "online") for x in need.levels}
            if not online & {"tokens", "joint_tokens"} and hasattr(tower, "token"):
                tower.token.requires_grad_(False)  # a momentum copy alone uses it
        self.momentum_towers = nn.ModuleDict(
            {
                name: copy.deepcopy(self.towers[name]).requires_grad_(False)
                for name in sorted({need.tower for need in mix.needs if need.kind == "momentum"})
            }
        )
        self.log_scales = nn.ParameterDict({name: torch.tensor(2.0 + 0.2 * i) for i, name in enumerate(mix.scales)})
        self.fusions = nn.ModuleDict(learned_fusions(mix.fusions))

    def forward(self, batch: Batch) -> Term:
        values = {}
        for need in self.mix.needs:
            towers = self.momentum_towers if need.kind == "momentum" else self.towers
            for level in need.levels:
                values[need.tower, need.view, level, need.kind] = towers[need.tower](batch.views[need.view], level)
        scales = {name: parameter.exp() for name, parameter in self.log_scales.items()}
        embeddings = Embeddings(values, batch, scales, dict(self.fusions.items()))
        term: Term = self.mix(embeddings, Comm.current())
        return term

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [*((self.towers[n], copied) for n, copied in self.momentum_towers.items()), *self.mix.ema_pairs()]


def learned_fusions(names: Sequence[str], seed: int = 5) -> dict[str, Fusion]:
    """Fusions of joint rows that have learned something: none of their weights is zero."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        fusion = found[name] = Fusion(len(name.split("+")), JOINT_WIDTH, LearnedFusionOptions(hidden=7))
        for parameter in fusion.parameters():
            parameter.data.normal_(std=0.5, generator=random)
    return found


def make_batch(views: Sequence[View], step: int, kind: str, rows: int = 12) -> Batch:
    """The global batch of a step; each modality is absent now and then, and some rows are holes."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not one of {KINDS}")
    random = torch.Generator().manual_seed(100 + step)
    number = torch.arange(rows)
    hole = torch.rand(rows, generator=random) < 0.2
    absent = {m: torch.rand(rows, generator=random) < 0.25 for m in sorted({view.modality for view in views})}
    if kind == "rank_1_of_2_empty":
        hole |= number % 2 == 1
    if kind == "rank_2_of_3_empty":
        hole |= number % 3 == 2
    if kind == "no_audio" and "audio" in absent:
        absent["audio"][:] = True
    if kind == "full":
        hole[:] = False
        absent = {modality: torch.zeros_like(hole) for modality in absent}
    if kind == "all_absent":
        hole[:] = True
    data = {}
    for view in views:
        present = ~(hole | absent[view.modality])
        x = torch.randn(rows, *texts_of(view), INPUT_WIDTH, generator=random, dtype=torch.float64)
        mask, params = _text_parts(view, present, step)
        if not isinstance(view.spec, QuestionSpec):
            x = raw(view, x, step)
        params = {**params, **times_and_labels(view, rows, step), **_question_parts(view, present, step)}
        if view.augmentation == "mixed":
            params.update(mix_parts(present, step * rows + number))
        data[view] = ViewBatch(x * present.view(-1, *[1] * (x.ndim - 1)), present, mask, params)
    groups = torch.randint(0, rows, (rows, 2), generator=random)
    return Batch(
        views=data,
        keys=tuple("" if absent_row else f"{step}-{i}" for i, absent_row in enumerate(hole.tolist())),
        draws=step * rows + number,
        groups=groups.masked_fill(torch.rand(rows, 2, generator=random) < 0.3, -1),
        labels=torch.randint(0, 3, (rows,), generator=random).masked_fill(hole, -1),
    )


def _text_parts(view: View, present: Tensor, step: int) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Texts under an augmentation are of several lengths, and some of their tokens were masked."""
    if view.modality != "text" or (view.augmentation == "none" and view.spec != RAW["text"].spec):
        return None, {}
    random = torch.Generator().manual_seed(500 + step)
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (len(present), 1), generator=random)
    targets = torch.randint(0, VOCABULARY, (len(present), TOKENS), generator=random)
    hidden = ~mask | ~present[:, None] | (torch.rand(len(present), TOKENS, generator=random) < 0.5)
    return mask, {"token_targets": targets.masked_fill(hidden, -1)}


def times_and_labels(view: View, rows: int, step: int) -> dict[str, Tensor]:
    """When clips begin, some of them at the same time as others; classes of pairs, some of them missing."""
    if not isinstance(view.spec, TIMED):
        return {}
    random = torch.Generator().manual_seed(700 + step)
    later = torch.randint(0, 3, (rows,), generator=random) * view.spec.seconds
    params = {"start_seconds": view.clip * later.double()}
    if view.overlap is not None:
        for name, classes in (("overlap_time", 5), ("overlap_space", 5), ("speed", 4), ("turns", 4)):
            params[name] = torch.randint(
                -1 if name in ("overlap_time", "speed") else 0, classes, (rows,), generator=random
            )
        params["turns"] = (params["turns"] + view.clip) % 4
    return params


def mix_parts(present: Tensor, draws: Tensor) -> dict[str, Tensor]:
    """Half of the rows of this view were mixed with the next one of a ring."""
    share = torch.where(draws % 2 == 0, 0.1 + (draws % 5) / 8, 0.0)
    return {GLOBAL: share, "mix_draw": draws[ring(draws, present, 0)]}


def texts_of(view: View) -> tuple[int, ...]:
    """How many texts are a row of a view of questions; none else."""
    return (view.spec.texts,) if isinstance(view.spec, QuestionSpec) else ()


def _question_parts(view: View, present: Tensor, step: int) -> dict[str, Tensor]:
    """Of questions the right candidate, one to all sentences, and spans, some of them unknown."""
    random, rows = torch.Generator().manual_seed(700 + step), len(present)
    if not isinstance(view.spec, QuestionSpec):
        return {}
    spec, absent = view.spec, ~present
    starts = torch.rand(rows, spec.sentences, generator=random, dtype=torch.float64) * 2
    lengths = torch.rand(rows, spec.sentences, generator=random, dtype=torch.float64)
    there = torch.arange(spec.sentences) < torch.randint(1, spec.sentences + 1, (rows, 1), generator=random)
    sentences = torch.stack([starts, starts + lengths], -1).masked_fill(
        ~(there & present[:, None])[..., None], torch.nan
    )
    unknown = absent | (torch.rand(rows, generator=random) < 0.3)
    target = torch.randint(0, 1 if spec.part == "truth" else spec.candidates, (rows,), generator=random)
    return {
        "target": target.masked_fill(absent, -1),
        "sentence_seconds": sentences,
        "span_seconds": sentences[:, 0].masked_fill(unknown[:, None], torch.nan),
    }


def pick_rows(batch: Batch, index: Tensor) -> Batch:
    """The rows of ``batch`` with these numbers."""
    picked = batch.map(lambda tensor: tensor[index])
    return dataclasses.replace(picked, keys=tuple(batch.keys[i] for i in index.tolist()))


@dataclass
class Record:
    """What a run left behind."""

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


def train(
    rank: int,
    world: int,
    build: Callable[[], Subject],
    kinds: Sequence[str] = KINDS,
    delete_holes: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Record:
    """One optimizer step on a batch of each kind, as one rank of ``world``."""
    torch.manual_seed(1)
    few.FEW_ROWS = 0 if world == 3 else 128  # contrastive losses go both ways: shared work, and all of it on each rank
    subject = build().to(dtype)
    step_module = DistributedDataParallel(subject, broadcast_buffers=False) if world > 1 else subject
    parameters = {name: p for name, p in subject.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    views = list(dict.fromkeys(need.view for need in subject.mix.needs))
    record = Record()
    for step, kind in enumerate(kinds):
        batch = make_batch(views, step, kind)
        index = torch.arange(rank, len(batch), world)
        if delete_holes:
            index = torch.tensor([i for i in index.tolist() if batch.keys[i]], dtype=torch.long)
        own = pick_rows(batch, index).map(lambda x: x.to(dtype) if x.is_floating_point() else x)
        optimizer.zero_grad()
        term = step_module(own)
        term.loss.backward()
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        record.losses.append(float(term.loss.detach()))
        record.metrics.append({name: float(value) for name, value in term.metrics.items()})
        record.gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        optimizer.step()
        subject.mix.commit(term.pending)
        advance(subject.ema_pairs(), 0.9)
    record.state = {name: value.clone() for name, value in subject.state_dict().items()}
    return record


def assert_same(actual: Record, expected: Record, what: str, relative: float = 1e-9, metrics: bool = True) -> None:
    """Loss, metrics, gradients of each step, final state; a gradient that is truly zero is held against the others."""
    wrong = []
    for step, (a, b) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        if not abs(a - b) <= relative * (1 + abs(b)):
            wrong.append(f"step {step}: loss {a} instead of {b}")
    for step, (found, wanted) in enumerate(zip(actual.metrics, expected.metrics, strict=True)):
        wrong += [
            f"step {step}: metric {name} {found.get(name)} instead of {value}"
            for name, value in wanted.items()
            if metrics and not abs(found.get(name, torch.nan) - value) <= relative * (1 + abs(value))
        ]
    for step, (ours, theirs) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        for name, gradient in theirs.items():
            difference = (ours[name] - gradient).norm()
            if not difference <= relative * gradient.norm() + 0.1 * relative * whole + 1e-15:
                wrong.append(f"step {step}: gradient of {name} is off by {float(difference):.2e}")
    for name, value in expected.state.items():
        difference = (actual.state[name].double() - value.double()).norm()
        if not difference <= relative * (1 + value.double().norm()):
            wrong.append(f"state {name} is off by {float(difference):.2e}")
    assert not wrong, f"{what}:\n" + "\n".join(wrong[:12])


def assert_exact(
    gloo: Callable[..., list[Record]],
    build: Callable[[], Subject],
    kinds: Sequence[str] = KINDS,
    relative: float = 1e-9,
) -> Record:
    """Both tests, gradients averaged by DDP as in a run; returns the record of one process."""
    reference = train(0, 1, build, kinds)
    for world in (2, 3):
        for rank, record in enumerate(gloo(world, train, build, kinds)):
            assert_same(record, reference, f"rank {rank} of {world}", relative)
    assert_same(train(0, 1, build, kinds, delete_holes=True), reference, "hole rows deleted", relative)
    return reference
