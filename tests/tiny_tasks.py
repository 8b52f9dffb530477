"""Models of every kind with their tokenizers, and rows of every task, small enough for a test."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tiny_run import copied, model_folder
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.training.trainer import train

WORDS = (
    "red", "green", "blue", "apple", "pear", "plum", "eats", "sells", "takes", "the", "a", "big", "small", "old",
    "Ada", "Bob", "Cleo", "in", "Rome", "Oslo", "Lima",
)  # fmt: skip
"""The words of every row here."""
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with BERT's marks around a text and between two."""
    vocabulary = {word: i for i, word in enumerate([*MARKS, *WORDS, "summarize", ":", "."])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    return _with_marks(backend, vocabulary)


def _with_marks(backend: Tokenizer, vocabulary: Mapping[str, int]) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write_pooling(folder: Path, settings: Mapping[str, Any]) -> None:
    """The files of sentence-transformers, with these settings of its module of pooling and lengths of 1."""
    modules = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in
               (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings), "utf-8")


def encoder_folder(path: Path, *, hidden: int = 32, dropout: float = 0.1) -> Path:
    """A BERT of two layers with a head for masked words."""

    def make() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        tokenizer = word_tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        torch.manual_seed(0)
        return BertForMaskedLM(config), tokenizer

    return copied(path, f"bert-{hidden}-{dropout}", make)


def encoder_decoder_folder(path: Path, *, hidden: int = 48, dropout: float = 0.0) -> Path:
    """A T5 of two layers on each side, whose tokenizer closes every text with </s>."""

    def make() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        tokenizer = closing_tokenizer()
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=hidden,
            d_kv=hidden // 4,
            d_ff=2 * hidden,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            dropout_rate=dropout,
        )
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config), tokenizer

    return copied(path, f"t5-{hidden}-{dropout}", make)


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and </s> behind every text."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS, "summarize", ":", "."])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def folder_of(kind: str, path: Path, *, dropout: float) -> Path:
    if kind == "encoder":
        return encoder_folder(path, dropout=dropout)
    return model_folder(path, dropout=dropout) if kind == "causal" else encoder_decoder_folder(path)


STEPS_ALONE: dict[str, Any] = {"evaluation": {"samples": 0, "surprising": 0}, "checkpoint": {"every": 1000}}
"""Of a run whose steps are looked at: no answers, and nothing is saved between them."""


def by_memory(folder: Path, recipe_of: Callable[..., Recipe], *sizes: int, **sections: Any) -> list[list[Any]]:
    """Loss, gradient norm and micro-batches of two steps of eight rows, for each number of tokens a micro-batch."""
    found = []
    for tokens in sizes:
        (folder / str(tokens)).mkdir(parents=True)
        how = {"train": {"rows_per_step": 8, "max_steps": 2, "tokens_per_pass": tokens}, **STEPS_ALONE, **sections}
        run = train(recipe_of(folder / str(tokens), **how), root=folder / "runs")
        steps = [event.values for event in run.events() if event.kind == "step"]
        found.append([(step["loss"], step["grad_norm"], step["passes"]) for step in steps])
    return found


def assert_alike(found: list[list[Any]]) -> None:
    for steps in found[1:]:
        for (loss, norm, _), (first, first_norm, _) in zip(steps, found[0], strict=True):
            assert loss == pytest.approx(first, rel=1e-5)
            assert norm == pytest.approx(first_norm, rel=1e-4)


def refuse_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded, as for a model that computes something else where they are packed."""
    refused = type("Refused", (), {"ok": False, "reason": "it is a test"})()
    monkeypatch.setattr("tunesmith.training.setup.packed_agrees", lambda *args, **kwargs: refused)


def sentence_transformers_python() -> Path:
    python = Path(__file__).parents[1] / ".peers" / "st" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with sentence-transformers: python -m benchmarks.environments .peers st")
    return python


def texts(num: int, *, seed: int = 0, most: int = 9) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, most))) for _ in range(num)]


def _preferences(said: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """The answer that begins with a fruit is the better one."""
    draw, rows = random.Random(seed), []
    for prompt, text in zip(said, texts(len(said), seed=seed + 1), strict=True):
        sides = {"chosen": f"{draw.choice(WORDS[3:6])} {text}", "rejected": f"{draw.choice(WORDS[-3:])} {text}"}
        answers = {key: [{"role": "assistant", "content": side}] for key, side in sides.items()}
        rows.append({"prompt": [{"role": "user", "content": prompt}], **answers})
    return rows


def rows_of(task: str, num: int, *, seed: int = 0) -> list[dict[str, Any]]:  # noqa: PLR0911
    """Rows from which a small model can learn the task in a few steps."""
    said = texts(num, seed=seed)
    if task == "chat":
        return [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}]} for t in said]
    if task == "generate":
        return [{"prompt": f"{text} :", "completion": f" {text.split()[0]}"} for text in said]
    if task == "text":  # each word follows the one before it in WORDS
        starts = [WORDS.index(text.split()[0]) for text in said]
        return [{"text": " ".join((WORDS * 2)[start : start + 8])} for start in starts]
    if task == "summarize":
        return [{"document": text, "summary": " ".join(text.split()[:2])} for text in said]
    if task == "tag":
        return [{"tokens": text.split(), "tags": [tag_of(word) for word in text.split()]} for text in said]
    if task in ("prefer", "reward"):
        return _preferences(said, seed)
    if task == "rank":
        return [{"query": text, "documents": ["apple pear", "Rome Oslo"], "labels": [1, 0]} for text in said]
    if task == "embed":
        return [{"anchor": text, "positive": f"the {' '.join(sorted(text.split()))}"} for text in said]
    fruit, places = ("apple", "pear", "plum"), ("Rome", "Oslo", "Lima")
    draw = random.Random(seed)
    classes = ["fruit" if i % 2 else "place" for i in range(num)]
    words = [draw.choice(fruit if name == "fruit" else places) for name in classes]
    return [
        {"text": f"{draw.choice(WORDS[:3])} {word}", "label": name} for word, name in zip(words, classes, strict=True)
    ]


def tag_of(word: str) -> str:
    return {"Ada": "B-PER", "Bob": "B-PER", "Cleo": "B-PER", "Rome": "B-LOC", "Oslo": "B-LOC", "Lima": "B-LOC"}.get(
        word, "O"
    )


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_recipe(
    folder: Path, task: str, kind: str, *, rows: int = 24, method: Any = "full", dropout: float = 0.1, **sections: Any
) -> Recipe:
    """A recipe for a task on a model of some kind, over rows written into `folder`; a step is one pass."""
    data: dict[str, Any] = {
        "model": str(folder_of(kind, folder / f"model-{kind}", dropout=dropout)),
        "task": task,
        "method": method,
        "data": {
            "train": [str(write(folder / f"{task}.jsonl", rows_of(task, rows)))],
            "eval": [str(write(folder / f"{task}-held.jsonl", rows_of(task, 8, seed=7)))],
        },
        "optim": {"lr": 3e-3},
        "train": {"epochs": 2, "rows_per_step": 4, "tokens_per_pass": 512},
        "evaluation": {"samples": 2, "sample_tokens": 4, "general": False},
        "checkpoint": {"every": 3},
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return validate(data)
