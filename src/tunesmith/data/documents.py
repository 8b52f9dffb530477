"""Plain text to windows: every token is learnt once, however long the document is."""

# T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.renderer import EncoderSettings, OnCut, RowEncoder, Tools
from tunesmith.data.tokenizer import ControlTokens, FastTokenizer, Tokens
from tunesmith.errors import ModelError, RecipeError
from tunesmith.types import Draft, Drafts, Example, Part, Problem


class _WindowEncoder(RowEncoder):
    """Base of both: it takes the windows of each text."""

    _fast: FastTokenizer

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        texts = [example.parts[0].text for example in examples]
        return [
            self._learnable(example, list(self._windows(tokens.ids_T, _num_bytes(text, tokens))))
            for example, text, tokens in zip(examples, texts, self._fast.encode(texts), strict=True)
        ]

    def _learnable(self, example: Example, drafts: Sequence[Draft]) -> Drafts:
        """The windows in which something is learnt."""
        message = "its text gives no token that could be learnt."
        found = [draft for draft in drafts if draft.trained_T.any()]
        return found or Problem(example.source, "no_target", message, "Remove the row.")

    def _windows(self, text_T: NDArray[np.int32], num_bytes_T: NDArray[np.int64]) -> Iterator[Draft]:
        """The windows of a text's tokens, each with the UTF-8 bytes from the end of the token before it to its own."""
        raise NotImplementedError


class DocumentEncoder(_WindowEncoder):
    """Text for a model of next tokens: BOS if the tokenizer adds one, the text, EOS if there is one.

    A window reads at least one token that the one before it has trained. Raises `RecipeError` for a limit or a
    `stride` (None: the longest) that leaves tokens out.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._fast = fast = settings.fast
        self.control = ControlTokens(settings.tokenizer, "")
        self.stop_ids = () if fast.eos_id is None else (fast.eos_id,)
        self._frame = fast.causal_frame(closed=True)
        self._width = settings.limit.max_tokens
        self._stride = _checked_stride(settings.stride, width=self._width, num_read=1)

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids of a text that is to be continued. `tools` have no meaning."""
        ids_T = self._fast.ids([parts[0].text])[0]
        return [int(token_id) for token_id in np.concatenate([self._frame.before_ids, ids_T])]

    def _windows(self, text_T: NDArray[np.int32], num_bytes_T: NDArray[np.int64]) -> Iterator[Draft]:
        ids_T = self._frame.around(text_T)
        bytes_T = np.zeros(len(ids_T), np.int64)
        bytes_T[len(self._frame.before_ids) :][: len(text_T)] = num_bytes_T
        for start, end, seen in windows(len(ids_T), width=self._width, stride=self._stride):
            trained_T = np.arange(start, end) >= max(seen, 1)  # nothing predicts the first token of all
            yield Draft(ids_T[start:end], trained_T, num_bytes=int(bytes_T[start:end][trained_T].sum()))


class MaskedDocumentEncoder(_WindowEncoder):
    """Text for a model of masked tokens: every window in the tokenizer's own frame. Trained: what may be masked.

    Raises `ModelError` for a tokenizer without a mask; `RecipeError` for a limit or a `stride` (None: the longest) that
    leaves tokens out.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._fast = fast = settings.fast
        most = settings.limit.max_tokens
        if settings.tokenizer.mask_token_id is None:
            raise ModelError(
                f"{fast.name}: its tokenizer has no mask token, so no token can be hidden from the model. For task: "
                "text take an encoder that has learnt masked tokens, such as BERT, or a causal model."
            )
        self.control = ControlTokens(settings.tokenizer, "")
        self._frame = fast.frame(1)
        self._width = None if most is None else most - self._frame.num_added()
        self._stride = _checked_stride(settings.stride, width=self._width, num_read=0)

    def _windows(self, text_T: NDArray[np.int32], num_bytes_T: NDArray[np.int64]) -> Iterator[Draft]:
        maskable_T = ~self.control.are_reserved(text_T)
        at = len(self._frame.before_ids)
        for start, end, seen in windows(len(text_T), width=self._width, stride=self._stride):
            learnt_T = maskable_T[start:end] & (np.arange(start, end) >= seen)
            ids_T = self._frame.around(text_T[start:end])
            trained_T = np.zeros(len(ids_T), np.bool_)
            trained_T[at : at + end - start] = learnt_T
            yield Draft(ids_T, trained_T, num_bytes=int(num_bytes_T[start:end][learnt_T].sum()))


def document_encoder(settings: EncoderSettings) -> RowEncoder:
    """The encoder of task text."""
    return (MaskedDocumentEncoder if settings.kind == "encoder" else DocumentEncoder)(settings)


def windows(num_tokens: int, *, width: int | None, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, end, seen) of each window: tokens before `seen` belong to an earlier one and are only read again."""
    start = seen = 0
    while seen < num_tokens:
        end = num_tokens if width is None else min(start + width, num_tokens)
        yield start, end, seen
        seen = end
        start += stride or 0


def _checked_stride(stride: int | None, *, width: int | None, num_read: int) -> int | None:
    """The stride of windows that read at least `num_read` tokens again; None: one window holds everything."""
    if width is None:
        return None
    longest = width - num_read
    if longest < 1:
        raise RecipeError("data.max_tokens: a window that short has no token to learn. Raise it.")
    if stride is not None and stride > longest:
        raise RecipeError(
            f"data.stride: {stride:,} would leave tokens out between windows of data.max_tokens. Lower it to "
            f"{longest:,} or less, or raise data.max_tokens."
        )
    return stride or longest


def _num_bytes(text: str, tokens: Tokens) -> NDArray[np.int64]:
    """UTF-8 bytes from the end of the token before to the end of each; all of a text's in sum."""
    ends_T = np.maximum.accumulate(tokens.ends_T)
    ends_T[-1:] = len(text)
    if text.isascii():
        return np.diff(ends_T, prepend=0)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.diff(np.concatenate([[0], np.cumsum(widths)])[ends_T], prepend=0)
