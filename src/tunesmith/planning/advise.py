"""Every "auto" of a recipe decided from model, rows and machine: a value and one sentence of reason each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.splits import Splits
from tunesmith.environment import default_threads
from tunesmith.evaluation.generate import FEW_ANSWERS, MOST_SHORT, has_short_answers
from tunesmith.formatting import plural
from tunesmith.methods.peft import LEARNING_RATES
from tunesmith.models import machine
from tunesmith.optim import OPTIMIZERS
from tunesmith.recipe.load import validate
from tunesmith.recipe.methods import FullMethod, LoraMethod, LowRankMethod, OptionGroup, PeftMethod
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS, task_of
from tunesmith.types import Choice, Example, ModelKind, TaskName

SMALL_MODEL = 30_000_000
"""Weights up to which full tuning costs no more than LoRA's bookkeeping."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the decisions rest on."""

    num_parameters: int
    device: str
    kind: ModelKind
    lengths_I: NDArray[np.int32]
    """Tokens of each training row."""
    held_targets_I: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Trained tokens of each held-out row."""


FAR = 10.0
"""Mean or deviation of numbers beyond which a head has far to go."""
FEW_PRODUCTS = 2e9
"""Weights times tokens of a pass, up to which full tuning on a processor is as fast in float32."""
TEXT_TOKENS = 1024
"""Longest window of a document: attention to more costs more than it teaches, on most machines."""
TEXT_STEP_TOKENS = 4096
"""Learnt tokens of an update for task text."""
OPERATIONS = 6
"""Of a step for each weight and token, forward and backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
OPERATIONS_PER_SECOND = {"cpu": 1e11, "mps": 2e12}
"""About what is reached where there are few, so that a guess of a step's time is rather too long."""
SAFE_SECONDS = 30.0
"""Of training that a crash may cost: to save more often costs a small model more than its steps."""
FEW_LOOKS = 200
"""Training rows that are looked at afterwards even if that is more than a third of those trained on."""
UNBOUNDED_TOKENS = 512
"""Longest row for a model that names no limit, as T5 was trained."""


def choose_task(example: Example, kind: ModelKind) -> Choice:
    """The task that rows like this one are made for."""
    if (task := task_of(example.shape)) is not None and task.detected:
        return Choice("task", task.name, task.detected)
    if example.plain or kind == "encoder_decoder":
        other = "; task: chat would put them into the chat template" if kind == "causal" else ""
        return Choice("task", "generate", f"rows are prompt and completion as plain text{other}")
    return Choice(
        "task", "chat", f"rows are conversations ({example.shape}), rendered by the model's own chat template"
    )


def choose_precision(recipe: Recipe, num_parameters: int, device: str, *, tokens: float) -> Choice:
    """What weights and activations are computed in where a pass has so many tokens."""
    if isinstance(recipe.method, FullMethod) and recipe.method.rounding == "stochastic":
        return Choice("precision", "bfloat16", "stochastic rounding is for weights in bfloat16")
    if recipe.method.name == "full" and device == "cpu" and num_parameters * tokens <= FEW_PRODUCTS:
        reason = (
            f"a pass has few products ({num_parameters / 1e6:.1f} M weights, about {tokens:,.0f} tokens): to compile "
            "them and to round weights at every update costs more than narrow ones save"
        )
        return Choice("precision", "float32", reason)
    return machine.choose_precision("auto", device)


def choose_longest(task: TaskName, kind: ModelKind, limit: int, *, unbounded: int) -> Choice:
    """The longest row, in tokens."""
    if task == "text" and kind == "causal" and limit > TEXT_TOKENS:
        reason = f"documents are cut in windows; the model could attend to {limit:,}"
        return Choice("data.max_tokens", TEXT_TOKENS, reason)
    if kind == "encoder_decoder" and limit >= unbounded:
        return Choice("data.max_tokens", UNBOUNDED_TOKENS, "the model names no limit; of source and target each")
    return Choice("data.max_tokens", limit, "the most this model can attend to")


def choose_stride(max_tokens: int) -> Choice:
    """How far apart the windows of a long document begin."""
    return Choice("data.stride", max(1, max_tokens - 1), "each window begins with the last token of the one before it")


def choose_too_long(task: TaskName) -> Choice:
    """What happens to a row over the limit."""
    return Choice("data.too_long", *TASKS[task].on_overlong)


def choose_method(num_parameters: int) -> Choice:
    """LoRA, unless the model is so small that training every weight is as cheap."""
    if num_parameters <= SMALL_MODEL:
        return Choice("method", FullMethod(), f"all {num_parameters / 1e6:.1f} M weights are few enough to train")
    full, lora = 16 * num_parameters / 2**30, 2 * num_parameters / 2**30
    reason = f"weights and optimizer need about {lora:.1f} GiB instead of {full:.1f} GiB, and the base is kept as it is"
    return Choice("method", LoraMethod(), reason)


def decide(recipe: Recipe, facts: Facts) -> tuple[Recipe, list[Choice]]:
    """The recipe without any "auto" left, and what was chosen and why, in the order of the recipe."""
    choices: list[Choice] = []
    for key, rule in _RULES.items():
        section, _, name = key.rpartition(".")
        if getattr(getattr(recipe, section) if section else recipe, name) == "auto":
            value, reason = rule(recipe, facts)
            choices.append(Choice(key, value, reason))
            recipe = with_choice(recipe, choices[-1])
    return recipe, choices


def with_choice(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with one option set and checked; where a run's files are now, it still knows."""
    data = recipe.model_dump()
    section, _, name = choice.key.rpartition(".")
    value = choice.value.model_dump() if isinstance(choice.value, OptionGroup) else choice.value
    (data[section] if section else data)[name] = value
    checked = validate(data)
    # Which method it is decides its class, so all of it is made anew but the files, which know their places.
    files = recipe.data.model_copy(update={name: getattr(checked.data, name)}) if section == "data" else recipe.data
    checked = checked.model_copy(update={"data": files})
    return checked if recipe.base is None else checked.on_base(recipe.base)


def far_numbers(rows: Splits) -> list[str]:
    """A note where a head, which starts near 0 and moves by small steps, would have far to go."""
    if rows.labels is None or rows.labels.kind != "number":
        return []
    seen = rows.store.count_labels(rows.train_rows)
    values_V, counts_V = np.array([float(name) for name in seen.names]), seen.counts_V
    mean = float(np.average(values_V, weights=counts_V))
    deviation = float(np.sqrt(np.average((values_V - mean) ** 2, weights=counts_V)))
    if abs(mean) <= FAR and deviation <= FAR:
        return []
    return [
        f"labels are numbers of mean {mean:.4g} and deviation {deviation:.4g}, but a head learns numbers around 0 of "
        "deviation 1 best: subtract the mean and divide by the deviation in your data, and undo it in the answers"
    ]


def operations_per_second(device: str) -> float:
    """About what is reached on such a device; the same every day."""
    return OPERATIONS_PER_SECOND.get(device, 1e13)


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: epochs, or fewer if train.max_steps says so; at least one."""
    epochs = recipe.train.epochs
    assert epochs != "auto", "epochs are decided before steps are counted"
    steps = max(1, round(epochs * steps_per_epoch))
    return min(steps, recipe.train.max_steps or steps)


def _rate(recipe: Recipe, facts: Facts) -> tuple[float, str]:
    rate, reason = _rate_of_adamw(recipe, facts)
    times, source = OPTIMIZERS[recipe.optim.name].rate
    return float(f"{rate * times:.3g}"), f"{reason}; {source}" if source else reason


def _rate_of_adamw(recipe: Recipe, facts: Facts) -> tuple[float, str]:
    if facts.kind != "causal" and recipe.method.name == "full":
        rate = 1e-4 if facts.num_parameters < 50e6 else 3e-5 if facts.kind == "encoder" else 1e-4
        return rate, f"usual for full tuning of an {facts.kind.replace('_', '–')} of this size"
    if isinstance(recipe.method, PeftMethod) and recipe.method.kind in LEARNING_RATES:
        rate, source = LEARNING_RATES[recipe.method.kind]
        return rate, f"usual for {recipe.method.kind}: {source}"
    small = facts.num_parameters < 1e9
    if isinstance(recipe.method, PeftMethod):
        return (
            5e-4 if small else 2e-4
        ), f"that of LoRA: for {recipe.method.kind} none is known here, so try others too"
    if isinstance(recipe.method, LowRankMethod):
        return (5e-4 if small else 2e-4), f"usual for LoRA on a model {'below' if small else 'above'} a billion weights"
    return (5e-5 if small else 1e-5), f"usual for full tuning {'below' if small else 'above'} a billion weights"


def _epochs(recipe: Recipe, facts: Facts) -> tuple[float, str]:
    rows = len(facts.lengths_I)
    if TASKS[resolved(recipe.task)].learns_classes:
        epochs = 5.0 if rows < 1000 else 3.0
        return epochs, f"{plural(rows, 'row')}, and a new head has to be learnt"
    epochs = 3.0 if rows < 300 else 2.0 if rows < 1000 else 1.0

    why = "few rows are seen more often" if epochs > 1 else "enough to see each once"
    return epochs, f"{plural(rows, 'row')}: {why}"


def _rows_per_step(recipe: Recipe, facts: Facts) -> tuple[int, str]:
    rows = len(facts.lengths_I)
    value = max(1, min(16, rows // 20))
    if recipe.task == "text" and (some := max(1, round(TEXT_STEP_TOKENS / float(np.mean(facts.lengths_I))))) < value:
        return some, f"about {TEXT_STEP_TOKENS:,} tokens an update: every token of a window is learnt"
    return value, "about 20 updates an epoch at least" if value < 16 else "a steady gradient at little cost"


def _tokens_per_pass(recipe: Recipe, facts: Facts) -> tuple[int, str]:
    longest = int(facts.lengths_I.max())
    usual = 8192 if facts.device.startswith("cuda") else 2048
    if longest > usual:
        return longest, f"the longest row has {plural(longest, 'token')}"
    return usual, f"fills the matrix products of {facts.device}; the longest row has {plural(longest, 'token')}"


def _precision(recipe: Recipe, facts: Facts) -> tuple[str, str]:
    step = float(facts.lengths_I.mean()) * resolved(recipe.train.rows_per_step)
    tokens = min(step, resolved(recipe.train.tokens_per_pass))
    choice = choose_precision(recipe, facts.num_parameters, facts.device, tokens=tokens)
    return choice.value, choice.reason


def _keep(recipe: Recipe, facts: Facts) -> tuple[str, str]:
    if recipe.evaluation.every is None:
        return "last", "nothing is measured on the way"
    return "best", f"the evaluation with the best {recipe.evaluation.metric} is the result"


def _threads(recipe: Recipe, facts: Facts) -> tuple[int, str]:
    return default_threads()


def _checkpoint_every(recipe: Recipe, facts: Facts) -> tuple[int, str]:
    rows_per_step = recipe.train.rows_per_step
    assert rows_per_step != "auto"
    steps = total_steps(recipe, -(-len(facts.lengths_I) // rows_per_step))
    tokens = float(facts.lengths_I.mean()) * rows_per_step
    seconds = OPERATIONS * facts.num_parameters * tokens / operations_per_second(facts.device)
    share, short = max(10, steps // 10), math.ceil(SAFE_SECONDS / seconds)
    if min(short, 500) > share:
        return min(short, 500), "steps are short: less than a minute is the most that a crash costs"
    every = min(500, share)
    return every, f"a tenth of {steps:,} steps is the most that a crash costs" if every > 10 else "short run"


def _surprising(recipe: Recipe, facts: Facts) -> tuple[int, str]:
    rows_per_step, rows = recipe.train.rows_per_step, len(facts.lengths_I)
    assert rows_per_step != "auto"
    seen = total_steps(recipe, -(-rows // rows_per_step)) * rows_per_step
    most = min(rows, seen, max(FEW_LOOKS, seen // 3))
    # A look is a forward pass, a half to a third of what training on a row costs.
    return (
        most,
        "all of them" if most == rows else f"of {rows:,} rows, so that this takes little of the time of the run",
    )


def _samples(recipe: Recipe, facts: Facts) -> tuple[int, str]:
    if TASKS[resolved(recipe.task)].learns_classes or facts.kind == "encoder":
        return 0, "such a model writes no answers"
    if not has_short_answers(facts.held_targets_I):
        return FEW_ANSWERS, "enough to look at"
    num = min(len(facts.held_targets_I), MOST_SHORT)
    which = f"{num:,} of the" if num < len(facts.held_targets_I) else "all"
    return num, f"answers are short: {which} held-out rows are answered, and counted as right or wrong"


_RULES: dict[str, Callable[[Recipe, Facts], tuple[Any, str]]] = {
    "optim.lr": _rate,
    "train.epochs": _epochs,
    "train.rows_per_step": _rows_per_step,
    "train.tokens_per_pass": _tokens_per_pass,
    "precision": _precision,
    "threads": _threads,
    "evaluation.keep": _keep,
    "checkpoint.every": _checkpoint_every,
    "evaluation.surprising": _surprising,
    "evaluation.samples": _samples,
}
"""In order: a later rule may rest on what an earlier one decided."""
