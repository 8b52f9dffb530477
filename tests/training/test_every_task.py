"""Every task on every kind of model that can learn it, from a file to a report, and what must hold for all of them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import fresh
from killed_runs import kill_runs
from often import often
from tiny_run import same_run, values_of
from tiny_tasks import rows_of, task_recipe, write
from tunesmith.errors import DataError, ModelError, Stopped
from tunesmith.evaluation.metrics import METRICS
from tunesmith.recipe.docs import as_yaml
from tunesmith.runs.folder import Run, runs
from tunesmith.tasks import TASKS
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import Listener, resume, train

EVERY = [
    (task.name, kind) for task in TASKS.values() for kind in task.heads if task.name != "distil" and not task.samples
]
"""Tasks whose answers are drawn need a grader: test_reinforce.py; another needs a teacher: test_distil.py."""
FIRST = {kind: (task, kind) for task, kind in reversed(EVERY)}
"""One task of each kind of model."""
USUAL = dict(reversed(EVERY))
"""One kind of model for each task."""
OFTEN = {task: kind for task, kind in USUAL.items() if task not in ("chat", "rank")}
"""Each time. Chats learn by an adapter, below; a run that learns to rank: test_ranking.py."""
KEYS = {
    "next_token": {"loss", "perplexity", "token_accuracy"},
    "masked_token": {"loss", "perplexity", "token_accuracy"},
    "sequence": {"loss", "accuracy", "macro_f1", "majority", "calibration_error"},
    "tokens": {"loss", "span_f1", "tag_accuracy"},
    "pairs": {"loss", "preference_accuracy", "margin", "chosen_shift", "longer_chosen", "likelier_chosen"},
    "rewards": {"loss", "preference_accuracy", "margin", "calibration_error", "longer_chosen"},
    "lists": {"loss", "recall_1", "mrr_10", "ndcg_10"},
    "vectors": {"loss", "recall_1", "recall_10", "mrr_10", "ndcg_10"},
}


def evaluations(run: Run) -> dict[str, Any]:
    return {event.values["name"]: event.values for event in run.events() if event.kind == "evaluation"}


@pytest.mark.parametrize(
    ("task", "kind", "method"),
    [
        *often(((task, kind, "full") for task, kind in EVERY), *((*pair, "full") for pair in OFTEN.items())),
        *often(((task, kind, "lora") for task, kind in FIRST.values()), ("chat", "causal", "lora")),
    ],
)
def test_a_run_lowers_the_held_out_loss_and_tells_its_measures(tmp_path, task, kind, method):
    rows = 60 if task == "text" and kind == "encoder" else 24  # masked words are learnt slowly
    sections = {
        "optim": {"lr": 5e-3 if method == "lora" else 3e-3},
        "train": {"epochs": 6 if kind == "encoder" else 3},
        "checkpoint": {"every": 20},
    }
    run = train(task_recipe(tmp_path, task, kind, rows=rows, method=method, **sections), root=tmp_path / "runs")
    assert run.state() == "done"
    found = evaluations(run)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert set(found["after"]["measures"]) >= KEYS[TASKS[task].outcome or TASKS[task].heads[kind]]
    assert set(found["after"]["measures"]) <= set(METRICS)
    for name in ("before", "after"):
        lines = [json.loads(line) for line in (run.path / "evaluation" / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == found[name]["rows"] == 8
        # The event's loss is what the rows' own sums say.
        total, count = sum(line["loss"] for line in lines), sum(line["count"] for line in lines)
        assert found[name]["loss"] == pytest.approx(total / count, rel=1e-6)
    if task in ("chat", "generate", "summarize"):
        told = [e.values for e in run.events() if e.kind == "answers" and e.values["name"] == "after"]
        text = (run.path / "evaluation" / "answers-after.jsonl").read_text()
        scores = [json.loads(line)["rougeL"] for line in text.splitlines()]
        assert sum(scores) / len(scores) == pytest.approx(told[0]["measures"]["rougeL"]["value"], rel=1e-12)
    surprising = json.loads((run.path / "evaluation" / "surprising.json").read_text())
    assert surprising["looked_at"] == rows
    losses = [line["loss"] / line["count"] for line in surprising["rows"]]
    assert len(losses) == 20
    assert losses == sorted(losses, reverse=True)


@pytest.mark.pages
@pytest.mark.parametrize("task", often(["chat", "classify"], "classify"))  # all kinds: tests/evaluation/test_report.py
def test_the_report_of_a_run_is_drawn(tmp_path, task):
    kind = next(iter(TASKS[task].heads))
    run = train(task_recipe(tmp_path, task, kind, train={"max_steps": 2}), root=tmp_path / "runs")
    html = (run.path / "report.html").read_text()
    assert html.count("<svg") == 2
    assert (run.path / "report.md").read_text().startswith("# ")


RESUMED = [
    ("text", "encoder"), ("classify", "causal"), ("tag", "encoder"), ("generate", "encoder_decoder"),
    ("summarize", "causal"), ("reward", "causal"), ("embed", "encoder"),
]  # fmt: skip
"""Every kind of model once; chats: test_resume, pairs: test_preferences, labels: test_unpaired_losses, ranks: below."""


@pytest.mark.parametrize(("task", "kind"), often(RESUMED, "generate", "embed"))
def test_stopped_anywhere_it_goes_on_as_if_it_had_not(tmp_path, task, kind):
    recipe = task_recipe(tmp_path, task, kind, method="lora")
    straight = train(recipe, root=tmp_path / "straight")
    calls = iter(range(1000))
    with pytest.raises(Stopped):
        train(recipe, root=tmp_path / "halting", listener=Listener(should_stop=lambda: next(calls) == 5))
    halting = runs(tmp_path / "halting")[0]
    resume(halting)
    assert values_of(halting.events()) == values_of(straight.events())
    weights = "adapter/adapter_model.safetensors"
    assert (halting.path / weights).read_bytes() == (straight.path / weights).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from tunesmith.recipe.load import load
from tunesmith.training.trainer import Listener, train

def on_event(event):
    if event.kind == "step" and event.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

train(load(sys.argv[1]), root=Path(sys.argv[2]), listener=Listener(on_event=on_event))
"""


@pytest.mark.parametrize(("task", "kind"), often([("prefer", "causal"), ("rank", "encoder")], "rank"))
def test_killed_in_a_step_it_ends_with_the_same_bits(tmp_path, task, kind):
    """With a reference that was kept, and without."""
    recipe = task_recipe(tmp_path, task, kind, method="lora")
    straight = train(recipe, root=tmp_path / "straight")
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe, comments=False))
    killed = fresh.Process("-c", KILLED, tmp_path / "recipe.yaml", tmp_path / "runs")
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    (run,) = runs(tmp_path / "runs")
    assert run.state() != "done"
    same_run(resume(run), straight)


KILLS = int(os.environ.get("TUNESMITH_KILLS", "10"))
KILL_SEED = int(os.environ.get("TUNESMITH_KILL_SEED", "0"))


@pytest.mark.slow
@pytest.mark.timeout(120 + 10 * KILLS)
@pytest.mark.parametrize(("task", "kind"), EVERY)
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path, task, kind):
    """TUNESMITH_KILLS=200 for a long one; of chats the default suite does it too, see test_resume."""
    sections = {"checkpoint": {"every": 2}, "evaluation": {"every": 3, "general": False}}
    recipe = task_recipe(tmp_path, task, kind, method="lora", dropout=0.1, **sections)
    killed, finished = kill_runs(tmp_path, recipe, kills=KILLS, seed=KILL_SEED)
    print(f"{task}, {kind}: {killed} kills, {finished} runs finished")
    assert finished >= 1


@pytest.mark.parametrize("task", [task for task, kind in EVERY if kind == "causal" and task not in ("chat", "reward")])
def test_auto_finds_the_task_of_the_rows(tmp_path, task):
    setup = prepare(task_recipe(tmp_path, task, "causal").model_copy(update={"task": "auto"}), root=tmp_path / "runs")
    assert setup.recipe.task == task
    assert next(choice for choice in setup.choices if choice.key == "task").reason


def test_a_model_that_cannot_learn_the_task_is_refused_with_those_it_can(tmp_path):
    with pytest.raises(ModelError, match=r"encoder-only: it cannot learn the task chat.*text, classify, tag"):
        train(task_recipe(tmp_path, "chat", "encoder"), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists() or not runs(tmp_path / "runs")


def test_a_class_that_training_never_saw_is_refused(tmp_path):
    recipe = task_recipe(tmp_path, "classify", "encoder")
    write(Path(recipe.data.eval[0].path), [*rows_of("classify", 8, seed=7), {"text": "a big plum", "label": "drink"}])
    with pytest.raises(DataError, match=r"classify-held\.jsonl:9.*drink"):
        train(recipe, root=tmp_path / "runs")


def test_labels_are_in_the_recipe_in_their_order(tmp_path):  # trap: A12
    run = train(task_recipe(tmp_path, "classify", "encoder"), root=tmp_path / "runs")
    assert run.recipe().data.labels == ("fruit", "place")


class TestBest:
    """`evaluation.every` with `keep: best`: the result is the evaluation that was best."""

    def sections(self, **evaluation: Any) -> dict[str, Any]:
        return {
            "optim": {"lr": 0.5, "schedule": "constant", "clip": None},  # far too much: it gets worse on the way
            "train": {"epochs": 3, "rows_per_step": 4, "tokens_per_pass": 64},
            "evaluation": {"every": 1, "samples": 0, "general": False, **evaluation},
        }

    def test_the_best_step_is_the_result(self, tmp_path):
        run = train(
            task_recipe(tmp_path, "classify", "encoder", **self.sections(metric="loss")), root=tmp_path / "runs"
        )
        steps = {
            e.step: e.values["loss"] for e in run.events() if e.kind == "evaluation" and e.values["name"] == "step"
        }
        report = json.loads(run.report_path.read_text())
        best = min(steps, key=lambda step: (steps[step], step))
        assert report["kept"]["step"] == best < max(steps)
        assert report["chosen_from"] == len(steps)
        assert any(f"chose the step, as the best of {len(steps)}" in sentence for sentence in report["headline"])
        assert evaluations(run)["after"]["loss"] == pytest.approx(steps[best], rel=1e-6)
        assert dict(report["held_out_curve"]) == {0: evaluations(run)["before"]["loss"], **steps}

    def test_patience_ends_the_run(self, tmp_path):
        run = train(
            task_recipe(tmp_path, "classify", "encoder", **self.sections(metric="loss", patience=2)),
            root=tmp_path / "runs",
        )
        taken = max(event.step for event in run.events() if event.kind == "step")
        steps = {
            e.step: e.values["loss"] for e in run.events() if e.kind == "evaluation" and e.values["name"] == "step"
        }
        best = min(steps, key=lambda step: (steps[step], step))
        assert taken == best + 2 < 18
        assert any("stopped early" in event.values["text"] for event in run.events() if event.kind == "note")

    def test_another_measure_can_say_which_is_best(self, tmp_path):
        sections = self.sections(metric="macro_f1")
        run = train(task_recipe(tmp_path, "classify", "encoder", **sections), root=tmp_path / "runs")
        scores = {
            e.step: e.values["measures"]["macro_f1"]["value"]
            for e in run.events()
            if e.kind == "evaluation" and e.values["name"] == "step"
        }
        assert scores[json.loads(run.report_path.read_text())["kept"]["step"]] == max(scores.values())

    @pytest.mark.parametrize(("task", "key"), [("classify", "accuracy"), ("tag", "span_f1")])
    def test_rows_with_labels_keep_the_step_that_their_report_leads_with(self, tmp_path, task, key):
        """Of those that are as good the one of the lower loss, and the plan says so."""
        run = train(task_recipe(tmp_path, task, "encoder", **self.sections()), root=tmp_path / "runs")
        assert run.recipe().evaluation.metric == key
        steps = {
            e.step: (-e.values["measures"][key]["value"], e.values["loss"])
            for e in run.events()
            if e.kind == "evaluation" and e.values["name"] == "step"
        }
        assert json.loads(run.report_path.read_text())["kept"]["step"] == min(steps, key=lambda step: steps[step])
        plan = next(e.values for e in run.events() if e.kind == "plan")
        reason = next(choice["reason"] for choice in plan["choices"] if choice["key"] == "evaluation.metric")
        assert "the report leads with it" in reason
        assert "lower loss" in reason


@pytest.mark.parametrize(("times", "is_told"), [(1.0, False), (50_000.0, True)])
def test_numbers_far_from_what_a_head_starts_at_are_told(tmp_path, times, is_told):
    recipe = task_recipe(tmp_path, "classify", "encoder", train={"max_steps": 1})
    for file in (recipe.data.train[0], recipe.data.eval[0]):
        rows = [{**row, "label": times * (0.5 + i % 3)} for i, row in enumerate(rows_of("classify", 12))]
        write(Path(file.path), rows)
    plan = next(e for e in train(recipe, root=tmp_path / "runs").events() if e.kind == "plan")
    assert any("subtract the mean" in text for text in plan.values["warnings"]) == is_told
