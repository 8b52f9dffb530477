"""An NVIDIA card before it computes: can torch use it, or why not, who else does, and its allocator."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tunesmith.environment.process import card_share
from tunesmith.errors import is_out_of_memory, one_line
from tunesmith.phrases import size

DRIVER = Path("/proc/driver/nvidia/version")
"""Text of the kernel's driver, which a container sees too."""
NODES = "/dev", "nvidia[0-9]*"
"""Device files of cards, which a container gets with `--gpus`."""
WSL = Path("/usr/lib/wsl/lib/libcuda.so.1")
"""Windows' driver as Linux inside of it sees it."""
WHEELS = "https://pytorch.org/get-started/locally"
"""Address of PyTorch's wheels, by version of CUDA."""
LEAST_DRIVER = {13: 580, 12: 525}
"""Oldest driver of each major version of CUDA (NVIDIA, "CUDA Compatibility", table of minor versions)."""
OLD_CARDS = (7, 5)
"""Wheels for CUDA 13 have no kernels for capabilities below; those for 12.6 have."""
UNUSED = 0.05
"""Share of a card's memory that may be taken before a note says by whom: a desktop takes as much."""
SETTING = "expandable_segments"
OWN_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables by which a person sets torch's allocator."""


def driver() -> str:
    """Version of the NVIDIA driver; "" where there is none, "?" where it does not say."""
    try:
        match = re.search(r"(?:Kernel Module|x86_64|aarch64)\s+(\d[\d.]*)", DRIVER.read_text("utf-8", "replace"))
    except OSError:
        return "?" if WSL.exists() else ""
    return match[1] if match else "?"


def why_unused() -> str:
    """Why torch sees no CUDA device though a card is here, with the way out; "" where no card is."""
    version, variable = driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not version or not (any(Path(NODES[0]).glob(NODES[1])) or WSL.exists()) or is_hidden():
        return ""
    built, major = torch.version.cuda, _major(version)
    here = f"an NVIDIA card is here (driver {version}), but torch {torch.__version__}"
    if built is None:
        return f"{here} was built without CUDA. {_install(major)}"
    least = LEAST_DRIVER.get(int(built.partition(".")[0]), 0)
    if major and major < least:
        return f"{here} was built for CUDA {built}, whose driver is {least} or newer. {_install(major)}"
    if variable is not None:
        way = "Correct it or unset it; `nvidia-smi -L` lists the cards."
        return f"{here} sees none: CUDA_VISIBLE_DEVICES={variable} names no card that is here. {way}"
    return f"{here} (CUDA {built}) does not start it{_words_of_torch()}. `nvidia-smi` says whether the card works."


def is_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every card on purpose."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")


def why_unfit(device: str) -> str:
    """Why a card that torch sees has no kernels in it, with the way out; "" where it has."""
    archs = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    known = [(match[1], (int(match[2]), int(match[3]))) for match in archs if match]
    capability = torch.cuda.get_device_capability(device)
    # Kernels run on later cards of the same generation, and what is compiled for the card on all later ones.
    if not known or any(at <= capability and (kind == "compute" or at[0] == capability[0]) for kind, at in known):
        return ""
    card = torch.cuda.get_device_name(device)
    names = ", ".join(f"{a}.{b}" for a, b in sorted({at for _, at in known}))
    has = f"{card} has capability {capability[0]}.{capability[1]}"
    way = _install(_major(driver()), capability)
    return f"{has}, and torch {torch.__version__} has kernels for {names}. {way}"


def _major(version: str) -> int:
    return int(version.partition(".")[0]) if version[:1].isdigit() else 0


def _install(driver_major: int, capability: tuple[int, int] | None = None) -> str:
    """The command for a torch that fits driver and card."""
    if driver_major and driver_major < LEAST_DRIVER[12]:
        return f"Update the driver to {LEAST_DRIVER[13]} or newer first."
    is_old = capability is not None and capability < OLD_CARDS
    wheel = "cu126" if is_old or 0 < driver_major < LEAST_DRIVER[13] else "cu130"
    if wheel == "cu126" and capability is not None and capability >= (10, 0):
        return f"Update the driver to {LEAST_DRIVER[13]} or newer, then install a torch for CUDA 13."
    version = f"CUDA {wheel[2:4]}.{wheel[4]}"
    return f"Install one for {version}: uv pip install --reinstall torch --torch-backend={wheel}, or with pip: {WHEELS}"


def _words_of_torch() -> str:
    """The warnings that torch gives while it looks for cards, once in a process."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    return f" ({one_line(Warning(str(raised[-1].message)))})" if raised else ""


def prepare_allocator(device: str | torch.device) -> str:
    """Let the allocator of a card grow its segments, as PyTorch recommends where batches have many sizes;
    returns a note where its driver cannot. Nothing is set where a person has."""
    place = torch.device(device)
    if place.type == "cuda" and card_share() < 1:
        torch.cuda.set_per_process_memory_fraction(card_share(), place)
    if place.type != "cuda" or sys.platform != "linux" or any(name in os.environ for name in OWN_SETTINGS):
        return ""
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if change is None or _PREPARED.get(place) is not None:
        return _PREPARED.get(place) or ""
    change(f"{SETTING}:True")
    _PREPARED[place] = ""
    try:
        torch.empty(1, device=place)
    except RuntimeError as error:
        if is_out_of_memory(error):  # which is for whoever needs more than a byte
            return ""
        change(f"{SETTING}:False")  # drivers of virtual cards, of Jetson, of WSL: no virtual memory
        torch.empty(1, device=place)
        _PREPARED[place] = f"{device}: its driver does not know {SETTING} ({one_line(error)}): memory is used less well"
    return _PREPARED[place]


_PREPARED: dict[torch.device, str] = {}


def free_bytes(device: str | torch.device) -> int:
    """Bytes of a card that this process may take or has: what is free, within its share."""
    free, total = torch.cuda.mem_get_info(device)
    held = int(torch.cuda.memory_reserved(device))
    return min(int(free) + held, int(card_share() * total))


@contextmanager
def exact_products() -> Iterator[None]:
    """A block whose products of float32 on a card are not rounded to TF32, as NVIDIA's containers do."""
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def in_use(device: str | torch.device) -> str:
    """A note where other processes hold memory of a card, with its free memory and their names; "" where none
    does. To be called before this process holds any."""
    if torch.device(device).type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    if taken <= UNUSED * total:
        return ""
    names = _processes(device)
    whom = f" by {', '.join(names)}" if names else ""
    return f"{device}: {size(taken)} of its {size(total)} are in use{whom}; {size(free)} are free for this run"


def _processes(device: str | torch.device) -> list[str]:
    """Other processes on a card, as nvidia-smi names them; none where it does not."""
    try:
        which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", "-i", which, "--query-compute-apps=pid,name,used_memory", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError, AssertionError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [
        f"{Path(name).name} (process {pid}, {memory})"
        for pid, name, memory in (row for row in rows if len(row) == 3)
        if pid.isdecimal() and int(pid) != os.getpid()
    ]


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a card failed: it fell off the bus, was reset, or a kernel of it ended badly.
    Nothing can be computed on it any more in this process."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "AcceleratorError" or bool(re.search(r"CUDA error|CUDNN_|NVML", str(error)))
