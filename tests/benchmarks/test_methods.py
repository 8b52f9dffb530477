"""`python -m benchmarks methods` on a tiny model: a result a case, kept, and put into a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.__main__ import main

from benchmarks import methods, methods_page
from tiny_run import chats, model_folder


def words(folder: Path, *more: str) -> list[str]:
    rows = str(chats(folder / "chats.jsonl", 12))
    return [
        "methods", "--model", str(model_folder(folder / "model")), "--chat", rows, rows, "--chat-steps", "10",
        "--rows-per-step", "3", "--folder", str(folder / "results"), "--set", "threads=1", "--set",
        "evaluation.general=false", *more,
    ]  # fmt: skip


def test_what_is_done_is_kept_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{methods_page.BEGIN}\nwhat stood there\n{methods_page.END}\nbelow\n", "utf-8")
    assert main(words(tmp_path, "--only", "peft: IA3", "--page", str(page))) == 0
    text = page.read_text("utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "what stood there" not in text
    [row] = [line for line in text.splitlines() if line.startswith("| peft: IA3")]
    assert row.startswith("| peft: IA3 | 0.003 / – | ")
    saved = json.loads((tmp_path / "results/chat-peft-IA3.json").read_text("utf-8"))
    assert saved["trained"] > 0
    assert saved["result_bytes"] > 4 * saved["trained"]
    assert saved["after"]["loss"] != saved["before"]["loss"]
    assert not list((tmp_path / "results").glob("*-run"))

    # Another folder's results of the same case give the speed alone.
    (tmp_path / "speed").mkdir()
    timed = {**saved, "tokens_per_second": 98_765.0, "load": 0.25, "after": {"loss": 9.0}}
    (tmp_path / "speed/chat-peft-IA3.json").write_text(json.dumps(timed), "utf-8")
    monkeypatch.setattr(methods, "run_child", lambda *args, **how: pytest.fail("it was run again"))
    assert main(words(tmp_path, "--only", "peft: IA3", "--speed-folder", str(tmp_path / "speed"))) == 0
    fast = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| peft: IA3")][-1]
    assert "98,765" in fast
    assert f"{saved['after']['loss']:.3f}" in fast
    assert main(words(tmp_path, "--only", "peft: IA3")) == 0
    assert row in capsys.readouterr().out


def test_a_case_that_fails_is_told_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words(tmp_path, "--only", "peft: IA3", "--set", "method.nothing=1")
    assert main(given) == 1
    assert "peft: IA3 on chat: exit code 2" in capsys.readouterr().out
    assert not (tmp_path / "results/chat-peft-IA3.json").exists()


def test_what_cannot_be_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--model", "x", "--folder", str(tmp_path)]) == 2
    assert main(words(tmp_path, "--only", "lorra")) == 2
    assert "there is no such case" in capsys.readouterr().err
    (tmp_path / "bare.md").write_text("nothing", "utf-8")
    with pytest.raises(ValueError, match="lacks the lines"):
        methods_page.put_into(tmp_path / "bare.md", "text")


def test_the_plot_has_every_method(tmp_path: Path) -> None:
    measured = {"general": (2.0, 2.1), "peak_bytes": 2**30, "tokens_per_second": 9.0}
    made = [methods.Result("chat", case, after={"loss": 1.0 + i}, **measured) for i, case in enumerate(methods.CASES)]
    methods_page.plot(made, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text("utf-8")
    assert all(case in text for case in methods.CASES)
