"""Which weights of a base are quantised, what is said of it, and that nothing is ever merged into them."""

import re

import pytest
import torch
from torch import Tensor, nn

from tiny_model import tiny_model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods import METHODS
from tunesmith.methods.lora import LoraAttachment
from tunesmith.methods.qlora import quantize_base
from tunesmith.models.quantized import QuantizedLinear
from tunesmith.phrases import size
from tunesmith.recipe.methods import QloraMethod


def base(arch: str = "llama", **settings: object) -> tuple[nn.Module, tuple[str, ...]]:
    model = tiny_model(arch, vocab_size=512)
    return model, quantize_base(model, QloraMethod(rank=4, **settings), device="cpu")


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def test_the_linear_layers_of_the_layers_are_packed_and_nothing_else() -> None:
    model, _ = base()
    ends = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    assert packed_names(model) == [f"model.layers.{i}.{end}" for i in range(2) for end in ends]
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
def test_other_families_are_packed_whole(arch: str) -> None:
    model, _ = base(arch)
    inside = [n for n, p in model.named_parameters() if re.search(r"\.\d+\..*weight$", n) and p.ndim > 1]
    assert packed_names(model)
    assert [name for name in inside if "relative_attention_bias" not in name] == []


def test_what_is_packed_is_said() -> None:
    before = sum(p.numel() * 4 for n, p in tiny_model(vocab_size=512).named_parameters() if "_proj" in n)
    model, notes = base()
    after = sum(layer.num_bytes for layer in model.modules() if isinstance(layer, QuantizedLinear))
    assert notes == (
        f"the base is quantised to nf4 with scales in 8 bits: 14 linear layers, {size(before)} become {size(after)}",
    )


def test_what_is_trained_whole_is_not_packed() -> None:
    model, _ = base(also_train=("re:1.mlp.down_proj$",), targets=("attention",))
    assert "model.layers.1.mlp.down_proj" not in packed_names(model)
    assert "model.layers.0.mlp.down_proj" in packed_names(model)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_computes_in_its_own_way_is_left_and_said() -> None:
    model = tiny_model(vocab_size=512)
    model.model.layers[0].mlp.up_proj = _Doubled(64, 128, bias=False)
    notes = quantize_base(model, QloraMethod(), device="cpu")
    assert "model.layers.0.mlp.up_proj" not in packed_names(model)
    assert notes[1] == "1 linear layers are not quantised: they compute in their own way, or share a weight"


def test_a_model_without_layers_to_pack_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"method.name: qlora: .* Use method: lora"):
        quantize_base(nn.Sequential(nn.LayerNorm(4)), QloraMethod(), device="cpu")


def tuned(attachment: LoraAttachment) -> LoraAttachment:
    for name, tensor in attachment.trained.items():
        if name.endswith("lora_B.weight"):
            tensor.data.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
    attachment.publish()
    return attachment


def test_nothing_is_merged_into_quantised_weights() -> None:
    model, _ = base()
    attachment = tuned(METHODS["qlora"].attach(model, QloraMethod(rank=4), seed=0))
    with pytest.raises(ModelError, match=r"its weight is quantised.*export RUN --to merged"):
        attachment.merge()
    assert attachment.layers


# trap: A2
def assert_a_merge_keeps_the_delta(into_quantised: bool) -> None:
    model = tiny_model(vocab_size=512)
    settings = QloraMethod(rank=4)
    if into_quantised:
        METHODS["qlora"].prepare_base(model, settings, device="cpu")
    attachment = tuned(METHODS["qlora"].attach(model, settings, seed=0))
    name, layer = next(iter(attachment.layers.items()))
    before = layer.weight_OI.clone()
    merged = attachment.merged(name, layer).detach()
    if into_quantised:  # the planted bug
        again = nn.Linear(*layer.base.shape_OI[::-1], bias=False)
        again.weight.data.copy_(merged)
        merged = QuantizedLinear(again, device="cpu").weight
    a_RI, b_OR = attachment.matrices(name)
    delta = (b_OR @ a_RI * layer.scale).detach()
    assert (merged - before - delta).norm() <= 1e-3 * delta.norm()


def test_a_merge_keeps_the_delta() -> None:
    assert_a_merge_keeps_the_delta(into_quantised=False)


def test_the_test_sees_a_delta_that_rounding_ate() -> None:
    with pytest.raises(AssertionError):
        assert_a_merge_keeps_the_delta(into_quantised=True)
