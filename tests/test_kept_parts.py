"""What is kept is not found again when any part of its key is another: the rest of the table in correctness.md.

Rows: tests/data/test_dataset.py. References and merged bases: tests/training/test_kept.py. Files of the hub:
tests/data/test_hub_data.py, tests/models/test_hub.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tiny_tasks import task_recipe
from tunesmith.errors import InputError, RunError
from tunesmith.inference import predict
from tunesmith.inference.load import LoadedModel
from tunesmith.inference.rows import OutputFile
from tunesmith.methods import targets
from tunesmith.models import cuda_attention
from tunesmith.models.cuda_attention import AttentionCase, AttentionKernel, choose_kernel
from tunesmith.models.segments import AttentionOptions, Segment, Segments
from tunesmith.planning import devices
from tunesmith.recipe.docs import flat
from tunesmith.recipe.schema import Limits, Reading
from tunesmith.training import same_run
from tunesmith.training.setup import Setup, prepare

# Answers of `predict` that goes on

ANSWERS: dict[str, dict[str, Any]] = {
    "file of the model": {"base": "b"},
    "adapter": {"adapter": "b"},
    "task": {"task": "generate"},
    "precision": {"precision": "bfloat16"},
    "tokenizer and template": {"renderer": "b"},
    "kind of 4 bits": {"packed": "nf4"},
    "longest row": {"max_tokens": 50},
    "prompt": {"prompt": "x"},
    "date": {"date": "2026-01-02"},
    "--max-tokens": {"new_tokens": 9},
    "--threshold": {"threshold": 0.7},
    "--bare": {"bare": True},
    "--keep": {"keep": ("id",)},
    "rows": {"rows": "other"},
    "name of their file": {"name": "b.jsonl"},
    "their encoding": {"encoding": "cp1252"},
    "their limits": {"limits": Limits(line_bytes=9)},
}


def identity_of_answers(folder: Path, **changes: Any) -> dict[str, str]:
    """Of a call of predict, with one thing changed."""
    now = {"base": "a", "adapter": "a", "task": "chat", "precision": "float32", "renderer": "a", "packed": "",
           "max_tokens": 100, "prompt": "", "date": "2026-01-01", "new_tokens": 8, "threshold": 0.5, "bare": False,
           "keep": (), "rows": "rows", "name": "a.jsonl", "encoding": "auto",
           "limits": Limits(), **changes}  # fmt: skip
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "weights").write_text(now["adapter"])
    (folder / now["name"]).write_text(now["rows"])
    data = SimpleNamespace(
        max_tokens=now["max_tokens"], prompt=now["prompt"], reading=Reading(now["encoding"]), limits=now["limits"]
    )
    loaded: Any = SimpleNamespace(
        base_hashes={"weights": now["base"]},
        result=folder / "adapter",
        recipe=SimpleNamespace(task=now["task"], precision=now["precision"], data=data),
        renderer=SimpleNamespace(fingerprint=now["renderer"], date=now["date"], placeholders=None),
        packed=now["packed"],
    )
    loaded.identity = lambda: LoadedModel.identity(loaded)
    predictor: Any = SimpleNamespace(
        loaded=loaded, writes=True, max_new_tokens=now["new_tokens"], threshold=now["threshold"], is_many=False
    )
    predictor.holds_above = now["threshold"]
    predictor.identity = lambda: predict.Predictor.identity(predictor)
    return predict.fingerprint(predictor, str(folder / now["name"]), bare=now["bare"], keep=now["keep"])


@pytest.mark.parametrize("change", ANSWERS)
def test_answers_to_something_else_are_not_gone_on_with(tmp_path: Path, change: str) -> None:
    first = identity_of_answers(tmp_path)
    output = OutputFile(tmp_path / "out.jsonl", first)
    output.write([{"answer": "yes"}])
    output._file.close()  # as a killed process leaves it
    again = OutputFile(tmp_path / "out.jsonl", identity_of_answers(tmp_path))
    assert again.num_lines == 1
    again._file.close()
    with pytest.raises(InputError, match="was started with something else"):
        OutputFile(tmp_path / "out.jsonl", identity_of_answers(tmp_path, **ANSWERS[change]))


# A run that goes on


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("goes-on")
    return prepare(task_recipe(folder, "chat", "causal", method="lora"), root=folder / "runs")


def test_each_part_of_the_identity_of_a_run_counts(setup: Setup) -> None:
    """But for the options that change the memory of a step alone, and those of measurements."""
    run: Any = SimpleNamespace(path=Path("run"))
    free = {f"setting {key}" for key in same_run.MAY_CHANGE} | {same_run.MEASURES_LATER}
    same_run.refuse_other_run(run, setup, setup.identity, [])
    goes_on = set()
    for key in setup.identity:
        with suppress(RunError):
            same_run.refuse_other_run(run, setup, {**setup.identity, key: "another"}, [])
            goes_on.add(key)
    assert goes_on == free & set(setup.identity)


def test_each_option_and_each_file_is_part_of_the_identity_of_a_run(setup: Setup) -> None:
    sections = {
        "prefer",
        "reward",
        "embed",
        "ranking",
        "reinforce",
        "distil",
        "track",
    }  # of other tasks; a tracker changes no number
    options = flat(setup.recipe.model_dump(exclude=sections))
    assert {f"setting {key}" for key in options} <= set(setup.identity)
    assert {"tokenizer and template", "rows", "held-out rows", "setting order of rows"} <= set(setup.identity)
    assert {"model config.json", "model model.safetensors"} <= set(setup.identity)
    files = [file.path for file in (*setup.recipe.data.train, *setup.recipe.data.eval)]
    assert {f"data {path}" for path in files} <= set(setup.identity)


# Attention kernels

CASE = AttentionCase(
    dtype=torch.float32, heads=2, groups=2, head_size=8, value_size=8, causal=True, window=False, softcap=False,
    dropout=False, shared=False,
)  # fmt: skip
CASES: dict[str, Any] = {
    "dtype": torch.bfloat16, "heads": 4, "groups": 1, "head_size": 16, "value_size": 16, "causal": False,
    "window": True, "softcap": True, "dropout": True, "shared": True,
}  # fmt: skip


@contextmanager
def counted_probes(patch: pytest.MonkeyPatch) -> Iterator[list[AttentionCase]]:
    probed: list[AttentionCase] = []
    kernel = AttentionKernel("any", lambda case, capability: True, lambda *given: torch.zeros(1))
    patch.setattr(cuda_attention, "KERNELS", (kernel,))
    patch.setattr(cuda_attention, "probe", lambda kernel, case, device: probed.append(case) or "")
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choose_kernel.cache_clear()
    yield probed
    choose_kernel.cache_clear()


def test_a_kernel_is_probed_again_for_every_other_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(CASES) == {field.name for field in fields(AttentionCase)}
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    with counted_probes(monkeypatch) as probed:
        for _ in range(2):
            choose_kernel(CASE, first)
        assert len(probed) == 1
        for name, value in CASES.items():
            choose_kernel(replace(CASE, **{name: value}), first)
        choose_kernel(CASE, second)
    assert len(probed) == 2 + len(CASES)


def test_what_a_kernel_is_probed_for_follows_from_the_call() -> None:
    def of(heads: int = 2, groups: int = 2, size: int = 8, value: int = 8, **changes: Any) -> AttentionCase:
        dtype, shared = changes.pop("dtype", torch.float32), changes.pop("shared", False)
        pieces = [Segment(4), Segment(3, ((0, 4),) if shared else ())]
        segments = Segments.sharing(pieces, device=torch.device("cpu"))
        how = {"causal": True, "dropout": 0.0, "scaling": None, "window": None, "softcap": None, **changes}
        tensors = (
            torch.zeros(1, num, 7, dim, dtype=dtype) for num, dim in ((heads, size), (groups, size), (groups, value))
        )
        return AttentionCase.of(*tensors, segments, AttentionOptions(**how))

    calls: dict[str, dict[str, Any]] = {
        "dtype": {"dtype": torch.bfloat16}, "heads": {"heads": 4}, "groups": {"groups": 1}, "head_size": {"size": 16},
        "value_size": {"value": 16}, "causal": {"causal": False}, "window": {"window": 3}, "softcap": {"softcap": 5.0},
        "dropout": {"dropout": 0.1}, "shared": {"shared": True},
    }  # fmt: skip
    assert of() == CASE
    for name, call in calls.items():
        assert of(**call) == replace(CASE, **{name: CASES[name]})


# Speed of the machine, linear layers


def test_the_speed_of_a_machine_is_measured_by_device_threads_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(devices, "_fastest", lambda do, device, **how: measured.append(device) or 1.0)
    monkeypatch.setattr(devices, "CPU_PRODUCT", (2, 2, 2))
    monkeypatch.setattr(devices, "CPU_COPIED", 64)
    usual: dict[str, Any] = {"device": "cpu", "threads": 1, "dtype": torch.float32}
    devices._measured.cache_clear()
    try:
        for change in ({}, {"device": "meta"}, {"threads": 2}, {"dtype": torch.bfloat16}):
            before = len(measured)
            for _ in range(2):
                how = {**usual, **change}
                devices._measured(how.pop("device"), **how)
            assert len(measured) == before + 2  # products and copies, once
    finally:
        devices._measured.cache_clear()


def test_a_layer_is_taken_for_linear_by_its_class_alone() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Choosing(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input).topk(1)

    assert [targets._is_linear(kind(3, 4)) for kind in (Doubling, Choosing, Doubling)] == [True, False, True]
    assert Doubling in targets._LINEAR_BY_ANSWER
    assert Choosing not in targets._LINEAR_BY_ANSWER
