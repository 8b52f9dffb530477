"""`python -m benchmarks answers`: what it says of seconds, and of the tokens at which answers part."""

import pytest
from benchmarks.answers import parting, spacing, tied, timed


def answer(*ids: int) -> dict[str, list[int]]:
    return {"prompt": [7, 8], "answer": list(ids)}


def test_answers_part_at_the_first_token_that_differs():
    others = [answer(1, 2, 3), answer(1, 2), answer(4)]
    ours = [answer(1, 2, 3), answer(1, 5, 6), answer(4, 9)]
    assert parting(others, ours) == [{"answer": 1, "at": 1, "tokens": [2, 5], "common": [7, 8, 1]}]
    with pytest.raises(ValueError, match="the prompts differ"):
        parting([answer(1)], [{"prompt": [7], "answer": [1]}])


@pytest.mark.parametrize(("value", "step"), [(1.0, 2**-7), (-17.3, 0.125), (16.0, 0.125), (15.9, 0.0625)])
def test_the_spacing_of_bfloat16_grows_with_the_number(value, step):
    import torch

    assert spacing(value) == step
    number = torch.tensor(abs(value), dtype=torch.bfloat16)
    assert float(torch.nextafter(number, torch.tensor(torch.inf, dtype=torch.bfloat16)) - number) == step


def test_each_tie_is_told_in_spacings():
    tie = {"answer": 3, "at": 5, "tokens": [" a", " b"], "logits": [17.0, 17.1], "ranks": [2, 1], "rounding": 0.06}
    told = list(tied([tie], "32", 48))
    assert told[0] == "At most 32 tokens: 47 of 48 answers are alike."
    assert told[3] == '| 3, 5 | `" a"`, `" b"` | 17.000, 17.100 | 0.1000 | 0.125 | 0.80 | 0.060 | 2, 1 |'
    assert told[4] == (
        "1 of 1 gaps are within one spacing of bfloat16, the largest is 0.80 spacings. 1 are within what rounding "
        "moves two logits there."
    )
    assert list(tied([], "32", 48)) == ["At most 32 tokens: 48 of 48 answers are alike."]


def test_ratios_are_of_the_same_round():
    rounds = [
        {"ours": {"seconds": {"32": 10.0}}, "other": {"seconds": {"32": 25.0}}},
        {"ours": {"seconds": {"32": 5.0}}, "other": {"seconds": {"32": 10.0}}},
    ]
    assert list(timed(rounds, [32]))[2:] == [
        "| 32 | 10.0 s | 25.0 s | 5.0 s | 10.0 s |",
        "32 tokens: times as fast: 2.50, 2.00, in the median 2.25",
    ]
