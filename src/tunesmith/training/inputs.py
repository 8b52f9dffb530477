"""Inputs of a run before a row is encoded: its model, task, method, device and the longest row."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tunesmith.data.addresses import pin
from tunesmith.data.renderer import Renderer
from tunesmith.errors import RecipeError
from tunesmith.inference.load import make_renderer
from tunesmith.methods import method_of
from tunesmith.models import load, machine, special_tokens
from tunesmith.models.heads import own_classes
from tunesmith.models.load import model_kind
from tunesmith.models.resolve_model import ModelRef, resolve_base, split_revision
from tunesmith.models.size import ModelSize, model_size
from tunesmith.models.special_tokens import NewTokens
from tunesmith.optim import check_installed
from tunesmith.planning.decisions import Decisions
from tunesmith.planning.defaults import decide_before_rows, find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.training.merged_base import Start, start_from
from tunesmith.types import Choice, HeadName, ModelKind


@dataclass(frozen=True)
class Inputs:
    """Facts that follow from recipe and model alone. Rows are encoded by them, and `ResolvedRun` keeps them."""

    recipe: Recipe
    """The recipe with the decisions so far."""
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
    """The model's revision as it was given, as the hub's cache knows it; the recipe has the commit."""


def find_inputs(decisions: Decisions, *, root: Path, offline: bool) -> Inputs:
    """Find the model, and decide what has to be decided before rows are read. Of a model of the hub that is not
    cached only the headers of the weights are fetched.

    Raises:
        RecipeError, DataError, ModelError: what was given cannot be used.
    """
    data, of_data = pin(decisions.recipe.data, offline=offline)
    decisions.set("data", data)
    recipe = decisions.recipe
    start, finer = Start(recipe.model), None
    if recipe.base is None:  # a resumed run has its base already
        start = start_from(recipe.model, root=root, offline=offline)
        name, revision = split_revision(start.model, recipe.revision)
        decisions.set("model", name)
        decisions.set("revision", revision)
        if start.precision is not None and recipe.precision == "auto":
            finer = Choice("precision", start.precision, "16 bits would change the answers of the run it starts from")
            decisions.set("precision", start.precision)
        recipe = decisions.recipe
    check_installed(recipe.optim)
    notes = [*([start.note] if start.note else []), *of_data]
    located = resolve_base(recipe, offline=offline, weights=False)
    asked_for = recipe.revision
    if recipe.base is None and located.revision != asked_for:
        decisions.set("revision", located.revision)
        recipe = decisions.recipe
    tokenizer = load.load_tokenizer(located, recipe.data.template_at, on_note=notes.append)
    method_of(recipe.method).check(recipe.method)
    size, kind = model_size(located), model_kind(located)
    if recipe.data.new_tokens and (kind != "causal" or not method_of(recipe.method).new_tokens):
        what = f"method {recipe.method.name}"
        if kind != "causal":
            what = f"a model that is an {kind.replace('_', '–')}"
        raise RecipeError(f"data.new_tokens: is not for {what}. Leave it out, or use a causal model and method lora.")
    added = special_tokens.add_tokens(tokenizer, recipe.data.new_tokens)
    notes += special_tokens.describe(added, recipe.data.new_tokens)
    if recipe.device != "auto":
        machine.choose_device(recipe.device)
    decide_before_rows(decisions, located, size, kind)
    head = find_head(decisions.recipe.task, located, kind)
    renderer = _dated(decisions, tokenizer, kind, notes)
    if finer is not None:
        decisions.show(finer)
    if recipe.revision != asked_for:
        reason = f"the commit that {asked_for or 'main'} of the model is now"
        decisions.show(Choice("revision", recipe.revision, reason))
    has_classes = head in ("sequence", "tokens") and not located.is_gguf
    return Inputs(
        recipe=decisions.folded(),
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


def _dated(decisions: Decisions, tokenizer: PreTrainedTokenizerBase, kind: ModelKind, notes: list[str]) -> Renderer:
    """The renderer, with its date decided: the day that the chat template writes; None: it writes none."""
    is_open, given = decisions.is_open("data.date"), decisions.recipe.data.date
    if is_open:
        decisions.set("data.date", date.today().isoformat())
    renderer = make_renderer(decisions.folded(), tokenizer, kind)
    if renderer.date is None:
        if given is not None and not is_open:
            notes.append(f"data.date: {given}: no chat template here writes a date: it is left out")
        decisions.set("data.date", None)
    elif is_open:
        reason = "the chat template writes the date: training and every later use here show the model this day"
        decisions.show(Choice("data.date", renderer.date, reason))
    return renderer
