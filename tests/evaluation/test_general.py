"""The forgetting probe: every token of the general text counts once, the same on every machine; the bound is said."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.data.tokenizer import FastTokenizer
from tunesmith.evaluation import general
from tunesmith.evaluation.bootstrap import Interval
from tunesmith.models.attention import use_packed_attention
from tunesmith.tasks import bind

TOKENIZER = tiny_tokenizer()


def model():
    return tiny_model("llama", vocab_size=len(TOKENIZER), hidden=32, layers=1)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_every_token_is_a_target_once_but_the_first_of_a_passage(adds_bos, monkeypatch):
    monkeypatch.setattr(general, "MAX_TOKENS", 20)
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    wholes = FastTokenizer(tokenizer).ids(general.passages(), add_special_tokens=True)
    rows = general.general_rows(tokenizer)
    assert max(len(row.ids) for row in rows) == 20
    for number, whole in enumerate(wholes, start=1):
        targets = [row.ids[row.trained] for row in rows if row.source.line == number]
        assert np.array_equal(np.concatenate(targets), whole[1:])
    assert not any(row.trained[0] for row in rows)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_losses_of_passages_are_sums_by_hand_over_their_targets(layout, monkeypatch):
    monkeypatch.setattr(general, "passages", lambda: ["A brown fox jumps.", "One two", "What is it?\nYes."])
    tiny = model()
    monkeypatch.setattr(general, "MAX_TOKENS", 4)  # a passage of several rows is one passage still
    losses, counts = [], []
    with torch.no_grad():
        for ids in FastTokenizer(TOKENIZER).ids(general.passages(), add_special_tokens=True):
            ids_T = torch.from_numpy(ids.astype(np.int64))
            counts.append(len(ids_T) - 1)
            losses.append(0.0)
            for start in range(0, len(ids_T) - 1, 3):
                window_T = ids_T[start : start + 4]
                logits = tiny.eval()(input_ids=window_T[None]).logits[0, :-1].double()
                losses[-1] += float(F.cross_entropy(logits, window_T[1:], reduction="sum"))
    if layout == "packed":
        use_packed_attention(tiny)
    losses_P, counts_P = general.text_losses(tiny, bind("chat", None), TOKENIZER, layout=layout, device="cpu")
    assert counts_P.tolist() == counts
    assert losses_P == pytest.approx(losses, rel=1e-5)  # float32 logits


def test_measuring_leaves_the_model_as_it_was():
    tiny = model().train()
    state = torch.get_rng_state()
    general.text_losses(tiny, bind("chat", None), TOKENIZER, layout="padded", device="cpu")
    assert tiny.training
    assert torch.equal(torch.get_rng_state(), state)


def moved(value: float, margin: float = 0.01) -> Interval:
    return {"value": value, "low": value - margin, "high": value + margin}


def test_change_of_loss_per_token_has_an_interval_over_passages():
    """Ten tokens lose 1 nat each and thirty 2: 70 nats of 40 tokens. A resample has either, or both; Student's t of
    so few is far wider."""
    found = general.loss_change([10.0, 60.0], [20.0, 120.0], [10, 30])
    assert found["value"] == 70 / 40
    assert found["low"] < 1.0
    assert found["high"] > 2.0


def test_change_common_to_all_passages_is_sure_however_much_they_differ():
    counts = [1, 100, 7]
    found = general.loss_change([5.0, 1.0, 900.0], [5.0 + 0.2, 1.0 + 20, 900.0 + 1.4], counts)
    assert found == pytest.approx({"value": 0.2, "low": 0.2, "high": 0.2})


def test_verdict_says_how_far_the_loss_moved():
    assert general.assess(3.0, 3.05, moved(0.05)) == (
        "General text: loss 3.0000 before, 3.0500 after: +0.0500 nats (95 %: +0.0400 to +0.0600; perplexity +5.1 %), "
        "within the bound of +0.1 nats.",
        False,
    )
    assert "perplexity -4.9 %), within" in general.assess(3.05, 3.0, moved(-0.05))[0]


def test_verdict_past_the_bound_names_the_options_that_help():
    line, past = general.assess(3.0, 3.2, moved(0.2, 0.15))
    assert past  # by its value: the interval says how sure that is
    assert "perplexity +22.1 %), past the bound of +0.1 nats" in line
    for option in ("optim.lr", "train.epochs", "method.targets=mlp", "data.replay"):
        assert option in line
    assert "\n" not in line


@pytest.mark.parametrize("after", [math.nan, math.inf, 1e6])
def test_verdict_of_a_lost_model_is_past_the_bound(after):
    line, past = general.assess(3.0, after, general.loss_change([3.0], [after], [1]))
    assert past
    assert len(line) < 400
