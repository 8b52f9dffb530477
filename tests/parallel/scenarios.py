"""What one rank of a test's group does; `test_group.py` compares what the ranks found. Each is a run of its own.

A name that ends in `_planted` is the same with a bug, for a test to see.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.data.sampler import StepSampler
from tunesmith.errors import Stopped
from tunesmith.evaluation import predict_rows
from tunesmith.parallel import exchange, world
from tunesmith.parallel.world import World
from tunesmith.planning import devices
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import DataFile, Recipe
from tunesmith.runs.folder import Run
from tunesmith.training import loop, setup, shared_prefixes, step, together, trainer
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.together import digest, joined, refuse_other_inputs
from tunesmith.training.trainer import Listener, resume, train

QUIET = {"evaluation": {"samples": 0, "general": False, "surprising": 0}}
IN_PARTS = {"epochs": 2, "tokens_per_pass": 96}
"""Ranks have several micro-batches a step, and not as many."""


def make_inputs(folder: Path) -> None:
    """A two-layer model, twenty chats and their recipe, for all ranks."""
    recipe = tiny_recipe(folder, rows=20, optim={"lr": 1e-3}, train=IN_PARTS, **QUIET)
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    few = {**IN_PARTS, "epochs": 1, "max_steps": 4}
    with_experts = {"name": "lora", "rank": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
    recipe = tiny_recipe(folder, arch="qwen3_moe", rows=20, method=with_experts, train=few, **QUIET)
    (folder / "experts.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    write_alike(folder / "alike.jsonl")
    options = {"train": {"epochs": 1, "rows_per_step": 12, "tokens_per_pass": 200}, **QUIET}
    recipe = task_recipe(folder, "embed", "encoder", dropout=0.2, **options)
    (folder / "embed.json").write_text(json.dumps(recipe.model_dump(mode="json")))


def write_alike(path: Path) -> None:
    """The chats again, each after the same system prompt, so that most of their tokens are shared."""
    rows = [json.loads(line) for line in (path.parent / "chats.jsonl").read_text().splitlines()]
    prompt = {"role": "system", "content": "the quick brown fox jumps over a lazy dog " * 2}
    path.write_text("".join(json.dumps({"messages": [prompt, *row["messages"]]}) + "\n" for row in rows))


def recipe_of(folder: Path, method: str = "lora", **sections: Any) -> Recipe:
    """Twelve steps in float32, the same on every rank and in the test itself."""
    recipe = json.loads((folder / "recipe.json").read_text())
    if method == "full":
        recipe["method"] = {"name": "full"}
    for name, values in sections.items():
        recipe[name] = recipe[name] | values if isinstance(values, dict) else values
    return validate(recipe)


@contextmanager
def together_as(recipe: Recipe, folder: Path) -> Iterator[Setup]:
    with joined(recipe.device) as found:
        made = prepare(recipe, root=folder / f"root-{found.rank}", world=found)
        refuse_other_inputs(made)
        together._broadcast_weights(made)
        yield made


def steps_of(made: Setup) -> dict[str, Any]:
    events = list(training_steps(made))
    return {
        "losses": [event.values["loss"] for event in events],
        "norms": [event.values["grad_norm"] for event in events],
        "rows": [event.values["rows"] for event in events],
        "smaller": [event.values.get("tokens_per_pass") for event in events],
        "digest": digest(made),
        "weights": {name: tensor.flatten()[:50].tolist() for name, tensor in made.attachment.trained.items()},
    }


def steps(folder: Path, method: str, **sections: Any) -> dict[str, Any]:
    with together_as(recipe_of(folder, method, **sections), folder) as made:
        return steps_of(made)


def lora(folder: Path) -> Any:
    return steps(folder, "lora")


def full(folder: Path) -> Any:
    return steps(folder, "full")


def experts(folder: Path) -> Any:
    """Adapters on experts, some of which no token of a rank goes to."""
    with together_as(validate(json.loads((folder / "experts.json").read_text())), folder) as made:
        return steps_of(made)


def few_rows(folder: Path) -> Any:
    """A step of one row: a rank has none."""
    return steps(folder, "lora", train={"epochs": 1, "rows_per_step": 1, "max_steps": 4})


def alike(folder: Path, recipe: Recipe | None = None) -> Any:
    """Rows with one beginning, which is computed once."""
    recipe = recipe or recipe_of(folder, "lora", data={"train": [str(folder / "alike.jsonl")]}, train={"epochs": 1})
    with together_as(recipe, folder) as made:
        return {"shares": made.collator.shares, **steps_of(made)}


def alike_planted(folder: Path) -> Any:
    """Each rank decides by its own part of the steps."""
    right = shared_prefixes.shared_prefixes

    def own(plan: StepSampler, *rows: Any) -> Any:
        return replace(right(plan, *rows), saved=0.0) if plan.part[0] else right(plan, *rows)

    with patch.object(shared_prefixes, "shared_prefixes", own):
        return alike(folder)


def _meet(change: Callable[..., Any]) -> Any:
    right = exchange.meet

    def buggy(found: World, trained: Any, own: Any, *, num_targets: float) -> Any:
        met = right(found, trained, own, num_targets=num_targets)
        change(found, trained)
        return met

    return patch.object(loop, "meet", buggy)


def averaged_planted(folder: Path) -> Any:
    def divide(found: World, trained: Any) -> None:
        for tensor in trained.values():
            tensor.grad /= found.size

    with _meet(divide):
        return steps(folder, "lora")


def own_divisor_planted(folder: Path) -> Any:
    """Each rank divides by its own targets, and the sum is averaged."""
    gradients = step.compute_gradients

    def compute(state: Any, plan: StepSampler, number: int) -> Any:
        mine = sum(float(state.store.denominators[i]) for rows in plan.step(number) for i in rows)
        found = gradients(state, plan, number)
        for tensor in state.attachment.trained.values():
            if tensor.grad is not None:
                tensor.grad *= found.num_targets / mine / state.world.size
        return found

    with patch.object(loop, "compute_gradients", compute):
        return steps(folder, "lora")


def other_rows_planted(folder: Path) -> Any:
    """A rank that takes its share of another step: the meeting counts the targets."""
    right = StepSampler.rows

    def rows(plan: StepSampler, number: int) -> list[int]:
        return right(plan, number + plan.part[0])

    with patch.object(StepSampler, "rows", rows):
        return steps(folder, "lora")


def drift_planted(folder: Path) -> Any:
    """An adapter that each rank draws for itself."""

    def draw(made: Setup) -> None:
        for tensor in made.attachment.trained.values():
            tensor.data += made.world.rank * 1e-3

    with patch.object(together, "_broadcast_weights", draw):
        return train(recipe_of(folder), root=folder / "root", out=folder / "drifted").state()


def seeds(folder: Path) -> Any:
    """The seed of dropout of each step, and what is dropped first."""
    found: list[float] = []
    right = torch.manual_seed

    def recorded(seed: int) -> Any:
        generator = right(seed)
        found.append(float(torch.rand(1, generator=torch.Generator().manual_seed(seed))))
        return generator

    with together_as(recipe_of(folder), folder) as made, patch.object(step.torch, "manual_seed", recorded):
        list(training_steps(made))
    return found


def seeds_planted(folder: Path) -> Any:
    right = step._step_seed
    with patch.object(step, "_step_seed", lambda seed, number, rank: right(seed, number, 0)):
        return seeds(folder)


def _ending(made: Setup, *, above: int) -> Setup:
    """Memory of rank 1 ends in every micro-batch of more than so many tokens."""
    right = made.task.loss_sum

    def loss_sum(model: Any, batch: Any) -> Any:
        if made.world.rank == 1 and batch.num_tokens > above:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(model, batch)

    made.task = replace(made.task, loss_sum=loss_sum)
    return made


def memory_ends(folder: Path) -> Any:
    with together_as(recipe_of(folder), folder) as made:
        return steps_of(_ending(made, above=80))


def _looking(folder: Path, *, tokens_per_pass: int, above: int) -> Any:
    """Embeddings with dropout; memory of rank 1 ends in a pass behind its look."""
    recipe = json.loads((folder / "embed.json").read_text())
    recipe["train"]["tokens_per_pass"] = tokens_per_pass
    with together_as(validate(recipe), folder) as made:
        right = made.task.prepass
        assert right is not None

        def look(model: Any, batches: Any, of: World) -> Any:
            made.task = replace(made.task, loss_sum=right(model, batches, of))
            return _ending(made, above=above).task.loss_sum

        made.task = replace(made.task, prepass=look)
        return steps_of(made)


def looking(folder: Path) -> Any:
    found = _looking(folder, tokens_per_pass=200, above=40)
    (folder / f"smaller-{os.environ['RANK']}").write_text(str(min(filter(None, found["smaller"]))))
    return found


def looking_in_small_passes(folder: Path) -> Any:
    """As it is from the start where `looking` arrived."""
    smaller = int((folder / f"smaller-{os.environ['RANK']}").read_text())
    return _looking(folder, tokens_per_pass=smaller, above=10**6)


def looking_planted(folder: Path) -> Any:
    """The ranks go on with what was looked at before."""

    def computed(state: Any, sampler: Any, number: int) -> Any:
        done = step.compute_gradients(state, sampler, number)
        return done, exchange.meet(state.world, state.attachment.shared, done.computed, num_targets=done.num_targets)

    with patch.object(loop, "_computed", computed):
        return looking(folder)


def memory_is_gone(folder: Path) -> Any:
    with together_as(recipe_of(folder), folder) as made:
        return steps_of(_ending(made, above=0))


def memory_is_gone_planted(folder: Path) -> Any:
    """The rank keeps it to itself: with the others waiting for a sum that never comes."""
    right = step.compute_gradients

    def compute(state: Any, plan: Any, number: int) -> Any:
        found = right(state, plan, number)
        if found.computed.exhausted is not None:
            raise MemoryError
        return found

    with patch.object(loop, "compute_gradients", compute):
        return memory_is_gone(folder)


def not_finite(folder: Path) -> Any:
    with together_as(recipe_of(folder), folder) as made:
        right, before = made.task.loss_sum, digest(made)
        made.task = replace(made.task, loss_sum=lambda m, b: right(m, b) * (float("nan") if made.world.rank else 1.0))
        mine = [str(made.store.source(i)) for rows in made.sampler.step(1) for i in rows]
        try:
            list(training_steps(made))
        except Exception as error:
            return {"error": type(error).__name__, "text": str(error), "rows": mine, "same": digest(made) == before}
        return {}


def not_finite_planted(folder: Path) -> Any:
    """Each rank looks at its own losses before the sum."""
    right = exchange.meet

    def buggy(found: World, trained: Any, own: Any, *, num_targets: float) -> Any:
        if not all(map(math.isfinite, own.losses)):
            raise ArithmeticError("not a number")
        return right(found, trained, own, num_targets=num_targets)

    with patch.object(loop, "meet", buggy):
        return not_finite(folder)


def _whole(
    folder: Path, name: str, listener: Listener | None = None, inputs: Path | None = None, **sections: Any
) -> dict[str, Any]:
    sections.setdefault("evaluation", {"samples": 9, "sample_tokens": 2, "surprising": 8, "every": 4})
    sections.setdefault("checkpoint", {"every": 2, "keep": 9})
    out = folder / name
    try:
        run = train(recipe_of(inputs or folder, **sections), root=folder / "root", out=out, listener=listener)
    except Stopped as stopped:
        return {"error": "Stopped", "text": str(stopped)}
    return {"run": str(run.path), "type": type(run).__name__}


def straight(folder: Path) -> Any:
    return _whole(folder, "straight")


LONG: dict[str, Any] = {"train": {"epochs": 10}, "checkpoint": {"every": 10}}
"""60 steps: about a second."""


def long(folder: Path) -> Any:
    return _whole(folder, "straight", **LONG, evaluation={})


LONGER: dict[str, Any] = {"train": {"epochs": 60}, "checkpoint": {"every": 20}, "evaluation": {}}


def longer(folder: Path) -> Any:
    return _whole(folder, "straight", **LONGER)


def longer_killed(folder: Path) -> Any:
    """ResumedAnswer, or gone on with."""
    return _whole(folder, "killed", **LONGER)


def goes_on(folder: Path) -> Any:
    return str(resume(Run(Path(os.environ["GOES_ON"]))).path)


def _after(number: int, rank: int) -> Listener:
    """Asks one rank to stop after a step."""
    seen: list[int] = []

    def stop() -> bool:
        seen.append(1)
        return int(os.environ["RANK"]) == rank and len(seen) > number

    return Listener(should_stop=stop)


def stopped(folder: Path) -> Any:
    return _whole(folder, "stopped", _after(7, rank=1))


def stopped_planted(folder: Path) -> Any:
    """Each rank reads its own flag."""

    def local(session: Any, *, saved: bool) -> None:
        if session.setup.world.wants_stop():
            raise Stopped("alone")

    with patch.object(trainer, "_stop_if_requested", local):
        return _whole(folder, "stopped-planted", _after(7, rank=1))


def resumed(folder: Path) -> Any:
    """The rule for a group that is started again: the same words go on with the run."""
    return _whole(folder, "stopped")


def _apart(folder: Path, ranks: tuple[int, ...], listener: Listener | None = None) -> Any:
    """Two machines without a common disk; `ranks`: the machine of each rank."""
    machine = f"machine-{ranks[int(os.environ['RANK'])]}"
    return _whole(folder / machine, "run", listener, evaluation={"samples": 0}, inputs=folder)


def apart(folder: Path) -> Any:
    return _apart(folder, (0, 1), _after(3, rank=0))


def apart_swapped(folder: Path) -> Any:
    """Rank 0 is on the other machine after the restart."""
    return _apart(folder, (1, 0))


def apart_again(folder: Path) -> Any:
    return {**_apart(folder, (0, 1)), "left": sorted(path.name for path in (folder / "machine-1").rglob("*"))}


def started_again(folder: Path) -> Any:
    """A run that is done is left as it is."""
    return _whole(folder, "stopped")


def another_recipe(folder: Path) -> Any:
    return _whole(folder, "stopped", optim={"lr": 2e-3})


def without_folder(folder: Path) -> Any:
    return str(train(recipe_of(folder), root=folder / "root").path)


def two_writers_planted(folder: Path) -> Any:
    with patch.object(trainer, "FollowedRun", trainer.Run):
        return _whole(folder, "two-writers", train={"max_steps": 4})


def padded_planted(folder: Path) -> Any:
    """Shares of equal length: what is left over is measured by nobody."""

    def equal(costs: Any, size: int) -> list[list[int]]:
        each = len(costs) // size
        return [list(range(rank * each, (rank + 1) * each)) for rank in range(size)]

    with patch.object(predict_rows, "shares", equal):
        return _whole(folder, "padded", train={"max_steps": 1}, evaluation={"samples": 0, "surprising": 0})


def less_memory(folder: Path) -> Any:
    """Rank 1 has less of it: what is decided is decided for both."""
    rank = int(os.environ["RANK"])
    room = patch.object(devices, "room", lambda device: (8 - rank) * 2**30)
    with (
        room,
        together_as(recipe_of(folder, train={"tokens_per_pass": "auto", "rows_per_step": "auto"}), folder) as made,
    ):
        forecast = None if made.forecast is None else made.forecast.device.room
        rooms = [one["room"] for one in made.world.joined]
        return {"recipe": made.recipe.model_dump(mode="json"), "room": forecast, "rooms": rooms}


def less_memory_planted(folder: Path) -> Any:
    """Each rank decides for itself."""
    rank = int(os.environ["RANK"])
    more = patch.object(setup, "_resolve_together", lambda found, *given, **how: setup._resolve(World(), *given, **how))
    with more:
        return steps(folder, "lora", train={"tokens_per_pass": 96 + rank})


def slow_rows(folder: Path) -> Any:
    """Rank 0 encodes for longer than any time-out."""
    right = setup.resolve_run

    def slowly(*given: Any, **how: Any) -> Any:
        if os.environ["RANK"] == "0":
            time.sleep(1.5)
        return right(*given, **how)

    short = {"JOIN_S": 1.2, "DEAD_S": 1.2, "HEARTBEAT_S": 0.2, "COLLECTIVE_S": 30.0}
    with patch.multiple(world, **short), patch.object(setup, "resolve_run", slowly):
        return steps(folder, "lora", train={"max_steps": 1})


def slow_rows_planted(folder: Path) -> Any:
    """A wait with a time-out and without a heartbeat, as in a barrier."""
    with patch.object(World, "_beat", lambda self: None):
        return slow_rows(folder)


def other_data(folder: Path) -> Any:
    """The file of rank 1 has another word in it."""
    own = folder / f"chats-{os.environ['RANK']}.jsonl"
    text = (folder / "chats.jsonl").read_text()
    own.write_text(text.replace("fox", "dog") if os.environ["RANK"] == "1" else text)
    with patch.object(DataFile, "at", property(lambda file: str(own))):
        return steps(folder, "lora")


def other_version(folder: Path) -> Any:
    rank = os.environ["RANK"]
    with patch.object(world, "version", lambda name: f"9.{rank}" if name == "torch" else "1"):
        return steps(folder, "lora", train={"max_steps": 1})


def saved_by_the_library(folder: Path) -> Any:
    """transformers writes on rank 0 alone once a group is up, and says nothing of it."""
    with together_as(recipe_of(folder, "full"), folder) as made:
        place = folder / f"saved-{made.world.rank}"
        place.mkdir()
        try:
            made.model.save_pretrained(place)
        except Exception as error:
            return type(error).__name__
        return sorted(path.name for path in place.iterdir())


TWELVE = "twelve.json"
SPLIT = ("chats", "chat-full", "text", "masked", "classes", "classes-causal", "tags")
"""Those whose layers can be split: LoRA and full tuning of causal models and encoders, with AdamW."""


def twelve(folder: Path, **changes: Any) -> Any:
    """Every recipe of the file, one after the other in one group."""
    recipes = json.loads((folder.parent / TWELVE).read_text())
    found = {}
    for name, given in recipes.items():
        os.environ["TORCHELASTIC_RESTART_COUNT"] = name
        if changes and name not in SPLIT:
            continue
        with in_float32(name), together_as(validate({**given, **changes}), folder) as made:
            found[name] = steps_of(made)
    return found


@contextmanager
def in_float32(name: str) -> Iterator[None]:
    """The run named muon with its products in float32 instead of bfloat16: torch rounds the gradient by this method."""
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone) if name == "muon" else nullcontext():
        yield


def twelve_split(folder: Path) -> Any:
    return twelve(folder, shard=True)
