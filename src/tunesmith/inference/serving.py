"""From the names on a command line to models that answer: one base loaded once, with the adapters of its runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunesmith import loading
from tunesmith.asking import EngineOptions, Served
from tunesmith.data.render import Renderer
from tunesmith.errors import InputError, ModelError
from tunesmith.inference import proofs
from tunesmith.inference.adapters import Adapters
from tunesmith.inference.decoder import Apart, Decoder, Together
from tunesmith.inference.reading import Embedder, Labeller
from tunesmith.inference.voices import Voice
from tunesmith.loading import Speaker
from tunesmith.methods.lora import LoraAttachment
from tunesmith.models import load, locate
from tunesmith.models.kind import model_kind
from tunesmith.models.locate import Located
from tunesmith.recipe.knobs import Recipe, known
from tunesmith.recipe.method_knobs import PeftMethod, QloraMethod
from tunesmith.run import Run, is_run

Note = Callable[[str], None]


@dataclass
class Serving:
    """What is loaded, by the names it is asked by."""

    voices: dict[str, Voice] = field(default_factory=dict)
    labellers: dict[str, Labeller] = field(default_factory=dict)
    embedders: dict[str, Embedder] = field(default_factory=dict)
    decoder: Decoder | None = None
    """Of all voices."""

    @property
    def served(self) -> list[Served]:
        """Everything that can be named, in the order it was given; a base behind its runs."""
        return [one.served for some in (self.voices, self.labellers, self.embedders) for one in some.values()]


def open_serving(names: Sequence[str], *, root: Path, options: EngineOptions, note: Note) -> Serving:
    """Every model that `names` mean, loaded and proved.

    Raises InputError where they are not on one base, and whatever loading raises.
    """
    runs, models = _sorted_out(names, root)
    base = _one_base(runs, models, offline=options.offline)
    serving = Serving()
    labelled = [run for run in runs if known(run.recipe().task) in ("classify", "tag")]
    text_runs = [run for run in runs if run not in labelled]
    for run in labelled:  # each head is a model of its own: they are small beside those that write
        _add(serving, loading.load_run(run, offline=options.offline), run, note)
    if models or text_runs:
        first = text_runs[0] if text_runs else None
        _load_base(serving, base, first, text_runs, is_named=bool(models), note=note)
    return serving


def _sorted_out(names: Sequence[str], root: Path) -> tuple[list[Run], list[str]]:
    """Runs and models, each once."""
    if not names:
        raise InputError("serve: no RUN or MODEL was named.")
    runs: dict[Path, Run] = {}
    models: dict[str, None] = {}
    for name in names:
        if is_run(name, root):
            run = Run.open(name, root)
            runs[run.path.resolve()] = run
        else:
            models[name] = None
    called: dict[str, Run] = {}
    for run in runs.values():
        other = called.setdefault(run.path.resolve().name, run)
        if other is not run:
            raise InputError(f"{run.path} and {other.path} have one name, by which both would be asked. Rename one.")
    return list(runs.values()), list(models)


def _one_base(runs: Sequence[Run], models: Sequence[str], *, offline: bool) -> Located:
    """The base that everything named is on, quantised or not. Raises InputError where there are several."""
    bases: dict[tuple[str, str | None, str], list[str]] = {}
    found: list[Located] = []
    for name in models:
        found.append(locate.locate(name, offline=offline))
        bases.setdefault((str(found[-1].path.resolve()), found[-1].revision, ""), []).append(name)
    for run in runs:
        recipe = run.recipe()
        if run.model_path.exists():
            found.append(locate.locate(str(run.model_path), offline=True))
        else:
            found.append(locate.locate(recipe.model, revision=recipe.revision, offline=offline))
            if run.adapter_path.exists():
                loading.refuse_other_base(run, found[-1], load.fingerprint(found[-1]))
        bases.setdefault((str(found[-1].path.resolve()), found[-1].revision, _form(recipe)), []).append(str(run.path))
    if len(bases) > 1:
        several = "; ".join(f"{', '.join(users)} on {path}{form}" for (path, _, form), users in bases.items())
        raise InputError(
            f"one base is served with its adapters, but these are on {len(bases)}: {several}. Serve apart."
        )
    return found[0]


def _form(recipe: Recipe) -> str:
    """How a run has the weights of its base, in words; empty: as they are."""
    method = recipe.method
    if not isinstance(method, QloraMethod):
        return ""
    return f" in {method.quant}{' with scales in 8 bits' if method.double_quant else ''}"


def _load_base(
    serving: Serving, base: Located, first: Run | None, runs: Sequence[Run], *, is_named: bool, note: Note
) -> None:
    """The base, loaded once, and the adapters of `runs` on it."""
    is_full = first is not None and first.model_path.exists()
    if first is not None and is_full:
        _add(serving, loading.load_run(first), first, note)
        return
    speaker = loading.load_model(base.name) if first is None else loading.load_base(first)
    if speaker.head != "next_token":
        if len(runs) > 1:
            raise InputError(f"{runs[1].path}: of encoders one is served at a time. Serve it apart.")
        _add(serving, speaker if first is None else loading.tune(speaker, first), first, note)
        return
    if first is not None and len(runs) == 1 and isinstance(first.recipe().method, PeftMethod):
        _add(serving, loading.tune(speaker, first), first, note)
        return
    adapters = Adapters(speaker.model)
    for run in runs:
        _take(serving, adapters, speaker, run, note)
    adapters.install()
    if first is None:
        _add_voice(serving, speaker, _name_of(base), None, None)
    else:
        _add_base(serving, speaker, base, is_named=is_named, note=note)
    serving.decoder = _decoder(speaker, adapters, note)
    proofs.prove(serving.voices.values(), serving.decoder, note)


def _take(serving: Serving, adapters: Adapters, base: Speaker, run: Run, note: Note) -> None:
    """One run's adapter, and the voice that speaks through it."""
    recipe = run.recipe()
    if recipe.precision != base.recipe.precision:
        note(f"{run.path}: tuned in {recipe.precision}, served in {base.recipe.precision}, as the first run was")
    tuned = loading.tune(base, run)
    if type(tuned.attachment) is not LoraAttachment:
        raise InputError(
            f"{run.path}: method {recipe.method.name}, of which no part stands beside others. Serve apart."
        )
    if tuned.note:
        note(f"{run.path}: {tuned.note}")
    name = run.path.resolve().name
    adapters.take(name, tuned.attachment)
    tokenizer = base.renderer.tokenizer
    if run.adapter_path.exists():
        tokenizer = load.load_tokenizer(Located("folder", run.adapter_path, str(run.adapter_path)), None)
    renderer = loading.make_renderer(recipe, tokenizer, model_kind(base.located))
    _add_voice(serving, replace(base, renderer=renderer, recipe=recipe), name, name, run)


def _add(serving: Serving, speaker: Speaker, run: Run | None, note: Note) -> None:
    """A model with nothing beside it."""
    name = _name_of(speaker.located) if run is None else run.path.resolve().name
    if speaker.note:
        note(f"{name}: {speaker.note}")
    if speaker.head == "next_token":
        _add_voice(serving, speaker, name, None, run)
        serving.decoder = _decoder(speaker, Adapters(speaker.model), note)
        proofs.prove(serving.voices.values(), serving.decoder, note)
    elif speaker.head == "masked_token":
        embedder = Embedder(_served(speaker, name, run, "embeddings"), speaker)
        _, _, most = embedder.how
        serving.embedders[name] = replace(embedder, served=replace(embedder.served, max_tokens=most))
    else:
        serving.labellers[name] = Labeller(_served(speaker, name, run, "labels"), speaker)
        proofs.prove_rows(run, speaker.renderer, note)


def _add_base(serving: Serving, speaker: Speaker, base: Located, *, is_named: bool, note: Note) -> None:
    """The untouched model, asked with its own tokenizer and template."""
    name = _name_of(base)
    try:
        recipe, tokenizer = loading.as_it_is(base)
        renderer: Renderer = loading.make_renderer(recipe, tokenizer, model_kind(base))
    except ModelError as error:
        if is_named:
            raise
        note(f"{name}: the base itself is not served: {error}")
        return
    if speaker.packed:
        note(f"{name}: the base itself answers quantised too, as its runs were tuned on it")
    _add_voice(serving, replace(speaker, renderer=renderer, recipe=recipe), name, None, None)


def _add_voice(serving: Serving, speaker: Speaker, name: str, adapter: str | None, run: Run | None) -> None:
    if name in serving.voices:
        raise InputError(f"{name}: a run and its base have one name, by which both would be asked. Rename the run.")
    vocab_size = int(speaker.model.get_output_embeddings().weight.shape[0])
    served = _served(speaker, name, run, "text")
    serving.voices[name] = Voice(served, speaker.renderer, vocab_size, adapter, run)


def _served(speaker: Speaker, name: str, run: Run | None, answers: str) -> Served:
    created = run.created if run is not None else _written(speaker.located)
    return Served(
        name=name,
        task=speaker.renderer.task_name,
        answers=answers,  # type: ignore[arg-type]
        max_tokens=speaker.room,
        is_base=run is None or run.model_path.exists(),
        created=int(created),
        labels=speaker.labels.names if speaker.labels is not None else (),
    )


def _written(located: Located) -> float:
    return max(path.stat().st_mtime for path in [located.path, *located.path.parent.glob(f"{located.path.name}/*")])


def _name_of(base: Located) -> str:
    """What a base is asked by: its id on the hub, or the name of its folder or file."""
    if base.kind == "hub":
        return base.name
    return base.path.stem if base.is_gguf else base.path.resolve().name


def _decoder(speaker: Speaker, adapters: Adapters, note: Note) -> Decoder:
    """All texts in one pass, where the model answers so as it does alone; else one by one."""
    reason = "it is an encoder–decoder"
    if not speaker.model.config.is_encoder_decoder:
        reason = proofs.why_apart(speaker.model, adapters)
    if not reason:
        return Together(speaker.model, adapters)
    note(f"answers are decoded one by one, not together: {reason}")
    return Apart(speaker.model, adapters)
