"""Chat: the assistant's turns of a conversation, rendered by the tokenizer's own template."""

from __future__ import annotations

from tunesmith.tasks._causal import next_token_loss_sum, next_token_measure, num_targets
from tunesmith.types import Task

CHAT = Task(
    name="chat",
    doc="Answers of the assistant in a conversation, in the model's own chat template.",
    shapes=("messages", "sharegpt", "alpaca", "prompt_completion"),
    loss_sum=next_token_loss_sum,
    measure=next_token_measure,
    count=num_targets,
)
