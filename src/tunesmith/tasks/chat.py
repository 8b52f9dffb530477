"""Chat: the assistant's turns of a conversation, rendered by the tokenizer's own template."""

from __future__ import annotations

from tunesmith.tasks._tokens import token_loss_sum, token_measure
from tunesmith.types import Task

CHAT = Task(
    name="chat",
    doc="Answers of the assistant in a conversation, in the model's own chat template.",
    shapes=("messages", "sharegpt", "alpaca", "prompt_completion"),
    heads={"causal": "next_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
)
