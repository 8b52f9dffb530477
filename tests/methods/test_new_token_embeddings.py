"""Rows of new tokens: held to whole tables trained by plain autograd, and nothing else in the tables moves."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.saved import save_adapter
from tiny_model import tiny_model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.adapter_format import load_adapter
from tunesmith.methods.lora import attach
from tunesmith.methods.new_token_embeddings import ROWS_SUFFIX, TokenRows
from tunesmith.models.special_tokens import NewTokens, resize_embeddings
from tunesmith.optim import Optimizer
from tunesmith.recipe.methods import LoraMethod
from tunesmith.recipe.schema import Optim

NEW = (60, 62)
tied_or_not = pytest.mark.parametrize("tied", [False, True])


def made(arch: str = "llama", *, tied: bool, **settings: object) -> PreTrainedModel:
    model = tiny_model(arch, vocab_size=64, tie_word_embeddings=tied, **settings)
    model.new_token_ids = NEW
    return model


def ids() -> Tensor:
    drawn = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    drawn[0, 3] = drawn[1, 5] = drawn[1, 6] = 60
    drawn[0, 7] = 62
    return drawn


def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(ids(), labels=ids()).loss
    return out


@tied_or_not
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
def test_gradients_are_the_rows_of_those_of_the_whole_tables(arch: str, tied: bool) -> None:
    """Gemma multiplies what it looks up."""
    model = made(arch, tied=tied)
    plain = copy.deepcopy(model)
    loss(plain).backward()
    model.requires_grad_(False)
    rows = TokenRows(model, NEW)
    before = loss(model)
    assert torch.equal(before, loss(plain))
    before.backward()
    assert len(rows.parameters) == (1 if tied else 2)
    for name, row in rows.parameters.items():
        expected = plain.get_submodule(name.removesuffix(ROWS_SUFFIX)).weight.grad[list(NEW)]
        torch.testing.assert_close(row.grad, expected, rtol=1e-5, atol=1e-7)
    assert all(weight.grad is None for weight in model.parameters())


def tuned(model: PreTrainedModel, settings: LoraMethod | None = None, *, steps: int = 3):  # type: ignore[no-untyped-def]
    attachment = attach(model, settings or LoraMethod(rank=4), seed=0)
    update = Optimizer(attachment.trained, Optim(lr=1e-2))
    for _ in range(steps):
        loss(model).backward()
        attachment.collect_gradients()
        update.step(1e-2)
        attachment.publish()
    return attachment


@tied_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_row_moves_a_bit(tied: bool, dtype: torch.dtype) -> None:
    model = made(tied=tied, dtype=dtype)
    before = {name: table.clone() for name, table in tables(model).items()}
    tuned(model)
    others = [i for i in range(64) if i not in NEW]
    for name, table in tables(model).items():
        assert torch.equal(table[others], before[name][others]), name
        assert not torch.equal(table[list(NEW)], before[name][list(NEW)]), name


def tables(model: PreTrainedModel) -> dict[str, Tensor]:
    return {"embed": model.get_input_embeddings().weight.data, "head": model.get_output_embeddings().weight.data}


# trap: A3, A4
def assert_live_is_merged_is_reloaded_is_peft(tied: bool, folder: Path, *, forget_rows: bool = False) -> None:
    model = made(tied=tied).eval()
    untouched, theirs = copy.deepcopy(model), copy.deepcopy(model)
    attachment = tuned(model)
    with torch.no_grad():
        live = model(ids()).logits
        if forget_rows:  # the planted bug: what is saved are the rows as they began
            for name in attachment.rows.parameters:
                attachment.trained[name].copy_(
                    untouched.get_submodule(name.removesuffix(ROWS_SUFFIX)).weight[list(NEW)]
                )
        save_adapter(attachment, folder / "adapter", base="x")
        load_adapter(untouched, folder / "adapter")
        reloaded = untouched(ids()).logits
        by_peft = PeftModel.from_pretrained(theirs, str(folder / "adapter")).eval()(ids()).logits
        attachment.merge()
        merged = model(ids()).logits
    for found in (merged, reloaded, by_peft):
        assert (found - live).abs().max() <= 1e-5  # float32, and for peft another order of two factors


@tied_or_not
def test_live_is_merged_is_reloaded_is_peft(tied: bool, tmp_path: Path) -> None:
    assert_live_is_merged_is_reloaded_is_peft(tied, tmp_path)


@tied_or_not
def test_the_test_sees_rows_that_were_not_saved(tied: bool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert_live_is_merged_is_reloaded_is_peft(tied, tmp_path, forget_rows=True)


def test_a_new_row_starts_as_the_mean_of_its_pieces_and_no_table_shrinks() -> None:
    model = tiny_model(vocab_size=64)
    before = {name: table.clone() for name, table in tables(model).items()}
    resize_embeddings(model, NewTokens((62, 70), ((1, 2), (5,))))
    for name, table in tables(model).items():
        assert table.shape[0] == 71
        assert torch.equal(table[62], before[name][[1, 2]].mean(0))
        assert torch.equal(table[70], before[name][5])
        assert torch.equal(table[:62], before[name][:62])
    resize_embeddings(model, NewTokens((63,), ((1,),)))
    assert tables(model)["embed"].shape[0] == 71
    assert model.config.vocab_size == 71


def test_new_tokens_beyond_a_gap_are_refused() -> None:
    model = tiny_model("llama", vocab_size=64)
    with pytest.raises(ModelError, match="has 66 tokens before them, the embedding of the model 64 rows"):
        resize_embeddings(model, NewTokens((66,), ((1,),)))


def test_a_table_trained_whole_takes_the_rows_along() -> None:
    attachment = tuned(made(tied=True), LoraMethod(rank=4, also_train=("embed_tokens",)))
    assert attachment.rows is None
    with pytest.raises(RecipeError, match=r"data.new_tokens: model.embed_tokens and lm_head have rows"):
        tuned(made(tied=False), LoraMethod(rank=4, also_train=("embed_tokens",)))


def test_a_base_whose_table_has_not_grown_is_refused(tmp_path: Path) -> None:
    save_adapter(tuned(made(tied=False)), tmp_path / "adapter", base="x")
    with pytest.raises(ModelError, match="rows for token 62, and the model has 50: its embedding has to grow first"):
        load_adapter(tiny_model(vocab_size=50), tmp_path / "adapter")
