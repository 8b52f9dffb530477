"""Gradient checkpointing of exactly k layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from often import often
from packed import CAN, CANNOT, VOCAB, batch_of, rows_of, sharp
from tiny_model import ENCODERS, TRANSLATORS, seeing_model, tiny_model
from tunesmith.data.collate import build_batch
from tunesmith.errors import RecipeError
from tunesmith.methods.lora import attach
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.forward import logits_at_targets, sequence_logits
from tunesmith.models.modes import checkpoint_layers
from tunesmith.recipe.methods import LoraMethod
from tunesmith.types import Labels


@pytest.mark.parametrize(
    ("arch", "num_layers"),
    often([*((arch, 1) for arch in (*CAN, *CANNOT)), ("llama", 0), ("llama", 3)], "llama", "gpt2", "bloom"),
)
def test_exactly_k_layers_are_recomputed(arch, num_layers, monkeypatch):
    recomputed = []
    monkeypatch.setattr(
        "tunesmith.models.modes.checkpoint",
        lambda *args, **kwargs: recomputed.append(1) or checkpoint(*args, **kwargs),
    )
    model = tiny_model(arch, vocab_size=VOCAB, layers=3)
    checkpoint_layers(model, num_layers)
    model.train()(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False)
    assert len(recomputed) == num_layers


def test_k_may_be_changed():
    model = tiny_model("llama", vocab_size=VOCAB)
    checkpoint_layers(model, 2)
    checkpoint_layers(model, 1)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]


def test_a_vision_model_recomputes_the_layers_of_its_language_model():
    """Those that only images pass through come first in it; recomputed, they would save nothing."""
    model = seeing_model(vocab_size=VOCAB)
    checkpoint_layers(model, 1)
    assert [layer.gradient_checkpointing for layer in model.model.language_model.layers] == [True, False]
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.model.vision_tower.modules())


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(RecipeError, match=r"train.checkpointed_layers: 3: LlamaForCausalLM has 2 layers"):
        checkpoint_layers(tiny_model("llama", vocab_size=VOCAB), 3)


class Adapted(nn.Module):
    """A frozen linear layer with a small trained matrix beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.trained = nn.Parameter(torch.full((base.out_features, base.in_features), 1e-3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(x, self.trained)


def adapters_get_gradients(num_layers: int, use_reentrant: bool = False) -> list[torch.Tensor]:
    """With everything else frozen, so that no layer's input needs a gradient of its own accord."""
    model = sharp("llama").requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    use_packed_attention(model)
    checkpoint_layers(model, num_layers)
    if use_reentrant:
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = lambda f, *args: checkpoint(f, *args, use_reentrant=True)
    batch = batch_of(rows_of())
    F.cross_entropy(logits_at_targets(model.train(), batch), batch.targets_N).backward()
    found = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert len(found) == 4
    assert all(grad is not None and grad.abs().max() > 0 for grad in found)
    return found


def test_adapters_get_the_same_gradients_in_recomputed_layers():  # trap: L10
    expected = adapters_get_gradients(0)
    for num_layers in (1, 2):
        assert all(map(torch.equal, adapters_get_gradients(num_layers), expected))


def test_adapter_test_catches_a_reentrant_recomputation():  # trap: L10 planted
    with pytest.raises((AssertionError, RuntimeError)):
        adapters_get_gradients(2, use_reentrant=True)


def bfloat16_gradients(num_layers: int) -> list[torch.Tensor]:
    """Rows of several lengths, which on a processor go through grouped products, a few saved tensors for each."""
    model = tiny_model("llama", vocab_size=VOCAB, dtype=torch.bfloat16)
    use_packed_attention(model)
    checkpoint_layers(model, num_layers)
    batch = batch_of(rows_of())
    F.cross_entropy(logits_at_targets(model.train(), batch).float(), batch.targets_N).backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def test_short_bfloat16_rows_have_equal_gradients_in_recomputed_layers():
    """A recomputed layer hands out what it saved once: asking twice ended the run with a CheckpointError."""
    assert all(map(torch.equal, bfloat16_gradients(2), bfloat16_gradients(0)))


def gradients_with_a_head(arch: str, num_layers: int) -> list[torch.Tensor]:
    """Adapters, and the head of encoders, on rows of 9, 9 and 5 tokens."""
    labels = None if arch in TRANSLATORS else Labels("one", ("a", "b"))
    model = tiny_model(arch, vocab_size=VOCAB, head="sequence", labels=labels)
    attachment = attach(model, LoraMethod(rank=4), seed=0)
    checkpoint_layers(model, num_layers)
    rows = rows_of((9, 9, 5))
    if arch in TRANSLATORS:
        rows = [replace(row, trained=np.arange(len(row.ids)) >= 4) for row in rows]
        batch = build_batch(rows, range(3), layout="encoder_decoder", device="cpu", decoder_start=0)
        answers_NC = logits_at_targets(model.train(), batch)
    else:
        rows = [replace(row, trained=np.arange(len(row.ids)) == 0, labels=np.ones(1, np.int64)) for row in rows]
        batch = build_batch(rows, range(3), layout="padded", device="cpu")
        answers_NC = sequence_logits(model.train(), batch)
    F.cross_entropy(answers_NC, batch.targets_N).backward()
    return [tensor.grad for name, tensor in attachment.trained.items() if not name.endswith("lora_A.weight")]


@pytest.mark.parametrize(
    "arch", often([*(arch for arch in ENCODERS if arch != "mpnet"), *TRANSLATORS], "bert", "modernbert", "t5")
)
def test_encoders_and_encoder_decoders_have_equal_gradients_recomputed(arch):
    expected = gradients_with_a_head(arch, 0)
    assert all(grad.abs().max() > 0 for grad in expected)
    assert all(map(torch.equal, gradients_with_a_head(arch, 2), expected))


def test_a_model_whose_layers_cannot_be_recomputed_is_named():
    with pytest.raises(RecipeError, match=r"MPNetForMaskedLM has 0 layers that can be recomputed"):
        checkpoint_layers(tiny_model("mpnet", vocab_size=VOCAB, head="masked_token"), 1)
