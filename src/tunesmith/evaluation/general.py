"""Forgetting probe: the loss of general text before and after training.

The text is general.txt in this folder, in the public domain (CC0). It is measured in micro-batches of one size
on every machine, so that two runs can be compared.
"""

# T tokens, P passages

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tunesmith.data.collate import build_batch
from tunesmith.data.sampler import make_micro_batches, pass_cost
from tunesmith.data.tokenizer import ControlTokens, FastTokenizer
from tunesmith.evaluation.bootstrap import Interval, paired_intervals, ratio, value_of
from tunesmith.models.modes import eval_mode
from tunesmith.tasks.task import BoundTask
from tunesmith.types import Batch, HeadName, Layout, Row, Source

MAX_TOKENS = 256
"""Most tokens of a row of general text."""
TOKENS_PER_PASS = 512
"""Small, since every token is a target and the logits of all are held at once."""
TOKENS_NEEDED = 384
"""Positions of a model that reads a passage of the general text with room to spare."""
BOUND = 0.1
"""Rise of the general loss, in nats, beyond which a run is warned of. By the fit of Hoffmann et al. 2022
(equation 10: 406.4 / N^0.34) a model of a billion parameters that was halved would lose as much."""


def can_generate(head: HeadName, *, is_causal: bool, max_tokens: int) -> bool:
    """Whether a model continues text within `max_tokens` positions, so that its ability can be measured."""
    return head == "next_token" and is_causal and max_tokens >= TOKENS_NEEDED


def passages() -> list[str]:
    """The passages of the general text: prose, talk, letters, sums, code, tables, some in other languages."""
    text = files("tunesmith.evaluation").joinpath("general.txt").read_text("utf-8")
    return text.strip().split("\n\n")[1:]  # the first one is its licence


def general_rows(tokenizer: Any) -> list[Row]:
    """General text as rows of at most `MAX_TOKENS`: every token of a passage but the first is a target once.

    Control tokens that the tokenizer writes around a text are not targets: whether a text ends says nothing of
    the language. Raises ModelError for a tokenizer that cannot be used.
    """
    control = ControlTokens(tokenizer, "")
    rows = []
    for number, ids_T in enumerate(FastTokenizer(tokenizer).ids(passages(), add_special_tokens=True), start=1):
        trained_T = ~control.are_reserved(ids_T)
        trained_T[0] = False
        for start in range(0, len(ids_T) - 1, MAX_TOKENS - 1):
            window = slice(start, start + MAX_TOKENS)
            # The first token of a window was the last of the one before: it has been a target already.
            trained = trained_T[window] & (np.arange(len(ids_T[window])) > 0)
            if trained.any():
                rows.append(Row(ids_T[window], trained, Source("general.txt", number)))
    return rows


def text_losses(
    model: PreTrainedModel, task: BoundTask, tokenizer: Any, *, layout: Layout, device: torch.device | str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Summed loss in nats and number of targets of each passage, by a task of next tokens: [P], [P]."""
    rows = general_rows(tokenizer)
    passage_I = np.array([row.source.line - 1 for row in rows])
    losses_P, counts_P = np.zeros(passage_I.max() + 1), np.zeros(passage_I.max() + 1, np.int64)
    measure = task.text_measure or task.measure
    with eval_mode(model):
        for members, batch in text_batches(rows, layout=layout, device=device):
            passage_N = passage_I[np.asarray(members)][batch.row_of_N.cpu().numpy()]
            np.add.at(losses_P, passage_N, measure(model, batch).losses_N.cpu().double().numpy())
            np.add.at(counts_P, passage_N, 1)
    return losses_P, counts_P


def text_batches(
    rows: Sequence[Row], *, layout: Layout, device: torch.device | str
) -> Iterator[tuple[Sequence[int], Batch]]:
    """Micro-batches of the rows of the general text, each with the indices of its rows."""
    lengths, cost = [len(row.ids) for row in rows], pass_cost(device)
    for members in make_micro_batches(
        range(len(rows)), lengths, tokens_per_pass=TOKENS_PER_PASS, layout=layout, cost=cost
    ):
        yield members, build_batch([rows[i] for i in members], members, layout=layout, device=device)


def loss_change(before_P: Sequence[float], after_P: Sequence[float], counts_P: Sequence[int]) -> Interval:
    """Change of loss per token, in nats, by each passage's loss before and after; passages are resampled."""
    moved_P = np.asarray(after_P, np.float64) - np.asarray(before_P, np.float64)
    change, none = ratio(moved_P, np.asarray(counts_P)), ratio(np.zeros(len(moved_P)), np.asarray(counts_P))
    value = value_of(change, len(moved_P))
    return paired_intervals(len(moved_P), {"change": none}, {"change": change}, {"change": value})["change"]


def assess(before_loss: float, after_loss: float, moved: Interval) -> tuple[str, bool]:
    """One line on the change of general ability, and whether it passes `BOUND`; then with options that help."""
    if not math.isfinite(moved["value"]):
        return f"General text: loss {before_loss:.4f} before, {after_loss:.4f} after: it is not a number.", True
    value, low, high = (f"{moved[end]:+.4f}" for end in ("value", "low", "high"))
    times = "more than a hundred times as high"
    if moved["value"] < 5:
        times = f"{100 * math.expm1(moved['value']):+,.1f} %"
    line = (
        f"General text: loss {before_loss:.4f} before, {after_loss:.4f} after: {value} nats "
        f"(95 %: {low} to {high}; perplexity {times})"
    )
    if moved["value"] <= BOUND:
        return f"{line}, within the bound of {BOUND:+} nats.", False
    return (
        f"{line}, past the bound of {BOUND:+} nats: general ability was lost. These keep more of it: a lower "
        "optim.lr, fewer train.epochs, LoRA with method.targets=mlp, general rows mixed in with data.replay. "
        "More: tunesmith explain it-forgets"
    ), True
