"""From the names on a command line to models that answer: one base loaded once, with the adapters of its runs on it,
and a model of its own for whatever cannot share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunesmith.data.renderer import Renderer
from tunesmith.errors import InputError, ModelError
from tunesmith.inference import load as loading
from tunesmith.inference.load import LoadedModel
from tunesmith.methods import METHODS
from tunesmith.models import load
from tunesmith.models.load import model_kind
from tunesmith.models.pooling import find_pooling
from tunesmith.models.resolve_model import ModelRef, resolve_base, resolve_model
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs.folder import Run, is_run
from tunesmith.serve import proofs
from tunesmith.serve.adapters import Adapters
from tunesmith.serve.call_formats import call_format
from tunesmith.serve.decoder import Apart, Decoder, Together
from tunesmith.serve.protocol import EngineOptions, Served
from tunesmith.serve.reading import Embedder, Labeller
from tunesmith.serve.voices import Voice
from tunesmith.tasks import TASKS

Note = Callable[[str], None]


@dataclass
class Serving:
    """What is loaded, by the names it is asked by."""

    voices: dict[str, Voice] = field(default_factory=dict)
    labellers: dict[str, Labeller] = field(default_factory=dict)
    embedders: dict[str, Embedder] = field(default_factory=dict)

    @property
    def served(self) -> list[Served]:
        """Everything that can be named, in the order it was given; a base behind its runs."""
        return [one.served for some in (self.voices, self.labellers, self.embedders) for one in some.values()]

    @property
    def decoders(self) -> list[Decoder]:
        """Those of all voices, each once."""
        return list({id(voice.decoder): voice.decoder for voice in self.voices.values()}.values())


def open_serving(names: Sequence[str], *, root: Path, options: EngineOptions, note: Note) -> Serving:
    """Every model that `names` mean, loaded and proved.

    Raises InputError where models and adapters are not on one base, and whatever loading raises.
    """
    runs, models = _sorted_out(names, root, base=options.base)
    sharing = [run for run in runs if why_alone(run) is None]
    base, hashes = _one_base(sharing, models, offline=options.offline) if sharing or models else (None, None)
    serving = Serving()
    for run in runs:
        if (why := why_alone(run)) is not None:
            _add_alone(serving, run, why, options, note)
    if base is not None:
        first = sharing[0] if sharing else None
        _load_base(serving, base, first, sharing, hashes=hashes, is_named=bool(models), note=note)
    return serving


def why_alone(run: Run) -> str | None:
    """Why a run has to have a model of its own; None: it is low-rank paths beside layers, so that many share one."""
    recipe = run.recipe()
    method = recipe.method
    if TASKS[resolved(recipe.task)].learns_classes:
        return "its head is its own"
    if run.model_path.exists():
        return "every weight of it was tuned"
    if recipe.data.new_tokens:
        return "it has tokens that its base has not"
    return METHODS[method.name].unshareable(method)


def _sorted_out(names: Sequence[str], root: Path, *, base: str | None) -> tuple[list[Run], list[str]]:
    """Runs and models, each once. `base`: where that of the runs is now."""
    if not names:
        raise InputError("serve: no RUN or MODEL was named.")
    runs: dict[Path, Run] = {}
    models: dict[str, None] = {}
    for name in names:
        if is_run(name, root):
            run = Run.open(name, root)
            runs[run.path.resolve()] = run if run.model_path.exists() else replace(run, base=base)
        else:
            models[name] = None
    if all(run.model_path.exists() for run in runs.values()):
        loading.refuse_needless(base, ", ".join(names))
    called: dict[str, Run] = {}
    for run in runs.values():
        other = called.setdefault(run.path.resolve().name, run)
        if other is not run:
            raise InputError(f"{run.path} and {other.path} have one name, by which both would be asked. Rename one.")
    return list(runs.values()), list(models)


def _one_base(runs: Sequence[Run], models: Sequence[str], *, offline: bool) -> tuple[ModelRef, dict[str, str] | None]:
    """The base that models and adapters are on, quantised or not, and hashes of its files where a run is on it. Raises
    InputError where there are several."""
    bases: dict[tuple[str, str | None, str], list[str]] = {}
    found: list[ModelRef] = []
    hashes: dict[Path, dict[str, str]] = {}
    for name in models:
        found.append(resolve_model(name, offline=offline))
        bases.setdefault((str(found[-1].path.resolve()), found[-1].revision, ""), []).append(name)
    for run in runs:
        recipe = run.recipe()
        found.append(resolve_base(recipe, offline=offline))
        path = found[-1].path.resolve()
        hashes[path] = hashes.get(path) or load.fingerprint(found[-1])
        loading.refuse_other_base(run, found[-1], hashes[path])
        bases.setdefault((str(found[-1].path.resolve()), found[-1].revision, _form(recipe)), []).append(str(run.path))
    if len(bases) > 1:
        several = "; ".join(f"{', '.join(users)} on {path}{form}" for (path, _, form), users in bases.items())
        raise InputError(
            f"one base is served with its adapters, but these are on {len(bases)}: {several}. Serve apart."
        )
    return found[0], next(iter(hashes.values()), None)


def _form(recipe: Recipe) -> str:
    """How a run has the weights of its base, in words; empty: as they are."""
    form = METHODS[recipe.method.name].base_format(recipe.method)
    return f" in {form}" if form else ""


def _load_base(
    serving: Serving,
    base: ModelRef,
    first: Run | None,
    runs: Sequence[Run],
    *,
    hashes: Mapping[str, str] | None,
    is_named: bool,
    note: Note,
) -> None:
    """The base, loaded once, and the adapters of `runs` on it."""
    speaker = loading.load_model(base.name) if first is None else loading.load_base(first, hashes=hashes)
    if speaker.head != "next_token":
        if len(runs) > 1:
            raise InputError(f"{runs[1].path}: of encoders one is served at a time. Serve it apart.")
        _add(serving, speaker if first is None else loading.load_adapter(speaker, first), first, note)
        return
    adapters = Adapters(speaker.model)
    tuned = [_take(adapters, speaker, run, note) for run in runs]
    adapters.install()
    decoder = choose_decoder(speaker, adapters, note)
    for run, voiced in zip(runs, tuned, strict=True):
        name = run.path.resolve().name
        _add_voice(serving, make_voice(voiced, name, decoder, adapter=name, run=run))
    if first is None:
        _add_voice(serving, make_voice(speaker, _name_of(base), decoder))
    else:
        _add_base(serving, speaker, base, decoder, is_named=is_named, note=note)
    proofs.prove([voice for voice in serving.voices.values() if voice.decoder is decoder], note)


def _take(adapters: Adapters, base: LoadedModel, run: Run, note: Note) -> LoadedModel:
    """One run's adapter, taken off its base; how the run is spoken to."""
    recipe = run.recipe()
    if recipe.precision != base.recipe.precision:
        note(f"{run.path}: tuned in {recipe.precision}, served in {base.recipe.precision}, as the first run was")
    tuned = loading.load_adapter(base, run)
    if tuned.note:
        note(f"{run.path}: {tuned.note}")
    adapters.take(run.path.resolve().name, tuned.attachment)
    tokenizer = base.renderer.tokenizer
    if run.adapter_path.exists():
        tokenizer = load.load_tokenizer(ModelRef("folder", run.adapter_path, str(run.adapter_path)), None)
    renderer = loading.make_renderer(recipe, tokenizer, model_kind(base.located))
    return replace(base, renderer=renderer, recipe=recipe)


def _add_alone(serving: Serving, run: Run, why: str, options: EngineOptions, note: Note) -> None:
    """A run with a model of its own."""
    speaker = loading.load_run(run, offline=options.offline)
    held = sum(tensor.numel() * tensor.element_size() for tensor in speaker.model.parameters())
    note(f"{run.path}: {why}: it has a model of its own, {held / 2**20:,.0f} MiB")
    _add(serving, speaker, run, note)


def _add(serving: Serving, speaker: LoadedModel, run: Run | None, note: Note) -> None:
    """A model with nothing beside it."""
    name = _name_of(speaker.located) if run is None else run.path.resolve().name
    # Of a model that gives vectors, what is told is about a head for masked words, which is not asked.
    if speaker.note and (run is not None or speaker.head != "masked_token"):
        note(f"{name}: {speaker.note}")
    if speaker.head == "next_token":
        voice = make_voice(speaker, name, choose_decoder(speaker, Adapters(speaker.model), note), run=run)
        _add_voice(serving, voice)
        proofs.prove([voice], note)
    elif speaker.head == "masked_token":
        served, pooling = _served(speaker, name, run, "embeddings"), find_pooling(speaker.located.path)
        most = min(served.max_tokens, pooling.max_tokens or served.max_tokens)
        serving.embedders[name] = Embedder(replace(served, max_tokens=most), speaker, pooling)
    else:
        serving.labellers[name] = Labeller(_served(speaker, name, run, "labels"), speaker)
        proofs.prove_rows(run, speaker.renderer, note)


def _add_base(
    serving: Serving, speaker: LoadedModel, base: ModelRef, decoder: Decoder, *, is_named: bool, note: Note
) -> None:
    """The untouched model, asked with its own tokenizer and template."""
    name = _name_of(base)
    try:
        recipe, tokenizer = loading.untuned_recipe(base)
        renderer: Renderer = loading.make_renderer(recipe, tokenizer, model_kind(base))
    except ModelError as error:
        if is_named:
            raise
        note(f"{name}: the base itself is not served: {error}")
        return
    if speaker.packed:
        note(f"{name}: the base itself answers quantised too, as its runs were tuned on it")
    _add_voice(serving, make_voice(replace(speaker, renderer=renderer, recipe=recipe), name, decoder))


def _add_voice(serving: Serving, voice: Voice) -> None:
    name = voice.served.name
    if name in serving.voices:
        raise InputError(f"{name}: a run and its base have one name, by which both would be asked. Rename the run.")
    serving.voices[name] = voice


def make_voice(
    speaker: LoadedModel, name: str, decoder: Decoder, *, adapter: str | None = None, run: Run | None = None
) -> Voice:
    """What is asked by a name, of a model whose texts `decoder` goes on with."""
    vocab_size = int(speaker.model.get_output_embeddings().weight.shape[0])
    served = _served(speaker, name, run, "text")
    return Voice(served, speaker.renderer, vocab_size, decoder, adapter, run)


def _served(speaker: LoadedModel, name: str, run: Run | None, answers: str) -> Served:
    created = run.created if run is not None else _written(speaker.located)
    return Served(
        name=name,
        task=speaker.renderer.task_name,
        answers=answers,  # type: ignore[arg-type]
        max_tokens=speaker.max_tokens,
        is_base=run is None or run.model_path.exists(),
        created=int(created),
        labels=speaker.labels.names if speaker.labels is not None else (),
        calls=call_format(speaker.renderer.tokenizer) if TASKS[speaker.renderer.task_name].is_chat else None,
    )


def _written(located: ModelRef) -> float:
    return max(path.stat().st_mtime for path in [located.path, *located.path.parent.glob(f"{located.path.name}/*")])


def _name_of(base: ModelRef) -> str:
    """What a base is asked by: its id on the hub, or the name of its folder or file."""
    if base.kind == "hub":
        return base.name
    return base.path.stem if base.is_gguf else base.path.resolve().name


def choose_decoder(speaker: LoadedModel, adapters: Adapters, note: Note, *, streams: int | None = None) -> Decoder:
    """All texts in one pass, where the model answers so as it does alone; else one by one. `streams`: how many texts at
    once; None: several. Raises ModelError for a model that keeps the state of a text in itself, of several texts."""
    model = speaker.model
    reason = "it is an encoder–decoder"
    if not model.config.is_encoder_decoder:
        reason = proofs.why_apart(model, adapters, longest=speaker.max_tokens)
    if not reason:
        return Together(model, adapters)
    note(f"answers are decoded one by one, not together: {reason}")
    if streams != 1 and not model.config.is_encoder_decoder and (problem := proofs.why_not_apart(model, adapters)):
        raise ModelError(
            f"{speaker.located.name}: cannot be served: {problem}. Ask it by `tunesmith chat` or `tunesmith predict`."
        )
    return Apart(model, adapters)
