"""What a run will need before anything of it is loaded: memory by component, time, disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.data.collate import Collator
from tunesmith.data.sampler import StepSampler
from tunesmith.data.splits import Splits
from tunesmith.models.packing_check import layouts_of
from tunesmith.models.resolve_model import ModelRef
from tunesmith.planning import devices
from tunesmith.planning.advise import total_steps
from tunesmith.planning.compiling import Compiling, in_bfloat16, in_float32
from tunesmith.planning.counting import amount, counts, kept_checkpoints, seen_rows
from tunesmith.planning.devices import Device
from tunesmith.planning.duration import (
    WRITTEN,
    Looking,
    finishing_seconds,
    looking,
    pass_seconds,
    starting_seconds,
    update_seconds,
    word_seconds,
)
from tunesmith.planning.heaviest import Heavy, heaviest, heaviest_looked
from tunesmith.planning.memory import Memory, Pass, evaluation_peak, step_peak, timeline, with_heap
from tunesmith.planning.sharing import filled_by
from tunesmith.planning.sketch import DTYPES, Kept, Sketch
from tunesmith.planning.tracing import Segment
from tunesmith.planning.trying import Tried
from tunesmith.planning.work import Duration, Kind, Work
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.types import HeadName, Layout, ModelKind

Feeds = Callable[[Recipe, Any, StepSampler], tuple[Collator, Collator]]
"""(recipe, model of shapes, plan) → the passes of training and of held-out rows, on the CPU."""
PlanOf = Callable[[Recipe, Layout], StepSampler]


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that a run writes."""

    rows: int
    checkpoints: int
    """Those kept, and the one that is written beside them."""
    result: int

    @property
    def total(self) -> int:
        return self.rows + self.checkpoints + self.result


@dataclass(frozen=True, slots=True)
class Looked:
    """The heaviest pass that measures rows."""

    segments: list[Segment]
    tokens: int
    targets: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will need."""

    memory: Memory
    """At its highest."""
    phases: tuple[Memory, ...]
    """The highest moment of each phase."""
    duration: Duration | None
    """None for a device whose speed is not known."""
    disk: Disk
    device: Device
    heavy: Heavy
    tokens: int
    """Of that pass."""
    targets: int
    plan: StepSampler
    num_layers: int
    recomputed: int
    trained_parameters: int
    later: int = 0
    """Bytes of the total that come only in the course of the run."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.room


@dataclass
class Forecaster:
    """Answers for one model and one set of rows, whatever the recipe makes of them; keeps what it has traced."""

    located: ModelRef
    kind: ModelKind
    head: HeadName
    rows: Splits
    feeds: Feeds
    plan_of: PlanOf
    device: Device
    base: int
    """Bytes that the process holds with its libraries and without a model."""
    tried: Tried | None = None
    """Products on that device, where it is this machine's."""
    general_tokens: int = 0
    """Of the general text; 0 where it is not measured."""
    _sketches: dict[str, Sketch] = field(default_factory=dict)
    _layouts: dict[int, Layout] = field(default_factory=dict)
    _passes: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict)

    def forecast(self, recipe: Recipe) -> Forecast:
        """Raises ModelError where the model cannot be run in shapes alone."""
        sketch = self.sketch(recipe)
        layout = self.layout(recipe, sketch)
        plan = self._plan(recipe, sketch, layout)
        steps = total_steps(recipe, plan.steps_per_epoch)
        recomputed = recipe.train.checkpointed_layers
        recomputed = 0 if recomputed == "auto" else recomputed
        found = [self._step(recipe, sketch, layout, heavy, recomputed) for heavy in self._heaviest(recipe, plan, steps)]
        heavy, one, step, tokens, targets = max(found, key=lambda entry: entry[2].total)
        looked = self._look(recipe, sketch, layout)
        phases = [step]
        if looked is not None:
            phases.append(evaluation_peak(sketch.kept, sketch.stacks, looked.segments))
        is_cpu = self.device.kind == "cpu"
        compiling = self._compiling(recipe, plan, steps, (heavy, one), looked) if is_cpu else Compiling(0)
        phases = self._with_runtime(phases, compiling.kept, pinned=recipe.precision == "bfloat16")
        duration = None
        if self.device.products:
            run = list(timeline(one, sketch.stacks, recomputed))
            duration = self._duration(
                recipe, sketch, plan, steps=steps, run=(run, tokens), looked=looked, compiling=compiling.seconds
            )
        return Forecast(
            memory=max(phases, key=lambda memory: memory.total),
            phases=tuple(phases),
            duration=duration,
            disk=self._disk(recipe, sketch, steps),
            device=self.device,
            heavy=heavy,
            tokens=tokens,
            targets=targets,
            plan=plan,
            num_layers=sketch.num_layers,
            recomputed=recomputed,
            trained_parameters=sketch.kept.trained_parameters,
            later=compiling.later,
        )

    def sketch(self, recipe: Recipe) -> Sketch:
        key = f"{recipe.method!r} {recipe.precision} {recipe.kernels} {recipe.optim!r} {recipe.loss!r}"
        if key not in self._sketches:
            self._sketches[key] = Sketch(
                recipe,
                self.located,
                head=self.head,
                labels=self.rows.labels,
                store=self.rows.store,
                on=self.device.kind,
            )
        return self._sketches[key]

    def layout(self, recipe: Recipe, sketch: Sketch) -> Layout:
        """As far as the code of the model tells; whether packed rows answer the same is asked when it is loaded."""
        if id(sketch) not in self._layouts:
            self._layouts[id(sketch)] = self._layout(recipe, sketch)
        return self._layouts[id(sketch)]

    def _layout(self, recipe: Recipe, sketch: Sketch) -> Layout:
        packed, *others = layouts_of(self.kind)
        if not others:
            return packed
        feed, _ = self.feeds(recipe, sketch.model, self.plan_of(recipe, packed))
        some = [int(i) for i in self.rows.train_rows[:2]]
        return packed if sketch.can_pack(feed.batch(some, draw=1)) else others[0]

    def _plan(self, recipe: Recipe, sketch: Sketch, layout: Layout) -> StepSampler:
        """Steps and passes as they will be if the model answers alike where rows share what they begin with."""
        plan = self.plan_of(recipe, layout)
        feed, _ = self.feeds(recipe, sketch.model, plan)
        return filled_by(plan, self.rows.store) if feed.shares else plan

    def _heaviest(self, recipe: Recipe, plan: StepSampler, steps: int) -> list[Heavy]:
        return heaviest(plan, steps, self.rows.store.denominators)

    def _step(
        self, recipe: Recipe, sketch: Sketch, layout: Layout, heavy: Heavy, recomputed: int
    ) -> tuple[Heavy, Pass, Memory, int, int]:
        key = (id(sketch), layout, heavy.rows, heavy.accumulating, recomputed > 0)
        if key not in self._passes:
            feed, _ = self.feeds(recipe, sketch.model, self.plan_of(recipe, layout))
            batch = feed.batch(heavy.rows, draw=heavy.step)
            self._passes[key] = (
                Pass(
                    sketch.step_pass(batch, recompute=False, accumulating=heavy.accumulating),
                    sketch.step_pass(batch, recompute=True, accumulating=heavy.accumulating) if recomputed else (),
                ),
                batch.num_tokens,
                batch.num_targets,
            )
        one, tokens, targets = self._passes[key]
        memory = step_peak(sketch.kept, sketch.stacks, one, recomputed=recomputed, accumulating=heavy.accumulating)
        return heavy, one, memory, tokens, targets

    def _look(self, recipe: Recipe, sketch: Sketch, layout: Layout) -> Looked | None:
        """The pass of the most targets over held-out rows and those that are looked through at the end; None where
        nothing is looked at."""
        rows, tokens = self.rows, resolved(recipe.train.tokens_per_pass)
        looks = (rows.held_store, rows.held_rows, True), (rows.store, seen_rows(recipe, rows), False)
        found = [
            (store, heaviest_looked(store, [int(i) for i in rows_I], tokens_per_pass=tokens, layout=layout), is_held)
            for store, rows_I, is_held in looks
            if len(rows_I)
        ]
        if not found:
            return None
        _, members, is_held = max(found, key=lambda one: float(one[0].denominators[list(one[1])].sum()))
        key = (id(sketch), layout, members, is_held)
        if key not in self._passes:
            feed = self.feeds(recipe, sketch.model, self.plan_of(recipe, layout))[is_held]
            batch = feed.batch(members, draw=0)
            self._passes[key] = (sketch.measure_pass(batch), batch.num_tokens, batch.num_targets)
        return Looked(*self._passes[key])

    def _with_runtime(self, phases: list[Memory], caches: int, *, pinned: bool) -> list[Memory]:
        if self.device.kind != "cpu":
            share, context = devices.CUDA_FRAGMENTS, devices.CUDA_CONTEXT
            return [replace(one, runtime=context, allocator=int(share * one.total)) for one in phases]
        runtime = self.base + devices.LIBRARIES + caches
        return [replace(one, runtime=runtime) for one in with_heap(phases, devices.HEAP_FRAGMENTS, pinned=pinned)]

    def _compiling(
        self, recipe: Recipe, plan: StepSampler, steps: int, found: tuple[Heavy, Pass], looked: Looked | None
    ) -> Compiling:
        heavy, one = found
        if recipe.precision == "float32":
            return in_float32(one.plain)
        segments, lengths_R = looked.segments if looked else (), self.rows.store.lengths[list(heavy.rows)]
        return in_bfloat16(plan, steps, one.plain, segments, lengths_R=lengths_R)

    def _duration(
        self,
        recipe: Recipe,
        sketch: Sketch,
        plan: StepSampler,
        *,
        steps: int,
        run: tuple[list[Any], int],
        looked: Looked | None,
        compiling: float,
    ) -> Duration:
        dtype, segments = DTYPES[resolved(recipe.precision)], run[0]
        if self.tried is not None:
            self.tried.look(segments)
        per_token = pass_seconds(segments, self.device, dtype, self.tried) / run[1]
        per_step = float(plan.lengths_I @ plan.weights_I) / plan.steps_per_epoch
        counted = counts(recipe, self.rows, self.head, steps=steps, general_tokens=self.general_tokens)
        prices: dict[Kind, float] = {
            "starting": starting_seconds(sketch.kept),
            "training": per_token * per_step + update_seconds(sketch.kept, self.device) + compiling,
            "saving": _checkpoint_bytes(sketch.kept) / WRITTEN,
            "finishing": finishing_seconds(self._disk(recipe, sketch, steps).result),
        }
        if looked is not None:
            whole = list(timeline(Pass(looked.segments, ()), sketch.stacks, 0))
            look = looking(whole, self.device, dtype, self.tried, tokens=looked.tokens, targets=looked.targets)
            prices |= self._looks(recipe, look) | {"answering": word_seconds(whole, sketch.kept, self.device)}
        return Duration({kind: Work(count, prices.get(kind, 0.0)) for kind, count in counted.items()})

    def _looks(self, recipe: Recipe, look: Looking) -> dict[Kind, float]:
        """Seconds of a token of all that is looked at; of the general text nearly every token is a target."""
        held = amount(self.rows.held_store, self.rows.held_rows)
        seen = amount(self.rows.store, seen_rows(recipe, self.rows))
        return {
            "held_out": look.price(held.targets, held.tokens),
            "surprising": look.price(seen.targets, seen.tokens),
            "general": look.price(1, 1),
        }

    def _disk(self, recipe: Recipe, sketch: Sketch, steps: int) -> Disk:
        kept, is_full = sketch.kept, recipe.method.name == "full"
        return Disk(
            rows=self.rows.store.summary.arrow_bytes,
            checkpoints=kept_checkpoints(recipe, steps) * _checkpoint_bytes(kept),
            result=kept.weights if is_full else 4 * kept.trained_parameters,
        )


def _checkpoint_bytes(kept: Kept) -> int:
    return 4 * kept.trained_parameters + kept.optimizer
