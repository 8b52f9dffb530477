"""Attention with a bias for every distance, in passes of whole rows that stand end to end.

T5 and its like add to each score a number for the head and the distance of query and key (Raffel et al. 2020,
"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 2.1). Of T tokens they
would build T × T of them, and as many zeros where the decoder reads the encoder. Rows do not read each other, and
distances do not depend on where a row stands: the biases of the longest row serve all, and zeros nobody needs.
"""

# T tokens, H heads, D head size, S rows of equal length, Q queries, K keys, M tokens of the longest row

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.models.segments import PairSegments, Segments

NAMES = ("q", "k", "v", "o", "n_heads", "key_value_proj_dim", "scaling", "has_relative_attention_bias", "compute_bias")
"""What transformers' attention of this kind has."""


def use_short_biases(model: nn.Module) -> int:
    """Let attention of this kind take biases of the longest row where it is handed `segments`; how many there are.

    Without them it is what it was.
    """
    found = [module for module in model.modules() if _is_known(module)]
    for module in found:
        if "forward" not in vars(module):
            module.forward = partial(_forward, module, module.forward)
    return len(found)


def _is_known(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in NAMES) and {"query_length", "key_length"} <= set(
        inspect.signature(module.compute_bias).parameters  # type: ignore[arg-type]
    )


def _forward(
    module: Any, own: Any, hidden_1TF: Tensor, *args: Any, segments: Segments | PairSegments | None = None, **given: Any
) -> Any:
    """What the module answers: its output, the biases for the layers behind it if it hands them on, no weights."""
    if segments is None:
        return own(hidden_1TF, *args, **given)
    read_1KF = given.get("key_value_states", given.get("encoder_hidden_states"))
    read_1KF = hidden_1TF if read_1KF is None else read_1KF
    heads = -1, module.key_value_proj_dim
    three = (module.q(hidden_1TF), module.k(read_1KF), module.v(read_1KF))
    q_1HTD, k_1HKD, v_1HKD = (tensor.unflatten(-1, heads).transpose(1, 2) for tensor in three)
    bias_1HMM = given.get("position_bias")
    if bias_1HMM is None and module.has_relative_attention_bias:
        most = segments.within(module).longest
        bias_1HMM = module.compute_bias(most, most, device=hidden_1TF.device)
    attended_1THD, _ = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation](
        module,
        q_1HTD,
        k_1HKD,
        v_1HKD,
        None,
        segments=segments,
        position_bias=bias_1HMM,
        dropout=module.dropout if module.training else 0.0,
        scaling=module.scaling,
    )
    out_1TF = module.o(attended_1THD.flatten(2))
    return (out_1TF, bias_1HMM, None) if "position_bias" in given else (out_1TF, None)


def attend(
    three: tuple[Tensor, Tensor, Tensor], bias_HMM: Tensor, *, causal: bool, dropout: float, scaling: float | None
) -> Tensor:
    """[S, H, Q, D] of queries [S, H, Q, D], keys and values [S, G, K, D]: by torch's kernel, which takes the bias as a
    mask."""
    query, key, value = three
    num_queries, num_keys = query.shape[2], key.shape[2]
    bias_HQK = bias_HMM[:, :num_queries, :num_keys]
    if causal:
        bars_QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        bias_HQK = bias_HQK.masked_fill(bars_QK.triu_(num_keys - num_queries + 1), -torch.inf)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias_HQK[None],
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
