"""Try whether the model may run rows packed, with some rows of the run; rows with images are tried whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from tunesmith.data.branches import lines_of
from tunesmith.data.images import batch_images
from tunesmith.data.renderer import Renderer
from tunesmith.data.splits import Splits
from tunesmith.inference.load import has_token_types
from tunesmith.models.packing_check import PackingCheck, check_packing
from tunesmith.types import BatchImage, ImageRef, ModelKind, Placeholders, Row

PACKED_NOTE = "packed batches: a probe of rows with images had the same answers end to end as each row alone"
MOST_PROBED = 2_048
"""Most tokens of a row with images that is tried: it is read whole."""
LOOKED_AT = 1_000
"""Rows among which those with images to try are looked for."""


@dataclass(frozen=True)
class SeeingRows:
    """Rows with images to try packed: the shortest, and a short one with two images if there is one."""

    rows: Sequence[Row] = ()
    too_long: str = ""
    """Why no row can be tried; "" if some can, or if no row has an image."""
    images: Mapping[int, ImageRef] = field(default_factory=dict)
    placeholders: Placeholders | None = None

    @classmethod
    def of(cls, rows: Splits, placeholders: Placeholders | None) -> SeeingRows:
        """Choose rows to try among the training rows, else among the held-out ones."""
        for store, rows_I in rows.sides:
            numbers = {int(i): store.images_at(int(i)) for i in rows_I[:LOOKED_AT]}
            seeing = sorted((i for i in numbers if numbers[i]), key=lambda i: int(store.lengths[i]))
            if store.images is None or not seeing:
                continue
            chosen = {next((i for i in seeing if len(numbers[i]) > 1), seeing[0]), seeing[0]}
            if (longest := max(int(store.lengths[i]) for i in chosen)) > MOST_PROBED:
                return cls(too_long=f"its rows with images are too long to be tried, {longest:,} tokens")
            images = {number: store.images[number] for i in chosen for number in numbers[i]}
            return cls([store.row(i) for i in sorted(chosen)], "", images, placeholders)
        return cls()

    def images_of(self, row: Row) -> tuple[BatchImage, ...]:
        """The images of a row, prepared when they are needed."""
        if not row.images:
            return ()
        assert self.placeholders is not None, "rows with images were encoded for a model that sees"
        return batch_images([[self.images[number] for number in row.images]], self.placeholders)


def packed_agrees(
    model: PreTrainedModel, kind: ModelKind, rows: Splits, *, renderer: Renderer, plain: bool, num: int
) -> PackingCheck:
    """Whether the model answers the same for packed rows as for each row alone, `num` of them and some with
    images."""
    seeing = SeeingRows.of(rows, renderer.placeholders)
    if seeing.too_long:
        return PackingCheck(seeing.too_long)
    lines = [lines_of(rows.store.row(int(i)))[-1] for i in rows.train_rows[:num]]
    probe_rows = [*seeing.rows, *(line for line in lines if not line.images)]
    has_types = kind == "encoder" and has_token_types(model, renderer.tokenizer)
    return check_packing(model, kind, probe_rows, has_types=has_types, plain=plain, images_of=seeing.images_of)
