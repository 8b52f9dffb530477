"""The whole way of a person at the terminal, with a model of two layers."""

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fresh
from tiny_run import chats, model_folder
from tunesmith.cli.app import app
from tunesmith.runs.folder import Run

Result = Any
"""Of typer's CliRunner; its name moves between versions."""
QUICK = (
    "method.rank=4",
    "optim.lr=0.01",
    "train.rows_per_step=3",
    "evaluation.samples=2",
    "evaluation.sample_tokens=4",
    "evaluation.general=false",
    "precision=float32",
    "threads=1",
)


def tunesmith(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def settings(*more: str) -> list[str]:
    return [word for setting in (*QUICK, *more) for word in ("--set", setting)]


@dataclass
class Place:
    folder: Path
    model: Path
    data: Path
    held_out: Path

    @property
    def root(self) -> Path:
        return self.folder / "runs"

    def train(self, *more: str | Path, code: int = 0) -> Result:
        words = ["train", self.model, self.data, "--eval", self.held_out, "--runs", self.root, "--offline"]
        return tunesmith(*words, *settings("train.max_steps=6"), *more, code=code)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cli")
    model = model_folder(folder / "model")
    return Place(folder, model, chats(folder / "chats.jsonl", 18), chats(folder / "held-out.jsonl", 5, seed=1))


@pytest.fixture(scope="module")
def done(place: Place) -> tuple[Run, Result]:
    out = place.folder / "runs" / "first"
    result = place.train("--method", "lora", "--out", out)
    return Run(out), result


def test_train_leaves_a_finished_run_and_says_where(done: tuple[Run, Result]) -> None:
    run, result = done
    assert run.state() == "done"
    assert f"result: {run.path}" in result.stdout
    assert "step 6/6" in result.stdout
    assert "held-out loss" in result.stdout
    assert (run.adapter_path / "adapter_model.safetensors").is_file()
    report = json.loads(run.report_path.read_text())
    assert report["metrics"]["after"]["loss"] < report["metrics"]["before"]["loss"]
    assert report["rows"] == {"train": 18, "held_out": 5, "skipped": 0, "overlap": 0}


def test_json_is_events_on_stdout_and_nothing_else(place: Place) -> None:
    result = place.train("--json", "--out", place.folder / "json-run", "--set", "train.epochs=0.3")
    told = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["kind"] for event in told]
    assert [kind for kind in kinds if kind != "note"][:3] == ["start", "plan", "evaluation"]
    assert kinds[-2:] == ["end", "result"]
    assert told[-1]["run"] == str(place.folder / "json-run")
    assert "untouched model: held-out loss" in result.stderr


def test_quiet_prints_the_run_alone(place: Place) -> None:
    result = place.train("--quiet", "--set", "train.max_steps=1", "--set", "name=hush")
    printed = Path(result.stdout.strip())
    assert printed.parent == place.root
    assert printed.name.startswith("hush-")
    assert result.stderr == ""


def test_check_says_what_the_rows_are(place: Place) -> None:
    plain = tunesmith("check", place.data).stdout
    assert "messages in JSON lines: 18 of 18 rows can be used" in plain
    assert plain.splitlines()[-1] == "can be trained on"
    with_model = tunesmith("check", place.data, "--eval", place.held_out, "--model", place.model, "--offline").stdout
    assert "held out: 5 rows" in with_model
    assert "of them trained" in with_model
    assert "what is learnt" in with_model
    told = json.loads(tunesmith("check", place.data, "--model", place.model, "--offline", "--json").stdout)
    assert told["ok"] is True
    assert told["tokens"]["train"]["rows"] == 18


def test_check_refuses_what_train_refuses(place: Place, tmp_path: Path) -> None:
    """The same problem by the same line from both; with bad_rows: skip both go on and count it."""
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(place.data.read_bytes() + b'{"messages": []}\n')
    problem = f"{bad}:19: "
    checked = tunesmith("check", bad, code=2)
    assert checked.stdout.startswith(problem)
    refused = tunesmith("train", place.model, bad, "--runs", tmp_path / "runs", "--offline", code=2)
    assert refused.stderr.startswith(problem)
    assert not list(tmp_path.glob("runs/*/run.json"))

    skip = ["--set", "data.bad_rows=skip"]
    assert "18 of 19 rows can be used" in tunesmith("check", bad, *skip).stdout
    out = tmp_path / "skipped"
    places = ["--runs", tmp_path / "runs", "--out", out]
    tunesmith("train", place.model, bad, *skip, *settings("train.max_steps=1"), *places, "--offline", "--quiet")
    assert json.loads((out / "report.json").read_text())["rows"]["skipped"] == 1
    listed = [json.loads(line) for line in (out / "rows" / "problems.jsonl").read_text().splitlines()]
    assert {one["source"] for one in listed} == {f"{bad}:19"}


def test_runs_lists_what_was_tried(place: Place, done: tuple[Run, Result]) -> None:
    run, _ = done
    rows = json.loads(tunesmith("runs", "--runs", place.root, "--json").stdout)
    row = next(row for row in rows if row["name"] == run.path.name)
    assert (row["state"], row["task"], row["method"], row["step"], row["steps"]) == ("done", "chat", "lora", 6, 6)
    assert row["after"] < row["before"]
    assert tunesmith("runs", "--runs", place.root).stdout.startswith("run\tstate\tmodel\ttask\tmethod\tsteps\t")
    assert "first\tdone\tmodel\tchat\tlora\t6/6\t" in tunesmith("runs", "--runs", place.root).stdout


def test_a_broken_run_does_not_hide_the_others(place: Place, done: tuple[Run, Result], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{}")
    assert "broken\tunreadable\t" in tunesmith("runs", "--runs", tmp_path).stdout


def test_show_tells_the_story(place: Place, done: tuple[Run, Result]) -> None:
    run, _ = done
    text = tunesmith("show", run.path.name, "--runs", place.root).stdout
    for words in (": done", "18 rows to train on, 5 held out", "training loss", "held-out loss", "adapter in"):
        assert words in text
    assert json.loads(tunesmith("show", run.path, "--json").stdout)["report"]["steps"] == 6


def test_chat_answers_with_both(place: Place, done: tuple[Run, Result]) -> None:
    run, _ = done
    words = ["chat", run.path, "--once", "hello", "--max-tokens", "4", "--offline", "--json"]
    both = json.loads(tunesmith(*words, "--compare").stdout)
    alone = json.loads(tunesmith(*words).stdout)
    base = json.loads(tunesmith(*words, "--base").stdout)
    model = json.loads(tunesmith("chat", place.model, *words[2:]).stdout)
    assert both["prompt"] == "hello"
    assert both["after"] == alone["answer"]
    assert both["before"] == base["answer"] == model["answer"]
    assert both["before"] != both["after"]


def test_chat_reads_questions_from_a_pipe(done: tuple[Run, Result]) -> None:
    run, _ = done
    words = ["chat", str(run.path), "--max-tokens", "3", "--offline", "--json"]
    result = CliRunner().invoke(app, words, input="hello\n\nwhat is a dog\n/reset\nhello\n/exit\nnever asked\n")
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["prompt"] for turn in told] == ["hello", "what is a dog", "hello"]
    assert told[0]["answer"] == told[2]["answer"]


def test_commands_of_a_conversation_are_listed_and_other_lines_are_prompts(done: tuple[Run, Result]) -> None:
    words = ["chat", str(done[0].path), "--max-tokens", "3", "--offline", "--json"]
    result = CliRunner().invoke(app, words, input="/help\n/usr/bin is a path\n")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["/usr/bin is a path"]
    assert re.search(r"/reset +forget the conversation", result.stderr)
    assert result.exit_code == 0


def test_a_name_that_is_neither_a_run_nor_a_model_says_both(place: Place, done: tuple[Run, Result]) -> None:
    for words in (["chat", "nope", "--once", "x"], ["predict", "nope", "--text", "x"], ["eval", "nope", place.data]):
        told = " ".join(tunesmith(*words, "--runs", place.root, "--offline", code=2).stderr.split())
        assert f"nope: no such run in {place.root}: {place.root} holds " in told
        assert "And no such model: nope: " in told


def test_full_tuning_is_talked_to_and_compared(place: Place) -> None:
    out = place.folder / "full"
    words = ["train", place.model, place.data, "--method", "full", "--out", out, "--offline", "--quiet"]
    tunesmith(*words, *settings("train.max_steps=3")[2:])  # without a rank
    assert (out / "model" / "model.safetensors").is_file()
    words = ["chat", out, "--once", "hello", "--max-tokens", "4", "--offline", "--json"]
    both = json.loads(tunesmith(*words, "--compare").stdout)
    assert both["before"] == json.loads(tunesmith(*words, "--base").stdout)["answer"]
    assert both["after"] == json.loads(tunesmith(*words).stdout)["answer"]


def test_selftest_of_a_run_passes(done: tuple[Run, Result]) -> None:
    run, _ = done
    proofs = [json.loads(line) for line in tunesmith("selftest", run.path, "--offline", "--json").stdout.splitlines()]
    assert len(proofs) >= 4
    assert all(proof["passed"] for proof in proofs)


def test_a_finished_run_has_nothing_to_resume(done: tuple[Run, Result]) -> None:
    run, _ = done
    assert "nothing is left to resume" in tunesmith("resume", run.path, code=2).stderr


LONG = ("train.epochs=10",)
LONG_STEPS = 60  # 6 an epoch: long enough that a signal lands in the middle


def losses_of(run: Run) -> list[float]:
    return [event.values["loss"] for event in run.events() if event.kind in ("step", "evaluation")]


def test_stop_checkpoints_and_resume_takes_the_other_steps(place: Place) -> None:
    """A signal in the middle: exit 3, and the way on is named. With the bits of a run never stopped: test_resume.py."""
    words = ["train", place.model, place.data, "--eval", place.held_out, "--offline", "--json", *settings(*LONG)]
    stopped = place.folder / "stopped"
    work = fresh.Process("-m", "tunesmith", *words, "--out", stopped)
    assert work.stdout is not None
    for line in work.stdout:
        if json.loads(line)["kind"] == "step":
            break
    work.send_signal(signal.SIGINT)
    _, said = work.communicate()
    assert work.returncode == 3, said
    assert f"tunesmith resume {stopped}" in said
    run = Run(stopped)
    assert run.state() == "stopped"
    at = max(event.step for event in run.events() if event.kind == "checkpoint")
    assert 0 < at < LONG_STEPS

    tunesmith("resume", stopped, "--offline", "--quiet", "--json")
    assert run.state() == "done"
    assert len(losses_of(run)) == LONG_STEPS + 2


@pytest.mark.slow  # test_errors.py
def test_a_second_signal_leaves_at_once_and_says_the_way_on(place: Place) -> None:
    words = ["train", place.model, place.data, "--eval", place.held_out, "--offline", "--json", *settings(*LONG)]
    work = fresh.Process("-m", "tunesmith", *words, "--out", place.folder / "left")
    assert work.stdout is not None
    for line in work.stdout:
        if json.loads(line)["kind"] == "step":
            break
    work.send_signal(signal.SIGINT)
    work.send_signal(signal.SIGTERM)  # another one: two of a kind that wait are one
    _, said = work.communicate()
    assert work.returncode in (-signal.SIGINT, -signal.SIGTERM), said
    assert "stopped at once; continue from its last checkpoint with: " in said
    assert f"resume {place.folder / 'left'}" in said


def test_python_face_does_the_same(place: Place, done: tuple[Run, Result]) -> None:
    import tunesmith as package

    run, _ = done
    heard: list[str] = []
    again = package.train(
        place.model,
        place.data,
        eval=place.held_out,
        method={"name": "lora", "rank": 4},
        optim={"lr": 0.01},
        train={"rows_per_step": 3, "max_steps": 6},
        evaluation={"samples": 2, "sample_tokens": 4, "general": False},
        precision="float32",
        threads=1,
        root=place.folder / "python",
        on_event=lambda event: heard.append(event.kind),
        offline=True,
    )
    assert heard[0] == "start"
    assert heard[-1] == "end"
    losses = [[e.values["loss"] for e in r.events() if e.kind == "step"] for r in (run, again)]
    assert losses[0] == losses[1]
    model, tokenizer = package.load(again, offline=True)
    assert model.config.vocab_size >= len(tokenizer)
