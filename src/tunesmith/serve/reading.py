"""Models that read: classes, numbers and tags of texts as `tunesmith predict` gives them, and vectors of texts."""

# B texts, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.sampler import make_micro_batches
from tunesmith.inference.load import LoadedModel
from tunesmith.inference.predict import Predictor
from tunesmith.inference.rows import Line
from tunesmith.models.modes import eval_mode
from tunesmith.models.pooling import Pooling, pool
from tunesmith.serve.protocol import Refused, Served
from tunesmith.tasks import TASKS
from tunesmith.types import Example, Part, Problem, Source


@dataclass(frozen=True)
class Labeller:
    """A model whose head answers with classes, a number, or a tag a word."""

    served: Served
    speaker: LoadedModel

    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[Line]:
        """A line a text. Raises Refused for the first text that cannot be answered."""
        predictor = Predictor(self.speaker)
        asked = [_example(self.served.task, text, i) for i, text in enumerate(texts)]
        lines = []
        for line in predictor(asked, lambda num: None, lambda problem: None):
            if isinstance(line, Problem):
                status = "context_length_exceeded" if line.code == "too_long" else "invalid_value"
                raise Refused(f"input[{line.source.line - 1}]: {line.message}", status=400, code=status, param="input")
            lines.append(line)
        return lines


def _example(task: str, text: str | tuple[str, str], index: int) -> Example:
    source = Source("input", index + 1)
    if TASKS[task].by_word:
        if not isinstance(text, str):
            raise Refused("a model that tags words takes one text, not a pair", status=400, code="invalid_value")
        return Example(tuple(Part("word", word, False) for word in text.split()), source, "tokens_tags")
    texts = (text,) if isinstance(text, str) else text
    names = ("text", "text_pair")
    return Example(tuple(Part(n, t, False) for n, t in zip(names, texts, strict=False)), source, "text_label")


@dataclass(frozen=True)
class Embedder:
    """An encoder without a head: what it makes of a text's tokens, pooled as its files say."""

    served: Served
    speaker: LoadedModel
    pooling: Pooling

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """A vector a text, and how many tokens were read. Raises Refused for a text that is empty or too long."""
        rows = [self._ids(text, i) for i, text in enumerate(texts)]
        vectors: dict[int, list[float]] = {}
        lengths = [len(row) for row in rows]
        with eval_mode(self.speaker.model):
            for members in make_micro_batches(
                range(len(rows)), lengths, tokens_per_pass=self.speaker.tokens_per_pass(lengths), layout="padded"
            ):
                vectors |= zip(members, self._vectors([rows[i] for i in members]), strict=True)
        return [vectors[i] for i in range(len(rows))], sum(lengths)

    def _ids(self, text: str, index: int) -> list[int]:
        ids = self.speaker.renderer.tokenizer(text).input_ids
        most = self.served.max_tokens
        if not text.strip():
            raise Refused(f"input[{index}] is empty", status=400, code="invalid_value", param="input")
        if len(ids) > most:
            raise Refused(
                f"input[{index}] has {len(ids):,} tokens, at most {most:,} are read: shorten it",
                status=400, code="context_length_exceeded", param="input",
            )  # fmt: skip
        return list(ids)

    def _vectors(self, rows: Sequence[list[int]]) -> Iterator[list[float]]:
        longest = max(map(len, rows))
        ids_BT = torch.full((len(rows), longest), self.speaker.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for b, row in enumerate(rows):
            ids_BT[b, : len(row)] = torch.tensor(row)
            mask_BT[b, : len(row)] = 1
        base: Any = self.speaker.model.base_model
        device = self.speaker.model.device
        mask_BT = mask_BT.to(device)
        hidden_BTD: Tensor = base(input_ids=ids_BT.to(device), attention_mask=mask_BT).last_hidden_state.float()
        pooled_BD = pool(hidden_BTD, mask_BT, self.pooling.kind)
        if self.pooling.normalizes:
            pooled_BD = torch.nn.functional.normalize(pooled_BD, dim=-1)
        yield from pooled_BD.tolist()
