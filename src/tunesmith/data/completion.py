"""Prompt and completion as plain text to ids and trained flags, and documents with their summaries; for causal
and for encoder–decoder models."""

# T tokens, P tokens of the prompt, S tokens of the source

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.chat import ChatEncoder
from tunesmith.data.drafts import Draft, Drafts
from tunesmith.data.renderer import EncoderSettings, LengthLimit, OnCut, RowEncoder, Tools
from tunesmith.data.tokenizer import ControlTokens, FastTokenizer
from tunesmith.errors import ModelError, RecipeError
from tunesmith.types import Example, ModelKind, Part, Problem

PLACEHOLDER = "{document}"
"""Replaced by the document in a prompt."""
DEFAULT_PROMPTS: Mapping[ModelKind, str] = {
    "causal": f"Summarize the following text.\n\n{PLACEHOLDER}",
    "encoder_decoder": f"summarize: {PLACEHOLDER}",
}
"""Prompts for `data.prompt: null`, by the kind of model."""


def _eos_of(fast: FastTokenizer) -> int:
    """Raises `ModelError` for a tokenizer without EOS."""
    if fast.eos_id is None:
        raise ModelError(
            f"{fast.name}: its tokenizer has no EOS token: the tuned model would never stop. "
            "Name one as eos_token in its tokenizer_config.json."
        )
    return fast.eos_id


class CompletionEncoder(RowEncoder):
    """Tokenizes a prompt as serving does, and its completion, closed by EOS.

    Raises `ModelError` for a tokenizer without EOS, or one that writes anything behind a text.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._fast = fast = settings.fast
        self._limit = settings.limit
        self._eos_id = _eos_of(fast)
        self.control = ControlTokens(settings.tokenizer, "")
        self.stop_ids = (self._eos_id,)
        alone = fast.ids(["a"], add_special_tokens=True)[0]
        if self.control.are_reserved(alone[-1:]).any():
            raise ModelError(
                f"{fast.name}: its tokenizer writes a control token behind every text, so no prompt can be "
                "continued. Set add_eos_token to false in its tokenizer_config.json."
            )

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        pairs = [pair_of(example) for example in examples]
        good = [pair for pair in pairs if not isinstance(pair, Problem)]
        prompts = iter(self._fast.ids([prompt for prompt, _ in good], add_special_tokens=True))
        wholes = iter(self._fast.ids([prompt + completion for prompt, completion in good], add_special_tokens=True))
        return [
            pair if isinstance(pair, Problem) else self._draft(example, pair, next(prompts), next(wholes))
            for example, pair in zip(examples, pairs, strict=True)
        ]

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The tokenizer's ids of the text, BOS included if it adds one. `tools` have no meaning."""
        text = "".join(part.text for part in parts)
        return [int(token_id) for token_id in self._fast.ids([text], add_special_tokens=True)[0]]

    def _draft(
        self, example: Example, pair: tuple[str, str], prompt_P: NDArray[np.int32], whole_T: NDArray[np.int32]
    ) -> Drafts:
        num_prompt = len(prompt_P)
        if not np.array_equal(whole_T[:num_prompt], prompt_P):
            # The last token of the prompt would join the completion: keep the prompt as it is served.
            apart = np.concatenate([prompt_P, self._fast.ids([pair[1]])[0]])
            if self._fast.decode(apart) != self._fast.decode(whole_T):
                message = "the prompt's last token joins the start of the completion, and apart they give another text."
                fix = "Move the white space between them to the start of the completion."
                return Problem(example.source, "token_boundary", message, fix)
            whole_T = apart
        if not len(whole_T) or whole_T[-1] != self._eos_id:
            whole_T = np.append(whole_T, np.int32(self._eos_id))
        return self._limit.fit(example.source, Draft(whole_T, np.arange(len(whole_T)) >= num_prompt))


class Seq2SeqEncoder(RowEncoder):
    """Source for the encoder and target for the decoder, closed by EOS. `prompt`: the text around a document.

    Each side may be as long as the room; only the source is ever cut, at its end. Raises `ModelError` for a
    tokenizer without EOS, `RecipeError` for a limit without place for a token.
    """

    def __init__(self, settings: EncoderSettings, prompt: str = PLACEHOLDER) -> None:
        self._fast = fast = settings.fast
        self._limit = limit = settings.limit
        self._eos_id = _eos_of(fast)
        self._prompt = prompt
        self._frame = fast.frame(1)
        if limit.max_tokens is not None and limit.max_tokens <= self._frame.num_added():
            raise RecipeError(f"data.max_tokens: {limit.max_tokens} leaves a text no token. Raise it.")
        self.control = ControlTokens(settings.tokenizer, "")
        self.stop_ids = (self._eos_id,)

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        pairs = [pair_of(example) for example in examples]
        good = [pair for pair in pairs if not isinstance(pair, Problem)]
        sources = iter(self._fast.ids([self._prompt.replace(PLACEHOLDER, text) for text, _ in good]))
        targets = iter(self._fast.ids([text for _, text in good]))
        return [
            pair if isinstance(pair, Problem) else self._draft(example, next(sources), next(targets))
            for example, pair in zip(examples, pairs, strict=True)
        ]

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids for the encoder, cut as in training. `tools` and `max_tokens` have no meaning."""
        text_T = self._fast.ids([self._prompt.replace(PLACEHOLDER, "".join(part.text for part in parts))])[0]
        source_S = self._source(text_T)
        if cut := len(text_T) + self._frame.num_added() - len(source_S):
            on_cut(cut)
        return [int(token_id) for token_id in source_S]

    def _source(self, text_T: NDArray[np.int32]) -> NDArray[np.int32]:
        excess = self._limit.excess(len(text_T) + self._frame.num_added()) if self._limit.too_long == "cut" else 0
        return self._frame.around(text_T[: len(text_T) - excess])

    def _draft(self, example: Example, text_T: NDArray[np.int32], target_T: NDArray[np.int32]) -> Drafts:
        source_S = self._source(text_T)
        target_T = self._frame.around(target_T)
        if target_T[-1:].tolist() != [self._eos_id]:
            target_T = np.append(target_T, np.int32(self._eos_id))
        if not len(source_S):
            return Problem(example.source, "empty", "its prompt gives no token.", "Give it one, or remove the row.")
        for side, ids_T in (("prompt", source_S), ("answer", target_T)):
            if self._limit.excess(len(ids_T)):
                return self._limit.refusal(example.source, f"the {len(ids_T)} tokens of its {side}")
        ids_T = np.concatenate([source_S, target_T])
        draft = Draft(ids_T, np.arange(len(ids_T)) >= len(source_S))
        cut = len(text_T) + self._frame.num_added() - len(source_S)
        if cut:
            what = f"the {len(text_T) + self._frame.num_added()} tokens of its prompt"
            draft.warnings.append(self._limit.cut_warning(example.source, what, cost=f"the last {cut} were cut off"))
        return [draft]


def pair_of(example: Example) -> tuple[str, str] | Problem:
    """The prompt and the completion of an example that is plain text."""
    if not example.plain:
        message = "it is a conversation; generate takes a prompt and a completion, both plain text."
        return Problem(example.source, "not_a_pair", message, "Use task: chat for conversations.")
    trained = [part.trained for part in example.parts]
    if not trained or any(trained[:-1]) or not trained[-1]:
        message = f"{sum(trained)} of its {len(trained)} parts are trained; generate takes a prompt and one completion."
        return Problem(example.source, "not_a_pair", message, "Use task: chat for conversations.")
    return "".join(part.text for part in example.parts[:-1]), example.parts[-1].text


def completion_encoder(settings: EncoderSettings) -> RowEncoder:
    """The encoder of task generate."""
    return (Seq2SeqEncoder if settings.kind == "encoder_decoder" else CompletionEncoder)(settings)


class SummarizationEncoder(RowEncoder):
    """One question, the prompt with the document in it, and one answer, the summary.

    With a chat template two messages; without, plain text, in which two line breaks part a prompt that ends
    with the document from the summary. A row that is too long loses the end of its document.
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
        return document[: min(int(starts_T[-excess]), len(document) - 1)]  # shorter, whatever the places say

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
