"""Layers that carry a state from token to token beside attention: they would carry it into the next row of a pass."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

_LAYERS = re.compile(r"conv|linear_attention|mamba|recurrent|rwkv|hybrid|lightning|retention|ssm|delta")
"""Kinds of layers, as configs name them."""
_MODULES = re.compile(r"Mamba|Recurrent(?!Gemma)|RgLru|GatedDelta|Lightning|LinearAttention|Rwkv|Retention|ShortConv")
_STATES = ("A_log", "dt_bias", "time_decay")
"""Parameters of state spaces, by the ends of their names."""


def why(model: PreTrainedModel) -> str:
    """Why rows cannot stand end to end in a model, nor texts be decoded without its state; "": only attention goes
    from token to token.

    Told by its config and its modules: a leak of a tenth of the spread of logits would pass for rounding in bfloat16.
    """
    config = model.config.get_text_config()
    for name in ("layer_types", "layers_block_type", "block_types"):
        for kind in getattr(config, name, None) or ():
            if _LAYERS.search(str(kind)):
                return _reason(f"{kind} layers")
    for module in model.modules():
        is_wide = isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
        holds_state = any(name in _STATES for name, _ in module.named_parameters(recurse=False))
        if is_wide or holds_state or _MODULES.search(type(module).__name__):
            return _reason(type(module).__name__)
    return ""


def _reason(what: str) -> str:
    return f"{what}: they carry a state from token to token, which the next row would find"
