"""Images of rows: find them, refuse bad ones, and decode their pixels in the same way for every use.

A row names a file in the folder of its data file (or `data.image_folder`), or brings the bytes of
one. `look_at` reads no more than the header; `check_whole` decodes it once, while rows are
encoded; `pixels_of` decodes it for the model. Pillow is the only reader, and tries no format but
`IMAGE_FORMATS`. No address is ever opened.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.environment.packages import install_command
from tunesmith.errors import DataError
from tunesmith.types import BatchImage, ImageRef, Placeholders

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tunesmith.recipe.schema import Limits

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_KINDS = (
    (b"<", "a text such as HTML or SVG"), (b"%PDF", "a PDF: render its pages first"), (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"), (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself"),
)  # fmt: skip
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
          7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
"""EXIF's orientations as Pillow's transpositions. Source: CIPA DC-008-2024, section 4.6.5, tag 274."""
_ORIENTATION = 274
_MIME = {b"\xff\xd8": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp"}
_SMALL = 8
"""A JPEG is decoded at an eighth of its sides where only its soundness is in question."""
_AGAIN = "Copy or save it again, or remove the row."
MOST_ASPECT = 200
"""Largest ratio of an image's longer side to its shorter one. A processor that scales the shorter side, as
CLIP's does to 336 pixels, would make gigabytes of an image of 1 × 4,000; Qwen's refuses it itself."""
_THUMBNAIL = 160
"""Longest side, in pixels."""
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, EOFError, MemoryError)
"""Errors of Pillow for damaged files: it has no class of its own for them."""


class BadImage(Exception):
    """An image that cannot be used, with code, message and way out as a `Problem` has them."""

    def __init__(self, code: str, message: str, fix: str) -> None:
        super().__init__(message)
        self.code, self.message, self.fix = code, message, fix


def image_at(value: Any, place: str) -> ImageRef:
    """The image that a value of a row names: a path, a data URI, bytes, or an object with one of these.

    Raises `BadImage` for anything else, and for the address of another machine.
    """
    if isinstance(value, dict):
        for key in ("bytes", "path", "url", "image", "base64", "data"):
            inner = value.get(key)
            if isinstance(inner, str) and key in ("base64", "data") and not inner.startswith("data:"):
                return ImageRef(data=_decoded(inner, f"{place}.{key}"))
            if inner is not None:
                return image_at(inner, f"{place}.{key}")
    if isinstance(value, bytes):
        return ImageRef(data=value)
    if not isinstance(value, str) or not value.strip():
        fix = 'Give a path, a data URI, or {"bytes": ...}.'
        raise BadImage("image_form", f"{place} names no image.", fix)
    if match := _DATA_URI.match(value):
        return ImageRef(data=_decoded(value[match.end() :], place))
    if value.startswith("data:"):
        fix = "Write data:image/png;base64, and the bytes."
        raise BadImage("image_form", f"{place} is a data URI that is not in base64: {value[:40]!r}.", fix)
    if value.startswith("file:"):
        raise BadImage("image_address", f"{place} is an address, {value[:60]!r}.", "Write the path alone.")
    if _ADDRESS.match(value):
        message = f"{place} is an address, {value[:60]!r}: what is behind it can change, and no address is opened."
        raise BadImage("image_address", message, "Download it, and name the file.")
    return ImageRef(path=value)


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage("image_form", f"{place}: its base64 cannot be read: {error}.", "Write it again.") from None


def look_at(image: ImageRef, folder: Path, limits: Limits) -> ImageRef:
    """The image with its hash and size, from its header. `folder`: paths begin there, and may not leave it.

    Raises `BadImage`; `DataError` where Pillow is missing.
    """
    if image.path:
        image = replace(image, path=_inside(image.path, folder))
        content = _read(image.path, limits)
    else:
        content = image.data
        _refuse_large(len(content), limits)
    with _opened(content) as picture:
        # `n_frames` would read every frame of a GIF: a small file has millions.
        if getattr(picture, "is_animated", False) and picture.format in ("GIF", "WEBP", "PNG"):
            message = "it is animated: nobody says which of its frames is meant."
            raise BadImage("animated_image", message, "Save the frame that you mean as an image of its own.")
        width, height = picture.size
        if width * height > limits.image_pixels:
            message = f"it has {width:,} × {height:,} pixels; data.limits.image_pixels is {limits.image_pixels:,}."
            raise BadImage("image_too_large", message, "Make it smaller, or raise the limit.")
        if max(width, height) > MOST_ASPECT * min(width, height):
            message = f"it has {width:,} × {height:,} pixels: a side is more than {MOST_ASPECT} times the other."
            raise BadImage("image_shape", message, "Cut it into several images, or remove the row.")
        if _orientation(picture) >= 5:
            width, height = height, width
    return replace(image, sha256=hashlib.sha256(content).hexdigest(), width=width, height=height)


def _inside(path: str, folder: Path) -> str:
    """Resolve a path with its links. Raises `BadImage` if it leads outside of the folder."""
    root = folder.resolve()
    try:
        place = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL character, a circle of links
        raise BadImage("no_such_image", f"it is no path: {error}.", "Correct it.") from None
    if not place.is_relative_to(root):
        message = f"it leads out of {folder}, where paths of images begin."
        fix = "Put the images there, or name the folder that holds them by data.image_folder."
        raise BadImage("image_outside", message, fix)
    return str(place)


def _read(path: str, limits: Limits) -> bytes:
    place = Path(path)
    try:
        if not place.is_file():  # a device or a pipe would never end
            what = "is a folder" if place.is_dir() else "is no file"
            fix = "Write / between folders, not \\." if "\\" in path else "Correct the path."
            raise BadImage("no_such_image", f"{path} {what}.", fix)
        _refuse_large(place.stat().st_size, limits)
        return place.read_bytes()
    except OSError as error:
        message = f"it cannot be read: {error.strerror}."
        raise BadImage("no_such_image", message, "Correct the path, or its permissions.") from None


def _refuse_large(num_bytes: int, limits: Limits) -> None:
    if num_bytes > limits.image_bytes:
        message = f"it has {num_bytes:,} bytes; data.limits.image_bytes is {limits.image_bytes:,}."
        raise BadImage("image_too_large", message, "Make it smaller, or raise the limit.")


@contextmanager
def _opened(content: bytes) -> Iterator[Image]:
    """An image whose header was read. Raises `BadImage` inside for whatever Pillow raises."""
    try:
        from PIL import Image as pillow
        from PIL import UnidentifiedImageError
    except ImportError as error:
        way = f"Install it with: {install_command('images')}."
        raise DataError(f"rows have images, and the package Pillow is needed to read them. {way}") from error
    # Our bound of pixels is smaller than Pillow's, which warns before we have seen the size.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with pillow.open(io.BytesIO(content), formats=IMAGE_FORMATS) as picture:
                yield picture
        except BadImage:
            raise
        except UnidentifiedImageError:
            if content.startswith((*_MIME, b"RIFF")):
                raise BadImage("damaged_image", "its header is damaged.", _AGAIN) from None
            kind = next((name for start, name in _KINDS if content.lstrip().startswith(start)), "no known format")
            message = f"it is not an image that is read here ({kind if content else 'it is empty'})."
            raise BadImage("image_format", message, f"Save it as one of {', '.join(IMAGE_FORMATS)}.") from None
        except pillow.DecompressionBombError:
            raise BadImage("image_too_large", "it has more pixels than Pillow opens.", "Make it smaller.") from None
        except _DAMAGED as error:
            why = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
            raise BadImage("damaged_image", f"it is damaged: {why}.", _AGAIN) from None


def _orientation(picture: Image) -> int:
    """EXIF's orientation, 1 to 8; 1 if it is missing or invalid."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:  # EXIF that is damaged turns nothing
        return 1
    return value if value in _TURNS else 1


def check_whole(image: ImageRef) -> list[tuple[str, str]]:
    """Decode the image. Returns (code, message) of each change that is made for the model; raises `BadImage`
    for a damaged image."""
    with _opened(_bytes_of(image)) as picture:
        turn, mode = _orientation(picture), picture.mode
        has_alpha = picture.has_transparency_data
        if picture.format == "JPEG" and mode in ("L", "RGB"):
            picture.draft(None, (max(1, picture.width // _SMALL), max(1, picture.height // _SMALL)))
        picture.load()
    notes = [("image_rotated", f"its EXIF says how it is held ({turn}): it is turned.")] if turn != 1 else []
    if has_alpha:
        notes.append(("image_converted", "it is transparent in places: they are shown on white."))
    elif mode.startswith("I"):
        notes.append(("image_converted", "it has 16 bits a pixel: they are scaled to 8."))
    elif mode not in ("1", "L", "P", "RGB"):
        notes.append(("image_converted", f"its colours are {mode}: they are converted to RGB."))
    return notes


def pixels_of(image: ImageRef) -> Image:
    """The image as 8-bit RGB, turned upright, on white. Raises `DataError` if the file has changed."""
    try:
        with _opened(_bytes_of(image)) as picture:
            turn = _TURNS.get(_orientation(picture))
            picture.load()
            shown = _as_rgb(picture)
    except BadImage as bad:
        raise DataError(f"{image}: {bad.message} It was whole when rows were encoded.") from bad
    if turn is not None:
        from PIL.Image import Transpose

        shown = shown.transpose(Transpose[turn])
    return shown


def batch_images(rows: Iterable[Sequence[ImageRef]], placeholders: Placeholders) -> tuple[BatchImage, ...]:
    """The images of a batch, row by row; none is read before its pixels are needed."""

    def prepared(image: ImageRef, several: bool) -> Mapping[str, Tensor]:
        return placeholders.pixels(pixels_of(image), several=several)

    seen = [(image, placeholders.sees_several and len(images) > 1) for images in rows for image in images]
    return tuple(BatchImage((image.number, several), partial(prepared, image, several)) for image, several in seen)


def _bytes_of(image: ImageRef) -> bytes:
    """Raises `DataError` where a file has changed since it was looked at."""
    if not image.path:
        return image.data
    try:
        content = Path(image.path).read_bytes()
    except OSError as error:
        raise DataError(f"{image.path}: {error.strerror}. It was there when rows were encoded: put it back.") from error
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise DataError(f"{image.path}: it was changed since rows were encoded. Put it back, or start again.")
    return content


def _as_rgb(picture: Image) -> Image:
    """Convert to RGB with transparent places on white, where `convert` would show the colour under them, and
    with 16 bits scaled to 8, where `convert` would clip."""
    from PIL import Image as pillow

    if picture.mode.startswith("I"):
        import numpy as np

        values_HW = np.asarray(picture).astype(np.uint32)
        scaled_HW = (values_HW >> 8).clip(0, 255).astype(np.uint8)
        if "transparency" in picture.info:  # one value is
            scaled_HW[values_HW == picture.info["transparency"]] = 255
        return pillow.fromarray(scaled_HW).convert("RGB")
    if picture.has_transparency_data:
        seen = picture.convert("RGBA")
        shown = pillow.new("RGB", seen.size, (255, 255, 255))
        shown.paste(seen, mask=seen.getchannel("A"))
        return shown
    return picture.convert("RGB")


def thumbnail(image: ImageRef) -> str:
    """A small JPEG of an image as a data URI, encoded anew: nothing of its EXIF, such as a place, is in it."""
    small, content = pixels_of(image), io.BytesIO()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.save(content, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def as_data_uri(image: ImageRef) -> str:
    """The bytes of an image that came with its row, as a data URI; its format is known by its bytes."""
    kind = next((name for start, name in _MIME.items() if image.data.startswith(start)), "webp")
    return f"data:image/{kind};base64,{base64.b64encode(image.data).decode()}"
