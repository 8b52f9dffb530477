"""Which modules of a model compute in one node, and that the model's answers and gradients stay."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from card import as_on_a_card
from tunesmith.methods.lora import attach
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.models import fast_layers
from tunesmith.models.fast_layers import use_fast_layers
from tunesmith.models.linear_nodes import LinearParts
from tunesmith.recipe.methods import LoraMethod

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}
SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    return model_class(config_class(**SMALL))


def answer(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the gradient of every trained weight."""
    model.zero_grad()
    ids = torch.arange(24).reshape(2, 12) % 64
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_nodes(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("card", [False, True])
def test_logits_and_every_gradient_stay(family: str, method: str, *, card: bool) -> None:
    model = model_of(family)
    if method == "lora":
        attachment = attach(model, LoraMethod(name="lora", rank=4, alpha=8), seed=0)
        with torch.no_grad():
            for name, tensor in attachment.trained.items():
                if name.endswith("lora_B.weight"):
                    tensor.normal_(std=0.1)
        attachment.publish()
    logits, grads = answer(model)
    with as_on_a_card() if card else nullcontext():
        use_fast_layers(model)
        found, found_grads = answer(model)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    mlps, siblings, turned = 2, 6 if method == "lora" else 0, 2 if card else 0
    assert len(in_nodes(model)) == norms + mlps + siblings + turned
    # float32: sums in another order, through two layers.
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert (found_grads[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_a_wrong_way_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault in a node is found by the probe: the model keeps its own forward."""
    real = fast_layers.gated_mlp
    monkeypatch.setattr(fast_layers, "gated_mlp", lambda x, layers, act: real(x, layers, act) * 1.001)
    monkeypatch.setattr(fast_layers, "rms_norm", lambda x, w, eps, start: x * w)
    model = model_of("llama")
    use_fast_layers(model)
    assert in_nodes(model) == []


def test_dropout_hooks_and_disabled_layers_are_seen_in_every_call() -> None:
    model = model_of("llama")
    attachment = attach(model, LoraMethod(name="lora", rank=4, alpha=8), seed=0)
    use_fast_layers(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    with torch.no_grad(), attachment.adapter_disabled():
        off, _ = model(input_ids=torch.arange(8)[None]).logits, None
    plain = model_of("llama")
    torch.testing.assert_close(off, plain(input_ids=torch.arange(8)[None]).logits, rtol=1e-4, atol=1e-5)
    seen: list[int] = []
    handle = layers[-1].register_forward_hook(lambda *_: seen.append(1))
    model(input_ids=torch.arange(8)[None])
    handle.remove()
    assert seen == [1]
    for layer in layers:
        layer.dropout = 0.5
    model.train()
    torch.manual_seed(0)
    one = model(input_ids=torch.arange(8)[None]).logits
    assert layers[0].parts() is None
    assert torch.isfinite(one).all()


def test_an_mlp_with_a_dropout_of_its_own_stays_as_it_is() -> None:
    """A probe in evaluation mode would not see it."""
    model = model_of("llama").eval()
    mlp = model.model.layers[0].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, nn.Dropout(0.5))
    own = type(mlp).forward
    mlp.hidden_dropout = 0.5
    use_fast_layers(model)
    assert mlp.forward.__func__ is own
    assert "forward" in vars(model.model.layers[1].mlp)


def test_attention_to_an_encoder_does_not_compute_keys_of_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDE.items()}
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, **sides))
    attach(model, LoraMethod(rank=2), seed=0)
    use_fast_layers(model)
    together: list[int] = []
    right = fast_layers.linears

    def counted(x: torch.Tensor, layers: list[LinearParts]) -> tuple[torch.Tensor, ...]:
        together.append(len(layers))
        return right(x, layers)

    monkeypatch.setattr(fast_layers, "linears", counted)
    model(input_ids=torch.arange(6)[None], decoder_input_ids=torch.arange(4)[None])
    assert together == [3, 3]  # of both self-attentions
