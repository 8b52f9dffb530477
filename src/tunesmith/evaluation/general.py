"""How much of its general ability a model loses in tuning: loss on a text kept in the package, and fixed instructions.

The text is general.txt beside this file, in the public domain (CC0). It is measured in passes of one size on every
machine, so that two runs can be compared.
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

from tunesmith.data.batch import build_batch
from tunesmith.data.passes import fill_passes
from tunesmith.data.render import Renderer
from tunesmith.data.tokens import ControlTokens, Encoder
from tunesmith.errors import ModelError
from tunesmith.evaluation import statistics
from tunesmith.evaluation.generation import Sampling, answer
from tunesmith.evaluation.intervals import Interval, intervals
from tunesmith.models.modes import evaluating
from tunesmith.tasks import TASKS
from tunesmith.types import Batch, HeadName, Layout, Part, Row, Source, Task

MAX_TOKENS = 256
"""Of a row of general text."""
TOKENS_PER_PASS = 512
"""Small, since every token is a target and the logits of all are held at once."""
ANSWER_TOKENS = 48
"""Most new tokens in the answer to a general instruction."""
ROOM_TO_SPEAK = 384
"""Positions that a passage of the general text, or an instruction and its answer, may need."""
BOUND = 0.1
"""Rise of the general loss, in nats, beyond which a run is warned of. By the fit of Hoffmann et al. 2022 (equation 10:
406.4 / N^0.34) a model of a billion parameters that was halved would lose as much."""

GENERAL_INSTRUCTIONS: tuple[str, ...] = (
    "What is the capital of France?",
    "Name three primary colors.",
    "What is 17 + 25?",
    "A pen costs 2 euros. How much do four pens cost?",
    "Rewrite this sentence in the past tense: She walks to school.",
    "Correct the spelling: I recieved you're leter yesterday.",
    "Translate into French: Good morning, my friend.",
    "List five animals that live in the sea.",
    "Explain in one sentence why the sky is blue.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Write a Python function that returns the larger of two numbers.",
    "Write a polite one-sentence reply to an invitation that you cannot accept.",
)
"""Facts, arithmetic, rewriting, lists, an explanation, a trick question, code and manners."""


def speaks(head: HeadName, *, is_causal: bool, room: int) -> bool:
    """Whether a model goes on with text in so many positions, so that its general ability can be asked for."""
    return head == "next_token" and is_causal and room >= ROOM_TO_SPEAK


def passages() -> list[str]:
    """The passages of the general text: prose, talk, letters, sums, code, tables, and a little in other languages."""
    text = files("tunesmith.evaluation").joinpath("general.txt").read_text("utf-8")
    return text.strip().split("\n\n")[1:]  # the first one is its licence


def general_rows(tokenizer: Any) -> list[Row]:
    """The general text as rows of at most `MAX_TOKENS`: every token of a passage but its first is a target once.

    Control tokens that the tokenizer writes around a text are read and not targets: whether a text ends says nothing
    of the language. Raises ModelError for a tokenizer that cannot be used.
    """
    control = ControlTokens(tokenizer, "")
    rows = []
    for number, ids_T in enumerate(Encoder(tokenizer).ids(passages(), plain=True), start=1):
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
    model: PreTrainedModel, task: Task, tokenizer: Any, *, layout: Layout, device: torch.device | str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each passage its loss in nats, summed, and its number of targets, by a task that predicts next tokens: [P]."""
    rows = general_rows(tokenizer)
    passage_I = np.array([row.source.line - 1 for row in rows])
    losses_P, counts_P = np.zeros(passage_I.max() + 1), np.zeros(passage_I.max() + 1, np.int64)
    with evaluating(model):
        for members, batch in text_batches(rows, layout=layout, device=device):
            passage_N = passage_I[np.asarray(members)][batch.row_of_N.cpu().numpy()]
            np.add.at(losses_P, passage_N, task.measure(model, batch).losses_N.double().cpu().numpy())
            np.add.at(counts_P, passage_N, 1)
    return losses_P, counts_P


def text_batches(
    rows: Sequence[Row], *, layout: Layout, device: torch.device | str
) -> Iterator[tuple[Sequence[int], Batch]]:
    """The passes over the rows of the general text: which rows, and the pass."""
    lengths = [len(row.ids) for row in rows]
    for members in fill_passes(range(len(rows)), lengths, tokens_per_pass=TOKENS_PER_PASS, layout=layout):
        yield members, build_batch([rows[i] for i in members], members, layout=layout, device=device)


def change(before_P: Sequence[float], after_P: Sequence[float], counts_P: Sequence[int]) -> Interval:
    """How far the loss per token moved, in nats, by each passage's losses before and after; passages are resampled."""
    moved_P = np.asarray(after_P, np.float64) - np.asarray(before_P, np.float64)
    moved = statistics.ratio(moved_P, np.asarray(counts_P))
    value = float(moved(np.ones((1, len(moved_P))))[0])
    return intervals(len(moved_P), {"change": (value, moved)})["change"]


def answers(model: PreTrainedModel, renderer: Renderer) -> list[dict[str, str]]:
    """{"prompt", "answer"} of each general instruction: as a chat where the tokenizer has a template for one.

    Nothing where the tokenizer has neither a template nor a token that ends a text.
    """
    asking = renderer if TASKS[renderer.task_name].is_chat else _asking(renderer.tokenizer)
    if asking is None:
        return []
    end = "" if TASKS[asking.task_name].is_chat else "\n"
    prompts = [asking.prompt_ids((Part("user", text + end, False),)) for text in GENERAL_INSTRUCTIONS]
    given = answer(model, asking, prompts, Sampling(max_new_tokens=ANSWER_TOKENS))
    return [{"prompt": text, "answer": one.text} for text, one in zip(GENERAL_INSTRUCTIONS, given, strict=True)]


def _asking(tokenizer: Any) -> Renderer | None:
    """A way to ask a model that was not tuned for chats; None if there is none."""
    ways = [task.name for task in TASKS.values() if task.is_chat or (task.raw_text and task.writes_answers)]
    for way in ways:
        try:
            return Renderer(tokenizer, way, max_tokens=None, too_long="error", control_tokens="allow")
        except ModelError:
            continue
    return None


def verdict(before_loss: float, after_loss: float, moved: Interval) -> tuple[str, bool]:
    """One line on how much general ability moved, and whether that is past `BOUND`; then with the knobs that help."""
    if not math.isfinite(moved["value"]):
        return f"General text: loss {before_loss:.4f} before, {after_loss:.4f} after: it is not a number.", True
    value, low, high = (f"{moved[end]:+.4f}" for end in ("value", "low", "high"))
    times = f"{100 * math.expm1(moved['value']):+,.1f} %" if moved["value"] < 5 else "more than a hundred times as high"
    line = (
        f"General text: loss {before_loss:.4f} before, {after_loss:.4f} after: {value} nats "
        f"(95 %: {low} to {high}; perplexity {times})"
    )
    if moved["value"] <= BOUND:
        return f"{line}, within the bound of {BOUND:+} nats.", False
    return (
        f"{line}, past the bound of {BOUND:+} nats: general ability was lost. These keep more of it: a lower optim.lr, "
        "fewer train.epochs, LoRA with method.targets=mlp, general rows mixed in with data.replay."
    ), True
