"""Losses of compared rows list nothing whose length only the card knows: each such list makes the processor wait."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_tasks import task_recipe
from tunesmith.training.setup import prepare

WAITS = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Names of operations that read a number of the device back before they go on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        lists = name.startswith("index") and any(
            isinstance(at, torch.Tensor) and at.dtype == torch.bool
            for at in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITS or lists:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("prefer", "causal", {}),
    ("embed", "encoder", {"embed": {"loss": "ranking"}}),
    ("embed", "encoder", {"embed": {"loss": "ranking", "symmetric": True}}),
    ("reward", "causal", {}),
    ("rank", "encoder", {"ranking": {"loss": "listwise"}}),
    ("rank", "encoder", {"ranking": {"loss": "pairwise"}}),
    ("rank", "encoder", {"ranking": {"loss": "pointwise"}}),
    ("classify", "encoder", {"train": {"class_weights": "balanced"}}),
]


@pytest.mark.parametrize(("task", "kind", "sections"), CASES, ids=lambda value: str(value)[:40])
def test_a_pass_of_compared_rows_waits_for_nothing(tmp_path: Path, task: str, kind: str, sections: Any) -> None:
    setup = prepare(task_recipe(tmp_path, task, kind, method="lora", **sections), root=tmp_path)
    rows = [int(i) for i in setup.rows.train_rows[:4]]
    with Waits() as waits:
        batch = setup.collator.batch(rows, step=1, lines="learnt")
        setup.task.loss_sum(setup.model, batch).backward()
    assert waits.names == []


def test_the_test_sees_a_list_whose_length_the_card_knows() -> None:
    values = torch.arange(4.0)
    with Waits() as waits:
        values[values > 1]
        torch.bincount(values.long())
        float(values.sum())
    assert waits.names == ["index", "bincount", "_local_scalar_dense"]
