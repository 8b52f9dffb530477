"""Several updates of one draw: later steps learn from answers of weights that are gone, and say so in their ratios."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from killed_runs import kill_runs
from rewarded import COUNTED, rewarded
from tiny_run import same_run, stopped
from tunesmith.errors import RunError
from tunesmith.graders.kept import KeptGrades
from tunesmith.tasks.policy_losses import VALUE_COLUMNS
from tunesmith.training.draw import Drawing
from tunesmith.training.groups import DrawnStep
from tunesmith.training.loop import training_steps
from tunesmith.training.probe import Found, measure
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train

TWO = {"reinforce": {"updates": 2}}
FAST = {"method": "full", "optim": {"lr": 0.03, "warmup": 0}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(rewarded(folder, **TWO), root=folder / "runs")


@pytest.fixture
def setup(tmp_path):
    made = prepare(rewarded(tmp_path, **TWO, **FAST), root=tmp_path / "runs")
    yield made
    made.drawing.close()


def steps_of(state) -> list[dict]:
    return [event.values for event in training_steps(state)]


def test_later_steps_of_a_draw_have_ratios_and_are_clipped(setup):
    values = steps_of(setup)
    assert [of_step["rows"] for of_step in values] == [setup.sampler.rows(step) for step in range(1, 7)]
    clipped = [of_step["clipped_low"] + of_step["clipped_high"] for of_step in values]
    assert clipped[::2] == [0.0] * 3
    assert min(clipped[1::2]) > 0
    # π_old is of the weights that drew, whatever was learnt since.
    assert max(of_step["largest_mismatch"] for of_step in values) < 1e-3


@pytest.mark.slow
def test_the_test_sees_ratios_to_the_weights_of_the_step(setup, monkeypatch):  # trap: G26 planted
    view = Drawing.view
    monkeypatch.setattr(Drawing, "view", lambda self, state, groups, old=(): view(self, state, groups))
    values = steps_of(setup)
    assert values[1]["clipped_low"] + values[1]["clipped_high"] == 0.0
    with pytest.raises(AssertionError):
        assert max(of_step["largest_mismatch"] for of_step in values) < 1e-3


def test_all_answers_of_a_draw_are_by_the_weights_of_its_first_step(setup):  # trap: G26
    drawing = setup.drawing
    (first, second), _ = drawing.groups_of(setup, [1, 2])
    steps = training_steps(setup)
    next(steps)
    pending = DrawnStep.of(drawing.pending(1)["2"])
    assert [group.answers for group in pending.groups] == [group.answers for group in second]
    assert drawing.pending(1).keys() == {"2"}
    view = drawing.view(setup, pending.groups, pending.old)
    for row in range(len(view.store)):
        numbers_NC = view.store.row(row).values_NC
        old_N, drawn_N = (numbers_NC[:, VALUE_COLUMNS.index(name)] for name in ("old", "drawn"))
        assert np.allclose(old_N, drawn_N, atol=1e-4)
    # D is of the answers of this update, not of the draw.
    assert sum(view.store.denominators) == sum(len(answer.ids) for group in second for answer in group.answers)
    next(steps)
    assert drawing.pending(2) == {}
    with pytest.raises(AssertionError):  # trap: G26 planted: each step draws for itself
        assert [group.answers for group in drawing.groups_of(setup, [2])[0][0]] == [group.answers for group in second]
    assert [len(group.answers) for group in first] == [4] * 3


def test_a_run_stopped_within_a_draw_ends_as_one_that_never_was(straight):  # trap: G22
    folder, whole = straight
    same_run(resume(stopped(whole.recipe(), folder / "stopped", 3)), whole)


@pytest.mark.slow
def test_the_comparison_catches_a_draw_that_is_not_kept_whole(straight, monkeypatch):  # trap: G22 planted
    folder, whole = straight
    run = stopped(whole.recipe(), folder / "planted", 3)
    take = Drawing.take
    monkeypatch.setattr(Drawing, "take", lambda self, pending: None)
    with pytest.raises(RunError, match=r"step 4: learns from answers that are drawn before step 3"):
        resume(run)

    def forgetful(self, pending) -> None:
        take(self, {at: {**values, "old": []} for at, values in pending.items()})

    monkeypatch.setattr(Drawing, "take", forgetful)
    with pytest.raises(AssertionError):
        same_run(resume(run), whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("updates", [1, 2])
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path, updates):  # trap: G22
    recipe = rewarded(tmp_path, reinforce={"updates": updates}, evaluation={"every": 3}, checkpoint={"every": 1})
    assert kill_runs(tmp_path, recipe, kills=40, seed=1)[1] >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("updates", [1, 2])
def test_killed_beside_a_judge_of_many_minds_it_learns_what_was_said_once(tmp_path, monkeypatch, updates):  # trap: G22
    """The bits of a run that nothing happens to, and that is given the same grades."""
    settings: dict = {"reinforce": {"updates": updates}, "evaluation": {"every": 3}, "checkpoint": {"every": 1}}
    recipe = rewarded(tmp_path, grader=COUNTED, **settings)
    keep_in, numbers = KeptGrades.keep_in, count()

    def with_grades_of(killed):
        said = (killed.path / "grades.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(KeptGrades, "keep_in", lambda kept, path: path.write_bytes(said) and keep_in(kept, path))
            again = train(recipe, root=tmp_path / f"again-{next(numbers)}")
        assert (again.path / "grades.jsonl").read_bytes() == said, "it asked for no grade"
        return again

    assert kill_runs(tmp_path, recipe, kills=40, seed=1, straight=with_grades_of)[1] >= 1


def test_a_last_draw_is_of_the_steps_that_are_left(tmp_path):
    recipe = rewarded(tmp_path, reinforce={"updates": 4})
    setup = prepare(recipe, root=tmp_path / "runs")
    values = steps_of(setup)
    assert len(values) == 6
    assert setup.drawing.pending(6) == {}
    setup.drawing.close()


def test_a_plan_counts_draws_and_a_probe_makes_them(tmp_path):
    recipe = rewarded(tmp_path, reinforce={"updates": 2, "streams": 12})
    forecast = resolve_run(recipe, root=tmp_path / "runs").forecast
    # Before and after 3 held-out prompts of 2 answers, 12 at a time: 6 tokens each.
    assert forecast.duration.counts["answering"] == 2 * 6
    setup = prepare(recipe, root=tmp_path / "runs")
    setup = replace(setup, forecast=None)
    found = Found()
    list(measure(setup, tmp_path, found))
    setup.drawing.close()
    assert found.draws == 2
    draws = len(found.steps) // 2
    # Each of 24 answers, 12 at a time.
    assert (found.work["answering"].count, found.work["grading"].count) == (draws * 6 * 2, draws * 24)
    assert len(found.steps) % 2 == 0
