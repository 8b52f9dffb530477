"""Documents and summaries for causal models, as a chat or as plain text; the summary is never cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tunesmith.data.chat import ChatEncoder
from tunesmith.data.completion import PLACEHOLDER, CompletionEncoder, Seq2SeqEncoder
from tunesmith.data.renderer import EncoderSettings, LengthLimit, OnCut, RowEncoder, Tools
from tunesmith.errors import RecipeError
from tunesmith.types import Drafts, Example, ModelKind, Part, Problem

DEFAULT_PROMPTS: Mapping[ModelKind, str] = {
    "causal": f"Summarize the following text.\n\n{PLACEHOLDER}",
    "encoder_decoder": f"summarize: {PLACEHOLDER}",
}
"""Prompts for `data.prompt: null`, by the kind of model."""


class SummarizationEncoder(RowEncoder):
    """One question, the prompt with the document in it, and one answer, the summary.

    With a chat template two messages; without, plain text, in which two line breaks part a prompt that ends with the
    document from the summary. A row that is too long loses the end of its document.
    """

    def __init__(self, settings: EncoderSettings, prompt: str) -> None:
        self._fast, self._limit = settings.fast, settings.limit
        self._is_chat = bool(settings.tokenizer.chat_template)
        unbounded = replace(settings, limit=LengthLimit(None, self._limit.too_long))
        self._inner = (ChatEncoder if self._is_chat else CompletionEncoder)(unbounded)
        self._prompt = prompt + ("\n\n" if prompt.endswith(PLACEHOLDER) and not self._is_chat else "")
        self.control = self._inner.control
        self.template_text = self._inner.template_text
        self.stop_ids = self._inner.stop_ids

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        documents = [example.parts[0].text for example in examples]
        results = self._answered(examples, documents)
        sizes = [_size(result) for result in results]
        while over := [i for i, result in enumerate(results) if self._limit.excess(_size(result))]:
            for i in over:
                documents[i] = self._shorter(documents[i], self._limit.excess(_size(results[i])))
            shown = self._answered([examples[i] for i in over], [documents[i] for i in over])
            for i, result in zip(over, shown, strict=True):
                results[i] = result if documents[i] else self._refusal(examples[i], sizes[i])
        for i, result in enumerate(results):
            if not isinstance(result, Problem) and sizes[i] > _size(result):
                chars = len(examples[i].parts[0].text) - len(documents[i])
                cost = f"the last {chars:,} characters of its document were cut off"
                what = f"its {sizes[i]} tokens"
                result[0].warnings.append(self._limit.cut_warning(examples[i].source, what, cost=cost))
        return results

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids of a document to be summarized; `data.too_long: cut` cuts its end down to `max_tokens`."""
        document = parts[0].text
        num_tokens = 0
        while True:
            ids = self._inner.prompt_ids([Part("user", self._question(document), False)], tools, None, on_cut)
            num_tokens = num_tokens or len(ids)
            excess = LengthLimit(max_tokens, self._limit.too_long).excess(len(ids))
            if not excess or not document or self._limit.too_long != "cut":
                if len(ids) < num_tokens:
                    on_cut(num_tokens - len(ids))
                return ids
            document = self._shorter(document, excess)

    def _answered(self, examples: Sequence[Example], documents: Sequence[str]) -> list[Drafts]:
        chats = []
        for example, document in zip(examples, documents, strict=True):
            summary = Part("assistant", example.parts[-1].text, True)
            parts = (Part("user", self._question(document), False), summary)
            chats.append(replace(example, parts=parts, plain=not self._is_chat))
        return self._inner.encode(chats)

    def _question(self, document: str) -> str:
        return self._prompt.replace(PLACEHOLDER, document)

    def _shorter(self, document: str, excess: int) -> str:
        """The document without its last tokens; empty where that is not enough, or no cut is to be made."""
        if self._limit.too_long != "cut":
            return ""
        starts_T = self._fast.encode([document])[0].starts_T
        if len(starts_T) <= excess:
            return ""
        return document[: min(int(starts_T[-excess]), len(document) - 1)]  # shorter, whatever a tokenizer's places say

    def _refusal(self, example: Example, num_tokens: int) -> Problem:
        if self._limit.too_long != "cut":
            return self._limit.refusal(example.source, f"its {num_tokens} tokens")
        fix = "Raise it, or shorten the prompt or the summary."
        return replace(self._limit.refusal(example.source, "the tokens of its prompt and summary alone"), fix=fix)


def _size(result: Drafts) -> int:
    return 0 if isinstance(result, Problem) else len(result[0].ids_T)


def summary_prompt(prompt: str | None, kind: ModelKind) -> str:
    """The prompt with a place for the document. Raises `RecipeError` for one without."""
    if prompt is not None and PLACEHOLDER not in prompt:
        raise RecipeError(f"data.prompt: {prompt[:60]!r} has no place for the document: write {PLACEHOLDER} there.")
    return DEFAULT_PROMPTS[kind] if prompt is None else prompt


def summary_encoder(settings: EncoderSettings) -> RowEncoder:
    """The encoder of task summarize. Raises `RecipeError` for a prompt without a place for the document."""
    prompt = summary_prompt(settings.prompt, settings.kind)
    return (Seq2SeqEncoder if settings.kind == "encoder_decoder" else SummarizationEncoder)(settings, prompt)
