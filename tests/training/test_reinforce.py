"""Runs that learn from rewards: what a step draws, learns and tells; a killed run ends as one that never was."""

import errno
import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import tunesmith
from killed_runs import kill_runs
from often import often
from rewarded import COUNTED, DIGITS, prompts, rewarded
from tiny import template
from tiny_run import same_run, stopped
from tunesmith import methods
from tunesmith.api import _graded_by, _word_of
from tunesmith.data.answers import AnswerStore
from tunesmith.errors import (
    DataError,
    InputError,
    ModelError,
    OutOfMemoryError,
    RecipeError,
    RunError,
    StorageError,
    UngradedError,
)
from tunesmith.evaluation.report.values import metric_lines
from tunesmith.evaluation.series import RunSeries
from tunesmith.generation import draws as draws_module
from tunesmith.graders.grade import Grade
from tunesmith.graders.pool import Pool
from tunesmith.graders.schema import Function
from tunesmith.jobs.reward_metrics import of_step
from tunesmith.recipe.origin import moved_to
from tunesmith.recipe.reinforcement import file_of
from tunesmith.runs.folder import Run, runs
from tunesmith.summaries.words import metric_line
from tunesmith.tasks.policy_losses import VALUE_COLUMNS
from tunesmith.training import draw as draws
from tunesmith.training import graded, groups
from tunesmith.training import setup as setups
from tunesmith.training.check_sampler import check_sampler
from tunesmith.training.groups import Group
from tunesmith.training.loop import training_steps
from tunesmith.training.probe import Found, measure
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import prepare
from tunesmith.training.step import compute_gradients
from tunesmith.training.trainer import Listener, resume, train


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(rewarded(folder), root=folder / "runs")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run before its first step, which tests draw from and leave as it is."""
    folder = tmp_path_factory.mktemp("untrained")
    made = prepare(rewarded(folder), root=folder / "runs")
    yield made
    made.drawing.close()


@pytest.fixture
def setup(tmp_path):
    made = prepare(rewarded(tmp_path), root=tmp_path / "runs")
    yield made
    made.drawing.close()


def test_the_seconds_of_each_step_have_its_draw(straight):
    """The first one draws before it begins."""
    _, run = straight
    timings = [event.timing for event in run.events() if event.kind == "step"]
    assert [timing["seconds"] >= timing["draw"] + timing["grade"] for timing in timings] == [True] * len(timings)


def steps_of(run) -> list[dict]:
    return [event.values for event in run.events() if event.kind == "step"]


def measures_of(run, name: str) -> dict:
    return next(e.values["measures"] for e in run.events() if e.kind == "evaluation" and e.values["name"] == name)


def gradients(state, view) -> tuple[float, dict[str, torch.Tensor]]:
    state.optimizer.zero_grad()
    done = compute_gradients(view, view.sampler, 1)
    return sum(done.computed.losses) / done.num_targets, {
        name: tensor.grad.clone() for name, tensor in state.attachment.trained.items() if tensor.grad is not None
    }


def test_a_step_tells_what_was_drawn_and_learnt(straight):
    _, run = straight
    for values in steps_of(run):
        assert len(values["rows"]) == 3
        assert 0 <= values["reward"] <= 1
        assert values["targets"] == pytest.approx(12 * values["answer_tokens"])
        assert values["longest_answer"] <= 6
        assert values["mismatch"] <= values["largest_mismatch"] < 1e-4
        assert values["clipped_low"] == values["clipped_high"] == values["corrected"] == 0
        assert 0 < values["surprise"] < 7  # ln 512 = 6.2
    assert len(steps_of(run)) == 6
    before, after = measures_of(run, "before"), measures_of(run, "after")
    assert before.keys() == after.keys() >= {"reward", "pass_1", "pass_k", "ended", "answer_tokens", "loss"}
    assert before["loss"]["value"] == pytest.approx(-before["reward"]["value"])
    report = json.loads((run.path / "report.json").read_text())
    assert report["changes"]["reward"].keys() >= {"value", "low", "high", "is_clear"}
    num = report["metrics"]["after"]["drawn"]
    assert num == run.recipe().reinforce.held_out_samples
    assert f"pass@{num}" in [line.label for line in metric_lines(report)]
    first = next(event for event in run.events() if event.kind == "evaluation")
    assert f", pass@{num} " in metric_line(first, RunSeries.of(run.events()))
    sides = [prompt[side] for prompt in report["drawn_answers"] for side in ("before", "after")]
    assert {len(side["answers"]) for side in sides} == {2}, "reinforce.held_out_samples"


def test_a_tiny_model_learns_a_dense_reward(tmp_path):
    recipe = rewarded(
        tmp_path, rows=24, method="full", optim={"lr": 2e-2},
        train={"max_steps": 8, "rows_per_step": 6}, reinforce={"samples": 8, "held_out_samples": 8},
    )  # fmt: skip
    run = train(recipe, root=tmp_path / "runs")
    report = json.loads((run.path / "report.json").read_text())
    change = report["changes"]["reward"]
    assert change["is_clear"]
    assert change["low"] > 0.05


def test_a_run_stopped_at_any_step_ends_as_one_that_never_was(straight):  # trap: G22
    folder, whole = straight
    same_run(resume(stopped(whole.recipe(), folder / "stopped", 4)), whole)


@pytest.mark.slow
def test_the_comparison_catches_answers_that_do_not_follow_from_the_step(straight, monkeypatch):  # trap: G22 planted
    folder, whole = straight
    run = stopped(whole.recipe(), folder / "planted", 3)
    seeds_of, calls = draws.seeds_of, []

    def counted(store, rows, *, seed, step):
        calls.append(step)
        return seeds_of(store, rows, seed=seed, step=len(calls))

    monkeypatch.setattr(draws, "seeds_of", counted)
    with pytest.raises(AssertionError):
        same_run(resume(run), whole)


@pytest.mark.slow  # a kill of a run of chats: test_resume.py; what is kept of grades: below
@pytest.mark.timeout(600)
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path):  # trap: G22
    recipe = rewarded(tmp_path, evaluation={"every": 3}, checkpoint={"every": 2})
    killed, finished = kill_runs(tmp_path, recipe, kills=40, seed=1)
    print(f"{killed} kills, {finished} runs finished")
    assert finished >= 1


def test_a_judge_that_never_answers_twice_alike_is_asked_once(tmp_path):  # trap: G22
    recipe = rewarded(tmp_path, grader=COUNTED, checkpoint={"every": 100})
    run = stopped(recipe, tmp_path / "runs", 4)
    for path in run.checkpoints_path.glob("step-4"):  # as if it had been killed before it was saved
        path.rename(path.with_name("gone"))
    first = [values["reward"] for values in steps_of(run)]
    done = resume(run)
    assert [values["reward"] for values in steps_of(done)][:4] == first
    assert len(steps_of(done)) == 6


@pytest.mark.slow
def test_grades_that_are_lost_would_be_seen(tmp_path):  # trap: G22 planted
    recipe = rewarded(tmp_path, grader=COUNTED, checkpoint={"every": 100})
    lost = stopped(recipe, tmp_path / "again", 4)
    first = [values["reward"] for values in steps_of(lost)]
    (lost.checkpoints_path / "step-4").rename(lost.checkpoints_path / "gone")
    (lost.path / "grades.jsonl").unlink()
    again = [values["reward"] for values in steps_of(resume(lost))][:4]
    with pytest.raises(AssertionError):
        assert again == first


@pytest.mark.parametrize("name", often(("grades.jsonl", "step-3.jsonl"), "step-3.jsonl"))
def test_a_disk_that_is_full_in_a_draw_is_named_and_the_run_goes_on(straight, tmp_path, monkeypatch, name):
    storing = draws.storing

    @contextmanager
    def full(path, **known):
        with storing(path, **known):
            yield
            if path.name == name and (name != "grades.jsonl" or (path.parent / "checkpoints" / "step-2").exists()):
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tunesmith.graders.kept.storing", full)
    monkeypatch.setattr("tunesmith.runs.atomic.storing", full)
    with pytest.raises(StorageError, match=rf"{name}: cannot be written.*ENOSPC.*Free some space"):
        train(rewarded(straight[0]), root=tmp_path / "runs")
    monkeypatch.undo()
    (run,) = runs(tmp_path / "runs")
    same_run(resume(run), straight[1])


def test_half_a_line_of_kept_grades_is_left_out(tmp_path):
    from tunesmith.graders.kept import KeptGrades

    kept, file = KeptGrades(), tmp_path / "grades.jsonl"
    kept.keep_in(file)
    kept["a"], kept["b"] = Grade(0.5, {"part": 1.0}), Grade(None, {}, "timeout", "it took too long")
    assert not file.exists()
    kept.flush()
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    again = KeptGrades()
    again.keep_in(file)
    assert again.keep_in(file) == []
    assert dict(again) == dict(kept)
    assert file.read_bytes() == whole


def test_a_damaged_line_of_kept_grades_costs_no_later_one(straight, tmp_path):
    """Before, all that followed it were forgotten, and a judge was asked again."""
    from tunesmith.graders.kept import KeptGrades

    folder, whole = straight
    run = stopped(whole.recipe(), folder / "damaged", 3)
    file = run.path / "grades.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = b"{" + lines[1]
    file.write_bytes(b"".join(lines))
    kept = KeptGrades()
    assert kept.keep_in(file) == [2]
    assert len(kept) == len(lines) - 1
    done = resume(run)
    notes = [event.values["text"] for event in done.events() if event.kind == "note"]
    assert [text for text in notes if "1 line cannot be read, the first is line 2" in text]
    same_run(done, whole)


def test_one_pass_and_eight_have_one_loss_and_gradient(untrained):  # trap: G11
    (groups,), _ = untrained.drawing.groups_of(untrained, [1])
    view = untrained.drawing.view(untrained, groups)
    view = replace(view, collator=replace(view.collator, shares=False), sampler=replace(view.sampler, keys_of=None))
    one = replace(view, sampler=replace(view.sampler, tokens_per_pass=100_000))
    many = replace(view, sampler=replace(view.sampler, tokens_per_pass=1))
    assert len(one.sampler.step(1)) == 1
    assert len(many.sampler.step(1)) == len(view.store) >= 8
    (loss, grads), (other, others) = gradients(untrained, one), gradients(untrained, many)
    assert other == pytest.approx(loss, abs=1e-6)
    for name, grad in grads.items():
        assert torch.allclose(others[name], grad, atol=1e-6, rtol=1e-4), name
    sums = compute_gradients(many, many.sampler, 1).computed
    counts = [float(many.store.targets[list(rows)].sum()) for rows in sums.micro_batches]
    means = [total / count for total, count in zip(sums.losses, counts, strict=True)]
    with pytest.raises(AssertionError):  # trap: G11 planted: a mean of the passes' means
        assert np.mean(means) == pytest.approx(loss, abs=1e-6)


def test_answers_that_teach_nothing_keep_their_share_of_the_divisor(untrained):  # trap: G13, G9
    (groups,), _ = untrained.drawing.groups_of(untrained, [1])
    flat = [replace(group, rewards=[0.5] * len(group.rewards)) if at else group for at, group in enumerate(groups)]
    tokens = sum(len(answer.ids) for group in flat for answer in group.answers)
    view = untrained.drawing.view(untrained, flat)
    assert len(view.store) < 12
    assert sum(view.store.denominators) == tokens
    advantages = {str(view.store.source(i)): view.store.row(i).values_NC[0, 0] for i in range(len(view.store))}
    whole = untrained.drawing.everything(untrained, flat)
    for i in range(len(whole.store)):
        whole.store.row(i).values_NC[:, 0] = advantages.get(str(whole.store.source(i)), 0.0)
    whole = draws.over_answers(untrained, AnswerStore(whole.store.rows, float(tokens)), shares=untrained.drawing.shares)
    (loss, grads), (other, others) = gradients(untrained, view), gradients(untrained, whole)
    assert other == pytest.approx(loss, abs=1e-6)
    assert all(torch.allclose(others[name], grad, atol=1e-6, rtol=1e-4) for name, grad in grads.items())
    with pytest.raises(AssertionError):  # trap: G13 planted: they leave the divisor with their rows
        assert sum(view.store.targets) == sum(view.store.denominators)


def test_a_step_without_any_spread_moves_no_weight(tmp_path):  # trap: G14
    recipe = rewarded(tmp_path, grader="def grade(sample, item):\n    return 0.1\n", train={"max_steps": 2})
    setup = prepare(recipe, root=tmp_path / "runs")
    before = {name: tensor.clone() for name, tensor in setup.attachment.trained.items()}
    events = list(training_steps(setup))
    setup.drawing.close()
    assert [event.values["spread"] for event in events] == [0.0, 0.0]
    assert [event.values["grad_norm"] for event in events] == [0.0, 0.0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.attachment.trained.items())


def test_steps_without_any_spread_are_named_once(tmp_path):
    recipe = rewarded(tmp_path, grader="def grade(sample, item): return 0.5", train={"max_steps": 4})
    run = train(recipe, root=tmp_path / "runs")
    said = [event.values["text"] for event in run.events() if event.kind == "note"]
    (note,) = [text for text in said if "learn nothing" in text]
    assert note.startswith("steps 1 to 3: no prompt has answers of different rewards, and all get 0.5")


def test_scores_that_are_no_numbers_are_named_once(tmp_path):
    grader = "def grade(s, i): return {'reward': len(s['output_text']), 'good': 1.0, 'odd': None}"
    run = train(rewarded(tmp_path, grader=grader, train={"max_steps": 2}), root=tmp_path / "runs")
    said = [event.values["text"] for event in run.events() if event.kind == "note"]
    (note,) = [text for text in said if "'odd'" in text]
    assert note.startswith("the grader's score 'odd' is no finite number in 12 of 12 answers (None): left out of")
    assert all(list(event.values["scores"]) == ["good"] for event in run.events() if event.kind == "step")


def test_answers_without_the_json_that_is_read_are_counted(tmp_path):
    file = tmp_path / "grader.json"
    of_text = {"type": "length", "high": 9, "input": "{{sample.output_text}}"}
    of_json = {"type": "string_check", "operation": "eq", "input": "{{sample.output_json.a}}", "reference": "b"}
    file.write_text(json.dumps({"type": "multi", "graders": {"a": of_text, "b": of_json}, "calculate_output": "a + b"}))
    run = train(rewarded(tmp_path, reinforce={"grader": str(file)}, train={"max_steps": 1}), root=tmp_path / "runs")
    (step,) = [event for event in run.events() if event.kind == "step"]
    assert step.values["unread"] == step.values["answers"] == 12
    assert of_step(step)["errors"] == {"train_sample_parse_error_count": 12}


def test_the_distance_from_the_untouched_model_is_that_of_plain_passes(setup):
    def logp(ids, num):  # of the last tokens, by a pass of the text alone
        with torch.no_grad():
            logps_TV = setup.model(torch.tensor([ids])).logits[0, -num - 1 : -1].double().log_softmax(-1)
        return logps_TV.gather(1, torch.tensor(ids[-num:])[:, None]).sum().item()

    store, rows, drawing = setup.rows.held_store, setup.rows.held_rows.tolist(), setup.drawing
    groups = drawing.held_out(setup, store, rows)
    assert graded._nats_away(setup, drawing, groups) == [[0.0, 0.0]] * len(rows), "the adapter adds nothing yet"
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in setup.attachment.trained.values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=noise))
    setup.attachment.publish()
    away = graded._nats_away(setup, drawing, groups)
    setup.model.eval()
    for group, nats in zip(groups, away, strict=True):
        for answer, found in zip(group.answers, nats, strict=True):
            ids = [*store.row(group.row).ids.tolist(), *answer.ids]
            now = logp(ids, len(answer.ids))
            with setup.attachment.adapter_disabled():
                expected = now - logp(ids, len(answer.ids))
            assert found == pytest.approx(expected, abs=1e-4)
            assert abs(expected) > 1e-3


def test_cut_answers_are_graded_or_leave_step_and_divisor(untrained):  # trap: G9
    (groups,), _ = untrained.drawing.groups_of(untrained, [1])
    answers = [answer for group in groups for answer in group.answers]
    assert {answer.ended for answer in answers} == {False, True} or any(not answer.ended for answer in answers)
    graded = untrained.drawing.view(untrained, groups)
    assert sum(graded.store.denominators) == sum(len(answer.ids) for answer in answers)
    group = groups[0]
    ended = [replace(answer, ended=i % 2 == 0) for i, answer in enumerate(group.answers)]
    untrained.drawing.recipe = untrained.recipe.model_copy(
        update={"reinforce": untrained.recipe.reinforce.model_copy(update={"cut": "drop"})}
    )
    grades = [Grade(float(i)) for i in range(len(ended))]
    dropped = untrained.drawing.view(untrained, [untrained.drawing._graded(group.row, ended, grades)])
    assert sum(dropped.store.denominators) == sum(len(answer.ids) for answer in ended if answer.ended)
    assert {dropped.store.source(i).sample for i in range(len(dropped.store))} == {1, 3}
    untrained.drawing.recipe = untrained.recipe


def test_only_drawn_tokens_are_learnt(untrained):  # trap: G28
    (groups,), _ = untrained.drawing.groups_of(untrained, [1])
    view = untrained.drawing.everything(untrained, groups)
    drawn = [(group, answer) for group in groups for answer in group.answers]
    for i, (group, answer) in enumerate(drawn):
        row = view.store.row(i)
        assert row.ids[row.trained].tolist() == list(answer.ids)
        assert row.ids[~row.trained].tolist() == untrained.store.row(group.row).ids.tolist()
        assert row.values_NC[:, VALUE_COLUMNS.index("drawn")].tolist() == pytest.approx(answer.logps)
    with pytest.raises(AssertionError):  # trap: G28 planted: prompts are learnt too
        assert row.ids.tolist() == list(answer.ids)


def test_all_answers_are_graded_as_served_and_learnt_whole(untrained):  # trap: G29
    grade = "import time\ndef grade(s, i):\n    time.sleep(0.01 * s['tokens'])\n    return len(s['output_text'])\n"
    file = Path(untrained.recipe.reinforce.grader).with_name("slow.py")
    file.write_text(grade)
    pool = Pool(Function(type="function", file=str(file)))
    (groups,), _ = replace(untrained.drawing, pool=pool).groups_of(untrained, [1])
    pool.close()
    answers = [(group, i) for group in groups for i in range(len(group.answers))]
    assert len(answers) == 12
    tokenizer = untrained.renderer.tokenizer
    for group, i in answers:
        served = tokenizer.decode(group.answers[i].ids, skip_special_tokens=True).strip()
        assert group.answers[i].text == served
        assert group.rewards[i] == len(served)
    view = untrained.drawing.everything(untrained, groups)
    assert view.store.targets.tolist() == [len(group.answers[i].ids) for group, i in answers]
    special = {*tokenizer.all_special_ids}
    with pytest.raises(AssertionError):  # trap: G29 planted: what the grader does not see is not learnt either
        assert all(not special & {*view.store.row(i).ids[view.store.row(i).trained].tolist()} for i in range(12))


def test_a_tag_that_the_template_opens_is_told_to_the_grader(tmp_path, monkeypatch):  # trap: G30
    grader = "def grade(sample, item): return float(sample['prefix'] == '<think>\\n')"
    recipe = rewarded(tmp_path, grader=grader)
    (tmp_path / "model-llama" / "chat_template.jinja").write_text(template("thinks_first"))

    def rewards() -> list[float]:
        setup = prepare(recipe, root=tmp_path / "runs")
        (groups,), _ = setup.drawing.groups_of(setup, [1])
        setup.drawing.close()
        assert any("opens <think> at the end of each prompt" in note for note in setup.notes)
        return [reward for group in groups for reward in group.scored]

    assert rewards() == [1.0] * 12
    monkeypatch.setattr(draws, "begun_answer", lambda tokenizer, ids: "")
    with pytest.raises(AssertionError):  # trap: G30 planted: nobody says so
        assert rewards() == [1.0] * 12


def test_grades_that_fail_are_no_reward_and_belong_to_no_group(tmp_path):  # trap: G16
    grader = """
def grade(sample, item):
    kind = len(sample["output_text"]) % 6
    if kind == 0:
        return None
    if kind == 1:
        return float("nan")
    if kind == 2:
        raise ValueError("no")
    return 0.25 * kind
"""
    setup = prepare(rewarded(tmp_path, grader=grader), root=tmp_path / "runs")
    (groups,), _ = setup.drawing.groups_of(setup, [1])
    setup.drawing.close()
    for group in groups:
        for answer, grade in zip(group.answers, group.grades, strict=True):
            kind = len(answer.text) % 6
            assert grade.reward == (None if kind < 3 else 0.25 * kind)
        scored = [grade.reward for grade in group.grades if grade.reward is not None]
        assert group.scored == scored
    values = draws._values_of(groups)
    rewards = [grade.reward for group in groups for grade in group.grades if grade.reward is not None]
    assert values["reward"] == pytest.approx(np.mean(rewards))
    assert set(values["unscored"]) <= {"exception", "not_a_number"}
    with pytest.raises(AssertionError):  # trap: G16 planted: counted as 0
        assert np.mean([grade.reward or 0.0 for group in groups for grade in group.grades]) == values["reward"]


def test_a_grader_that_mostly_fails_ends_the_run_which_can_go_on(tmp_path):
    recipe = rewarded(tmp_path, grader='def grade(sample, item):\n    raise OSError("the judge is away")\n')
    with pytest.raises(UngradedError, match=r"(?s)12 of 12 answers have no reward.*the judge is away"):
        train(recipe, root=tmp_path / "runs")
    away = tmp_path / "away"
    grader = f"""
import os

def grade(sample, item):
    if os.path.exists({str(away)!r}):
        raise OSError("the judge is away")
    return len(sample["output_text"]) / 100
"""
    recipe = rewarded(tmp_path / "second", grader=grader)

    def leave(event) -> None:
        if event.kind == "step" and event.step == 3:
            away.touch()

    with pytest.raises(UngradedError, match=r"(?s)step 4: 12 of 12 answers have no reward.*Saved: step 3"):
        train(recipe, root=tmp_path / "second" / "runs", listener=Listener(on_event=leave))
    away.unlink()
    (run,) = runs(tmp_path / "second" / "runs")
    assert run.state() == "failed"
    done = resume(run)
    assert len(steps_of(done)) == 6
    assert all("unscored" not in values for values in steps_of(done))


def planted(monkeypatch, change) -> None:
    """Let answers come with other log-probabilities, or from another model."""
    real = draws_module.draw_answers

    def changed(decoder, asked, seeds, how, *, on_answers):
        answers = real(decoder, asked, seeds, how)
        found = [[change(answer) for answer in group] for group in answers]
        for at, group in enumerate(found):
            on_answers(at, group)
        return found

    monkeypatch.setattr(groups, "draw_answers", changed)


def test_what_draws_is_what_learns(setup):
    check_sampler(setup)
    event = next(training_steps(setup))
    assert event.values["largest_mismatch"] < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: replace(answer, logps=(*answer.logps[1:], answer.logps[0])),  # trap: G2 planted
        lambda answer: replace(answer, logps=tuple(logp + 0.3 for logp in answer.logps)),  # trap: G17 planted
    ],
    ids=["rolled", "noise"],
)
def test_log_probabilities_of_another_model_are_refused(setup, monkeypatch, change):  # trap: G17
    planted(monkeypatch, change)
    with pytest.raises(RunError, match=r"step 1: before any update.*Nothing was trained"):
        check_sampler(setup)


def test_a_temperature_on_one_side_only_is_refused(tmp_path, monkeypatch):  # trap: G5
    setup = prepare(rewarded(tmp_path, reinforce={"temperature": 0.7}), root=tmp_path / "runs")
    check_sampler(setup)
    log_probs = draws.log_probs
    monkeypatch.setattr(
        draws, "log_probs", lambda model, batch, temperature, output: log_probs(model, batch, 1.0, output)
    )
    with pytest.raises(RunError, match="step 1"):  # trap: G5 planted
        check_sampler(setup)
    setup.drawing.close()


def test_answers_are_drawn_by_the_weights_of_their_step(tmp_path, monkeypatch):  # trap: G3
    sections = {"method": "full", "optim": {"lr": 0.03, "warmup": 0}}
    setup = prepare(rewarded(tmp_path, **sections), root=tmp_path / "runs")
    assert all(event.values["largest_mismatch"] < 1e-3 for event in training_steps(setup))
    setup.drawing.close()
    setup = prepare(rewarded(tmp_path, **sections), root=tmp_path / "runs")
    drawn = setup.drawing.groups_of(setup, [1])
    monkeypatch.setattr(setup.drawing, "groups_of", lambda state, steps: drawn)
    with pytest.raises(AssertionError):  # trap: G3 planted: the answers of step 1 at every step
        assert all(event.values["largest_mismatch"] < 1e-3 for event in training_steps(setup))
    setup.drawing.close()


def test_seeds_follow_from_prompt_step_and_copy(untrained):  # trap: G21
    rows = untrained.sampler.rows(1)
    of = partial(draws.seeds_of, untrained.store, seed=0)
    assert of(rows, step=1) == of(rows[::-1], step=1)[::-1]
    every = [*of(rows, step=1), *of(rows, step=2), *draws.seeds_of(untrained.store, rows, seed=1, step=1)]
    assert len(set(every)) == 9
    assert len(set(of([rows[0]] * 3, step=1))) == 3
    with pytest.raises(AssertionError):  # trap: G21 planted: all steps draw alike
        assert len({*of(rows, step=1), *of(rows, step=1)}) == 6


@pytest.mark.parametrize("kl", often([0.0, 0.05], 0.05))
def test_the_reference_is_the_untouched_model_at_every_step(tmp_path, kl):  # trap: G23
    setup = prepare(rewarded(tmp_path, reinforce={"kl": kl}, optim={"lr": 0.05}), root=tmp_path / "runs")
    divergences = [event.values.get("kl") for event in training_steps(setup)]
    setup.drawing.close()
    if not kl:
        assert divergences == [None] * 6
        return
    assert divergences[0] == pytest.approx(0.0, abs=1e-7)
    assert max(divergences[3:]) > 1e-4
    with pytest.raises(AssertionError):  # trap: G23 planted: a reference that moves along
        assert divergences[5] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"reinforce": {"grader": None}}, "reinforce.grader: is missing"),
        ({"reinforce": {"temperature": 0.0}}, "greedy have no spread"),
        ({"reinforce": {"samples": 1}}, "samples"),
        ({"reinforce": {"kl": 0.1}, "method": "full"}, "reinforce.kl: 0.1: needs the untouched model"),
        ({"method": {"dropout": 0.1}}, "dropout"),
        ({"shard": True}, "shard: true: answers cannot be drawn while layers are split"),
        ({"task": "chat"}, "reinforce.grader: .*task chat has no grader"),
        ({"data": {"columns": {"prompt": "number"}}}, "data.columns"),
        ({"evaluation": {"surprising": 5}}, "evaluation.surprising"),
        ({"evaluation": {"sample_tokens": 5}}, "evaluation.sample_tokens: 5: .*Set reinforce.max_new_tokens"),
        ({"evaluation": {"metric": "accuracy"}}, "There are: reward, pass_1, loss"),
        ({"reinforce": {"max_new_tokens": 100_000}}, "leaves no room"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(tmp_path, sections, words):  # trap: G6
    with pytest.raises(RecipeError, match=words):
        prepare(rewarded(tmp_path, **sections), root=tmp_path / "runs")


def test_a_grader_alone_says_the_task(tmp_path):
    setup = prepare(rewarded(tmp_path, task="auto"), root=tmp_path / "runs")
    setup.drawing.close()
    assert setup.recipe.task == "reinforce"
    assert setup.recipe.evaluation.metric == "reward"


def test_a_prompt_that_leaves_no_room_for_answers_is_named(tmp_path):  # trap: G24
    recipe = rewarded(tmp_path, data={"max_tokens": 60})
    file = prompts(tmp_path / "prompts.jsonl", 12)
    file.write_text(file.read_text() + json.dumps({"prompt": "a long one " * 80}) + "\n")
    with pytest.raises(DataError) as refused:
        prepare(recipe, root=tmp_path / "runs")
    assert re.search(
        r"prompts.jsonl:13: too_long: its prompt of \d+ tokens is longer than", str(refused.value.problems[0])
    )
    dropped = recipe.model_copy(update={"data": recipe.data.model_copy(update={"too_long": "drop"})})
    setup = prepare(dropped, root=tmp_path / "runs")
    setup.drawing.close()
    assert setup.rows.skipped == 1
    with pytest.raises(AssertionError):  # trap: G24 planted: it is cut
        assert len(setup.store) == 13


def test_models_whose_answers_cannot_be_drawn_together_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="packed rows, which this model does not run"):
        prepare(rewarded(tmp_path, arch="bloom"), root=tmp_path / "runs")


def test_an_edited_grader_is_another_run(straight, tmp_path):
    folder, whole = straight
    run = stopped(whole.recipe(), folder / "edited", 2)
    (folder / "grader.py").write_text(DIGITS + "\n# edited\n")
    try:
        with pytest.raises(RunError, match="grader was"):
            resume(run)
    finally:
        (folder / "grader.py").write_text(DIGITS)
    same_run(resume(run), whole)


def test_the_result_is_used_as_that_of_any_run(straight, tmp_path):
    folder, run = straight
    (line,) = tunesmith.predict(run, ["Hello there"], max_new_tokens=4)
    assert isinstance(line["answer"], str)
    with pytest.raises(InputError, match=r"tunesmith grade .*--model RUN"):
        tunesmith.evaluate(run, folder / "prompts.jsonl")
    assert (run.path / "adapter" / "adapter_model.safetensors").exists()
    lines = (run.path / "rollouts" / "step-6.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert json.loads(lines[0]).keys() >= {"source", "sample", "text", "reward", "advantage", "ended", "tokens"}


def test_a_plan_counts_the_answers_at_their_longest(tmp_path):
    recipe = rewarded(tmp_path, reinforce={"streams": 6})
    found = resolve_run(recipe, root=tmp_path / "runs")
    assert found.forecast is not None, found.notes
    duration = found.forecast.duration
    assert duration is not None
    # Before and after 3 held-out prompts of 2 answers, 6 at a time: 6 tokens each. Those of a step are in its time.
    assert (duration.counts["answering"], duration.counts["grading"]) == (2 * 6 * 1, 2 * 3 * 2)
    assert duration.counts["training"] == 6
    prompts_I = found.rows.store.lengths[found.rows.train_rows]
    assert found.forecast.sampler.lengths_I.tolist() == np.repeat(prompts_I + 6, 4).tolist()
    assert any("reinforce.max_new_tokens" in note for note in found.notes)


def test_a_grader_in_python_is_a_function_of_a_file(tmp_path):
    def inner(sample, item):
        return 0.0

    for grader in (inner, lambda sample, item: 0.0):
        with pytest.raises(RecipeError, match="load them from a file"):
            tunesmith.train("model", [{"prompt": "Hi"}], grader=grader, root=tmp_path)
    assert _word_of(prompts) == f"{prompts.__code__.co_filename}:prompts"
    for given in ((prompts, {"samples": 4}), (None, {"samples": 4, "grader": prompts})):
        assert _graded_by(*given) == {"reinforce": {"samples": 4, "grader": _word_of(prompts)}}
    assert file_of("a/grader.py:reward") == file_of("a/grader.py") == "a/grader.py"
    assert file_of("grader.json") == "grader.json"


def test_one_prompt_is_on_one_side_whatever_else_its_rows_say(tmp_path):
    recipe = rewarded(tmp_path)
    rows = [{"prompt": f"{i % 10} and more?", "answer": i} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup = prepare(recipe, root=tmp_path / "runs")
    setup.drawing.close()
    sides = [set(store.inputs[rows_I].tolist()) for store, rows_I in setup.rows.sides]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) >= 2
    seeds = draws.seeds_of(setup.store, [0, 10, 20], seed=0, step=1)
    assert len(set(seeds)) == 3  # of one prompt, three times in a step


def test_full_tuning_trains_embeddings_of_tokens_that_only_answers_have(tmp_path, monkeypatch):  # trap: G25
    recipe = rewarded(tmp_path, method="full", train={"max_steps": 1})
    setup = prepare(recipe, root=tmp_path / "runs")
    next(training_steps(setup))
    setup.drawing.close()
    monkeypatch.setattr(methods, "attach", partial(attach_as_rows, methods.attach))
    monkeypatch.setattr(setups, "attach", methods.attach)
    planted = prepare(recipe, root=tmp_path / "runs")
    with pytest.raises((AssertionError, ModelError)):  # trap: G25 planted: those of the prompts alone
        next(training_steps(planted))
    planted.drawing.close()


def attach_as_rows(attach, recipe, model, **how):
    """As for rows that have their answers: a recipe without a grader."""
    plain = recipe.model_copy(update={"reinforce": recipe.reinforce.model_copy(update={"grader": None})})
    return attach(plain, model, **how)


def test_held_out_answers_without_a_grade_leave_a_checkpoint(tmp_path):
    away = tmp_path / "away"
    grader = f"""
import os

def grade(sample, item):
    if os.path.exists({str(away)!r}):
        raise OSError("the judge is away")
    return len(sample["output_text"]) / 100
"""
    recipe = rewarded(tmp_path, grader=grader, evaluation={"every": 3}, checkpoint={"every": 100})

    def leave(event) -> None:
        if event.kind == "step" and event.step == 3:
            away.touch()

    with pytest.raises(UngradedError, match=r"(?s)held-out answers: none of them has a reward.*Saved: step 3"):
        train(recipe, root=tmp_path / "runs", listener=Listener(on_event=leave))
    away.unlink()
    (run,) = runs(tmp_path / "runs")
    assert [values["reward"] for values in steps_of(resume(run))][:3] == [values["reward"] for values in steps_of(run)][
        :3
    ]


def test_a_plan_looks_at_the_grader(tmp_path):
    """Before, it was found out once the model was loaded."""
    word = str(tmp_path / "reward.json")
    recipe = rewarded(tmp_path, reinforce={"grader": word})
    with pytest.raises(InputError, match="there is no such file"):
        resolve_run(recipe, root=tmp_path / "runs")
    fields = {"input": "{{sample.output_text}}", "reference": "{{item.nothing}}"}
    (tmp_path / "reward.json").write_text(json.dumps({"type": "string_check", "operation": "eq", **fields}))
    with pytest.raises(InputError, match=r"item\.nothing"):
        resolve_run(recipe, root=tmp_path / "runs")


def test_a_first_step_that_is_hardly_graded_keeps_no_grades(tmp_path):
    """A resumed run would find them, and end again."""
    away = tmp_path / "away"
    away.touch()
    grader = f"""
import os

def grade(sample, item):
    if os.path.exists({str(away)!r}) and item["number"] != 0:
        raise OSError("the judge is away")
    return len(sample["output_text"]) / 100
"""
    recipe = rewarded(tmp_path, grader=grader)
    words = r"first, of \S+prompts.jsonl:\d+: [^!]*the judge is away[^!]*Try the grader: .* grade \S+prompts.jsonl "
    with pytest.raises(UngradedError, match=words):
        train(recipe, root=tmp_path / "runs")
    (run,) = runs(tmp_path / "runs")
    assert not (run.path / "grades.jsonl").exists()
    away.unlink()
    assert len(steps_of(resume(run))) == 6


def test_two_groups_of_one_prompt_have_their_own_advantages(setup, tmp_path):
    group = setup.drawing.groups_of(setup, [1])[0][0][0]

    def rewarded_by(*rewards: float) -> Group:
        grades = [replace(grade, reward=reward) for grade, reward in zip(group.grades, rewards, strict=True)]
        return replace(group, grades=grades, rewards=rewards)

    setup.drawing.folder = tmp_path / "rollouts"
    setup.drawing._write([rewarded_by(0, 0, 0, 1), rewarded_by(1, 0, 0, 0)], setup.store, 1)
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "step-1.jsonl").read_text().splitlines()]
    assert [line["advantage"] for line in lines] == [-0.25, -0.25, -0.25, 0.75, 0.75, -0.25, -0.25, -0.25]


def test_a_probe_comes_to_its_end(setup, tmp_path):
    """Its held-out rows are several prompts, of which nothing is to be learnt."""
    found = Found()
    list(measure(setup, tmp_path, found))
    assert found.steps
    assert {"saving", "finishing"} <= set(found.work)


def test_memory_that_ends_while_answers_are_drawn_has_its_own_way_out(tmp_path, monkeypatch):
    real, calls = groups.draw_answers, []

    def lacking(decoder, asked, seeds, how, *, on_answers):
        calls.append(how)
        if len(calls) < 4:  # step 1, held-out prompts, step 2
            return real(decoder, asked, seeds, how, on_answers=on_answers)
        monkeypatch.setattr("tunesmith.generation.draws._drawn", lambda scheduler, requests: ())
        return real(decoder, asked, seeds, how, on_answers=on_answers)

    monkeypatch.setattr(groups, "draw_answers", lacking)
    with pytest.raises(OutOfMemoryError, match=r"Fewer reinforce\.samples.*Saved: step 2.*start a new run") as error:
        train(rewarded(tmp_path), root=tmp_path / "runs")
    assert "tokens_per_pass" not in str(error.value)


def test_the_recipe_of_a_moved_run_names_its_grader_where_it_is_now(straight, tmp_path):
    folder, whole = straight
    shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("stopped-*", "edited", "planted"))
    (folder / "grader.py").rename(folder / "hidden.py")
    try:
        recipe = Run.open(str(tmp_path / "moved" / whole.path.relative_to(folder))).recipe()
    finally:
        (folder / "hidden.py").rename(folder / "grader.py")
    assert recipe.reinforce.grader == str(folder / "grader.py")
    assert moved_to(recipe).reinforce.grader == str(tmp_path / "moved" / "grader.py")


def test_prompts_are_tried_for_numbers_that_are_too_large(setup):
    assert not setups._overflows(setup, is_default=True)
    with torch.no_grad():
        next(setup.model.parameters()).fill_(float("inf"))
    assert setups._overflows(setup, is_default=True)
