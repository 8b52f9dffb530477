"""Plans for an NVIDIA card: made on any machine, and of nothing that belongs to a processor."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fresh
from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.planning import devices, memory
from tunesmith.planning.devices import Device, named
from tunesmith.recipe.schema import Recipe
from tunesmith.training.resolve import ResolvedRun, resolve_run

CARD = named("H100")
AUTO = {"train": {"tokens_per_pass": "auto", "rows_per_step": 3, "epochs": 2}, "precision": "bfloat16"}


def without_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a plan could take from a processor fails the test."""

    def fail(*args: Any, **how: Any) -> Any:
        pytest.fail("a plan for a card took something of a processor")

    class NoProcessor(dict[str, int]):
        def __getitem__(self, key: str) -> int:
            return fail() if key == "cpu" else super().__getitem__(key)

    monkeypatch.setattr(devices, "free_on_processor", fail)
    monkeypatch.setattr(memory, "CHUNK_BYTES", NoProcessor())
    monkeypatch.setattr(devices, "here", fail)
    monkeypatch.setattr(devices, "_measured", fail)


def planned(recipe: Recipe, folder: Path, device: Device = CARD) -> ResolvedRun:
    found = resolve_run(recipe, root=folder, device=device)
    assert found.forecast is not None, found.notes
    assert found.forecast.memory.runtime == devices.CUDA_CONTEXT
    assert found.forecast.sampler.pass_cost == 4096
    assert found.forecast.heavy.load.tokens == sum(found.forecast.sampler.lengths_of(found.forecast.heavy.rows))
    return found


@pytest.mark.parametrize(
    ("arch", "method"),
    [*(("llama", name) for name in ("lora", "dora", "qlora", "full")), ("gpt2", "full"), ("gemma2", "lora"),
     ("mistral", "qlora")],
)  # fmt: skip
def test_a_plan_for_a_card_takes_nothing_of_a_processor(tmp_path, monkeypatch, arch, method):
    without_a_processor(monkeypatch)
    recipe = tiny_recipe(tmp_path, arch=arch, **AUTO).model_dump() | {"method": {"name": method}}
    found = planned(Recipe.model_validate(recipe), tmp_path)
    assert found.forecast.sampler.layout == "packed"
    assert found.recipe.train.tokens_per_pass == 16384  # a small model


def test_so_does_one_of_an_encoder(tmp_path, monkeypatch):
    without_a_processor(monkeypatch)
    found = planned(task_recipe(tmp_path, "classify", "encoder", precision="bfloat16"), tmp_path)
    assert found.forecast.sampler.layout == "packed"


def test_the_test_sees_a_plan_that_does(tmp_path, monkeypatch):
    """A card whose kind is a processor's, as the first forecast took it."""
    without_a_processor(monkeypatch)
    monkeypatch.setattr("tunesmith.training.resolve.one_line", lambda error: pytest.fail(str(error)))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        planned(tiny_recipe(tmp_path, **AUTO), tmp_path, Device("H100-80G", "cpu", 2**36, 1e14, 1e12))


def fake_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(devices, "prepare_allocator", lambda device: "")
    monkeypatch.setattr(devices, "in_use", lambda device: "")
    monkeypatch.setattr(devices, "_measured", lambda device, **how: (4e14, 3e12))


def test_a_run_on_a_card_is_resolved_by_what_the_card_says(tmp_path, monkeypatch):
    fake_card(monkeypatch)
    recipe = tiny_recipe(tmp_path, **{**AUTO, "device": "auto", "precision": "auto"})
    found = resolve_run(recipe, root=tmp_path)
    recipe = found.recipe
    assert (recipe.device, recipe.precision, recipe.train.tokens_per_pass) == ("cuda", "bfloat16", 16384)
    assert found.forecast is not None, found.notes
    assert found.forecast.device.room == 70 * 2**30 + devices.CUDA_CONTEXT
    assert found.forecast.memory.runtime == devices.CUDA_CONTEXT
    assert found.forecast.duration is not None


def test_a_card_is_timed_with_products_that_take_longer_than_their_launch(monkeypatch):
    shapes: list[Any] = []
    monkeypatch.setattr(devices, "_fastest", lambda do, device: shapes.append(device) or 1.0)
    monkeypatch.setattr(torch, "ones", lambda shape, **how: shapes.append(shape) or torch.empty(0, device="meta"))
    devices._measured.__wrapped__("cuda:0", threads=1, dtype=torch.bfloat16)
    assert shapes[:3] == [(8192, 4096), (4096, 4096), 512 * 2**20 // 4]
    launch_s = 5e-6  # of an operation alone
    assert 40 * launch_s < 2 * 8192 * 4096 * 4096 / 989e12


@pytest.mark.parametrize(("card", "precision"), [("T4", "float16"), ("V100-32G", "float16"), ("A100-40G", "bfloat16")])
def test_a_named_card_computes_in_what_it_multiplies(tmp_path, card, precision):
    recipe = tiny_recipe(tmp_path, **{**AUTO, "precision": "auto"})
    found = resolve_run(recipe, root=tmp_path, device=named(card))
    assert found.recipe.precision == precision
    given = resolve_run(tiny_recipe(tmp_path, **{**AUTO, "precision": "float32"}), root=tmp_path, device=named(card))
    assert given.recipe.precision == "float32"


def test_a_plan_that_tries_a_run_measures_the_card_in_a_process_of_its_own(tmp_path, monkeypatch):
    """CUDA keeps half a GiB of a card for each process: with that of the plan, memory ended in the trial on a T4."""
    fake_card(monkeypatch)
    words = []

    def run(command, **how):
        words.extend(command[1:])
        found = json.dumps(dataclasses.asdict(Device("cuda", "cuda", 15 * 2**30, 4e13, 3e11, in_use="others")))
        return types.SimpleNamespace(returncode=0, stdout=f"noise\n{found}\n", stderr="")

    monkeypatch.setattr(devices.subprocess, "run", run)
    monkeypatch.setattr(devices, "here", lambda *args, **how: pytest.fail("in this process"))
    recipe = tiny_recipe(tmp_path, **{**AUTO, "device": "auto", "precision": "auto"})
    found = resolve_run(recipe, root=tmp_path, apart=True)
    assert words == ["-m", "tunesmith.planning.devices", "cuda", "1", "bfloat16"]
    assert found.forecast is not None
    assert found.forecast.device.room == 15 * 2**30
    assert "others" in found.notes


def test_that_process_says_what_it_found(monkeypatch):
    monkeypatch.setattr("sys.executable", str(fresh.python()))
    found = devices.here_apart("cpu", threads=1, dtype=torch.float32)
    assert found.kind == "cpu"
    assert found.products > 0


def test_a_slice_of_a_card_is_a_card_with_the_memory_of_the_slice(tmp_path, monkeypatch):
    fake_card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 MIG 1g.10gb")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (9 * 2**30, 10 * 2**30))
    found = resolve_run(tiny_recipe(tmp_path, **{**AUTO, "device": "auto"}), root=tmp_path)
    assert [choice.reason for choice in found.choices if choice.key == "device"] == ["NVIDIA H100 MIG 1g.10gb is here"]
    assert found.forecast is not None
    assert found.forecast.device.room == 9 * 2**30 + devices.CUDA_CONTEXT


def test_a_second_run_on_a_card_takes_the_rest_and_names_the_first(tmp_path, monkeypatch):
    fake_card(monkeypatch)
    monkeypatch.setattr(devices, "in_use", lambda device: f"{device}: 40 GiB are in use by python (process 7, 40 GiB)")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (40 * 2**30, 80 * 2**30))
    found = resolve_run(tiny_recipe(tmp_path, **{**AUTO, "device": "auto"}), root=tmp_path)
    assert "cuda: 40 GiB are in use by python (process 7, 40 GiB)" in found.notes
    assert found.forecast is not None
    assert found.forecast.device.room == 40 * 2**30 + devices.CUDA_CONTEXT
