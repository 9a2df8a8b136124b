"""A picture comes out as a viewer shows it, whatever its mode, and hostile ones have a reason."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmcl.media.image import decode_image
from mmcl.types import SampleError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(size=(64, 32)) -> Image.Image:
    """Left red, right blue; (width, height)."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2, 0] = 200
    pixels[:, size[0] // 2 :, 2] = 200
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(tmp_path, kind):
    data = encoded(halves(), kind)
    (tmp_path / "a").write_bytes(data)
    for source in (data, memoryview(data), tmp_path / "a", str(tmp_path / "a")):
        picture = decode_image(source)
        assert picture.shape == (3, 32, 64) and picture.dtype == np.uint8 and picture.flags.c_contiguous
        assert picture[0, 16, 10] > 150 > 60 > picture[2, 16, 10] and picture[2, 16, 50] > 150


def test_crop_and_squash():
    data = encoded(halves((96, 32)))
    assert decode_image(data, size=16, fit="crop").shape == (3, 16, 16)
    wide = Image.fromarray(np.full((32, 96, 3), 10, np.uint8))
    wide.paste((250, 250, 250), (32, 0, 64, 32))
    assert decode_image(encoded(wide), size=16, fit="crop")[:, :, 1:-1].min() > 200
    assert decode_image(encoded(wide), size=18, fit="squash")[:, :, :4].max() < 60


def test_large_jpegs_are_decoded_small_and_alike():
    y, x = np.mgrid[:800, :1200]
    smooth = Image.fromarray(np.stack([x / 5, y / 4, (x + y) / 9], -1).astype(np.uint8))
    small = decode_image(encoded(smooth, "JPEG", quality=95), size=64, fit="squash").astype(int)
    assert np.abs(small - decode_image(encoded(smooth), size=64, fit="squash")).max() <= 4


def test_exif_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to display: what was left is on top
    picture = decode_image(encoded(halves(), "JPEG", exif=exif.tobytes()))
    assert picture.shape == (3, 64, 32) and picture[0, 10, 16] > 150 and picture[2, 50, 16] > 150


def test_any_mode_becomes_rgb():
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"):
        # Pillow 12 does not read the YCbCr TIFF that it writes
        kind = {"CMYK": "TIFF", "YCbCr": "JPEG", "I": "TIFF", "F": "TIFF"}.get(mode, "PNG")
        image = halves().convert("L").convert(mode) if mode.startswith(("I", "F")) else halves().convert(mode)
        assert decode_image(encoded(image, kind), size=16).shape == (3, 16, 16), mode


def test_deep_grey_keeps_its_levels():
    ramp = np.linspace(0, 65_535, 64 * 8).astype(np.uint16).reshape(8, 64)
    picture = decode_image(encoded(Image.fromarray(ramp)))
    assert np.abs(picture[0].astype(float) - ramp / 257).max() <= 1


def test_transparency_is_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 4, 8))
    picture = decode_image(encoded(image))
    assert picture[:, 4, 6].tolist() == [255, 255, 255] and picture[:, 4, 1].tolist() == [0, 0, 200]


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture" * 10, "not_an_image"),
        (huge_png(9_000, 9_000), "too_large"),
        (huge_png(100_000, 100_000), "too_large"),
        (encoded(halves(), "PNG")[:60], "decode"),
        (encoded(halves((640, 320)), "JPEG")[:900], "decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_an_image"),
    ],
)
def test_bad_pictures_have_reasons(data, reason):
    with pytest.raises(SampleError) as caught:
        decode_image(data, size=32)
    assert caught.value.reason == reason and "\n" not in str(caught.value)


def test_an_extreme_shape_is_not_blown_up():
    with pytest.raises(SampleError, match="too_large"):
        decode_image(encoded(Image.new("RGB", (60_000, 1))), size=224)


def test_bad_paths(tmp_path):
    with pytest.raises(SampleError, match="missing_file"):
        decode_image(tmp_path / "none.png")
    with pytest.raises(SampleError, match="unreadable"):
        decode_image(tmp_path)


def test_random_damage_never_escapes():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        good = encoded(noise, kind)
        for _ in range(40):
            data = np.frombuffer(good, np.uint8).copy()
            places = rng.integers(0, min(len(data), 400), 4)
            data[places] = rng.integers(0, 256, 4)
            with contextlib.suppress(SampleError):
                assert decode_image(data.tobytes(), size=16).shape == (3, 16, 16)


@pytest.mark.parametrize("upright", [False, True])
def test_the_start_the_centre_and_the_end_of_the_long_side(upright: bool) -> None:
    """Three squares side by side: red, green, blue."""
    bands = np.zeros((12, 36, 3), np.uint8)
    for band in range(3):
        bands[:, 12 * band : 12 * (band + 1), band] = 255
    picture = encoded(Image.fromarray(bands.transpose(1, 0, 2) if upright else bands))
    for band, fit in enumerate(("crop_start", "crop", "crop_end")):
        found = decode_image(picture, size=12, fit=fit)
        assert found.shape == (3, 12, 12)
        assert (found == np.eye(3, dtype=np.uint8)[band][:, None, None] * 255).all()
