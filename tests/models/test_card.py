"""A card that torch cannot use is never a silent run on the processor; its allocator does what its driver can."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tunesmith.cli.app import app
from tunesmith.errors import RecipeError, is_out_of_memory
from tunesmith.models import card
from tunesmith.models.machine import choose_device


@pytest.fixture
def unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card with a driver of some version, and a torch that does not see it."""

    def make(driver: str, built: str | None) -> None:
        text = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Thu\n" if driver else ""
        (tmp_path / "version").write_text(text)
        (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(card, "DRIVER", tmp_path / "version")
        monkeypatch.setattr(card, "NODES", (str(tmp_path), "nvidia[0-9]*"))
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    "how",
    [
        ("550.54.14", None, r"driver 550\.54\.14\), but torch \S+ was built without CUDA", "--torch-backend=cu126"),
        ("580.65.06", None, "was built without CUDA", "--torch-backend=cu130"),
        ("535.104.05", "13.0", r"was built for CUDA 13\.0, whose driver is 580 or newer", "--torch-backend=cu126"),
        ("470.82", "12.6", "whose driver is 525 or newer", "Update the driver to 580"),
        ("580.65.06", "13.0", "does not start it", "nvidia-smi"),
        ("", "13.0", r"driver \?\)", "nvidia-smi"),
    ],
)
def test_a_card_that_torch_cannot_use_is_refused_with_the_way_out(unused, name, how):
    driver, built, why, way = how
    unused(driver, built)
    with pytest.raises(RecipeError, match=why) as refused:
        choose_device(name)
    text = str(refused.value)
    assert way in text
    assert text.startswith(f"device: {name}: ")
    assert text.endswith("Or use the processor: --set device=cpu")
    assert choose_device("cpu").value == "cpu"


def test_a_variable_naming_no_card_is_refused_and_one_hiding_all_obeyed(unused, monkeypatch):
    unused("580.65.06", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "gpu7")
    with pytest.raises(RecipeError, match="CUDA_VISIBLE_DEVICES=gpu7 names no card that is here"):
        choose_device("auto")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device("auto").value == "cpu"
        assert "CUDA_VISIBLE_DEVICES hides every card" in choose_device("auto").reason


def test_a_container_without_cards_says_how_it_gets_them(unused, monkeypatch, tmp_path):
    unused("580.65.06", "13.0")
    monkeypatch.setattr(card, "NODES", (str(tmp_path / "dev"), "nvidia[0-9]*"))
    choice = choose_device("auto")
    assert choice.value == "cpu"
    assert "docker run --gpus all" in choice.reason


def test_no_driver_is_no_card(monkeypatch, tmp_path):
    monkeypatch.setattr(card, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto").reason == "no CUDA or Apple graphics processor that torch can use"


def seen(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], archs: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("capability", "archs", "way"),
    [((7, 0), CUDA_13, "--torch-backend=cu126"), ((12, 0), ["sm_80", "sm_90"], "--torch-backend=cu130")],
)
def test_a_card_without_kernels_in_this_torch_is_refused(monkeypatch, name, capability, archs, way):
    seen(monkeypatch, capability, archs)
    expected = rf"Tesla V100 has capability {capability[0]}\.{capability[1]}, and torch .* has kernels for "
    with pytest.raises(RecipeError, match=expected) as refused:
        choose_device(name)
    assert way in str(refused.value)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)])
def test_a_card_runs_kernels_of_its_generation_and_what_is_compiled_for_it(monkeypatch, capability):
    seen(monkeypatch, capability, CUDA_13)
    assert choose_device("auto").value == "cuda"


def test_doctor_says_what_torch_and_driver_are(unused):
    unused("535.104.05", "13.0")
    words = " ".join(CliRunner().invoke(app, ["doctor"]).output.split())
    assert "torch's CUDA 13.0" in words
    assert "NVIDIA driver 535.104.05" in words
    assert "device none: device: auto: an NVIDIA card is here" in words


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings that the allocator gets, on a card whose first allocation may fail."""
    settings: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    monkeypatch.setattr(card, "_PREPARED", {})
    for name in card.OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)

    def failing(*errors: str) -> list[str]:
        waiting = list(errors)

        def empty(*shape: int, **how: Any) -> None:
            if waiting:
                raise RuntimeError(waiting.pop(0))

        monkeypatch.setattr(torch, "empty", empty)
        return settings

    return failing


def test_segments_grow_where_the_driver_can(allocator):
    settings = allocator()
    assert card.prepare_allocator("cuda") == ""
    assert settings == ["expandable_segments:True"]
    assert card.prepare_allocator("cpu") == ""


def test_a_driver_without_virtual_memory_gets_segments_as_they_were(allocator):
    settings = allocator("CUDA driver error: operation not supported")
    assert "its driver does not know expandable_segments" in card.prepare_allocator("cuda")
    assert settings == ["expandable_segments:True", "expandable_segments:False"]
    assert "operation not supported" in card.prepare_allocator("cuda")  # and is not tried again
    assert len(settings) == 2


def test_a_card_that_is_full_is_no_driver_that_cannot(allocator):
    settings = allocator("CUDA out of memory. Tried to allocate 2.00 MiB")
    assert card.prepare_allocator("cuda") == ""
    assert settings == ["expandable_segments:True"]


@pytest.mark.parametrize("name", card.OWN_SETTINGS)
def test_a_persons_word_on_the_allocator_counts(allocator, monkeypatch, name):
    settings = allocator()
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert card.prepare_allocator("cuda") == ""
    assert settings == []


def used(monkeypatch: pytest.MonkeyPatch, free: float, listed: str | Exception) -> None:
    def run(words: list[str], **how: Any) -> Any:
        assert words[:3] == ["nvidia-smi", "-i", "GPU-77"]
        if isinstance(listed, Exception):
            raise listed
        return SimpleNamespace(stdout=listed)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(uuid="77"))
    monkeypatch.setattr(subprocess, "run", run)


def test_a_card_in_use_is_named_with_free_memory_and_its_processes(monkeypatch):
    used(monkeypatch, 61, f"4121, /usr/bin/python3, 17600 MiB\n{os.getpid()}, python, 300 MiB\n")
    note = card.in_use("cuda")
    assert note.startswith("cuda: 19.0 GiB of its 80.0 GiB are in use by python3 (process 4121, 17600 MiB); 61.0 GiB ")
    used(monkeypatch, 61, FileNotFoundError("nvidia-smi"))
    assert "are in use; 61.0 GiB are free for this run" in card.in_use("cuda")
    used(monkeypatch, 78, "")
    assert card.in_use("cuda") == ""
    assert card.in_use("cpu") == ""


def test_memory_that_ends_in_a_library_is_out_of_memory():
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert not card.is_lost(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert card.is_lost(RuntimeError("CUDA error: unspecified launch failure"))
    assert not card.is_lost(RuntimeError("shapes do not match"))
