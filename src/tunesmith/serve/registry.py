"""The models that a command line names: a base that is loaded once with the adapters of its runs, and other
runs by themselves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from tunesmith.data.renderer import Renderer
from tunesmith.errors import InputError, ModelError, RunError
from tunesmith.generation.adapters import AdapterSet, LowRankPath, RowMismatchError, joined_paths
from tunesmith.generation.decoder import Decoder, choose_decoder, probe
from tunesmith.generation.scheduler import Scheduler
from tunesmith.inference import load as loading
from tunesmith.inference.load import LoadedModel
from tunesmith.methods import METHODS
from tunesmith.methods.adapter_format import read_low_rank
from tunesmith.models import load
from tunesmith.models.load import model_kind
from tunesmith.models.pooling import find_pooling
from tunesmith.models.resolve_model import ModelRef, resolve_base
from tunesmith.recipe.schema import resolved
from tunesmith.runs.background import in_background
from tunesmith.runs.folder import Run, is_run
from tunesmith.serve.protocol import (
    OPEN,
    EngineOptions,
    GenerationRequest,
    Modality,
    ModelCard,
    RequestError,
    StreamEvent,
    ToolCallFormat,
)
from tunesmith.serve.served_model import Classifier, Embedder, ServedModel
from tunesmith.tasks import TASKS
from tunesmith.types import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Note = Callable[[str], None]
M = TypeVar("M", ServedModel, Classifier)

DECODER_PROBE_TOKENS = 37


@dataclass
class Registry:
    """The models that are loaded, by name: runs in the given order, then their base."""

    models: dict[str, ServedModel | Classifier | Embedder] = field(default_factory=dict)
    shared: ServedModel | None = None
    """The base, where runs are attached while the server answers."""
    hashes: Future[dict[str, str]] = field(default_factory=Future)
    """SHA-256 of its files, by name."""
    detached: set[str] = field(default_factory=set)
    """Adapters that are on the model still, since answers under way may use them."""

    @property
    def decoders(self) -> list[Decoder]:
        """The decoders of all models that write, each once."""
        served = [model for model in self.models.values() if isinstance(model, ServedModel)]
        return list(dict.fromkeys(model.decoder for model in served))

    def find(self, name: str, kind: type[M]) -> M:
        """The model of this name and kind. Raises RequestError if there is none."""
        model = self.models.get(name)
        if not isinstance(model, kind):
            message = f"there is no model {name} that answers in this way"
            raise RequestError(message, status=404, code="model_not_found", param="model")
        return model

    def read_run(self, name: str, path: Path) -> ServedModel:
        """Read and check a run that is to be served as `name`; changes nothing.
        Raises ModelError or RunError."""
        shared, run = self.shared, Run.open(path, path.parent)
        chain = [run]
        while (parent := chain[-1].started_from()) is not None:
            chain.append(parent)
        # Earlier runs of the chain count too: adapters of theirs in a vision tower would silently have no effect.
        why = next(filter(None, map(why_unshareable, chain)), None)
        if shared is None or why is not None:
            why = "this server takes none" if shared is None else why
            raise ModelError(f"{run.path}: cannot be put on a base that is served: {why}")
        loading.refuse_other_base(chain[-1], shared.loaded.located, self.hashes.result())
        paths = read_paths(chain, shared.loaded)
        return _tuned(shared.loaded, name, run, shared.decoder, paths, note=lambda text: None)

    def attach(self, model: ServedModel) -> None:
        """Serve a run that was read, between two steps. If ModelError or RunError is raised, nothing was
        changed."""
        name, shared = model.card.name, self.shared
        assert shared is not None, "read_run refuses it otherwise"
        self.detached.discard(name)
        shared.decoder.adapters.put(name, model.paths)
        try:
            check_adapter(model)
        except BaseException as error:
            shared.decoder.adapters.drop(name)
            if isinstance(error, RowMismatchError):
                raise ModelError(f"{name}: cannot share its base: {error}") from error
            raise
        self.models[name] = model

    def detach(self, name: str) -> None:
        """Stop serving a run. Its adapter stays until no answer uses it."""
        if self.models.pop(name, None) is not None:
            self.detached.add(name)

    def drop_detached(self) -> None:
        """Free the adapters of detached runs, at a time when no answer is being written."""
        while self.detached and self.shared is not None:
            self.shared.decoder.adapters.drop(self.detached.pop())

    def add(self, model: ServedModel | Classifier | Embedder) -> None:
        name = model.card.name
        if name in self.models:
            raise InputError(f"{name}: a run and its base, or two runs, have the same name. Rename a run.")
        self.models[name] = model


def open_registry(names: Sequence[str], *, root: Path, options: EngineOptions, note: Note) -> Registry:
    """Load and check the models of `names`.

    Raises InputError if models and adapters are not on one base, and the errors of loading.
    """
    registry, sharing, models = Registry(), list[Run](), list[ModelRef]()
    runs: dict[Path, Run] = {}
    for name in dict.fromkeys(names):
        if is_run(name, root):
            run = Run.open(name, root)
            runs[run.path.resolve()] = run if run.model_path.exists() else replace(run, base=options.base)
        else:
            models.append(loading.find_model(name, root, offline=options.offline))
    if all(run.model_path.exists() for run in runs.values()):
        loading.refuse_needless(options.base, ", ".join(names))
    for run in runs.values():
        if (why := why_unshareable(run)) is None:
            sharing.append(run)
            continue
        loaded = loading.load_run(run, offline=options.offline)
        held = sum(tensor.numel() * tensor.element_size() for tensor in loaded.model.parameters())
        note(f"{run.path}: {why}, so it is loaded apart from the others, {held / 2**20:,.0f} MiB")
        _add_single(registry, loaded, run, note)
    if sharing or models:
        _add_shared(registry, sharing, models, options, note)
    return registry


def why_unshareable(run: Run) -> str | None:
    """The reason why a run needs a model of its own; None: it is only low-rank paths, so many runs share a
    base."""
    recipe = run.recipe()
    if TASKS[resolved(recipe.task)].learns_classes:
        return "its head was trained with it"
    if run.model_path.exists():
        return "every weight of it was tuned"
    if recipe.data.new_tokens:
        return "it has tokens that its base has not"
    if not run.adapter_path.exists():
        return "it is not finished"
    return METHODS[recipe.method.name].unshareable(recipe.method)


def _one_base(runs: Sequence[Run], models: Sequence[ModelRef], *, offline: bool) -> ModelRef:
    """The base of all models and adapters. Raises InputError if there are several."""
    users = [(base, "", base.name) for base in models]
    for run in runs:
        form = METHODS[run.recipe().method.name].base_format
        users.append((resolve_base(run.recipe(), offline=offline), f" in {form}" if form else "", str(run.path)))
    if (num := len({(base.path.resolve(), base.revision, form) for base, form, _ in users})) > 1:
        several = "; ".join(f"{user} on {base.path.resolve()}{form}" for base, form, user in users)
        raise InputError(
            f"one base is served with its adapters, but these are on {num}: {several}. Serve them separately."
        )
    return users[0][0]


def _add_shared(
    registry: Registry, runs: Sequence[Run], models: Sequence[ModelRef], options: EngineOptions, note: Note
) -> None:
    """Load the base once, and add it and the adapters of `runs` on it."""
    base = _one_base(runs, models, offline=options.offline)
    loaded = loading.load_base(runs[0], offline=options.offline) if runs else loading.load_model(base.name)
    for other in runs[1:]:
        loading.refuse_other_base(other, base, loaded.base_hashes or {})
    if loaded.head != "next_token":
        if len(runs) > 1:
            raise InputError(f"{runs[1].path}: only one encoder is served at a time. Serve it separately.")
        alone = runs[0] if runs else None
        return _add_single(registry, loading.load_adapter(loaded, alone) if alone else loaded, alone, note)
    adapters, paths_of_runs = AdapterSet(loaded.model), list[tuple[Run, str, dict[str, LowRankPath]]]()
    for run in runs:
        name, paths = run.path.resolve().name, read_paths([run], loaded, note)
        adapters.put(name, paths)
        paths_of_runs.append((run, name, paths))
        if loaded.packed:
            note(f"{run.path}: {loaded.packed}")
        if (precision := run.recipe().precision) != loaded.recipe.precision:
            note(f"{run.path}: tuned in {precision}, served in {loaded.recipe.precision}, as the first run was")
    decoder = choose_decoder(base.name, loaded.model, adapters, note)
    for run, name, paths in paths_of_runs:
        model = _tuned(loaded, name, run, decoder, paths, note=note)
        check_adapter(model)
        registry.add(model)
    if runs:
        try:
            recipe, tokenizer = loading.untuned_recipe(base)
            loaded = replace(loaded, renderer=loading.make_renderer(recipe, tokenizer, model_kind(base)), recipe=recipe)
        except ModelError as error:
            if models:
                raise
            return note(f"{_name_of(base)}: the base itself is not served: {error}")
        if loaded.packed:
            note(f"{_name_of(base)}: the base itself answers quantised too, as its runs were tuned on it")
    served = ServedModel(_card(loaded, _name_of(base), None, "text"), loaded, decoder)
    registry.add(served)
    if options.attaches:
        registry.shared, registry.hashes = served, in_background(partial(load.fingerprint, base))


def read_paths(chain: Sequence[Run], base: LoadedModel, note: Note = lambda text: None) -> dict[str, LowRankPath]:
    """The low-rank paths, by layer, of a run and of the earlier runs of its chain that are not part of the
    base.

    Raises RunError or ModelError for an adapter that was changed or is damaged.
    """
    for run in chain:
        if unchecked := run.check_result(run.adapter_path):
            note(f"{run.path}: {unchecked}")
    paths = {
        layer: path.to(base.model.device, base.model.dtype)
        for layer, path in joined_paths([read_low_rank(run.adapter_path) for run in chain]).items()
    }
    for part in ("a_RI", "b_OR"):
        loading.refuse_non_finite({layer: getattr(path, part) for layer, path in paths.items()}, chain[0].adapter_path)
    return paths


def _tuned(
    base: LoadedModel, name: str, run: Run, decoder: Decoder, paths: Mapping[str, LowRankPath], *, note: Note
) -> ServedModel:
    """A run on the base, with its own tokenizer and recipe. Raises RunError where they have changed."""
    recipe = run.recipe()
    tokenizer = load.load_tokenizer(ModelRef("folder", run.adapter_path, str(run.adapter_path)), None)
    renderer = loading.make_renderer(recipe, tokenizer, model_kind(base.located))
    check_renderer(run, renderer, note)
    loaded = replace(base, renderer=renderer, recipe=recipe)
    return ServedModel(_card(loaded, name, run, "text"), loaded, decoder, paths)


def _add_single(registry: Registry, loaded: LoadedModel, run: Run | None, note: Note) -> None:
    """Add a model that shares no base with others."""
    name = _name_of(loaded.located) if run is None else run.path.resolve().name
    # The note of a model that gives vectors is about a head for masked words, which is not used.
    if loaded.note and (run is not None or loaded.head != "masked_token"):
        note(f"{name}: {loaded.note}")
    if run is not None:
        check_renderer(run, loaded.renderer, note)
    if loaded.head == "next_token":
        decoder = choose_decoder(name, loaded.model, AdapterSet(loaded.model), note)
        registry.add(ServedModel(_card(loaded, name, run, "text"), loaded, decoder))
    elif loaded.head in ("masked_token", "vector"):
        card = _card(loaded, name, run, "embeddings")
        pooling = loaded.renderer.pooling or find_pooling(loaded.located.path) or Pooling()
        most = min(card.max_tokens, pooling.max_tokens or card.max_tokens)
        registry.add(Embedder(replace(card, max_tokens=most), loaded, pooling))
    else:
        registry.add(Classifier(_card(loaded, name, run, "labels"), loaded))


def check_renderer(run: Run, renderer: Renderer, note: Note) -> None:
    """Check that tokenizer and chat template are as in training, by the fingerprint in the run's first event.

    Raises RunError.
    """
    if not renderer.is_of(run.identity().get("tokenizer and template", renderer.fingerprint)):
        raise RunError(
            f"{run.path}: its tokenizer or chat template makes other tokens than in training: its files or the "
            "installed transformers have changed. Put them back, or tune it again."
        )
    if renderer.date is not None:
        note(f"{run.path}: its chat template writes the date: {renderer.date}, as in training")


def check_adapter(model: ServedModel) -> None:
    """Check that the adapter changes the logits of a probe. Raises RunError if it does not."""
    decoder, logits = type(model.decoder)(model.decoder.model, model.decoder.adapters), []
    for adapter in (None, model.adapter):
        slot = decoder.open(adapter, DECODER_PROBE_TOKENS)
        logits.append(decoder.step({}, [(slot, probe(model.vocab_size, DECODER_PROBE_TOKENS))])[1])
    if torch.equal(*logits):
        raise RunError(
            f"{model.card.name}: its adapter changes nothing: the base alone would answer in its name. Look at "
            "the run's report, and train it longer."
        )


def _card(loaded: LoadedModel, name: str, run: Run | None, answers: Modality) -> ModelCard:
    return ModelCard(
        name=name,
        task=loaded.renderer.task_name,
        answers=answers,
        max_tokens=loaded.max_tokens,
        is_base=run is None,
        created=int(loaded.located.path.stat().st_mtime if run is None else run.created),
        labels=loaded.labels.names if loaded.labels is not None else (),
        sees=loaded.renderer.placeholders is not None and TASKS[loaded.renderer.task_name].is_chat,
        calls=tool_call_format(loaded.renderer.tokenizer) if TASKS[loaded.renderer.task_name].is_chat else None,
    )


def _name_of(base: ModelRef) -> str:
    """A base's id on the hub, or the name of its folder or file."""
    if base.kind == "hub":
        return base.name
    return base.path.stem if base.is_gguf else base.path.resolve().name


def tool_call_format(tokenizer: PreTrainedTokenizerBase) -> ToolCallFormat | None:
    """The format in which a chat template writes tool calls; None: one that `responses.with_tool_calls` cannot
    read."""
    template = str(tokenizer.chat_template or "")
    if OPEN in template:
        # A mark that is a special token is not part of an answer's text.
        ids = tokenizer(OPEN, add_special_tokens=False).input_ids
        return "hermes" if OPEN in str(tokenizer.decode(ids, skip_special_tokens=True)) else None
    return "json" if '"parameters": ' in template else None


class LocalEngine:
    """One model in this process, a request at a time, with the server's prompts, limits and sampling."""

    def __init__(self, loaded: LoadedModel, note: Note) -> None:
        decoder = choose_decoder(loaded.located.name, loaded.model, AdapterSet(loaded.model), note, streams=1)
        self.model = ServedModel(_card(loaded, "", None, "text"), loaded, decoder)
        decoders = [each for each in (decoder, decoder.seeing) if each is not None]
        self._schedulers = {each: Scheduler(each, streams=1) for each in decoders}

    def generate(
        self,
        request: GenerationRequest,
        options: EngineOptions,
        mode: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Generator[StreamEvent, None, None]:
        """The events of one request; closing the generator cancels it. `mode` is entered around each step.

        Raises RequestError.
        """
        prepared = self.model.prepare(0, request, options)
        scheduler = self._schedulers[self.model.decoder_of(prepared)]
        scheduler.add(prepared)
        try:
            while scheduler.is_busy:
                with mode():
                    events = scheduler.step()
                for _, event in events:
                    if isinstance(event, RequestError):
                        raise event
                    yield event
        finally:
            scheduler.cancel(0)
