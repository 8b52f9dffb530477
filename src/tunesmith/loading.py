"""A tuned model ready to answer: the result of a run, or what a run that has not ended knows so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith import checkpoint
from tunesmith.data.render import Renderer
from tunesmith.errors import RunError
from tunesmith.methods import METHODS, restore
from tunesmith.methods.lora import LoraAttachment, without_adapter
from tunesmith.models import load, locate
from tunesmith.models.locate import Located
from tunesmith.recipe.knobs import Recipe
from tunesmith.run import Run
from tunesmith.types import TaskName


@dataclass(frozen=True)
class Speaker:
    """A model and the renderer that puts questions to it as they were put in training."""

    model: PreTrainedModel
    renderer: Renderer
    attachment: Any = None
    """The adapter of a LoRA run."""
    note: str = ""
    """What a person should know before trusting an answer."""

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Inside the block the model answers without its adapter."""
        assert isinstance(self.attachment, LoraAttachment), "only an adapter can be looked past"
        with without_adapter(self.attachment):
            yield


def load_run(run: Run, *, offline: bool = False) -> Speaker:
    """The tuned model of a finished run; of an unfinished one, as of its newest checkpoint, which `note` says.

    Raises:
        ModelError: the base model is gone or cannot be read.
        RunError: the run is at work, or has neither a result nor a checkpoint.
    """
    recipe = run.recipe()
    if run.model_path.exists():
        return _speaker(locate.locate(str(run.model_path), offline=True), recipe)
    base = load_base(run, offline=offline)
    method = METHODS[recipe.method.name]
    if run.adapter_path.exists():
        return replace(base, attachment=method.load_result(base.model, run.adapter_path))
    # Reading checkpoints sets damaged ones aside: not under the hands of the process that writes them.
    with run.lock():
        newest = checkpoint.newest(run.checkpoints_path, lambda path, why: None)
    if newest is None:
        raise RunError(f"{run.path}: no result and no whole checkpoint: nothing to load. Go on: `tunesmith resume`.")
    attachment = method.attach(base.model, recipe.method, seed=recipe.seed)
    restore(attachment, newest.weights)
    return replace(base, attachment=attachment, note=f"not ended: these are the weights of step {newest.step}")


def load_base(run: Run, *, offline: bool = False) -> Speaker:
    """The untouched model of a run, asked as the tuned one is: with the tokenizer and template it was tuned with."""
    recipe = run.recipe()
    located = locate.locate(recipe.model, revision=recipe.revision, offline=offline)
    for folder in (run.adapter_path, run.model_path):
        if folder.exists():
            saved = Located("folder", folder, str(folder))
            return _speaker(located, recipe, tokenizer=load.load_tokenizer(saved, None))
    return _speaker(located, recipe, tokenizer=load.load_tokenizer(located, recipe.data.template))


def load_model(name: str, *, offline: bool = False) -> Speaker:
    """A model that was not tuned here, in the precision and on the device that a run would choose."""
    located = locate.locate(name, offline=offline)
    tokenizer = load.load_tokenizer(located, None)
    task: TaskName = "chat" if tokenizer.chat_template else "generate"
    return _speaker(located, Recipe(model=name, task=task), tokenizer=tokenizer)


def _speaker(located: Located, recipe: Recipe, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Speaker:
    device = load.choose_device(recipe.device).value
    precision = load.choose_precision(recipe.precision, device).value
    model = load.load_model(located, dtype=getattr(torch, precision), device=device)
    renderer = Renderer(
        tokenizer or load.load_tokenizer(located, None),
        "generate" if recipe.task == "generate" else "chat",
        max_tokens=None,
        too_long="error",
        control_tokens="allow",
    )
    return Speaker(model, renderer)
