"""Multiple-choice video question answering with locally aligned attention (Kim et al. 2021, arXiv 2009.08043).

One text tower reads "question | answer" of each of K answers, and each of J sentences of the subtitles. Answer k beside
sentence j attends to the frames inside the sentence's own time, ± a window; what both say and what is seen goes through
an RNN over the sentences, and the maximum over them is h_k. With the score s_k of h_k and the right answer y:

- **answer**: CE(s, y).
- **contrast**: CE(⟨h̃, h_k⟩/τ, y), h̃ from the right answer's texts with masked tokens, by the same weights.
- **localisation**: two-way CE of each frame: is it inside the span where the answer shows?
- **question** (pre-training): CE of the clip's own question among questions about other clips, by the same score.

L = Σ weight · term. No official code exists, and the description leaves much open; our decisions, all of them:

- Sentences are read apart from question and answer: K + J texts instead of K · J. They meet, and meet the picture, as
  [x, y, x · y]. Clips without subtitles have one empty sentence as long as the clip.
- A frame is all its tokens of the video tower, each at its frame's time; sentences attend to them by one head.
- The RNN is a GRU in both directions with a way past it; masked tokens are drawn alike in all texts of a row.
- All weights are 1, and frames count alike in ``localisation``; the paper has start and end of the span, its weights
  are not known. Gradients reach both sides of ``contrast``.
- Candidate questions are read without an answer, whose words might give away the question. They are drawn anew in each
  epoch from those that lie with the sample, none about the same clip.
- Towers are ours: no detector's labels of objects, and frames come from a tower that learns.

The length of h, on which the dot product of ``contrast`` depends, is logged as ``norm``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmcl.config import unknown_name
from mmcl.distributed import Comm
from mmcl.folders import model_folder
from mmcl.losses.video_qa import masked_answer_rows
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.video_qa.options import VideoQAOptions
from mmcl.objectives.video_qa.reader import FrameMatch, LocalReader, frames_in_time
from mmcl.types import ConfigError, Embeddings, Need, QuestionSpec, TextSpec, TowerInfo, VideoSpec, View

__all__ = ["VideoQA", "VideoQAOptions", "build"]

TERMS = ("answer", "contrast", "localisation", "question")


class VideoQA(Objective):
    """The weighted terms that are switched on; equal on any number of ranks, whose rows never meet."""

    def __init__(self, options: VideoQAOptions, reading: TowerInfo, watching: TowerInfo | None, path: str) -> None:
        super().__init__()
        assert isinstance(reading.spec, TextSpec)
        self.options, self.path = options, path
        self.terms = [term for term in TERMS if getattr(options, term) is not None]
        self.watched = tuple(f"loss/{term}" for term in self.terms)
        self.reader = LocalReader(reading.width, None if watching is None else watching.width, options.width)
        self.match = FrameMatch(options.width) if options.localisation else None
        if not (options.answer or options.question):
            self.reader.score.requires_grad_(False)
        spec = QuestionSpec(reading.spec.tokenizer, options.answers, options.sentences)
        self.answers = Need(reading.name, View(spec), ("pooled",))
        """what :meth:`scores` reads"""
        self.truth = self.asked = self.video = None
        if options.contrast:
            truth = View(replace(spec, part="truth"), augmentation=options.contrast.augmentation)
            self.truth = Need(reading.name, truth, ("pooled",))
            self.masking = {"contrast.augmentation": options.contrast.augmentation}
        if options.question:
            questions = replace(spec, part="questions", candidates=options.question.candidates)
            self.asked = Need(reading.name, View(questions), ("pooled",))
        if watching is not None:
            self.video = Need(watching.name, View(watching.spec), ("tokens",))
        answers = None if self.terms == ["question"] else self.answers
        self.needs = tuple(need for need in (answers, self.truth, self.asked, self.video) if need is not None)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        frames = self._frames(embeddings)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if self.answers in self.needs:
            values = embeddings.batch.views[self.answers.view]
            options, has, target = self._read(embeddings, self.answers, frames), values.present, values.params["target"]
            target = target.clamp(min=0)
            own = options[torch.arange(len(target), device=target.device), target]
            metrics["norm"] = comm.mean(options.detach().norm(dim=-1).mean(1), has)
            if self.options.answer:
                losses["answer"], metrics["accuracy"] = self._choice(options, target, has, comm)
            if self.options.contrast and self.truth is not None:
                losses["contrast"] = self._contrast(embeddings, options, target, frames, comm)
            if self.match is not None and self.video is not None and frames is not None:
                losses["localisation"] = self._localisation(embeddings, own, frames, comm)
        if self.asked is not None:
            values = embeddings.batch.views[self.asked.view]
            asked, target = self._read(embeddings, self.asked, frames), values.params["target"].clamp(min=0)
            losses["question"], metrics["question_accuracy"] = self._choice(asked, target, values.present, comm)
        total = torch.stack([getattr(self.options, term).weight * loss for term, loss in losses.items()]).sum()
        metrics.update({f"loss/{term}": loss.detach() for term, loss in losses.items()})
        return Term(total, metrics)

    def scores(self, embeddings: Embeddings) -> Tensor:
        """Of the answers, float ``(B, K)``: softmax gives probabilities."""
        return self.reader.scores(self._read(embeddings, self.answers, self._frames(embeddings)))

    def load_pretrained(self) -> None:
        """The reader of a run with this objective.

        Raises:
            ConfigError: there is none, or it is of another size; names the option.
        """
        if self.options.pretrained is None:
            return
        place, where = f"{self.path}.pretrained", model_folder(Path(self.options.pretrained))
        try:
            tensors = load_file(where / "objectives.safetensors")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{place}: {where}: {' '.join(str(error).split())}") from None
        names = sorted({name.split(".reader.")[0] for name in tensors if ".reader.rnn." in name})
        if not names:
            raise ConfigError(f"{place}: {where} was not trained with video_qa")
        start = f"{names[0]}.reader."
        try:
            self.reader.load_state_dict({n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)})
        except RuntimeError as error:
            raise ConfigError(f"{place}: {where} does not fit: {' '.join(str(error).split())[:300]}") from None

    def _frames(self, embeddings: Embeddings) -> Tensor | None:
        if self.video is None or self.reader.watch is None:
            return None
        tokens = _precise(embeddings.get(self.video))
        with torch.autocast(tokens.device.type, enabled=False):
            frames: Tensor = self.reader.watch.frame(tokens)
        return frames

    def _read(self, embeddings: Embeddings, need: Need, frames: Tensor | None) -> Tensor:
        """h of the candidates of a view, ``(B, K, D)``."""
        spec, values = need.view.spec, embeddings.batch.views[need.view]
        assert isinstance(spec, QuestionSpec)
        texts = _precise(embeddings.get(need))
        sentences = values.params["sentence_seconds"]
        allowed = None
        if self.video is not None and frames is not None:
            allowed = frames_in_time(self._times(embeddings, frames.shape[1]), sentences, self.options.window_seconds)
            allowed = allowed & embeddings.present(self.video.view)[:, None, None]
        with torch.autocast(texts.device.type, enabled=False):
            read: Tensor = self.reader(
                texts[:, : spec.heads],
                texts[:, spec.heads :],
                ~sentences[..., 0].isnan(),
                frames,
                allowed,
            )
        return read

    def _times(self, embeddings: Embeddings, tokens: int) -> Tensor:
        """float64 ``(B, L)``: when the frame of each token is shown; tokens go on in time, each frame has as many."""
        assert self.video is not None
        spec, starts = self.video.view.spec, embeddings.batch.views[self.video.view].params["start_seconds"]
        assert isinstance(spec, VideoSpec)
        frame = torch.arange(tokens, device=starts.device) * spec.frames // tokens
        return starts[:, None] + (frame + 0.5) / spec.fps

    def _choice(self, candidates: Tensor, target: Tensor, has: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy of the scores."""
        with torch.autocast(candidates.device.type, enabled=False):
            scores = self.reader.scores(candidates)
            loss = comm.mean(F.cross_entropy(scores, target, reduction="none"), has)
        return loss, comm.mean((scores.argmax(1) == target).to(scores.dtype), has).detach()

    def _contrast(
        self, embeddings: Embeddings, options: Tensor, target: Tensor, frames: Tensor | None, comm: Comm
    ) -> Tensor:
        term = self.options.contrast
        assert term is not None and self.truth is not None
        masked = self._read(embeddings, self.truth, frames)[:, 0]
        with torch.autocast(options.device.type, enabled=False):
            values = masked_answer_rows(
                masked, options, target, temperature=term.temperature, similarity=term.similarity
            )
        return comm.mean(values, embeddings.present(self.truth.view, self.answers.view))

    def _localisation(self, embeddings: Embeddings, own: Tensor, frames: Tensor, comm: Comm) -> Tensor:
        assert self.video is not None and self.match is not None
        times = self._times(embeddings, frames.shape[1])
        span = embeddings.batch.views[self.answers.view].params["span_seconds"]
        inside = ((times >= span[:, :1]) & (times <= span[:, 1:])).to(own.dtype)
        with torch.autocast(own.device.type, enabled=False):
            logits = self.match(own, frames)
            values = F.binary_cross_entropy_with_logits(logits, inside, reduction="none").mean(1)
        return comm.mean(values, embeddings.present(self.answers.view, self.video.view) & ~span[:, 0].isnan())


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def build(options: VideoQAOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> VideoQA:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown tower or one of another kind, every term is off, or a term that needs a video without
            one; names ``path``.
    """
    if all(getattr(options, term) is None for term in TERMS):
        raise ConfigError(f"{path}: every term is off; give one of {', '.join(TERMS)}")
    for option, name, kind in (("text", options.text, TextSpec), ("video", options.video, VideoSpec)):
        if name is None:
            continue
        if name not in towers:
            raise unknown_name(f"{path}.{option}", name, towers)
        if not isinstance(towers[name].spec, kind):
            raise ConfigError(f"{path}.{option}: {name!r} is a tower of {towers[name].modality}, not of {option}")
    if options.video is None:
        if options.localisation is not None:
            raise ConfigError(f"{path}.localisation: needs a video tower; set it to null")
        return VideoQA(options, towers[options.text], None, path)
    watching = towers[options.video]
    assert isinstance(watching.spec, VideoSpec)
    if watching.spec.stride is not None:
        raise ConfigError(
            f"{path}.video: {options.video!r} takes frames by stride, whose times are not known; give fps"
        )
    return VideoQA(options, towers[options.text], watching, path)
