"""A run small enough for a test: a two-layer model, a dozen chats, a recipe."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.errors import Stopped
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run, runs
from tunesmith.training.trainer import Listener, train
from tunesmith.types import Event

WORDS = ("the quick brown fox jumps over a lazy dog what is tallest mountain", "on Earth yes please hello")


_KEPT = TemporaryDirectory(prefix="tiny-models-")
"""Removed when the tests end."""


def copied(path: Path, name: str, make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]]) -> Path:
    """A model and its tokenizer as a person would have them on disk: made once for each `name`, then copied."""
    kept = Path(_KEPT.name) / name
    if not kept.exists():
        for one in make():
            one.save_pretrained(kept)
    torch.manual_seed(0)  # so that what is drawn next does not depend on who made it
    shutil.copytree(kept, path, copy_function=shutil.copy, dirs_exist_ok=True)
    return path


def model_folder(path: Path, arch: str = "llama", *, dropout: float = 0.0, seed: int = 0) -> Path:
    def make() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        tokenizer = tiny_tokenizer()
        return tiny_model(arch, vocab_size=len(tokenizer), dropout=dropout, seed=seed), tokenizer

    return copied(path, f"{arch}-{dropout}-{seed}", make)


def chats(path: Path, num: int, *, seed: int = 0) -> Path:
    """`num` different conversations of one or two turns and mixed lengths."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(" ".join(WORDS).split(), k=draw.randint(1, 12)))

    rows = []
    for _ in range(num):
        turns = [[("user", text()), ("assistant", text())] for _ in range(draw.randint(1, 2))]
        rows.append({"messages": [{"role": role, "content": said} for turn in turns for role, said in turn]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, *, arch: str = "llama", rows: int = 18, dropout: float = 0.0, **sections: Any) -> Recipe:
    """A recipe over files made in `folder`: 18 rows, 3 rows a step in one pass, two epochs unless `sections` differ."""
    model = model_folder(folder / f"model-{arch}", arch, dropout=dropout)
    data: dict[str, Any] = {
        "model": str(model),
        "method": {"name": "lora", "rank": 4, "alpha": 8, "dropout": dropout},
        "data": {"train": [str(chats(folder / "chats.jsonl", rows))], "held_out": 0.11},
        "optim": {"lr": 1e-2},
        "train": {"epochs": 2, "rows_per_step": 3, "tokens_per_pass": 256},
        "evaluation": {"samples": 2, "sample_tokens": 4, "general": False},
        "checkpoint": {"every": 2},
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return validate(data)


def logits_of(speaker: Any) -> torch.Tensor:
    """[1, 20, V] of a loaded model for the first twenty tokens."""
    with torch.no_grad():
        logits: torch.Tensor = speaker.model(torch.arange(20)[None]).logits
    return logits


TOLD_AGAIN = {"resume", "stopped", "note", "failed", "checkpoint"}
"""Events of a run's own history, not of what it computed."""


def values_of(events: Any) -> list[tuple[str, int, Any]]:
    """What must repeat bit for bit: kind, step and values of every event that tells of the computation."""
    kept: list[Event] = [event for event in events if event.kind not in TOLD_AGAIN]
    return [(event.kind, event.step, _without_times(event)) for event in kept]


def _without_times(event: Event) -> Any:
    if event.kind == "end":
        differ = {"name", "seconds", "tokens_per_second", "peak_memory_bytes"}
        return {key: value for key, value in event.values["report"].items() if key not in differ}
    if event.kind == "plan":  # a repeated run starts from a recipe in which nothing is left to choose
        return {key: value for key, value in event.values.items() if key not in ("choices", "given", "unusual")}
    return event.values


def last_tensors(run: Run) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run.checkpoints_path, lambda path, why: None)
    return {**newest.weights, **{f"optimizer/{name}": tensor for name, tensor in newest.optimizer.items()}}


def same_to_rounding(run: Run, reference: Run, *, exact: Sequence[str], near: Sequence[str]) -> None:
    """The `exact` values of every step and evaluation are equal, the `near` ones to 1e-5."""
    ours, theirs = ([e for e in each.events() if e.kind in ("step", "evaluation")] for each in (run, reference))
    assert [event.step for event in ours] == [event.step for event in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in exact:
            assert mine.values.get(key) == other.values.get(key), (mine.step, key)
        for key in near:
            assert mine.values.get(key) == pytest.approx(other.values.get(key), abs=1e-5), (mine.step, key)


def same_run(run: Run, reference: Run) -> None:
    """Weights, optimizer state, result and every event value: bit for bit, no tolerance."""
    ours, theirs = last_tensors(run), last_tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    result = "adapter/adapter_model.safetensors"
    if (reference.path / result).exists():
        ours, theirs = load_file(run.path / result), load_file(reference.path / result)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert values_of(run.events()) == values_of(reference.events())


def stopped(recipe: Recipe, root: Path, at: int) -> Run:
    """The only run in `root`, stopped after a step."""
    with pytest.raises(Stopped):
        train(recipe, root=root, listener=stop_at(at))
    (run,) = runs(root)
    return run


def stop_at(step: int) -> Listener:
    seen = {"step": 0}

    def on_event(event) -> None:
        if event.kind == "step":
            seen["step"] = event.step

    return Listener(on_event=on_event, should_stop=lambda: seen["step"] >= step)
