"""Rows and pages of `python -m benchmarks preferences`, `rewards` and `reranker`: pairs, what is alike and better."""

import json
from typing import Any

import pytest

from benchmarks import preferences, reranker, rewards


def test_of_two_answers_the_one_rated_higher_is_chosen(tmp_path):
    said = [(topic, f"q{i}", f"{topic}{i}") for i, topic in enumerate("ab" * 6)]
    chats = [
        {"topic": topic, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for topic, asked, answer in said
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in [*chats, chats[0]]))
    pairs = list(rewards.rated_pairs(path))
    assert len(pairs) == 12
    for number, pair in enumerate(pairs):
        own = chats[number]["messages"][1]["content"]
        ratings = {own: 2, **{f"{own[0]}{i}": 1 for i in range(12) if f"{own[0]}{i}" != own}}
        chosen, rejected = (ratings.get(pair[side], 0) for side in ("chosen", "rejected"))
        assert (chosen, rejected) == (pair["score_chosen"], pair["score_rejected"])
        assert chosen > rejected


def test_results_are_above_both_habits_by_their_paired_intervals():
    pairs = [{"chosen_ids": [1] * (3 if i % 2 else 5), "rejected_ids": [1] * 4} for i in range(40)]
    base = [[-3.0, -8.0] if i % 4 == 0 else [-8.0, -3.0] for i in range(40)]
    ours, theirs = ([[c + 1, r - 1] if i != 7 or i == miss else [c - 1, r] for i, (c, r) in enumerate(base)]
                    for miss in (0, 7))  # fmt: skip
    lines = list(preferences.accuracies(pairs, {"base": base, "ours": ours, "trl": theirs}))
    assert lines[0] == "held-out pairs right, of 40: 39 and 40; 1 decided otherwise"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "ours above trl (100.0%)", "ours above the longer answer (50.0%)", "ours above the likelier answer (25.0%)"
    ]  # fmt: skip
    assert "+47.5% (+32" in lines[2]


def rewards_page(*, loss: float = 0.5, won: int = 5, loaded: float = 1.0) -> int:
    ours = {"losses": [0.7, 0.5], "seconds": [1.0] * 5, "tokens": 80.0, "margins": [1.0] * 5 + [-1.0] * 5}
    theirs: dict[str, Any] = {
        "losses": [0.7, loss], "seconds": [4.0] * 5, "versions": {},
        "margins": {"ours": [loaded] * 5 + [-1.0] * 5, "trl": [1.0] * won + [-1.0] * (10 - won)},
    }  # fmt: skip
    same = {"peak_bytes": 2**30, "load_before": 0.0}
    return rewards.report({**ours, **same}, {**theirs, **same})


def test_other_losses_another_accuracy_or_another_model_there_fail(capsys):
    assert rewards_page() == 0
    assert "4.00 times" in capsys.readouterr().out
    assert rewards_page(loss=0.502) == rewards_page(won=10) == rewards_page(loaded=1.1) == 1


@pytest.mark.parametrize(("better", "code"), [(True, 0), (False, 1)])
def test_an_order_has_to_be_above_that_of_bm25(capsys, better, code):
    ranks = [1 + i % 3 for i in range(60)] + [11] * 6
    by_model = [{"rank": 1, "ndcg": 1.0} if better else {"rank": 2, "ndcg": 0.63} for _ in ranks[:60]]
    assert reranker.report([*by_model, *[reranker.MISSED] * 6], ranks) == code
    assert "66 held-out terms; BM25's 10 have the right one of 60" in capsys.readouterr().out
