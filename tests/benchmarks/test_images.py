"""`python -m benchmarks images`: losses with images are those of TRL's SFTTrainer, where TRL is installed."""

import os
from pathlib import Path

import pytest
from benchmarks.__main__ import main
from benchmarks.images import compared, costs, foreseen
from benchmarks.measured import ROOT

from tiny_vision import questions, vision_folder

PEER = Path(os.environ.get("PEERS", ROOT / ".peers")) / "trl" / "bin" / "python"
"""`python -m benchmarks.environments .peers trl` makes it."""
FAMILIES = ("llava", "llava_next", "idefics3", "gemma3")
"""Families whose processors transformers makes without torchvision, which readers of videos need."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.skipif(not PEER.exists(), reason="TRL is not installed: python -m benchmarks.environments .peers trl")
def test_losses_with_images_are_sft_trainers(family, tmp_path, capsys):
    words = ["--model", str(vision_folder(tmp_path / family, family)), "--rows", str(questions(tmp_path))]
    words += ["--peer", str(PEER), "--work", str(tmp_path / "work")]
    code = main(["images", "--beside", "trl", *words])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert f"| {family} |" in printed.out


def test_a_loss_that_differs_is_not_passed_over():
    sides = {"ours": {"losses": [2.0, 1.0]}, "trl": {"losses": [2.0, 1.0 + 2e-6]}}
    lines, agree = compared([("llava", sides)])
    assert agree
    assert lines[2] == "| llava | 2.000000 | 1.000000 | 1.000002 | 2.0e-06 |"
    assert not compared([("llava", {**sides, "trl": {"losses": [2.0, 1.00002]}})])[1]


def test_the_first_epoch_and_later_ones_are_told_apart():
    turn = {"seconds": [9.0, 7.0, 2.0, 2.0, 2.0], "steps_per_epoch": 2, "peak_bytes": 2**30, "losses": [1.0, 0.5]}
    lines = list(costs([("photos", {"kept": [turn, turn], "anew": [turn]})]))
    assert lines[2] == "| photos | kept | 8.00 8.00 | 2.00 2.00 | 1.00 1.00 | 0.500000 |"


def test_what_was_foreseen_wrongly_is_a_share_of_what_was_measured():
    found = {"foreseen": {"step": {"measured": 2.0, "formula": 1.5, "probe": 2.2}}}
    lines = list(foreseen([("photos", found)]))
    assert lines[2:] == ["| photos | a step | 2 | 1.5 | -25 % | 2.2 | +10 % |"]
