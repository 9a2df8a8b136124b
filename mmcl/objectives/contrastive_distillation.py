"""Contrastive representation distillation (CRD) with bounded memory banks, for streams of any length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options
from mmcl.distributed import Comm
from mmcl.hashing import hash64, text_hash
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.compositional_distillation import check_student_and_teachers
from mmcl.objectives.ranks import all_rows
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Need, TowerInfo, View

_NEGATIVES = 48
"""what the random numbers are for"""


class ContrastiveDistillationOptions(Options):
    """Contrastive representation distillation with bounded memory banks (CRD; Tian et al. 2020, arXiv 1910.10699).

    The authors' β, 0.8, is the default ``weight``. A sample that its slot does not hold has the other side's own row as
    its positive, and the rows of a step share one draw of negatives.

    Needs: a student that learns and one frozen teacher (a tower, or embeddings stored in the shards); labels, where
    there are some.
    """

    name: Literal["contrastive_distillation"] = "contrastive_distillation"
    weight: Weight = 0.8
    student: str = "video"
    teacher: str
    """a frozen tower (``lock: with_head``); it sees the student's time window"""
    level: Literal["pooled", "joint"] = "pooled"
    width: Annotated[int, Field(ge=2)] = 128
    """of the space in which both are compared, a linear map each"""
    slots: Annotated[int, Field(ge=2)] = 65_536
    """rows of each of the two banks; a sample's slot is the hash of its key, a later sample takes over an earlier's"""
    negatives: Annotated[int, Field(ge=1)] = 16_384
    """slots drawn for each step, at most all"""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """how much of a bank's row stays when its sample is seen again"""
    other_classes: bool = True
    """slots of a sample's own class are not its negatives, where there are labels"""
    seed: int = 0
    """of the draws"""


class ContrastiveDistillation(Objective):
    """Each side is scored against the bank of the other; see :func:`noise_contrastive_rows`.

    Beside the paper: the banks are bounded; a sample that its slot does not hold has the other side's own row as its
    positive; the rows of a step share one draw of negatives, from which each leaves out its own slot. Z is that of the
    first batch, kept, the same on all ranks.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    slot_keys: Tensor
    slot_labels: Tensor
    log_z: Tensor
    z_is_fixed: Tensor
    steps: Tensor

    def __init__(
        self, options: ContrastiveDistillationOptions, student: Need, teacher: Need, widths: tuple[int, int]
    ) -> None:
        super().__init__()
        self.options, self.student, self.teacher = options, student, teacher
        self.needs = (student, teacher)
        self.embed_student = nn.Linear(widths[0], options.width)
        self.embed_teacher = nn.Linear(widths[1], options.width)
        for side in ("student", "teacher"):
            # unit rows at random, as the authors start: what is not yet a sample is noise
            self.register_buffer(f"{side}_bank", F.normalize(torch.randn(options.slots, options.width), dim=1))
        self.register_buffer("slot_keys", torch.full((options.slots,), -1, dtype=torch.int64))
        self.register_buffer("slot_labels", torch.full((options.slots,), -1, dtype=torch.int64))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("z_is_fixed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        options, batch = self.options, embeddings.batch
        present = embeddings.present(self.student.view, self.teacher.view)
        device = present.device
        keys = torch.tensor([text_hash(key) for key in batch.keys], dtype=torch.int64, device=device)[present]
        student, teacher = (
            _unit(embed(embeddings.get(need).detach() if need is self.teacher else embeddings.get(need)))
            for embed, need in ((self.embed_student, self.student), (self.embed_teacher, self.teacher))
        )
        rows = {"student": student[present], "teacher": teacher[present]}
        slots, labels = keys % options.slots, batch.labels[present]
        drawn = self._draw(device)
        allowed = drawn != slots[:, None]
        if options.other_classes:
            allowed &= (labels[:, None] != self.slot_labels[drawn]) | (labels[:, None] < 0)
        held = (self.slot_keys[slots] == keys)[:, None]
        scores = []
        for own, bank, other in (
            (rows["student"], self.teacher_bank, rows["teacher"]),
            (rows["teacher"], self.student_bank, rows["student"]),
        ):
            bank = bank.to(own.dtype)
            positives = (own * torch.where(held, bank[slots], other.detach())).sum(1, keepdim=True)
            with torch.autocast(device.type, enabled=False):
                negatives = (own @ bank[drawn].T).masked_fill(~allowed, -torch.inf)
            scores.append(torch.cat([positives, negatives], 1) / options.temperature)
        log_z = self._log_z(scores, comm)
        values = sum(
            noise_contrastive_rows(score - z, slots=options.slots, negatives=len(drawn))
            for score, z in zip(scores, log_z, strict=True)
        )
        assert isinstance(values, Tensor)
        loss = comm.mean(values, torch.ones_like(values, dtype=torch.bool))
        everyone = torch.zeros(len(batch), dtype=torch.int64, device=device)
        pending = {
            "keys": all_rows(everyone.masked_scatter(present, keys), present, comm),
            "labels": all_rows(batch.labels, present, comm),
            "student": all_rows(student.detach(), present, comm),
            "teacher": all_rows(teacher.detach(), present, comm),
            "log_z": log_z.detach(),
        }
        metrics = {"pairs": comm.sum(present.sum()), "held": comm.sum(held.sum())}
        return Term(loss, metrics, pending)

    def _draw(self, device: torch.device) -> Tensor:
        """int64 ``(K,)``: the slots that are this step's negatives, the same on all ranks."""
        count = min(self.options.negatives, self.options.slots)
        words = hash64(self.options.seed, _NEGATIVES, int(self.steps), torch.arange(count).numpy())
        return torch.from_numpy((words % self.options.slots).astype("int64")).to(device)

    def _log_z(self, scores: list[Tensor], comm: Comm) -> Tensor:
        """float ``(2,)``: the kept log Z of both sides, or log(n · mean exp) of this batch while there is none."""
        found = []
        for score in scores:
            score = score.detach()
            top = comm.max(torch.cat([score.flatten(), score.new_full((1,), -1e4)]).amax())
            count = comm.sum(score.isfinite().sum()).clamp_min(1)
            found.append((comm.sum((score - top).exp().sum()) / count).log() + top + math.log(self.options.slots))
        now = torch.stack(found)
        now = torch.where(now.isfinite(), now, 0.0)
        return torch.where(self.z_is_fixed > 0, self.log_z.to(now.dtype), now)

    @torch.no_grad()
    def commit(self, pending: Mapping[str, Any]) -> None:
        """Writes this step's rows into the banks; of rows that share a slot, the last one drawn."""
        self.steps += 1
        keys: Tensor = pending["keys"]
        if len(keys) == 0:
            return
        if not self.z_is_fixed:
            self.log_z.copy_(pending["log_z"])
            self.z_is_fixed.fill_(1)
        slots, order = torch.sort(keys % self.options.slots, stable=True)
        last = torch.cat([slots[1:] != slots[:-1], slots.new_ones(1, dtype=torch.bool)])
        slots, chosen = slots[last], order[last]
        held = (self.slot_keys[slots] == keys[chosen])[:, None]
        momentum = self.options.momentum
        for bank, side in ((self.student_bank, "student"), (self.teacher_bank, "teacher")):
            new = pending[side][chosen].to(bank.dtype)
            bank[slots] = F.normalize(torch.where(held, momentum * bank[slots] + (1 - momentum) * new, new), dim=1)
        self.slot_keys[slots] = keys[chosen]
        self.slot_labels[slots] = pending["labels"][chosen]


def _unit(x: Tensor) -> Tensor:
    """Unit rows, float32 or better under autocast too."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def noise_contrastive_rows(log_x: Tensor, *, slots: int, negatives: int) -> Tensor:
    """−log(x₀ / (x₀ + c)) − Σ_j log(c / (x_j + c)) of each row, with c = negatives / slots.

    ``log_x``: float ``(B, 1 + K)``, the positive first; −inf: left out. ``(B,)``, at least 0.
    Tian et al. 2020, eq. 18 and 19.
    """
    log_c = math.log(negatives / slots)
    # a column of −inf would give 0 with a NaN gradient
    kept = log_x[:, 1:].isfinite()
    rejected = F.softplus(log_x[:, 1:].masked_fill(~kept, 0.0) - log_c).masked_fill(~kept, 0.0)
    return F.softplus(log_c - log_x[:, 0]) + rejected.sum(1)


def build(
    options: ContrastiveDistillationOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0"
) -> ContrastiveDistillation:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown tower, a frozen student or a teacher that is not frozen, more negatives than slots.
    """
    check_student_and_teachers(options.student, (options.teacher,), towers, path, level=options.level)
    if options.negatives > options.slots:
        raise ConfigError(f"{path}.negatives: at most the {options.slots} slots, got {options.negatives}")
    student, teacher = towers[options.student], towers[options.teacher]
    needs = [Need(tower.name, View(tower.spec), (options.level,)) for tower in (student, teacher)]
    widths = [tower.width if options.level == "pooled" else tower.joint_width for tower in (student, teacher)]
    return ContrastiveDistillation(options, needs[0], needs[1], (widths[0], widths[1]))
