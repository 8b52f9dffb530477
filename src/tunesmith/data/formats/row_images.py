"""Images of a row, taken in order by the parts and markers of its user's turns. The forms: docs/guide/images.md."""

from __future__ import annotations

from typing import Any

from tunesmith.data.images import BadImage, image_at
from tunesmith.data.problems import RowProblems
from tunesmith.types import ImageRef, Part, Record

IMAGE_FIELDS = ("image", "images")
"""Fields of a row that hold its images."""
MARKER = "<image>"
IMAGE_TYPES = ("image", "image_url", "input_image")
"""Types of parts that are images."""
_ELSEWHERE = "Images may stand in the user's messages alone."


class RowImages:
    """The images of one row's own fields, and those that its parts bring along."""

    def __init__(self, record: Record, check: RowProblems) -> None:
        self._check = check
        self._listed: list[ImageRef] = []
        self._num_taken = 0
        for field in IMAGE_FIELDS:
            value = record.get(field)
            values = value if isinstance(value, list) else [] if value in (None, "") else [value]  # "": of a CSV file
            for i, entry in enumerate(values):
                image = self._image(entry, f"{field}[{i}]" if isinstance(value, list) else field)
                self._listed.append(ImageRef() if image is None else image)

    @property
    def has_listed(self) -> bool:
        """Whether the row's own fields hold images."""
        return bool(self._listed)

    def of_part(self, part: Record, place: str, role: str) -> ImageRef | None:
        """The image of a part: its own, or of {"type": "image"} alone the next one of the row."""
        if role != "user":
            message = f"{place} is an image in a message of the role {role}."
            self._check.add("image_role", message, _ELSEWHERE)
            return None
        values = [part[key] for key in ("image_url", "image", "path", "url", "base64") if part.get(key) is not None]
        if not values and part.get("type") == "image":
            return self._next(place)
        if not values:
            self._check.add("image_form", f"{place} names no image.", "Give it a path or a data URI.")
            return None
        if "base64" in part and len(values) == 1:
            return self._image({"base64": part["base64"]}, place)
        return self._image(values[0], place)

    def marked(self, text: str, place: str) -> tuple[str, tuple[tuple[int, ImageRef], ...]]:
        """A text without its markers, each with one line break next to it, and the images that stand there.

        Markers are read only where the row has images of its own.
        """
        if not self.has_listed or MARKER not in text:
            return text, ()
        pieces, images, length = list[str](), list[tuple[int, ImageRef]](), 0
        first, *rest = text.split(MARKER)
        for before, after in zip([first, *rest], [*rest, None], strict=True):
            piece = before
            if pieces or images:
                piece = piece.removeprefix("\n")
            if after is not None and after[:1] != "\n":
                piece = piece.removesuffix("\n")
            pieces.append(piece)
            length += len(piece)
            if after is not None and (image := self._next(place)) is not None:
                images.append((length, image))
        return "".join(pieces), tuple(images)

    def in_front(self) -> tuple[tuple[int, ImageRef], ...]:
        """All images that nothing took, before the text of a prompt without markers."""
        images = self._listed[self._num_taken :]
        self._num_taken = len(self._listed)
        return tuple((0, image) for image in images)

    def finish(self) -> None:
        """Report images that no part or marker took."""
        if left := len(self._listed) - self._num_taken:
            message = f"{left} of its {len(self._listed)} images stand nowhere in its messages."
            fix = f'Write {MARKER} or {{"type": "image"}} where each stands, or give the field another name.'
            self._check.add("images_missing", message, fix)

    def _next(self, place: str) -> ImageRef | None:
        if self._num_taken == len(self._listed):
            message = f"{place} has a place for another image than the {len(self._listed)} of the row."
            self._check.add("images_missing", message, "Name it in the part, or in the row's field images.")
            return None
        self._num_taken += 1
        return self._listed[self._num_taken - 1]

    def _image(self, value: Any, place: str) -> ImageRef | None:
        try:
            return image_at(value, place)
        except BadImage as bad:
            self._check.add(bad.code, bad.message, bad.fix)
            return None


def with_images(part: Part, images: RowImages, place: str) -> Part:
    """A user's part whose text may hold markers, with the images that they take."""
    text, shown = images.marked(part.text, place)
    return Part(part.role, text, part.trained, part.fields, (*part.images, *shown)) if shown else part
