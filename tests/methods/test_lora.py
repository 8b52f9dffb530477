"""Adapters on whole models: fresh, trained, merged."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from serve.batches import taken
from tiny_model import tiny_model
from tunesmith.errors import RecipeError
from tunesmith.generation.adapters import AdapterSet
from tunesmith.methods import lora, targets
from tunesmith.methods.lora import LoraAttachment, attach
from tunesmith.optim import Optimizer
from tunesmith.recipe.methods import LoraMethod
from tunesmith.recipe.schema import Optim

VOCAB = 61


def some_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(some_ids()).logits
    return out


def backward(model: nn.Module, attachment: LoraAttachment, *, seed: int = 0) -> float:
    ids = some_ids(seed)
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    attachment.collect_gradients()
    return loss.item()


def randomise(attachment: LoraAttachment, *, std: float = 0.1) -> None:
    """Adapters as training could have left them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in attachment.trained.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    attachment.publish()


def test_a_is_drawn_from_seed_and_name_alone() -> None:
    alone = attach(tiny_model("llama", vocab_size=VOCAB), LoraMethod(targets=("v_proj",)), seed=3)
    among = attach(tiny_model("llama", vocab_size=VOCAB, seed=9), LoraMethod(), seed=3)
    other = attach(tiny_model("llama", vocab_size=VOCAB), LoraMethod(targets=("v_proj",)), seed=4)
    for name, tensor in alone.trained.items():
        assert torch.equal(tensor, among.trained[name])
        assert torch.equal(tensor, other.trained[name]) == name.endswith("lora_B.weight")


def test_a_is_spread_as_in_peft_and_b_is_zero() -> None:
    """Kaiming's uniform with a = √5 on [R, I] is uniform in ±1/√I."""
    attachment = attach(tiny_model("llama", vocab_size=VOCAB), LoraMethod(rank=64), seed=0)
    a_RI, b_OR = attachment.matrices("model.layers.0.mlp.down_proj")
    bound = 128**-0.5
    assert a_RI.shape == (64, 128)
    assert bound * 0.999 < a_RI.abs().max() <= bound
    # 8192 draws: the spread of a uniform variable, bound / √3, within 2 %.
    assert a_RI.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not b_OR.any()


def test_random_numbers_of_the_process_are_left_alone() -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    before = torch.get_rng_state()
    attach(model, LoraMethod(), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_float32_model_is_trained_without_copies() -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    attachment = attach(model, LoraMethod(), seed=0)
    layer = attachment.layers["model.layers.0.mlp.up_proj"]
    assert attachment.trained["model.layers.0.mlp.up_proj.lora_A.weight"] is layer.lora_A


def test_without_adapter_is_the_untouched_model() -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    before = logits(model)
    attachment = attach(model, LoraMethod(), seed=0)
    randomise(attachment)
    with attachment.adapter_disabled():
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before, atol=1e-2)


# trap: A7
def assert_merged_weight_moves_by_scale_times_b_a(*, rank: int, alpha: float, scale: float) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    before = model.model.layers[1].self_attn.o_proj.weight.clone()
    attachment = attach(model, LoraMethod(rank=rank, alpha=alpha), seed=0)
    randomise(attachment)
    a_RI, b_OR = attachment.matrices("model.layers.1.self_attn.o_proj")
    expected = scale * (b_OR.double() @ a_RI.double())
    attachment.merge()
    moved = model.model.layers[1].self_attn.o_proj.weight.double() - before.double()
    # 1e-6: one float32 rounding of weights below 1.
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(16, 16, 1.0), (64, 16, 0.25), (16, 32, 2.0), (8, 12.5, 1.5625)])
def test_scale_is_alpha_over_rank(rank: int, alpha: float, scale: float) -> None:
    assert_merged_weight_moves_by_scale_times_b_a(rank=rank, alpha=alpha, scale=scale)


def test_the_scale_test_sees_alpha_over_the_root_of_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lora.LoraLinear.__init__

    def buggy(self, base, *, rank, scale, dropout):  # type: ignore[no-untyped-def]
        right(self, base, rank=rank, scale=scale * rank**0.5, dropout=dropout)

    monkeypatch.setattr(lora.LoraLinear, "__init__", buggy)
    with pytest.raises(AssertionError):
        assert_merged_weight_moves_by_scale_times_b_a(rank=16, alpha=16, scale=1.0)


# trap: A3
def assert_adapters_merge_or_are_refused(model: PreTrainedModel, targets: tuple[str, ...]) -> str:
    try:
        attachment = attach(model, LoraMethod(targets=targets), seed=0)
    except RecipeError as error:
        return str(error)
    randomise(attachment)
    adapted = logits(model)
    attachment.merge()
    assert (logits(model) - adapted).abs().max() <= 1e-5
    return ""


@pytest.mark.parametrize("words", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens"), ("re:.*",)])
def test_a_tied_head_and_its_embedding_are_refused(words: tuple[str, ...]) -> None:
    refused = assert_adapters_merge_or_are_refused(
        tiny_model("llama", vocab_size=VOCAB, tie_word_embeddings=True), words
    )
    if "embed_tokens" not in words:
        assert "lm_head and model.embed_tokens are one weight (tied)" in refused
    if "lm_head" not in words:
        assert "model.embed_tokens is an embedding, only linear layers can be adapted" in refused


def test_a_head_of_its_own_is_adapted_when_named() -> None:
    model = tiny_model("llama", vocab_size=VOCAB, tie_word_embeddings=False)
    assert assert_adapters_merge_or_are_refused(model, ("q_proj", "lm_head")) == ""


def test_the_tied_test_sees_a_head_adapted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "tied_reasons", lambda model, found: [])
    with pytest.raises(AssertionError):
        assert_adapters_merge_or_are_refused(
            tiny_model("llama", vocab_size=VOCAB, tie_word_embeddings=True), ("lm_head",)
        )


def test_loraplus_gives_b_its_own_rate() -> None:
    plain = attach(tiny_model("llama", vocab_size=VOCAB), LoraMethod(), seed=0)
    assert plain.rate_factors == {}
    attachment = attach(tiny_model("llama", vocab_size=VOCAB), LoraMethod(loraplus_ratio=16), seed=0)
    assert attachment.rate_factors == {name: 16.0 for name in attachment.trained if "lora_B" in name}
    backward(attachment.model, attachment)
    backward(attachment.model, attachment, seed=1)  # after one more pass A has a gradient beside B's zeros
    randomise(attachment)
    backward(attachment.model, attachment)
    before = {name: tensor.detach().clone() for name, tensor in attachment.trained.items()}
    Optimizer(attachment.trained, Optim(lr=1e-3), factors=attachment.rate_factors).step(1e-3)
    for name, tensor in attachment.trained.items():
        # AdamW's first step moves every number by its rate, whatever the gradient's size.
        length = (tensor - before[name]).abs().median().item()
        assert length == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3, rel=1e-2), name


def test_an_adapter_with_ranks_of_its_own_is_the_same_on_a_shared_base() -> None:
    model = tiny_model("llama", vocab_size=VOCAB).eval()
    attachment = attach(model, LoraMethod(rank_pattern={"mlp": 2}), seed=0)
    randomise(attachment)
    live = logits(model)
    shared = AdapterSet(model)
    shared.put("mine", taken(attachment))
    with shared.active(["mine"] * some_ids().numel()):
        assert (logits(model) - live).abs().max() <= 1e-5
