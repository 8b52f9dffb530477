"""How many lines a person reads before the first step, by the real displays on the events of tiny runs."""

import functools
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import fake_events
from tiny_run import chats, model_folder
from tiny_tasks import task_recipe
from tunesmith.cli.app import app
from tunesmith.cli.display import display_for, event_line
from tunesmith.evaluation.series import RunSeries
from tunesmith.training.summary import unusual
from tunesmith.training.trainer import train
from tunesmith.types import Choice, Event

MOST = 12
NOTED = {"optim": {"lr": 3.0}, "data": {"held_out": 0.2, "bad_rows": "skip"}}
"""A rate far above the usual one, few held-out rows, rows that are left out: three notes that need action."""
KINDS = {
    "classifier": ("classify", "encoder", "full", {}),
    "chat": ("chat", "causal", "lora", {"evaluation": {"samples": 2, "sample_tokens": 4, "general": True}}),
    "text": ("text", "causal", "lora", {}),
    "embed": ("embed", "encoder", "full", {}),
    "full, with notes": ("chat", "causal", "full", NOTED),
}
_KEPT = TemporaryDirectory(prefix="first-lines-")


@functools.cache
def events_of(kind: str) -> tuple[Event, ...]:
    task, model, method, sections = KINDS[kind]
    folder = Path(_KEPT.name) / kind.replace(", ", "-").replace(" ", "-")
    folder.mkdir()
    sections = {**sections, "train": {"max_steps": 1}, "threads": "auto"}
    recipe = task_recipe(folder, task, model, method=method, **sections)
    if kind.startswith("full"):
        with open(recipe.data.train[0].path, "a", encoding="utf-8") as file:
            file.write('{"messages": []}\n' * 3)
    return tuple(train(recipe, root=folder / "runs").events())


def shown(events: Iterable[Event], width: int | None, *, verbose: bool = False) -> list[str]:
    """The lines of a terminal that is so wide; None: of a pipe."""
    how = {"width": width or 100_000, "height": 50, "force_terminal": width is not None, "color_system": None}
    screen = Console(file=io.StringIO(), markup=False, highlight=False, **how)  # type: ignore[arg-type]
    display = display_for(screen, quiet=False, series=RunSeries(), verbose=verbose)  # no area: it is not begun
    for event in events:
        display.event(event)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


def before_first_step(kind: str) -> list[Event]:
    events = events_of(kind)
    return list(events[: next(i for i, event in enumerate(events) if event.kind == "step")])


@pytest.mark.parametrize("width", [None, 80, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_it_is_in_at_most_twelve_lines(kind: str, width: int | None) -> None:
    events = before_first_step(kind)
    lines = shown(events, width)
    assert len(lines) <= MOST, "\n".join(lines)
    text = "\n".join(lines)
    for name in ("model", "task", "rows", "runs on", "memory", "time"):
        assert re.search(rf"^{name}\b", text, re.M), f"{name} is not there:\n{text}"
    assert re.search(r"^memory:? +\d+\.\d .iB at most *$", text, re.M)
    assert re.search(r"^time:? +about \S+ (s|min|h)", text, re.M)
    assert "held out" in text
    assert "untouched model" in text
    left = re.search(r"(\d+) more choices", text)
    choices = next(event for event in events if event.kind == "plan").values["choices"]
    assert left is not None
    assert int(left[1]) == len(choices) - text.count("chosen: ")


def test_what_needs_action_is_shown_and_what_does_not_is_counted() -> None:
    text = "\n".join(shown(before_first_step("full, with notes"), None))
    assert "note: optim.lr: 3 is" in text
    plan = next(event for event in events_of("classifier") if event.kind == "plan").values
    asides = [note for note in plan["warnings"] if note.startswith("new weights")]
    assert asides
    assert set(asides) <= set(plan["asides"])
    few, all_ = (shown(before_first_step("classifier"), None, verbose=verbose) for verbose in (False, True))
    assert not any("new weights" in line for line in few)
    assert f"note: {asides[0]}" in all_
    assert all(any(line.startswith(f"chosen: {choice['key']} = ") for line in all_) for choice in plan["choices"])


def test_a_row_of_the_data_is_shown_to_who_asks() -> None:
    events = before_first_step("chat")
    assert not any("what is learnt" in line for line in shown(events, 100))
    assert any("what is learnt" in line for line in shown(events, 100, verbose=True))


@pytest.mark.parametrize("width", [None, 40, 80])
def test_long_notes_and_many_of_them_do_not_push_the_rest_away(width: int | None) -> None:
    notes = [f"{number}: {'words of a note that goes on ' * 30}" for number in range(9)]
    events = list(fake_events.whole_run(changes={"warnings": notes, "labels": {f"class {i}": i for i in range(90)}}))
    lines = shown(events[:2], width)
    assert len(lines) <= (MOST if width != 40 else MOST + 2)
    text = " ".join(lines)
    hidden = re.search(r"(\d) more notes", text)
    assert hidden is not None
    assert int(hidden[1]) == 9 - text.count("note: ")
    assert "note: 0: words" in text


def test_choices_that_nobody_expects_are_named() -> None:
    usual = [Choice("optim.lr", 1e-4, "usual"), Choice("train.checkpointed_layers", 0, "nothing is computed twice")]
    odd = [
        Choice("data.columns", {"text": "comment"}, "'comment' is read as text"),
        Choice("train.checkpointed_layers", 12, "without, 56 GiB of 14 GiB would be needed"),
        Choice("shard", True, "the layers' weights are split"),
        Choice("data.label_kind", "number", "labels are numbers"),
    ]
    assert unusual(usual) == []
    assert unusual([*usual[:1], *odd]) == [choice.key for choice in odd]


def test_a_run_of_an_earlier_version_is_shown_with_all_its_notes() -> None:
    events = list(fake_events.whole_run(changes={"warnings": ["an old note"]}))
    assert "note: an old note" in shown(events[:2], None)


def test_notes_on_the_way_that_need_no_action_wait_for_the_report() -> None:
    aside = Event("note", 0, 0.0, {"text": "18 rows were encoded before", "aside": True})
    assert event_line(aside, RunSeries()) == ""
    assert event_line(aside, RunSeries(), verbose=True) == "note: 18 rows were encoded before"
    series = RunSeries.of([aside])
    assert (series.notes, series.details) == ([], ["18 rows were encoded before"])  # the report has it under Choices


@pytest.mark.parametrize("flag", ["--verbose", "-v"])
def test_train_prints_all_choices_if_told_to(tmp_path: Path, flag: str) -> None:
    model, rows = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 20)
    words = ["train", str(model), str(rows), "--runs", str(tmp_path / "runs"), "--offline", "--fast"]
    words += ["--set", "train.max_steps=1", "--method", "lora"]
    result = CliRunner().invoke(app, [*words, flag])
    assert result.exit_code == 0, result.output
    assert "chosen: optim.lr = " in result.stdout
    run = next((tmp_path / "runs").glob("rows-*"))
    plan = next(
        one for one in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if one["kind"] == "plan"
    )
    assert {"asides", "unusual", "warnings", "choices"} <= set(plan["values"])
