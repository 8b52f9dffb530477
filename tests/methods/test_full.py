"""Full fine-tuning keeps float32 masters and frees what it can."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_model import tiny_model
from tunesmith.errors import ModelError
from tunesmith.methods.full import attach, load_result
from tunesmith.recipe.methods import FullMethod

VOCAB = 61


class OneWeight(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.clone())


class InBfloat16:
    """The planted bug: what is trained is the bfloat16 weight itself."""

    def __init__(self, model: nn.Module) -> None:
        self.trained: Mapping[str, Tensor] = dict(model.named_parameters())

    def collect_gradients(self) -> None: ...

    def publish(self) -> None: ...


def with_masters(model: nn.Module):  # type: ignore[no-untyped-def]
    return attach(model, FullMethod(), seed=0)


# trap: L9
def assert_a_thousand_small_steps_arrive(attach_to: Callable) -> None:  # type: ignore[type-arg]
    model = OneWeight(torch.ones(1, dtype=torch.bfloat16))
    attachment = attach_to(model)
    start = attachment.trained["weight"].item()  # a master begins anywhere that bfloat16 rounds to 1.0
    optimizer = torch.optim.SGD(attachment.trained.values(), lr=1e-3)
    for _ in range(1000):
        model.weight.sum().backward()
        attachment.collect_gradients()
        optimizer.step()
        optimizer.zero_grad()
        attachment.publish()
    # 1000 · 1e-3; float32 rounds each of the thousand by at most 3e-8.
    assert start == pytest.approx(1.0, abs=2**-8)
    assert attachment.trained["weight"].item() == pytest.approx(start - 1.0, abs=1e-4)
    assert model.weight.item() == pytest.approx(start - 1.0, abs=1e-4)


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    """Each by itself, in a run: test_training.py; with every optimizer: test_optimizers.py."""
    assert_a_thousand_small_steps_arrive(with_masters)


def test_the_tests_see_weights_trained_in_bfloat16() -> None:
    with pytest.raises(AssertionError):
        assert_a_thousand_small_steps_arrive(InBfloat16)


def backward(model: nn.Module, seed: int = 0) -> None:
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()


def test_bfloat16_gradients_are_freed_inside_the_backward() -> None:
    """Before the last gradient is made the first one is gone: never do all of them exist twice."""
    model = tiny_model("llama", vocab_size=VOCAB, dtype=torch.bfloat16)
    attachment = attach(model, FullMethod(), seed=0)
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in model.parameters()))
        )
    backward(model)
    assert len(alive) == len(attachment.trained)
    assert max(alive) == 0
    assert all(tensor.grad is not None for tensor in attachment.trained.values())


def test_tied_embeddings_are_trained_once() -> None:
    model = tiny_model("llama", vocab_size=VOCAB, tie_word_embeddings=True, dtype=torch.bfloat16)
    attachment = attach(model, FullMethod(), seed=0)
    assert "lm_head.weight" not in attachment.trained
    backward(model)
    attachment.trained["model.embed_tokens.weight"].data.add_(1.0)
    attachment.publish()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, attachment.trained["model.embed_tokens.weight"].bfloat16())


def test_a_float32_model_is_its_own_master() -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    attachment = attach(model, FullMethod(), seed=0)
    assert all(attachment.trained[name] is parameter for name, parameter in model.named_parameters())


def test_taken_off_the_model_keeps_its_own_gradients() -> None:
    model = tiny_model("llama", vocab_size=VOCAB, dtype=torch.bfloat16)
    attach(model, FullMethod(), seed=0).unload()
    backward(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_folder_that_does_not_fit_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=VOCAB, layers=3).save_pretrained(tmp_path / "deeper")
    tiny_model("llama", vocab_size=VOCAB, layers=1).save_pretrained(tmp_path / "flatter")
    model = tiny_model("llama", vocab_size=VOCAB, seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("deeper", "flatter", "absent"):
        with pytest.raises(ModelError, match=name):
            load_result(model, tmp_path / name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
