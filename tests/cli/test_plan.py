"""tunesmith plan, and the forecast on the first screen of a run."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_run import chats, model_folder
from tunesmith.cli.app import app
from tunesmith.planning.forecast import WORK_KINDS
from tunesmith.summaries.words import forecast_facts, probe_facts
from tunesmith.training.probe import Found, Timed

FORECAST = {
    "memory": {"total": 3 * 2**30, "parts": {"weights": 2**30, "master weights": 0, "logits": 2**31}},
    "room": 2**34,
    "pass": {"step": 7, "rows": 4, "tokens": 1987, "targets": 612},
    "layers": {"all": 30, "recomputed": 0},
    "seconds": {
        "total": 120.0,
        "spread": 0.3,
        "work": {
            **{kind: {"count": 0, "price": 0.0, "seconds": 0.0} for kind in WORK_KINDS},
            "training": {"count": 66, "price": 1.5, "seconds": 99.0},
            "measuring": {"count": 1050, "price": 0.02, "seconds": 21.0},
        },
    },
    "disk": {"rows": 0, "checkpoints": 2**20, "result": 2**19, "total": 2**20 + 2**19},
}


def plan(folder: Path, *more: str, code: int = 0, arch: str = "llama") -> str:
    model, data = model_folder(folder / "model", arch), chats(folder / "rows.jsonl", 20)
    words = ["plan", str(model), str(data), "--runs", str(folder / "runs"), "--offline"]
    words += [*more, *(() if "--probe" in more else ("--no-probe",))]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    return result.stdout


def test_it_tells_memory_time_disk_and_the_reason_of_each_choice(tmp_path):
    text = plan(tmp_path)
    for word in ("memory: ", "runtime ", "time: ", "disk: ", "chosen: train.checkpointed_layers = 0: "):
        assert word in text
    assert "devices" not in text.partition("given: ")[2].partition("\n")[0], "nobody gave it"
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name != ".rows"], "a plan leaves no run"


def test_it_tells_that_experts_could_be_adapted_and_what_that_costs(tmp_path):
    way = "have no adapter: method.targets: [all-linear, experts] adapts them, 14,336 weights more to train"
    assert way in plan(tmp_path, "--method", "lora", arch="qwen3_moe")


def test_for_machines_it_is_one_line_of_json(tmp_path):
    told = json.loads(plan(tmp_path, "--json", "--device", "24G", "--method", "full"))
    assert told["forecast"]["room"] == 24 * 10**9
    assert told["forecast"]["seconds"] is None
    assert told["recipe"]["train"]["checkpointed_layers"] == 0
    assert told["forecast"]["memory"]["total"] == sum(told["forecast"]["memory"]["parts"].values())


def test_what_does_not_fit_is_told_with_what_would_and_ends_in_2(tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.planning.devices.room", lambda device: 2**20)
    assert "note: memory: this run needs" in plan(tmp_path, code=2)


def test_for_machines_a_probe_is_plain_values(tmp_path, monkeypatch):
    """What a probe finds is measured in tests/planning/test_probe.py."""
    steps = [Timed(0.02, 90, step=7), Timed(0.01, 60, step=2)]
    work = {kind: Timed(0.1, 10) for kind in WORK_KINDS if kind != "training"}
    monkeypatch.setattr("tunesmith.training.probe.probe", lambda *args, **how: Found(steps, work, peak=2**28))
    told = json.loads(plan(tmp_path, "--json", "--probe"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".rows"], "it leaves no run"
    assert told["probe"]["ended"] == ""
    assert told["probe"]["memory"] >= told["probe"]["peak"] == 2**28
    assert told["probe"]["seconds"]["spread"] < told["forecast"]["seconds"]["spread"]
    for seconds in (told["forecast"]["seconds"], told["probe"]["seconds"]):
        assert seconds["total"] == pytest.approx(sum(work["seconds"] for work in seconds["work"].values()))


@pytest.mark.parametrize(("more", "why"), [(["--device", "24G"], "24G is not here"), ([], "it does not fit")])
def test_what_is_not_probed_is_said(tmp_path, monkeypatch, more, why):
    if not more:
        monkeypatch.setattr("tunesmith.planning.devices.room", lambda device: 2**20)
    monkeypatch.setattr("tunesmith.training.probe.probe", lambda *args, **how: pytest.fail("it was probed"))
    assert f"note: not probed: {why}" in plan(tmp_path, "--probe", *more, code=0 if more else 2)


PROBE = {
    "memory": 2**31 + 2**28,
    "peak": 2**31,
    "steps": [
        {"step": 7, "count": 400, "seconds": 2.0},
        {"step": 2, "count": 150, "seconds": 1.0},
        {"step": 5, "count": 250, "seconds": 2.0},
    ],
    "work": {
        "measuring": {"count": 100, "seconds": 2.5},
        "saving": {"count": 1, "seconds": 0.5},
    },
    "notes": [],
    "ended": "the system killed it, as it does where memory ends",
    "seconds": None,
}


def test_words_of_a_probe():
    assert probe_facts(PROBE, FORECAST) == [
        ("memory", "2.2 GiB, estimated 3.0 GiB (+33 %)"),
        ("step", "1.5 s, of 200 tokens"),
        ("ended", "early: the system killed it, as it does where memory ends"),
    ]
    assert probe_facts(PROBE, None)[0] == ("memory", "2.2 GiB")


def test_words_of_a_forecast():
    assert dict(forecast_facts(FORECAST)) == {
        "memory": "3.0 GiB at most, of 16.0 GiB, in step 7 (4 rows, 1,987 tokens, 612 targets): "
        "weights 1.0 GiB, logits 2.0 GiB",
        "time": "about 2 min (1.4–2.6): about 1.6 min to train (1.5 s a step), about 21 s for all else",
        "disk": "1.5 MiB: checkpoints 1.0 MiB, result 512.0 KiB",
    }


def test_a_named_column_that_no_row_has_ends_in_2_with_the_nearest_name(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in range(20)))
    for words in (["plan", str(model), str(rows), "--no-probe"], ["train", str(model), str(rows)]):
        more = ["--runs", str(tmp_path / "runs"), "--offline", "--set", "data.columns.completion=complation"]
        found = CliRunner().invoke(app, [*words, *more])
        assert found.exit_code == 2, found.output
        assert "no row has 'complation', which data.columns.completion names. Did you mean completion?" in found.output
    assert not [path for path in (tmp_path / "runs").glob("*") if path.name != ".rows"], "no run was made"


def test_usual_names_are_read_and_written_into_the_plan(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    rows = tmp_path / "qa.jsonl"
    rows.write_text("".join(f'{{"question": "p{i}", "answer": "c"}}\n' for i in range(20)))
    words = ["plan", str(model), str(rows), "--no-probe", "--runs", str(tmp_path / "runs"), "--offline", "--json"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert values["recipe"]["data"]["columns"] == {"prompt": "question", "completion": "answer"}
    (choice,) = [one for one in values["choices"] if one["key"] == "data.columns"]
    assert choice["reason"] == f"{rows}: 'question' is read as prompt, 'answer' is read as completion"
