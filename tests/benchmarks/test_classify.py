"""`python -m benchmarks classify`: both sides on the same rows, measured from outside, and told without loss."""

import csv
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest
from benchmarks.__main__ import main
from benchmarks.classify import OURS, PEERS, Settings, read_rows
from benchmarks.measured import Child, run_child
from benchmarks.results import Result, Scores, Timing, scored, verdict
from benchmarks.table import Bench, markdown
from typer.testing import CliRunner

from benchmarks import classify
from tiny_tasks import encoder_folder, texts
from tunesmith.cli.app import app

CHILD = Child(code=0, wall_seconds=2.0, peak_bytes=2**30, load_before=0.5, tail="")
FRUIT = ("apple", "pear", "plum")


def written(path: Path, rows: Sequence[tuple[str, str]]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def results(name: str, *accuracies: float) -> list[Result]:
    timing = Timing(steps=4, train_seconds=1.0, examples_per_second=10.0)
    return [Result(name, seed, CHILD, Scores(x, x), timing) for seed, x in enumerate(accuracies)]


def in_this_process(words: Sequence[str], *, log: Path) -> Child:
    """What `run_child` does, without the seconds that two new processes need to import torch."""
    if words[1:3] == ["-m", "tunesmith"]:
        outcome = CliRunner().invoke(app, [*words[3:], "--set", "threads=1"])
        return Child(outcome.exit_code, 1.0, 2**20, 0.0, outcome.output)
    from benchmarks.peers.trainer_classify import train

    Path(words[3]).write_text(json.dumps(train(json.loads(Path(words[2]).read_text("utf-8")))), "utf-8")
    return Child(0, 1.0, 2**20, 0.0, "")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Words of the command: a tiny encoder, and texts whose label is a fruit."""
    rows = [(f"{text} {FRUIT[i % 3]}", FRUIT[i % 3]) for i, text in enumerate(dict.fromkeys(texts(60, seed=1)))]
    train, test = written(tmp_path / "train.csv", rows[:24]), written(tmp_path / "test.csv", rows[24:36])
    return ["classify", "--model", str(encoder_folder(tmp_path / "m")), "--train", train, "--eval", test]


def test_both_sides_train_and_are_scored_on_the_same_rows(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(classify, "run_child", in_this_process)
    out = tmp_path / "table.md"
    code = main(
        [*files, "--seeds", "1", "--epochs", "2", "--rows-per-step", "5", "--max-tokens", "64", "--out", str(out)]
    )
    assert code == 0, out.read_text("utf-8")
    told = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert [result["name"] for result in told["results"]] == [OURS, *PEERS]
    assert [result["timing"]["steps"] for result in told["results"]] == [10, 10, 10]  # 24 rows in fives, twice
    assert all(0 <= result["scores"]["accuracy"] <= 1 and not result["error"] for result in told["results"])
    assert [verdict["holds"] for verdict in told["verdicts"]] == [None, None]  # one seed has no spread
    assert out.read_text("utf-8") in capsys.readouterr().out
    assert "Trainer, as shipped: `precision=float32`" in out.read_text("utf-8")
    assert str(tmp_path) not in out.read_text("utf-8")


def test_trainer_answers_in_file_order_though_it_trains_by_length(tmp_path: Path) -> None:
    from benchmarks.peers.trainer_classify import train
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = written(tmp_path / "a.csv", [(f"{FRUIT[i % 3]} {x}", FRUIT[i % 3]) for i, x in enumerate(texts(60))])
    settings = Settings(str(encoder_folder(tmp_path / "m")), rows, rows, 12, 8, 3e-3, 0.05, 0.0, 64)
    folder = str(tmp_path / "job")
    arguments = {**PEERS["Trainer, tuned"], "bf16": False}  # so that nothing is rounded to another class
    answer = train({**asdict(settings), "seed": 0, "folder": folder, "arguments": arguments})
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    each_alone = [
        model.config.id2label[int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())]
        for row in read_rows(rows)
    ]
    assert answer["predicted"] == each_alone
    assert len(set(each_alone)) > 1, "any order of these is right"


def test_memory_of_a_child_is_its_own(tmp_path: Path) -> None:
    fill = "x = bytearray({} << 20); x[::4096] = bytes([1]) * len(x[::4096])"
    code = f"""
import pathlib, sys
from benchmarks.measured import run_child
for num in (200, 1):
    words = [sys.executable, "-c", {fill!r}.format(num)]
    print(run_child(words, log=pathlib.Path({str(tmp_path / "inner")!r})).peak_bytes >> 20)
"""
    # In a process of its own, since a child is never said to hold less than the one that starts it: here, the tests.
    child = run_child([sys.executable, "-c", code], log=tmp_path / "log")
    assert child.code == 0, child.tail
    large, small = map(int, child.tail.split())
    assert 200 < large < 240  # an interpreter takes about 10 MiB
    assert small < 40


def test_failed_child_stands_in_the_page_with_its_error(tmp_path: Path) -> None:
    child = run_child([sys.executable, "-c", "raise SystemExit('no such model: <b>')"], log=tmp_path / "log")
    failed = classify.result("Trainer, tuned", 1, child, pytest.fail, ["a"])
    assert failed.error == "exit code 1\nno such model: <b>"
    page = markdown(bench([*results(OURS, 0.5, 0.6), *results("Trainer, tuned", 0.5), failed]))
    assert "no such model: <b>" in page
    assert "1 of 2: the others failed" in page
    assert "No verdict against Trainer, tuned: failed: Trainer, tuned with seed 1." in page


def test_child_that_predicts_other_rows_has_failed(tmp_path: Path) -> None:
    answer = classify.Answer(["a"], Timing(1, 1.0, 1.0), {})
    found = classify.result(OURS, 0, CHILD, lambda: answer, ["a", "b"])
    assert "it predicted 1 rows, the test file has 2" in found.error
    assert found.scores is None


def test_scores_are_those_of_a_case_by_hand() -> None:
    # a: 1 of 2 found, precision 1, F1 2/3; b: 2 of 2 found, precision 2/3, F1 4/5; c: never right, F1 0
    found = scored(["a", "a", "b", "b", "c"], ["a", "b", "b", "b", "a"])
    assert found.accuracy == 3 / 5
    assert found.macro_f1 == pytest.approx((1 / 2 + 4 / 5 + 0) / 3, abs=1e-12)


def test_rate_leaves_warm_up_out() -> None:
    ends = [100.0 + (10 * i if i <= 10 else 100 + (i - 10)) for i in range(1, 31)]  # ten steps of 10 s, then of 1 s
    timing = Timing.of(100.0, ends, [16] * 29 + [6])
    assert timing == Timing(steps=30, train_seconds=120.0, examples_per_second=(19 * 16 + 6) / 20)


def test_rate_of_few_steps_leaves_half_of_them_out() -> None:
    assert Timing.of(0.0, [5.0, 6.0, 8.0], [4, 4, 4]).examples_per_second == 8 / 3
    assert Timing.of(0.0, [5.0], [4]).examples_per_second == 4 / 5


@pytest.mark.parametrize(
    ("ours", "holds"),
    [((0.1, 0.60, 0.9), True), ((0.1, 0.59, 0.9), False), ((0.61, 0.62, 0.63), True)],
    ids=["median is the peer's lowest", "median is below", "all above the lowest"],
)
def test_verdict_compares_our_median_with_the_peers_lowest(ours: tuple[float, ...], holds: bool) -> None:
    found, text = verdict(results(OURS, *ours), results("Trainer", 0.60, 0.70, 0.65))
    assert found is holds
    assert ("WORSE than Trainer" in text) is not holds


@pytest.mark.parametrize(("seeds", "chance"), [(3, Fraction(1, 5)), (5, Fraction(1, 12))])
def test_equal_methods_fail_the_rule_as_rarely_as_it_says(seeds: int, chance: Fraction) -> None:
    places = list(itertools.combinations(range(2 * seeds), seeds))  # where ours stand among all, the lowest first
    below = [ours for ours in places if ours[seeds // 2] < min(set(range(2 * seeds)) - set(ours))]
    assert Fraction(len(below), len(places)) == chance


def bench(found: list[Result]) -> Bench:
    return Bench(
        command="python -m benchmarks classify",
        settings={"model": "m", "train": "train.csv", "eval": "test.csv"},
        rows={"train": 24, "eval": 12},
        majority=1 / 3,
        machine={"processor": "P", "cores": 2, "memory_bytes": 2**34, "system": "Linux"},
        versions={"torch": "2.13.0"},
        arguments={OURS: {}, **PEERS},
        results=found,
    )
