"""`python -m benchmarks distil`: three ways to learn the same rows, from the start of each to the table."""

import json

import pytest
from benchmarks.__main__ import main
from benchmarks.distil import compared, page

from rewarded import DIGITS
from tiny_run import chats, model_folder

ROWS = {
    "sft": {"forward": [[4.0, 2], [2.0, 1]] * 10, "reverse": [[1.0, 1], [1.0, 1]] * 10},
    "off": {"forward": [[2.0, 2], [1.0, 1]] * 10, "reverse": [[2.0, 1], [0.0, 1]] * 10},
}


def test_differences_are_means_over_tokens_paired_over_rows():
    changes = compared(ROWS)
    assert changes.keys() == {"off"}
    assert changes["off"]["forward"] == pytest.approx({"value": -1.0, "low": -1.0, "high": -1.0})
    reverse = changes["off"]["reverse"]
    assert reverse["value"] == 0.0
    assert reverse["low"] < 0 < reverse["high"]


def test_the_table_has_each_way_and_its_difference():
    judged = {**ROWS, "on": ROWS["off"], "untouched": ROWS["sft"]}
    lines = list(page(judged, compared(judged), {way: {"seconds": [1.0, 3.0, 2.0]} for way in ("sft", "off", "on")}))
    assert lines[3] == "| answers alone (SFT) | 2.0000 |  | 1.0000 |  | 2.0 s |"
    assert lines[4].startswith("| distil, off policy | 1.0000 | -1.0000 (-1.0000 to -1.0000) | 1.0000 | +0.0000 (")


@pytest.mark.slow
def test_all_of_it_runs(tmp_path, capsys):
    """In two steps, by a tiny model with itself as teacher: no way is known to be better."""
    model = model_folder(tmp_path / "model")
    files = [chats(tmp_path / f"{seed}.jsonl", 12, seed=seed) for seed in (0, 1)]
    (tmp_path / "grader.py").write_text(DIGITS)
    words = ["--model", str(model), "--layers", "2", "--rows", *map(str, files), "--work", str(tmp_path / "work")]
    words += ["--steps", "2", "--rows-per-step", "3", "--max-new-tokens", "6", "--precision", "float32"]
    words += ["--grader", str(tmp_path / "grader.py")]
    assert main(["distil", *words]) in (0, 1)
    printed = capsys.readouterr()
    assert "failed" not in printed.err
    assert sum(line.startswith("| ") for line in printed.out.splitlines()) == 5
    assert json.loads(printed.out.splitlines()[-1])["rows"].keys() == {"train", "eval"}
