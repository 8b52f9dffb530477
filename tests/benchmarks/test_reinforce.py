"""`python -m benchmarks reinforce`: losses and gradients of one step are GRPOTrainer's, where TRL is installed."""

import os
import re
from pathlib import Path

import pytest
from benchmarks.__main__ import main
from benchmarks.measured import ROOT
from benchmarks.reinforce import SETTINGS, compared, raced

from rewarded import rewarded
from tunesmith.training.draw import Drawing

PEER = Path(os.environ.get("PEERS", ROOT / ".peers")) / "trl" / "bin" / "python"
"""`python -m benchmarks.environments .peers trl` makes it."""


def test_our_side_knows_the_drawing_as_it_is():
    script = (ROOT / "benchmarks" / "peers" / "reinforce_ours.py").read_text("utf-8")
    names = set(re.findall(r"drawing\.([a-z_]+)", script))
    assert {name for name in names if not hasattr(Drawing, name)} <= set(Drawing.__dataclass_fields__)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not PEER.exists(), reason="TRL is not installed: python -m benchmarks.environments .peers trl")
def test_one_steps_losses_and_gradients_are_grpo_trainers(tmp_path, capsys):
    recipe = rewarded(tmp_path)
    words = ["--model", recipe.model, "--prompts", recipe.data.train[0].path, "--grader", recipe.reinforce.grader]
    words += ["--peer", str(PEER), "--work", str(tmp_path / "work"), "--threads", "1"]
    words += ["--rows-per-step", "2", "--samples", "4", "--max-new-tokens", "6", "--held-out", "3"]
    code = main(["reinforce", *words])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert printed.out.count("| `") == len(SETTINGS)


def test_a_difference_of_losses_or_gradients_is_not_passed_over():
    losses = [{"loss": 0.5, "clipped": 0.25} for _ in SETTINGS]
    same = [1.0] * len(SETTINGS)
    lines, agree = compared(losses, losses, same)
    assert agree
    assert lines[3] == "| `clip`, `tokens`, 0 | moved, 25% clipped | 0.5000000 | 0.5000000 | 0.0e+00 | 0.0e+00 |"
    away = [{"loss": 0.5 + 2e-5, "clipped": 0.0}, *losses[1:]]
    assert not compared(losses, away, same)[1]
    assert not compared(losses, losses, [0.999, *same[1:]])[1]


def test_a_race_is_told_round_by_round():
    turn = {"seconds": [9.0, 2.0, 2.0], "peak_bytes": 2**30, "rewards": [0.1] * 5}
    other = {"seconds": [9.0, 5.0, 5.0], "peak_bytes": 2**31, "rewards": [0.2] * 5}
    held = {"reward": 0.9, "ended": 1.0, "answer_tokens": 9.0, "rose": {"value": 0.4, "low": 0.3, "high": 0.5}}
    of_round = {"ours": held, "trl": {**held, "reward": 0.8}, "ours_less_trl": {"value": 0.1, "low": -0.1, "high": 0.3}}
    judged = {"untouched": {"reward": 0.5, "ended": 0.25, "answer_tokens": 30.0}, "rounds": [of_round]}
    lines = list(raced([{"ours": turn, "trl": other}], judged))
    assert lines[2:] == [
        "| | untouched | | | | 0.500 |  | 25% | 30.0 |",
        "| 0 | ours | 2.0 s | 1.00 GiB | 0.100 | 0.900 | +0.400 (+0.300 to +0.500) | 100% | 9.0 |",
        "| 0 | trl | 5.0 s | 2.00 GiB | 0.200 | 0.800 | +0.400 (+0.300 to +0.500) | 100% | 9.0 |",
        "steps a minute, ours over TRL's: 2.50",
        "peak memory, ours over TRL's: 0.50",
        "round 0: held-out reward, ours less TRL's: +0.100 (-0.100 to +0.300), paired over prompts",
    ]
