"""A run whose recipe adds tokens: encoded as one, trained, saved, and answered with from base and adapter alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.exports import quick
from often import often
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_run import model_folder, same_run, stop_at, tiny_recipe
from tunesmith.errors import RecipeError, Stopped
from tunesmith.export.export_run import export_run
from tunesmith.inference.load import load_base, load_run
from tunesmith.models import special_tokens
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import resume, train

TEXTS = ("quick brown", "tallest")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("new-tokens")
    return train(tiny_recipe(folder, data={"new_tokens": list(TEXTS)}), root=folder / "runs")


def ids_of(run: Run) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(run.adapter_path)
    return [int(i) for i in tokenizer.convert_tokens_to_ids(list(TEXTS))]


def test_the_text_is_one_token_in_training_and_in_what_is_saved(finished: Run) -> None:
    num = len(tiny_tokenizer())
    assert ids_of(finished) == [num, num + 1]
    assert load_run(finished).renderer.tokenizer("the tallest fox").input_ids.count(num + 1) == 1
    plan = next(event.values for event in finished.events() if event.kind == "plan")
    assert plan["warnings"][0] == (
        "2 new tokens ('quick brown', 'tallest'): each begins as the mean of the tokens that its text was before"
    )


def test_only_the_new_rows_are_another_than_those_of_the_base(finished: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(finished.recipe().model)
    tuned = load_run(finished).model
    num = base.get_input_embeddings().weight.shape[0]
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(base, get)().weight, getattr(tuned, get)().weight
        assert torch.equal(after[:num], before)
        assert after.shape[0] == num + 2
        fresh = getattr(load_base(finished).model, get)().weight[num:]
        assert not torch.equal(after[num:], fresh)


# trap: A4
def assert_base_and_adapter_are_enough(run: Run, adapter: Path) -> None:
    """As others do it: the base, its table as long as the tokenizer, the adapter by peft."""
    model = AutoModelForCausalLM.from_pretrained(run.recipe().model)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)), mean_resizing=False)
    theirs, ours = PeftModel.from_pretrained(model, str(adapter)).eval(), load_run(run).model.eval()
    assert (answers(theirs, run) - answers(ours, run)).abs().max() <= 1e-5


def answers(model: torch.nn.Module, run: Run) -> Tensor:
    ids = torch.tensor([[*range(20, 30), *ids_of(run), *range(30, 34)]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def test_base_and_adapter_are_enough(finished: Run) -> None:
    assert_base_and_adapter_are_enough(finished, finished.adapter_path)


@pytest.mark.slow
def test_the_test_sees_an_adapter_without_the_rows(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.adapter_path, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": None}))
    with pytest.raises(AssertionError):
        assert_base_and_adapter_are_enough(finished, tmp_path / "adapter")


def test_stopped_and_resumed_is_the_same_run(finished: Run) -> None:
    folder = finished.path.parents[1]
    with pytest.raises(Stopped):
        train(finished.recipe(), out=folder / "stopped", listener=stop_at(5))
    stopped = Run.open(str(folder / "stopped"), folder)
    assert "not finished" in load_run(stopped).note  # its checkpoint has the rows too
    same_run(resume(stopped), finished)


@pytest.mark.parametrize("target", often(["merged", "adapter", "gguf"], "merged"))
def test_exports_have_the_tokens(finished: Run, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proved: the same tokens, the same weights, the same answers."""
    quick(monkeypatch)
    done = export_run(finished, target)
    assert done.found.same_ids
    if target == "merged":
        model = AutoModelForCausalLM.from_pretrained(done.path)
        assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(tiny_tokenizer()) + 2


def test_a_token_that_is_there_already_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    for texts, message in (
        (["the", "<|im_end|>"], "'<|im_end|>' is a token of this model already"),
        (["abc", "abc"], "'abc' is there twice"),
        ([" "], "' ' is not a text"),
    ):
        with pytest.raises(RecipeError) as raised:
            special_tokens.add_tokens(tokenizer, texts)
        assert message in str(raised.value)


def test_other_models_have_none(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data={"new_tokens": ["abc"]})
    folder = model_folder(tmp_path / "t5", "t5")
    with pytest.raises(RecipeError, match=r"data.new_tokens: is not for a model that is an encoder–decoder"):
        train(recipe.model_copy(update={"model": str(folder), "task": "generate"}), root=tmp_path / "runs")


def test_the_code_of_the_card_makes_a_padded_table_no_shorter(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data={"new_tokens": list(TEXTS)}, method={"also_train": ["embed_tokens", "lm_head"]})
    num = len(tiny_tokenizer()) + 64
    tiny_model("llama", vocab_size=num).save_pretrained(recipe.model)
    run = train(recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})}), root=tmp_path)
    out = export_run(run, "adapter", out=tmp_path / "out", proof=False, offline=True).path
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    scope: dict[str, Any] = {}
    exec(code.replace("PATH", str(out)).replace(f'"{Path(recipe.model).name}"', repr(recipe.model)), scope)
    assert scope["model"].get_input_embeddings().weight.shape[0] == num
