import io
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from cli import fake_events
from tunesmith.cli import runs as cli_runs
from tunesmith.cli.display import PLAIN_WAIT_S, Live, Plain, Silent, display_for, phases, plan_lines
from tunesmith.cli.render import print_table
from tunesmith.evaluation.metrics import info_of
from tunesmith.evaluation.series import RunSeries
from tunesmith.summaries.words import headline_metric
from tunesmith.types import Event

ESCAPE = "\x1b"


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=100_000, force_terminal=False, markup=False, highlight=False)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, height=40, force_terminal=True, markup=False, highlight=False)


def told(console: Console, events: Iterable[Event], *, quiet: bool = False, verbose: bool = False) -> str:
    with display_for(console, quiet=quiet, series=RunSeries(), verbose=verbose) as display:
        for event in events:
            display.event(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_plain_lines_tell_the_whole_run() -> None:
    lines = told(plain_console(), fake_events.whole_run(), verbose=True).splitlines()
    assert ESCAPE not in "".join(lines)
    assert lines[:5] == [
        "model: SmolLM2-135M-Instruct.gguf, 139.4 M weights",
        "task: chat, by lora: 4.9 M weights are trained (3.5 %)",
        "rows: 500 rows to train on, 60 held out",
        "work: 12 steps, 34,567 tokens an epoch",
        "runs on: cpu in bfloat16",
    ]
    assert "chosen: optim.lr = 0.0005: usual for LoRA on a model below a billion weights" in lines
    assert "untouched model: held-out loss 3.5000, token accuracy 35.0 % (60 rows, 1,234 targets)" in lines
    assert "untouched model: answers: ROUGE-L 0.2000 (8 answers)" in lines
    assert "tuned model: general text 3.2000 (4,321 tokens)" in lines
    assert "step 1/12: loss 3.4000, lr 0.0005, 500 tokens/s, 1.0 GiB, 22 s left" in lines
    assert "step 12/12: loss 2.3000, lr 0.0005, 500 tokens/s, 1.0 GiB" in lines
    assert "note: a note on the way" in lines
    assert lines[-7:] == [
        fake_events.HEADLINE,
        "",
        "held out: 60 rows, 1,234 targets; each value with its 95 % interval",
        "\tbefore\tafter\tdifference",
        "loss\t3.5000 (3.450–3.550)\t2.2500 (2.200–2.300)\t−1.2500 (−1.3000 to −1.2000), better",
        "ROUGE-L\t0.2000 (0.000–0.400)\t0.3000 (0.100–0.500)\t+0.1000",
        "general text\t3.1000\t3.2000\t+0.1000 (+0.0900 to +0.1100), worse",
    ]


def test_plain_log_of_a_long_run_is_short() -> None:
    """Ten thousand steps: a line each tenth, and the first."""
    events = [Event("plan", 0, 0.0, fake_events.plan(steps=10_000))]
    events += [fake_events.step(number, 1.0) for number in range(1, 10_001)]
    console = plain_console()
    display = Plain(console, RunSeries(), clock=lambda: 0.0)
    for event in events:
        display.event(event)
    assert isinstance(console.file, io.StringIO)
    steps = [line for line in console.file.getvalue().splitlines() if line.startswith("step ")]
    assert len(steps) == 11
    assert steps[0].startswith("step 1/10000")
    assert steps[-1].startswith("step 10000/10000")


def test_slow_steps_are_each_told() -> None:
    now = iter(range(0, 10_000, 40))
    console = plain_console()
    display = Plain(console, RunSeries(), clock=lambda: float(next(now)))
    display.event(Event("plan", 0, 0.0, fake_events.plan(steps=10_000)))
    for number in range(1, 8):
        display.event(fake_events.step(number, 1.0))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("step ") == 7


def test_bars_of_libraries_are_whole_lines_in_a_file() -> None:
    code = """
import tunesmith.cli.display as display
display.PLAIN_SECONDS, display.PLAIN_WAIT_S = 0.1, 0.05
display.plain_bars()
import sys, time
from huggingface_hub.utils import tqdm
for i in tqdm(range(3), desc="short"): pass
for i in tqdm(range(6), desc="long"): time.sleep(0.1)
print("two", file=sys.stderr)
with tqdm(total=4, desc="outer") as outer, tqdm(total=4, desc="inner", leave=False) as inner:
    for i in range(4):
        time.sleep(0.1)
        outer.update()
        inner.update()
"""
    both = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stderr
    written, _, two = both.partition(b"two\n")
    assert b"\r" not in written
    lines = written.decode().split("\n")[:-2]  # a bar ends with an empty line
    assert [line[:6] for line in lines] == ["long: "] * len(lines)
    assert 2 < len(lines) < 8
    assert "6/6" in lines[-1]
    assert not {b"\r", b"\x1b"} & {two[at : at + 1] for at in range(len(two))}
    lines = two.decode().splitlines()
    assert {line[:5] for line in lines} == {"outer", "inner", ""}
    assert lines.count("") == 2  # each bar ends with one


def test_quiet_says_nothing() -> None:
    assert told(plain_console(), fake_events.whole_run(), quiet=True) == ""
    assert isinstance(display_for(terminal(), quiet=True, series=RunSeries()), Silent)


def test_terminal_shows_plan_difference_and_answers() -> None:
    text = without_colours(told(terminal(), fake_events.whole_run(), verbose=True))
    for words in ("╭─ plan ", "chosen for you", "optim.lr", "because", "what is learnt", "Check the cable."):
        assert words in text
    for words in ("held-out loss", "3.5000", "2.2500", "−1.2500", "+0.1000", "Tell me a joke", "reference"):
        assert words in text
    assert "I consume RAM" in text


def test_trained_tokens_are_coloured_and_others_are_not() -> None:
    text = told(terminal(), fake_events.whole_run(), verbose=True)
    assert f"{ESCAPE}[1;32mCheck the cable.<|im_end|>{ESCAPE}[0m" in text
    assert f"{ESCAPE}[1;32m<|im_start|>" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    text = without_colours(told(terminal(width), fake_events.whole_run()))
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("make", [plain_console, terminal])
def test_data_cannot_drive_the_terminal(make: type[Console]) -> None:
    """Escape sequences of rows are spelled out; markup of rows is text."""
    evil = "\x1b[2J\x1b]0;owned\x07[red]not markup[/red]\r"
    events = list(fake_events.whole_run(changes={"sample": [[evil, True]], "warnings": [evil]}, prompts=[evil]))
    for verbose in (False, True):
        text = told(make(), events, verbose=verbose)
        assert "\x1b[2J" not in text
        assert "\x1b]" not in text
        assert "\x07" not in text
        assert "␛[2J" in without_colours(text)
        assert "[red]not markup[/red]" in without_colours(text).replace("\n", "")


def drawn(live: Live) -> str:
    """The area below the last printed line."""
    live.console.file = io.StringIO()
    live.console.print(live.area.get_renderable())
    return without_colours(live.console.file.getvalue())


def test_live_area_shows_phase_step_loss_rate_speed_memory_and_time_left() -> None:
    live = Live(terminal(120), RunSeries())
    assert "getting ready" in drawn(live)
    live.progress("encode", 50, 200)
    assert "encoding rows" in drawn(live)
    assert "25 %" in drawn(live)
    live.progress("load", 0, 1)
    assert "loading the model" in drawn(live)
    assert "%" not in drawn(live)
    for event in list(fake_events.whole_run())[:17]:
        live.event(event)
    text = drawn(live)
    assert "loading" not in text
    for words in ("step 7/12", "loss 2.8000", "lr 0.0005", "500 tokens/s", "1.0 GiB", "10 s left"):
        assert words in text


def test_run_without_held_out_rows_is_shown() -> None:
    events = [
        event for event in fake_events.whole_run() if event.kind not in ("evaluation", "answers", "general", "sample")
    ]
    assert "step 12/12" in told(plain_console(), events)
    assert "SmolLM2" in told(terminal(), events)
    assert "plan" in told(terminal(), events, verbose=True)


def test_resumed_run_keeps_what_it_had() -> None:
    """The final comparison needs the measure of the first session; a step told twice counts once."""
    events = list(fake_events.whole_run())
    story = RunSeries.of(events[:12])
    with display_for(plain_console(), quiet=True, series=story) as display:
        display.event(Event("resume", 2, 0.0, {"from_step": 2}))
        assert story.step == 2
        for event in events[10:]:
            display.event(event)
    assert story.score("before")["loss"] == 3.5
    assert sorted(story.steps) == list(range(1, 13))
    assert story.curve == [3.5, 2.9, 2.25]


def test_curve_ends_with_the_last_steps_own_weights() -> None:
    """The result is that of step 6, measured after step 12."""
    story = RunSeries()
    for name, step, loss in (("before", 0, 3.5), ("step", 6, 2.0), ("step", 12, 2.4), ("after", 12, 2.0)):
        story.add(fake_events.evaluation(name, step, loss))
    assert story.curve == [3.5, 2.0, 2.4]
    assert story.score("after")["loss"] == 2.0


def test_time_left_follows_recent_steps() -> None:
    story = RunSeries()
    assert story.seconds_left is None
    story.add(Event("plan", 0, 0.0, fake_events.plan(steps=100)))
    for number in range(1, 51):
        story.add(fake_events.step(number, 1.0))
    assert story.seconds_left == 100.0  # 50 steps of 2 s


def test_a_new_head_has_no_before() -> None:
    events = list(fake_events.whole_run(changes={"task": "classify", "new_head": True}))
    lines = told(plain_console(), events[:3]).splitlines()
    line = "untouched model: held-out loss 3.5000 (60 rows, 1,234 targets; the head is new and answers at random)"
    assert lines[-1] == line
    story = RunSeries.of(events[:3])
    assert (story.score("before"), story.curve) == (None, [3.5])


def test_measures_are_written_with_their_intervals() -> None:
    def shown(key: str, value: float, low: float, high: float) -> tuple[str, str]:
        info, interval = info_of(key), {"value": value, "low": low, "high": high}
        return info.text(value), info.bounds(interval)

    assert shown("accuracy", 0.7123, 0.69, 0.731) == ("71.2 %", "69.0–73.1")
    assert shown("length_ratio", 1.234, 1.1, 1.5) == ("1.23", "1.10–1.50")
    assert shown("macro_f1", 0.5, 0.5, 0.5) == ("0.5000", "")
    assert shown("a_newer_one", 0.5, 0.4, 0.6) == ("0.5000", "0.400–0.600")
    assert shown("margin", -0.5, -0.7, -0.3) == ("−0.5000", "−0.700 to −0.300")  # one minus sign


def test_a_list_of_runs_tells_of_the_measure_that_says_most() -> None:
    before, after = ({"loss": fake_events.interval(x), "accuracy": fake_events.interval(x)} for x in (0.4, 0.6))
    assert headline_metric(before, after) == "accuracy 40.0 % → 60.0 %"
    assert headline_metric({"loss": before["loss"]}, after) == "accuracy 60.0 %"
    assert headline_metric({}, {"preference_accuracy": fake_events.interval(0.75)}) == "preference accuracy 75.0 %"
    assert headline_metric(before, {"loss": before["loss"]}) == ""
    words = {key: fake_events.interval(0.5) for key in ("rougeL", "exact_match")}  # of answers of one word
    assert headline_metric(words, words) == "exact match 50.0 % → 50.0 %"
    assert headline_metric({}, words | {"rouge2": fake_events.interval(0.2)}).startswith("ROUGE-L")
    assert headline_metric({}, words | {"preference_accuracy": fake_events.interval(0.7)}).startswith("preference")
    assert headline_metric({}, after | {"majority": fake_events.interval(0.58)}) == "accuracy 60.0 % (majority 58.0 %)"


def test_a_plan_of_classes_counts_them_and_shows_no_tokens() -> None:
    labels = {"odd": 2, "good": 1200, "b\x1b[2Jad": 80} | {f"c{i:02}": 1 for i in range(30)}
    changes = {"labels": labels, "windows": "3 documents in 12 windows of 512 tokens, one every 511"}
    plain = told(plain_console(), fake_events.whole_run(changes=changes), verbose=True)
    assert "labels: 33 classes: good 1,200, b␛[2Jad 80, odd 2, c00: 1" in plain
    assert "c08: 1, … and 21 more" in plain
    assert "windows: 3 documents in 12 windows of 512 tokens, one every 511" in plain
    drawn = without_colours(told(terminal(), fake_events.whole_run(changes=changes), verbose=True))
    assert "33 classes" in drawn
    assert "what is learnt" not in drawn


FORECAST = {
    "memory": {"total": 3 * 2**30, "parts": {"weights": 2**30}},
    "pass": {"step": 1, "rows": 1, "tokens": 9, "targets": 9},
    "room": 2**34,
    "seconds": None,
    "disk": {"total": 2**20, "checkpoints": 2**20},
}


@pytest.mark.parametrize("width", [60, 100])
def test_the_plan_on_a_terminal_says_what_the_run_will_need(width: int) -> None:
    events = [
        Event(event.kind, event.step, event.time, event.values, {"forecast": FORECAST})
        if event.kind == "plan"
        else event
        for event in fake_events.whole_run()
    ]
    shown = without_colours(told(terminal(width), events, verbose=True))
    assert "memory" in shown
    assert "3.0 GiB at most" in shown
    assert "disk" in shown


def listed(**changes: object) -> dict[str, object]:
    measures = {name: {"rougeL": {"value": 0.5}} for name in ("before", "after")}
    known = {"name": "drug-train-7f16", "state": "done", "model": "models/SmolLM2-135M-Instruct", "task": "classify"}
    numbers = {"step": 120, "steps": 120, "before": 3.2, "after": 2.1, "measures": measures, "created": 0.0}
    return {**known, "method": "lora", **numbers, **changes}


@pytest.mark.parametrize("width", [40, 60, 80, 110, 150])
def test_runs_keep_name_and_state_on_any_terminal(width: int) -> None:
    screen = terminal(width)
    rows = [cli_runs._cells(one) for one in (listed(), listed(name="bbc-2", state="interrupted"))]
    print_table(screen, cli_runs.RUN_COLUMNS, rows, spare=cli_runs.SPARE)
    assert isinstance(screen.file, io.StringIO)
    lines = without_colours(screen.file.getvalue()).splitlines()
    assert all(len(line) <= width for line in lines)
    words = [line.split() for line in lines]
    assert any(line[:2] == ["drug-train-7f16", "done"] for line in words)
    assert any(line[:2] == ["bbc-2", "interrupted"] for line in words)
    assert len([line for line in words if line]) == 3  # the header, a line for each run
    assert ("made" in lines[0]) == (width == 150)


def test_runs_name_the_run_that_another_one_starts_from(tmp_path: Path) -> None:
    for name in ("first", "a", "a/snapshots/step-5"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").touch()
    models = ("first/merged", "a/model", "a/snapshots/step-5/merged", "b/c", "org/model", "data/merged")
    assert [cli_runs._cells(listed(model=str(tmp_path / model)))[2] for model in models] == [
        "first", "a", "a", "c", "model", "merged",
    ]  # fmt: skip


def test_work_outside_a_terminal_is_told_if_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = plain_console()
    with phases(screen) as progress:
        progress("evaluate", 1, 4)  # at once
        later = time.monotonic() + PLAIN_WAIT_S
        monkeypatch.setattr("time.monotonic", lambda: later)
        for done in (2, 3, 4):  # within PLAIN_SECONDS
            progress("evaluate", done, 4)
        for done in (1, 4):  # no line has said that it began
            progress("check", done, 4)
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue() == "measuring held-out rows: 50 %\nmeasuring held-out rows: 100 %\n"


def test_a_plan_counts_its_steps_in_epochs() -> None:
    some = {40: "0.3 epochs", 12: "1 epoch", 11.9: "1 epoch", 0.01: "1,200 epochs", 1e5: "less than 0.1 epochs"}
    for of, said in ((of, f"12 steps ({epochs})") for of, epochs in some.items()):
        assert f"work: {said}, 34,567 tokens an epoch" in plan_lines({**fake_events.plan(), "steps_per_epoch": of})
