"""Answers to the prompts of rows that are being measured: a pass that finds a row's
loss has read its prompt too.

The pass says which token the model finds likeliest at each target. As long as these are the row's own, the
answer is known without being written; from the first other one on the scheduler writes it, from the keys and
values that the pass has computed. Drafts that a model checks in one pass: Leviathan et al. 2023, arXiv
2211.17192; here the reference is the draft, and decoding is greedy, so the answers equal writing token by
token, but for ties within rounding.
"""

# P positions of a pass, N targets of a pass, G groups of heads, D head size, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tunesmith.errors import NonFiniteError, is_out_of_memory
from tunesmith.generation.kv_cache import Layers, slot_of
from tunesmith.generation.padded import GeneratedAnswer, read_answer
from tunesmith.generation.scheduler import ResumedAnswer
from tunesmith.generation.writer import AnswerWriter, Writing
from tunesmith.models.attention import packed_forward
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.packing_check import TOLERANCES
from tunesmith.models.segments import UnsupportedAttentionError
from tunesmith.tasks.task import BoundTask
from tunesmith.types import Batch, Measured

_ERRORS = (MemoryError, RuntimeError, UnsupportedAttentionError, TypeError, ValueError, LookupError, NonFiniteError)
"""A model that cannot be called in this way raises any of these."""


@dataclass
class Continuation:
    """Writes answers while `predict_rows` measures; in the end `answers` has them,
    and `why` says why some are missing.

    The model is causal, runs packed rows and is not split over devices.
    """

    writer: AnswerWriter
    task: BoundTask
    """Measures the rows: tokens, not branches."""
    wanted: Mapping[int, int]
    """Row of the store → tokens of its prompt; the target that follows is the first of its answer."""
    tick: Callable[[int, int], None] = lambda done, total: None
    answers: dict[int, GeneratedAnswer] = field(default_factory=dict)
    """By row."""
    why: str = ""
    seconds: float = 0.0
    """Seconds that writing took."""
    _writing: Writing | None = None
    """None: nothing is being written."""
    _differences: list[float] = field(default_factory=list)
    """Differences of the losses of tokens that were read again, in deviations of their logits."""

    @property
    def model(self) -> PreTrainedModel:
        return self.writer.model

    def measure(self, model: nn.Module, batch: Batch) -> Measured:
        """As the task's: what the pass has said of its rows is kept, and answers are written."""
        if self.why or not any(row in self.wanted for row in batch.row_indices):
            return self.task.measure(model, batch)
        with packed_forward() as trace:
            layers: Layers = {}
            trace.kept = layers
            try:
                measured = self.task.measure(model, batch)
            finally:
                trace.kept = None
        self._write(partial(self._take, batch, measured, layers), to_the_end=False)
        return measured

    def finish(self) -> None:
        """Write the answers that are not complete."""
        self._write(lambda: None, to_the_end=True)

    def _take(self, batch: Batch, measured: Measured, kept: Layers) -> None:
        """Answers that the pass knows whole, and the beginnings of others."""
        starts = np.cumsum([0, *batch.lengths])
        predict_N, row_of_N, targets_N, outputs_N = (
            tensor.cpu().numpy() for tensor in (batch.predict_N, batch.row_of_N, batch.targets_N, measured.outputs_N)
        )
        losses_N, ids_P = measured.losses_N.cpu().numpy(), batch.ids_BT[0].tolist()
        for b, row in enumerate(batch.row_indices):
            if row not in self.wanted or row in self.answers:
                continue
            start = int(starts[b])
            here = np.flatnonzero((row_of_N == b) & (predict_N - start + 1 >= self.wanted[row]))
            known = self._known(predict_N[here] - start + 1 - self.wanted[row], targets_N[here], outputs_N[here])
            if not known:
                continue  # its first token is no target: it is answered like a prompt of no row
            if known[-1] in self.writer.stop_ids or len(known) == self.writer.new_tokens:
                prompt = ids_P[start : start + self.wanted[row]]
                self.answers[row] = read_answer(self.writer.renderer, prompt, known)
                continue
            at = here[len(known) - 1]
            last = int(predict_N[at])
            layers = {layer: _copied(pair, slice(start, last)) for layer, pair in kept.items()}
            on_logits = partial(self._prove, int(targets_N[at]), float(losses_N[at]))
            resumed = ResumedAnswer(slot_of(layers, last - start), len(known) - 1, on_logits)
            self._writing = self._writing or Writing(self.writer, answers=self.answers)
            self._writing.add(row, ids_P[start : last + 1], resumed)
        kept.clear()

    def _known(self, places: NDArray[Any], targets: NDArray[Any], outputs: NDArray[Any]) -> list[int]:
        """The beginning of an answer: the row's tokens while they are the likeliest,
        and the first that is another.

        `places`: of the targets behind the prompt.
        """
        known: list[int] = []
        for place, target, output in zip(places.tolist(), targets.tolist(), outputs.tolist(), strict=True):
            if place != len(known) or len(known) == self.writer.new_tokens:
                break
            known.append(output)
            if output != target or output in self.writer.stop_ids:
                break
        return known

    def _write(self, take: Callable[[], None], *, to_the_end: bool) -> None:
        """Take what a pass has left, and write until every answer has a place, or to their ends. Where memory
        ends for an answer it is left out."""
        started = time.perf_counter()
        try:
            take()
            if self._writing is not None:
                self._writing.go_on(lambda done: self.tick(done, len(self.wanted)), to_the_end=to_the_end)
        except _ERRORS as error:
            self.why = "memory ended" if is_out_of_memory(error) else str(error) or type(error).__name__
        if self.why:
            self._writing = None
            free_cached_memory()
        self.seconds += time.perf_counter() - started

    def _prove(self, target: int, loss: float, logits_V: Tensor) -> None:
        """Compare the loss of the row's own token behind a prompt with that of the pass. Raises
        UnsupportedAttentionError where the losses so far are others, by their root mean square."""
        again = F.cross_entropy(logits_V[None], torch.tensor([target], device=logits_V.device))
        self._differences.append(float((again - loss) / logits_V.std()))
        error = float(np.sqrt(np.mean(np.square(self._differences))))
        if not error <= TOLERANCES[self.model.dtype]:
            raise UnsupportedAttentionError(f"a token read again has another loss, by {error:.2g}")


def _copied(pair: tuple[Tensor, Tensor], span: slice) -> tuple[Tensor, Tensor]:
    """Keys and values [G, T + 1, D] of some positions of a pass [1, G, P, D], with a place for one more."""
    key_GTD, value_GTD = (F.pad(part[0, :, span], (0, 0, 0, 1)) for part in pair)
    return key_GTD, value_GTD
