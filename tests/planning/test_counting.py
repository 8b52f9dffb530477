"""What a plan counts is what a run does."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny_run import tiny_recipe
from tunesmith.evaluation import general
from tunesmith.planning.forecast import WORK_KINDS
from tunesmith.training import evaluate as looking
from tunesmith.training import trainer as training
from tunesmith.training.resolve import resolve_run
from tunesmith.training.trainer import train

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fred", "Gaia", "Hugo", "Ines", "Jack", "Kate", "Leon") * 2
WAYS: dict[str, dict[str, Any]] = {
    "an epoch": {"train": {"epochs": 1}},
    "measured on the way, the best kept": {"evaluation": {"every": 3, "keep": "best"}, "checkpoint": {"every": 100}},
    "some rows looked through, and no answer asked": {"evaluation": {"surprising": 4, "samples": 0}},
    "nothing held out": {"data": {"held_out": 0.0}, "train": {"max_steps": 3}},
    "general text": {"evaluation": {"general": True}, "train": {"max_steps": 2}},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_work_that_is_foreseen_is_the_work_that_is_done(tmp_path: Path, monkeypatch, way):
    recipe = tiny_recipe(tmp_path, **WAYS[way])
    duration = resolve_run(recipe, root=tmp_path / "runs").forecast.duration
    done = work_of_a_run(recipe, tmp_path, monkeypatch)
    foreseen = dict(duration.counts)
    if recipe.evaluation.keep == "best":  # each best is saved, and which ones are cannot be foreseen
        assert done.pop("saving") >= foreseen.pop("saving")
    assert foreseen == pytest.approx({kind: done[kind] for kind in foreseen}, rel=0.1)  # rows have unequal lengths
    assert set(duration.counts) == set(WORK_KINDS)
    if len(recipe.data.eval) or recipe.data.held_out:
        assert all(duration.prices[kind] > 0 for kind, count in duration.counts.items() if count)


@pytest.mark.parametrize("documents", [10_000, 9])
def test_documents_that_are_searched_count(tmp_path: Path, monkeypatch, documents):
    pairs = [{"anchor": f"{name} the {number}th", "positive": f"who is {name}"} for number, name in enumerate(NAMES)]
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = tiny_recipe(tmp_path, data={"train": [str(rows)]}, train={"max_steps": 2}, embed={"documents": documents})
    duration = resolve_run(recipe, root=tmp_path / "runs").forecast.duration
    done = work_of_a_run(recipe, tmp_path, monkeypatch)
    assert duration.counts["measuring"] == pytest.approx(done["measuring"], rel=0.1)


def work_of_a_run(recipe: Any, folder: Path, monkeypatch: Any) -> Counter[str]:
    """Counted where it is done. Answers are counted as long as they may be."""
    done: Counter[str] = Counter(starting=1, finishing=1)
    measured, texts, answers = looking._predicted, general.text_batches, looking.samples

    def predicted(session, collator, rows_I, what, writing=None):
        done["measuring"] += int(collator.store.lengths[rows_I].sum())
        return measured(session, collator, rows_I, what, writing)

    def text_batches(rows, **how):
        done["measuring"] += sum(len(row.ids) for row in rows)
        return texts(rows, **how)

    def answered(session, name, writing):
        done["answering"] += writing.writer.new_tokens  # all at once
        return answers(session, name, writing)

    monkeypatch.setattr(looking, "_predicted", predicted)
    monkeypatch.setattr(general, "text_batches", text_batches)
    monkeypatch.setattr(looking, "samples", answered)
    run = train(recipe, root=folder / "runs", listener=training.Listener())
    kinds = Counter(event.kind for event in run.events())
    return done + Counter(training=kinds["step"], saving=kinds["checkpoint"])
