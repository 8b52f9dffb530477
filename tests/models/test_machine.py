"""Device and precision, chosen with a reason that names the hardware."""

import os
from types import SimpleNamespace

import pytest
import torch

from tunesmith.errors import RecipeError
from tunesmith.models import machine
from tunesmith.models.machine import choose_device, choose_precision
from tunesmith.models.memory import free_cached_memory
from tunesmith.recipe.load import validate


def cpuinfo(monkeypatch, text: str | None) -> None:
    def read_text(path, *args):
        if text is None:
            raise FileNotFoundError(str(path))
        return text

    monkeypatch.setattr(machine, "Path", lambda path: SimpleNamespace(read_text=lambda *args: read_text(path)))


def cuda(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Volta 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", "bfloat16", "in hardware (avx512_bf16)"),
        ("flags : fpu amx_bf16\n", "bfloat16", "in hardware (amx_bf16)"),
        ("Features : fp asimd bf16\n", "bfloat16", "in hardware (bf16)"),
        ("flags : fpu avx2 avx512f\n", "float32", "does not multiply bfloat16"),
        ("flags : fpu not_avx512_bf16_really\n", "float32", "does not multiply bfloat16"),
        (None, "float32", "does not say"),
    ],
)
def test_cpu_precision_follows_the_processors_flags(monkeypatch, text, value, reason):
    cpuinfo(monkeypatch, text)
    choice = choose_precision("auto", "cpu")
    assert (choice.key, choice.value) == ("precision", value)
    assert reason in choice.reason


def test_asked_precision_is_taken_and_its_price_said(monkeypatch):
    cpuinfo(monkeypatch, "flags : fpu avx2\n")
    assert choose_precision("float32", "cpu").reason == "as given"
    choice = choose_precision("bfloat16", "cpu")
    assert choice.value == "bfloat16"
    assert choice.reason == "as given, though this processor does not multiply bfloat16 in hardware"
    choice = choose_precision("float16", "cpu")
    assert choice.value == "float32"
    assert choice.reason.startswith("float16 takes a processor ten times as long or more; this processor")


@pytest.mark.parametrize(
    ("capability", "value"),
    [((6, 0), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_cuda_precision_follows_the_capability(monkeypatch, capability, value):
    cuda(monkeypatch, capability)
    choice = choose_precision("auto", "cuda:1")
    assert choice.value == value
    assert f"Volta 9000 (capability {capability[0]}.{capability[1]})" in choice.reason


def test_mps_takes_float32():
    assert choose_precision("auto", "mps").value == "float32"


def test_fastest_device_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto").value == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").value == "mps"
    cuda(monkeypatch, (9, 0))
    assert (choose_device("auto").value, choose_device("auto").reason) == ("cuda", "Volta 9000 is here")


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "cuda", "cuda:1"])
def test_present_device_is_taken_as_asked(monkeypatch, name):
    cuda(monkeypatch, (9, 0))
    assert validate({"device": name}).device == name
    assert (choose_device(name).value, choose_device(name).reason) == (name, "as given")


@pytest.mark.parametrize("name", ["tpu", "gpu", "cuda:x", "cuda:01", "meta", ""])
def test_word_that_is_no_device_is_refused_by_the_recipe(name):
    with pytest.raises(RecipeError, match=f"device: {name}: not a device. Use auto, cpu, cuda, cuda:1 or mps"):
        validate({"device": name})


def test_absent_card_is_refused(monkeypatch):
    cuda(monkeypatch, (9, 0))
    with pytest.raises(RecipeError, match="device: cuda:2: torch sees 2 CUDA devices"):
        choose_device("cuda:2")


def test_absent_kinds_of_device_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"device: cuda: torch sees 0 CUDA devices\. Use auto or cpu"):
        choose_device("cuda")
    with pytest.raises(RecipeError, match="device: mps: no Apple graphics processor"):
        choose_device("mps")


def test_copies_to_a_card_come_from_pinned_memory():
    asked = []
    pinned = SimpleNamespace(to=lambda device, **how: asked.append((device, how)) or "there")
    tensor = SimpleNamespace(pin_memory=lambda: pinned, to=lambda device, **how: pytest.fail("not pinned"))
    assert machine.to_device(tensor, "cuda:1") == "there"
    assert asked == [("cuda:1", {"non_blocking": True})]
    here = torch.zeros(3)
    assert machine.to_device(here, "cpu") is here


def test_a_card_is_waited_for_once_for_all_that_is_read(monkeypatch):
    waited = []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(device))
    )
    tensors = [
        SimpleNamespace(device=torch.device("cuda:1"), to=lambda where, non_blocking, i=i: (i, where, non_blocking))
        for i in range(3)
    ]
    assert machine.to_host(*tensors) == [(i, "cpu", True) for i in range(3)]
    assert waited == [torch.device("cuda:1")]
    here = torch.zeros(3)
    assert machine.to_host(here)[0] is here


def test_repeatable_kernels_are_taken_on_a_card_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine.use_repeatable_kernels()
    assert asked == []
    cuda(monkeypatch, (9, 0))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    machine.use_repeatable_kernels()
    assert asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    machine.use_repeatable_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_apple_memory_is_freed_without_the_call_for_all_devices(monkeypatch):
    """torch 2.10: "Allocator for mps is not a DeviceAllocator", https://github.com/pytorch/pytorch/issues/186430."""

    def refuse() -> None:
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    freed: list[str] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator.memory, "empty_cache", refuse)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: freed.append("mps"))
    free_cached_memory()
    assert freed == ["mps"]
