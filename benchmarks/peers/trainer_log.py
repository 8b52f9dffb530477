"""What a peer built on transformers.Trainer did, step by step, noted by a callback."""

from __future__ import annotations

import time
from typing import Any

from given_rows import Counter
from transformers import TrainerCallback


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended, its loss, and what it held."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []
        self.losses: list[float] = []
        self.counter: Counter

    def on_train_begin(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
        # Accelerate wraps the loader that collates.
        loader = train_dataloader.base_dataloader
        self.counter = loader.collate_fn = Counter(loader.collate_fn)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ends.append(time.time())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def told(self, batches: int) -> dict[str, Any]:
        """Fields of `benchmarks.train.Log`, where a step takes so many batches."""
        counted = self.counter.per_step(batches, len(self.step_ends))
        return {"step_ends": self.step_ends, "losses": self.losses, **counted}
