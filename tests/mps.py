"""Apple's device, pretended on a processor: what would raise there raises here.

Tensors that a program puts on "mps" lie in memory of the processor, but say that they are on mps. As there, none of
them may be float64, none mixes with tensors of the processor, and none can be read as an array. Operators that torch
has no kernel for on MPS are collected. What a kernel of that device computes, and how fast, this cannot show.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torchgen
import transformers
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

YAML = "packaged/ATen/native/native_functions.yaml"
WIDE = (torch.float64, torch.complex128)
READS = {Tensor.numpy, Tensor.__array__}
NAMES = {torch.device, torch._C._nn._parse_to}
"""What makes devices of words."""
MAY_MIX = {Tensor.to, Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.set_, Tensor.type_as}
MAY_MIX |= {torch._has_compatible_shallow_copy_type, Tensor.data.__set__, Tensor.grad.__set__}
"""What takes tensors of two devices."""


@cache
def kernels() -> frozenset[str]:
    """Operators that MPS computes, by the table of the installed torch: by a kernel of its own, or by others that it
    is made of."""
    entries = yaml.load((Path(torchgen.__file__).parent / YAML).read_text("utf-8"), yaml.CSafeLoader)
    places: dict[str, set[str]] = {}
    for entry in entries:
        listed = ",".join(entry.get("dispatch") or {} if entry.get("dispatch") else ["Composite"])
        if delegate := entry.get("structured_delegate"):
            listed = f"delegate {delegate}"
        places[re.match(r"[\w.]+", entry["func"])[0]] = {word.strip() for word in listed.split(",")}

    def runs(name: str) -> bool:
        return any(
            word == "MPS"
            or word.startswith("Composite")
            or (word.startswith("delegate ") and runs(word.removeprefix("delegate ")))
            for word in places.get(name, ())
        )

    return frozenset(name for name in places if runs(name))


class PretendedMps(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Any] = {}
        """Storages on the device. They are kept, so that no other gets their number."""
        self.missing: set[str] = set()
        """Operators that were called and have no kernel there."""
        self.called: set[str] = set()

    def has(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self.kept

    def put(self, value: Any) -> Any:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                if tensor.dtype in WIDE:
                    raise TypeError(
                        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
                    )
                storage = tensor.untyped_storage()
                self.kept[storage._cdata] = storage
        return value

    def take(self, value: Any) -> Any:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.kept.pop(tensor.untyped_storage()._cdata, None)
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner in (Tensor.device, Tensor.is_mps, Tensor.is_cpu):
            here = self.has(first)
            answers = {Tensor.is_mps: here, Tensor.is_cpu: not here, Tensor.device: torch.device("mps:0")}
            return answers[owner] if here or owner is not Tensor.device else func(*args, **kwargs)
        if func in NAMES:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            with self:  # else what is computed again in it would be on the processor
                return torch.autograd.backward(*args, kwargs.pop("gradient", None), **kwargs)
        if func in READS and self.has(first):
            raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.cpu or (func is Tensor.to and self._goes_to(args, kwargs) == "cpu"):
            copied = func(*args, **kwargs)
            return self.take(copied.clone()) if self.has(first) else copied
        on_device = self._goes_to(args, kwargs) == "mps"
        if on_device and func is Tensor.to and not self.has(first):
            first, *rest = args
            moved = func(first, *map(_on_processor, rest), **tree_map(_on_processor, kwargs))
            is_same = moved.untyped_storage()._cdata == first.untyped_storage()._cdata
            return self.put(moved.clone() if is_same else moved)
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        here = [tensor for tensor in tensors if self.has(tensor)]
        elsewhere = [tensor for tensor in tensors if tensor.dim() and tensor.numel() and not self.has(tensor)]
        if here and elsewhere and func not in MAY_MIX:
            raise RuntimeError(f"Expected all tensors to be on the same device ({func.__name__}: mps:0 and cpu)")
        out = func(*tree_map(_on_processor, args), **tree_map(_on_processor, kwargs))
        return self.put(out) if on_device else out

    def _goes_to(self, args: Any, kwargs: Any) -> str:
        """The kind of device that a call names; "" where it names none."""
        for value in (kwargs.get("device"), *args[1:], *(args[:1] if isinstance(args[:1], str) else ())):
            if isinstance(value, torch.device):
                return value.type
            if isinstance(value, str) and re.fullmatch(r"(cpu|mps)(:\d)?", value):
                return value.partition(":")[0]
        other = args[1] if len(args) > 1 else kwargs.get("other")
        return ("mps" if self.has(other) else "cpu") if isinstance(other, Tensor) and args[0] is not other else ""


def _on_processor(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "mps":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and re.fullmatch(r"mps(:\d)?", value) else value


class Operators(TorchDispatchMode):
    """What is computed of tensors of the device lies there too, also in C++ and in the backward pass."""

    def __init__(self, device: PretendedMps) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(map(self.device.has, tree_leaves((args, kwargs)))):
            self.device.put(out)
            name = func._schema.name.removeprefix("aten::") + ("." + func._overloadname).replace(".default", "")
            self.device.called.add(name)
            if func.namespace in ("aten", "prims") and name not in kernels():
                self.device.missing.add(name)
        return out


@contextmanager
def pretended_mps() -> Iterator[PretendedMps]:
    """A block in which `device: mps` is there. The model is read by the processor and then moved."""
    device, read = PretendedMps(), transformers.PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, device_map: Any = None, **how: Any) -> Any:
        return read(cls, *args, **how)

    nothing: Callable[..., None] = lambda *args, **how: None  # noqa: E731
    with ExitStack() as stack:
        stack.enter_context(patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)))
        stack.enter_context(patch.object(torch.backends.mps, "is_available", lambda: True))
        stack.enter_context(patch.object(torch.mps, "empty_cache", nothing))
        stack.enter_context(patch.object(torch.accelerator, "synchronize", nothing))
        stack.enter_context(patch.object(torch, "Event", lambda **how: MagicMock()))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # what MPS has for attention with gradients
        stack.enter_context(device)
        stack.enter_context(Operators(device))
        yield device
