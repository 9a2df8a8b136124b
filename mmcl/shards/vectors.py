"""Embeddings stored beside the media: ``KEY.NAME.npy``, one vector of floats each. Nothing is unpickled.

The header of such a file is a stranger's: it is matched, not evaluated, and no array is made that the file does not
hold.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mmcl.shards.embedding_files import read_index, read_items
from mmcl.types import ConfigError, SampleError

MAX_VECTOR_BYTES = 1 << 20
_HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<>]f[248])', 'fortran_order': (?:True|False), "
    r"'shape': \((?:1, (?P<row>)|)(?P<count>[1-9][0-9]{0,6})(?(row)|,)\), ?\}\s*"
)
"""what `numpy.save` writes, and nothing else: numpy's own reader takes any Python literal"""

Vector = npt.NDArray[np.float32]


def read_vector(data: bytes | memoryview, width: int | None = None) -> Vector:
    """float32 ``(D,)`` of the bytes of an ``.npy`` file of shape ``(D,)`` or ``(1, D)`` and of 16, 32 or 64 bits.

    Raises:
        SampleError: ``too_large``, or ``bad_embedding``: not such a file, not finite, or D is not ``width``.
    """
    if len(data) > MAX_VECTOR_BYTES:
        raise SampleError("too_large", f"an embedding of {len(data)} bytes, at most {MAX_VECTOR_BYTES}")
    start, end = _header_place(bytes(data[:12]))
    header = _HEADER.fullmatch(bytes(data[start:end]).decode("latin-1"))
    if end > len(data) or header is None:
        raise SampleError("bad_embedding", "not an .npy file of one vector of floats")
    dtype, count, rest = np.dtype(header["dtype"]), int(header["count"]), bytes(data[end:])
    if len(rest) != count * dtype.itemsize:
        raise SampleError("bad_embedding", f"{len(rest)} bytes for {count} numbers")
    if width is not None and count != width:
        raise SampleError("bad_embedding", f"{count} numbers, the tower is {width} wide")
    with np.errstate(over="ignore"):
        vector = np.frombuffer(rest, dtype).astype(np.float32)
    if not np.isfinite(vector).all():
        raise SampleError("bad_embedding", "its numbers are not all finite")
    return vector


def _header_place(data: bytes) -> tuple[int, int]:
    """Where the header of an ``.npy`` file begins and ends; ends before it begins where this is none."""
    if data[:6] != b"\x93NUMPY" or data[6:8] not in (b"\x01\x00", b"\x02\x00"):
        return 0, -1
    start = 10 if data[6] == 1 else 12
    return start, start + int.from_bytes(data[8:start], "little")


def write_vector(vector: npt.ArrayLike) -> bytes:
    """The bytes of an ``.npy`` file of one vector, float32."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(vector, dtype="<f4"), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def load_embeddings(folder: str | Path, modality: str) -> dict[str, Vector]:
    """Key to vector, of one modality of a folder that ``mmcl embed`` wrote; of several texts of a sample the first.

    Raises:
        ConfigError: no such folder or modality, or files that do not belong together.
    """
    index = read_index(folder)
    if modality not in index.widths:
        raise ConfigError(f"{folder}: no embeddings of {modality!r}; there are: {', '.join(sorted(index.widths))}")
    found: dict[str, Vector] = {}
    for number in range(len(index.files)):
        keys = [str(item["key"]) for item in read_items(index.items_path(number))]
        path = index.rows_path(number)
        try:
            with safe_open(str(path), framework="np") as file:
                rows, owners = file.get_tensor(f"{modality}.rows"), file.get_tensor(f"{modality}.items")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: not embeddings: {error}") from None
        if rows.ndim != 2:
            raise ConfigError(f"{folder}: rows of {modality} hold each view of a sample; embed without --each-view")
        if len(rows) != len(owners) or (len(owners) and not 0 <= owners.min() <= owners.max() < len(keys)):
            raise ConfigError(f"{path}: rows and items do not belong together")
        for owner, row in zip(owners.tolist(), rows, strict=True):
            found.setdefault(keys[owner], row.astype(np.float32))
    return found
