"""``hf:`` audio towers: AST, CLAP (HTSAT), Whisper's encoder and wav2vec 2.0, each with its own front end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import unknown_name
from mmcl.encoders.base import Encoder
from mmcl.encoders.front_ends import (
    AstFrontEnd,
    ClapFrontEnd,
    LongAudio,
    WaveFrontEnd,
    WhisperFrontEnd,
    fitted,
    sounding,
    thirds,
)
from mmcl.encoders.hf_common import by_own_names, library_error, load_config, stem_and_layers
from mmcl.encoders.norms import replace_batch_norm
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.packages import place_of
from mmcl.types import AudioSpec, ConfigError, Features

WAVE_SECONDS = 10.0
"""of a window of a tower that takes any length, where none is asked for"""


class HfAudioOptions(TowerCommon):
    """An audio model of transformers; rate, window and front end are its own."""

    name: str = Field(pattern=r"^hf:.+$")
    """``hf:`` and a local folder with a ``config.json``, or one of ``audio-spectrogram-transformer``, ``clap``,
    ``whisper``, ``wav2vec2``"""
    modality: Literal["audio"] = "audio"
    config: dict[str, Any] = Field(default_factory=dict)
    """keys of the model's configuration to set; dropout is 0 unless set here"""
    seconds: float | None = Field(default=None, ge=0.1, le=3600)
    """length of a window of the stream; null: the tower's own (wav2vec 2.0, which takes any: 10 s)"""
    long_audio: LongAudio | None = None
    """what is done with a window that is longer or shorter than the tower's own; null: ``repeat-pad`` for CLAP, else
    ``crop``"""


class HfAudio(Encoder):
    """float32 ``(B, S)``, at the rate of ``spec``, through a front end on the device of the weights.

    Each architecture says which classes of transformers it is, and what they are told.
    """

    library: str
    """class of transformers"""
    part: str = ""
    """of it that is the tower; "" is the whole"""
    layers: str
    extractor: str
    """class of transformers that knows what the front end does"""
    usual: LongAudio = "crop"
    changes: Mapping[str, Any] = {}
    """to its configuration, where the user does not say otherwise"""
    front: Any
    model: Any

    def __init__(self, options: HfAudioOptions, config: Any, folder: Path) -> None:
        super().__init__()
        import transformers

        for key, value in self.changes.items():
            setattr(config, key, options.config.get(key, value))
        self.policy: LongAudio = options.long_audio or self.usual
        library, knows = getattr(transformers, self.library), getattr(transformers, self.extractor)
        try:
            model = library(config)
            told = (folder / "preprocessor_config.json").is_file()
            extractor = knows.from_pretrained(folder, local_files_only=True) if told else knows(**self._told(config))
        except (OSError, TypeError, ValueError, RuntimeError, KeyError) as error:
            raise library_error(options, error) from error
        self.published = (library, config, self.part)
        self.model = replace_batch_norm(model.get_encoder() if self.part else model, "frozen")
        self.front = self._front(config, extractor, options)
        rate = int(extractor.sampling_rate)
        self.spec = AudioSpec(rate, options.seconds or self.front.samples / rate)
        self.width = self._width(config)

    def _told(self, config: Any) -> dict[str, Any]:
        """What the class of the front end is told where no folder says it."""
        raise NotImplementedError

    def _front(self, config: Any, extractor: Any, options: HfAudioOptions) -> nn.Module:
        raise NotImplementedError

    def _width(self, config: Any) -> int:
        return int(config.hidden_size)

    def _encode(self, x: Tensor, lengths: Tensor) -> Features:
        """Of rows as long as its window."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """What comes before its layers, then each layer."""
        return stem_and_layers(self.model, self.layers)

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a model of transformers of any task."""
        return by_own_names(tensors, self, *self.published)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, S)``, any S; ``mask``: bool ``(B, S)``, samples that are not padding (None: padding is
        what is exactly 0 up to the end).
        """
        lengths = sounding(x, mask)
        if mask is not None:
            x = x.masked_fill(~mask, 0.0)
        samples = self.front.samples
        if self.policy != "fuse" or x.shape[1] <= samples:
            return self._encode(*fitted(x, lengths, samples, self.policy))
        return self._fused(x, lengths)

    def _fused(self, x: Tensor, lengths: Tensor) -> Features:
        """Three parts one by one; their tokens follow each other in time."""
        parts = thirds(x, self.front.samples)
        found = self._encode(parts.flatten(0, 1), sounding(parts.flatten(0, 1), None))
        assert found.tokens is not None
        rows, width = len(x), self.width
        mask = None if found.token_mask is None else found.token_mask.reshape(rows, -1)
        grid = None if found.grid is None else (3 * found.grid[0], *found.grid[1:])
        return Features(found.pooled.view(rows, 3, width).mean(1), found.tokens.reshape(rows, -1, width), mask, grid)


class Ast(HfAudio):
    """Audio Spectrogram Transformer: ``pooled`` is the mean of its class and its distillation token."""

    library, layers, extractor = "ASTModel", "layers", "ASTFeatureExtractor"

    def _told(self, config: Any) -> dict[str, Any]:
        return {"num_mel_bins": config.num_mel_bins, "max_length": config.max_length}

    def _front(self, config: Any, extractor: Any, options: HfAudioOptions) -> nn.Module:
        if (extractor.num_mel_bins, extractor.max_length) != (config.num_mel_bins, config.max_length):
            raise ConfigError(f"tower.config: {options.name} and its front end differ in mels or length")
        self.grid = (
            (config.max_length - config.patch_size) // config.time_stride + 1,
            (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1,
        )
        return AstFrontEnd(extractor)

    def _encode(self, x: Tensor, lengths: Tensor) -> Features:
        found = self.model(self.front(x, lengths))
        time, bands = self.grid
        tokens = found.last_hidden_state[:, 2:].view(len(x), bands, time, self.width).transpose(1, 2).flatten(1, 2)
        return Features(found.pooler_output, tokens, grid=self.grid)


class Clap(HfAudio):
    """CLAP's audio tower before its projection. What a fusing one has for longer waves alone is trained only if they
    come: ``long_audio: fuse`` and ``seconds`` beyond its window.
    """

    library, layers, extractor = "ClapAudioModel", "audio_encoder.layers", "ClapFeatureExtractor"
    usual = "repeat-pad"

    def _told(self, config: Any) -> dict[str, Any]:
        return {"feature_size": config.num_mel_bins, "frequency_min": 50}  # as all published weights have it

    def _front(self, config: Any, extractor: Any, options: HfAudioOptions) -> nn.Module:
        self.fuses = bool(config.enable_fusion)
        front = ClapFrontEnd(extractor, fuses=self.fuses)
        rate = int(extractor.sampling_rate)
        longer = (options.seconds or 0.0) * rate >= front.samples + int(extractor.hop_length)
        if self.fuses and not (longer and options.long_audio == "fuse"):
            for name, parameter in self.model.named_parameters():
                if "fusion_model" in name or "mel_conv2d" in name:
                    parameter.requires_grad_(False)
        return front

    def _width(self, config: Any) -> int:
        return int(self.model.audio_encoder.num_features)

    def blocks(self) -> list[nn.Module]:
        """Its norm over mels, which comes first, its patches, and each stage."""
        return [self.model.audio_encoder.batch_norm, *super().blocks()]

    def _fused(self, x: Tensor, lengths: Tensor) -> Features:
        return self._encode(x, lengths) if self.fuses else super()._fused(x, lengths)

    def _encode(self, x: Tensor, lengths: Tensor) -> Features:
        mel = self.front(x, lengths)
        longer = torch.full((len(x), 1), x.shape[1] >= self.front.samples + self.front.mel.hop, device=x.device)
        found = self.model(mel, is_longer=longer)
        maps = found.last_hidden_state  # (B, D, bands, time)
        return Features(
            found.pooler_output, maps.permute(0, 3, 2, 1).flatten(1, 2), grid=(maps.shape[3], maps.shape[2])
        )


class Whisper(HfAudio):
    """Whisper's encoder; ``pooled`` is the mean over what sounds, not over the silence that fills its window."""

    library, part, layers, extractor = "WhisperModel", "encoder.", "layers", "WhisperFeatureExtractor"
    changes = {"decoder_layers": 1}  # noqa: RUF012  it is built with the encoder, and left

    def _told(self, config: Any) -> dict[str, Any]:
        return {"feature_size": config.num_mel_bins}

    def _front(self, config: Any, extractor: Any, options: HfAudioOptions) -> nn.Module:
        if extractor.feature_size != config.num_mel_bins:
            raise ConfigError(f"tower.config: {options.name} and its front end differ in mels")
        return WhisperFrontEnd(extractor, 2 * config.max_source_positions)

    def _width(self, config: Any) -> int:
        return int(config.d_model)

    def _encode(self, x: Tensor, lengths: Tensor) -> Features:
        tokens = self.model(self.front(x, lengths)).last_hidden_state
        return _mean_of(tokens, -(-lengths // (2 * self.front.mel.hop)))


class Wav2Vec2(HfAudio):
    """wav2vec 2.0; ``pooled`` is the mean over what sounds. Padding changes nothing where the model norms by layer;
    the first published ones norm over the whole window, and see it.
    """

    library, layers, extractor = "Wav2Vec2Model", "encoder.layers", "Wav2Vec2FeatureExtractor"
    changes = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}  # noqa: RUF012  masks of its own pre-training

    def _told(self, config: Any) -> dict[str, Any]:
        return {"return_attention_mask": config.feat_extract_norm == "layer"}

    def _front(self, config: Any, extractor: Any, options: HfAudioOptions) -> nn.Module:
        if self.policy == "fuse":
            raise ConfigError(f"tower.long_audio: {options.name} takes any length, there is nothing to fuse")
        self.masks = bool(extractor.return_attention_mask)
        seconds = options.seconds or WAVE_SECONDS
        return WaveFrontEnd(extractor, round(seconds * extractor.sampling_rate))

    def _encode(self, x: Tensor, lengths: Tensor) -> Features:
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        tokens = self.model(self.front(x, lengths), inside.long() if self.masks else None).last_hidden_state
        return _mean_of(tokens, self.model._get_feat_extract_output_lengths(lengths))


def _mean_of(tokens: Tensor, lengths: Tensor) -> Features:
    """Features whose ``pooled`` is the mean of the first ``lengths`` tokens, at least one."""
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.clamp_min(1)[:, None]
    tokens = tokens.masked_fill(~mask[:, :, None], 0.0)
    return Features(tokens.sum(1) / mask.sum(1, keepdim=True), tokens, mask, grid=(tokens.shape[1],))


AUDIO_KINDS: Mapping[str, type[HfAudio]] = {
    "audio-spectrogram-transformer": Ast,
    "clap": Clap,
    "clap_audio_model": Clap,
    "whisper": Whisper,
    "wav2vec2": Wav2Vec2,
}
"""By the model type of transformers."""


def build_hf_audio(options: HfAudioOptions) -> Encoder:
    """The tower for the model type that the name, or the folder's ``config.json``, says."""
    folder = place_of(options.name.removeprefix("hf:"))
    config = load_config(options, folder, options.config, "audio_config")
    if config.model_type not in AUDIO_KINDS:
        raise unknown_name("tower.name", f"hf:{config.model_type}", [f"hf:{name}" for name in AUDIO_KINDS])
    return AUDIO_KINDS[config.model_type](options, config, folder)
