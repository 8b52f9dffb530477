"""Options of the task that learns from rewards of the model's own answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunesmith.recipe.methods import Auto, OptionGroup, Positive

LEAST_TEMPERATURE = 0.1
USUAL_PROMPTS, UPDATES, MOST_UPDATES = 8, 100, 500
"""Usual prompts of a step; steps of a run at least, and at most for the sake of seeing all prompts."""
NAMES_OF_LOSSES = {
    "grpo": "reinforce: {loss: clip, normalize: answers, scale: group}",
    "dapo": "reinforce: {loss: clip, normalize: tokens, scale: group}",
    "drgrpo": "reinforce: {loss: clip, normalize: constant, scale: none}",
    "gspo": "reinforce: {loss: sequence, normalize: answers, scale: group}",
    "rloo": "reinforce: {loss: clip, normalize: constant, baseline: leave_one_out}",
    "ppo": "reinforce: {loss: clip}, without a value model: rewards are compared within a group",
}
"""Names of methods, in small letters alone, and what they are here: docs/guide/reinforce.md has the papers."""


def file_of(grader: str) -> str:
    """The file that `reinforce.grader` names, without a function in it."""
    file, colon, name = grader.rpartition(":")
    return file if colon and name.isidentifier() and file.endswith(".py") else grader


def updates_of(prompts: int, per_step: int) -> int:
    """Steps of a run by `train.epochs: auto`: once over all prompts if that is more than the usual number."""
    return min(max(UPDATES, -(-prompts // per_step)), MOST_UPDATES)


class Reinforce(OptionGroup):
    """Task reinforce: answers are drawn, graded and made likelier or less likely,
    see docs/guide/reinforce.md."""

    grader: str | None = None
    """Rule that says how good an answer is: file.py, file.py:FUNCTION, a grader in .json or .yaml, or run:RUN,
    a run of task reward. Try it first: tunesmith grade."""
    samples: Annotated[int, Field(ge=2, le=64)] = 8
    """Answers drawn to each prompt of a step. They are a group: each reward is compared
    with the mean of its group."""
    max_new_tokens: Positive = 256
    """Most tokens of an answer; prompts leave room for them in data.max_tokens."""
    temperature: Annotated[float, Field(le=2)] = 1.0
    """Temperature at which answers are drawn and learnt, from 0.1 on."""
    updates: Annotated[int, Field(ge=1, le=4)] = 1
    """Steps whose answers are drawn at once, with the weights before the first of them. Each answer is learnt
    once. More are faster, but later steps learn from the answers of older weights."""
    loss: Literal["clip", "cispo", "sequence"] = "clip"
    """Loss of a token. clip: as PPO and GRPO. cispo: the weight is clipped, not the token. sequence: as GSPO,
    an answer has one ratio. With `updates: 1` clip and cispo have the same gradient."""
    normalize: Literal["tokens", "answers", "constant"] = "tokens"
    """Divisor of a step's loss. tokens: its answers' tokens, as DAPO. answers: their number, and each
    answer is divided by its length first, as GRPO. constant: their number times max_new_tokens, as Dr. GRPO."""
    baseline: Literal["group", "leave_one_out"] = "group"
    """Comparison of a reward: with the mean of its group, or of the others in it, as RLOO."""
    scale: Literal["none", "group", "step"] = "none"
    """Divide the difference by the standard deviation of the rewards of its group,
    as GRPO, or of the whole step."""
    kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence from the untouched model, token by token; needs an adapter. 0.02 keeps the
    model's language where a grader looks only at a part of an answer."""
    correct: Annotated[float, Field(ge=1)] | None = 2.0
    """Largest weight of a token that corrects the rounding between drawing and learning; null: no
    correction."""
    cut: Literal["grade", "drop"] = "grade"
    """Answers that reach max_new_tokens: graded as they are, or left out of the step."""
    held_out_samples: Positive = 4
    """Answers drawn to each held-out prompt before and after, with the same random numbers."""
    passes: float = 1.0
    """Least reward of an answer that counts as right in pass@1 and pass@k."""
    keep_answers: Annotated[int, Field(ge=0)] | None = 100
    """Newest steps whose answers are kept, with reward and advantage, in the run's
    folder: rollouts/step-N.jsonl; null: all."""
    streams: Positive | Auto = "auto"
    """Most answers decoded together. auto: all that are drawn at once, at most 128, on a card 256.
    Another number changes rounding."""

    @field_validator("temperature")
    @classmethod
    def _has_spread(cls, value: float) -> float:
        if value < LEAST_TEMPERATURE:
            raise ValueError(
                f"reinforce.temperature: {value:g}: answers that are nearly greedy have no spread to learn from. Use "
                f"{LEAST_TEMPERATURE} or more; 1 is usual"
            )
        return value
