"""Rows as the tensors of a micro-batch: targets shifted, rows padded or packed, tokens masked for a masked
language model."""

# B rows, T tokens, N targets, U tokens of the decoder, V values of a row
# L lines: a row with K branches is a line for each branch, see `data.branches`; any other row is one line

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tunesmith.data.branches import lines_of, partner_line
from tunesmith.data.prefixes import share_prefixes
from tunesmith.data.sampler import padded_size, sort_keys
from tunesmith.types import Batch, BatchImage, ImageRef, Layout, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.dataset import RowStore

PlacedTargets = tuple[NDArray[np.int64], NDArray[np.generic]]
"""Targets of a row: the flat positions in the micro-batch that predict, and what each of them predicts."""
BatchImages = Callable[[Iterable[Sequence[ImageRef]]], tuple[BatchImage, ...]]
"""See `data.images.batch_images`."""
LinesOf = Literal["all", "learnt", "partners"]
"""Lines of a row with a partner: its own, which are learnt; its prompt with the partner's answer; or both."""
RANDOM_BEYOND, KEPT_BEYOND = 0.8, 0.9
"""A chosen token gets a random number in [0, 1). From the first bound on it becomes a random token instead of
the mask; from the second on it stays as it is."""


@dataclass(frozen=True, slots=True)
class Masking:
    """Masked language modelling: chooses the tokens of a row to predict and what replaces them.

    80 % show the mask, 10 % a random token, 10 % themselves. Source: Devlin et al. 2018, "BERT", section 3.1.
    """

    mask_id: int
    ordinary_ids: NDArray[np.int64]
    """Tokens that can replace another."""
    share: float
    """Share of a row's trained tokens that is predicted; at least one is."""
    seed: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, share: float, seed: int) -> Masking:
        """Masking with the mask token of a tokenizer."""
        ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder))
        return cls(int(tokenizer.mask_token_id), np.array(ordinary, np.int64), share, seed)

    def apply(self, row: Row, *, num: int, step: int, index: int, copy: int = 0) -> Row:
        """Mask `num` of a row's trained tokens: a pure function of (seed, step, index, copy).

        `index` is any whole number that identifies the row; `copy` numbers its copies in one step.
        """
        trained_positions = np.flatnonzero(row.trained)

        def hashes(purpose: int) -> NDArray[np.uint64]:
            """A random number for each trained token, for one of three purposes."""
            return sort_keys(trained_positions, self.seed, step, salt=4 * index + purpose, copy=copy)

        chosen = np.sort(np.argsort(hashes(1), kind="stable")[:num])  # places in `trained_positions`
        chosen_N = trained_positions[chosen]
        uniform_N = (hashes(2) / 2.0**64)[chosen]
        random_N = self.ordinary_ids[(hashes(3) % np.uint64(len(self.ordinary_ids))).astype(np.int64)[chosen]]
        ids_T = row.ids.astype(np.int64)
        originals_N = ids_T[chosen_N]
        replaced_N = np.where(uniform_N < RANDOM_BEYOND, self.mask_id, random_N)
        ids_T[chosen_N] = np.where(uniform_N < KEPT_BEYOND, replaced_N, originals_N)
        trained_T = np.zeros(len(ids_T), np.bool_)
        trained_T[chosen_N] = True
        return replace(row, ids=ids_T.astype(np.int32), trained=trained_T, labels=originals_N)


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches of the rows of a store."""

    store: RowStore
    layout: Layout
    device: torch.device | str
    masking: Masking | None = None
    """None: not a masked language model."""
    decoder_start: int | None = None
    """The token that an encoder–decoder's decoder starts from."""
    has_types: bool = False
    """Whether the model distinguishes the two texts of a pair by token types."""
    shares: bool = False
    """Whether shared prefixes are computed once."""
    pads: bool = False
    """Whether packed batches are padded to a multiple of `sampler.MULTIPLE` tokens."""
    pad_id: int = 0
    """See `models.special_tokens.pad_id`."""
    pools: bool = False
    """Whether trained tokens are pooled, see `Task.pools`."""
    batch_images: BatchImages | None = None
    """Makes images of rows ready for a pass; None: rows have none."""
    image_token: int | None = None
    """See `prefixes.prefix_keys`."""

    def batch(self, members: Sequence[int], *, step: int, copies: Sequence[int] = (), lines: LinesOf = "all") -> Batch:
        """Make the batch of rows of the store: `members` are their indices.

        Args:
            step: the step, which decides masks together with a row's index in the store. 0: rows are measured,
                and masks follow from the content of their examples, so that they are the same in another file,
                order or run.
            copies: see `sampler.copies_in`; empty: each row is there once.
            lines: the lines to make of rows with partners.
        """
        copies = tuple(copies) or (0,) * len(members)
        rows = [self._row(index, step, copy) for index, copy in zip(members, copies, strict=True)]
        lines_of_rows = [self._lines(index, row, lines) for index, row in zip(members, rows, strict=True)]
        all_lines = [line for row_lines in lines_of_rows for line in row_lines]
        batch = build_batch(
            all_lines,
            members,
            layout=self.layout,
            device=self.device,
            decoder_start=self.decoder_start,
            has_types=self.has_types,
            pad_id=self.pad_id,
            pools=self.pools,
        )
        batch = replace(batch, copies_B=copies, images=self._images(all_lines))
        batch = self._with_lines(batch, rows, lines_of_rows) if rows[0].branches else batch
        batch = share_prefixes(batch, all_lines, image_token=self.image_token) if self.shares else batch
        return pad_to_multiple(batch) if self.pads else batch

    def _images(self, rows: Sequence[Row]) -> tuple[BatchImage, ...]:
        if not any(row.images for row in rows):
            return ()
        by_number = self.store.images
        assert by_number is not None, "a store of rows with images has them"
        assert self.batch_images is not None, "rows with images were encoded for a model that sees"
        return self.batch_images([[by_number[number] for number in row.images] for row in rows])

    def _lines(self, index: int, row: Row, lines: LinesOf) -> list[Row]:
        row_targets = self.store.learnt
        if row_targets.partners_I is None or lines == "learnt":
            return lines_of(row)
        partner = self.store.row(int(row_targets.partners_I[index]))
        line_of_partner = partner_line(row, partner, row_targets.partner_tokens)
        return [line_of_partner] if lines == "partners" else [*lines_of(row), line_of_partner]

    def _with_lines(self, batch: Batch, rows: Sequence[Row], lines_of_rows: Sequence[Sequence[Row]]) -> Batch:
        """Add to a batch that was built of lines the line and the row of each target, and the values of each
        row: its own, then the reference of each branch."""
        reference_IK, device = self.store.learnt.reference_IK, batch.row_of_N.device
        reference_BK = np.zeros((len(rows), 2))
        if reference_IK is not None:
            reference_BK = reference_IK[list(batch.row_indices)]
        values_BV = np.concatenate([np.array([row.values for row in rows], np.float64), reference_BK], axis=1)
        row_of_line = np.repeat(np.arange(len(rows)), list(map(len, lines_of_rows)))
        float_type = torch.float32 if device.type == "mps" else torch.float64
        keys_L = np.array([key for row in rows for key in row.keys], np.int64)
        return replace(
            batch,
            line_of_N=batch.row_of_N,  # `build_batch` got lines, and counted each as a row
            row_of_N=_on_device(torch.from_numpy(row_of_line), device)[batch.row_of_N],
            values_BV=_on_device(torch.from_numpy(values_BV).to(float_type), device),
            keys_L=_on_device(torch.from_numpy(keys_L), device) if len(keys_L) else None,
        )

    def _row(self, index: int, step: int, copy: int) -> Row:
        """A row of the store, masked if the model learns masked tokens."""
        row = self.store.row(index)
        if self.masking is None:
            return row
        num_masked = int(self.store.denominators[index])
        identity = index if step else self._content_number(index)
        return self.masking.apply(row, num=num_masked, step=step, index=identity, copy=copy)

    def _content_number(self, index: int) -> int:
        """A number for the content of a row: the content hash of its example plus the number of the window."""
        return int(self.store.hashes[index]) + int(self.store.windows[index])


def _on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor to a device. From pinned memory the processor does not wait for the copy."""
    tensor = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def build_batch(
    rows: Sequence[Row],
    row_indices: Sequence[int],
    *,
    layout: Layout,
    device: torch.device | str,
    decoder_start: int | None = None,
    has_types: bool = False,
    pad_id: int = 0,
    pools: bool = False,
) -> Batch:
    """Make the tensors of one micro-batch. Targets are shifted here and nowhere else: position t predicts token
    t + 1 of its row.

    Labels and pooled tokens are not shifted: each is predicted at its own position. An encoder–decoder reads
    the source; its decoder reads `decoder_start` and the target without its last token.

    `rows`: whole rows, or their lines, which are laid out as rows are. `row_indices`: the places of the rows in
    the store, for `Batch`. Options mean the same as in `Collator`.
    """
    has_decoder, is_packed = layout == "encoder_decoder", layout == "packed"
    inputs = [_source(row) if has_decoder else row.ids for row in rows]
    lengths = [len(ids) for ids in inputs]
    longest = max(lengths)
    starts, ids_BT = _laid_out(inputs, is_packed=is_packed, pad_id=pad_id)
    if is_packed:
        positions_BT = np.concatenate([np.arange(n) for n in lengths])[None]
        mask_BT = None
    else:
        positions_BT = np.broadcast_to(np.arange(longest), ids_BT.shape)
        # Padding is recognised by length, never by id: `pad_id` may be a token that texts contain.
        mask_BT = (np.arange(longest)[None] < np.array(lengths)[:, None]).astype(np.int64)
    decoder_ids_BU = None
    placed = [_placed_targets(row, int(start), pools=pools) for row, start in zip(rows, starts, strict=True)]
    if has_decoder:
        assert decoder_start is not None, "the model does not say which token its decoder starts from"
        targets = [row.ids[n:] for row, n in zip(rows, lengths, strict=True)]
        decoder_ids_BU, placed = _decoder(targets, decoder_start, pad_id=pad_id)
    counts = [len(places) for places, _ in placed]
    values = [row.values_NC for row in rows if row.values_NC is not None]

    def tensor(array: NDArray[np.generic]) -> torch.Tensor:
        numbers = array if np.issubdtype(array.dtype, np.floating) else array.astype(np.int64)
        return _on_device(torch.from_numpy(np.array(numbers)), device)

    return Batch(
        layout=layout,
        ids_BT=tensor(ids_BT),
        positions_BT=tensor(positions_BT),
        mask_BT=None if mask_BT is None else tensor(mask_BT),
        lengths=tuple(len(row.ids) for row in rows),
        predict_N=tensor(np.concatenate([places for places, _ in placed])),
        targets_N=tensor(np.concatenate([targets for _, targets in placed])),
        row_of_N=tensor(np.repeat(np.arange(len(rows)), counts)),
        row_indices=tuple(row_indices),
        types_BT=tensor(_types(rows, starts, ids_BT)) if has_types else None,
        decoder_ids_BU=None if decoder_ids_BU is None else tensor(decoder_ids_BU),
        values_NC=tensor(np.concatenate(values)) if values else None,
    )


def _placed_targets(row: Row, start: int, *, pools: bool) -> PlacedTargets:
    """The targets of a row that begins at flat position `start`: labels and pooled tokens at their own
    position, other tokens at the position before."""
    if pools:
        return start + np.flatnonzero(row.trained), row.ids[row.trained]
    if row.labels is not None:
        return start + np.flatnonzero(row.trained), row.labels
    return start + np.flatnonzero(row.trained[1:]), row.ids[1:][row.trained[1:]]  # the shift


def _source(row: Row) -> NDArray[np.int32]:
    """The tokens before the first trained one, which the encoder reads."""
    return row.ids[: int(np.argmax(row.trained))]


def _decoder(
    targets: Sequence[NDArray[np.int32]], start_id: int, *, pad_id: int
) -> tuple[NDArray[np.generic], list[PlacedTargets]]:
    """Decoder inputs [B, U] and targets: each target token is predicted from the tokens before it."""
    inputs = [np.concatenate([[start_id], ids[:-1]]) for ids in targets]
    starts, ids_BU = _laid_out(inputs, is_packed=False, pad_id=pad_id)
    placed: list[PlacedTargets] = [
        (start + np.arange(len(ids)), ids) for start, ids in zip(starts, targets, strict=True)
    ]
    return ids_BU, placed


def _types(rows: Sequence[Row], starts: NDArray[np.int64], ids_BT: NDArray[np.generic]) -> NDArray[np.int64]:
    """[B, T], 1 at the tokens of the second text of a pair, else 0."""
    flat = np.zeros(ids_BT.size, np.int64)
    for row, start in zip(rows, starts, strict=True):
        if row.second:
            flat[start + row.second : start + len(row.ids)] = 1
    return flat.reshape(ids_BT.shape)


def _laid_out(
    lines: Sequence[NDArray[np.generic]], *, is_packed: bool, pad_id: int
) -> tuple[NDArray[np.signedinteger[Any]], NDArray[np.generic]]:
    """Flat start of each line, and the lines as one array: end to end in one row, or a padded row for each."""
    lengths = [len(line) for line in lines]
    if is_packed:
        return np.cumsum([0, *lengths[:-1]]), np.concatenate(lines)[None]
    padded = np.full((len(lines), max(lengths)), pad_id, np.int64)
    for number, line in enumerate(lines):
        padded[number, : len(line)] = line
    return np.arange(len(lines)) * max(lengths), padded


def pads_to_multiple(layout: Layout, *, device: str, precision: str) -> bool:
    """Whether packed batches are padded to a multiple: on a CPU oneDNN compiles bfloat16 products for each new
    shape, and numbers of tokens hardly ever repeat. With short rows of an encoder, compiling took a quarter of
    a step."""
    return layout == "packed" and device == "cpu" and precision == "bfloat16"


def pad_to_multiple(batch: Batch) -> Batch:
    """Append a row of fewer than `MULTIPLE` tokens to a packed batch, without targets and unread by other rows.

    It repeats the batch's last token: another token may have no row in an embedding that is trained in part.
    """
    num_tokens = batch.ids_BT.shape[1]
    num_added = padded_size(num_tokens) - num_tokens
    if num_added == 0:
        return batch
    positions_BT = torch.arange(num_added, device=batch.positions_BT.device)[None]
    last_token_BT = batch.ids_BT[:, -1:].expand(-1, num_added)  # a view on the device: a card is not waited for
    return replace(
        batch,
        ids_BT=torch.cat([batch.ids_BT, last_token_BT], 1),
        positions_BT=torch.cat([batch.positions_BT, positions_BT], 1),
        types_BT=None if batch.types_BT is None else F.pad(batch.types_BT, (0, num_added)),
        filling=num_added,
    )
