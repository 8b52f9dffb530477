"""A frozen linear layer whose weight is kept in 4 bits, and unpacked anew for every product.

nf4: blocks of 64 weights, each rounded to one of 16 quantiles of a normal distribution times the block's
largest magnitude; the magnitudes are quantised too, to 8 bits in blocks of 256 (Dettmers, Pagnoni, Holtzman &
Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3). bitsandbytes packs
and unpacks; the product and its gradient equal the unpacked weight's exactly.

Weights are packed one by one as they are read, by an extension of transformers' loading, so that a model is
never whole in memory before it is quantised.
"""

# T tokens, I inputs, O outputs

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tunesmith.environment.packages import import_bitsandbytes, install_command
from tunesmith.errors import RecipeError

BLOCK = 64
NESTED_BLOCK = 256


def check_installed() -> None:
    """Raise RecipeError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            "method.name: qlora needs the package bitsandbytes, which is not installed. Install it with: "
            f"{install_command('bitsandbytes')}, or use method: lora."
        )


def product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """[T, I] → [T, O] as nn.Linear and Conv1D compute it, bit for bit."""
    if bias_O is not None and not weight_OI.is_contiguous():
        return torch.addmm(bias_O, x, weight_OI.t())
    return F.linear(x, weight_OI, bias_O)


def _functional() -> Any:
    return import_bitsandbytes().functional


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The parts of a packed weight by name: `packed` (uint8, two weights each), `scales` (uint8, of each
    block), and what the scales are scaled by. It is packed on the weight's device."""
    weight = weight.contiguous()
    packed, state = _functional().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    nested = state.state2
    scales = {"scales": state.absmax, "offset": state.offset}
    return {"packed": packed, **scales, "nested_scales": nested.absmax, "nested_code": nested.code}


def unpack(parts: Mapping[str, Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of a shape [rows, columns] whose `pack` gave these parts."""
    nested = _functional().QuantState(
        absmax=parts["nested_scales"], code=parts["nested_code"], blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    state = _functional().QuantState(
        absmax=parts["scales"],
        shape=_rows_of_blocks(shape),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
        offset=parts["offset"],
        state2=nested,
    )
    made: Tensor = _functional().dequantize_4bit(parts["packed"], state)
    return made.reshape(shape)


def _rows_of_blocks(shape: torch.Size) -> tuple[int, ...]:
    """A shape whose rows begin with a block each: else bitsandbytes 0.50 takes wrong scales on CPUs."""
    if shape[1] % BLOCK == 0:
        return tuple(shape)
    num = shape.numel()
    return (num // BLOCK, BLOCK) if num % BLOCK == 0 else (num,)


class QuantizedLinear(nn.Module):
    """Replaces an `nn.Linear`, or GPT-2's `Conv1D`, whose weight is stored transposed."""

    def __init__(self, base: nn.Module, *, device: str | torch.device) -> None:
        """`base` stays as it is; its weight is packed on `device` and kept there."""
        super().__init__()
        weight: Tensor = base.weight.detach()  # type: ignore[operator]
        self.lies_transposed = isinstance(base, Conv1D)
        self.weight_shape, self.weight_dtype = weight.shape, weight.dtype
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        for name, tensor in pack(weight.to(device)).items():
            self.register_buffer(name, tensor)

    @property
    def shape_OI(self) -> tuple[int, int]:
        rows, columns = self.weight_shape
        return (columns, rows) if self.lies_transposed else (rows, columns)

    @property
    def num_bytes(self) -> int:
        """Size of the packed weight and its scales."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def weight(self) -> Tensor:
        """The weight unpacked, in the shape and precision of the original layer."""
        return unpack(dict(self.named_buffers()), shape=self.weight_shape, dtype=self.weight_dtype)

    def weight_OI(self) -> Tensor:
        """The weight unpacked, [O, I]."""
        return self.weight.t() if self.lies_transposed else self.weight

    @torch.no_grad()
    def unpacked(self) -> nn.Module:
        """A plain layer with the weight as it is now."""
        num_outputs, num_inputs = self.shape_OI
        with torch.device("meta"):
            made = Conv1D(num_outputs, num_inputs) if self.lies_transposed else nn.Linear(num_inputs, num_outputs)
        made.weight = nn.Parameter(self.weight, requires_grad=False)
        made.register_parameter("bias", self.bias)
        out: nn.Module = made.train(self.training)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        out: Tensor = _Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
        return out


def num_weights(model: PreTrainedModel) -> int:
    """Weights of a model, packed ones too."""
    shapes = (getattr(module, "weight_shape", None) for module in model.modules())
    return int(model.num_parameters()) + sum(int(shape.numel()) for shape in shapes if shape is not None)


class _Product(torch.autograd.Function):
    """x Wᵀ + b: nothing is kept for the backward but the packed weight, which is unpacked there again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_O: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        y_TO = product(x.reshape(-1, x.shape[-1]), layer.weight_OI(), bias_O).contiguous()
        return y_TO.resize_(*x.shape[:-1], y_TO.shape[1])  # no view of it: some models write into the answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        gx = g @ ctx.layer.weight_OI() if needs_x else None
        gbias_O = g.reshape(-1, g.shape[-1]).sum(0) if needs_bias else None
        return gx, gbias_O, None


PACK_ON_LOAD = "tunesmith_pack_on_load"


class PackOnLoad(QuantizationConfigMixin):  # type: ignore[misc]
    """The argument `quantization_config` of from_pretrained. Nothing of it is left on the model."""

    def __init__(
        self,
        choose: Callable[[PreTrainedModel], Collection[str]],
        pack: Callable[[PreTrainedModel, str], nn.Module],
        *,
        element_size: float,
    ) -> None:
        """`choose`: the names of weights to pack, of a model without weights. `pack`: packs the weight of
        this name, which was read to where it is kept, and returns the layer that takes its place.
        `element_size`: bytes of a packed weight."""
        self.quant_method = PACK_ON_LOAD
        self.choose, self.pack, self.element_size = choose, pack, element_size
        AUTO_QUANTIZER_MAPPING[PACK_ON_LOAD] = _Quantizer

    def __deepcopy__(self, memo: Any) -> PackOnLoad:
        return self


class _Quantizer(HfQuantizer):  # type: ignore[misc]
    quantization_config: PackOnLoad

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.element_size  # so much is reserved on a card before the weights come

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **others: Any) -> None:
        self.names = frozenset(self.quantization_config.choose(model))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **others: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.quantization_config.pack)

    def postprocess_model(self, model: PreTrainedModel, **others: Any) -> None:
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Pack(ConversionOps):  # type: ignore[misc]
    def __init__(self, pack: Callable[[PreTrainedModel, str], nn.Module]) -> None:
        self.pack = pack

    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """Put the packed module into the model; no weight is left to be set."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        expected = model.get_parameter(full_layer_name)
        if weight.shape != expected.shape:
            raise ValueError(f"{full_layer_name} has the shape {tuple(weight.shape)}, not {tuple(expected.shape)}")
        parent, _, name = full_layer_name.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Parameter(weight, requires_grad=False))
        packed = self.pack(model, full_layer_name)
        packed._is_hf_initialized = True  # type: ignore[assignment]
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}
