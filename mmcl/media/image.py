"""A picture file to pixels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmcl.media.frames import Fit, scaled_size, square_crop
from mmcl.media.probe import MAX_PIXELS, MediaSource, short_message
from mmcl.types import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""what is opened; Pillow also knows formats that start other programs"""


def decode_image(data: MediaSource, *, size: int | None = None, fit: Fit = "crop") -> np.ndarray:
    """uint8 ``(3, H, W)``: a picture as it is displayed (EXIF turned, transparency on white, first of several).

    ``size`` and ``fit`` as for ``video.open_video``.
    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty``, ``not_an_image``, ``too_large``, ``decode``.
    """
    content = _content(data)
    if not content:
        raise SampleError("empty", "0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it can live with, and below its own pixel limit
        image = _decoded(content, size)
    if size is not None:
        height, width = scaled_size(image.height, image.width, size, fit)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(square_crop(np.asarray(image), size, fit).transpose(2, 0, 1))


def _decoded(content: bytes | bytearray | memoryview, size: int | None) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("too_large", short_message(error)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise SampleError("not_an_image", "no picture of a known kind") from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleError("too_large", f"{image.width}×{image.height} pixels, at most {MAX_PIXELS} are read")
    try:
        if size is not None:
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size where that is enough
        return _rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, ZeroDivisionError, KeyError) as error:
        # Pillow's plugins let all of these out on damaged files.
        raise SampleError("decode", short_message(error)) from error


def _content(data: MediaSource) -> bytes | bytearray | memoryview:
    if not isinstance(data, (str, Path)):
        return data
    try:
        return Path(data).read_bytes()
    except FileNotFoundError as error:
        raise SampleError("missing_file", str(data)) from error
    except (OSError, ValueError) as error:
        raise SampleError("unreadable", f"{data}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey (and 32-bit, which Pillow uses to hold it): Pillow itself would cut off all above 255.
        grey = np.asarray(image, dtype=np.float64)
        brightest = 255.0 if grey.size and grey.max() <= 255 and image.mode == "F" else 65_535.0
        return Image.fromarray(np.clip(grey * (255.0 / brightest), 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")
