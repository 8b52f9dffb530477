"""Inputs of a run before a row is encoded: its model, task, method, device and the longest row."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.data.addresses import pin
from tunesmith.data.renderer import Renderer
from tunesmith.errors import RecipeError, RunError
from tunesmith.inference.load import load_run, make_renderer
from tunesmith.methods import method_of
from tunesmith.models import load, machine, special_tokens
from tunesmith.models.heads import own_classes
from tunesmith.models.load import model_kind
from tunesmith.models.resolve_model import ModelRef, resolve_base, split_revision
from tunesmith.models.save import save_model
from tunesmith.models.size import ModelSize, model_size
from tunesmith.models.special_tokens import NewTokens
from tunesmith.optim import check_installed
from tunesmith.planning.defaults import decide_before_rows, find_head, with_choice
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import from_json, remove, sha256_file, to_json, write_atomic
from tunesmith.runs.folder import Run, is_run
from tunesmith.types import Choice, HeadName, ModelKind

MADE_OF = "merged-from.json"
"""File of a merged base with the SHA-256 of each file of its adapter."""
MERGE_WAIT_S = 300.0
"""Longest wait for another process that has the run which a run starts from, such as to merge its adapter."""


@dataclass(frozen=True)
class Inputs:
    """Facts that are known before a row is encoded."""

    recipe: Recipe
    choices: list[Choice]
    notes: list[str]
    located: ModelRef
    size: ModelSize
    kind: ModelKind
    head: HeadName
    own_classes: tuple[str, ...]
    """Labels of the head that the model has already."""
    renderer: Renderer
    added: NewTokens
    """Tokens that the recipe adds."""
    revision: str | None = None
    """The model's revision as it was asked for, by whose name the hub's cache knows it; the recipe has the commit."""


def find_inputs(recipe: Recipe, *, root: Path, offline: bool) -> Inputs:
    """Find the model, and decide what has to be decided before rows are read. Of a model of the hub that is not cached
    only the headers of the weights are fetched.

    Raises:
        RecipeError, DataError, ModelError: what was given cannot be used.
    """
    data, of_data = pin(recipe.data, offline=offline)
    recipe = recipe.model_copy(update={"data": data})
    chained: str | None = None
    if recipe.base is None:  # a resumed run has its base already
        name, chained = start_from(recipe.model, root=root, offline=offline)
        name, revision = split_revision(name, recipe.revision)
        recipe = recipe.model_copy(update={"model": name, "revision": revision})
    check_installed(recipe.optim)
    notes = [*([chained] if chained else []), *of_data]
    located = resolve_base(recipe, offline=offline, weights=False)
    asked_for = recipe.revision
    if recipe.base is None and located.revision != asked_for:
        recipe = recipe.model_copy(update={"revision": located.revision})
    tokenizer = load.load_tokenizer(located, recipe.data.template_at, on_note=notes.append)
    method_of(recipe).check(recipe.method)
    size, kind = model_size(located), model_kind(located)
    added = _add_tokens(recipe, tokenizer, kind)
    notes += special_tokens.describe(added, recipe.data.new_tokens)
    if recipe.device != "auto":
        machine.choose_device(recipe.device)
    recipe, choices = decide_before_rows(recipe, located, size, kind)
    head = find_head(recipe, located, kind)
    recipe, renderer, dates = _dated(recipe, tokenizer, kind, notes)
    choices += dates
    if recipe.revision != asked_for:
        reason = f"the commit that {asked_for or 'main'} of the model is now"
        choices.append(Choice("revision", recipe.revision, reason))
    has_classes = head in ("sequence", "tokens") and not located.is_gguf
    return Inputs(
        recipe=recipe,
        choices=choices,
        notes=notes,
        located=located,
        size=size,
        kind=kind,
        head=head,
        own_classes=own_classes(load.load_config(located), head) if has_classes else (),
        renderer=renderer,
        added=added,
        revision=asked_for,
    )


def _dated(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, kind: ModelKind, notes: list[str]
) -> tuple[Recipe, Renderer, list[Choice]]:
    """The recipe with the day that its template writes; None: it writes none."""
    chosen = recipe.data.date == "auto"
    if chosen:
        recipe = with_choice(recipe, Choice("data.date", date.today().isoformat(), ""))
    renderer = make_renderer(recipe, tokenizer, kind)
    if renderer.date is None:
        if recipe.data.date is not None and not chosen:
            notes.append(f"data.date: {recipe.data.date}: no chat template here writes a date: it is left out")
        return with_choice(recipe, Choice("data.date", None, "")), renderer, []
    reason = "the chat template writes the date: training and every later use here show the model this day"
    return recipe, renderer, [Choice("data.date", renderer.date, reason)] if chosen else []


def _add_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, kind: ModelKind) -> NewTokens:
    """Put the tokens of the recipe into the tokenizer."""
    if recipe.data.new_tokens and (kind != "causal" or not method_of(recipe).new_tokens):
        what = f"method {recipe.method.name}" if kind == "causal" else f"a model that is an {kind.replace('_', '–')}"
        raise RecipeError(f"data.new_tokens: is not for {what}. Leave it out, or use a causal model and method lora.")
    return special_tokens.add_tokens(tokenizer, recipe.data.new_tokens)


def start_from(model: str, *, root: Path, offline: bool) -> tuple[str, str | None]:
    """The model that `model` names, and what to say of it where it is a run: its folder, its name in `root`, "last".

    The beginning of a name is not enough here: `gpt2` is a model, whatever runs begin so. Raises RunError for a run
    without a result.
    """
    is_whole_name = model == "last" or Path(model).exists() or (root / model / "run.json").is_file()
    if not (is_whole_name and is_run(model, root)):
        return model, None
    run = Run.open(model, root)
    if run.result() == run.model_path:
        run.check_result(run.model_path)
        return str(run.model_path), f"starts from the result of {run.path}"
    merged, until = run.merged_path, time.monotonic() + MERGE_WAIT_S
    while not _is_merged(run):
        try:
            _merge(run, merged, offline=offline)
            break
        except RunError:
            if time.monotonic() > until or not (run.is_locked() or _is_merged(run)):
                raise
            time.sleep(0.2)  # another run that starts from it merges
    return str(merged), f"starts from the result of {run.path}, its adapter merged into its base in {merged}"


def _is_merged(run: Run) -> bool:
    """Whether the merged base is there, and of this adapter: known by content, since a copied file keeps its time."""
    try:
        made_of = from_json((run.merged_path / MADE_OF).read_bytes())
    except (OSError, ValueError):
        return False
    return bool(made_of == _adapter_hashes(run))


def _adapter_hashes(run: Run) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(run.adapter_path.iterdir()) if path.is_file()}


def _merge(run: Run, merged: Path, *, offline: bool) -> None:
    if (below := run.started_from()) is not None:
        start_from(str(below.path), root=run.path.parent, offline=offline)  # its merged base may be gone
    with run.lock():
        if _is_merged(run):  # meanwhile
            return
        remove(merged)
        speaker = load_run(run, offline=offline, as_trained=False)  # a merge is never written into quantised weights
        speaker.attachment.merge()
        adapter = ModelRef("folder", run.adapter_path, str(run.adapter_path))
        renderer = speaker.renderer
        how: dict[str, Any] = {"stop_ids": renderer.stop_ids, "pooling": renderer.pooling}
        save_model(speaker.model, renderer.tokenizer, merged, located=adapter, **how)
        write_atomic(merged / MADE_OF, to_json(_adapter_hashes(run)))
