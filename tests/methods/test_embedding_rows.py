"""Full tuning of an embedding by the rows that can learn: held to full tuning of all of it, bit for bit."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_model import tiny_model
from tiny_run import tiny_recipe
from tunesmith.errors import ModelError, Stopped
from tunesmith.inference.load import load_run
from tunesmith.methods.full import attach
from tunesmith.methods.new_token_embeddings import sole_embedding
from tunesmith.optim import OPTIMIZERS, Optimizer
from tunesmith.recipe.methods import FullMethod
from tunesmith.recipe.schema import Optim
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import runs
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import Listener, train
from tunesmith.types import Labels

VOCAB, PADDING = 64, 0
SEEN = (PADDING, 3, 7, 8, 21, 40, 63)


def made(arch: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    head: dict[str, Any] = {"tie_word_embeddings": False}
    if arch != "llama":
        head = {"head": "sequence", "labels": Labels("one", ("a", "b", "c")), "pad_token_id": PADDING}
    return tiny_model(arch, vocab_size=VOCAB, dtype=dtype, **head)


def passes(num: int) -> list[Tensor]:
    """Of tokens that are SEEN, among them the one that pads, in all but the first column."""
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.tensor(SEEN)[torch.randint(0, len(SEEN), (3, 9), generator=draw)] for _ in range(num)]
    return [torch.where(torch.arange(9) == 0, 7, ids) for ids in drawn]


def tuned(model: PreTrainedModel, tokens: Sequence[int] | None, *, optimizer: str = "adamw", **settings: Any) -> Any:
    torch.manual_seed(0)
    attachment = attach(model, FullMethod(**settings), seed=0, tokens=tokens)
    update = Optimizer(attachment.trained, Optim(name=optimizer, lr=1e-2, weight_decay=0.1))
    for ids in passes(6):
        attachment.publish()
        model(input_ids=ids).logits.float().square().mean().backward()
        attachment.collect_gradients()
        update.step(1e-2)
        attachment.publish()
    return attachment


@pytest.mark.parametrize("optimizer", [name for name, row in OPTIMIZERS.items() if row.spares_zeros])
@pytest.mark.parametrize("arch", ["llama", "bert", "qwen2"])
def test_every_weight_ends_as_if_all_rows_were_trained(arch: str, optimizer: str) -> None:
    """BERT's and Qwen2's embeddings have a row for padding, which never learns, whoever reads it."""
    rows, whole = made(arch), made(arch)
    name = f"{sole_embedding(rows)}.weight"
    attachment = tuned(rows, SEEN, optimizer=optimizer)
    tuned(whole, None, optimizer=optimizer)
    assert attachment.trained[name].shape == (len(SEEN), rows.get_parameter(name).shape[1])
    for key, weight in whole.named_parameters():
        assert torch.equal(weight, rows.get_parameter(key)), key
    before = made(arch).get_parameter(name)
    moved = (rows.get_parameter(name) != before).any(dim=1).nonzero().flatten().tolist()
    assert set(moved) == set(SEEN) - ({PADDING} if arch != "llama" else set())


def test_in_bfloat16_frozen_rows_keep_their_bits_and_others_move() -> None:
    model = made("llama", torch.bfloat16)
    before = copy.deepcopy(model.get_input_embeddings().weight)
    attachment = tuned(model, SEEN)
    after = model.get_input_embeddings().weight
    unseen = [i for i in range(VOCAB) if i not in SEEN]
    assert torch.equal(after[unseen], before[unseen])
    assert (after[list(SEEN)] != before[list(SEEN)]).any(dim=1).all()
    trained = attachment.trained["model.embed_tokens.weight"]
    assert torch.equal(after[list(SEEN)], trained.to(torch.bfloat16))
    assert "7 of 64 rows are trained" in attachment.details[-1]


def test_an_adafactor_of_rows_would_not_be_that_of_the_whole() -> None:
    """Its column means are over all rows: why it is said not to spare zeros."""
    rows, whole = made("llama"), made("llama")
    tuned(rows, SEEN, optimizer="adafactor")
    tuned(whole, None, optimizer="adafactor")
    assert not torch.equal(rows.get_input_embeddings().weight, whole.get_input_embeddings().weight)


@pytest.mark.parametrize("arch", ["gpt2", "t5", "gemma3_text"])
def test_an_embedding_that_is_read_otherwise_is_trained_whole(arch: str) -> None:
    """GPT-2's is the head too, T5's decoder begins with a token that no row has, Gemma's is multiplied."""
    model = tiny_model(arch, vocab_size=VOCAB)
    assert sole_embedding(model) is None
    attachment = attach(model, FullMethod(), seed=0, tokens=SEEN)
    assert any(len(tensor) == VOCAB for tensor in attachment.trained.values())


def test_a_token_that_was_not_foreseen_is_an_error_and_no_lost_gradient() -> None:
    model = made("llama")
    attach(model, FullMethod(), seed=0, tokens=SEEN)
    with pytest.raises(ModelError, match="row of the embedding is not trained"):
        model(input_ids=torch.tensor([[3, 5, 7]])).logits.square().mean().backward()


def test_a_gradient_that_is_no_number_is_left_to_the_step() -> None:
    """Also behind padding, whose token has no row: a scale that gives way in float16, or the error of the step."""
    model = made("llama")
    attachment = attach(model, FullMethod(), seed=0, tokens=SEEN)
    (model(input_ids=torch.tensor([[3, 7, 5]])).logits * torch.nan).sum().backward()
    attachment.collect_gradients()
    assert attachment.trained["model.embed_tokens.weight"].grad.isnan().any()


def test_taken_off_the_model_is_its_own_again() -> None:
    model = made("llama")
    attachment = tuned(model, SEEN)
    attachment.unload()
    model.requires_grad_(True)
    model(input_ids=torch.tensor([[3, 5]])).logits.square().mean().backward()
    assert model.get_input_embeddings().weight.grad[5].any()


@pytest.mark.parametrize(("optimizer", "is_by_rows"), [("adamw", True), ("adafactor", False)])
def test_a_run_trains_the_rows_of_its_data(tmp_path: Path, optimizer: str, is_by_rows: bool) -> None:
    recipe = tiny_recipe(tmp_path, optim={"name": optimizer}).model_copy(update={"method": FullMethod()})
    setup = prepare(recipe, root=tmp_path / "runs")
    (name,) = (name for name in setup.attachment.trained if "embed_tokens" in name)
    expected = len(setup.rows.store.tokens) if is_by_rows else setup.model.get_input_embeddings().num_embeddings
    assert len(setup.attachment.trained[name]) == expected
    assert any("rows are trained" in note for note in setup.attachment.details) == is_by_rows
    trained = setup.attachment.trained.values()
    assert setup.forecast.sizes.trained_parameters == sum(tensor.numel() for tensor in trained)


def test_an_unfinished_run_answers_with_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path).model_copy(update={"method": FullMethod()})
    steps: list[int] = []
    listener = Listener(
        on_event=lambda event: steps.append(event.step) if event.kind == "step" else None,
        should_stop=lambda: len(steps) >= 3,
    )
    with pytest.raises(Stopped):
        train(recipe, root=tmp_path / "runs", listener=listener)
    (run,) = runs(tmp_path / "runs")
    newest = checkpoint.newest(run.checkpoints_path, lambda path, why: None)
    saved = newest.weights["model.embed_tokens.weight"]
    embedding = load_run(run).model.get_input_embeddings().weight
    setup = prepare(run.recipe(), root=tmp_path / "runs", run=run)
    assert torch.equal(embedding[torch.from_numpy(setup.rows.store.tokens)], saved)
