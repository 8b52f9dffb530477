"""`python -m benchmarks step`: what a training step takes, beside its matrix products alone.

The limit is what a step would take if there were nothing but the products of the model's own weights: each linear layer
forward, backward to its input and, where it is trained, to its weight, at the step's tokens; the output layer at its
targets. It is measured by `torch.nn.functional.linear` and `matmul` in the same process as the steps, so the share of
the limit that a run reaches says the same on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.measured import machine

WARM, ROUNDS = 2, 3
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss and output layer", ("_LossSum", "_LogProbs")),
    ("attention", ("_ShortRowAttention", "_Spread", "scaled_dot_product")),
    ("norms", ("_RmsNorm", "layer_norm")),
    ("optimizer", ("ptimizer",)),
    ("layers' nodes", ("_Linears", "_GatedMlp")),
)
"""Kinds of work and the words in the names of operations, or of those that called them, by which they are known."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


def add_step(verbs: Any) -> None:
    step = verbs.add_parser(
        "step",
        help="steps of training beside their matrix products alone, and where the rest goes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = step.add_argument
    add("--model", required=True, help="a folder, or a .gguf file")
    add("--rows", required=True, help="a file of rows")
    add("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    add("--steps", type=int, default=12, help=f"the first {WARM} do not count")
    add("--rows-per-step", type=int, default=16)
    add("--threads", type=int, default=2)
    add("--kernels", default="fast", choices=["fast", "plain"])
    add("--task", default="auto", help="what is learnt from the rows, such as classify")
    step.set_defaults(run=_step)
    limit = verbs.add_parser("limit", help="how near a finished run on a processor came to its products alone")
    limit.add_argument("run_folder", type=Path, help="a run on a model that is a folder")
    limit.set_defaults(run=_limit)


def _step(options: argparse.Namespace, words: Sequence[str]) -> int:
    from tunesmith.environment.settings import prepare_environment

    prepare_environment(os.environ)
    print(f"{machine()['processor']}, {options.threads} threads, kernels: {options.kernels}", flush=True)
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            _measure(options, method, Path(folder))
    return 0


def _measure(options: argparse.Namespace, method: str, root: Path) -> None:
    import torch

    import tunesmith

    recipe = tunesmith.Recipe.model_validate(
        {
            "model": options.model,
            "task": options.task,
            "data": {"train": [options.rows]},
            "threads": options.threads,
            "kernels": options.kernels,
            "method": {"name": method},
            "train": {"rows_per_step": options.rows_per_step, "max_steps": options.steps + 1},
            "evaluation": {"max_rows": 1, "samples": 0, "general": False, "surprising": 0},
        }
    )
    setup = tunesmith.prepare(recipe, root=root)
    steps = tunesmith.training_steps(setup)
    layers = weights_of(setup.model)
    limit, seconds, tokens, each = 0.0, 0.0, 0, []
    for number in range(options.steps):
        event = next(steps)
        if number >= WARM:  # right after each step, so that both meet the machine in the same state
            alone = _alone(event, layers, trained=method == "full")
            limit, seconds = limit + alone, seconds + event.timing["seconds"]
            tokens += int(event.values["computed"])
            each.append(alone / event.timing["seconds"])
    with torch.profiler.profile(record_shapes=True) as profile:
        next(steps)
    print(
        f"\n{method}: {tokens / seconds:.0f} computed tokens/s, the products alone {tokens / limit:.0f}: share "
        f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f} of {len(each)} steps)\n\n"
        "| | ms | of the step |\n|---|---:|---:|"
    )
    kinds = kinds_of(profile, rank=getattr(recipe.method, "rank", 0))
    for kind, spent in kinds.most_common():
        print(f"| {kind} | {spent / 1e3:.0f} | {spent / kinds.total():.1%} |", flush=True)


def _limit(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Print the middle share of the run's steps after the first half, ten at most."""
    from tunesmith.environment.settings import prepare_environment

    prepare_environment(os.environ)
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    lines = (options.run_folder / "events.jsonl").read_text("utf-8").splitlines()
    steps = [SimpleNamespace(**event) for event in map(json.loads, lines) if event["kind"] == "step"]
    recipe = yaml.safe_load((options.run_folder / "recipe.yaml").read_text("utf-8"))
    torch.set_num_threads(int(recipe["threads"]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(recipe["model"]))
    layers = weights_of(model, dtype=getattr(torch, recipe["precision"]))
    counted = steps[min(10, len(steps) // 2) :]
    trained = recipe["method"]["name"] == "full"
    each = [_alone(event, layers, trained=trained) / event.timing["seconds"] for event in counted]
    print(f"{statistics.median(each):.3f}")
    return 0


Layers = Sequence[tuple[Any, bool]]
"""Weights of linear layers, and whether each lies behind the layers, where it reads the targets alone."""


def _alone(event: Any, layers: Layers, *, trained: bool) -> float:
    """Seconds that the products of a step take alone."""
    tokens, targets, passes = (int(event.values[name]) for name in ("computed", "targets", "passes"))
    return passes * products_seconds(layers, tokens // passes, targets // passes, trained=trained)


def weights_of(model: Any, *, dtype: Any = None) -> Layers:
    """The weights of the model's linear layers; of a model of shapes, random ones of a type."""
    import torch

    from tunesmith.models.modes import layers_of

    inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
    modules = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    return [
        (
            torch.randn(one.weight.shape, dtype=dtype) if one.weight.is_meta else one.weight.detach(),
            id(one) not in inside,
        )
        for one in modules
    ]


def products_seconds(layers: Layers, tokens: int, targets: int, *, trained: bool) -> float:
    """Seconds of the products of one pass with so many tokens and targets, the least of a few rounds."""
    import torch

    width = {size for weight_OI, _ in layers for size in weight_OI.shape}
    inputs = {size: torch.randn(max(tokens, targets, 1), size).to(layers[0][0].dtype) for size in width}
    least = float("inf")
    with torch.no_grad():
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            for weight_OI, is_head in layers:
                num_outputs, num_inputs = weight_OI.shape
                rows = targets if is_head else tokens
                x_TI, g_TO = inputs[num_inputs][:rows], inputs[num_outputs][:rows]
                torch.nn.functional.linear(x_TI, weight_OI)
                torch.matmul(g_TO, weight_OI)
                if trained:
                    torch.matmul(g_TO.t(), x_TI)
            least = min(least, time.perf_counter() - begun)
    return least


def kinds_of(profile: Any, *, rank: int) -> Counter[str]:
    """Microseconds of a profiled step by kind of work, each operation's own time counted once."""
    spent: Counter[str] = Counter()
    for event in profile.events():
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        calls = " ".join(names)
        shapes = [shape for shape in event.input_shapes or [] if shape]
        kind = next((kind for kind, marks in KINDS if any(mark in calls for mark in marks)), "")
        if event.name in PRODUCTS and kind in ("", "layers' nodes"):
            thin = rank and any(0 < min(shape) <= 3 * rank for shape in shapes if len(shape) == 2)
            kind = "thin products of LoRA" if thin else "products"
        elif event.name in PRODUCTS:
            kind += ": products"
        elif not kind:
            is_headed = any(len(shape) == 4 for shape in shapes)
            kind = "rotary positions and heads" if is_headed else "residuals, gradients of weights, the rest"
        spent[kind] += int(event.self_cpu_time_total)
    return spent
