"""Models ready for use: the result of a run, the newest checkpoint of an unfinished run, or any model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.dataset import open_kept
from tunesmith.data.renderer import Renderer
from tunesmith.errors import InputError, ModelError, RecipeError, RunError
from tunesmith.generation.writer import AnswerWriter, cache_tokens
from tunesmith.methods import METHODS, attach, restore
from tunesmith.models import heads, machine
from tunesmith.models import load as files
from tunesmith.models.card import prepare_allocator
from tunesmith.models.load import model_kind, new_tokens_of
from tunesmith.models.resolve_model import ModelRef, resolve_base, resolve_model
from tunesmith.models.size import model_size
from tunesmith.models.special_tokens import add_tokens, pad_id, resize_embeddings, without_vector
from tunesmith.models.vision import vision_of
from tunesmith.phrases import command
from tunesmith.planning.decisions import Decisions
from tunesmith.planning.defaults import decide_before_rows, find_head, precision_for
from tunesmith.recipe.schema import Data, Recipe, resolved
from tunesmith.runs import checkpoint
from tunesmith.runs.atomic import sha256_file
from tunesmith.runs.background import in_background
from tunesmith.runs.folder import Run, is_run, no_such_run
from tunesmith.tasks import TASKS
from tunesmith.types import HeadName, LabelKind, Labels, ModelKind, Record, TaskName

TOKENS_TO_ANSWER = 100
"""Tokens of a micro-batch that answers or measures a few rows."""
AS_RUN: Mapping[str, str] = MappingProxyType({})
"""Device and precision as in the run."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and the renderer of its prompts, as they were in training."""

    model: PreTrainedModel
    renderer: Renderer
    recipe: Recipe
    """The recipe of its run, or the one that a run would resolve."""
    head: HeadName
    located: ModelRef
    labels: Labels | None = None
    """Classes of its head."""
    attachment: Any = None
    """The adapter that its method attached."""
    result: Path | None = None
    """Folder of the adapter."""
    note: str = ""
    """A note for the person who reads its answers."""
    packed: str = ""
    """Quantization of the base's weights by the method of its run; empty: none."""
    run: Run | None = None
    """The run whose result it is, or with `is_base` whose untouched base."""
    is_base: bool = False
    base_hashes: Mapping[str, str] | None = None
    """SHA-256 of the model's files, if they are known."""

    def read_by(self, options: Record) -> LoadedModel:
        """This model, with rows read by these options of `data` in place of its run's."""
        data = self.recipe.data.with_options(options)
        return replace(self, recipe=self.recipe.model_copy(update={"data": data}))

    @property
    def has_base(self) -> bool:
        """Whether the model without its adapter is the untouched base."""
        return self.attachment is not None and self.attachment.keeps_base

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Run the model without its adapter inside the block."""
        assert self.has_base, "only an adapter that keeps its base can be disabled"
        with self.attachment.adapter_disabled():
            yield

    @property
    def has_types(self) -> bool:
        """Whether the model marks the second text of a pair by token types."""
        return has_token_types(self.model, self.renderer.tokenizer)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text and its answer."""
        return model_size(self.located).max_tokens

    @property
    def pad_id(self) -> int:
        """The token that shorter rows are padded with."""
        return pad_id(self.model, self.renderer.tokenizer)

    def without_vector(self, token_ids: Iterable[int]) -> str:
        """See special_tokens."""
        return without_vector(self.model, self.renderer.tokenizer, token_ids)

    @property
    def tokens_per_pass(self) -> int:
        """Most tokens of a micro-batch."""
        limit = self.recipe.train.tokens_per_pass
        return limit if limit != "auto" else 8192 if self.model.device.type == "cuda" else 2048

    def writer(self, new_tokens: int) -> AnswerWriter:
        """Writes answers of at most `new_tokens` tokens."""
        per_pass = self.tokens_per_pass
        return AnswerWriter(self.model, self.renderer, new_tokens, per_pass, cache=cache_tokens(per_pass))

    def identity(self) -> dict[str, str]:
        """Hashes of model, adapter and settings, by name: with a prompt they determine an answer."""
        hashes = files.fingerprint(self.located) if self.base_hashes is None else self.base_hashes
        digests = {f"model {name}": digest for name, digest in hashes.items()}
        if self.result is not None:
            weights = [path for path in sorted(self.result.iterdir()) if path.is_file()]
            digests |= {f"{self.result.name} {path.name}": sha256_file(path) for path in weights}
        settings = {"task": self.recipe.task, "precision": self.recipe.precision, "renderer": self.renderer.fingerprint}
        if self.packed:
            settings["base"] = self.packed
        limits = {"max_tokens": self.recipe.data.max_tokens, "prompt": self.recipe.data.prompt}
        if self.renderer.date is not None:
            limits["date"] = self.renderer.date
        return digests | {name: str(value) for name, value in {**settings, **limits}.items()}


def load_any(
    target: str,
    *,
    root: Path,
    base: bool = False,
    task: TaskName | None = None,
    model: str | None = None,
    offline: bool = False,
) -> LoadedModel:
    """Load a run's tuned model, or its untouched base, or any model. `model`: a run's base, if it moved.

    Raises InputError for options that only runs or only models have, and what the functions below raise.
    """
    if not is_run(target, root):
        if base:
            raise InputError(f"{target}: --base needs a run: a model has no other, untouched version.")
        refuse_needless(model, target)
        find_model(target, root, offline=offline)
        return load_model(target, task=task, offline=offline)
    run = Run.open(target, root, base=model)
    learnt = resolved(run.recipe().task)
    answers_too = task in TASKS and TASKS[learnt].compares and TASKS[task].writes_answers
    if task not in (None, learnt) and not answers_too:
        raise InputError(f"{run.path}: --task {task}: it takes {learnt}{' or chat' * TASKS[learnt].compares}.")
    loaded = replace(load_base(run, offline=offline) if base else load_run(run, offline=offline), run=run, is_base=base)
    if task in (None, learnt):
        return loaded
    recipe, renderer = loaded.recipe.model_copy(update={"task": task}), loaded.renderer  # it answers as before
    return replace(loaded, recipe=recipe, renderer=make_renderer(recipe, renderer.tokenizer, renderer.kind))


def load_run(
    run: Run, *, offline: bool = False, as_trained: bool = True, on: Mapping[str, str] = AS_RUN
) -> LoadedModel:
    """The tuned model of a finished run; of an unfinished one, as of its newest checkpoint, which `note` says.

    On the base as the method trains on it, quantised or not; `as_trained` False: on the base as it is. `on`:
    another device or precision than the run's.

    Raises:
        ModelError: the base model is gone or cannot be read.
        RunError: the run is at work, or has neither a result nor a checkpoint.
    """
    recipe = run.recipe().model_copy(update=dict(on))
    if run.model_path.exists():
        refuse_needless(run.base, str(run.path))
        checking = in_background(partial(run.check_result, run.model_path))
        try:
            labels = run_labels(recipe.task, recipe.data)
            loaded = _load(resolve_model(str(run.model_path), offline=True), recipe, labels=labels)
        except ModelError:
            checking.result()  # says which file is damaged
            raise
        note = "; ".join(filter(None, [checking.result(), loaded.note]))
        refuse_non_finite(dict(loaded.model.named_parameters()), run.model_path)
        return replace(loaded, note=note)
    return load_adapter(load_base(run, offline=offline, as_trained=as_trained, on=on), run)


def load_adapter(base: LoadedModel, run: Run) -> LoadedModel:
    """Attach the result of a run, or its newest checkpoint, to its base; raises as `load_run` does."""
    recipe = run.recipe()
    method = METHODS[recipe.method.name]
    if run.adapter_path.exists():
        unchecked = run.check_result(run.adapter_path)
        attachment = method.load_result(base.model, run.adapter_path)
        refuse_non_finite(attachment.trained, run.adapter_path)
        note = "; ".join(filter(None, [unchecked, base.packed]))
        return replace(base, attachment=attachment, result=run.adapter_path, note=note)
    # Reading checkpoints sets damaged ones aside: not under the hands of the process that writes them.
    with run.lock():
        newest = checkpoint.newest(run.checkpoints_path, lambda path, why: None)
    if newest is None:
        way = command("resume", run.path)
        raise RunError(f"{run.path}: no result and no whole checkpoint: nothing to load. Continue with: {way}")
    attachment = attach(
        recipe,
        base.model,
        head=base.head,
        store=open_kept(run.rows_path / "train", run.identity().get("rows")),
        pad_id=base.pad_id,
    )
    restore(attachment, newest.weights)
    note = "; ".join(filter(None, [base.packed, f"not finished: these are the weights of step {newest.step}"]))
    return replace(base, attachment=attachment, result=run.checkpoints_path / f"step-{newest.step}", note=note)


def load_base(
    run: Run, *, offline: bool = False, as_trained: bool = True, on: Mapping[str, str] = AS_RUN
) -> LoadedModel:
    """The untouched base of a run, with the tokenizer and template that the run used.

    Raises RunError where its files are not those that the run was tuned on.
    """
    recipe = run.recipe().model_copy(update=dict(on))
    labels = run_labels(recipe.task, recipe.data)
    located = resolve_base(recipe, offline=offline)
    hashing = in_background(partial(files.fingerprint, located))
    for folder in (run.adapter_path, run.model_path):
        if folder.exists():
            saved = ModelRef("folder", folder, str(folder))
            tokenizer = files.load_tokenizer(saved, None)
            break
    else:
        tokenizer = files.load_tokenizer(located, recipe.data.template_at)
        add_tokens(tokenizer, recipe.data.new_tokens)
    try:
        loaded = _load(located, recipe, labels=labels, tokenizer=tokenizer, as_trained=as_trained)
    except ModelError:
        refuse_other_base(run, located, hashing.result())  # another model need not load as this one does
        raise
    refuse_other_base(run, located, hashing.result())
    return replace(loaded, base_hashes=hashing.result())


def refuse_other_base(run: Run, base: ModelRef, hashes: Mapping[str, str]) -> None:
    """Raise RunError where the base's files, by their SHA-256, are not those that a run was tuned on: its
    adapter would load on others without an error, and answer something else."""
    then = {key.removeprefix("model "): value for key, value in run.identity().items() if key[:6] == "model "}
    then = follow_renamed_gguf(then, hashes)
    weights = {name for name in {*then, *hashes} if name == "config.json" or name.endswith((".safetensors", ".gguf"))}
    changed = sorted(name for name in weights if then and then.get(name) != hashes.get(name))
    if changed:
        raise RunError(
            f"{base.path}: {', '.join(changed[:3])}: not the file that {run.path} was tuned on (its SHA-256 is "
            f"{hashes.get(changed[0], 'absent')[:16]}, was {then.get(changed[0], 'absent')[:16]}). Put that "
            "one back, or pass its place with --model PATH."
        )


def follow_renamed_gguf(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Hashes of a model's files by name, with the current name of a GGUF file that was renamed."""
    names = {digest: name for name, digest in now.items() if name.endswith(".gguf") and name not in then}
    return {names.get(value, key) if key not in now else key: value for key, value in then.items()}


def find_model(target: str, root: Path, *, offline: bool) -> ModelRef:
    """The model of that name. Raises ModelError for what is neither run nor model, naming all runs."""
    try:
        return resolve_model(target, offline=offline)
    except ModelError as error:
        if any(mark in target for mark in "/\\.~"):
            raise  # the path of a model
        raise ModelError(f"{no_such_run(target, root)} And no such model: {error}") from error


def refuse_non_finite(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raise ModelError naming a weight that holds a value which is not a number: every answer would be none."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{folder}: {name} holds NaN or infinite values, so it cannot answer. Take a copy of it.")


def refuse_needless(base: str | None, model: str) -> None:
    """Raise InputError where a base is given for what has none."""
    if base is not None:
        raise InputError(f"--model: says where the base of a run is, and {model} needs no base. Leave it out.")


def run_labels(task: TaskName, data: Data) -> Labels | None:
    """Labels of the head of a run, by its resolved options; None where it has none."""
    head = TASKS[task].head
    if head is None:
        return None
    kind: LabelKind = "tags" if head.by_word else resolved(data.label_kind)
    return Labels(kind, () if kind == "number" else data.labels)


def load_model(name: str, *, task: TaskName | None = None, offline: bool = False) -> LoadedModel:
    """A model that was not tuned here, in the precision and on the device that a run would choose.

    `task`: what to ask of it; None: what it was made for, by its head, template and kind. Raises ModelError
    where it has no head for the task.
    """
    located = resolve_model(name, offline=offline)
    recipe, tokenizer = untuned_recipe(located, task=task)
    return _load(located, recipe, tokenizer=tokenizer)


def untuned_recipe(located: ModelRef, *, task: TaskName | None = None) -> tuple[Recipe, PreTrainedTokenizerBase]:
    """The recipe that a run of this model would resolve, and the model's tokenizer; see `load_model`."""
    name = located.name
    kind = model_kind(located)
    tokenizer = files.load_tokenizer(located, None)
    made_for = _made_for(located, kind, has_template=bool(tokenizer.chat_template))
    chosen = task or made_for
    if TASKS[chosen].learns_classes and chosen != made_for:
        raise ModelError(
            f"{name}: it has no head for the task {chosen}. Tune one: "
            f"{command('train', name, 'DATA', '--task', chosen)}"
        )
    size = model_size(located)
    decisions = Decisions(Recipe(model=name, task=chosen))
    decide_before_rows(decisions, located, size, kind)
    recipe = decisions.recipe
    is_adapter = METHODS[recipe.method.name].is_adapter
    tokens = TOKENS_TO_ANSWER
    decisions.decide(precision_for(size.num_params, recipe.device, is_adapter=is_adapter, tokens=tokens))
    return decisions.folded(), tokenizer


def _made_for(located: ModelRef, kind: ModelKind, *, has_template: bool) -> TaskName:
    """The task that a model can do as it is."""
    architectures = (None if located.is_gguf else files.load_config(located).architectures) or [""]
    head: HeadName = "masked_token" if kind == "encoder" else "next_token"
    head = next((head for end, head in _HEADED.items() if architectures[0].endswith(end)), head)
    if (located.path / "modules.json").is_file():  # of sentence-transformers
        head = "vector"
    fitting = [task for task in TASKS.values() if task.heads.get(kind) == head]
    fitting = fitting or [task for task in TASKS.values() if head in task.heads.values()]  # refused later
    return next(task.name for task in fitting if has_template or not task.is_chat)


_HEADED: dict[str, HeadName] = {"ForSequenceClassification": "sequence", "ForTokenClassification": "tokens"}


def _load(
    located: ModelRef,
    recipe: Recipe,
    *,
    labels: Labels | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    as_trained: bool = True,
) -> LoadedModel:
    """The model with a head for `labels`; None: with the head that it has, if its task needs one.

    `as_trained` False leaves its weights as they are also where the method quantises them.
    """
    kind = model_kind(located)
    head = find_head(recipe.task, located, kind)
    limit = model_size(located).max_tokens
    if resolved(recipe.data.max_tokens) > limit:  # of an earlier version, which had another limit
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_tokens": limit})})
    device = machine.choose_device(recipe.device).value
    prepare_allocator(device)
    chosen = machine.choose_precision(recipe.precision, device)
    precision = chosen.value
    tokenizer = tokenizer or files.load_tokenizer(located, None)
    notes = [f"precision: {chosen}"] if precision != recipe.precision != "auto" else []
    method = recipe.method
    packing = METHODS[method.name].packing(method) if as_trained else None
    model = files.load_model(
        located,
        dtype=getattr(torch, precision),
        device="cpu" if located.is_gguf else device,
        packing=packing,
        head=head,
        labels=labels,
        seed=recipe.seed,
        tokenizer=tokenizer,
        on_note=notes.append,
    )
    if recipe.data.new_tokens and located.name == recipe.model:
        resize_embeddings(model, new_tokens_of(recipe.data.new_tokens, located))
    packed = "; ".join(METHODS[method.name].prepare_base(model, method, device=device)) if as_trained else ""
    model.to(device)
    note = "; ".join(filter(None, [packed, *notes]))
    renderer = make_renderer(recipe, tokenizer, kind)
    answered = _weighed(heads.labels_of(model), recipe.train.class_weights)
    return LoadedModel(model, renderer, recipe, head, located, answered, note=note, packed=packed)


def _weighed(labels: Labels | None, weights: str | Mapping[str, float] | None) -> Labels | None:
    """The labels with the weights of their classes, so that a loss counts as it did in training."""
    if labels is None or weights is None or isinstance(weights, str):
        return labels
    return replace(labels, weights_C=np.array([weights.get(name, 1.0) for name in labels.names], np.float64))


def _longest_prompt(most: int, new: int) -> int:
    """Most tokens of a prompt to which `new` are drawn, of `most` together. Raises
    RecipeError where none are left."""
    if new >= most:
        raise RecipeError(
            f"reinforce.max_new_tokens: {new:,}: leaves no room for a prompt in data.max_tokens, which is {most:,}. "
            "Lower it."
        )
    return most - new


def make_renderer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, kind: ModelKind) -> Renderer:
    """The renderer of a resolved recipe. Raises RecipeError where answers to be
    drawn leave no room for a prompt."""
    task, most = TASKS[resolved(recipe.task)], resolved(recipe.data.max_tokens)
    return Renderer(
        tokenizer,
        task,
        kind=kind,
        max_tokens=_longest_prompt(most, recipe.reinforce.max_new_tokens) if task.samples else most,
        too_long=resolved(recipe.data.too_long),
        control_tokens=recipe.data.control_tokens,
        stride=None if recipe.data.stride == "auto" else recipe.data.stride,
        prompt=recipe.data.prompt,
        date=None if recipe.data.date == "auto" else recipe.data.date,
        pooling=recipe.embed.as_pooling(most) if task.pools else None,
        placeholders=vision_of(tokenizer),
    )


def has_token_types(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model marks the second text of a pair by token types."""
    return "token_type_ids" in tokenizer.model_input_names and getattr(model.config, "type_vocab_size", 0) > 1
