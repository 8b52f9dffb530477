"""Resolve a run before its model is loaded: each "auto" decided, needs estimated, refused if too large."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.prompts import begun_answer
from tunesmith.data.row_targets import write_targets
from tunesmith.data.sampler import StepSampler, copies, pass_cost
from tunesmith.data.splits import CacheDirs, Splits, encode_rows, source_ids, times_per_epoch
from tunesmith.environment.process import resident_bytes
from tunesmith.errors import DataError, DoesNotFitError, ModelError, RecipeError, one_line
from tunesmith.evaluation import general
from tunesmith.evaluation.metrics import HEAD_METRICS
from tunesmith.evaluation.scores import labels_headline
from tunesmith.graders import schema as graders
from tunesmith.graders.prompts import read_as
from tunesmith.inference.reward_scores import weights_of, weights_of_any
from tunesmith.models.memory import free_cached_memory
from tunesmith.parallel.world import World
from tunesmith.phrases import percent, plural
from tunesmith.planning import devices
from tunesmith.planning.decisions import Decisions, with_options
from tunesmith.planning.defaults import (
    HELD,
    ROWS_OF_A_DEVICE,
    Facts,
    checkpoint_every,
    decide,
    decide_measuring,
    rate_notes,
    total_steps,
)
from tunesmith.planning.devices import Device
from tunesmith.planning.drawn import grade_seconds
from tunesmith.planning.fit import fit, gib, nearest, refuse, refuse_shard, why_whole, with_fewer_streams
from tunesmith.planning.forecast import Forecast, Forecaster, measured_tokens
from tunesmith.planning.memory import TORCH_DTYPES
from tunesmith.planning.tower import Shown
from tunesmith.recipe.docs import changed
from tunesmith.recipe.schema import EvaluationOptions, Recipe, Train, resolved
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS, partner_tokens
from tunesmith.training.image_parts import decide_seeing, forecast_notes
from tunesmith.training.inputs import Inputs, find_inputs
from tunesmith.training.planned_answers import as_answers, streams_of
from tunesmith.training.served_teacher import ServedTeacher
from tunesmith.training.shared_prefixes import decide_sharing, image_token_of, with_shared_prefixes
from tunesmith.training.teacher import notes_on_teacher
from tunesmith.types import Choice, HeadName, JsonObject, Layout, OnProgress

LARGE_CHECKPOINT = 256 * 2**20
"""Bytes of a checkpoint from which on the speed of the disk is measured."""
FULL, MOST_OF_A_DEVICE = 0.75, 64
"""Share of a step in which cards compute, below which a note says why; rows of a device beyond any use."""
FEW_TRAIN_ROWS, MANY_TIMES = 20, 20
"""Fewer training rows than this, learnt so often or more, are learnt by heart."""


@dataclass
class ResolvedRun:
    """A run before its model is loaded: `plan` and `check` end here, and a `Setup` is made of it."""

    recipe: Recipe
    """Resolved: no "auto" is left."""
    choices: list[Choice]
    notes: list[str]
    """Notes on the forecast; inputs and rows have their own."""
    inputs: Inputs
    rows: Splits
    user_options: JsonObject
    """Options of the user's recipe that differ from the defaults."""
    forecast: Forecast | None
    """None where none could be made, which a note says, and for a resumed run, whose choices are made."""
    root: Path
    """The folder of runs."""
    offline: bool

    @cached_property
    def served(self) -> ServedTeacher | None:
        """Its teacher, if that is at an address."""
        distil = self.recipe.distil
        return ServedTeacher(distil, self.inputs.renderer.tokenizer, self.offline) if distil.is_served else None


def resolve_run(
    recipe: Recipe,
    *,
    root: Path,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    run: Run | None = None,
    device: Device | None = None,
    world: World | None = None,
    apart: bool = False,
) -> ResolvedRun:
    """Encode rows and decide. `device`: another machine's, for a plan. `world`: the group that trains; ranks
    but the first get a recipe in which everything is decided. `apart`: a card is measured by another process.

    Raises:
        RecipeError, DataError, ModelError: what was given cannot be used.
        DoesNotFitError: it needs more memory than there is, and the recipe says to refuse that.
    """
    # 1. What the user set, on the machine in question.
    user_options, world = changed(recipe), world or World()
    if device is not None:  # what is here decides the rest
        precision = device.precision if recipe.precision == "auto" else recipe.precision
        recipe = recipe.model_copy(update={"device": "cpu", "precision": precision, "threads": 1})
    decisions = Decisions(recipe)
    # 2. What model, devices and the first row decide.
    processes = _on_devices(decisions, world)
    inputs = find_inputs(decisions, root=root, offline=offline)
    if world.size > 1 and recipe.devices != world.size:
        decisions.show(Choice("devices", world.size, "processes of this group, one device each"))
    refuse_shard(inputs.recipe, inputs.located, inputs.kind)
    # 3. The rows, and what they decide.
    cache_dirs = CacheDirs(root / ".rows", root / ".rows")  # shared by the runs below `root`
    if run is not None and (world.is_first or run.rows_path.is_dir()):
        cache_dirs = CacheDirs(run.rows_path / "train", run.rows_path / "held_out")
    rows = _rows(decisions, inputs, cache_dirs, on_progress)
    facts = _facts(inputs, rows, device, processes, recipe=decisions.recipe)
    free_tokens, is_here = decisions.is_open("train.tokens_per_pass"), device is None
    _decide(decisions, inputs, rows, facts)
    # 4. What memory decides, by a forecast; in a resumed run, or on another rank, it is decided already.
    notes: list[str] = []
    forecast: Forecast | None = None
    if run is None and world.is_first:
        on_progress("plan", 0, 1)
        recipe = decisions.folded()
        notes = rate_notes(recipe.method, recipe.optim, TASKS[rows.task], facts)
        notes += [*notes_on_repeats(recipe.train, facts), *notes_on_teacher(recipe, rows)]
        notes += _notes_on_prompts(rows, inputs)
        known: dict[str, Any] = {"notes": notes, "free_tokens": free_tokens}
        known |= {"other_models": other_weights(recipe, root, offline=offline)}
        with _forecasting(notes):
            device = device or _device_here(notes, recipe, world, apart=apart)
            folder = root if is_here else None
            forecast = _forecast(decisions, inputs, rows, device=device, folder=folder, **known)
        on_progress("plan", 1, 1)
    for key, value in (("shard", False), ("train.checkpointed_layers", 0)):  # what forecasts decide
        if decisions.is_open(key):
            decisions.set(key, value)
    # 5. One recipe.
    choices = [choice for choice in decisions.choices if is_here or choice.key not in ("device", "threads")]
    return ResolvedRun(decisions.folded(), choices, notes, inputs, rows, user_options, forecast, root, offline)


def _facts(inputs: Inputs, rows: Splits, device: Device | None, processes: int, *, recipe: Recipe) -> Facts:
    """Facts for the decisions after the rows. `device`: another machine's."""
    (store, rows_I), (held, held_I) = rows.sides
    task, lengths_I = TASKS[rows.task], store.lengths[rows_I]
    headline = "loss" if rows.labels is None else labels_headline(task, rows.labels)
    if task.samples:  # each prompt takes its answers' tokens in a step
        headline, *_ = task.headline_metrics
        lengths_I = (lengths_I + recipe.reinforce.max_new_tokens) * recipe.reinforce.samples
    return Facts(
        inputs.size.num_params,
        device.kind if device else recipe.device,
        inputs.kind,
        lengths_I=lengths_I,
        held_targets_I=held.targets[held_I],
        held_tokens=measured_tokens(rows, recipe.embed.documents),
        processes=processes,
        rows_per_epoch=rows_per_epoch(rows, recipe.seed),
        headline=headline,
    )


@contextmanager
def _forecasting(notes: list[str]) -> Iterator[None]:
    """A block that makes a forecast: errors of the input are raised, all others become a note."""
    try:
        yield
    except (RecipeError, DataError, DoesNotFitError):
        raise
    except Exception as error:  # a machine or model unknown to the forecast: the run itself may well go on
        why = one_line(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {one_line(error)}"
        notes.append(f"memory and time could not be forecast: {why}")


def _on_devices(decisions: Decisions, world: World) -> int:
    """Decide the number of devices, as many as the group has; how many processes of it are on this machine."""
    if world.size > 1:
        decisions.set("devices", world.size)
        return world.place.local_size
    if decisions.is_open("devices"):
        decisions.set("devices", 1)
    return resolved(decisions.recipe.devices)


def _decide(decisions: Decisions, inputs: Inputs, rows: Splits, facts: Facts) -> None:
    """Decide everything that rows decide; evaluations by epoch become a number of steps."""
    decide_seeing(decisions, rows)
    decide(decisions, facts)
    if rows.is_prompts and decisions.is_open("reinforce.streams"):
        options = decisions.recipe.reinforce
        prompts = resolved(decisions.recipe.train.rows_per_step) * options.updates
        of_device = -(-prompts // resolved(decisions.recipe.devices)) * options.samples
        decisions.set("reinforce.streams", streams_of(of_device, facts.device))
    train, seed = decisions.recipe.train, decisions.recipe.seed
    steps_per_epoch = sampler_of(train, rows, "padded", "cpu", seed=seed).steps_per_epoch  # same on any layout
    if decisions.recipe.evaluation.every == "epoch":
        why = next((choice.reason for choice in decisions.choices if choice.key == "evaluation.every"), "")
        reason = f"the steps of an epoch: {why}" if why else "the steps of an epoch"
        decisions.decide(Choice("evaluation.every", steps_per_epoch, reason))
    decide_measuring(
        decisions,
        facts,
        steps=total_steps(train, steps_per_epoch),
        held_tokens=facts.held_tokens,
        writes=inputs.head == "next_token",
        speaks=_speaks(inputs),
    )


def _steps_of(
    recipe: Recipe, layout: Layout, model: Any, *, inputs: Inputs, rows: Splits, kind: str, size: int
) -> StepSampler:
    """The steps of a run on `size` devices of a kind, for a forecast."""
    sampler = replace(sampler_of(recipe.train, rows, layout, kind, seed=recipe.seed), part=(0, size))
    if rows.is_prompts:
        return replace(sampler, rows_per_step=sampler.rows_per_step * recipe.reinforce.samples)
    if recipe.distil.on_policy:  # whose answers share nothing
        return sampler
    choice = decide_sharing(recipe, inputs, rows.store, model, sampler)
    shares = choice is not None and bool(choice.value)
    return with_shared_prefixes(sampler, rows.store, image_token_of(inputs, rows.store)) if shares else sampler


def _forecast(
    decisions: Decisions,
    inputs: Inputs,
    rows: Splits,
    *,
    device: Device,
    folder: Path | None,
    free_tokens: bool,
    notes: list[str],
    other_models: int,
) -> Forecast:
    """Decide what memory decides, and forecast the run with it. Raises DoesNotFitError; where it raises
    anything, nothing is decided, but `notes` may have got some. `folder`: see `_saving`. `free_tokens`: whether
    memory may decide train.tokens_per_pass; `other_models`: bytes of their weights."""
    recipe = decisions.folded()
    rows, answer_notes = as_answers(rows, recipe.reinforce, recipe.distil)
    notes += answer_notes
    size = resolved(recipe.devices)
    refuse_shard(recipe, inputs.located, inputs.kind)  # the precision is known now
    can_split = recipe.shard == "auto" and not rows.is_prompts and not why_whole(recipe, inputs.located, inputs.kind)
    recipe = with_options(recipe, {"shard": False}) if recipe.shard == "auto" else recipe
    free_cached_memory()  # the process does not hold what measuring the machine's speed took
    forecaster = Forecaster(
        located=inputs.located,
        kind=inputs.kind,
        head=inputs.head,
        rows=rows,
        sampler_of=partial(_steps_of, inputs=inputs, rows=rows, kind=device.kind, size=size),
        device=device,
        base=resident_bytes(),
        others=other_models,
        general_tokens=_general_tokens(inputs, recipe.evaluation),
        grade=grade_seconds(graders.load(recipe.grader_at)) if rows.is_prompts else 0.0,
        shown=Shown.of(rows, inputs.renderer.placeholders),
    )
    whole, predict, longest = recipe, forecaster.forecast, int(rows.store.lengths[rows.train_rows].max())
    has_open_streams = rows.is_prompts and inputs.recipe.reinforce.streams == "auto"
    whole, fewer_streams = with_fewer_streams(whole, predict) if has_open_streams else (whole, [])
    recipe, fitted, forecast = fit(whole, predict, longest=longest, free_tokens=free_tokens)
    fitted = [*fewer_streams, *fitted]
    if not forecast.fits and can_split:
        needed = f"a whole model on each device would need {gib(forecast.memory.total)} of {gib(device.room)}"
        choice = Choice("shard", True, f"{needed}: the layers' weights are split over {size}")
        split = with_options(whole, {"shard": True})
        with suppress(RecipeError):  # of a model whose layers cannot be split
            split, others, other = fit(split, predict, longest=longest, free_tokens=free_tokens)
            if other.fits:
                recipe, fitted, forecast = split, [choice, *others], other
    if not forecast.fits:
        forecast = replace(forecast, alternatives=nearest(recipe, predict, longest=longest))
        notes.append(_refused(forecast, recipe.memory))
    steps = total_steps(recipe.train, forecast.sampler.steps_per_epoch)
    if inputs.recipe.checkpoint.every == "auto" and (saving := _saving(steps, forecast, folder)):
        recipe, fitted = with_options(recipe, {saving.key: saving.value}), [*fitted, saving]
        forecast = predict(recipe)
    if not rows.is_prompts:  # which are several answers each
        notes.extend(_few_rows(resolved(recipe.train.rows_per_step), size, forecast))
    decisions.decide(*fitted)
    notes += forecast_notes(forecast, forecaster.shown)
    return forecast


def _refused(forecast: Forecast, memory: str) -> str:
    """A note on a run that does not fit. Raises DoesNotFitError instead if the option `memory` says so."""
    refusal = refuse(forecast)
    if memory == "refuse":
        raise refusal
    return f"{refusal} More: tunesmith explain {refusal.topic}"


def _device_here(notes: list[str], recipe: Recipe, world: World, *, apart: bool) -> Device:
    """This machine's device, with the memory that a rank may take. What people should know goes into notes."""
    threads, dtype = resolved(recipe.threads), TORCH_DTYPES[resolved(recipe.precision)]
    if recipe.device == "cpu" and recipe.precision == "float16":
        slow = "a processor takes at least ten times as long as in float32, and the time foreseen is for float32"
        notes.append(f"precision: float16: {slow}. Leave precision out.")
    name = world.card or resolved(recipe.device)
    measure = devices.here_apart if apart and name.startswith("cuda") else devices.here
    device = measure(name, threads=threads, dtype=dtype)
    notes.extend(filter(None, [device.in_use, _unlike(world)]))
    room = devices.share_of_room(device.kind, device.room, resolved(recipe.devices))
    return replace(device, room=min((int(rank["room"]) for rank in world.joined), default=room))


def other_weights(recipe: Recipe, root: Path, *, offline: bool) -> int:
    """Bytes of the weights of other models that are in memory with the one that is trained: of
    reward runs, and of a teacher. Raises InputError for a grader that names no run, and ModelError
    for a teacher that is not there."""
    num_bytes = 0
    if recipe.reinforce.grader is not None:
        num_bytes += weights_of(graders.load(recipe.grader_at), root, offline=offline)
    if recipe.distil.teacher is not None and not recipe.distil.is_served:
        try:
            num_bytes += weights_of_any(recipe.teacher_at, root, offline=offline)
        except ModelError as error:
            raise ModelError(f"distil.teacher: {error}") from None
    return num_bytes


def notes_on_repeats(train: Train, facts: Facts) -> list[str]:
    """A note where few rows are trained so often that a model knows them by heart."""
    rows, rows_per_step = len(facts.lengths_I), resolved(train.rows_per_step)
    steps = total_steps(train, facts.steps_per_epoch(rows_per_step))
    times = steps * min(rows_per_step, rows) // rows
    if rows >= FEW_TRAIN_ROWS or times < MANY_TIMES:
        return []
    which = "1 training row is" if rows == 1 else f"{rows} training rows are"
    return [
        f"{which} learnt {times:,} times in {plural(steps, 'step')}: a model has so few rows by heart soon, and learns "
        "little that helps with others. Give more rows, or stop earlier with train.max_steps"
    ]


def _notes_on_prompts(rows: Splits, inputs: Inputs) -> list[str]:
    """A note on what the template begins of each answer, which no grader finds in its text."""
    if not rows.is_prompts:
        return []
    store, rows_I = rows.sides[0]
    begun = begun_answer(inputs.renderer.tokenizer, store.row(int(rows_I[0])).ids.tolist())
    if not begun:
        return []
    return [
        f"the chat template opens {begun.strip()} at the end of each prompt, so answers go on behind it and lack it: "
        'a grader has it as sample["prefix"]'
    ]


def _saving(steps: int, forecast: Forecast, folder: Path | None) -> Choice | None:
    """How often a run is saved, by what a step and a checkpoint will take; None where that is not known.
    `folder`: of runs, on the disk that counts; None: another machine's."""
    if forecast.duration is None:
        return None
    speed, num_bytes = forecast.device.written, forecast.sizes.checkpoint
    if folder is not None and num_bytes > LARGE_CHECKPOINT:
        speed = devices.written(folder)
    return Choice(
        "checkpoint.every",
        *checkpoint_every(
            steps,
            step_seconds=forecast.duration.prices["training"],
            saving_seconds=num_bytes / speed,
        ),
    )


def _unlike(world: World) -> str:
    """A note where the ranks have cards of several kinds."""
    if len(world.cards) < 2:
        return ""
    return (
        f"the cards are unlike: {', '.join(world.cards)}: each step waits for the slowest, the smallest memory "
        "counts for all, and as unlike cards may round unlike, all take rank 0's weights at every checkpoint"
    )


def _few_rows(rows: int, size: int, forecast: Forecast) -> list[str]:
    """A note where a step has too few rows to fill the devices, with the share of it in which they compute."""
    share = forecast.busy
    if size == 1:
        return []
    wanted, part = ROWS_OF_A_DEVICE * size, "few rows each: some wait for others"
    if forecast.device.kind != "cpu" and share is not None:
        wanted = math.ceil(rows * FULL / share)
        part = f"{rows / size:.3g} rows each: they compute {percent(share, 0)} of a step, and wait in the rest"
    if rows >= wanted:
        return []
    way = f"{wanted:,} would fill them, but are another update: fewer steps, each of more rows"
    if wanted > MOST_OF_A_DEVICE * size:
        way = "This model is too small to fill them all: fewer devices take about as long"
    return [f"train.rows_per_step is {rows}, which leaves {size} devices {part}. {way}"]


def _speaks(inputs: Inputs) -> bool:
    return general.can_generate(inputs.head, is_causal=inputs.kind == "causal", max_tokens=inputs.size.max_tokens)


def _general_tokens(inputs: Inputs, evaluation: EvaluationOptions) -> int:
    """Tokens of the general text that a run reads; 0 where it reads none, or the model cannot continue it."""
    if not resolved(evaluation.general) or not _speaks(inputs):
        return 0
    return sum(len(row.ids) for row in general.general_rows(inputs.renderer.tokenizer))


def _rows(decisions: Decisions, inputs: Inputs, cache_dirs: CacheDirs, on_progress: OnProgress) -> Splits:
    """The rows, with what is learnt from them; options that follow from them are decided. Raises InputError for
    a grader that cannot be read, or that names a field which the first row lacks."""
    recipe = inputs.recipe
    grader = graders.load(recipe.grader_at) if TASKS[resolved(recipe.task)].samples else None
    rows = encode_rows(
        recipe.data,
        inputs.renderer,
        cache_dirs=cache_dirs,
        max_held=HELD if recipe.evaluation.max_rows == "auto" else recipe.evaluation.max_rows,
        task=resolved(recipe.task),
        class_weights=recipe.train.class_weights,
        own_classes=inputs.own_classes,
        on_progress=on_progress,
    )
    if section := TASKS[rows.task].section:
        rows.choices.extend(section.from_rows(getattr(recipe, section.name), rows.sides))
    decisions.decide(*rows.choices)
    recipe = decisions.recipe
    masked = recipe.train.masked if inputs.head == "masked_token" else None
    write_targets(rows.sides, labels=rows.labels, masked=masked, partner_tokens=partner_tokens(recipe))
    _check_evaluation(recipe.evaluation, inputs.head, rows)
    if grader is not None:
        store, rows_I = rows.sides[0]
        first = next(iter(rows.prompts(store, rows_I[:1]).values())).kept
        rows.notes.extend(read_as(first))
        graders.check_variables(grader, first, "reinforce.grader")
    return rows


def _check_evaluation(evaluation: EvaluationOptions, head: HeadName, rows: Splits) -> None:
    if evaluation.every not in (None, "auto") and len(rows.held_rows) == 0:
        raise RecipeError("evaluation.every: nothing is held out, so nothing can be measured on the way. Give --eval.")
    keys = HEAD_METRICS[TASKS[rows.task].outcome or (head if rows.labels is None else rows.labels.kind)]
    if evaluation.metric not in ("auto", *keys):
        raise RecipeError(
            f"evaluation.metric: {evaluation.metric!r} is not measured here. There are: {', '.join(keys)}."
        )


def sampler_of(train: Train, rows: Splits, layout: Layout, device: str, *, seed: int) -> StepSampler:
    """The sampler that decides which rows make which step, for a device of this kind."""
    weights_I, sources_I = _weights(rows)
    return StepSampler(
        rows_I=rows.train_rows,
        weights_I=weights_I,
        sources_I=sources_I,
        lengths_I=rows.store.lengths_in(layout)[rows.train_rows],
        rows_per_step=resolved(train.rows_per_step),
        tokens_per_pass=resolved(train.tokens_per_pass),
        layout=layout,
        pass_cost=pass_cost(device),
        seed=seed,
        targets_I=rows.store.targets[rows.train_rows] if layout == "encoder_decoder" else None,
    )


def rows_per_epoch(rows: Splits, seed: int) -> int:
    """Rows of an epoch of such a sampler, which depend on no decision."""
    weights_I, sources_I = _weights(rows)
    return int(copies(weights_I, sources_I, seed=seed, epoch=0).sum())


def _weights(rows: Splits) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
    """Times that an epoch takes each training row, and the number of its source where sources have shares."""
    file_I = rows.store.file_index[rows.train_rows]
    sources_I = source_ids(rows.data)[file_I] if rows.data.mix == "shares" else None
    return times_per_epoch(rows.data, rows.trained_per_file)[file_I], sources_I
