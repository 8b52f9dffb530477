"""Estimate the needs of a run before its model is loaded, by formula: memory by component, time, disk; and whether the
prefix that rows of a step share is computed once, as far as rows, recipe and config tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from tunesmith.data.branches import lines_of
from tunesmith.data.collate import pads_to_multiple
from tunesmith.data.dataset import RowStore
from tunesmith.data.prefixes import stretches
from tunesmith.data.sampler import MicroBatch, StepSampler, micro_batches_of, padded_size
from tunesmith.data.splits import Splits
from tunesmith.methods import METHODS
from tunesmith.models.packing_check import layouts_of
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.short_row_attention import LONGEST
from tunesmith.planning.defaults import total_steps
from tunesmith.planning.devices import GROUP, Device, link
from tunesmith.planning.duration import (
    CARD_TOKENS,
    DEALT,
    Duration,
    Work,
    card_tokens,
    counts,
    kept_checkpoints,
    prices,
    seen_rows,
    step_seconds,
    targets_of,
)
from tunesmith.planning.memory import Heavy, Load, Memory, Sizes, phases, sizes_of
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS, has_look
from tunesmith.types import Choice, HeadName, Layout, ModelKind, Row

BALANCE_STEPS = 64
"""Steps whose shares are compared, the first ones."""
BUCKET = 64 * 2**20
"""Bytes of gradients that are summed together, see `parallel.exchange`."""
MOST_STEPS, MOST_SHARING_STEPS = 1000, 64
"""Steps among which the heaviest is looked for, evenly spread over a longer run; fewer where rows share prefixes, which
take long to find."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that a run writes."""

    rows: int
    checkpoints: int
    """Checkpoints that are kept, and the one being written."""
    result: int

    @property
    def total(self) -> int:
        return self.rows + self.checkpoints + self.result


@dataclass(frozen=True, slots=True)
class Forecast:
    """An estimate of what a run will need."""

    memory: Memory
    """At its highest."""
    phases: tuple[Memory, ...]
    duration: Duration | None
    """None for a device whose speed is not known."""
    disk: Disk
    device: Device
    heavy: Heavy
    sampler: StepSampler
    num_layers: int
    recomputed: int
    trained_parameters: int
    balance: float = 1.0
    """Mean load of a device as a share of the largest."""
    sum_seconds: float = 0.0
    """Of a step: to sum the gradients of all devices."""
    split: int = 0
    """Bytes of layers that are split over the devices; 0: each has the whole model."""
    gather_seconds: float = 0.0
    """Of a step: to bring split layers together, at the same time as others compute."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.room

    def values(self) -> dict[str, Any]:
        """As JSON."""
        heavy = self.heavy
        return {
            "memory": {"total": self.memory.total, "phase": self.memory.phase, "parts": self.memory.parts()},
            "phases": {phase.phase: phase.total for phase in self.phases},
            "room": self.device.room,
            "pass": {
                "step": heavy.step,
                "rows": len(heavy.rows),
                "tokens": sum(self.sampler.lengths_of(heavy.rows)),
                "targets": heavy.load.targets,
            },
            "layers": {"all": self.num_layers, "recomputed": self.recomputed},
            "seconds": None if self.duration is None else self.duration.values(),
            "disk": {**asdict(self.disk), "total": self.disk.total},
            **({"group": self._group()} if self.sampler.part[1] > 1 else {}),
        }

    def _group(self) -> dict[str, Any]:
        split = {"split": self.split, "gather_seconds": self.gather_seconds} if self.split else {}
        return {"devices": self.sampler.part[1], "balance": self.balance, "sum_seconds": self.sum_seconds, **split}


@dataclass
class Forecaster:
    """Forecasts for one model and one set of rows, for any recipe. Sizes and heaviest micro-batches are cached."""

    located: ModelRef
    kind: ModelKind
    head: HeadName
    rows: Splits
    sampler_of: Callable[[Recipe, Layout], StepSampler]
    shares: Callable[[Recipe, nn.Module, StepSampler], bool]
    """(recipe, model without weights, sampler) → whether what rows begin with alike is computed once."""
    device: Device
    base: int
    """Bytes that the process holds with its libraries and without a model."""
    general_tokens: int = 0
    """Tokens of the general text; 0 if it is not measured."""
    _sizes: dict[str, tuple[Sizes, nn.Module]] = field(default_factory=dict)
    _samplers: dict[tuple[str, int], tuple[StepSampler, list[Heavy], Load, float]] = field(default_factory=dict)

    def forecast(self, recipe: Recipe) -> Forecast:
        """Raises ModelError where no model can be made from its config alone, and what attaching the method raises."""
        key, sizes, model = self._sizes_of(recipe)
        sampler_key = (key, resolved(recipe.train.tokens_per_pass))
        if sampler_key not in self._samplers:
            self._samplers[sampler_key] = self._sampled(recipe, sizes, model)
        sampler, candidates, look, balance = self._samplers[sampler_key]
        layers = recipe.train.checkpointed_layers
        recomputed = 0 if layers == "auto" else min(layers, sizes.recomputable)

        def peaks(heavy: Heavy) -> list[Memory]:
            found = phases(sizes, heavy, look, recomputed=recomputed, device=self.device)
            base = self.base if self.device.kind == "cpu" else 0
            if sampler.part[1] > 1:
                base += min(BUCKET, sizes.gradients) + (GROUP if self.device.kind == "cuda" else 0)
            return [replace(one, runtime=one.runtime + base) for one in found]

        def highest(found: list[Memory]) -> Memory:
            return max(found, key=lambda memory: memory.total)

        heavy = max(candidates, key=lambda one: highest(peaks(one)).total)
        steps = total_steps(recipe, sampler.steps_per_epoch)
        disk = Disk(
            rows=self.rows.store.summary.arrow_bytes,
            checkpoints=kept_checkpoints(recipe, steps) * sizes.checkpoint,
            result=4 * sizes.trained_parameters if METHODS[recipe.method.name].is_adapter else sizes.weights,
        )
        return Forecast(
            memory=highest(peaks(heavy)),
            phases=tuple(peaks(heavy)),
            duration=self._duration(
                recipe, sizes, sampler, recomputed=recomputed, result_bytes=disk.result, balance=balance
            ),
            disk=disk,
            device=self.device,
            heavy=heavy,
            sampler=sampler,
            num_layers=sizes.recomputable,
            recomputed=recomputed,
            trained_parameters=sizes.trained_parameters,
            balance=balance,
            sum_seconds=sum_seconds(sizes, sampler, self.device),
            split=sizes.gathered,
            gather_seconds=gather_seconds(sizes, sampler, self.device),
        )

    def card_tokens(self, recipe: Recipe) -> int:
        """Tokens of a micro-batch that keep the card busy, see `duration.card_tokens`, but hardly more than a step can
        have. Raises as `forecast` does."""
        _, sizes, _ = self._sizes_of(recipe)
        most = resolved(recipe.train.rows_per_step) * int(self.rows.store.lengths[self.rows.train_rows].max())
        return min(card_tokens(sizes, self.device), max(CARD_TOKENS[0], 1 << (most - 1).bit_length()))

    def _sizes_of(self, recipe: Recipe) -> tuple[str, Sizes, nn.Module]:
        key = f"{recipe.method!r} {recipe.precision} {recipe.kernels} {recipe.optim!r} {recipe.shard}"
        if key not in self._sizes:
            self._sizes[key] = sizes_of(
                recipe, self.located, head=self.head, labels=self.rows.labels, store=self.rows.store
            )
        return key, *self._sizes[key]

    def _sampled(self, recipe: Recipe, sizes: Sizes, model: nn.Module) -> tuple[StepSampler, list[Heavy], Load, float]:
        """The steps, their heaviest micro-batches on any device, the heaviest one that is measured, and the balance."""
        first, *others = layouts_of(self.kind)
        sampler = self.sampler_of(recipe, first if sizes.can_pack or not others else others[0])
        if self.shares(recipe, model, sampler):
            sampler = filled_by(sampler, self.rows.store)
        is_filled = pads_to_multiple(sampler.layout, device=self.device.kind, precision=resolved(recipe.precision))
        heavy = heaviest(sampler, total_steps(recipe, sampler.steps_per_epoch), self.rows.store, is_filled=is_filled)
        return sampler, heavy, self._look(recipe, sampler), mean_balance(sampler)

    def _look(self, recipe: Recipe, sampler: StepSampler) -> Load:
        """The micro-batch of the most targets among held-out rows and those that are measured at the end."""
        rows, found = self.rows, [Load(0, 0)]
        for store, rows_I in ((rows.held_store, rows.held_rows), (rows.store, seen_rows(recipe, rows))):
            if len(rows_I):
                some = heaviest_looked(store, [int(i) for i in rows_I], sampler)
                found.append(Load(int(store.lengths[list(some)].sum()), int(targets_of(store)[list(some)].sum())))
        return max(found, key=lambda load: load.targets)

    def _duration(
        self, recipe: Recipe, sizes: Sizes, sampler: StepSampler, *, recomputed: int, result_bytes: int, balance: float
    ) -> Duration | None:
        if not self.device.products:
            return None
        steps = total_steps(recipe, sampler.steps_per_epoch)
        size = sampler.part[1]
        store, weights_I = self.rows.store, sampler.weights_I / sampler.steps_per_epoch / (size * balance)
        lengths_I = sampler.lengths_I.astype(np.float64)
        load = Load(
            tokens=round(float(lengths_I @ weights_I)),
            targets=round(float(targets_of(store)[sampler.rows_I] @ weights_I)),
            squares=round(float(lengths_I**2 @ weights_I)),
        )
        micro_batches = max(1.0, load.tokens / sampler.tokens_per_pass)
        of_step = step_seconds(sizes, load, micro_batches=micro_batches, recomputed=recomputed, device=self.device)
        found = prices(sizes, self.rows, recipe, self.device, result_bytes=result_bytes)
        found |= {kind: found[kind] / size for kind in DEALT}
        of_step = max(of_step, gather_seconds(sizes, sampler, self.device))
        looks = has_look(recipe) and micro_batches > 1
        looking = load.tokens * found["held_out"] if looks else 0.0
        found["training"] = of_step + looking + sum_seconds(sizes, sampler, self.device)
        counted = counts(recipe, self.rows, self.head, steps=steps, general_tokens=self.general_tokens)
        return Duration({kind: Work(count, found[kind]) for kind, count in counted.items()})


def mean_balance(sampler: StepSampler) -> float:
    """Mean load of a device as a share of the largest, over the first steps."""
    loads = [sampler.loads(step) for step in range(1, min(BALANCE_STEPS, sampler.steps_per_epoch) + 1)]
    return sum(map(sum, loads)) / sum(max(one) * len(one) for one in loads) if sampler.part[1] > 1 else 1.0


def sum_seconds(sizes: Sizes, sampler: StepSampler, device: Device) -> float:
    """Seconds to sum the gradients of a step: each number goes out and comes back once, but for a device's own part."""
    size = sampler.part[1]
    return 2 * sizes.gradients * (size - 1) / size / link(device)


def gather_seconds(sizes: Sizes, sampler: StepSampler, device: Device) -> float:
    """Seconds of a step to gather split layers, twice a micro-batch, and to scatter their gradients where trained."""
    size = sampler.part[1]
    micro_batches = max(
        1.0, float(sampler.lengths_I @ sampler.weights_I) / sampler.steps_per_epoch / size / sampler.tokens_per_pass
    )
    times = 2 + (sizes.elsewhere > 0)
    return micro_batches * times * sizes.gathered * (size - 1) / size / link(device)


def heaviest(sampler: StepSampler, total_steps: int, store: RowStore, *, is_filled: bool = False) -> list[Heavy]:
    """The micro-batches of most tokens, most targets and longest rows among those that will really occur."""
    most = MOST_STEPS if sampler.ids_of is None else MOST_SHARING_STEPS
    targets_I = targets_of(store)
    found: list[Heavy] = []
    for step in sorted({int(step) for step in np.linspace(1, total_steps, min(total_steps, most))}):
        for rows, passes in _passes_of_all(sampler, step):
            tokens, lengths = sampler.computed(rows), sampler.lengths_of(rows)
            load = Load(
                tokens=padded_size(tokens) if is_filled else tokens,
                targets=int(targets_I[list(rows)].sum()),
                squares=sum(length * length for length in lengths),
                short_squares=sum(length * length for length in lengths if length <= LONGEST),
            )
            found.append(Heavy(step, rows, len(passes) > 1, load))
    orders: tuple[Callable[[Load], tuple[int, ...]], ...] = (
        lambda load: (load.tokens, load.squares),
        lambda load: (load.targets,),
        lambda load: (load.short_squares,),
    )
    return [max(found, key=lambda heavy: order(heavy.load)) for order in orders]


def _passes_of_all(sampler: StepSampler, step: int) -> Iterator[tuple[MicroBatch, list[MicroBatch]]]:
    """The micro-batches of a step on every device, each with those of its device."""
    size = sampler.part[1]
    for rank in range(size):
        passes = (sampler if size == 1 else replace(sampler, part=(rank, size))).step(step)
        yield from ((rows, passes) for rows in passes)


def heaviest_looked(store: RowStore, rows: list[int], sampler: StepSampler) -> MicroBatch:
    """The micro-batch of most targets when these rows of a store are measured."""
    passes = micro_batches_of(store, rows, tokens_per_pass=sampler.tokens_per_pass, layout=sampler.layout)
    targets_I = targets_of(store)
    return max(passes, key=lambda members: float(targets_I[list(members)].sum()))


LEAST_SAVED = 0.05
"""Share of the tokens that has to be saved: each shared prefix is one more piece of a micro-batch."""
PROBE_STEPS, PROBE_ROWS = 4, 3
KEY = "kernels.shared_beginnings"


@dataclass(frozen=True, slots=True)
class CommonPrefixes:
    """Tokens that rows share."""

    saved: float
    """Share of the tokens of the first steps that need not be computed."""
    probe: tuple[Row, ...]
    """Some rows with a common prefix."""


def shared_prefixes(sampler: StepSampler, store: RowStore) -> CommonPrefixes:
    """Tokens shared by rows of the first steps, whoever computes them: a function of the sampler alone."""
    sampler = filled_by(replace(sampler, part=(0, 1)), store)
    tokens, computed = 0, 0
    probe: tuple[Row, ...] = ()
    for step in range(1, min(PROBE_STEPS, sampler.steps_per_epoch) + 1):
        for members in sampler.step(step):
            rows = [line for i in members for line in lines_of(store.row(i))]
            tokens += sum(len(row.ids) for row in rows)
            for one in stretches([row.ids for row in rows]):
                computed += one.stop - one.start
                if len(one.members) > 1 and not probe:
                    probe = tuple(rows[i] for i in one.members[:PROBE_ROWS])
    return CommonPrefixes(1 - computed / tokens, probe)


def decide_sharing(model: nn.Module, recipe: Recipe, shared: CommonPrefixes) -> Choice:
    """For packed batches of a causal model without token types. Whether the model then gives the same answers is not
    checked here: it may have no weights yet."""
    if shared.saved < LEAST_SAVED:
        return Choice(KEY, False, f"what rows of a step begin with alike is {100 * shared.saved:.0f} % of their tokens")
    what = f"rows of a step begin alike: {100 * shared.saved:.0f} % of their tokens"
    if recipe.kernels == "plain":
        return Choice(KEY, False, f"{what} could be computed once, but kernels: plain leaves them")
    if not TASKS[resolved(recipe.task)].compares and (random := random_option(model, recipe)):
        return Choice(KEY, False, f"{what} could be computed once, but {random} draws anew for each row")
    return Choice(KEY, True, f"{what} are computed once for all; counted are the tokens of the rows")


def filled_by(sampler: StepSampler, store: RowStore) -> StepSampler:
    """The steps again, in micro-batches filled by what is computed where prefixes are shared."""
    return replace(sampler, ids_of=lambda index: store.row(index).ids)


def random_option(model: nn.Module, recipe: Recipe) -> str | None:
    """The option that makes a forward pass random in training; None: none does."""
    if option := METHODS[recipe.method.name].randomness(recipe.method):
        return option
    settings = model.config.get_text_config().to_dict().items()  # type: ignore[union-attr,operator]
    inside = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    if inside or any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings):
        return "the model's dropout"
    return None
