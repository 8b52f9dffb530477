"""Cards by name, and what this machine has: memory that a run may take, its speed in products and in copies."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.environment.children import for_child, python_words
from tunesmith.environment.process import resident_bytes
from tunesmith.errors import InputError
from tunesmith.models.card import free_bytes, in_use, prepare_allocator
from tunesmith.models.machine import free_on_processor

GB = 10**9
EFFICIENCY = 0.4
"""Share of a card's peak that tuning reaches: 0.41 and 0.43 are published for LoRA on an H100 (NeMo AutoModel's
performance summary, Llama 3 8B and Qwen2.5 7B)."""
CUDA_START, CPU_LAUNCH = 18e-6, 35e-6
"""Seconds to start one operation with the code of the model and of torch: on a card (5,300 counted operations
of 32 layers of a LoRA step take a core some 90 ms), and on a processor, which waits for it."""
CUDA_CONTEXT = 800 * 2**20
"""Memory that CUDA and its libraries keep on a card for one process that computes."""
GROUP = 400 * 2**20
"""Memory that NCCL keeps on a card besides."""
NVLINK, PCIE, GLOO = 150e9, 12e9, 1e9
"""Bytes a second that a sum over cards or processes moves, by the makers' data sheets, and by gloo here."""
CPU_MOVING = 0.65
"""Share of a large copy's speed that the small operations of a step reach on a processor."""
CPU_PRODUCT, CUDA_PRODUCT = (1024, 1024, 2048), (8192, 4096, 4096)
"""Rows, inner size and columns of the product that is timed. On a card a small one takes its launch."""
CPU_ATTENTION, ATTENTION_S = (4, 1024, 64), 0.03
"""Heads, tokens and head size of the causal attention that is timed, and seconds of it. On a card it is as fast
as products; on a processor softmax takes most of it, in either precision."""
CPU_COPIED, CUDA_COPIED = 64 * 2**20, 512 * 2**20
"""Bytes of the copy that is timed."""
BUSY_S = 0.2
"""Seconds for which other programs are watched."""
WRITTEN_PIECE, WRITTEN_PIECES = 2**20, 64
"""Bytes of a piece of the file that is timed, and pieces."""


@dataclass(frozen=True, slots=True)
class Device:
    """A machine to plan for."""

    name: str
    kind: str
    """cpu, cuda or mps."""
    room: int
    """Bytes that the run may take in all."""
    products: float = 0.0
    """Floating-point operations a second in matrix products, as reached; 0: not known."""
    bandwidth: float = 0.0
    """Bytes a second that operations read and write."""
    launch: float = CUDA_START
    """Seconds that one operation takes besides its work."""
    precision: str = "bfloat16"
    """Type that a named card multiplies fastest, of those that a run can take."""
    written: float = 300e6
    """Bytes a second that reach its disk."""
    busy: float = 0.0
    """Share of the processor that other programs take."""
    in_use: str = ""
    """Memory of a card here that others hold, in words."""
    memory: int = 0
    """Bytes of all its memory, by which the loss is cut into pieces, see `fused_loss`; 0: `room`."""
    attention: float = 0.0
    """Floating-point operations a second in attention, as reached; 0: as many as in `products`."""

    def seconds(self, products: float, attention: float) -> float:
        """Seconds that operations in products and in attention take."""
        return products / self.products + attention / (self.attention or self.products)


_CARDS: dict[str, tuple[int, float, float]] = {
    "B200-180G": (180, 2250e12, 8.0e12),
    "H200-141G": (141, 989e12, 4.8e12),
    "H100-80G": (80, 989e12, 3.35e12),
    "A100-80G": (80, 312e12, 2.04e12),
    "A100-40G": (40, 312e12, 1.56e12),
    "L40S-48G": (48, 362e12, 0.86e12),
    "A10G-24G": (24, 70e12, 0.6e12),
    "L4-24G": (24, 121e12, 0.3e12),
    "RTX5090-32G": (32, 210e12, 1.79e12),
    "RTX4090-24G": (24, 165e12, 1.01e12),
    "RTX3090-24G": (24, 71e12, 0.94e12),
    "V100-32G": (32, 125e12, 0.9e12),
    "V100-16G": (16, 125e12, 0.9e12),
    "T4-16G": (16, 65e12, 0.32e12),
}
"""Memory in GB, dense operations a second in `precision` with float32 sums, bytes a second: from the makers'
data sheets."""
_FLOAT16 = ("V100", "T4")
"""Cards that do not multiply bfloat16."""


def named(name: str) -> Device:
    """A card of the table, or one known by its memory alone: 24G. Raises InputError for any other word."""
    wanted = name.upper().replace(" ", "")
    if match := re.fullmatch(r"(\d+)GI?B?", wanted):
        return Device(f"a card of {match[1]} GB", "cuda", int(match[1]) * GB)
    for card, (memory, peak, bandwidth) in _CARDS.items():
        if wanted in (card, card.partition("-")[0]):
            half = "float16" if card.startswith(_FLOAT16) else "bfloat16"
            return Device(card, "cuda", memory * GB, peak * EFFICIENCY, bandwidth, precision=half)
    raise InputError(f"--device: {name}: not known. One of {', '.join(_CARDS)}, or its memory alone: 24G.")


def named_group(name: str) -> tuple[Device, int]:
    """A card, and how many of them: `8xH100` is 8 of those that `named` knows. Raises InputError."""
    match = re.fullmatch(r"(\d+)\s*[xX×]\s*(\S.*)", name.strip())
    if match is None:
        return named(name), 1
    if int(match[1]) == 0:
        raise InputError(f"--device: {name}: of 0 cards there is nothing to plan. Give at least one: 2x{match[2]}.")
    return named(match[2]), int(match[1])


def link(device: Device) -> float:
    """Bytes a second between devices like this one: NVLink where servers of such cards have it."""
    if device.kind == "cpu":
        return GLOO
    name = device.name
    if device.kind == "cuda" and torch.cuda.is_available():
        name += torch.cuda.get_device_name()
    return NVLINK if re.search(r"[BH][12]00|A100", name) else PCIE


def here(device: str, *, threads: int, dtype: torch.dtype) -> Device:
    """This machine. Its speed is measured for a quarter of a second."""
    kind = torch.device(device).type
    if kind == "cpu" and dtype == torch.float16:  # a product of that would take seconds
        dtype = torch.float32
    others = in_use(device)
    prepare_allocator(device)
    busy = busy_share() if kind == "cpu" else 0.0
    products, copied = _measured(device, threads=threads, dtype=dtype)
    if kind != "cpu":
        memory = int(torch.cuda.mem_get_info(device)[1]) if kind == "cuda" else sys.maxsize
        return Device(device, kind, room(device), products, copied, memory=memory, in_use=others)
    moved, attention = CPU_MOVING * copied, _attention(threads=threads, dtype=dtype)
    return Device(
        device, kind, room(device), products, moved, CPU_LAUNCH, busy=busy, in_use=others, attention=attention
    )


def busy_share() -> float:
    """Share of this process's cores that was taken for a moment in which it waited."""
    percent = psutil.cpu_percent(BUSY_S, percpu=True)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(percent))
    own_cores = [percent[core] for core in cores if core < len(percent)] or percent
    return float(sum(own_cores)) / len(own_cores) / 100


def here_apart(device: str, *, threads: int, dtype: torch.dtype) -> Device:
    """`here`, found by a process of its own: half a GiB of a card, which CUDA keeps for each, is free again
    when it has ended. Raises RuntimeError with what the process printed where it fails."""
    arguments = [device, str(threads), str(dtype).removeprefix("torch.")]
    words = [*python_words("tunesmith.planning.devices"), *arguments]
    done = subprocess.run(words, capture_output=True, env=for_child(), text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    return Device(**json.loads(done.stdout.strip().rpartition("\n")[2]))


def room(device: str) -> int:
    """Bytes that this process may hold: what is free now, and what it holds already."""
    if torch.device(device).type == "cuda":
        return free_bytes(device) + CUDA_CONTEXT  # which is held already, too
    return free_on_processor() + resident_bytes()


def share_of_room(kind: str, room: int, processes: int) -> int:
    """Bytes for one of several processes on one machine: each has its card; a processor's memory is shared."""
    return (room - resident_bytes()) // processes + resident_bytes() if kind == "cpu" else room


def written(folder: Path) -> float:
    """Bytes a second that reach the disk of a folder, by a file that is removed again."""
    with tempfile.TemporaryFile(dir=folder) as file:
        piece, began = random.Random(0).randbytes(WRITTEN_PIECE), time.perf_counter()
        for _ in range(WRITTEN_PIECES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_PIECES * WRITTEN_PIECE / (time.perf_counter() - began)


@cache
def _measured(device: str, *, threads: int, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second in products of the size that layers have, and bytes a second of a large copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    is_cuda = torch.device(device).type == "cuda"
    rows, inner, columns = CUDA_PRODUCT if is_cuda else CPU_PRODUCT
    try:
        a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
        large = torch.ones((CUDA_COPIED if is_cuda else CPU_COPIED) // 4, dtype=torch.float32, device=device)
        other = torch.zeros_like(large)
        products = 2 * rows * inner * columns / _fastest(lambda: a @ b, device)
        return products, 2 * large.nbytes / _fastest(lambda: other.copy_(large), device)
    finally:
        torch.set_num_threads(before)


@cache
def _attention(*, threads: int, dtype: torch.dtype) -> float:
    """Operations a second in the attention of a processor, forward; half of its products are left out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    heads, tokens, size = CPU_ATTENTION
    q_1HTD = torch.ones((1, heads, tokens, size), dtype=dtype)
    try:
        attend = partial(scaled_dot_product_attention, q_1HTD, q_1HTD, q_1HTD, is_causal=True)
        return 2 * heads * size * tokens**2 / _fastest(attend, "cpu", seconds=ATTENTION_S)
    finally:
        torch.set_num_threads(before)


def _fastest(do: Callable[[], Any], device: str, *, seconds: float = 0.1) -> float:
    """Seconds of the fastest of several calls. CUDA and MPS are waited for."""
    is_cpu = torch.device(device).type == "cpu"
    do()
    best, spent = float("inf"), 0.0
    while spent < seconds:
        began = time.perf_counter()
        do()
        if not is_cpu:
            torch.accelerator.synchronize(device)
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
    return best


if __name__ == "__main__":
    measured = here(sys.argv[1], threads=int(sys.argv[2]), dtype=getattr(torch, sys.argv[3]))
    sys.stdout.write(json.dumps(asdict(measured)) + "\n")
