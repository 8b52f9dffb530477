"""Weights that are packed one by one as they are read, so that a model is never whole in memory before it is quantised.

It is an extension of transformers' loading, which reads, renames and casts each weight as for any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

NAME = "tunesmith_pack_on_load"


class PackOnLoad(QuantizationConfigMixin):  # type: ignore[misc]
    """The argument `quantization_config` of from_pretrained. Nothing of it is left on the model."""

    def __init__(
        self,
        choose: Callable[[PreTrainedModel], Collection[str]],
        pack: Callable[[nn.Module], nn.Module],
        *,
        element_size: float,
    ) -> None:
        """`choose`: the names of modules to pack, of a model without weights. `pack`: a module with its weight, on the
        device where it is kept, to what takes its place. `element_size`: bytes of a packed weight."""
        self.quant_method = NAME
        self.choose, self.pack, self.element_size = choose, pack, element_size
        AUTO_QUANTIZER_MAPPING[NAME] = _Quantizer

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
        module, _, name = param_name.rpartition(".")
        return name == "weight" and module in self.names

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
    def __init__(self, pack: Callable[[nn.Module], nn.Module]) -> None:
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
        name = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(name)
        expected: Any = module.weight
        if weight.shape != expected.shape:
            raise ValueError(f"{full_layer_name} has the shape {tuple(weight.shape)}, not {tuple(expected.shape)}")
        module.weight = nn.Parameter(weight, requires_grad=False)
        packed = self.pack(module)
        packed._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, packed)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}
