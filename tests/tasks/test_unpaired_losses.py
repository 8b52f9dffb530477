"""KTO: TRL's own numbers, its reference point over the whole step, partners, weights, and what is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_run import same_run, stopped
from tiny_tasks import assert_alike, by_memory, rows_of, task_recipe, write
from tunesmith.data.branches import lines_of, partner_line
from tunesmith.data.formats import FORMATS
from tunesmith.data.row_targets import partners_of, write_reference
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluation.compare import row_baseline
from tunesmith.evaluation.scores import score
from tunesmith.inference.load import load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.recipe.objectives import Prefer
from tunesmith.tasks import preference_losses
from tunesmith.tasks.preference_losses import kto_losses
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train
from tunesmith.types import Example, Source

PEER = json.loads((Path(__file__).parent / "trl_losses.json").read_text("utf-8"))
LORA = {"name": "lora", "rank": 4, "alpha": 8}


def labelled(num: int, *, seed: int = 0, wanted: int = 3) -> list[dict[str, Any]]:
    """Rows of which one in `wanted` is not wanted."""
    found = []
    for i, row in enumerate(rows_of("prefer", num, seed=seed)):
        side = "chosen" if i % wanted else "rejected"
        found.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
    return found


def recipe_of(folder: Path, *, wanted: int = 3, **sections: Any) -> Any:
    recipe = task_recipe(folder, "prefer", "causal", **{"method": LORA, **sections})
    write(folder / "prefer.jsonl", labelled(24, wanted=wanted))
    write(folder / "prefer-held.jsonl", labelled(8, seed=7))
    return recipe


def steps_of(run: Any) -> list[dict[str, Any]]:
    return [event.values for event in run.events() if event.kind == "step"]


@pytest.mark.parametrize("case", PEER["kto"], ids=lambda case: f"beta {case['beta']}, weights {case['weights']}")
def test_the_loss_is_that_of_trl(case):
    assert peer_loss(case) == pytest.approx(case["loss"], rel=1e-6)
    with pytest.raises(AssertionError):
        assert peer_loss(case, moved=-1.0) == pytest.approx(case["loss"], rel=1e-6)


def peer_loss(case: Any, *, moved: float = 0.0) -> float:
    batch = {key: torch.tensor(values) for key, values in PEER["answers"].items()}
    options = Prefer(loss="kto", beta=case["beta"], desirable=case["weights"][0], undesirable=case["weights"][1])
    z0 = max(0.0, float((batch["mismatched"].double() - batch["mismatched_reference"].double()).mean())) + moved
    losses = kto_losses((batch["logps"] - batch["reference"]).double(), batch["label"], z0, options)
    return float(losses.mean())


# trap: P17
def test_one_pass_is_eight_passes(tmp_path):
    found = by_memory(tmp_path, recipe_of, 4096, 1)
    assert [steps[0][2] for steps in found] == [1, 8]
    assert_alike(found)


@pytest.mark.slow
def test_the_test_sees_a_reference_point_of_each_pass(tmp_path, monkeypatch):
    def of_the_pass(model: Any, batch: Any, *, options: Any, output: Any = None, z0: float = 0.0) -> Any:
        s, _ = preference_losses.line_logps(model, batch, output)
        r = s - batch.values_BV[:, 1]
        own = max(0.0, float(r.detach().mean()))  # of this pass, and of the rows' own answers
        return kto_losses(r, batch.values_BV[:, 0] > 0, own, options).sum().float()

    monkeypatch.setattr(preference_losses, "kto_loss_sum", of_the_pass)
    planted = by_memory(tmp_path, recipe_of, 4096, 1)
    with pytest.raises(AssertionError):
        assert_alike(planted)


def test_the_reference_point_is_the_steps_mean_detached_and_at_least_0(tmp_path):
    setup = prepare(recipe_of(tmp_path, train={"rows_per_step": 6}), root=tmp_path / "runs")
    rows = [int(i) for i in setup.rows.train_rows[:6]]
    store, of_partners = setup.store, partial(setup.collator.batch, step=1, lines="partners")
    for reference, expected in ((-500.0, 1), (500.0, 0)):
        write_reference(store, np.arange(len(store)), np.full((len(store), 2), reference))
        found = setup.task.prepass(setup.model, [of_partners(rows[:2]), of_partners(rows[2:])], setup.world)
        with torch.no_grad():
            s, _ = preference_losses.line_logps(setup.model, of_partners(rows), None)
        assert found.keywords["z0"] == pytest.approx(max(0.0, float(s.mean()) - reference), rel=1e-6)
        assert (found.keywords["z0"] > 0) == expected
        assert isinstance(found.keywords["z0"], float)


def test_a_partner_has_another_prompt_and_its_line_is_prompt_and_answer(tmp_path):
    store = prepare(recipe_of(tmp_path), root=tmp_path / "runs").store
    partners = store.learnt.partners_I
    for i in range(len(store)):
        row, other = store.row(i), store.row(int(partners[i]))
        assert store.inputs[i] != store.inputs[partners[i]]
        line = partner_line(row, other, store.learnt.partner_tokens)
        stem = len(row.ids) - row.branches[0]
        assert line.ids[:stem].tolist() == row.ids[:stem].tolist()
        assert line.ids[stem:].tolist() == lines_of(other)[0].ids[-other.branches[0] :].tolist()
        assert line.trained.sum() == other.trained.sum()


def test_partners_go_round_and_pass_over_rows_of_one_prompt():
    hashes, inputs = np.array([5, 1, 3, 2, 4], np.uint64), np.array([7, 7, 8, 7, 7], np.uint64)

    def partners(*sides: list[int]) -> Any:
        return partners_of([np.array(side) for side in sides], hashes, inputs).tolist()

    assert partners([*range(5)]) == [2, 2, 4, 2, 2]  # in order 1, 3, 2, 4, 0: the one of prompt 8, the one after it
    assert partners([0, 1, 3]) == [0, 1, -1, 3, -1]
    assert partners([*range(5)], [0, 2]) == [2, 2, 0, 2, 2]


# trap: P18
def test_both_sides_weigh_the_same(tmp_path):
    setup = prepare(recipe_of(tmp_path, wanted=8), root=tmp_path / "runs")
    assert_balanced(setup.recipe.prefer, setup.store.branches.firsts[setup.rows.train_rows])
    assert setup.recipe.prefer.undesirable == 7.0
    said = {choice.key: choice for choice in setup.choices}
    assert "21 of 24 answers are wanted" in said["prefer.undesirable"].reason
    with pytest.raises(AssertionError):
        assert_balanced(Prefer(loss="kto").filled(), setup.store.branches.firsts[setup.rows.train_rows])


def assert_balanced(options: Prefer, labels: Any) -> None:
    assert (labels == 1).sum() * options.desirable == pytest.approx((labels == 0).sum() * options.undesirable)


@pytest.mark.slow  # of pairs: tests/training/test_preferences.py
def test_a_stopped_and_resumed_run_is_the_same(tmp_path):
    recipe = recipe_of(tmp_path, train={"rows_per_step": 4, "epochs": 2}, checkpoint={"every": 2})
    straight = train(recipe, root=tmp_path / "straight")
    same_run(resume(stopped(recipe, tmp_path / "halting", 3)), straight)


def test_a_result_measures_what_its_run_said(tmp_path):
    recipe = recipe_of(tmp_path, train={"rows_per_step": 4, "epochs": 2})
    straight = train(recipe.model_copy(update={"task": "auto"}), root=tmp_path / "straight")
    assert straight.recipe().prefer.loss == "kto"
    said = next(e.values for e in straight.events() if e.kind == "evaluation" and e.values["name"] == "after")
    found = evaluate_file(load_run(straight), str(tmp_path / "prefer-held.jsonl"), samples=0).measures
    for key in ("loss", "preference_accuracy", "margin", "chosen_shift", "longer_chosen", "likelier_chosen"):
        assert found[key]["value"] == pytest.approx(said["measures"][key]["value"], rel=1e-3, abs=1e-4), key
    first = steps_of(straight)[0]
    weights = straight.recipe().prefer
    labels = prepare(recipe, root=tmp_path / "runs").store.branches.firsts[first["rows"]]
    assert first["loss"] == pytest.approx(np.where(labels > 0, weights.desirable, weights.undesirable).mean() / 2)


@pytest.mark.parametrize(
    ("change", "sections", "message"),
    [
        (lambda rows: rows + rows_of("prefer", 2), {}, "other_shape"),
        (lambda rows: [{**row, "label": True} for row in rows], {}, "all rows have label true"),
        (lambda rows: [{**row, "prompt": rows[0]["prompt"]} for row in rows], {}, "all training rows have this prompt"),
        (lambda rows: rows, {"prefer": {"loss": "dpo"}}, "the rows are answers with a label"),
        (lambda rows: rows_of("prefer", 24), {"prefer": {"loss": "kto"}}, "the rows are pairs of answers"),
        (lambda rows: rows, {"train": {"rows_per_step": 1}}, "Use 2 or more"),
        (lambda rows: rows, {"prefer": {"nll": 1.0, "loss": "kto"}}, "prefer.nll"),
        (lambda rows: rows, {"prefer": {"desirable": 1.0, "loss": "dpo"}}, "prefer.desirable"),
    ],
)
def test_rows_and_options_that_kto_cannot_take_are_refused(tmp_path, change, sections, message):
    def begin() -> None:
        recipe = recipe_of(tmp_path, **sections)
        write(tmp_path / "prefer.jsonl", change(labelled(24)))
        write(tmp_path / "prefer-held.jsonl", change(labelled(8, seed=7)))
        prepare(recipe, root=tmp_path / "runs")

    with pytest.raises((DataError, RecipeError)) as refused:
        begin()
    problems = getattr(refused.value, "problems", ())
    assert message in str(refused.value) + "".join(map(str, problems))


def test_both_forms_of_rows_are_read_alike():
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "label": False}
    pair = {"prompt": chat["messages"][:1], "completion": chat["messages"][1:], "label": False}
    ours, theirs = (FORMATS["unpaired"].parse(row, Source("a", 1)) for row in (chat, pair))
    assert isinstance(ours, Example)
    assert ours == theirs
    assert (len(ours.parts), len(ours.branches), ours.values) == (1, 1, (0.0,))
    assert not FORMATS["unpaired"].matches({**pair, "label": "no"})


def test_accuracy_is_that_of_wanted_against_unwanted_answers():
    rows = [
        {"hash": f"{i:x}", "loss": 0.5, "count": 1, "lengths": [9 if i % 2 else 3, 4], "logps": [-9.0, -9.0],
         "reference": [-9.0, -9.0], "wanted": bool(i % 2), "margin": 1.0 if i in (1, 3, 4) else 0.0}
        for i in range(6)
    ]  # fmt: skip
    measures, details = score(rows)
    # Wanted 1, 1, 0 against 0, 0, 1: of nine pairs four are won, four tied.
    assert measures["preference_accuracy"]["value"] == pytest.approx((4 + 4 / 2) / 9)
    assert measures["margin"]["value"] == pytest.approx(2 / 3 - 1 / 3)
    assert measures["longer_chosen"]["value"] == 1.0
    baseline = row_baseline(rows, details["constant"])
    assert "longer answer" in baseline["words"]
    assert baseline["measures"]["preference_accuracy"]["value"] == 1.0
