"""How much of its general ability a model loses in tuning: loss on a text kept in the package, and fixed instructions.

The text is general.txt beside this file, in the public domain (CC0). It is measured in passes of one size on every
machine, so that two runs can be compared.
"""

# T tokens

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tunesmith.data.batch import build_batch, fill_passes
from tunesmith.data.render import Renderer
from tunesmith.data.tokens import ControlTokens, Encoder
from tunesmith.errors import ModelError
from tunesmith.generation import Sampling, answer
from tunesmith.models.modes import evaluating
from tunesmith.types import Layout, Part, Row, Source, Task, TaskName

MAX_TOKENS = 256
"""Of a row of general text."""
TOKENS_PER_PASS = 512
"""Small, since every token is a target and the logits of all are held at once."""
ANSWER_TOKENS = 48
"""Most new tokens in the answer to a general instruction."""
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


def text_loss(
    model: PreTrainedModel, task: Task, tokenizer: Any, *, layout: Layout, device: torch.device | str
) -> tuple[float, int]:
    """Loss per token of the general text in nats, and its number of targets, by a task that predicts next tokens."""
    rows = general_rows(tokenizer)
    lengths = [len(row.ids) for row in rows]
    total, count = 0.0, 0
    with evaluating(model):
        for members in fill_passes(range(len(rows)), lengths, tokens_per_pass=TOKENS_PER_PASS, layout=layout):
            batch = build_batch([rows[i] for i in members], members, layout=layout, device=device)
            total += float(task.measure(model, batch).losses_N.double().sum())
            count += batch.num_targets
    return total / count, count


def answers(model: PreTrainedModel, renderer: Renderer) -> list[dict[str, str]]:
    """{"prompt", "answer"} of each general instruction: as a chat where the tokenizer has a template for one.

    Nothing where the tokenizer has neither a template nor a token that ends a text.
    """
    asking = renderer if renderer.task_name == "chat" else _asking(renderer.tokenizer)
    if asking is None:
        return []
    end = "" if asking.task_name == "chat" else "\n"
    prompts = [asking.prompt_ids((Part("user", text + end, False),)) for text in GENERAL_INSTRUCTIONS]
    given = answer(model, asking, prompts, Sampling(max_new_tokens=ANSWER_TOKENS))
    return [{"prompt": text, "answer": one.text} for text, one in zip(GENERAL_INSTRUCTIONS, given, strict=True)]


def _asking(tokenizer: Any) -> Renderer | None:
    """A way to ask a model that was not tuned for chats; None if there is none."""
    ways: tuple[TaskName, ...] = ("chat", "generate") if tokenizer.chat_template else ("generate",)
    for way in ways:
        try:
            return Renderer(tokenizer, way, max_tokens=None, too_long="error", control_tokens="allow")
        except ModelError:
            continue
    return None


def verdict(before_loss: float, after_loss: float) -> tuple[str, bool]:
    """One line on how much general ability moved, and whether that is past `BOUND`; then with the knobs that help."""
    moved = after_loss - before_loss
    if not math.isfinite(moved):
        return f"General text: loss {before_loss:.4f} before, {after_loss:.4f} after: it is not a number.", True
    times = f"{100 * math.expm1(moved):+,.1f} %" if moved < 5 else "more than a hundred times as high"
    line = f"General text: loss {before_loss:.4f} before, {after_loss:.4f} after (perplexity {times})"
    if moved <= BOUND:
        return f"{line}, within the bound of {BOUND:+} nats.", False
    return (
        f"{line}, past the bound of {BOUND:+} nats: general ability was lost. These keep more of it: a lower optim.lr, "
        "fewer train.epochs, LoRA with method.targets=mlp, general rows mixed in with data.replay."
    ), True
