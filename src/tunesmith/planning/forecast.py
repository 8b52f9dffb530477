"""Estimate the needs of a run before its model is loaded, by formula: memory (`memory`), time, disk.

Time is a list of kinds of work, each with a count and a price in seconds. A probe measures the prices and keeps
the counts. The price of a micro-batch = operations / operations a second, in products and in attention, + bytes
moved / bytes a second + launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tunesmith.data.collate import pads_to_multiple
from tunesmith.data.dataset import RowStore
from tunesmith.data.sampler import StepSampler, micro_batches_of, padded_size
from tunesmith.data.splits import Splits
from tunesmith.evaluation.generate import has_short_answers, new_tokens_for
from tunesmith.evaluation.predict_rows import MOST_HIGH_LOSS, sample_rows
from tunesmith.generation.scheduler import places_room
from tunesmith.generation.writer import cache_tokens, written_together
from tunesmith.methods import METHODS
from tunesmith.models.packing_check import layouts_of
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.short_row_attention import LONGEST
from tunesmith.parallel.exchange import BUCKET
from tunesmith.planning import drawn
from tunesmith.planning.defaults import total_steps
from tunesmith.planning.devices import GROUP, Device, link
from tunesmith.planning.memory import Heavy, Load, Memory, Sizes, peak, sizes_of
from tunesmith.planning.tower import Shown, Tower
from tunesmith.recipe.schema import CheckpointOptions, EvaluationOptions, Recipe, resolved
from tunesmith.tasks import TASKS, has_prepass
from tunesmith.tasks.task import Task
from tunesmith.types import HeadName, JsonObject, Layout, ModelKind

Kind = Literal["starting", "teaching", "training", "seeing", "measuring", "answering", "grading", "saving", "finishing"]
"""Kinds of work in a run; docs/guide/planning.md has a table of what is counted for each."""
WORK_KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "seeing")
"""Kinds of work in every run: where rows have images, `seeing` is another."""
SPREAD = 0.5
"""Share by which a total by formula alone may be off, either way."""
MOVED = 13
"""Times that a step reads or writes the inputs and outputs of the linear layers outside of matrix products."""
OPERATIONS_STARTED = 150
"""Operations that a layer starts in a step."""
DECODE_LAUNCH = 1e-3
"""Seconds a layer for the next token of some answers."""
STARTING_S, LOADED, LOADED_TO_CARD = 12.0, 100e6, 500e6
"""Libraries, tokenizer and plan on two cores; bytes of weights that are read and hashed in a second, as
measured on such a machine, and as taken for one with a card, whose disk is not measured."""
FINISHING_S = 4.0
"""Report and end of the process on two cores."""
MOST_STEPS_TRIED, MOST_SHARING_STEPS = 1000, 64
"""Steps, evenly spread, among which the heaviest is sought; fewer if shared prefixes have to be found."""


@dataclass(frozen=True, slots=True)
class Duration:
    """A whole run, from the start of its process to its end."""

    counts: Mapping[Kind, float]
    """Times that each kind of work is done."""
    prices: Mapping[Kind, float]
    """Seconds of each, once; for `training` of a mean step."""
    spread: float = SPREAD
    """Share by which the total may be off, either way."""
    busy: float = 0.0
    """Share of the processor that other programs take: a run may take so much longer, beyond `total`."""

    @property
    def total(self) -> float:
        return sum(count * self.prices[kind] for kind, count in self.counts.items())

    def values(self) -> JsonObject:
        """As JSON."""
        each = [(kind, count, self.prices[kind]) for kind, count in self.counts.items()]
        work = {kind: {"count": count, "price": price, "seconds": count * price} for kind, count, price in each}
        return {"total": self.total, "spread": self.spread, "busy": self.busy, "work": work}


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that a run writes."""

    rows: int
    checkpoints: int
    """Checkpoints that are kept, and the one being written."""
    result: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """An estimate of what a run will need."""

    memory: Memory
    """At its highest."""
    duration: Duration | None
    """None for a device whose speed is not known."""
    disk: Disk
    device: Device
    heavy: Heavy
    sampler: StepSampler
    sizes: Sizes
    recomputed: int
    busy: float | None = None
    """Share of a mean step in which the device computes; None where its speed is not known."""
    exchange_seconds: float = 0.0
    """Seconds of a step on several devices for sums of gradients and split layers, overlapping it."""
    alternatives: Sequence[tuple[JsonObject, int]] = ()
    """The nearest plans that fit, for a run that does not: options to change, and bytes of each."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.room

    def values(self) -> JsonObject:
        """As JSON."""
        heavy, devices, disk = self.heavy, self.sampler.part[1], asdict(self.disk)
        group = {"devices": devices, "exchange_seconds": self.exchange_seconds, "split": self.sizes.gathered}
        return {
            "memory": {"total": self.memory.total, "parts": self.memory.parts()},
            "room": self.device.room,
            "alternatives": [{"settings": change, "total": total} for change, total in self.alternatives],
            "pass": {
                "step": heavy.step,
                "rows": len(heavy.rows),
                "tokens": sum(self.sampler.lengths_of(heavy.rows)),
                "targets": heavy.load.targets,
            },
            "layers": {"all": self.sizes.recomputable, "recomputed": self.recomputed},
            "seconds": None if self.duration is None else self.duration.values(),
            "disk": {**disk, "total": sum(disk.values())},
            **({"group": group} if devices > 1 else {}),
        }


@dataclass
class Forecaster:
    """Forecasts for one model and one set of rows, for any recipe. Sizes and heaviest batches are cached."""

    located: ModelRef
    kind: ModelKind
    head: HeadName
    rows: Splits
    sampler_of: Callable[[Recipe, Layout, nn.Module], StepSampler]
    """(recipe, layout, model without weights) → the steps."""
    device: Device
    base: int
    """Bytes that the process holds with its libraries and without a model."""
    others: int = 0
    """Bytes of the weights of other models, which stay on the device."""
    general_tokens: int = 0
    """Tokens of the general text; 0 if it is not measured."""
    grade: float = 0.0
    """Seconds that a grade takes of a run, see `drawn.grade_seconds`."""
    shown: Shown | None = None
    """The images of the rows; None: they have none."""
    _sizes: dict[str, tuple[Sizes, nn.Module]] = field(default_factory=dict)
    _steps: dict[tuple[str, int], tuple[StepSampler, Heavy, Load]] = field(default_factory=dict)

    def forecast(self, recipe: Recipe) -> Forecast:
        """Raises ModelError if no model can be made from its config, and what attaching the method raises."""
        sizes, sampler, heavy, look = self._looked_up(recipe)
        layers, size = recipe.train.checkpointed_layers, sampler.part[1]
        recomputed = 0 if layers == "auto" else min(layers, sizes.recomputable)
        base = self.base if self.device.kind == "cpu" else 0
        if size > 1:
            summed = min(4 * BUCKET, sizes.gradients)  # at once, in float32
            base += summed + (GROUP if self.device.kind == "cuda" else 0)
        is_adapter = METHODS[recipe.method.name].is_adapter
        steps = total_steps(recipe.train, sampler.steps_per_epoch)
        keeps_best = recipe.evaluation.every is not None
        disk = Disk(
            rows=self.rows.store.summary.arrow_bytes,
            checkpoints=kept_checkpoints(recipe.checkpoint, steps, keeps_best=keeps_best) * sizes.checkpoint,
            result=4 * sizes.trained_parameters if is_adapter else sizes.weights,
        )
        is_shared = self.rows.is_prompts and recipe.kernels == "fast"
        load, micro_batches = self._mean(sampler, answers=recipe.reinforce.samples if is_shared else 1)
        # A gradient goes out and back once, split layers come twice a micro-batch, their gradients go once.
        share = (size - 1) / size / link(self.device)
        summing = 2 * sizes.gradients * share
        gathering = micro_batches * (2 + (sizes.elsewhere > 0)) * sizes.gathered * share
        kept_tokens = self._kept_tokens(recipe.evaluation, sampler.tokens_per_pass, recomputed)
        duration, busy, draws = None, None, drawn.draws_of(recipe)
        if self.device.products:
            step = step_seconds(sizes, load, micro_batches=micro_batches, recomputed=recomputed, device=self.device)
            step = max(step, gathering) + summing  # gathered while others compute
            known: dict[str, Any] = {"micro_batches": micro_batches, "steps": steps, "recomputed": recomputed}
            known |= {"result_bytes": disk.result, "joined": sizes.gathered * share}
            duration = self._duration(recipe, sampler, sizes, load, draws, step=step, **known)
            busy = pass_seconds(sizes, load, self.device, recomputed=recomputed) / duration.prices["training"]
        return Forecast(
            memory=peak(
                sizes,
                heavy,
                look,
                recomputed=recomputed,
                device=self.device,
                base=base,
                others=self.others,
                shown=self.shown,
                images=sum(len(self.rows.store.images_at(row)) for row in heavy.rows) if self.shown else 0,
                answered=max(self._drawn_tokens(draws), kept_tokens),
            ),
            duration=duration,
            disk=disk,
            device=self.device,
            heavy=heavy,
            sampler=sampler,
            sizes=sizes,
            recomputed=recomputed,
            busy=busy,
            exchange_seconds=summing + gathering,
        )

    def _duration(
        self,
        recipe: Recipe,
        sampler: StepSampler,
        sizes: Sizes,
        load: Load,
        draws: drawn.Draws | None,
        *,
        step: float,
        steps: int,
        micro_batches: float,
        recomputed: int,
        result_bytes: int,
        joined: float,
    ) -> Duration:
        """The whole run of `steps` steps, in `step` seconds each for what is learnt. `joined`: seconds for
        every token that is written, of layers that are split."""
        prompts = answered_at_once(recipe.evaluation, self.rows, sampler, recomputed)
        prompts = draws.streams if draws and self.rows.is_prompts else prompts
        price = prices(sizes, load, self.device, result_bytes=result_bytes, prompts=prompts)
        price["answering"] += joined
        others = drawn.Prices.of(
            sizes,
            self.device,
            word=word_seconds(sizes, self.device, draws.streams if draws else 1),
            read=price["measuring"],
            others=self.others,
            grade=self.grade,
        )
        looking = load.tokens * price["measuring"] if has_prepass(recipe) and micro_batches > 1 else 0.0
        price["training"] = step + looking + drawn.step_seconds(recipe, draws, load, others)
        price |= {"teaching": others.listed, "grading": others.grade}
        settings: dict[str, Any] = {"steps": steps, "general_tokens": self.general_tokens, "prompts": prompts}
        counted = counts(recipe, self.rows, self.head, **settings, layout=sampler.layout, of_step=load.tokens)
        if self.shown is not None and sizes.tower is not None:
            rows = float(sampler.weights_I.sum()) / sampler.steps_per_epoch / sampler.part[1]
            held = int(self.rows.held_store.lengths[self.rows.held_rows].sum())
            known = {"evaluations": evaluations_of(recipe.evaluation, steps), "held_tokens": held}
            in_step = self.shown.trained * rows
            sizes.tower.add_passes(self.shown, self.device, counted, price, in_step=in_step, **known)
        return Duration(counted, price, busy=self.device.busy)

    def _drawn_tokens(self, draws: drawn.Draws | None) -> int:
        """Most tokens of which keys and values are kept for drawn answers: pools are copied as they grow."""
        return 2 * draws.streams * int(self.rows.store.lengths[self.rows.train_rows].max()) if draws else 0

    def _kept_tokens(self, evaluation: EvaluationOptions, tokens_per_pass: int, recomputed: int) -> int:
        """Most tokens of which keys and values are kept for held-out answers: a pass, or whole prompts."""
        rows_I, store = self.rows.held_rows, self.rows.held_store
        prompts = min(resolved(evaluation.samples), len(rows_I)) if self.head == "next_token" else 0
        if prompts == 0 or self.rows.is_prompts:
            return 0
        lengths_I = store.lengths[rows_I]
        new_tokens = new_tokens_for(store.targets[rows_I], evaluation.sample_tokens)
        written = prompts * places_room(int(lengths_I.max()) + new_tokens)
        cache = cache_tokens(tokens_per_pass, recomputed=recomputed)
        return min(tokens_per_pass, int(lengths_I.sum())) + min(cache, written)

    def _looked_up(self, recipe: Recipe) -> tuple[Sizes, StepSampler, Heavy, Load]:
        """The sizes of a recipe's model, its steps, and the heaviest micro-batches: of any device, and of what
        is measured."""
        key = f"{recipe.method!r} {recipe.precision} {recipe.kernels} {recipe.optim!r} {recipe.shard}"
        if key not in self._sizes:
            rows = self.rows
            sizes, model = sizes_of(recipe, self.located, head=self.head, labels=rows.labels, store=rows.store)
            self._sizes[key] = replace(sizes, tower=Tower.of(model)), model
        sizes, model = self._sizes[key]
        steps_key = (key, resolved(recipe.train.tokens_per_pass))
        if steps_key not in self._steps:
            first, *others = layouts_of(self.kind)
            sampler = self.sampler_of(recipe, first if sizes.can_pack or not others else others[0], model)
            precision = resolved(recipe.precision)
            pads = pads_to_multiple(sampler.layout, device=self.device.kind, precision=precision)
            steps = total_steps(recipe.train, sampler.steps_per_epoch)
            heavy = heaviest(sampler, steps, self.rows.store, is_filled=pads)
            look = self._look(sampler, TASKS[resolved(recipe.task)], recipe.evaluation)
            self._steps[steps_key] = sampler, heavy, look
        return sizes, *self._steps[steps_key]

    def _look(self, sampler: StepSampler, task: Task, evaluation: EvaluationOptions) -> Load:
        """The micro-batch of most targets among held-out rows and training rows measured at the end."""
        rows, loads = self.rows, [Load(0, 0)]
        sides = [(rows.held_store, rows.held_rows)]
        if not task.sees_rows:
            seen_I = sample_rows(rows.store, rows.train_rows, resolved(evaluation.surprising))
            sides.append((rows.store, seen_I))
        settings: dict[str, Any] = {"layout": sampler.layout, "device": self.device.kind}
        for store, rows_I in sides:
            targets_I, some_I = targets_of(store), [int(i) for i in rows_I]
            passes = (
                micro_batches_of(store, some_I, tokens_per_pass=sampler.tokens_per_pass, **settings) if some_I else ()
            )
            for members in passes:
                tokens, targets = (int(count_I[list(members)].sum()) for count_I in (store.lengths, targets_I))
                loads.append(Load(tokens, targets))
        return max(loads, key=lambda load: load.targets)

    def _mean(self, sampler: StepSampler, *, answers: int) -> tuple[Load, float]:
        """The load of a device in a mean step, and its number of micro-batches. `answers`: rows that share
        a prompt, which is computed once for them."""
        weights_I = sampler.weights_I / sampler.steps_per_epoch / sampler.part[1]
        lengths_I = sampler.lengths_I.astype(np.float64)
        load = Load(
            tokens=round(float(lengths_I @ weights_I)),
            targets=round(float(targets_of(self.rows.store)[sampler.rows_I] @ weights_I)),
            squares=round(float(lengths_I**2 @ weights_I)),
        )
        load = drawn.shared(load, answers)
        return load, max(1.0, load.tokens / sampler.tokens_per_pass)


def heaviest(sampler: StepSampler, total_steps: int, store: RowStore, *, is_filled: bool = False) -> Heavy:
    """The micro-batch of most tokens and targets, on any device, among those that will really occur."""
    most = MOST_STEPS_TRIED if sampler.keys_of is None else MOST_SHARING_STEPS
    targets_I, size = targets_of(store), sampler.part[1]
    devices = [replace(sampler, part=(rank, size)) for rank in range(size)]  # each caches the order of an epoch
    candidates: list[Heavy] = []
    for step in sorted({int(step) for step in np.linspace(1, total_steps, min(total_steps, most))}):
        for passes in (device.step(step) for device in devices):
            for rows in passes:
                tokens, lengths = sampler.computed(rows), sampler.lengths_of(rows)
                load = Load(
                    tokens=padded_size(tokens) if is_filled else tokens,
                    targets=int(targets_I[list(rows)].sum()),
                    squares=sum(length * length for length in lengths),
                    short_squares=sum(length * length for length in lengths if length <= LONGEST),
                )
                candidates.append(Heavy(step, rows, len(passes) > 1, load))
    return max(candidates, key=lambda heavy: (heavy.load.tokens + heavy.load.targets, heavy.load.short_squares))


def targets_of(store: RowStore) -> NDArray[np.float64]:
    """[I], positions of each row whose logits are computed: of masked words those that are drawn, and one of a
    row with several classes, which the denominator of the loss counts each."""
    return store.targets.astype(float) if store.branches.has_any else np.minimum(store.denominators, store.targets)


def measured_tokens(rows: Splits, documents: int) -> int:
    """Tokens that are read each time the held-out rows are measured: theirs, and of a task with a pool also
    those of training rows whose documents are searched, up to `documents` in all."""
    held = int(rows.held_store.lengths[rows.held_rows].sum())
    if not TASKS[rows.task].pools or not held:
        return held
    of_held, of_trained = (int((store.branches.counts[rows_I] - 1).sum()) for store, rows_I in reversed(rows.sides))
    share = min(1.0, max(0, documents - of_held) / max(1, of_trained))
    return held + int(share * rows.store.lengths[rows.train_rows].sum())


def saves(every: int, steps: int) -> int:
    """Number of checkpoints, including the one before the first step, without the best evaluation's."""
    return 2 + (steps - 1) // every


def kept_checkpoints(checkpoint: CheckpointOptions, steps: int, *, keeps_best: bool) -> int:
    """Checkpoints that are on the disk at once, including the one that is being written."""
    return min(saves(resolved(checkpoint.every), steps), checkpoint.keep + 1) + keeps_best


def answered_at_once(evaluation: EvaluationOptions, rows: Splits, sampler: StepSampler, recomputed: int) -> int:
    """Prompts of held-out rows that are answered together."""
    if len(rows.held_rows) == 0:
        return 1
    new_tokens = new_tokens_for(rows.held_store.targets[rows.held_rows], evaluation.sample_tokens)
    tokens = float(rows.held_store.lengths[rows.held_rows].mean()) + new_tokens
    if sampler.layout == "packed":
        size = written_together(tokens, cache_tokens(sampler.tokens_per_pass, recomputed=recomputed))
    else:
        size = max(1, int(sampler.tokens_per_pass // tokens))
    return min(size, max(1, resolved(evaluation.samples)), len(rows.held_rows))


def evaluations_of(options: EvaluationOptions, steps: int) -> int:
    """Times that the held-out rows are measured."""
    assert not isinstance(options.every, str), "it is decided with the steps"
    return 2 if options.every is None else 2 + (steps - 1) // options.every + (options.keep == "best")


def counts(
    recipe: Recipe,
    rows: Splits,
    head: HeadName,
    *,
    steps: int,
    general_tokens: int,
    prompts: int = 1,
    layout: Layout = "packed",
    of_step: int = 0,
) -> dict[Kind, float]:
    """Times that a run does each kind of work. `general_tokens`: 0 where the general text is not measured.
    `prompts`: those that are answered together; `of_step`: tokens of a device in a mean step."""
    evaluations = evaluations_of(recipe.evaluation, steps)
    devices = resolved(recipe.devices)  # among which rows are dealt; the first one computes a reference
    held, trained = rows.held_store.lengths[rows.held_rows], rows.store.lengths[rows.train_rows]
    task, most = TASKS[resolved(recipe.task)], resolved(recipe.evaluation.surprising)
    if task.sees_rows:  # of what training has seen a head's answers are found again, for those that are listed
        most = min(most, MOST_HIGH_LOSS) if task.learns_classes else 0
    looked_at = min(1.0, most / len(trained))
    read, written, taught, guard = 0.0, 0.0, 0, 0.0
    graded = len(held) * recipe.reinforce.held_out_samples * evaluations if task.samples else 0
    if (draws := drawn.draws_of(recipe)) and task.samples:
        written = draws.words(-(-graded // evaluations // devices)) * devices * evaluations
        guard = of_step  # the answers of step 1, measured as they are learnt
        if METHODS[recipe.method.name].is_adapter and graded:  # held-out answers, with the adapter and without
            guard += 2 * graded * (draws.new_tokens + float(held.mean())) / devices
    elif head == "next_token":
        read, written = _answers(recipe.evaluation, rows, together=prompts, on_the_way=evaluations - 2)
    if recipe.distil.teacher is not None:
        taught = int(held.sum()) + (0 if draws else int(trained.sum()))
    reads_prompts = layout != "packed" or recipe.distil.teacher is not None  # else they begin rows that are measured
    return {
        "starting": 1,
        "teaching": taught,
        "training": steps,
        "measuring": measured_tokens(rows, recipe.embed.documents) * evaluations / devices
        + int(held.sum()) * task.compares
        + int(trained.sum()) * (looked_at / devices + task.compares)
        + 2 * general_tokens
        + (read / devices if reads_prompts else 0)
        + guard,
        "answering": written / devices,
        "grading": graded,
        "saving": saves(resolved(recipe.checkpoint.every), steps),
        "finishing": 1,
    }


def _answers(evaluation: EvaluationOptions, rows: Splits, *, together: int, on_the_way: int) -> tuple[float, float]:
    """Tokens of all prompts that are answered before, `on_the_way` and after, and tokens that are written one after
    the other: at first answers are as long as they may be, in the end short ones as long as they should be."""
    last, first = (min(resolved(num), len(rows.held_rows)) for num in (evaluation.samples, evaluation.samples_before))
    if last == 0:
        return 0.0, 0.0
    targets, lengths = (part[rows.held_rows] for part in (rows.held_store.targets, rows.held_store.lengths))
    most = new_tokens_for(targets, evaluation.sample_tokens)
    tuned = min(most, int(targets.max())) if has_short_answers(targets) else most
    between = on_the_way * min(evaluation.samples_on_the_way, last)
    words = -(-min(first, last) // together) * most + -(-between // together) * most + -(-last // together) * tuned
    return (min(first, last) + between + last) * float((lengths - targets).mean()), words


def pass_seconds(sizes: Sizes, load: Load, device: Device, *, recomputed: int = 0, trains: bool = True) -> float:
    """Seconds to compute `load` without starting its operations. `trains`: with the backward."""
    again = recomputed / sizes.layers
    # Products: forward; backward to inputs, from the first layer with gradients on; backward to the weights.
    times = 1 + trains * (1 - sizes.first / sizes.layers + sizes.trains_linear + again)
    operations = 2 * sizes.linear_weights * load.tokens * times
    operations += 2 * sizes.hidden * sizes.outputs * load.targets * (1 + trains * (1 + sizes.trains_output))
    # Of attention two products forward and five backward (Dao et al. 2022, appendix B.2), half if causal.
    attention = sizes.layers * sizes.hidden * load.squares * (2 + trains * (5 + 2 * again))
    moved = MOVED * (1 + again / 3 if trains else 1 / 3) * sizes.itemsize * sizes.features * load.tokens
    return device.seconds(operations, attention) + moved / device.bandwidth


def step_seconds(sizes: Sizes, load: Load, *, micro_batches: float, recomputed: int, device: Device) -> float:
    """Seconds of a step that computes `load` in `micro_batches`, and of its update."""
    update = 3 * sizes.gradients + 2 * sizes.optimizer + 1.5 * sizes.masters
    launches = micro_batches * sizes.layers * OPERATIONS_STARTED * device.launch
    computing = pass_seconds(sizes, load, device, recomputed=recomputed)
    # A processor waits for what it starts; a card computes while the processor starts the next operation.
    both = computing + launches if device.kind == "cpu" else max(computing, launches)
    return both + update / device.bandwidth


def word_seconds(sizes: Sizes, device: Device, answers: int) -> float:
    """Seconds of the next token of answers that are written together."""
    word = pass_seconds(sizes, Load(answers, answers), device, trains=False)
    return sizes.weights / device.bandwidth + DECODE_LAUNCH * sizes.layers + word


def prices(sizes: Sizes, load: Load, device: Device, *, result_bytes: int, prompts: int = 1) -> dict[Kind, float]:
    """Seconds of each kind of work that every task has, but training, once. `load`: of a mean step; `prompts`:
    answered together."""
    return {
        "starting": STARTING_S + sizes.weights / (LOADED_TO_CARD if device.kind == "cuda" else LOADED),
        "measuring": pass_seconds(sizes, load, device, trains=False) / max(1, load.tokens),
        "answering": word_seconds(sizes, device, prompts),
        "saving": sizes.checkpoint / device.written,
        "finishing": FINISHING_S + 2 * result_bytes / device.written,
    }
