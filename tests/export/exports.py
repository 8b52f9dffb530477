"""Finished runs to export, made once, and the proof without the cost of a new process."""

import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers

from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_run import chats, tiny_recipe
from tiny_tasks import rows_of, task_recipe, word_tokenizer
from tunesmith.export import verify
from tunesmith.export.export_run import TARGETS
from tunesmith.export.gguf_tokenizer import QWEN2_SPLIT
from tunesmith.inference.load import make_renderer, run_labels
from tunesmith.methods import METHODS
from tunesmith.methods.lora import LoraAttachment
from tunesmith.models import load
from tunesmith.models.load import model_kind
from tunesmith.models.resolve_model import resolve_model
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train

LORA = {"name": "lora", "rank": 4, "alpha": 8}
SHORT: dict[str, Any] = {
    "train": {"max_steps": 3},
    "evaluation": {"samples": 1, "sample_tokens": 2, "surprising": 0},
    "checkpoint": {"every": 9},
}
RESOLVED: dict[str, Any] = {"data": {"max_tokens": 64, "too_long": "error"}}
LABELS: dict[str, dict[str, Any]] = {
    "classify": {"labels": ["fruit", "place"], "label_kind": "one"},
    "tag": {"labels": ["O", "B-PER", "B-LOC"]},
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "gemma2": {"attn_logit_softcapping": 20.0},
    "gemma3_text": {"sliding_window_pattern": 6},
    "mistral": {"sliding_window": None},
}
"""Settings of tiny models that llama.cpp computes too."""
SENTENCEPIECE = ("mistral", "gemma2", "gemma3_text", "phi3")


_FOLDERS: list[TemporaryDirectory[str]] = []
"""Removed when the tests end."""


def _folder() -> Path:
    _FOLDERS.append(TemporaryDirectory(prefix="export-"))
    return Path(_FOLDERS[-1].name)


@lru_cache
def finished(name: str) -> Run:
    """`chat`: a run of three steps. Others, `full` and `<task>-<kind>`: the result alone, drawn at random."""
    folder = _folder()
    if name == "chat":
        return train(tiny_recipe(folder, **SHORT), root=folder, out=folder / name, offline=True)
    task, kind = ("chat", "causal") if name == "full" else name.split("-")
    data = {**RESOLVED["data"], **LABELS.get(task, {})}
    method: Any = "full" if name == "full" else LORA
    return as_if_tuned(task_recipe(folder, task, kind, rows=8, method=method, data=data), folder / name)


@lru_cache
def of_architecture(arch: str, *, hidden: int = 64) -> Run:
    """A chat model of this architecture, tuned, with the kind of tokenizer that such models have."""
    folder = _folder()
    tokenizer = tiny_tokenizer(metaspace=arch in SENTENCEPIECE)
    if arch.startswith("qwen"):
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tiny_model(arch, vocab_size=len(tokenizer), hidden=hidden, **SHAPES.get(arch, {})).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return as_if_tuned(chat_recipe(folder), folder / arch)


@lru_cache
def of_encoder(arch: str) -> Run:
    """A classifier on an encoder of this architecture."""
    folder = _folder()
    tokenizer = word_tokenizer()
    tiny_model(arch, vocab_size=len(tokenizer), head="masked_token", hidden=64).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = "".join(json.dumps(row) + "\n" for row in rows_of("classify", 6))
    (folder / "rows.jsonl").write_text(rows)
    data = {"train": [str(folder / "rows.jsonl")], **RESOLVED["data"], **LABELS["classify"]}
    whole = {"model": str(folder / "model"), "task": "classify", "method": LORA, "data": data, "train": {}}
    recipe = validate({**whole, "threads": 1, "precision": "float32", "device": "cpu"})
    return as_if_tuned(recipe, folder / arch)


def chat_recipe(folder: Path, **sections: Any) -> Recipe:
    """Of the model in `folder`."""
    data = {"train": [str(chats(folder / "chats.jsonl", 6))], **RESOLVED["data"], "max_tokens": 256}
    whole = {"model": str(folder / "model"), "task": "chat", "method": LORA, "data": data, "train": {}, "threads": 1}
    return validate({**whole, "precision": "float32", "device": "cpu", **sections})


def as_if_tuned(recipe: Recipe, out: Path) -> Run:
    """A run folder with a result: every B of its adapter, and its head, is drawn instead of learnt."""
    run = Run.create(out.parent, out.name, as_yaml(recipe, comments=False), out=out)
    located = resolve_model(recipe.model, offline=True)
    kind = model_kind(located)
    tokenizer = load.load_tokenizer(located, None)
    model = load.load_model(
        located,
        dtype=torch.float32,
        device="cpu",
        head=find_head(recipe.task, located, kind),
        labels=run_labels(recipe.task, recipe.data),
        tokenizer=tokenizer,
    )
    method = METHODS[recipe.method.name]
    attachment = method.attach(model, recipe.method, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        if isinstance(attachment, LoraAttachment):
            for name in attachment.layers:
                attachment.matrices(name)[1].normal_(0.0, 0.1)
            for name in attachment.whole.head:
                attachment.trained[name].normal_(0.0, 0.1)
        attachment.publish()
    folder = run.model_path if recipe.method.name == "full" else run.adapter_path
    renderer = make_renderer(recipe, tokenizer, kind)
    method.save_result(attachment, folder, model=model, renderer=renderer, located=located)
    return run


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's other process is this one."""
    monkeypatch.setattr(verify, "launch", lambda job, tick, **how: verify.do_job(job, TARGETS))


def card_head(folder: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data
