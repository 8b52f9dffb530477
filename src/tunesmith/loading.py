"""A tuned model ready to answer: the result of a run, or what a run that has not ended knows so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tunesmith import checkpoint
from tunesmith.data.render import Renderer
from tunesmith.errors import RunError
from tunesmith.methods import METHODS, restore
from tunesmith.methods.lora import LoraAttachment, without_adapter
from tunesmith.models import load, locate
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
        RunError: the run has neither a result nor a checkpoint.
    """
    recipe = run.recipe()
    if recipe.method.name == "full" and run.model_path.exists():
        located = locate.locate(str(run.model_path), revision=None, offline=True)
        return Speaker(_load(located, recipe), _renderer(located, recipe))
    located = locate.locate(recipe.model, revision=recipe.revision, offline=offline)
    model = _load(located, recipe)
    renderer = _renderer(located, recipe)
    method = METHODS[recipe.method.name]
    if run.adapter_path.exists():
        return Speaker(model, renderer, method.load_result(model, run.adapter_path))
    newest = checkpoint.newest(run.checkpoints_path, lambda path, why: None)
    if newest is None:
        raise RunError(f"{run.path}: no result and no whole checkpoint: nothing to load. Go on: `tunesmith resume`.")
    attachment = method.attach(model, recipe.method, seed=recipe.seed)
    restore(attachment, newest.weights)
    return Speaker(model, renderer, attachment, f"this run has not ended: these are the weights of step {newest.step}")


def load_base(run: Run, *, offline: bool = False) -> Speaker:
    """The untouched model of a run, asked as the tuned one is."""
    recipe = run.recipe()
    located = locate.locate(recipe.model, revision=recipe.revision, offline=offline)
    return Speaker(_load(located, recipe), _renderer(located, recipe))


def load_model(name: str, *, offline: bool = False) -> Speaker:
    """A model that was not tuned here, in the precision and on the device that a run would choose."""
    located = locate.locate(name, revision=None, offline=offline)
    tokenizer = load.load_tokenizer(located, None)
    recipe = Recipe(model=name, task="chat" if tokenizer.chat_template else "generate")
    return Speaker(_load(located, recipe), _renderer(located, recipe))


def _load(located: locate.Located, recipe: Recipe) -> PreTrainedModel:
    device = load.choose_device(recipe.device).value
    precision = load.choose_precision(recipe.precision, device).value
    return load.load_model(located, dtype=getattr(torch, precision), device=device)


def _renderer(located: locate.Located, recipe: Recipe) -> Renderer:
    template = recipe.data.template if recipe.data.template and Path(recipe.data.template).exists() else None
    task: TaskName = "generate" if recipe.task == "generate" else "chat"
    tokenizer = load.load_tokenizer(located, template)
    return Renderer(tokenizer, task, max_tokens=None, too_long="error", control_tokens="allow")
