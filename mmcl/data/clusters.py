"""Pseudo-labels of samples: what multistage contrastive learning draws its batches by.

A label is the numbers of clusters of all earlier stages as one number in mixed radix: ``ℓ ← ℓ·K + c`` with every stage
(Zhang et al. 2024, arXiv 2402.11816). A file of them is good for exactly one set of shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmcl.data.order import Integers
from mmcl.types import ConfigError, RunError

_FACTS = "mmcl"
"""the one entry of a file's metadata"""


@dataclass(frozen=True, eq=False)
class Clusters:
    """The pseudo-label of every sample of some shards."""

    labels: Integers
    """int64 ``(N,)`` by the sample's number in the shards; −1: it could not be read, and is not drawn"""
    radix: tuple[int, ...]
    """clusters of each earlier stage, the first stage first"""
    manifest: str
    """fingerprint of the shards"""

    @cached_property
    def checksum(self) -> str:
        """32 hexadecimal digits of the labels and what they are of."""
        digest = hashlib.sha256(json.dumps([self.manifest, *self.radix]).encode())
        digest.update(np.ascontiguousarray(self.labels, "<i8").tobytes())
        return digest.hexdigest()[:32]

    @property
    def counts(self) -> dict[int, int]:
        """Samples of each label that has any."""
        values, counts = np.unique(self.labels[self.labels >= 0], return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        facts = {"radix": self.radix, "manifest": self.manifest, "checksum": self.checksum}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"labels": self.labels}, temporary, metadata={_FACTS: json.dumps(facts)})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        finally:
            temporary.unlink(missing_ok=True)


def read_clusters(path: Path) -> Clusters:
    """Reads what :meth:`Clusters.save` wrote.

    Raises:
        ConfigError: no such file, or a damaged one.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            found = Clusters(file.get_tensor("labels"), tuple(map(int, facts["radix"])), str(facts["manifest"]))
        whole = found.labels.dtype == np.int64 and found.labels.ndim == 1 and found.checksum == facts["checksum"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.clusters: {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not whole:
        raise ConfigError(f"data.clusters: {path} is damaged")
    return found


def with_digit(labels: Integers, digits: Integers, clusters: int) -> Integers:
    """``ℓ·K + c``; −1 where either is.

    >>> with_digit(np.array([2, 0, -1]), np.array([1, 9, 3]), 10).tolist()
    [21, 9, -1]

    Raises:
        ValueError: a digit that is no number below K.
    """
    if len(digits) and not -1 <= int(digits.min()) <= int(digits.max()) < clusters:
        raise ValueError(f"digits must lie below {clusters}, got {int(digits.min())} … {int(digits.max())}")
    whole: Integers = np.where((labels < 0) | (digits < 0), -1, labels * clusters + digits)
    return whole


def digits_of(label: int, radix: Sequence[int]) -> tuple[int, ...]:
    """The clusters that a label was made of, the first stage first.

    >>> digits_of(217, (10, 10, 10))
    (2, 1, 7)
    """
    digits = []
    for clusters in reversed(radix):
        label, digit = divmod(label, clusters)
        digits.append(digit)
    return tuple(reversed(digits))


def check_radix(radix: Sequence[int]) -> None:
    """ConfigError where labels would not fit into 63 bits."""
    if math.prod(radix) >= 2**63:
        raise ConfigError(f"multistage.stages: labels of {len(radix)} stages of {radix[0]} clusters need over 63 bits")
