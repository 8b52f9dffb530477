"""When the steps of a TRL trainer ended, and one number that it logs of each."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Seconds since the epoch at the start of the first step and the end of each, and the logged values of `key`."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.ends: list[float] = []
        self.values: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.ends:
            self.ends.append(time.time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.time())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and self.key in logs:
            self.values.append(float(logs[self.key]))
