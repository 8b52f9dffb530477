"""Images in the text of a chat template: replace the template's word for an image by the processor's text.

This happens before the text is tokenized (`Placeholders.expand`), so turns, trained spans and lengths are found
in the very text that is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.chat_template import Message, TemplateRefusal
from tunesmith.data.images import BadImage, check_whole
from tunesmith.types import Example, ImageRef, JsonObject, Part, Placeholders, Problem, Source

MOST_CHECKED = 10_000
"""Number of images that are remembered as undamaged: many rows may show the same one."""


def as_message(part: Part) -> Message:
    """A part as the message that templates read: role, content, and its other fields unchanged."""
    return {"role": part.role, "content": part.text if not part.images else _pieces(part), **part.fields}


def _pieces(part: Part) -> list[JsonObject]:
    """Text and images in their order."""
    pieces: list[JsonObject] = []
    start = 0
    for place, _ in part.images:
        if place > start:
            pieces.append({"type": "text", "text": part.text[start:place]})
        pieces.append({"type": "image"})
        start = place
    return [*pieces, {"type": "text", "text": part.text[start:]}] if start < len(part.text) else pieces


def as_lists(messages: Sequence[Message]) -> list[Message]:
    """Messages whose texts are lists of one piece, for templates that take nothing else."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def num_images(messages: Sequence[Message]) -> int:
    """Number of images that some messages show."""
    lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return sum(piece.get("type") == "image" for pieces in lists for piece in pieces)


def expanded(text: str, images: Sequence[ImageRef], placeholders: Placeholders, *, several: bool) -> str:
    """A rendered text with the processor's text in the place of each image, in one
    pass: that may hold the word itself. `several`: of the whole row, of which `images` may be the first.

    Raises `TemplateRefusal` where the template has not one place for each,
    ValueError for a shape that is not read.
    """
    first, *rest = text.split(placeholders.token)
    if len(rest) != len(images):
        raise TemplateRefusal(f"it writes {len(rest)} places for {len(images)} images.")
    places = [placeholders.expand(image.width, image.height, several=several) for image in images]
    return first + "".join(place + after for place, after in zip(places, rest, strict=True))


class ImageCheck:
    """Decodes each image of a row once, in the process that encodes: damage is found before training."""

    def __init__(self) -> None:
        self._notes: dict[str, list[tuple[str, str]]] = {}

    def warnings(self, example: Example) -> list[Problem]:
        """Warnings of changes that are made to a row's images for the model. Raises `BadImage`."""
        return [_warning(example.source, image, *note) for image in example.images for note in self.notes(image)]

    def notes(self, image: ImageRef) -> list[tuple[str, str]]:
        """(code, message) of each change. Raises `BadImage`."""
        if image.sha256 not in self._notes:
            if len(self._notes) == MOST_CHECKED:
                self._notes.clear()
            try:
                self._notes[image.sha256] = check_whole(image)
            except BadImage as bad:
                raise BadImage(bad.code, f"{image}: {bad.message}", bad.fix) from bad
        return self._notes[image.sha256]


def _warning(source: Source, image: ImageRef, code: str, message: str) -> Problem:
    return Problem(source, code, f"{image}: {message}", severity="warning")
