"""Models that read: classes, numbers and tags of texts as `tunesmith predict` gives them, and vectors of texts."""

# B texts, T tokens, D hidden size

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.asking import Refused, Served
from tunesmith.data.batch import fill_passes
from tunesmith.errors import ModelError
from tunesmith.loading import Speaker
from tunesmith.models.modes import evaluating
from tunesmith.predicting.lines import Line
from tunesmith.predicting.predictor import Predictor
from tunesmith.types import Example, Part, Problem, Source

Pooling = Literal["mean", "cls", "max"]
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
}  # fmt: skip
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Labeller:
    """A model whose head answers with classes, a number, or a tag a word."""

    served: Served
    speaker: Speaker

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
    if task == "tag":
        if not isinstance(text, str):
            raise Refused("a model that tags words takes one text, not a pair", status=400, code="invalid_value")
        return Example(tuple(Part("word", word, False) for word in text.split()), source, "tokens_tags")
    texts = (text,) if isinstance(text, str) else text
    names = ("text", "text_pair")
    return Example(tuple(Part(n, t, False) for n, t in zip(names, texts, strict=False)), source, "text_label")


@dataclass(frozen=True)
class Embedder:
    """An encoder without a head: what it makes of a text's tokens, pooled as its files say, by their mean if they do
    not (Reimers and Gurevych, "Sentence-BERT", arXiv 1908.10084, section 3)."""

    served: Served
    speaker: Speaker

    @cached_property
    def how(self) -> tuple[Pooling, bool, int]:
        """How tokens become one vector, whether it is brought to length 1, and the most tokens.

        Raises ModelError where the files of sentence-transformers ask for something else.
        """
        folder = self.speaker.located.path
        most = self.served.max_tokens
        if not (folder / "modules.json").is_file():
            return "mean", False, most
        modules = _json(folder / "modules.json")
        names = [str(module["type"]).rpartition(".")[2] for module in modules]
        if strange := [name for name in names if name not in _KNOWN_MODULES]:
            raise ModelError(f"{folder}: modules.json: {strange[0]}: only {', '.join(_KNOWN_MODULES)} can be served.")
        pooling: Pooling = "mean"
        if "Pooling" in names:
            config = _json(folder / modules[names.index("Pooling")]["path"] / "config.json")
            asked = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
            if len(asked) != 1 or asked[0] not in _POOLINGS:
                raise ModelError(
                    f"{folder}: {', '.join(asked) or 'no pooling'}: one of {', '.join(_POOLINGS)} is known."
                )
            pooling = _POOLINGS[asked[0]]
        limits = folder / "sentence_bert_config.json"
        if limits.is_file():
            most = min(most, _json(limits).get("max_seq_length") or most)
        return pooling, "Normalize" in names, most

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """A vector a text, and how many tokens were read. Raises Refused for a text that is empty or too long."""
        rows = [self._ids(text, i) for i, text in enumerate(texts)]
        vectors: dict[int, list[float]] = {}
        lengths = [len(row) for row in rows]
        with evaluating(self.speaker.model):
            for members in fill_passes(
                range(len(rows)), lengths, tokens_per_pass=self.speaker.tokens_per_pass, layout="padded"
            ):
                vectors |= zip(members, self._vectors([rows[i] for i in members]), strict=True)
        return [vectors[i] for i in range(len(rows))], sum(lengths)

    def _ids(self, text: str, index: int) -> list[int]:
        ids = self.speaker.renderer.tokenizer(text).input_ids
        most = self.how[2]
        if not text.strip():
            raise Refused(f"input[{index}] is empty", status=400, code="invalid_value", param="input")
        if len(ids) > most:
            raise Refused(
                f"input[{index}] has {len(ids):,} tokens, at most {most:,} are read: shorten it",
                status=400, code="context_length_exceeded", param="input",
            )  # fmt: skip
        return list(ids)

    def _vectors(self, rows: Sequence[list[int]]) -> Iterator[list[float]]:
        pooling, normalizes, _ = self.how
        longest = max(map(len, rows))
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for b, row in enumerate(rows):
            ids_BT[b, : len(row)] = torch.tensor(row)
            mask_BT[b, : len(row)] = 1
        base: Any = self.speaker.model.base_model
        device = self.speaker.model.device
        mask_BT = mask_BT.to(device)
        hidden_BTD: Tensor = base(input_ids=ids_BT.to(device), attention_mask=mask_BT).last_hidden_state.float()
        mask_BT1 = mask_BT[..., None].bool()
        if pooling == "cls":
            pooled_BD = hidden_BTD[:, 0]
        elif pooling == "max":
            pooled_BD = hidden_BTD.masked_fill(~mask_BT1, float("-inf")).amax(1)
        else:
            pooled_BD = hidden_BTD.masked_fill(~mask_BT1, 0.0).sum(1) / mask_BT1.sum(1)
        if normalizes:
            pooled_BD = torch.nn.functional.normalize(pooled_BD, dim=-1)
        yield from pooled_BD.tolist()


def _json(path: Any) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Download the model again.") from error
