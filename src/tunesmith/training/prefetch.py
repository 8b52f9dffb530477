"""Batches made in a thread, while a CUDA device computes the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tunesmith.data.collate import Collator
    from tunesmith.data.sampler import MicroBatch
    from tunesmith.types import Batch


@dataclass(frozen=True, slots=True)
class BatchKey:
    """A micro-batch of a step; its batch is a function of these."""

    step: int
    rows: MicroBatch
    copies: tuple[int, ...]

    def make(self, collator: Collator) -> Batch:
        return collator.batch(self.rows, draw=self.step, copies=self.copies)


@dataclass
class Prefetcher:
    """Makes one batch ahead for a CUDA device. On a processor, which has no time to spare, each is made when needed."""

    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _ahead: tuple[BatchKey, Future[Batch]] | None = field(default=None, init=False)

    def batches(
        self, collator: Collator, keys: Sequence[BatchKey], then: Callable[[], BatchKey | None] = lambda: None
    ) -> Iterator[Batch]:
        """The batches of a step, in order. `then`: what is needed after them, found while the last one is at work."""
        if not works_ahead(collator):
            yield from (key.make(collator) for key in keys)
            return
        for key, following in zip(keys, [*keys[1:], None], strict=True):
            batch = self._take(collator, key)
            self._begin(collator, following)
            yield batch
        self._begin(collator, then())

    def _take(self, collator: Collator, key: BatchKey) -> Batch:
        """The batch that was made ahead; made now where another was, as after micro-batches were halved."""
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead is not None and ahead[0] == key else key.make(collator)

    def _begin(self, collator: Collator, key: BatchKey | None) -> None:
        self._ahead = None if key is None else (key, self._thread.submit(key.make, collator))


def works_ahead(collator: Collator) -> bool:
    """Whether the device of its batches computes while this process goes on."""
    return torch.device(collator.device).type == "cuda"
