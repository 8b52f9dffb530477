"""Tasks that learn the tokens of a text (chat, generate, text, summarize), or its labels (classify, tag)."""

from __future__ import annotations

from tunesmith.tasks.losses import sequence_losses, token_losses, word_losses
from tunesmith.tasks.task import LabelHead, Task
from tunesmith.types import JsonObject


def _conversation(text: str, answer: str | None = None) -> JsonObject:
    answers = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": [{"role": "user", "content": text}, *answers]}


def _tagged(text: str, answer: str | None = None) -> JsonObject:
    words = text.split()
    return {"tokens": words} | ({} if answer is None else {"tags": [answer] * len(words)})


CHAT = Task(
    name="chat",
    doc="Answers of the assistant in a conversation, in the model's own chat template.",
    purpose="chat",
    shapes=("messages", "sharegpt", "alpaca", "prompt_completion"),
    heads={"causal": "next_token"},
    losses=token_losses,
    encoder="tunesmith.data.chat:ChatEncoder",
    sees_rows=True,
    record=_conversation,
    is_chat=True,
    shows_images=True,
    writes_answers=True,
    answer_key="answer",
    headline_metrics=("perplexity", "token_accuracy", "rougeL"),
    next_commands=(("chat", "--compare"), ("serve",), ("show",)),
)
GENERATE = Task(
    name="generate",
    doc="The completion of a prompt, plain text, followed by the end token.",
    purpose="answer prompts",
    shapes=("prompt_completion",),
    heads={"causal": "next_token", "encoder_decoder": "next_token"},
    losses=token_losses,
    encoder="tunesmith.data.completion:completion_encoder",
    sees_rows=True,
    record=lambda text, answer=None: {"prompt": text} | ({} if answer is None else {"completion": f" {answer}"}),
    raw_text=True,
    writes_answers=True,
    answer_key="completion",
    headline_metrics=("perplexity", "token_accuracy", "rougeL"),
    next_commands=(("chat", "--compare"), ("serve",), ("show",)),
)
TEXT = Task(
    name="text",
    doc="Every token of plain documents; for an encoder, masked tokens.",
    purpose="continue texts",
    shapes=("text",),
    heads={"causal": "next_token", "encoder": "masked_token"},
    losses=token_losses,
    encoder="tunesmith.data.documents:DocumentEncoder",
    sees_rows=True,
    record=lambda text, answer=None: {"text": text if answer is None else f"{text} {answer}"},
    raw_text=True,
    in_windows=True,
    answer_key="continuation",
    detected="rows are plain text, learnt as it is",
    headline_metrics=("perplexity", "bits_per_byte", "token_accuracy"),
    next_commands=(("eval", "FILE"), ("export", "--to", "merged"), ("show",)),
)
SUMMARIZE = Task(
    name="summarize",
    doc="The summary of a document.",
    purpose="summarize texts",
    shapes=("document_summary",),
    heads={"causal": "next_token", "encoder_decoder": "next_token"},
    losses=token_losses,
    encoder="tunesmith.data.completion:summary_encoder",
    sees_rows=True,
    record=lambda text, answer=None: {"document": text} | ({} if answer is None else {"summary": answer}),
    has_prompt=True,
    writes_answers=True,
    input_role="document",
    answer_key="summary",
    detected="rows are documents and their summaries",
    on_overlong=("cut", "the end of a document is cut, never its summary; cut rows are counted"),
    headline_metrics=("rougeL", "rouge1", "perplexity"),
    next_commands=(("predict", "FILE"), ("eval", "FILE"), ("show",)),
)
CLASSIFY = Task(
    name="classify",
    doc="Classes of a text or of a pair of texts, or a number for it.",
    purpose="classify texts",
    shapes=("text_label",),
    heads={"encoder": "sequence", "causal": "sequence"},
    losses=sequence_losses,
    encoder="tunesmith.data.classification:ClassificationEncoder",
    sees_rows=True,
    record=lambda text, answer=None: {"text": text} | ({} if answer is None else {"label": answer}),
    head=LabelHead(takes_pairs=True),
    detected="rows are texts and their labels",
    on_overlong=("cut", "the beginning of a text shows its class; cut rows are counted"),
    headline_metrics=("accuracy", "macro_f1", "micro_f1", "exact_rows", "spearman", "mse", "calibration_error"),
    next_commands=(("predict", "FILE"), ("serve",), ("show",)),
)
TAG = Task(
    name="tag",
    doc="A tag for each word, read at the word's first token.",
    purpose="tag words",
    shapes=("tokens_tags",),
    heads={"encoder": "tokens", "causal": "tokens"},
    losses=word_losses,
    encoder="tunesmith.data.classification:TaggingEncoder",
    sees_rows=True,
    record=_tagged,
    head=LabelHead(by_word=True),
    detected="rows are words and their tags",
    on_overlong=("cut", "the beginning of a text shows its class; cut rows are counted"),
    headline_metrics=("span_f1", "span_recall", "tag_accuracy"),
    next_commands=(("predict", "FILE"), ("serve",), ("show",)),
)
