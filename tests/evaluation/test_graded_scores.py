"""Measures of graded answers by hand, and the notes on rewards that rose by something else."""

from itertools import combinations

import pytest

from tunesmith.evaluation.compare import compare_rows, compare_runs
from tunesmith.evaluation.graded_scores import graded_notes, graded_result, repeats
from tunesmith.evaluation.report.sections import comparison_table
from tunesmith.evaluation.scores import kind_of, score


def answer(reward, text="a b", *, ended=True, tokens=4, **scores):
    return {"text": text, "reward": reward, "scores": scores, "ended": ended, "tokens": tokens}


def row(number, *rewards, **changes):
    answers = [answer(reward, f"answer {i}", **changes) for i, reward in enumerate(rewards)]
    found = graded_result(number, answers, 1.0)
    assert found is not None
    return found


def test_a_prompt_is_measured_by_its_rewarded_answers():
    answers = [answer(1.0, "x", part=0.5), answer(None, "x"), answer(0.5, "y", ended=False, tokens=10, part=1.0)]
    found = graded_result(255, answers, 1.0)
    assert found is not None
    assert kind_of(found) == "graded"
    assert found["hash"] == "00000000000000ff"
    assert found["loss"] == -0.75
    assert found["right"] == 1
    assert found["ended"] == pytest.approx(2 / 3)
    assert found["tokens"] == 6
    assert found["alike"] == pytest.approx(2 / 3)
    twice = [answer(1.0, text) for text in ("x", "y", " x", "y\n")]
    pairs = graded_result(1, twice, 1.0)
    assert pairs is not None
    assert pairs["alike"] == 1.0  # each equals another one
    assert found["scores"] == {"part": 0.75}
    assert graded_result(1, [answer(None), answer(None)], 1.0) is None


@pytest.mark.parametrize(("num", "right"), [(4, 0), (4, 1), (6, 2), (8, 8)])
def test_pass_k_is_the_share_of_subsets_with_a_right_answer(num, right):
    rows = [row(1, *([1.0] * right), *([0.0] * (num - right))), row(2, 0.0, 0.0, 1.0)]
    measures, details = score(rows)
    answers = [1.0] * right + [0.0] * (num - right)
    shares = [any(chosen) for chosen in combinations(answers, 3)]
    expected = (sum(shares) / len(shares) + 1.0) / 2
    assert measures["pass_k"]["value"] == pytest.approx(expected)
    assert measures["pass_1"]["value"] == pytest.approx((right / num + 1 / 3) / 2)
    assert measures["reward"]["value"] == pytest.approx(-measures["loss"]["value"])
    assert sum(details["rewards"]["counts"]) == num + 3
    assert details["lengths"] == [[4, reward] for reward in (*answers, 0.0, 0.0, 1.0)]


def test_pass_k_has_one_k_whatever_failed():
    """A failed grade on one side compared pass@3 with pass@4."""
    before = [row(i, 1.0, 0.0, 0.0, 0.0) for i in range(8)]
    after = [row(i, 1.0, 0.0, 0.0, None if i == 0 else 0.0) for i in range(8)]
    measures, _ = score(after)
    assert measures["pass_k"]["value"] == 1.0
    assert compare_rows(before, after).metrics["pass_k"].b_minus_a["value"] == 0.0
    fewer = [row(i, 1.0, 0.0) for i in range(8)]
    compared = compare_rows(before, fewer).metrics["pass_k"]
    assert compared.a == pytest.approx(0.5)  # two of four answers, as the other side has
    assert compared.b == 1.0
    three = compare_runs([before, after, fewer])
    assert [comparison.drawn for comparison in three] == [2, 2]
    assert three[0].metrics["pass_k"].a == pytest.approx(0.5)
    assert "pass@2" in [column.title for column in comparison_table(["a", "b", "c"], three).columns]
    assert "pass_k" not in score([row(1, 1.0, None), row(2, None, 0.0)])[0]


def test_before_and_after_are_compared_prompt_by_prompt():
    before = [row(i, 0.0, 0.1 * (i % 3)) for i in range(30)]
    after = [row(i, 1.0, 0.1 * (i % 3)) for i in range(30)]
    compared = compare_rows(before, after)
    change = compared.metrics["reward"].b_minus_a
    assert change["value"] == pytest.approx(0.5)
    assert change["high"] - change["low"] == pytest.approx(0.0, abs=1e-9)  # of every prompt the same
    assert len(compared.won) == 30
    assert len(compared.lost) == 0


def test_a_phrase_that_comes_again_and_again_is_seen():
    assert repeats("so it goes on " * 4)
    assert not repeats("so it goes on " * 3)
    assert not repeats("too short")


def measures(**values):
    usual = {"reward": 0.5, "answer_tokens": 20.0, "repeated": 0.0, "alike": 0.0, "ended": 1.0}
    return {key: {"value": value} for key, value in {**usual, **values}.items()}


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"reward": 0.4}, "did not rise: 0.5000 before, 0.4000 after"),
        ({"answer_tokens": 40.0}, "from 20 to 40 tokens"),
        ({"answer_tokens": 10.0}, "from 20 to 10 tokens"),
        ({"repeated": 0.3}, "30 % of the answers repeat themselves"),
        ({"alike": 0.8}, "80 % of the answers equal another one"),
        ({"ended": 0.9}, "90 % of the answers end by themselves"),
        ({"nats_away": 12.4}, "an answer is 12 nats away from the untouched model"),
    ],
)
def test_a_reward_that_rose_by_something_else_is_noted(after, words):
    (note,) = graded_notes(measures(), measures(**{"reward": 0.9, **after}))
    assert words in note


def test_a_reward_that_rose_by_better_answers_is_not_noted():
    good = measures(reward=0.9, answer_tokens=22.0, ended=0.97, nats_away=9.0)
    assert list(graded_notes(measures(nats_away=0.0), good)) == []


def test_the_distance_from_the_untouched_model_is_a_mean_over_prompts():
    near = graded_result(1, [answer(0.0), answer(1.0)], 1.0, [1.0, 2.0])
    far = graded_result(2, [answer(0.0), answer(1.0)], 1.0, [3.0, 5.0])
    assert near is not None
    assert far is not None
    assert score([near, far])[0]["nats_away"]["value"] == pytest.approx(2.75)
    assert "nats_away" not in score([near, row(2, 0.0, 1.0)])[0]


def test_a_number_that_one_side_has_alone_is_not_compared():
    before = [row(n, 0.0, 0.5, part=0.25, rare=1.0) for n in range(4)]
    after = [row(n, 0.5, 1.0, part=0.75) for n in range(4)]
    for sides in ((before, after), (after, before)):
        compared = compare_rows(*sides)
        assert "score rare" not in compared.metrics
        assert {"reward", "score part"} <= compared.metrics.keys()
