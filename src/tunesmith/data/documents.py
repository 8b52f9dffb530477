"""Plain text to windows: every token is learnt once, however long the document is."""

# T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft, Drafts
from tunesmith.data.renderer import EncoderSettings, OnCut, RowEncoder, Tools
from tunesmith.data.tokenizer import ControlTokens, Tokens
from tunesmith.errors import ModelError, RecipeError
from tunesmith.types import Example, Part, Problem


class DocumentEncoder(RowEncoder):
    """Text for a model of next tokens: BOS if the tokenizer adds one, the text, EOS if there is one; a window
    reads at least one token that the one before it has trained. Or for one of masked tokens: each window in the
    tokenizer's own frame, and trained is what may be masked.

    Raises `ModelError` for a tokenizer without the mask that it needs; `RecipeError` for a limit or a `stride`
    (None: the longest) that leaves tokens out.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._fast = fast = settings.fast
        self._is_masked = settings.kind == "encoder"
        if self._is_masked and settings.tokenizer.mask_token_id is None:
            raise ModelError(
                f"{fast.name}: its tokenizer has no mask token, so no token can be hidden from the model. For "
                "task: text take an encoder that has learnt masked tokens, such as BERT, or a causal model."
            )
        self.control = ControlTokens(settings.tokenizer, "")
        self.stop_ids = () if self._is_masked or fast.eos_id is None else (fast.eos_id,)
        self._frame = fast.frame(1) if self._is_masked else fast.causal_frame(closed=True)
        most = settings.limit.max_tokens
        self._width = most - self._frame.num_added() if self._is_masked and most is not None else most
        self._stride = _checked_stride(settings.stride, width=self._width, num_read=0 if self._is_masked else 1)

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        texts = [example.parts[0].text for example in examples]
        rows: list[Drafts] = []
        for example, text, tokens in zip(examples, texts, self._fast.encode(texts), strict=True):
            drafts = [draft for draft in self._windows(text, tokens) if draft.trained_T.any()]
            message = "its text gives no token that could be learnt."
            rows.append(drafts or Problem(example.source, "no_target", message, "Remove the row."))
        return rows

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids of a text that is to be continued. `tools` have no meaning."""
        ids_T = self._fast.ids([parts[0].text])[0]
        return [int(token_id) for token_id in np.concatenate([self._frame.before_ids, ids_T])]

    def _windows(self, text: str, tokens: Tokens) -> Iterator[Draft]:
        """The windows of a text, each with the UTF-8 bytes that its trained tokens spell."""
        bytes_T, num_before = _num_bytes(text, tokens), len(self._frame.before_ids)
        if self._is_masked:
            ids_T, learnable_T = tokens.ids_T, ~self.control.are_reserved(tokens.ids_T)
        else:
            ids_T = self._frame.around(tokens.ids_T)
            learnable_T = np.arange(len(ids_T)) > 0  # nothing predicts the first token of all
            bytes_T = np.pad(bytes_T, (num_before, len(ids_T) - len(bytes_T) - num_before))
        for start, end, seen in windows(len(ids_T), width=self._width, stride=self._stride):
            learnt_T = learnable_T[start:end] & (np.arange(start, end) >= seen)
            num_bytes = int(bytes_T[start:end][learnt_T].sum())
            if not self._is_masked:
                yield Draft(ids_T[start:end], learnt_T, num_bytes=num_bytes)
                continue
            framed_T = self._frame.around(ids_T[start:end])
            trained_T = np.zeros(len(framed_T), np.bool_)
            trained_T[num_before : num_before + end - start] = learnt_T
            yield Draft(framed_T, trained_T, num_bytes=num_bytes)


def windows(num_tokens: int, *, width: int | None, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, end, seen) of each window: tokens before `seen` belong to an earlier one and are read again."""
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
