"""Chat: the assistant's turns of a conversation, rendered by the tokenizer's own template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.tasks.losses import token_loss_sum, token_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.renderer import EncoderSettings, RowEncoder


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.chat import ChatEncoder

    return ChatEncoder(settings.tokenizer, settings.fast, settings.limit, settings.date)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    answers = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": [{"role": "user", "content": text}, *answers]}


CHAT = Task(
    name="chat",
    doc="Answers of the assistant in a conversation, in the model's own chat template.",
    shapes=("messages", "sharegpt", "alpaca", "prompt_completion"),
    heads={"causal": "next_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
    encoder=_encoder,
    record=_record,
    is_chat=True,
    writes_answers=True,
    answer_key="answer",
    headline_metrics=("perplexity", "token_accuracy", "rougeL"),
    next_commands=(("chat", "--compare"), ("show",)),
)
