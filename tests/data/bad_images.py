"""Images that are damaged, huge, turned, of every mode and of odd shapes, with what reading them has to say."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from tiny_vision import picture, png

FOUND_BY_SHAPE = "image_shape"


class Odd(NamedTuple):
    """A file and the code that reading it gives."""

    content: bytes
    code: str
    """Of its error, or of its warning; "": it is as good as any."""


ERRORS = ("image_format", "damaged_image", "image_too_large", "animated_image", FOUND_BY_SHAPE)
PNG = png(picture(1))
BOMB = (12_000, 10_000)
"""Pixels of 16 kB that Pillow would decode to 114 MiB."""
_LARGE, _LARGE_JPEG, _LARGE_WEBP = (png(picture(9, 64, 64), format=name) for name in ("PNG", "JPEG", "WEBP"))


def _chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG. Source: PNG specification, third edition, section 5.3."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_of(width: int, height: int, depth: int, colour: int, pixels: bytes, *more: bytes) -> bytes:
    """A PNG by hand, its rows without a filter: what Pillow does not write, or a lie about its size."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    end = _chunk(b"IDAT", zlib.compress(pixels, 1)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + end


def turned(turn: Any, fmt: str = "JPEG") -> bytes:
    """A picture whose EXIF says how it was held."""
    exif = Image.Exif()
    exif[274] = turn
    return png(picture(2, 30, 20), format=fmt, exif=exif)


def _animated(fmt: str) -> bytes:
    content = io.BytesIO()
    frames = [picture(number) for number in (3, 4)]
    frames[0].save(content, fmt, save_all=True, append_images=frames[1:])
    return content.getvalue()


def _cut(content: bytes, tenth: int) -> bytes:
    return content[: len(content) * tenth // 10]


def _patched(content: bytes, place: int, value: bytes) -> bytes:
    return content[:place] + value + content[place + len(value) :]


def _jpeg_that_says(width: int, height: int) -> bytes:
    """A JPEG whose header names another size. Source: ITU-T T.81, section B.2.2: length, precision, height, width."""
    start = _LARGE_JPEG.index(b"\xff\xc0") + 5
    return _patched(_LARGE_JPEG, start, struct.pack(">HH", height, width))


def _gif_that_says(width: int, height: int) -> bytes:
    """A GIF whose screen is larger than its one frame."""
    return _patched(png(picture(3), format="GIF"), 6, struct.pack("<HH", width, height))


def _bmp_that_says(width: int, height: int) -> bytes:
    return _patched(png(picture(3), format="BMP"), 18, struct.pack("<ii", width, height))


def _webp_that_says(width: int, height: int) -> bytes:
    """An extended WebP whose canvas is huge. Source: WebP container specification: 24 bits, one less."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    content = png(picture(3).convert("RGBA"), format="WEBP", exif=_exif_of(1))
    return _patched(content, content.index(b"VP8X") + 12, size)


def _exif_of(turn: int) -> bytes:
    exif = Image.Exif()
    exif[274] = turn
    return exif.tobytes()


def _cmyk_with_profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return png(picture(5).convert("CMYK"), format="JPEG", icc_profile=profile)


_KINDS: dict[str, bytes] = {
    "empty": b"",
    "html": b"<!DOCTYPE html><p>404",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.7 ...",
    "text": b"not an image at all",
    "json": b'{"a": 1}',
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
    "tiff": png(picture(1), format="TIFF"),
    "ico": png(picture(1), format="ICO"),
    "ppm": png(picture(1), format="PPM"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
    "zip": b"PK\x03\x04" + bytes(64),
    "zeros": bytes(4096),
}
_DAMAGED: dict[str, bytes] = {
    "png signature alone": PNG[:8],
    "png of a header": PNG[:30],
    "wrong check sum": _patched(PNG, 40, bytes([PNG[40] ^ 255])),
    "png of no pixels": _png_of(24, 16, 8, 2, b""),
    "png of no width": _png_of(0, 16, 8, 2, bytes(16)),
    "png whose text is a bomb": _png_of(4, 4, 8, 0, bytes(20), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**25)))),
    "jpeg of three bytes": b"\xff\xd8\xff",
    "jpeg of its markers": _LARGE_JPEG[: _LARGE_JPEG.index(b"\xff\xda")],
    "gif of a header": png(picture(3), format="GIF")[:13],
    "bmp of a header": png(picture(3), format="BMP")[:54],
    "webp of a header": _LARGE_WEBP[:30],
    **{f"png cut at {tenth}0 %": _cut(_LARGE, tenth) for tenth in range(1, 10)},
    **{f"jpeg cut at {tenth}0 %": _cut(_LARGE_JPEG, tenth) for tenth in range(1, 10)},
    **{f"webp cut at {tenth}0 %": _cut(_LARGE_WEBP, tenth) for tenth in (1, 5, 9)},
}
_HUGE: dict[str, Callable[[], bytes]] = {
    "png that says 100,000 a side": lambda: _png_of(100_000, 100_000, 8, 2, b"\0" * 100),
    "png that says 6,000 × 5,000": lambda: _png_of(6_000, 5_000, 8, 2, b"\0" * 100),
    "jpeg that says 65,000 a side": lambda: _jpeg_that_says(65_000, 65_000),
    "gif that says 65,535 a side": lambda: _gif_that_says(65_535, 65_535),
    "bmp that says 2,000,000,000 a side": lambda: _bmp_that_says(2_000_000_000, 2_000_000_000),
    "webp that says 16,000,000 a side": lambda: _webp_that_says(16_000_000, 200),
    "bomb": lambda: _png_of(*BOMB, 1, 0, bytes(BOMB[1] * (1 + BOMB[0] // 8))),
    "huge file": lambda: PNG + b"\0" * 21 * 2**20,
}
_SHAPES = {"1 × 4000": (1, 4000), "4000 × 1": (4000, 1), "1 × 201": (1, 201)}
HALF_GREY = _png_of(2, 2, 16, 0, (b"\0" + struct.pack(">2H", 32_768, 32_768)) * 2, _chunk(b"tRNS", b"\0\7"))
"""Of 16 bits, with a value that would be transparent, of which there is none."""
_GOOD: dict[str, bytes] = {
    **{f"{mode}": png(picture(5).convert(mode)) for mode in ("1", "L", "P", "RGB")},
    "P of gif": png(picture(5).convert("P"), format="GIF"),
    "grey of 2 bits": _png_of(4, 4, 2, 0, b"\0\x1b" * 4),
    "RGB of 16 bits": _png_of(2, 2, 16, 2, (b"\0" + struct.pack(">6H", *[32_768] * 6)) * 2),
    "bmp": png(picture(5), format="BMP"),
    "webp": png(picture(5), format="WEBP"),
    "progressive jpeg": png(picture(5), format="JPEG", progressive=True),
    "grey jpeg": png(picture(5).convert("L"), format="JPEG"),
    "1 × 1": png(Image.new("RGB", (1, 1))),
    "1 × 200": png(Image.new("RGB", (1, 200))),
    "held as it is": turned(1),
    "held in a way that there is not": turned(9),
    "exif that is damaged": png(picture(5), format="JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "more bytes behind its end": PNG + b"GIF89a",
}
_CONVERTED: dict[str, bytes] = {
    "RGBA": png(picture(5).convert("RGBA")),
    "LA": png(picture(5).convert("LA")),
    "RGBA of webp": png(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), format="WEBP", lossless=True),
    "palette with one transparent colour": png(picture(5).convert("P"), transparency=3),
    "palette with alpha": png(picture(5).convert("P"), transparency=bytes(range(256))),
    "grey with one transparent value": _png_of(4, 4, 8, 0, bytes(20), _chunk(b"tRNS", b"\0\0")),
    "gif with a transparent colour": png(picture(5).convert("P"), format="GIF", transparency=0),
    "16 bits": png(Image.fromarray(np.full((4, 4), 32_768, np.uint16))),
    "16 bits with a transparent value": HALF_GREY,
    "16 bits with alpha": _png_of(2, 2, 16, 4, (b"\0" + struct.pack(">4H", *[32_768] * 4)) * 2),
    "CMYK": png(picture(5).convert("CMYK"), format="JPEG"),
    "CMYK with a profile": _cmyk_with_profile(),
}


def corpus() -> dict[str, Odd]:
    """All of them by name."""
    found = {name: Odd(content, "image_format") for name, content in _KINDS.items()}
    found |= {name: Odd(content, "damaged_image") for name, content in _DAMAGED.items()}
    found |= {name: Odd(make(), "image_too_large") for name, make in _HUGE.items()}
    found |= {f"{fmt} that moves": Odd(_animated(fmt), "animated_image") for fmt in ("GIF", "WEBP", "PNG")}
    found |= {name: Odd(png(Image.new("RGB", size)), FOUND_BY_SHAPE) for name, size in _SHAPES.items()}
    found |= {name: Odd(content, "") for name, content in _GOOD.items()}
    found |= {name: Odd(content, "image_converted") for name, content in _CONVERTED.items()}
    return found | {f"turned, {turn}": Odd(turned(turn), "image_rotated") for turn in range(2, 9)}
