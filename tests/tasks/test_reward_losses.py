"""Rewards: TRL's own numbers, several answers, where a reward is read, from file to a model that others load."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from export.exports import quick
from often import often, slow
from tiny_run import model_folder
from tiny_tasks import assert_alike, by_memory, refuse_packing, rows_of, task_recipe, write
from tunesmith.data.branches import lines_of
from tunesmith.data.formats import FORMATS
from tunesmith.evaluation.scores import score
from tunesmith.export.export_run import export_run
from tunesmith.inference.load import load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.models.modes import eval_mode
from tunesmith.recipe.objectives import Reward
from tunesmith.serve.protocol import EngineOptions, RequestError
from tunesmith.serve.registry import open_registry
from tunesmith.tasks import TASKS
from tunesmith.tasks.scores import by_branch, reward_losses
from tunesmith.training.selftest import selftest
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import train
from tunesmith.types import Source

PEER = json.loads((Path(__file__).parent / "trl_losses.json").read_text("utf-8"))
LORA = {"name": "lora", "rank": 4, "alpha": 8}
NOTHING = {"evaluation": {"samples": 0, "surprising": 0}}


def recipe_of(folder: Path, kind: str = "causal", **sections: Any) -> Any:
    return task_recipe(folder, "reward", kind, **{"method": LORA, "dropout": 0.0, **NOTHING, **sections})


def losses_of(rewards: list[float], scores: list[float], rows: list[int], margins: list[float], **options: Any) -> Any:
    wide = (torch.tensor(values, dtype=torch.float64) for values in (rewards, scores))
    return reward_losses(*wide, torch.tensor(rows), torch.tensor(margins, dtype=torch.float64), Reward(**options))


@pytest.mark.parametrize("case", PEER["reward"], ids=lambda case: f"c {case['center']}, margins {case['margin']}")
def test_the_loss_is_that_of_trl(case):
    batch = PEER["rewards"]
    rewards = [one for pair in zip(batch["chosen"], batch["rejected"], strict=True) for one in pair]
    margins = batch["margin"] if case["margin"] else [0.0] * 6
    rows = [i // 2 for i in range(12)]
    found = losses_of(rewards, [1.0, 0.0] * 6, rows, margins, center=case["center"] or 0.0)
    assert float(found.mean()) == pytest.approx(case["loss"], rel=1e-6)
    flipped = losses_of(rewards, [0.0, 1.0] * 6, rows, margins, center=case["center"] or 0.0)
    with pytest.raises(AssertionError):
        assert float(flipped.mean()) == pytest.approx(case["loss"], rel=1e-6)


def test_a_row_of_several_answers_is_the_mean_of_its_untied_pairs():
    found = losses_of([2.0, 0.5, -1.0, 3.0], [3.0, 1.0, 1.0, 0.0], [0, 0, 0, 0], [0.25], margin=0.5, center=0.1)
    pairs = [(2.0, 0.5, 2), (2.0, -1.0, 2), (2.0, 3.0, 3), (0.5, 3.0, 1), (-1.0, 3.0, 1)]
    by_hand = [math.log1p(math.exp(-(a - b - 0.25 - 0.5 * points))) + 0.1 * (a + b) ** 2 for a, b, points in pairs]
    assert float(found) == pytest.approx(sum(by_hand) / 5, rel=1e-12)
    with pytest.raises(AssertionError):
        assert float(found) == pytest.approx(sum(by_hand) / 6, rel=1e-12)


# trap: P21
def test_centring_holds_the_mean_at_0_without_it_shifts_change_nothing():
    rewards = [1.0, 0.2, -0.3, -2.0]
    how: tuple[Any, ...] = ([1.0, 0.0] * 2, [0, 0, 1, 1], [0.0, 0.0])
    free, moved = (losses_of([one + by for one in rewards], *how, center=0.0).sum() for by in (0.0, 7.0))
    assert float(free) == pytest.approx(float(moved), rel=1e-12)
    assert_centred(learnt(how, center=0.01))
    with pytest.raises(AssertionError):
        assert_centred(learnt(how, center=0.0))


def learnt(how: Any, *, center: float) -> list[float]:
    values = torch.tensor([5.0, 4.0, 6.0, 5.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([values], lr=1.0)
    for _ in range(2000):
        optimizer.zero_grad()
        wide = torch.tensor(how[0], dtype=torch.float64)
        losses = reward_losses(values, wide, torch.tensor(how[1]), torch.zeros(2).double(), Reward(center=center))
        losses.sum().backward()
        optimizer.step()
    return values.tolist()


def assert_centred(rewards: list[float]) -> None:
    assert abs(sum(rewards) / len(rewards)) < 0.05


# trap: P22
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("arch", often(["llama", "gpt2", "qwen3"], "llama"))
def test_a_reward_is_read_at_the_last_token_whatever_pads(tmp_path, layout, arch, monkeypatch):
    if layout == "padded":
        refuse_packing(monkeypatch)
    recipe = recipe_of(tmp_path).model_copy(update={"model": str(model_folder(tmp_path / arch, arch))})
    setup = prepare(recipe, root=tmp_path / "runs")
    setup.model.config.pad_token_id = setup.renderer.tokenizer.eos_token_id
    rows = [int(i) for i in setup.rows.train_rows[:5]]
    lines = [line for i in rows for line in lines_of(setup.store.row(i))]
    with eval_mode(setup.model):
        found = setup.task.measure(setup.model, setup.collator.batch(rows, step=1)).results
        alone = [own_reward(setup.model, line.ids) for line in lines]
        early = [own_reward(setup.model, line.ids[:-1]) for line in lines]
    ours = [one for row in found for one in row["rewards"]]
    np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours, early, rtol=1e-4, atol=1e-6)


def own_reward(model: Any, ids: Any) -> float:
    with torch.no_grad():
        hidden = model.base_model(torch.from_numpy(ids.astype("int64"))[None]).last_hidden_state
        return float(model.score(hidden[0, -1])[0])


@pytest.mark.parametrize(("kind", "method"), [("causal", LORA), slow(("causal", "full")), ("encoder", "full")])
def test_a_result_is_a_classifier_with_one_label_that_transformers_loads(tmp_path, monkeypatch, kind, method):
    quick(monkeypatch)  # in another process: tests/training/test_preferences.py
    run = train(recipe_of(tmp_path, kind, method=method), root=tmp_path / "runs")
    said = next(e.values for e in run.events() if e.kind == "evaluation" and e.values["name"] == "after")["measures"]
    loaded = load_run(run)
    found = evaluate_file(loaded, str(tmp_path / "reward-held.jsonl")).measures
    for key in ("loss", "preference_accuracy", "margin", "reward_mean", "longer_chosen"):
        assert found[key]["value"] == pytest.approx(said[key]["value"], rel=1e-3, abs=1e-5), key
    row = rows_of("reward", 3, seed=7)[2]
    answers = [{"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected")]
    ours = [line["reward"] for line in predict_list(Predictor(loaded), answers)]
    folder = run.model_path
    if method == LORA:
        export_run(run, "merged", out=tmp_path / "merged")
        folder = tmp_path / "merged"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    for one, answer in zip(ours, answers, strict=True):
        messages = [*answer["prompt"], *answer["completion"]]
        texts = [message["content"] for message in messages]
        given = tokenizer(*texts, return_tensors="pt")
        if kind == "causal":
            given = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            assert float(model(**given).logits[0, 0]) == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_memory_settings_change_no_loss_and_no_gradient(tmp_path, monkeypatch):
    found = by_memory(tmp_path / "right", recipe_of, 4096, 1)
    assert [steps[0][2] for steps in found] == [1, 8]
    assert_alike(found)

    def of_the_pass(*values: Any, options: Reward) -> Any:
        losses = reward_losses(*values, options=options)
        return losses.mean().expand(len(losses)) / len(losses)

    other = replace(TASKS["reward"], losses=lambda terms: by_branch(partial(of_the_pass, options=terms.recipe.reward)))
    monkeypatch.setitem(TASKS, "reward", other)
    planted = by_memory(tmp_path / "planted", recipe_of, 4096, 1)
    with pytest.raises(AssertionError):
        assert_alike(planted)


def test_rows_with_scores_are_learnt_in_their_order(tmp_path):
    rows = [
        {"prompt": row["prompt"], "answers": [row["rejected"][0]["content"], "Oslo", row["chosen"][0]["content"]],
         "scores": [1, 1, 4.5]}
        for row in rows_of("reward", 32)
    ]  # fmt: skip
    recipe = recipe_of(tmp_path, data={"eval": [], "held_out": 0.25}, train={"rows_per_step": 4, "max_steps": 3})
    write(tmp_path / "reward.jsonl", rows)
    run = train(recipe.model_copy(update={"task": "auto"}), root=tmp_path / "runs")
    assert run.recipe().task == "reward"
    line = json.loads((run.path / "evaluation" / "after.jsonl").read_text().splitlines()[0])
    assert line["scores"] == [4.5, 1.0, 1.0]
    assert len(line["rewards"]) == 3


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"answers": ["a", "b"], "scores": [1, 1]}, "tie"),
        ({"answers": ["a", "b"], "scores": [1]}, "bad_numbers"),
        ({"answers": ["a", "b"], "scores": [1, "x"]}, "bad_numbers"),
        ({"answers": ["a"]}, "no_preference"),
        ({"answers": ["a", " "]}, "empty_answer"),
        ({"answers": ["a", 3]}, "wrong_type"),
    ],
)
def test_answers_that_teach_nothing_are_found(row, code):
    found = FORMATS["scored_answers"].parse({"prompt": "Q", **row}, Source("a", 1))
    assert [problem.code for problem in found] == [code]


def test_a_served_reward_is_of_a_prompt_and_its_answer(tmp_path):
    run = train(recipe_of(tmp_path, train={"max_steps": 1}), root=tmp_path / "runs")
    registry = open_registry([str(run.path)], root=tmp_path, options=EngineOptions(), note=lambda text: None)
    (model,) = registry.models.values()
    pairs = [("the big apple", "eats"), ("Ada", "in Rome")]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    expected = [line["reward"] for line in predict_list(Predictor(load_run(run)), rows)]
    assert [line["reward"] for line in model.classify(pairs)] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RequestError, match="a prompt and its answer"):
        model.classify(["the big apple eats"])


@pytest.mark.parametrize("kind", often(["causal", "encoder"], "encoder"))
def test_the_model_and_rows_prove_themselves(tmp_path, kind):
    proofs = list(selftest(recipe_of(tmp_path, kind)))
    assert all(proof.passed for proof in proofs), proofs


def test_measures_of_several_answers_are_means_over_their_pairs():
    rows = [
        {"hash": f"{i:x}", "loss": 0.5, "count": 1, "rewards": [2.0, 1.0, 3.0], "scores": [3.0, 2.0, 1.0],
         "lengths": [5, 4, 3], "margin": 0.0}
        for i in range(6)
    ]  # fmt: skip
    measures, details = score(rows)
    assert measures["preference_accuracy"]["value"] == pytest.approx(1 / 3)
    assert measures["margin"]["value"] == pytest.approx((1 - 1 - 2) / 3)
    assert measures["longer_chosen"]["value"] == 1.0
    assert measures["reward_mean"]["value"] == 2.0
    assert sum(one["pairs"] for one in details["by_length"]) == 18
    assert details["constant"]["answer"] == "longer_chosen"
