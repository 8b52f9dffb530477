"""Answers to the prompts of rows that are being measured: a pass that finds a row's loss has read its prompt too.

The pass says which token the model finds likeliest at each target. As long as these are the row's own, the answer is
known without being written; from the first other one on it is written, together with other rows' answers, from the
keys and values that the pass has computed. A row whose answer ends leaves the batch. Drafts that a model checks in one
pass: Leviathan et al. 2023, arXiv 2211.17192; here the reference is the draft, and decoding is greedy, so the answers
equal writing token by token, but for ties within rounding.
"""

# P positions of a pass, N targets of a pass or answers of a batch, G groups of heads, D head size, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tunesmith.errors import is_out_of_memory
from tunesmith.generation.adapters import AdapterSet
from tunesmith.generation.decoder import BatchedDecoder
from tunesmith.generation.kv_cache import Layers
from tunesmith.models.attention import packed_forward
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import eval_mode, silence_transformers
from tunesmith.models.packing_check import TOLERANCES
from tunesmith.models.segments import UnsupportedAttentionError
from tunesmith.tasks.task import BoundTask
from tunesmith.types import Batch, Measured

PASSES = 4
"""Passes whose tokens are kept until their answers are written: each written token reads all weights."""

_ERRORS = (MemoryError, RuntimeError, UnsupportedAttentionError, TypeError, ValueError, LookupError)
"""A model that cannot be called in this way raises any of these."""


def kept_passes(recomputed: int) -> int:
    """`PASSES`, or one where activations are recomputed, since memory is short."""
    return 1 if recomputed else PASSES


@dataclass(slots=True)
class _Begun:
    """An answer to be continued from where the measuring pass left it."""

    row: int
    layers: Layers
    length: int
    """Positions that were read and are kept: all but the last, which is read again to prove that it gives the same."""
    last: int
    """The token at that position."""
    target: int
    loss: float
    """Loss of `target`, the row's own token that follows, in nats."""
    ids: list[int]
    """Ids of the answer so far; the last is the token that the pass found likeliest."""


@dataclass
class Continuation:
    """Writes answers while `predict_rows` measures; in the end `answers` has them, and `why` says why some are missing.

    The model is causal, runs packed rows and is not split over devices.
    """

    model: PreTrainedModel
    task: BoundTask
    """Measures the rows: tokens, not branches."""
    stop_ids: frozenset[int]
    new_tokens: int
    """Most tokens of an answer."""
    wanted: Mapping[int, int]
    """Row of the store → tokens of its prompt; the target that follows is the first of its answer."""
    most_tokens: int
    """Most tokens of prompts and answers that are written together."""
    tick: Callable[[int, int], None] = lambda done, total: None
    answers: dict[int, list[int]] = field(default_factory=dict)
    """Row → the ids that the model writes, the one that ends them included."""
    why: str = ""
    seconds: float = 0.0
    """That writing took."""
    _begun: list[_Begun] = field(default_factory=list)

    def measure(self, model: nn.Module, batch: Batch) -> Measured:
        """As the task's: what the pass has said of its rows is kept, and whole batches of answers are written."""
        if self.why or not any(row in self.wanted for row in batch.row_indices):
            return self.task.measure(model, batch)
        with packed_forward() as trace:
            layers: Layers = {}
            trace.kept = layers
            try:
                measured = self.task.measure(model, batch)
            finally:
                trace.kept = None
        self._take(batch, measured, layers)
        layers.clear()
        self._write(is_last=False)
        return measured

    def _take(self, batch: Batch, measured: Measured, kept: Layers) -> None:
        """Answers that the pass knows whole, and the beginnings of others."""
        starts = np.cumsum([0, *batch.lengths])
        predict_N, row_of_N, targets_N, outputs_N = (
            tensor.cpu().numpy() for tensor in (batch.predict_N, batch.row_of_N, batch.targets_N, measured.outputs_N)
        )
        losses_N = measured.losses_N.cpu().numpy()
        for b, row in enumerate(batch.row_indices):
            if row not in self.wanted or row in self.answers:
                continue
            here = np.flatnonzero((row_of_N == b) & (predict_N - starts[b] + 1 >= self.wanted[row]))
            known = self._known(predict_N[here] - starts[b] + 1 - self.wanted[row], targets_N[here], outputs_N[here])
            if not known:
                continue  # its first token is no target: it is answered like a prompt of no row
            if known[-1] in self.stop_ids or len(known) == self.new_tokens:
                self.answers[row] = known
                continue
            at = here[len(known) - 1]
            last = int(predict_N[at])
            span = slice(int(starts[b]), last)
            self._begun.append(
                _Begun(
                    row=row,
                    layers={layer: (k[0, :, span].clone(), v[0, :, span].clone()) for layer, (k, v) in kept.items()},
                    length=last - int(starts[b]),
                    last=int(batch.ids_BT[0, last]),
                    target=int(targets_N[at]),
                    loss=float(losses_N[at]),
                    ids=known,
                )
            )

    def _known(self, places: NDArray[Any], targets: NDArray[Any], outputs: NDArray[Any]) -> list[int]:
        """The beginning of an answer: the row's tokens while they are the likeliest, and the first that is another.

        `places`: of the targets behind the prompt.
        """
        known: list[int] = []
        for place, target, output in zip(places.tolist(), targets.tolist(), outputs.tolist(), strict=True):
            if place != len(known) or len(known) == self.new_tokens:
                break
            known.append(output)
            if output != target or output in self.stop_ids:
                break
        return known

    def together(self, lengths: Sequence[int]) -> int:
        """Number of rows of such lengths, in this order, that are written together."""
        sizes = [(1 + i) * (max(lengths[: i + 1]) + 1 + self.new_tokens) for i in range(len(lengths))]
        return max(1, sum(size <= self.most_tokens for size in sizes))

    def finish(self) -> None:
        """Write what is left."""
        self._write(is_last=True)

    def _write(self, *, is_last: bool) -> None:
        """Write answers where those that wait fill a batch, or no more come. Where memory ends the answers of the batch
        are left out, and later batches are half as large."""
        started = time.perf_counter()
        while self._begun and not self.why:
            lengths = [answer.length for answer in self._begun]
            num = self.together(lengths)
            if not is_last and num == len(lengths):
                break  # there is room for more
            batch, self._begun = self._begun[:num], self._begun[num:]
            try:
                self._write_some(batch)
            except _ERRORS as error:
                if is_out_of_memory(error):
                    self.most_tokens = max(1, num * (max(lengths[:num]) + self.new_tokens) // 2)
                else:
                    self.why, self._begun = str(error) or type(error).__name__, []
            else:
                continue
            free_cached_memory()
        self.seconds += time.perf_counter() - started

    def _write_some(self, answers: Sequence[_Begun]) -> None:
        """Write these answers to their ends. Raises UnsupportedAttentionError if the model does not find the losses of
        the pass again."""
        attention = self.model.config._attn_implementation
        with eval_mode(self.model), silence_transformers():
            try:
                decoder = BatchedDecoder(self.model, AdapterSet(self.model))
                slots = decoder.adopt([(answer.layers, answer.length) for answer in answers], more=1 + self.new_tokens)
                writing = dict(zip(slots, answers, strict=True))
                order, logits_NV = decoder.step({slot: answer.last for slot, answer in writing.items()}, [])
                self._prove([writing[slot] for slot in order], logits_NV)
                last = {slot: answer.ids[-1] for slot, answer in writing.items()}
                written = {answer.row: list(answer.ids) for answer in answers}
                while last:
                    order, logits_NV = decoder.step(last, [])
                    for slot, token in zip(order, logits_NV.argmax(-1).tolist(), strict=True):
                        ids = written[writing[slot].row]
                        ids.append(token)
                        last[slot] = token
                        if token in self.stop_ids or len(ids) >= self.new_tokens:
                            decoder.close(slot)
                            del last[slot]
                    self.tick(len(self.answers) + len(answers) - len(last), len(self.wanted))
            finally:
                self.model.set_attn_implementation(attention)
        self.answers |= written

    def _prove(self, answers: Sequence[_Begun], logits_NV: Tensor) -> None:
        """Compare the losses of the tokens that follow with the pass's, in deviations of a row's logits."""
        targets_N = torch.tensor([answer.target for answer in answers], device=logits_NV.device)
        losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
        away_N = (losses_N - torch.tensor([answer.loss for answer in answers], device=losses_N.device)) / logits_NV.std(
            -1
        )
        error = float(away_N.square().mean().sqrt())
        if not error <= TOLERANCES[self.model.dtype]:
            raise UnsupportedAttentionError(f"a token read again has another loss, by {error:.2g}")
