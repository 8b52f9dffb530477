"""The output layer and its loss in one node: losses and gradients of logits spelled out, and the model's own layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from often import often
from packed import CAN, OFTEN, batch_of, rows_of, sharp
from tunesmith.methods.new_token_embeddings import TokenRows
from tunesmith.models import fused_loss as output_module
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.fused_loss import OutputLayer, find_output_layer
from tunesmith.recipe.schema import Loss
from tunesmith.tasks.losses import target_losses, token_loss_sum


def layer(width: int, vocabulary: int, *, bias: bool, seed: int = 0) -> nn.Linear:
    made = nn.Linear(width, vocabulary, bias=bias).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return made


def gradients(loss: Tensor, *wanted: Tensor) -> list[Tensor]:
    """The loss, and gradients of a seventh of it: as in the loop, which divides by the targets of a step."""
    return [loss.detach(), *torch.autograd.grad(loss / 7, wanted)]


@given(
    num=st.integers(1, 12),
    vocabulary=st.integers(2, 9),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    divides=st.booleans(),
    cap=st.sampled_from([None, 2.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    z=st.sampled_from([0.0, 0.01]),
    rows=st.integers(1, 13),
)
@settings(deadline=None, max_examples=80)
def test_it_is_the_loss_of_the_logits(num, vocabulary, *, bias, scale, divides, cap, smoothing, z, rows):
    """float64, in pieces of any number of targets, against autograd through logits: 1e-5, as `target_losses` computes
    in float32."""
    generator = torch.Generator().manual_seed(num)
    made = layer(5, vocabulary, bias=bias)
    hidden = torch.randn(num, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(vocabulary, (num,), generator=generator)
    output = OutputLayer(made, scale, divides, cap)
    with pytest.MonkeyPatch.context() as patch:
        in_pieces(patch, rows, vocabulary)
        assert output.chunk_size(trained=True) == output.chunk_size(trained=False) == rows
        ours = gradients(output.loss_sum(hidden, targets, smoothing=smoothing, z=z), hidden, *made.parameters())
    spelled = target_losses(output.logits(hidden), targets, Loss(label_smoothing=smoothing, z_loss=z)).sum()
    for one, other in zip(ours, gradients(spelled, hidden, *made.parameters()), strict=True):
        torch.testing.assert_close(one, other.double(), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_formula():
    made = layer(4, 6, bias=True)
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    output = OutputLayer(made, 0.5, False, 3.0)
    assert torch.autograd.gradcheck(
        lambda h, *_: output.loss_sum(h, torch.tensor([0, 5, 2, 2, 1]), smoothing=0.2, z=0.1),
        (hidden, *made.parameters()),
    )


def in_pieces(patch: pytest.MonkeyPatch, rows: int, vocabulary: int) -> None:
    patch.setitem(output_module.CHUNK_BYTES, "cpu", rows * 4 * vocabulary)
    patch.setattr(output_module, "CHUNK_BYTES_TRAINED", 0)
    patch.setattr(output_module, "CHUNK_TARGETS", 1)


def test_a_frozen_layer_has_small_pieces_but_none_below_its_weights():
    """SmolLM2, where 16 MiB are 85 targets; of a large vocabulary 128 targets are more bytes."""
    for vocabulary, frozen, trained in ((49_152, 128, 341), (8_000, 524, 2_097), (128_256, 128, 130)):
        with torch.device("meta"):
            output = OutputLayer(torch.nn.Linear(8, vocabulary), 1.0, False, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(output_module.CHUNK_BYTES, "meta", output_module.CHUNK_BYTES["cpu"])
            assert (output.chunk_size(trained=False), output.chunk_size(trained=True)) == (frozen, trained)


def test_pieces_are_of_like_size():
    """200 targets in pieces of at most 128: the weights are read twice, each time for 100."""
    output = OutputLayer(torch.nn.Linear(8, 49_152, device="meta"), 1.0, False, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(output_module.CHUNK_BYTES, "meta", output_module.CHUNK_BYTES["cpu"])
        assert list(output.chunks(200, trained=False)) == [slice(0, 100), slice(100, 200)]
        assert list(output.chunks(128, trained=False)) == [slice(0, 128)]
        assert list(output.chunks(0, trained=False)) == []


def test_the_gradient_takes_the_memory_of_its_logits_on_a_processor():
    """Bit for bit that of a softmax beside them, in rows that are no multiple of a vector."""
    logits = 3 * torch.randn(7, 1003, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7)
    expected = torch.softmax(logits, -1)
    expected[range(7), targets] -= 1
    _, gradient = output_module._losses_and_gradient(logits, targets, smoothing=0, z=0)
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()


def answers(model, output: OutputLayer | None) -> list[Tensor]:
    model.zero_grad()
    batch = batch_of(rows_of())
    loss = token_loss_sum(model, batch, Loss(label_smoothing=0.1), output)
    (loss / batch.num_targets).backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters())]


@pytest.mark.parametrize("arch", often(CAN, *OFTEN, "cohere"))
def test_every_model_has_a_known_output_layer_and_learns_alike(arch, monkeypatch):
    """gemma2 with its cap, cohere and granite with their scales. float32, in pieces of 7 targets: rounding of sums in
    another order."""
    settings = {"cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 3.0}}.get(arch, {})
    model = sharp(arch, **settings)
    output = find_output_layer(model)
    assert (output.cap is not None) == (arch == "gemma2")
    assert (output.scale != 1) == (arch in ("cohere", "granite"))
    use_packed_attention(model)
    in_pieces(monkeypatch, 7, output.layer.weight.shape[0])
    for one, other in zip(answers(model, output), answers(model, None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 + 1e-5 * float(other.abs().max()))


def test_bfloat16_gradients_are_as_near_to_the_truth_as_the_models_own():
    """Distance of all gradients together to those of float32; the factor of the loss must not be rounded."""
    model = sharp("llama").bfloat16()
    use_packed_attention(model)
    output = find_output_layer(model)
    assert output is not None
    found = [answers(model, one) for one in (output, None)]
    truth = answers(model.float(), None)
    ours, plain = (
        torch.cat([(a.float() - b).flatten() / b.norm() for a, b in zip(some[1:], truth[1:], strict=True)]).norm()
        for some in found
    )
    assert ours < 1.3 * plain


@pytest.mark.parametrize("shape", [(1,), (33, 7)])
def test_the_factor_of_a_gradient_is_not_rounded(shape):
    """What torch does with one number on a processor is what the general way does, bit for bit."""
    saved = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    factor = torch.tensor(1 / 237)
    assert torch.equal(output_module._times(saved, factor), (saved.float() * factor).bfloat16())
    assert factor.bfloat16() != factor


@pytest.mark.parametrize("targets", [[], [3]])
def test_a_frozen_layer_and_few_targets(targets):
    made = layer(4, 6, bias=False).requires_grad_(False)
    hidden = torch.zeros(len(targets), 4, dtype=torch.float64).requires_grad_()
    loss = OutputLayer(made, 1.0, False, None).loss_sum(
        hidden, torch.tensor(targets, dtype=torch.int64), smoothing=0.0, z=0.0
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(len(targets) * float(torch.tensor(6.0).log()))
    assert hidden.grad is not None
    assert made.weight.grad is None


def test_an_output_layer_that_does_more_is_left_to_the_model(monkeypatch):
    """Planted: logits that are shifted after the layer, and a scale by another name."""
    model = sharp("llama")
    real = type(model).forward

    def shifted(self, *args, **how):
        out = real(self, *args, **how)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    assert find_output_layer(model) is None


def test_an_output_layer_with_a_forward_of_its_own_is_left_to_it():
    """Rows of new tokens are trained so: a node around the layer would take their gradients away without a word."""
    model = sharp("llama", tie_word_embeddings=False)
    assert find_output_layer(model) is not None
    rows = TokenRows(model, [3, 5])
    assert find_output_layer(model) is None
    rows.unload()
    assert find_output_layer(model) is not None
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: 2 * out)
    assert find_output_layer(model) is None


def test_a_model_without_a_base_of_its_own_computes_its_logits_itself(monkeypatch):
    """Llama 4 keeps it by another name than its class says."""
    model = sharp("llama")
    assert find_output_layer(model) is not None
    monkeypatch.setattr(type(model), "base_model_prefix", "language_model")
    assert find_output_layer(model) is None


def test_the_test_catches_a_cap_that_is_forgotten_in_the_backward(monkeypatch):
    monkeypatch.setattr(output_module, "_before_scale", lambda glogits_NV, logits_NV, output: glogits_NV)
    with pytest.raises(AssertionError):
        test_it_is_the_loss_of_the_logits.hypothesis.inner_test(
            3, 5, bias=False, scale=1.0, divides=False, cap=2.0, smoothing=0.0, z=0.0, rows=2
        )
