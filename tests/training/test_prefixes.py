"""Whether beginnings are shared is asked of rows, recipe and model, and said."""

import json
from pathlib import Path

import pytest

from tiny_run import tiny_recipe
from tunesmith.models import segments
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.shared_prefixes import KEY

SYSTEM = "the quick brown fox jumps over a lazy dog what is tallest mountain on Earth"


def prepared(folder: Path, **sections) -> Setup:
    """A run on chats that all begin with the same instruction."""
    folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(folder, **{"train": {"tokens_per_pass": 4096}, **sections})
    file = Path(recipe.data.train[0].path)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": SYSTEM})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(recipe, root=folder)


def choice_of(setup: Setup):
    (choice,) = [choice for choice in setup.choices if choice.key == KEY]
    assert setup.collator.shares == choice.value
    assert not setup.held_collator.shares  # whoever measures the result again computes whole rows
    return choice


def test_a_common_instruction_is_computed_once_and_trains_alike(tmp_path):
    """float32: 12 steps of one training, 1e-4 apart at most."""
    shared, plain = prepared(tmp_path / "a"), prepared(tmp_path / "b", kernels="plain")
    assert "computed once for all" in choice_of(shared).reason
    assert "kernels: plain leaves them" in choice_of(plain).reason
    ours, theirs = (list(training_steps(setup)) for setup in (shared, plain))
    assert [e.values["loss"] for e in ours] == pytest.approx([e.values["loss"] for e in theirs], abs=1e-4)
    assert [e.values["tokens"] for e in ours] == [e.values["tokens"] for e in theirs]
    assert all(e.values["computed"] == e.values["tokens"] for e in theirs)
    assert sum(e.values["computed"] for e in ours) < 0.8 * sum(e.values["tokens"] for e in ours)


def test_a_step_is_the_same_whether_or_not_others_came_before(tmp_path):
    """Bit for bit: what is shared follows from the rows of the pass."""
    straight = [e.values for e in training_steps(prepared(tmp_path / "a", optim={"lr": 1e-12}))]
    alone = prepared(tmp_path / "b", optim={"lr": 1e-12})
    assert next(iter(training_steps(alone, start=4))).values["rows"] == straight[4]["rows"]
    assert next(iter(training_steps(alone, start=4))).values["computed"] == straight[4]["computed"]


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"dropout": 0.1}, "method.dropout draws anew"),
        ({"dropout": 0.1, "method": {"dropout": 0.0}}, "the model's dropout draws anew"),
    ],
)
def test_where_something_is_drawn_rows_are_computed_whole(tmp_path, sections, reason):
    setup = prepared(tmp_path, **sections)
    assert reason in choice_of(setup).reason


def test_rows_that_begin_otherwise_are_computed_whole(tmp_path):
    setup = prepare(tiny_recipe(tmp_path), root=tmp_path)
    choice = choice_of(setup)
    assert not choice.value
    assert "share are only 0 %" in choice.reason


def test_a_model_that_then_learns_otherwise_is_told(tmp_path, monkeypatch):
    """Planted: the beginning's gradients reach nothing."""
    real = segments.SharedPrefixes.of

    def forgetful(pieces, device):
        shared = real(pieces, device)
        return segments.SharedPrefixes(shared.index_K, shared.own_T, ())

    monkeypatch.setattr(segments.SharedPrefixes, "of", forgetful)
    choice = choice_of(prepared(tmp_path))
    assert not choice.value
    assert "the model then learns otherwise" in choice.reason


def test_a_model_that_refuses_is_told(tmp_path, monkeypatch):
    """As a kernel would that cannot read more keys than it has queries."""

    def refuse(pieces, device):
        raise RuntimeError("as many keys as queries, please")

    monkeypatch.setattr(segments.SharedPrefixes, "of", refuse)
    assert "the model then refuses (as many keys as queries, please)" in choice_of(prepared(tmp_path)).reason


def test_a_model_that_then_answers_otherwise_is_told(tmp_path, monkeypatch):
    """Planted: rows read the beginning one token too far to the left."""
    real = segments.SharedPrefixes.of

    def shifted(pieces, device):
        shared = real(pieces, device)
        return segments.SharedPrefixes((shared.index_K - 1).clamp_min(0), shared.own_T, shared.families)

    monkeypatch.setattr(segments.SharedPrefixes, "of", shifted)
    assert "the model then answers otherwise" in choice_of(prepared(tmp_path)).reason
