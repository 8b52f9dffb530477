"""Generate: the completion of a prompt, as plain text without a template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.tasks.losses import token_loss_sum, token_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.renderer import EncoderSettings, RowEncoder


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.completion import CompletionEncoder, Seq2SeqEncoder

    return (
        Seq2SeqEncoder(settings.tokenizer, settings.fast, settings.limit, "")
        if settings.kind == "encoder_decoder"
        else CompletionEncoder(settings.tokenizer, settings.fast, settings.limit)
    )


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    return {"prompt": text} | ({} if answer is None else {"completion": f" {answer}"})


GENERATE = Task(
    name="generate",
    doc="The completion of a prompt, plain text, followed by the end token.",
    shapes=("prompt_completion",),
    heads={"causal": "next_token", "encoder_decoder": "next_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
    encoder=_encoder,
    record=_record,
    raw_text=True,
    writes_answers=True,
    answer_key="completion",
    headline_metrics=("perplexity", "token_accuracy", "rougeL"),
    next_commands=(("chat", "--compare"), ("show",)),
)
