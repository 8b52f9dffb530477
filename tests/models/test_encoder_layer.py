"""A layer of an encoder in one node is the model's own layer: result and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packed import VOCAB, rows_of
from tiny_model import tiny_model
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.models import encoder_kinds, grouped
from tunesmith.models.activations import ACTIVATIONS
from tunesmith.models.attention import ragged_pass, use_ragged
from tunesmith.models.checkpointing import checkpoint_layers
from tunesmith.models.encoder_kinds import use_fast_layers
from tunesmith.models.encoder_layer import How, Packed, encoder_layer
from tunesmith.models.segments import Segments

KNOWN = ("bert", "roberta", "electra", "distilbert")
LENGTHS = (23, 11, 11, 7, 4, 1)


@pytest.fixture
def nodes(monkeypatch) -> list[int]:
    """Grows with every layer that is computed as one node, in whatever precision."""
    calls: list[int] = []
    own = encoder_kinds.encoder_layer
    monkeypatch.setattr(grouped, "can", lambda *args, **how: True)
    monkeypatch.setattr(encoder_kinds, "encoder_layer", lambda *args: (calls.append(1), own(*args))[1])
    return calls


def tiny_encoder(arch: str, **settings) -> nn.Module:
    return tiny_model(arch, vocab_size=VOCAB, head="masked_token", **settings)


def wide_encoder(arch: str, **settings) -> nn.Module:
    model = tiny_encoder(arch, initializer_range=0.3, **settings).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    use_ragged(model)
    return model


def hidden(model: nn.Module) -> Tensor:
    """[1, T, H] of a packed batch."""
    ids = torch.cat([torch.from_numpy(row.ids).long() for row in rows_of(LENGTHS)])[None]
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None] + 2
    with ragged_pass():
        out = model.base_model(input_ids=ids, position_ids=places, segments=Segments.of(LENGTHS, device=ids.device))
    return out.last_hidden_state


def answers(model: nn.Module) -> dict[str, Tensor | None]:
    """The states, and the gradient of every weight of the layers."""
    model.zero_grad()
    states = hidden(model)
    torch.manual_seed(1)
    (states * torch.randn_like(states)).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if "layer" in name}
    return {"states": states.detach(), **grads}


def same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], *, tolerance: float) -> None:
    largest = max(float(tensor.norm()) for tensor in expected.values() if tensor is not None)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other is None) == (tensor is None), name
        if tensor is not None and other is not None:
            # The gradient of the keys' bias is zero but for rounding.
            assert float((other - tensor).norm()) <= tolerance * (float(tensor.norm()) + 1e-3 * largest), name


@pytest.mark.parametrize("arch", KNOWN)
def test_a_model_answers_and_learns_alike(arch, nodes):
    model = wide_encoder(arch)
    expected = answers(copy.deepcopy(model))
    assert nodes == []
    assert use_fast_layers(model) == 2
    nodes.clear()
    same(answers(model), expected, tolerance=1e-9)
    assert len(nodes) == 2


def test_parts_of_a_layer_may_be_frozen(nodes):
    model = wide_encoder("bert")
    for name, weight in model.named_parameters():
        weight.requires_grad_(
            "layer.1" in name and name.endswith(("key.weight", "value.bias", "output.LayerNorm.bias"))
        )
    expected = answers(copy.deepcopy(model))
    use_fast_layers(model)
    same(answers(model), expected, tolerance=1e-9)
    assert sum(tensor is not None for tensor in expected.values()) == 5  # the states, and four weights


@torch.no_grad()
def test_in_bfloat16_it_is_as_close_as_the_models_own(nodes):
    """To the same weights in float64."""
    model = wide_encoder("bert").bfloat16()
    exact = hidden(copy.deepcopy(model).double())
    own = float((hidden(model).double() - exact).norm())
    use_fast_layers(model)
    assert 0 < float((hidden(model).double() - exact).norm()) < 1.1 * own


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.3, 0.2, 0.1), (0.0, 0.0, 0.4)])
def test_gradients_are_those_of_the_function_it_computes(activation, dropouts):
    """By differences, every mask of dropout drawn alike each time."""
    segments = Segments.of((3, 2, 1), device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, wide = drawn(1, 6, 4), 6
    shapes = [(4, 4)] * 4 + [(wide, 4), (4, wide)]
    linears = [tensor for rows, columns in shapes for tensor in (drawn(rows, columns), drawn(rows))]
    how = How(Packed.of(segments, 2, like=x.detach()), 0.7, dropouts, (1e-5, 1e-3), activation)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(3)
        return encoder_layer(x, how, weights)

    assert torch.autograd.gradcheck(layer, (x, *linears, *(drawn(4) for _ in range(4))))


def test_a_recomputed_layer_is_the_same(nodes):
    """Dropout among it, bit for bit."""
    model = wide_encoder("bert", dropout=0.1).train()
    use_fast_layers(model)
    found = []
    for num in (0, 2):
        checkpoint_layers(model, num)
        torch.manual_seed(5)
        found.append(answers(model))
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


@pytest.mark.parametrize("arch", ["deberta-v2", "modernbert", "mpnet"])
def test_other_layers_stay_their_own(arch):
    model = tiny_encoder(arch)
    use_ragged(model)
    assert use_fast_layers(model) == 0


@pytest.mark.parametrize("settings", [{"hidden_act": "quick_gelu"}, {"is_decoder": True}])
def test_a_bert_of_another_kind_stays_its_own(settings):
    model = tiny_encoder("bert", **settings)
    use_ragged(model)
    assert use_fast_layers(model) == 0


def test_what_changes_later_goes_the_models_own_way(nodes):
    model = wide_encoder("bert")
    use_fast_layers(model)
    expected = hidden(model)
    first, second = model.base_model.encoder.layer
    heard: list[int] = []
    first.intermediate.dense.register_forward_hook(lambda *_: heard.append(1))
    attention = second.attention.self
    attention.query = LoraLinear(attention.query, rank=2, scale=1.0, dropout=0.0)  # whose B is zero
    nodes.clear()
    torch.testing.assert_close(hidden(model), expected)
    assert (nodes, heard) == ([], [1])


def test_padded_batches_go_the_models_own_way(nodes):
    model = wide_encoder("bert")
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    expected = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    use_fast_layers(model)
    nodes.clear()
    assert torch.equal(model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    assert nodes == []


def test_long_rows_go_the_models_own_way(nodes, monkeypatch):
    monkeypatch.setattr(grouped, "LONGEST", 16)
    model = wide_encoder("bert")
    use_fast_layers(model)
    nodes.clear()
    hidden(model)
    assert nodes == []


def test_an_activation_is_the_modules_own():
    g = torch.linspace(-4, 4, 33, dtype=torch.float64).requires_grad_()
    for activation, own in zip(
        ACTIVATIONS, (F.silu, lambda x: F.gelu(x, approximate="tanh"), F.gelu, F.relu), strict=True
    ):
        (expected,) = torch.autograd.grad(own(g).sum(), g)
        torch.testing.assert_close(activation.backward(torch.ones_like(g), g.detach()), expected)
        torch.testing.assert_close(activation.value(g), own(g))
