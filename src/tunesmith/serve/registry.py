"""Models of the names on a command line: a base loaded once with its runs' adapters, other runs by themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.data.chat import CALL, QUESTION
from tunesmith.data.chat_template import ChatTemplate, TemplateRefusal
from tunesmith.errors import InputError, ModelError
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
from tunesmith.serve.adapters import AdapterSet, LowRankPath, RowMismatchError, joined_paths
from tunesmith.serve.decoder import Decoder
from tunesmith.serve.protocol import (
    EngineOptions,
    GenerationRequest,
    Modality,
    ModelCard,
    RequestError,
    StreamEvent,
    ToolCallFormat,
)
from tunesmith.serve.scheduler import Scheduler
from tunesmith.serve.served_model import Classifier, Embedder, ServedModel
from tunesmith.serve.startup_checks import check_adapter, check_renderer, check_writers, choose_decoder
from tunesmith.tasks import TASKS
from tunesmith.types import Pooling

Note = Callable[[str], None]
M = TypeVar("M", ServedModel, Classifier, Embedder)

_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_ANSWERS = {ServedModel: "answers in text", Classifier: "answers with labels", Embedder: "gives embeddings"}


@dataclass(frozen=True)
class SharedBase:
    """A base that takes the adapters of further runs."""

    loaded: LoadedModel
    adapters: AdapterSet
    decoder: Decoder
    hashes: Future[dict[str, str]]


@dataclass(frozen=True)
class AttachableRun:
    """A run that was read and checked, and its low-rank paths by layer."""

    model: ServedModel
    paths: Mapping[str, LowRankPath]


@dataclass
class Registry:
    """The models that are loaded, by name: runs in the order they were given, then their base."""

    models: dict[str, ServedModel | Classifier | Embedder] = field(default_factory=dict)
    shared: SharedBase | None = None
    detached: list[str] = field(default_factory=list)
    """Adapters that are on the model still, since answers under way may use them."""

    @property
    def decoders(self) -> list[Decoder]:
        """The decoders of all models that write, each once."""
        writers = (model for model in self.models.values() if isinstance(model, ServedModel))
        return list({id(model.decoder): model.decoder for model in writers}.values())

    def find(self, name: str, kind: type[M]) -> M:
        """Raises RequestError if there is no such model of this kind."""
        model = self.models.get(name)
        if not isinstance(model, kind):
            message = f"no model {name} here {_ANSWERS[kind]}"
            raise RequestError(message, status=404, code="model_not_found", param="model")
        return model

    def read_run(self, name: str, path: Path) -> AttachableRun:
        """Read and check a run that is to be served as `name`; changes nothing. Raises ModelError or RunError."""
        shared, run = self.shared, Run.open(path, path.parent)
        if (why := "this server takes none" if shared is None else why_unshareable(run)) is not None:
            raise ModelError(f"{run.path}: cannot be put on a base that is served: {why}")
        assert shared is not None, "refused above"
        base, chain = shared.loaded, [run]
        while (parent := chain[-1].started_from()) is not None:
            chain.append(parent)
        loading.refuse_other_base(chain[-1], base.located, shared.hashes.result())
        paths = read_paths(chain, base)
        tuned = as_run(base, run)
        model = make_writer(tuned, name, shared.decoder, adapter=name, run=run)
        check_renderer(run, tuned.renderer, lambda text: None)
        return AttachableRun(model, paths)

    def attach(self, found: AttachableRun) -> None:
        """Serve a run that was read, between two steps. Raises ModelError or RunError; nothing is changed then."""
        name = found.model.card.name
        assert self.shared is not None, "read_run refuses it otherwise"
        assert found.model.run is not None, "it was read from one"
        self.drop_detached(only=name)
        self.shared.adapters.put(name, found.paths)
        try:
            check_adapter(found.model, found.model.run)
        except BaseException as error:
            self.shared.adapters.drop(name)
            if isinstance(error, RowMismatchError):
                raise ModelError(f"{found.model.run.path}: cannot share its base: {error}") from error
            raise
        self.models[name] = found.model

    def detach(self, name: str) -> None:
        """Serve a run no longer; its adapter stays until no answer uses it."""
        if self.models.pop(name, None) is not None:
            self.detached.append(name)

    def drop_detached(self, *, only: str | None = None) -> None:
        """Free the adapters of detached runs. No answer may be under way, but for those of other runs than `only`."""
        for name in [name for name in self.detached if only in (None, name)]:
            assert self.shared is not None, "it was attached to it"
            self.shared.adapters.drop(name)
            self.detached.remove(name)

    def add(self, model: ServedModel | Classifier | Embedder) -> None:
        name = model.card.name
        if name in self.models:
            raise InputError(f"{name}: a run and its base have the same name. Rename the run.")
        self.models[name] = model


def open_registry(names: Sequence[str], *, root: Path, options: EngineOptions, note: Note) -> Registry:
    """Load and check the models of `names`.

    Raises InputError if models and adapters are not on one base, and the errors of loading.
    """
    runs, models = _parse_names(names, root, base=options.base)
    sharing = [run for run in runs if why_unshareable(run) is None]
    registry = Registry()
    found = [loading.find_model(name, root, offline=options.offline) for name in models]
    base, hashes = _one_base(sharing, found, offline=options.offline) if sharing or models else (None, None)
    for run in runs:
        if (why := why_unshareable(run)) is not None:
            loaded = loading.load_run(run, offline=options.offline)
            held = sum(tensor.numel() * tensor.element_size() for tensor in loaded.model.parameters())
            note(f"{run.path}: {why}: it has a model of its own, {held / 2**20:,.0f} MiB")
            _add_single(registry, loaded, run, note)
    if base is not None:
        _add_shared(registry, base, sharing, hashes=hashes, is_named=bool(models), note=note, attaches=options.attaches)
    return registry


def why_unshareable(run: Run) -> str | None:
    """The reason why a run needs a model of its own; None: it is only low-rank paths, so that many share a base."""
    recipe = run.recipe()
    if TASKS[resolved(recipe.task)].learns_classes:
        return "its head is its own"
    if run.model_path.exists():
        return "every weight of it was tuned"
    if recipe.data.new_tokens:
        return "it has tokens that its base has not"
    if not run.adapter_path.exists():
        return "it is not finished"
    return METHODS[recipe.method.name].unshareable(recipe.method)


def _parse_names(names: Sequence[str], root: Path, *, base: str | None) -> tuple[list[Run], list[str]]:
    """Runs and models, each once. `base`: where the base of the runs is now."""
    if not names:
        raise InputError("serve: no RUN or MODEL was named.")
    runs: dict[Path, Run] = {}
    for name in names:
        if is_run(name, root):
            run = Run.open(name, root)
            runs[run.path.resolve()] = run if run.model_path.exists() else replace(run, base=base)
    if all(run.model_path.exists() for run in runs.values()):
        loading.refuse_needless(base, ", ".join(names))
    by_name: dict[str, Run] = {}
    for run in runs.values():
        other = by_name.setdefault(run.path.resolve().name, run)
        if other is not run:
            raise InputError(f"{run.path} and {other.path} have one name, which clients use for both. Rename one.")
    return list(runs.values()), list(dict.fromkeys(name for name in names if not is_run(name, root)))


def _one_base(runs: Sequence[Run], found: list[ModelRef], *, offline: bool) -> tuple[ModelRef, dict[str, str] | None]:
    """The base of all models and adapters, and the hashes of its files if a run is on it.

    Raises InputError if there are several.
    """
    users = [(str(base.path.resolve()), base.revision, "", base.name) for base in found]
    hashes: dict[Path, dict[str, str]] = {}
    for run in runs:
        base = resolve_base(run.recipe(), offline=offline)
        path = base.path.resolve()
        hashes[path] = hashes.get(path) or load.fingerprint(base)
        loading.refuse_other_base(run, base, hashes[path])
        found.append(base)
        form = METHODS[run.recipe().method.name].base_format
        users.append((str(path), base.revision, f" in {form}" if form else "", str(run.path)))
    if (num := len({(path, revision, form) for path, revision, form, _ in users})) > 1:
        several = "; ".join(f"{user} on {path}{form}" for path, _, form, user in users)
        raise InputError(f"one base is served with its adapters, but these are on {num}: {several}. Serve apart.")
    return found[0], next(iter(hashes.values()), None)


def _add_shared(
    registry: Registry, base: ModelRef, runs: Sequence[Run], *, hashes: Mapping[str, str] | None, is_named: bool,
    note: Note, attaches: bool,
) -> None:  # fmt: skip
    """The base, loaded once, and the adapters of `runs` on it."""
    loaded = loading.load_base(runs[0], hashes=hashes) if runs else loading.load_model(base.name)
    if loaded.head != "next_token":
        if len(runs) > 1:
            raise InputError(f"{runs[1].path}: of encoders one is served at a time. Serve it apart.")
        run = runs[0] if runs else None
        return _add_single(registry, loading.load_adapter(loaded, run) if run else loaded, run, note)
    adapters = AdapterSet(loaded.model)
    for run in runs:
        adapters.put(run.path.resolve().name, read_paths([run], loaded))
        for text in filter(None, (run.check_result(run.adapter_path), loaded.packed)):
            note(f"{run.path}: {text}")
        if (precision := run.recipe().precision) != loaded.recipe.precision:
            note(f"{run.path}: tuned in {precision}, served in {loaded.recipe.precision}, as the first run was")
    decoder = choose_decoder(loaded, adapters, note)
    names = [run.path.resolve().name for run in runs]
    writers = [
        make_writer(as_run(loaded, run), name, decoder, adapter=name, run=run)
        for run, name in zip(runs, names, strict=True)
    ]
    if runs:
        try:
            recipe, tokenizer = loading.untuned_recipe(base)
            renderer = loading.make_renderer(recipe, tokenizer, model_kind(base))
            loaded = replace(loaded, renderer=renderer, recipe=recipe)
        except ModelError as error:
            if is_named:
                raise
            note(f"{_name_of(base)}: the base itself is not served: {error}")
            base = None  # type: ignore[assignment]
        if base is not None and loaded.packed:
            note(f"{_name_of(base)}: the base itself answers quantised too, as its runs were tuned on it")
    if base is not None:
        writers.append(make_writer(loaded, _name_of(base), decoder))
    for writer in writers:
        registry.add(writer)
    if attaches and base is not None:
        registry.shared = SharedBase(loaded, adapters, decoder, in_background(partial(load.fingerprint, base)))
    check_writers(writers, note)


def read_paths(chain: Sequence[Run], base: LoadedModel) -> dict[str, LowRankPath]:
    """The low-rank paths, by layer, of a run and of those that it started from and that are not part of the base.

    Raises RunError or ModelError for an adapter that was changed or is damaged.
    """
    for run in chain:
        run.check_result(run.adapter_path)
    paths = {
        layer: path.to(base.model.device, base.model.dtype)
        for layer, path in joined_paths([read_low_rank(run.adapter_path) for run in chain]).items()
    }
    for part in ("a_RI", "b_OR"):
        loading.refuse_non_finite({layer: getattr(path, part) for layer, path in paths.items()}, chain[0].adapter_path)
    return paths


def as_run(base: LoadedModel, run: Run) -> LoadedModel:
    """The base with the renderer and recipe of a run on it."""
    recipe = run.recipe()
    tokenizer = load.load_tokenizer(ModelRef("folder", run.adapter_path, str(run.adapter_path)), None)
    return replace(base, renderer=loading.make_renderer(recipe, tokenizer, model_kind(base.located)), recipe=recipe)


def _add_single(registry: Registry, loaded: LoadedModel, run: Run | None, note: Note) -> None:
    """A model that shares nothing."""
    name = _name_of(loaded.located) if run is None else run.path.resolve().name
    # The note of a model that gives vectors is about a head for masked words, which is not used.
    if loaded.note and (run is not None or loaded.head != "masked_token"):
        note(f"{name}: {loaded.note}")
    if loaded.head == "next_token":
        writer = make_writer(loaded, name, choose_decoder(loaded, AdapterSet(loaded.model), note), run=run)
        registry.add(writer)
        check_writers([writer], note)
    elif loaded.head in ("masked_token", "vector"):
        card = _card(loaded, name, run, "embeddings")
        pooling = loaded.renderer.pooling or find_pooling(loaded.located.path) or Pooling()
        most = min(card.max_tokens, pooling.max_tokens or card.max_tokens)
        registry.add(Embedder(replace(card, max_tokens=most), loaded, pooling))
    else:
        registry.add(Classifier(_card(loaded, name, run, "labels"), loaded))
        if run is not None:
            check_renderer(run, loaded.renderer, note)


def make_writer(
    loaded: LoadedModel, name: str, decoder: Decoder, *, adapter: str | None = None, run: Run | None = None
) -> ServedModel:
    """A model that writes, under a name."""
    vocab_size = int(loaded.model.get_output_embeddings().weight.shape[0])
    return ServedModel(_card(loaded, name, run, "text"), loaded.renderer, vocab_size, decoder, adapter, run)


def _card(loaded: LoadedModel, name: str, run: Run | None, answers: Modality) -> ModelCard:
    path = loaded.located.path
    files = [path, *path.parent.glob(f"{path.name}/*")]
    return ModelCard(
        name=name,
        task=loaded.renderer.task_name,
        answers=answers,
        max_tokens=loaded.max_tokens,
        is_base=run is None,
        created=int(max(file.stat().st_mtime for file in files) if run is None else run.created),
        labels=loaded.labels.names if loaded.labels is not None else (),
        calls=tool_call_format(loaded.renderer.tokenizer) if TASKS[loaded.renderer.task_name].is_chat else None,
    )


def _name_of(base: ModelRef) -> str:
    """A base's id on the hub, or the name of its folder or file."""
    if base.kind == "hub":
        return base.name
    return base.path.stem if base.is_gguf else base.path.resolve().name


def tool_call_format(tokenizer: Any) -> ToolCallFormat | None:
    """The way a chat template writes tool calls, found by rendering one.

    None: it has no tools, or writes calls in another way than `responses.ToolCallParser` reads.
    """
    if not tokenizer.chat_template:
        return None
    template, call = ChatTemplate(tokenizer), {"role": "assistant", "content": "", "tool_calls": [CALL]}
    try:
        prompt = template.render([QUESTION], tools=[_TOOL], prompt=True)
        answer = template.render([QUESTION, call], tools=[_TOOL], prompt=False).removeprefix(prompt)
    except TemplateRefusal:
        return None
    marked = re.search(r"<tool_call>(.*?)</tool_call>", answer, re.DOTALL)
    if marked is not None and _is_call(marked[1], "arguments"):
        # A mark that is a special token is not part of an answer's text.
        ids = tokenizer("<tool_call>", add_special_tokens=False).input_ids
        return "hermes" if "<tool_call>" in str(tokenizer.decode(ids, skip_special_tokens=True)) else None
    start, end = answer.find("{"), answer.rfind("}") + 1
    return "json" if start >= 0 and _is_call(answer[start:end], "parameters") else None


def _is_call(text: str, key: str) -> bool:
    try:
        call = json.loads(text)
    except ValueError:
        return False
    return isinstance(call, dict) and call.get("name") == "look_up" and isinstance(call.get(key), dict)


class LocalEngine:
    """One model in this process, a request at a time, with the server's prompts, limits and sampling."""

    def __init__(self, loaded: LoadedModel, note: Note) -> None:
        decoder = choose_decoder(loaded, AdapterSet(loaded.model), note, streams=1)
        self.model = make_writer(loaded, "", decoder)
        self._scheduler = Scheduler(decoder, streams=1)

    def generate(
        self,
        request: GenerationRequest,
        options: EngineOptions,
        mode: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Generator[StreamEvent, None, None]:
        """The events of one request; closing the generator cancels it. `mode` is entered around each step.

        Raises RequestError.
        """
        self._scheduler.add(self.model.prepare(0, request, options))
        try:
            while self._scheduler.is_busy:
                with mode():
                    events = self._scheduler.step()
                for _, event in events:
                    if isinstance(event, RequestError):
                        raise event
                    yield event
        finally:
            self._scheduler.cancel(0)
