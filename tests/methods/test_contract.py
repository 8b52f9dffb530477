"""What holds for every method."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.errors import CheckpointError
from tunesmith.methods import METHODS, Method, restore
from tunesmith.models.load import load_tokenizer
from tunesmith.models.locate import locate
from tunesmith.optim import Update
from tunesmith.recipe.knobs import FullMethod, LoraMethod, Optim, Section
from tunesmith.types import Attachment, Labels

VOCAB = 512
SETTINGS: dict[str, Section] = {"lora": LoraMethod(rank=4), "full": FullMethod()}
FAMILIES = ["llama", "gpt2", "bert", "qwen2 sequence", "t5"]
"""BERT is taken with a head that answers about a text, qwen2 with one too."""
DTYPES = [torch.float32, torch.bfloat16]

both = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
families = pytest.mark.parametrize("arch", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def made(arch: str, **how: Any) -> PreTrainedModel:
    name = arch.partition(" ")[0]
    if name not in ("bert", "qwen2"):
        return tiny_model(name, vocab_size=VOCAB, **how)
    labels = Labels("one", ("a", "b", "c"))
    return tiny_model(name, vocab_size=VOCAB, head="sequence", labels=labels, pad_token_id=0, **how)


def answers(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    decoder = {"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=ids_BT, **decoder).logits
    return logits


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return answers(model, ids)


def loss_of(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    found = answers(model, ids_BT).float()
    if found.ndim == 2:
        return F.cross_entropy(found, ids_BT[:, 1] % found.shape[1])
    return F.cross_entropy(found[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def train(model: PreTrainedModel, attachment: Attachment, *, steps: int = 3) -> None:
    update = Update(attachment.trained, Optim(lr=1e-2))
    for step in range(steps):
        ids = torch.randint(1, VOCAB, (8, 64), generator=torch.Generator().manual_seed(step))
        ids[:, 0] = torch.arange(8) + 64 * step + 1
        loss_of(model, ids).backward()
        attachment.collect_gradients()
        update.step(1e-2)
        attachment.publish()


def computing(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor the model computes with, by name, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_every_method_has_a_contract() -> None:
    assert list(SETTINGS) == list(METHODS)
    assert all(name == method.name and method.doc for name, method in METHODS.items())


@both
@families
@dtypes
def test_fresh_it_changes_nothing_bitwise(method: Method, arch: str, dtype: torch.dtype) -> None:
    model = made(arch, dtype=dtype).eval()
    before = logits(model)
    method.attach(model, SETTINGS[method.name], seed=0)
    assert torch.equal(logits(model), before)


@both
@dtypes
def test_what_is_trained_is_float32_leaves_in_a_stable_order(method: Method, dtype: torch.dtype) -> None:
    first, second = (
        method.attach(tiny_model("llama", vocab_size=VOCAB, dtype=dtype), SETTINGS[method.name], seed=0)
        for _ in range(2)
    )
    assert first.method == method.name
    assert list(first.trained) == list(second.trained)
    for name, tensor in first.trained.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_leaf
        assert tensor.requires_grad
        assert torch.equal(tensor, second.trained[name])


# trap: A15
def assert_the_named_move_and_nothing_else(model: nn.Module, attachment: Attachment) -> None:
    trained = {name: tensor.detach().clone() for name, tensor in attachment.trained.items()}
    inside = computing(model)
    train(model, attachment)
    still = [name for name, tensor in attachment.trained.items() if torch.equal(tensor, trained[name])]
    assert still == []
    # Inside the model a wrapped layer's own weight is called <layer>.base.weight, its matrices <layer>.lora_A.
    allowed = {name.removesuffix(".weight") if ".lora_" in name else name for name in trained}
    names = dict(model.named_parameters(remove_duplicate=False))
    tied = {name for name, weight in names.items() if any(weight is names.get(other) for other in allowed)}
    moved = {name for name, tensor in computing(model).items() if not torch.equal(tensor, inside[name])}
    assert allowed <= moved <= allowed | tied


@both
@families
@dtypes
def test_the_named_tensors_move_and_nothing_else(method: Method, arch: str, dtype: torch.dtype) -> None:
    model = made(arch, dtype=dtype, layers=1)
    attachment = method.attach(model, SETTINGS[method.name], seed=0)
    assert_the_named_move_and_nothing_else(model, attachment)


def test_the_test_sees_a_base_that_moves_too() -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    attachment = METHODS["lora"].attach(model, SETTINGS["lora"], seed=0)
    right = attachment.publish

    def buggy() -> None:
        right()
        model.model.norm.weight.data.mul_(1.001)

    attachment.publish = buggy  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        assert_the_named_move_and_nothing_else(model, attachment)


def test_the_test_sees_a_tensor_that_stays() -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    attachment = METHODS["lora"].attach(model, SETTINGS["lora"], seed=0)
    right, first = attachment.collect_gradients, next(iter(attachment.trained.values()))

    def buggy() -> None:
        right()
        first.grad = None

    attachment.collect_gradients = buggy  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        assert_the_named_move_and_nothing_else(model, attachment)


@both
@dtypes
def test_training_lowers_the_loss_on_what_was_seen(method: Method, dtype: torch.dtype) -> None:
    model = tiny_model("llama", vocab_size=VOCAB, dtype=dtype)
    attachment = method.attach(model, SETTINGS[method.name], seed=0)
    ids = torch.arange(16)[None]
    losses = []
    update = Update(attachment.trained, Optim(lr=1e-2))
    for _ in range(20):
        loss = F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:])
        losses.append(loss.item())
        loss.backward()
        attachment.collect_gradients()
        update.step(1e-2)
        attachment.publish()
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.5)  # a random model guesses
    assert losses[-1] < losses[0] - 0.5


@both
@dtypes
def test_restored_it_goes_on_bit_for_bit(method: Method, dtype: torch.dtype) -> None:
    model = tiny_model("llama", vocab_size=VOCAB, dtype=dtype).eval()
    attachment = method.attach(model, SETTINGS[method.name], seed=0)
    train(model, attachment)
    saved = {name: tensor.detach().clone() for name, tensor in attachment.trained.items()}
    again = tiny_model("llama", vocab_size=VOCAB, dtype=dtype).eval()
    fresh = method.attach(again, SETTINGS[method.name], seed=1)
    restore(fresh, saved)
    assert all(torch.equal(fresh.trained[name], tensor) for name, tensor in saved.items())
    assert torch.equal(logits(again), logits(model))


@both
def test_what_does_not_fit_is_not_restored(method: Method) -> None:
    attachment = method.attach(tiny_model("llama", vocab_size=VOCAB), SETTINGS[method.name], seed=0)
    saved = {name: tensor.detach().clone() + 1 for name, tensor in attachment.trained.items()}
    first = next(iter(saved))
    before = attachment.trained[first].detach().clone()
    for harm in (
        {name: tensor for name, tensor in saved.items() if name != first},
        {**saved, "x": torch.zeros(1)},
        {**saved, first: saved[first][:1]},
        {**saved, first: saved[first].bfloat16()},
    ):
        with pytest.raises(CheckpointError, match=r"^weights: "):
            restore(attachment, harm)
        assert torch.equal(attachment.trained[first], before)


@both
@families
@dtypes
def test_the_saved_result_computes_the_same(method: Method, arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(arch, dtype=dtype).eval()
    untouched = copy.deepcopy(model)
    attachment = method.attach(model, SETTINGS[method.name], seed=0)
    train(model, attachment)
    base = tmp_path / "base"
    untouched.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    located = locate(str(base))
    renderer = SimpleNamespace(tokenizer=load_tokenizer(located, None), stop_ids=(2,))
    method.save_result(attachment, tmp_path / "result", model=model, renderer=renderer, located=located)
    method.load_result(untouched, tmp_path / "result")
    assert torch.equal(logits(untouched), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "result").chat_template == tiny_tokenizer().chat_template
