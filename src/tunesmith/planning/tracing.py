"""What one pass allocates and computes, operation by operation, cut into segments at each layer's borders.

Run on tensors without numbers (`torch._subclasses.fake_tensor`): every tensor that the pass makes is then seen with its
true size and life, since the code that trains is the code that runs, and nothing is allocated or computed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MAPPED = 32 * 2**20
"""Bytes from which the C library asks the system for a block of its own and gives it back at once; smaller ones come
from its heap, which stays as large as it once was (glibc's DEFAULT_MMAP_THRESHOLD_MAX, malloc(3), mallopt(3))."""
Place = tuple[Literal["start", "forward", "between", "head", "backward", "end"], int, int]
"""Which part of a pass; of "forward" and "backward" the stack of layers and the number in it."""


@dataclass(frozen=True, slots=True)
class Operand:
    """How a tensor lies."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Call:
    """An operation and what it was given, tensors as operands and lists as tuples: what a library compiles for, once
    each."""

    func: Any
    args: Any
    kwargs: Any
    """Pairs of a name and what was given for it."""

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any) -> Call:
        return cls(func, _spec(args), _spec(list(kwargs.items())))


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Operand(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_spec, value)) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product or attention."""

    flops: int
    num_bytes: int
    """Read and written."""
    dtype: torch.dtype
    call: Call
    kernels: int = 1
    """Of the compiled products that this takes."""


@dataclass(slots=True)
class Segment:
    """A stretch of a pass."""

    place: Place
    delta: int = 0
    """Bytes alive at its end, more than at its start."""
    gradients: int = 0
    """Of these the bytes of gradients."""
    peak: int = 0
    """Most bytes alive in it, above those at its start."""
    mapped: int = 0
    """Of `delta`, blocks that are mapped one by one."""
    mapped_peak: int = 0
    """Most bytes of these alive in it, above those at its start."""
    heap_peak: int = 0
    """The same of smaller blocks."""
    products: Counter[Product] = field(default_factory=Counter)
    moved: int = 0
    """Bytes read and written by everything else."""
    fresh: int = 0
    """Of these, by what makes blocks that are mapped one by one, whose pages the system has to give first."""
    num_ops: int = 0


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is the open mode. `known` tensors were there before, and are not counted."""

    def __init__(self, known: Iterable[Tensor], gradients: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = self._mapped = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._gradients = gradients
        """Bytes of the gradients that there are now."""
        self._begun = (0, 0, gradients())
        self.segments: list[Segment] = [Segment(("start", 0, 0))]

    def mark(self, place: Place) -> None:
        """Here a segment ends and another begins."""
        gradients = self._gradients()
        self.segments[-1].delta = self._live - self._begun[0]
        self.segments[-1].mapped = self._mapped - self._begun[1]
        self.segments[-1].gradients = gradients - self._begun[2]
        self._begun = (self._live, self._mapped, gradients)
        self.segments.append(Segment(place))

    def close(self) -> list[Segment]:
        """All segments, the last one ended here."""
        self.mark(("end", 0, 0))
        return self.segments[:-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        is_new = [self._count(tensor) for tensor in made]
        self._work(func, args, kwargs or {}, result, made, moves=any(is_new) or _writes(func))
        return result

    def _count(self, tensor: Tensor) -> bool:
        """Whether the tensor is a new piece of memory; then it counts until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return False
        self._sizes[key] = size = storage.nbytes()
        self._live += size
        self._mapped += size if size >= MAPPED else 0
        segment, live, mapped = self.segments[-1], self._live - self._begun[0], self._mapped - self._begun[1]
        segment.peak = max(segment.peak, live)
        segment.mapped_peak = max(segment.mapped_peak, mapped)
        segment.heap_peak = max(segment.heap_peak, live - mapped)
        weakref.finalize(storage, self._gone, key)
        return True

    def _gone(self, key: int) -> None:
        size = self._sizes.pop(key)
        self._live -= size
        self._mapped -= size if size >= MAPPED else 0

    def _work(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[Tensor], *, moves: bool) -> None:
        segment = self.segments[-1]
        if not moves:
            return  # a view
        segment.num_ops += 1
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
        flops = _flops(func, args, kwargs, result)
        if flops:
            call = Call.of(func, args, kwargs)
            segment.products[Product(flops, num_bytes, read[0].dtype, call, _kernels(func, read[0]))] += 1
        else:
            is_fresh = any(tensor.numel() * tensor.element_size() >= MAPPED for tensor in made)
            segment.moved += num_bytes
            segment.fresh += num_bytes if is_fresh else 0


def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """2 a multiply-add, by torch's own table, and for the attention of processors that it lacks."""
    packet = func.overloadpacket
    in_place = packet.__name__.endswith("_") and hasattr(torch.ops.aten, packet.__name__.rstrip("_"))
    packet = getattr(torch.ops.aten, packet.__name__.rstrip("_")) if in_place else packet
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if (times := _ATTENTION.get(packet)) is not None:
        query, key = args[times.query].shape, args[times.query + 1].shape
        causal = bool(args[times.causal]) if len(args) > times.causal else bool(kwargs.get("is_causal", False))
        return int(times.products * 2 * prod(query) * key[-2] * (0.5 if causal else 1))
    return 0


def _kernels(func: Any, first: Tensor) -> int:
    """Attention computes block by block, of the sizes that its length leaves: of a new length its backward compiles
    6 products, or 11 where it cuts both ways; counted in docs/EXPERIMENTS.md."""
    attention = _ATTENTION.get(func.overloadpacket)
    if attention is None:
        return 1
    return 0 if attention.products == 2 else 11 if first.shape[-2] >= CUT_BOTH_WAYS else 6


CUT_BOTH_WAYS = 768
"""Tokens from which attention cuts its queries into blocks of 256, and its keys too."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """Where the arguments stand, and how many products of T × T × D: two forward; five backward, which computes the
    scores again (Dao et al. 2022, appendix B)."""

    query: int
    causal: int
    products: int


_ATTENTION: dict[Any, _Attention] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _Attention(0, 4, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _Attention(1, 7, 5),
}
