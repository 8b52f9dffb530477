"""What a method of peft does to a model, tried before the first row: whether it runs, leaves the base as it is, and
answers each row by itself.
"""

# B rows, T tokens

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.models.modes import eval_mode

if TYPE_CHECKING:
    from tunesmith.methods.peft_bridge import PeftAttachment

PROBE_TOKENS = 8


def plain_name(name: str) -> str:
    """The name that a weight of the base has in the plain model."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _inputs(model: PreTrainedModel, *, rows: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    vocab = int(model.get_input_embeddings().weight.shape[0])
    ids_BT = torch.randint(0, vocab, (rows, PROBE_TOKENS), generator=draw).to(model.device)
    return {"input_ids": ids_BT} | ({"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {})


def probe(model: PreTrainedModel) -> Tensor:
    """What the model answers to a few tokens, float32."""
    with eval_mode(model):
        logits: Tensor = model(**_inputs(model)).logits
    return logits.float()


def try_out(attachment: PeftAttachment) -> None:
    """One forward and backward, and none of it stays."""
    logits = attachment.model(**_inputs(attachment.model)).logits.float()
    torch.autograd.backward(logits.square().mean())
    attachment.collect_gradients()
    for tensor in attachment.trained.values():
        tensor.grad = None


def difference_by_mates(attachment: PeftAttachment) -> float:
    """How far the answer to a row moves when another row of the same length stands beside it, over the spread of its
    logits. As soon as it has learnt something: a fresh adapter may hide it."""
    inputs = _inputs(attachment.model, rows=3)
    with attachment.perturbed(), eval_mode(attachment.model):
        both = [
            attachment.model(**{name: ids_3T[[0, mate]] for name, ids_3T in inputs.items()}).logits[0].float()
            for mate in (1, 2)
        ]
    return float((both[0] - both[1]).abs().max() / both[0].std().clamp_min(1e-12))


def base_sums(model: PreTrainedModel) -> dict[str, int]:
    """A sum over the bits of every weight of the base, by its name there."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        plain_name(name): int(weight.detach().contiguous().view(whole[weight.element_size()]).sum())
        for name, weight in model.named_parameters()
    }
