"""`python -m benchmarks serve` on a tiny model: both contestants answer alike, and the page says what was run."""

import pytest
from benchmarks.__main__ import main

from benchmarks import serve as race
from tiny_run import model_folder


@pytest.mark.slow  # a server and two other processes
def test_ours_and_generate_answer_alike(tmp_path, capsys):
    folder, page = model_folder(tmp_path / "model"), tmp_path / "table.md"
    words = [
        "serve",
        "--model",
        str(folder),
        "--rounds",
        "1",
        "--new-tokens",
        "5",
        "--threads",
        "1",
        "--out",
        str(page),
    ]
    assert main(words) == 0
    text = page.read_text("utf-8")
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "| tokens/s, median (range) | 1 stream | 4 streams | 16 streams |" in text
    assert "as fast as Tunesmith over HTTP" in text
    assert "failed" not in text
    assert "16 of 16 are the same to the last token" in text


def test_a_contestant_that_fails_stays_on_the_page(tmp_path):
    settings = race.Settings(str(tmp_path / "nothing"), [], rounds=1, new_tokens=2, threads=1)
    turn = race.one_turn(race.GENERATE, settings)
    assert turn.error.startswith("exit code 1")
    text = race.page(settings, [turn], "command")
    assert "| transformers.generate | failed | failed | failed |" in text
    assert "transformers.generate failed: exit code 1" in text
