"""The machine: device and precision, with the reasons for them, and the memory that is free."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from tunesmith.errors import RecipeError
from tunesmith.models import card
from tunesmith.types import Choice

FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")
"""Flags in /proc/cpuinfo of processors that multiply bfloat16 in hardware: x86, then ARM."""
NAMED_GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Linux's control groups, and which of them this process is in."""


def choose_device(name: str) -> Choice:
    """The device to compute on: the one that was named, or with "auto" the fastest there is.

    Raises RecipeError for a device that this machine lacks, and for a card that torch cannot use, unless
    another device is named.
    """
    if name != "auto":
        return Choice("device", _present(name), "as given")
    if torch.cuda.is_available():
        _refuse_card("auto", card.why_unfit("cuda"))
        return Choice("device", "cuda", f"{torch.cuda.get_device_name()} is here")
    if torch.backends.mps.is_available():
        return Choice("device", "mps", "the graphics processor of this Mac")
    _refuse_card("auto", card.why_unused())
    if card.driver():
        why = "an NVIDIA driver is here, but no card"
        if card.is_hidden():
            why = "CUDA_VISIBLE_DEVICES hides every card"
        return Choice("device", "cpu", f"{why} (a container gets cards by `docker run --gpus all`)")
    return Choice("device", "cpu", "no CUDA or Apple graphics processor that torch can use")


def _refuse_card(name: str, why: str) -> None:
    if why:
        raise RecipeError(f"device: {name}: {why}. Or use the processor: --set device=cpu".replace("..", "."))


def _present(name: str) -> str:
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("device: mps: no Apple graphics processor that torch can use. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        num = torch.cuda.device_count()
        if not num:
            _refuse_card(name, card.why_unused())
        raise RecipeError(f"device: {name}: torch sees {num} CUDA device{'s' * (num != 1)}. Use auto or cpu.")
    if device.type == "cuda":
        _refuse_card(name, card.why_unfit(name))
    return name


def choose_precision(name: str, device: str) -> Choice:
    """ "float32", "bfloat16" or "float16" for weights and activations on `device`; with "auto", what is fast
    there, and on a processor instead of float16 too."""
    fast, why = _fast_precision(torch.device(device))
    if name == "float16" and device == "cpu":
        return Choice("precision", fast, f"float16 takes a processor ten times as long or more; {why}")
    if name != "auto":
        slow = name == "bfloat16" and fast != "bfloat16"
        return Choice("precision", name, f"as given, though {why}" if slow else "as given")
    return Choice("precision", fast, why)


def _fast_precision_of_card(device: torch.device) -> tuple[str, str]:
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (capability {major}.{minor})"
    if major >= 8:
        return "bfloat16", f"{name} multiplies bfloat16 in hardware"
    if major == 7:
        return "float16", f"{name} multiplies float16 in hardware, but does not multiply bfloat16"
    return "float32", f"{name} does not multiply bfloat16 in hardware, nor float16 with float32 sums"


def _fast_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        return _fast_precision_of_card(device)
    if device.type == "mps":
        return "float32", "bfloat16 has not been tried on Apple graphics processors"
    flags = cpu_flags()
    if flag := next((flag for flag in FAST_BFLOAT16 if flag in flags), None):
        return "bfloat16", f"this processor multiplies bfloat16 in hardware ({flag})"
    if not flags:
        return "float32", f"{platform.system()} does not say whether this processor multiplies bfloat16 in hardware"
    return "float32", "this processor does not multiply bfloat16 in hardware"


def cpu_flags() -> set[str]:
    """The flags of this processor in /proc/cpuinfo; none where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def use_repeatable_kernels() -> None:
    """Let CUDA compute with kernels that give the same bits each time, in this process; to be called before its
    first product. What has no such kernel raises an error."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of a tensor of this process on a device; on CUDA from pinned memory, so that nobody waits."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one device as this process can read them; a CUDA device is waited for once."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if tensors[0].device.type == "cuda":
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies


def free_on_processor() -> int:
    """Bytes that this process can still get: of the machine's memory, and of what its container is allowed."""
    return min(int(psutil.virtual_memory().available), _group_free())


def _group_free() -> int:
    """Bytes that the control groups of this process leave (a container, a job of Slurm or systemd), one inside
    the other; cached files can be given up."""
    free, group = 2**63, NAMED_GROUPS
    with suppress(OSError):
        group /= "".join(re.findall(r"^0::/(.*)", OWN_GROUP.read_text("utf-8"), re.M))
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # no such limit, or "max"
            most, now = (int((folder / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
            free = min(free, most - now + int(stat.get("inactive_file", 0)))
    return free
