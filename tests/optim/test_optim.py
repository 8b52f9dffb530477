"""The rate of every step, what decays, clipping, and AdamW's kernels; optimizers one by one: test_optimizers.py."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from often import often
from tiny_model import SETTINGS, tiny_model
from tiny_run import tiny_recipe
from tunesmith.optim import SCHEDULES, Optimizer, clip_divisor, gradient_norm, rate, warmup_steps
from tunesmith.optim.optimizers import LARGE_TENSOR, PIECE, decays
from tunesmith.recipe.schema import Optim
from tunesmith.training.setup import prepare

Rate = Callable[[int, int, Optim], float]


# trap: L12
def assert_rates_are_the_documented_ones(rate: Rate) -> None:
    optim = Optim(lr=1e-3, schedule="linear", warmup=10)
    assert rate(1, 100, optim) == 1e-4
    assert rate(2, 100, optim) == 2e-4
    assert rate(10, 100, optim) == 1e-3
    assert rate(11, 100, optim) == 1e-3
    assert rate(38, 100, optim) == 7e-4  # what a run resumed after step 37 uses next
    assert rate(100, 100, optim) == pytest.approx(1e-3 / 90, rel=1e-12)


def test_rates_are_the_documented_ones() -> None:
    assert_rates_are_the_documented_ones(rate)


@pytest.mark.parametrize(
    "buggy",
    [
        lambda step, total, optim: rate(step - 1, total, optim) if step > 1 else 0.0,  # counted from 0
        lambda step, total, optim: rate(min(2 * step, total), total, optim),  # stepped twice
        lambda step, total, optim: rate(step - 37 if step > 37 else step, total, optim),  # warmed up again
    ],
    ids=["off by one", "double", "warmed up again"],
)
def test_the_rate_test_sees_a_shifted_schedule(buggy: Rate) -> None:
    with pytest.raises(AssertionError):
        assert_rates_are_the_documented_ones(buggy)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_every_step_of_six_with_two_of_warmup(schedule: str, rates: list[float]) -> None:
    optim = Optim(lr=1.0, schedule=schedule, warmup=2)
    assert [rate(step, 6, optim) for step in range(1, 7)] == pytest.approx(rates, rel=1e-15)


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (0, 100, 0),
        (0.05, 100, 5),
        (0.07, 100, 7),
        (0.05, 9, 0),
        (0.05, 10, 1),
        (0.05, 30, 2),
        (1, 100, 1),
        (30, 10, 30),
    ],
)
def test_warmup_is_a_share_or_a_number(warmup: float, total: int, steps: int) -> None:
    assert warmup_steps(total, Optim(warmup=warmup)) == steps


@given(
    total=st.integers(1, 400),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 500)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
def test_no_step_is_wasted_and_none_overshoots(total: int, warmup: float, schedule: str) -> None:
    optim = Optim(lr=3e-4, schedule=schedule, warmup=warmup)
    rates = [rate(step, total, optim) for step in range(1, total + 1)]
    warm = min(warmup_steps(total, optim), total)
    assert all(0 < one <= 3e-4 for one in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)


@pytest.mark.parametrize("step", [0, 11, -1])
def test_a_step_outside_the_run_has_no_rate(step: int) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        rate(step, 10, Optim(lr=1e-3))


@pytest.mark.parametrize("arch", often(sorted(SETTINGS), "llama", "gpt2", "bloom"))
def test_embeddings_norms_and_biases_do_not_decay_in_any_family(arch: str) -> None:
    model = tiny_model(arch, vocab_size=32)
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        assert decays(name, parameter) == (parameter.ndim > 1 and name not in embeddings), name


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", True),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", True),
        ("embed_out.weight", True),
        ("encoder.embedding_hidden_mapping_in.weight", True),
        ("embeddings.token_type_embeddings.weight", False),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", False),
        ("shared.weight", False),
        ("lm_head.modules_to_save.default.weight", True),
        ("base_model.model.model.embed_tokens.modules_to_save.default.weight", False),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", False),
        ("lm_head.token_adapter.trainable_tokens_delta", False),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default", False),
        ("base_model.model.model.embed_tokens.trainable_tokens_delta.default", False),
    ],
)
def test_decay_by_name(name: str, decay: bool) -> None:
    assert decays(name, torch.zeros(2, 2)) is decay


# trap: L16
def assert_rows_of_new_tokens_do_not_decay(tmp_path: Path) -> None:
    """In a run of LoRA with a new token: an update without a gradient leaves its rows as they are."""
    recipe = tiny_recipe(tmp_path, data={"new_tokens": ["quick brown"]}, optim={"weight_decay": 0.5})
    setup = prepare(recipe, root=tmp_path)
    rows = {name: tensor for name, tensor in setup.attachment.trained.items() if "token_adapter" in name}
    before = {name: tensor.detach().clone() for name, tensor in rows.items()}
    for tensor in setup.attachment.trained.values():
        tensor.grad = torch.zeros_like(tensor)
    setup.optimizer.step(0.1)
    assert len(rows) == 2
    assert all(torch.equal(rows[name], before[name]) for name in rows)


def test_rows_of_new_tokens_do_not_decay(tmp_path: Path) -> None:
    assert_rows_of_new_tokens_do_not_decay(tmp_path)


def test_decay_by_the_name_of_whole_embeddings_alone_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: L16 planted
    monkeypatch.setattr("tunesmith.optim.optimizers.is_embedding", lambda name: name.endswith("embed_tokens.weight"))
    with pytest.raises(AssertionError):
        assert_rows_of_new_tokens_do_not_decay(tmp_path)


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"embed_tokens.weight": (7, 3), "a.weight": (5, 3), "norm.weight": (3,), "a.bias": (5,)}
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def give_gradients(tensors: dict[str, Tensor], step: int, *, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator) * scale


def test_the_kernel_is_fused_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Optimizer(some_tensors(), Optim(lr=1e-3))
    assert update.parts[0][2].defaults["fused"] is True
    monkeypatch.setattr("tunesmith.optim.optimizers.FUSED_DEVICES", ())
    elsewhere = Optimizer(some_tensors(), Optim(lr=1e-3))
    assert elsewhere.parts[0][2].defaults["fused"] is False


def test_the_norm_is_that_of_all_gradients_together() -> None:
    tensors = some_tensors()
    give_gradients(tensors, 1, scale=100.0)
    together = torch.cat([tensor.grad.flatten() for tensor in tensors.values()]).double()
    assert gradient_norm(tensors.values()) == pytest.approx(together.norm().item(), rel=1e-6)
    assert gradient_norm([torch.zeros(3)]) == 0.0


def test_the_norm_of_large_gradients_is_exact_and_the_same_again() -> None:
    drawn = torch.Generator().manual_seed(0)
    sizes = (PIECE + 7, LARGE_TENSOR, LARGE_TENSOR - 1)
    tensors = [torch.zeros(size) for size in sizes]
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=drawn)
    transposed = torch.zeros(300, 400)
    transposed.grad = torch.randn(400, 300, generator=drawn).t()
    tensors.append(transposed)
    exact = torch.cat([tensor.grad.double().flatten() for tensor in tensors]).norm().item()
    norm = gradient_norm(tensors)
    # Float32 adds up a million squares in some dozens of sums: 4e-7 was seen on a Xeon, 4e-6 on an EPYC.
    assert norm == pytest.approx(exact, rel=6e-6)
    for tensor in tensors:
        tensor.grad = tensor.grad.clone()
    assert gradient_norm(tensors) == norm


@pytest.mark.parametrize("size", [3, LARGE_TENSOR])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_told(value: float, size: int) -> None:
    tensor = torch.zeros(size)
    tensor.grad = torch.ones(size)
    tensor.grad[2] = value
    assert not math.isfinite(gradient_norm([torch.zeros(3), tensor]))


def test_gradients_are_divided_where_their_norm_is_too_large() -> None:
    assert clip_divisor(5.0, 2.0) == 2.5
    assert (clip_divisor(1.9, 2.0), clip_divisor(2.0, 2.0), clip_divisor(1e9, None)) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("divisor", [1.0, 0.125, 8.0])
def test_dividing_within_the_kernel_is_dividing_before(name: str, divisor: float) -> None:
    """Powers of two, so that no bit differs; three steps, so that one division would be seen in the next."""
    folded, before = some_tensors(), some_tensors()
    one, other = Optimizer(folded, Optim(name=name, lr=1e-3)), Optimizer(before, Optim(name=name, lr=1e-3))
    for step in range(1, 4):
        shrink = divisor if step == 2 else 1.0
        give_gradients(folded, step)
        give_gradients(before, step, scale=1 / shrink)
        one.step(1e-2, divisor=shrink)
        other.step(1e-2)
    for key in folded:
        assert torch.equal(folded[key], before[key])


def test_the_test_catches_a_divisor_that_is_left_out() -> None:
    tensors, before = some_tensors(), some_tensors()
    for some, scale in ((tensors, 1.0), (before, 0.125)):
        update = Optimizer(some, Optim(lr=1e-3))
        for step in (1, 2):  # a first update of AdamW is the same whatever the size of its gradient
            give_gradients(some, step, scale=scale if step == 2 else 1.0)
            update.step(1e-2)
    assert not torch.equal(tensors["a.weight"], before["a.weight"])


def run(update: Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(update.trained, step)
        update.step(1e-2)


def test_saved_and_loaded_the_plain_kernel_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused one, and every other optimizer, in test_optimizers.py; this one keeps its step on the CPU."""
    monkeypatch.setattr("tunesmith.optim.optimizers.FUSED_DEVICES", ())
    optim = Optim(lr=1e-2, weight_decay=0.1)
    whole, half = Optimizer(some_tensors(), optim), Optimizer(some_tensors(), optim)
    run(whole, range(6))
    run(half, range(3))
    state = save({name: tensor.clone() for name, tensor in half.state().items()})
    later = Optimizer({name: t.detach().clone().requires_grad_() for name, t in half.trained.items()}, optim)
    later.load(load(state))
    run(later, range(3, 6))
    assert all(torch.equal(later.trained[name], tensor) for name, tensor in whole.trained.items())


def test_state_is_named_by_what_is_trained() -> None:
    update = Optimizer(some_tensors(), Optim(lr=1e-2))
    give_gradients(update.trained, 0)
    update.trained["a.bias"].grad = None
    update.step(1e-2)
    assert sorted(update.state()) == sorted(
        f"{name}/{key}"
        for name in ("embed_tokens.weight", "a.weight", "norm.weight")
        for key in ("step", "exp_avg", "exp_avg_sq")
    )
