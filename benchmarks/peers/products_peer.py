"""One case of `python -m benchmarks.products`: products_peer.py SPEC.json OUT.json."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.measured import median_seconds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tunesmith.cli.options import chosen
from tunesmith.planning.tracing import Call, Operand, Product, Segment, Tracer
from tunesmith.recipe.schema import Recipe
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare

WARM = 6
"""Steps before the first that counts: products are compiled, the heap is as large as it gets."""
PROFILED = 4
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True, slots=True)
class Share:
    """A step, and its products by themselves."""

    precision: str
    threads: int
    tokens: int
    """Of the step."""
    seconds: list[float]
    """Of the step, each time that it was made."""
    num_products: int
    products_seconds: float
    flops: int
    """Of all products; a multiply-add is two."""
    operations: list[tuple[str, float, float]]
    """Of a step that torch's profiler looks into, the longest first: name, seconds without what it calls, calls."""


def measure(recipe: Recipe, root: Path, *, num_steps: int, num_operations: int = 0) -> Share:
    """The first step of a run, made again and again. Its seconds are taken `num_steps` times before its products are
    timed and as often after them, so that a machine that slows down hits both alike."""
    profiled = PROFILED if num_operations else 0
    setup = repeated(prepare(recipe, root=root), WARM + 2 * num_steps + 2 + profiled)
    steps = training_steps(setup)
    for _ in islice(steps, WARM):
        pass
    timed = list(islice(steps, num_steps))
    tracer = Tracer((), lambda: 0)
    with tracer:
        next(steps)
    found = products_of(tracer.close())
    alone = sum(num * median_seconds(_ready(product.call)) for product, num in found.items())
    next(steps)  # brings the step's own numbers back into the caches
    timed += islice(steps, num_steps)
    operations = operations_of(steps)[:num_operations] if profiled else []
    return Share(
        precision=str(setup.recipe.precision),
        threads=torch.get_num_threads(),
        tokens=timed[0].values["tokens"],
        seconds=[event.timing["seconds"] for event in timed],
        num_products=found.total(),
        products_seconds=alone,
        flops=sum(num * product.flops for product, num in found.items()),
        operations=operations,
    )


def operations_of(steps: Iterable[Any]) -> list[tuple[str, float, float]]:
    """As `Share.operations`, of these steps."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        num = sum(1 for _ in steps)
    found = [(event.key, event.self_cpu_time_total / 1e6 / num, event.count / num) for event in profiler.key_averages()]
    return sorted(found, key=lambda one: -one[1])


def repeated(setup: Setup, total_steps: int) -> Setup:
    """The run whose every epoch is its first step: of the same rows, and so of the same passes."""
    rows = sorted(row for rows in setup.plan.step(1) for row in rows)
    lengths = np.array(setup.plan.lengths_of(tuple(rows)), np.int32)
    plan = replace(setup.plan, rows_I=np.array(rows), weights_I=np.ones(len(rows)), lengths_I=lengths)
    return replace(setup, plan=plan, total_steps=total_steps)


def products_of(segments: Iterable[Segment]) -> Counter[Product]:
    """How often each matrix product was called, in place and into a given tensor as well; without the kernels of
    attention, which compute much else."""
    found: Counter[Product] = Counter()
    for segment in segments:
        for product, num in segment.products.items():
            if product.call.func.overloadpacket.__name__.rstrip("_") in PRODUCTS:
                found[product] += num
    return found


def _ready(call: Call) -> Callable[[], None]:
    args, kwargs = drawn(call.args), dict(drawn(call.kwargs))

    @torch.no_grad()
    def way() -> None:
        call.func(*args, **kwargs)

    return way


def drawn(spec: Any) -> Any:
    """What a call was given, with tensors of random numbers that lie as its own did."""
    if isinstance(spec, Operand):
        return _drawn(spec)
    return [drawn(one) for one in spec] if isinstance(spec, tuple) else spec


def _drawn(operand: Operand) -> Tensor:
    last = sum((size - 1) * stride for size, stride in zip(operand.shape, operand.stride, strict=True))
    flat = torch.randn(last + 1).to(operand.dtype)
    return flat.as_strided(operand.shape, operand.stride)


def main(spec_path: str, out_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text("utf-8"))
    words = {"method.name": spec["method"], "task": spec["task"], "train.rows_per_step": spec["rows_per_step"]}
    # Nothing else of a run is looked at, and it may be larger than its plan allows.
    settings = ["device=cpu", "memory=warn", "evaluation.samples=0", "evaluation.general=false", *spec["set"]]
    recipe = chosen("train", spec["model"], [spec["train"]], held_out=None, recipe=None, words=words, settings=settings)
    found = measure(recipe, Path(spec["folder"]), num_steps=spec["steps"], num_operations=spec["operations"])
    Path(out_path).write_text(json.dumps({name: getattr(found, name) for name in Share.__slots__}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
