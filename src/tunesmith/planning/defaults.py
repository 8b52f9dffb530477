"""Every "auto" of a recipe decided from model, rows and machine: a value and one sentence of reason each.

`decide_before_rows` decides what has to be known before rows can be encoded, `decide` the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.columns import absent_columns, ask_text_or_classes, usual_columns
from tunesmith.data.formats import task_of_rows
from tunesmith.data.splits import Splits, first_example
from tunesmith.environment.process import default_threads
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.evaluation.generate import FEW_ANSWERS, MOST_SHORT, has_short_answers, new_tokens_for
from tunesmith.evaluation.metrics import METRICS
from tunesmith.generation.writer import cache_tokens, written_together
from tunesmith.methods import METHODS, method_of
from tunesmith.models import machine
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.size import UNBOUNDED, ModelSize
from tunesmith.optim import OPTIMIZERS
from tunesmith.phrases import plural
from tunesmith.planning.decisions import Decisions
from tunesmith.recipe.methods import FullMethod, LoraMethod, MethodOptions, OptionGroup
from tunesmith.recipe.schema import Data, EvaluationOptions, Loss, Optim, Recipe, Train, resolved
from tunesmith.tasks import TASKS, has_prepass
from tunesmith.tasks.distil import task_by_teacher
from tunesmith.tasks.reinforce import epochs_of, task_by_grader
from tunesmith.tasks.task import Task
from tunesmith.tasks.texts import CHAT, GENERATE
from tunesmith.types import Choice, HeadName, ModelKind, TaskName

SMALL_MODEL = 30_000_000
"""Most weights for which full tuning costs no more than LoRA."""
SMALL_ON_CARD = 200_000_000
"""Weights below which products of 8,192 tokens take a card less time than their start."""
FAR = 10.0
"""Mean or deviation of numbers above which a head learns slowly."""
FEW_PRODUCTS = 2e9
"""Weights times tokens of a micro-batch, up to which float32 is as fast for full tuning on a processor."""
TEXT_TOKENS = 1024
"""Longest window of a document: attention to more costs more than it teaches, on most machines."""
TEXT_STEP_TOKENS = 4096
"""Targets of an update for task text."""
OPERATIONS = 6
"""Operations of a step for each weight and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
OPERATIONS_PER_SECOND = {"cpu": 1e11, "mps": 2e12}
"""A low guess of the speed of a device, the same every day; others: 1e13."""
SAFE_SECONDS, MOST_STEPS_LOST = 120.0, 500
"""Training time, and steps, that a crash may cost."""
SAVING_SHARE = 0.1
"""Most of a run's steps that saving takes besides."""
SMALL_CLASSIFIER = 1_000_000_000
"""Weights below which a classifier or embedder is measured on the way."""
ON_THE_WAY = 0.1
"""Share of the training that measuring on the way may take."""
FEW_LOOKS = 200
"""Training rows measured after training even if that is more than a third of those trained on."""
MOST_IN_ONE = 32_768
"""Most tokens of a step that is computed in one pass for the sake of its loss."""
UNBOUNDED_TOKENS = 512
"""Longest row for a model that names no limit, as T5 was trained."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Numbers that the rules for defaults read, so that a rule needs neither rows nor a model."""

    num_parameters: int
    device: str
    kind: ModelKind
    lengths_I: NDArray[np.int32]
    """Tokens of each training row; of a prompt those that its answers take in a step."""
    held_targets_I: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Targets of each held-out row."""
    held_tokens: int = 0
    """Tokens that are read each time the held-out rows are measured."""
    processes: int = 1
    """Processes of the run on this machine."""
    rows_per_epoch: int = 0
    """Rows of an epoch, each as often as it is taken; 0: each once."""
    headline: str = "loss"
    """Metric that the report leads with, where rows have labels."""

    def steps_per_epoch(self, rows_per_step: int) -> int:
        return -(-(self.rows_per_epoch or len(self.lengths_I)) // rows_per_step)


def decide_before_rows(decisions: Decisions, located: ModelRef, size: ModelSize, kind: ModelKind) -> None:
    """Decide task, method, device and longest row. Raises ModelError for data.max_tokens beyond the model,
    DataError where only a person can tell the task, RecipeError for an option that task or model do not
    take."""
    recipe, limit = decisions.recipe, size.max_tokens
    if recipe.data.max_tokens != "auto" and recipe.data.max_tokens > limit:
        raise ModelError(
            f"{located.name}: data.max_tokens is {recipe.data.max_tokens:,}, but the model can attend to "
            f"{limit:,} tokens. Lower it; if a run of an earlier version had more, start a new one."
        )

    def choose(key: str, rule: Callable[[], Choice]) -> None:
        if decisions.is_open(key):
            decisions.decide(rule())

    by_grader = task_by_grader(recipe.task, recipe.reinforce.grader)
    if by_option := by_grader or task_by_teacher(recipe.task, recipe.distil.teacher):
        decisions.decide(by_option)
        recipe = decisions.recipe
    if absent := absent_columns(recipe.data):
        raise DataError("\n".join(map(str, absent)), absent)
    if usual := usual_columns(recipe.data, None if recipe.task == "auto" else recipe.task):
        decisions.decide(Choice("data.columns", *usual))
    choose("task", lambda: _task_of_first_row(decisions.recipe.data, kind))
    choose("method", lambda: _method(size.num_params))
    choose("device", lambda: machine.choose_device("auto"))
    task = TASKS[resolved(decisions.recipe.task)]
    if task.section:
        decisions.decide(*task.section.from_model(decisions.recipe, located))
    choose("data.max_tokens", lambda: _max_tokens(task, kind, limit))
    choose("data.too_long", lambda: Choice("data.too_long", *task.on_overlong))
    recipe = decisions.recipe
    if task.section:
        _check_compared(recipe.data, recipe.loss, task, getattr(recipe, task.section.name))
    if (task.compares or task.samples) and (option := METHODS[recipe.method.name].randomness(recipe.method)):
        what = "compares passes over a row" if task.compares else "learns what the model draws without it"
        raise RecipeError(f"{option}: the task {task.name} {what}. Leave it out.")
    if recipe.data.prompt is not None and not task.has_prompt:
        raise RecipeError(f"data.prompt: is for the task summarize; this is {task.name}. Leave it out.")
    if task.in_windows and kind == "causal":
        stride = max(1, resolved(recipe.data.max_tokens) - 1)
        reason = "each window begins with the last token of the one before it"
        choose("data.stride", lambda: Choice("data.stride", stride, reason))


def decide(decisions: Decisions, facts: Facts) -> None:
    """Decide every "auto" that rows can decide, in the order of the rules. Raises RecipeError."""
    if decisions.recipe.train.rows_per_step == 1 and has_prepass(decisions.recipe):
        raise RecipeError("train.rows_per_step: 1: a row is compared with the others of its step. Use 2 or more.")
    task = TASKS[resolved(decisions.recipe.task)]
    for key, rule in _RULES.items():
        if not decisions.is_open(key):
            continue
        choice = Choice(key, *rule(decisions.recipe, task, facts))
        if key == "optim.lr":  # the rate contains the factor now
            decisions.set("optim.lr_times", 1.0)
        decisions.set(key, choice.value)
        if choice.reason:
            decisions.show(choice)


KIND_NAMES: dict[ModelKind, str] = {
    "causal": "decoder-only", "encoder": "encoder-only", "encoder_decoder": "an encoder–decoder",
}  # fmt: skip
"""Kinds of models as the field calls them."""


def find_head(task: TaskName, located: ModelRef, kind: ModelKind) -> HeadName:
    """The head that the task needs on a model of this kind. Raises ModelError if it cannot learn it."""
    heads = TASKS[task].heads
    if kind not in heads:
        can = ", ".join(name for name, other in TASKS.items() if kind in other.heads)
        fitting = " or ".join(KIND_NAMES[other] for other in heads)
        way = f"Use one that is {fitting}, or a task that this one can learn: {can}"
        raise ModelError(f"{located.name}: this model is {KIND_NAMES[kind]}: it cannot learn the task {task}. {way}.")
    return heads[kind]


def far_numbers(rows: Splits) -> list[str]:
    """A note where labels are numbers far from 0, which a head, whose weights start near 0, learns slowly."""
    if rows.labels is None or rows.labels.kind != "number" or rows.store.branches.has_any:
        return []
    seen = rows.store.count_labels(rows.train_rows)
    values_I = np.repeat([float(name) for name in seen.names], seen.counts_V)
    mean, deviation = float(values_I.mean()), float(values_I.std())
    if abs(mean) <= FAR and deviation <= FAR:
        return []
    return [
        f"labels are numbers of mean {mean:.4g} and deviation {deviation:.4g}, but a head learns numbers "
        "around 0 of deviation 1 best: subtract the mean and divide by the deviation in your data, and undo it "
        "in the answers"
    ]


def total_steps(train: Train, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: epochs, or fewer if train.max_steps says so; at least one."""
    assert train.epochs != "auto", "epochs are decided before steps are counted"
    steps = max(1, round(train.epochs * steps_per_epoch))
    return min(steps, train.max_steps or steps)


def _task_of_first_row(data: Data, kind: ModelKind) -> Choice:
    example = first_example(data)
    if (task := TASKS[task_of_rows(example.shape)]).detected:
        if task.in_windows and (question := ask_text_or_classes(data)):
            raise question
        return Choice("task", task.name, task.detected)
    if (example.plain and not example.images) or kind == "encoder_decoder":
        other = "; task: chat would put them into the chat template" if kind == "causal" else ""
        return Choice("task", GENERATE.name, f"rows are prompt and completion as plain text{other}")
    reason = f"rows are conversations ({example.shape}), rendered by the model's own chat template"
    return Choice("task", CHAT.name, reason)


def precision_for(num_parameters: int, device: str, *, is_adapter: bool, tokens: float) -> Choice:
    """The type that weights and activations are computed in, for micro-batches of `tokens`."""
    if not is_adapter and device == "cpu" and num_parameters * tokens <= FEW_PRODUCTS:
        reason = (
            f"a pass has few products ({num_parameters / 1e6:.1f} M weights, about {tokens:,.0f} tokens): to "
            "compile them and to round weights at every update costs more than narrow ones save"
        )
        return Choice("precision", "float32", reason)
    return machine.choose_precision("auto", device)


def _method(num_parameters: int) -> Choice:
    if num_parameters <= SMALL_MODEL:
        reason = f"all {num_parameters / 1e6:.1f} M weights are few enough to train"
        return Choice("method", FullMethod(), reason)
    full, lora = 16 * num_parameters / 2**30, 2 * num_parameters / 2**30
    reason = f"weights and optimizer need about {lora:.1f} GiB instead of {full:.1f} GiB, and the base is kept as it is"
    return Choice("method", LoraMethod(), reason)


def _max_tokens(task: Task, kind: ModelKind, limit: int) -> Choice:
    if task.in_windows and kind == "causal" and limit > TEXT_TOKENS:
        reason = f"documents are cut in windows; the model could attend to {limit:,}"
        return Choice("data.max_tokens", TEXT_TOKENS, reason)
    if kind == "encoder_decoder" and limit >= UNBOUNDED:
        reason = "the model names no limit; of source and target each"
        return Choice("data.max_tokens", UNBOUNDED_TOKENS, reason)
    return Choice("data.max_tokens", limit, "the most this model can attend to")


def _check_compared(data: Data, loss: Loss, task: Task, options: OptionGroup) -> None:
    """Raise RecipeError for options that would change what is compared, or change nothing."""
    if data.too_long == "cut" and task.on_overlong[0] == "error":
        raise RecipeError(
            "data.too_long: cut: the model would learn to tell a cut answer by its missing end. Use error or drop."
        )
    for option in ("label_smoothing", "z_loss"):
        if getattr(loss, option):
            way = f"Use {task.section.name}.{option}" if task.section and hasattr(options, option) else "Leave it out"
            raise RecipeError(f"loss.{option}: is for tokens and classes; task {task.name} compares. {way}.")


def _rate(options: MethodOptions, optim: Optim, task: Task, facts: Facts) -> tuple[float, str]:
    method = METHODS[options.name]
    if (task_rates := task.rates) is not None:
        rate = (task_rates.adapter if method.is_adapter else task_rates.full)[facts.num_parameters >= task_rates.large]
        reason = f"usual for task {task.name} {'with an adapter' if method.is_adapter else 'in full tuning'}"
    else:
        rate, reason = method.learning_rate(options, facts.kind, facts.num_parameters)
    times, source = OPTIMIZERS[optim.name].rate
    reason = f"{reason}; {source}" if source else reason
    reason += f", times {optim.lr_times:g}" if optim.lr_times != 1 else ""
    return float(f"{rate * times * optim.lr_times:.3g}"), reason


def rate_notes(method: MethodOptions, optim: Optim, task: Task, facts: Facts) -> list[str]:
    """A note where the learning rate is far above the one that would be chosen."""
    usual, _ = _rate(method, optim, task, facts)
    rate = float(resolved(optim.lr))
    if rate <= HIGH_RATE * usual:
        return []
    return [
        f"optim.lr: {rate:g} is {rate / usual:,.0f} times the usual {usual:g}: the loss may rise and never "
        "come back: tunesmith explain loss-is-nan"
    ]


def _epochs(train: Train, task: Task, facts: Facts) -> tuple[float, str]:
    rows = len(facts.lengths_I)
    if task.samples:
        return epochs_of(train.rows_per_step, facts.rows_per_epoch or rows)
    sooner = "; train.max_steps can end it sooner" if train.max_steps else ""
    if task.learns_classes and not task.is_chat:  # a number for an answer is learnt by heart soon
        return (5.0 if rows < 1000 else 3.0), f"{plural(rows, 'row')}, and a new head has to be learnt{sooner}"
    epochs = 3.0 if rows < 300 else 2.0 if rows < 1000 else 1.0
    why = "few rows are seen more often" if epochs > 1 else "enough to see each once"
    return epochs, f"{plural(rows, 'row')}: {why}{sooner}"


def _rows_per_step(recipe: Recipe, task: Task, facts: Facts) -> tuple[int, str]:
    rows, most = len(facts.lengths_I), task.rows_per_step
    if task.samples:
        return min(most, rows), f"{recipe.reinforce.samples} answers to each are learnt"
    devices = recipe.devices if isinstance(recipe.devices, int) else 1
    wanted = min(MOST_TIMES_ROWS * most, ROWS_OF_A_DEVICE * devices)
    if wanted > most and (value := min(wanted, rows // 20)) > most:
        why = f"{ROWS_OF_A_DEVICE} rows for each of {devices} devices, at most {MOST_TIMES_ROWS} times the usual {most}"
        return value, why
    value = max(1, min(most, rows // 20))
    if has_prepass(recipe) and value < LEAST_COMPARED:
        return min(LEAST_COMPARED, rows), "few rows, and each is compared with the others of its step"
    rows_of_text = max(1, round(TEXT_STEP_TOKENS / float(np.mean(facts.lengths_I))))
    if task.in_windows and rows_of_text < value:
        return rows_of_text, f"about {TEXT_STEP_TOKENS:,} tokens an update: every token of a window is learnt"
    return value, "about 20 updates an epoch at least" if value < most else "a steady gradient at little cost"


def _tokens_per_pass(recipe: Recipe, task: Task, facts: Facts) -> tuple[int, str]:
    longest = int(facts.lengths_I.max())
    usual = 2048
    if task.samples:
        longest //= recipe.reinforce.samples
    if facts.device.startswith("cuda"):
        usual = 16_384 if facts.num_parameters < SMALL_ON_CARD else 8192
    rows = resolved(recipe.train.rows_per_step)
    if has_prepass(recipe):
        mean, deviation = float(facts.lengths_I.mean()), float(facts.lengths_I.std())
        step = math.ceil(rows * mean + 3 * math.sqrt(rows) * deviation)
        if max(usual, longest) < step <= MOST_IN_ONE:
            return step, "fits a whole step in one micro-batch; splitting it would cost an extra forward pass"
    if longest > usual:
        return longest, f"the longest row has {plural(longest, 'token')}"
    return usual, f"fills the matrix products of {facts.device}; the longest row has {plural(longest, 'token')}"


def _precision(method: MethodOptions, train: Train, facts: Facts) -> tuple[str, str]:
    step = float(facts.lengths_I.mean()) * resolved(train.rows_per_step)
    tokens = min(step, resolved(train.tokens_per_pass))
    is_adapter = method_of(method).is_adapter
    choice = precision_for(facts.num_parameters, facts.device, is_adapter=is_adapter, tokens=tokens)
    return choice.value, choice.reason


def _every(train: Train, documents: int, task: Task, facts: Facts) -> tuple[int | str | None, str]:
    """On the way a run is measured where that is cheap and learning by heart is near: new heads and
    vectors of small models learn few rows in several epochs. Nothing is said of others.
    `documents`: see `embed.documents`."""
    per_epoch = facts.steps_per_epoch(resolved(train.rows_per_step))
    epochs = total_steps(train, per_epoch) // per_epoch
    learns_head = (task.learns_classes or task.pools) and facts.num_parameters < SMALL_CLASSIFIER
    if not learns_head or epochs < 2 or facts.held_tokens == 0:
        return None, ""
    once = facts.held_tokens
    if task.pools:  # documents of other rows are read too
        once += int(min(documents, len(facts.lengths_I)) * float(facts.lengths_I.mean()))
    trained = epochs * float(facts.lengths_I.mean()) * (facts.rows_per_epoch or len(facts.lengths_I))
    looks = int(ON_THE_WAY * TRAINED * trained) // once
    if looks < 2:
        return None, ""
    if looks >= epochs:
        return "epoch", "it costs less than a tenth of the training, and shows when rows are learnt by heart"
    num = -(-epochs // looks)
    return num * per_epoch, f"every {num} epochs: it costs less than a tenth of the training"


def _metric(evaluation: EvaluationOptions, facts: Facts) -> tuple[str, str]:
    if evaluation.every is None or facts.headline == "loss":
        return facts.headline, ""
    return facts.headline, "the report leads with it; of equally good evaluations the one with the lower loss is best"


def _keep(evaluation: EvaluationOptions) -> tuple[str, str]:
    if evaluation.every is None:
        return "last", "nothing is measured on the way"
    return "best", f"the evaluation with the best {METRICS[evaluation.metric].label} is the result"


def _checkpoint_every(train: Train, facts: Facts) -> tuple[int, str]:
    rows_per_step = resolved(train.rows_per_step)
    steps = total_steps(train, facts.steps_per_epoch(rows_per_step))
    tokens = float(facts.lengths_I.mean()) * rows_per_step
    seconds = OPERATIONS * facts.num_parameters * tokens / OPERATIONS_PER_SECOND.get(facts.device, 1e13)
    return checkpoint_every(steps, step_seconds=seconds, saving_seconds=0.0)


def checkpoint_every(steps: int, *, step_seconds: float, saving_seconds: float) -> tuple[int, str]:
    """Steps between checkpoints and why: up to ten checkpoints in a run, so close that a crash costs little,
    and so far apart that saving takes at most a tenth of the run."""
    apart = max(SAFE_SECONDS, saving_seconds / SAVING_SHARE)
    num = max(1, min(10, int(steps * step_seconds / apart)))
    every = max(min(MOST_STEPS_LOST, -(-steps // num)), math.ceil(saving_seconds / SAVING_SHARE / step_seconds))
    if every >= steps:
        return every, f"a run of {plural(steps, 'step')} is saved before the first and after the last"
    return every, f"a crash costs at most {every} of {steps:,} steps"


def _surprising(train: Train, task: Task, facts: Facts) -> tuple[int, str]:
    rows = len(facts.lengths_I)
    if task.samples:
        return 0, ""
    if task.sees_rows:
        return rows, "all of the last epoch: training has seen their losses, which costs nothing more"
    rows_per_step = resolved(train.rows_per_step)
    seen = total_steps(train, facts.steps_per_epoch(rows_per_step)) * rows_per_step
    # Measuring a row is a forward pass: a half to a third of what training on it costs.
    most = min(rows, seen, max(FEW_LOOKS, seen // 3))
    return most, "all of them" if most == rows else f"of {rows:,} rows, so that this takes little of the run's time"


def _samples(task: Task, facts: Facts) -> tuple[int, str]:
    if task.learns_classes or facts.kind == "encoder":
        return 0, "such a model writes no answers"
    if task.samples or not has_short_answers(facts.held_targets_I):
        return FEW_ANSWERS, "enough to look at"
    num = min(len(facts.held_targets_I), MOST_SHORT)
    which = f"{num:,} of the" if num < len(facts.held_targets_I) else "all"
    return num, f"answers are short: {which} held-out rows are answered, and counted as right or wrong"


_RULES: dict[str, Callable[[Recipe, Task, Facts], tuple[Any, str]]] = {
    "optim.lr": lambda recipe, task, facts: _rate(recipe.method, recipe.optim, task, facts),
    "train.epochs": lambda recipe, task, facts: _epochs(recipe.train, task, facts),
    "train.rows_per_step": _rows_per_step,
    "train.tokens_per_pass": _tokens_per_pass,
    "precision": lambda recipe, task, facts: _precision(recipe.method, recipe.train, facts),
    "threads": lambda recipe, task, facts: default_threads(facts.processes),
    "evaluation.every": lambda recipe, task, facts: _every(recipe.train, recipe.embed.documents, task, facts),
    "evaluation.metric": lambda recipe, task, facts: _metric(recipe.evaluation, facts),
    "evaluation.keep": lambda recipe, task, facts: _keep(recipe.evaluation),
    "checkpoint.every": lambda recipe, task, facts: _checkpoint_every(recipe.train, facts),
    "evaluation.surprising": lambda recipe, task, facts: _surprising(recipe.train, task, facts),
    "evaluation.samples": lambda recipe, task, facts: _samples(task, facts),
}
"""In order: a later rule may depend on what an earlier one decided."""


ROWS_OF_A_DEVICE = 4
"""Rows of a step for each device, from which on their shares are about equal."""
MOST_TIMES_ROWS = 4
"""Times that a step may have of the usual rows for the sake of devices: more teach less each."""
LEAST_COMPARED = 16
"""Rows of a step at least, where they are compared with each other."""
HIGH_RATE = 100
"""A learning rate of this many times the usual one is noted."""
HELD = 1000
"""Most held-out rows measured in it."""
FEW_PROMPTS = 4
"""Prompts that are answered at least, if any are."""
TRAINED = 3.0
"""Cost of a trained token, in tokens that are only read: SmolLM2 in LoRA 3.4 times as much, by its forecast."""
SHARE = 1 / 3
"""Largest share of a run that measuring takes."""
WORD = {"cpu": 80}
WORD_ON_CARD = 1000
"""Cost of the next word of some answers, in tokens that are read together, since every weight comes from memory
for it: 86 by the forecast of SmolLM2 on two cores; on a card it is the start of every operation, 40 ms for 8 B
weights."""
GENERAL_TOKENS = 5400
"""Tokens of the general text, by the tokenizer of SmolLM2."""
UNNOTICED_S = 10.0
"""Seconds of measuring in every run: as long as its start takes."""


def decide_measuring(
    decisions: Decisions, facts: Facts, *, steps: int, held_tokens: int, writes: bool, speaks: bool
) -> None:
    """Decide what is "auto" in `evaluation`: less in a short run. `held_tokens`: read each time held-out
    rows are measured. `writes`: such a model answers prompts; `speaks`: its general ability is measured."""
    recipe, given = decisions.recipe, decisions.given.evaluation
    row, prompts = float(facts.lengths_I.mean()), len(facts.held_targets_I) if writes else 0
    new_tokens = new_tokens_for(facts.held_targets_I, recipe.evaluation.sample_tokens)
    cache = cache_tokens(resolved(recipe.train.tokens_per_pass))
    together = written_together(held_tokens / max(1, prompts) + new_tokens, cache)
    word = WORD.get(facts.device, WORD_ON_CARD)

    def answers(num: int) -> float:
        """Cost of answering `num` prompts before and after; none where answers are drawn anyway."""
        num = 0 if TASKS[resolved(recipe.task)].samples else min(num, prompts)
        return 2.0 * new_tokens * (word * math.ceil(num / together) + num)

    unnoticed = UNNOTICED_S * OPERATIONS_PER_SECOND.get(facts.device, 1e13) / (2 * facts.num_parameters)
    trained = steps * resolved(recipe.train.rows_per_step) * row
    left = max(TRAINED * trained * SHARE / (1 - SHARE), unnoticed) - 2 * held_tokens

    def spend(name: str, values: Sequence[int | bool], cost: Callable[[Any], float]) -> None:
        """Take the first value that there is time for; the last one costs nothing."""
        nonlocal left
        if getattr(given, name) == "auto":
            value, longer = next(value for value in values if cost(value) <= max(0.0, left)), str(values[0]).lower()
            reason = f"the run is short, and measuring takes at most about a third of it; {longer} in a longer one"
            decisions.set(f"evaluation.{name}", value)
            if value != values[0]:
                decisions.show(Choice(f"evaluation.{name}", value, reason))
        left -= cost(getattr(decisions.recipe.evaluation, name))

    samples = resolved(recipe.evaluation.samples)
    halves = [samples >> i for i in range(samples.bit_length()) if i == 0 or samples >> i >= FEW_PROMPTS]
    spend("samples", [*halves, 0], answers)
    before = samples = resolved(decisions.recipe.evaluation.samples)
    while before > FEW_PROMPTS and answers(before) / 2 > max(ON_THE_WAY * TRAINED * trained, unnoticed):
        before //= 2
    if given.samples_before == "auto":
        reason = f"of {samples:,} that the tuned one answers, so that this takes at most a tenth of the training"
        decisions.set("evaluation.samples_before", before)
        if before < samples:
            decisions.show(Choice("evaluation.samples_before", before, reason))
    spend("general", (True, False), lambda is_measured: 2.0 * GENERAL_TOKENS * speaks * is_measured)
    if not TASKS[resolved(recipe.task)].sees_rows:
        spend("surprising", range(resolved(recipe.evaluation.surprising), -1, -1), lambda num: num * row)
    if given.max_rows == "auto":
        decisions.set("evaluation.max_rows", HELD)
