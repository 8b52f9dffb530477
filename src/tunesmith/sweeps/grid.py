"""The file of a sweep: a base recipe and the options that trials vary, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.evaluation.metrics import METRICS
from tunesmith.recipe import load, yaml_io
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import to_json
from tunesmith.tasks import TASKS
from tunesmith.types import REWARD_KEY, JsonObject, Record

MOST_TRIALS = 1000
SAME_FOR_ALL = ("name", "evaluation", "data.eval", "data.held_out")
"""Keys that would make trials incomparable."""
SECTIONS = {"base": True, "grid": True, "random": False, "asha": False}
"""Sections of the file, and whether they are needed."""
_EXAMPLE = "optim.lr: [1e-4, 3e-4]"


@dataclass(frozen=True, slots=True)
class Trial:
    """One recipe of a sweep."""

    name: str
    """Also the name of its run folder."""
    options: Record
    """Options that the grid chose for it, by key."""
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Grid:
    """A checked sweep."""

    name: str
    trials: Sequence[Trial]
    asha: Asha | None
    digest: str
    """SHA-256 of the file's values."""

    @property
    def keys(self) -> list[str]:
        """Options that trials vary."""
        return list(self.trials[0].options)

    @property
    def metric(self) -> str:
        """Key of the measure that ranks trials; the same for all."""
        return self.trials[0].recipe.evaluation.metric

    @property
    def every(self) -> int | None:
        """Steps between evaluations; None: they are not counted in steps."""
        every = self.trials[0].recipe.evaluation.every
        return every if isinstance(every, int) else None


def read_grid(path: Path, name: str | None = None) -> Grid:
    """The sweep of a YAML or JSON file; `name`: of its folder, instead of the file's.

    Raises RecipeError with place, value, rule and way out, a line for every problem.
    """
    text = _text(path)
    data = yaml_io.parse(text, str(path))
    problems = _problems(data)
    if problems:
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems))
    axes, drawn = data["grid"], data.get("random")
    num = drawn["trials"] if drawn else prod(len(values) for values in axes.values())
    if num > MOST_TRIALS:
        raise RecipeError(
            f"{path}: grid: {num:,} trials: more than {MOST_TRIALS:,}. Give fewer values, or draw some of them "
            "with random: {trials: 20}."
        )
    base = data["base"]
    recipe = _checked_base(path, base)
    combined = (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
    chosen = list(_drawn(axes, drawn) if drawn else combined)
    called = name or re.sub(r"[^\w.-]+", "-", path.stem).strip("-.") or "sweep"
    digits = max(2, len(str(len(chosen))))
    evaluation = base.get("evaluation") or {}
    metric = evaluation.get("metric", "auto")
    metric = _usual_metric(recipe, axes) if metric == "auto" else metric
    base = {**base, "evaluation": {**evaluation, "metric": metric}}  # one measure for all trials
    recipes = _recipes(path, text, base, chosen)
    if any(recipe.model == "last" for recipe in recipes):
        raise RecipeError(f"{path}: model: last: is the trial before for every trial but the first. Name the run.")
    trials = [
        Trial(f"{called}-{i:0{digits}d}", options, recipe)
        for i, (options, recipe) in enumerate(zip(chosen, recipes, strict=True), start=1)
    ]
    asha = Asha(**(data["asha"] or {})) if "asha" in data else None
    grid = Grid(called, trials, asha, hashlib.sha256(to_json(data)).hexdigest())
    _refuse_unjudged(path, grid)
    return grid


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: save it as UTF-8.") from error


def _problems(data: object) -> Iterator[str] | list[str]:
    """Faults in the form of the file."""
    if not isinstance(data, Mapping):
        return ["no mapping: write base: with model and data, and grid: with lists of values."]
    problems = [f"{key}: unknown: a sweep has {', '.join(SECTIONS)}." for key in data if key not in SECTIONS]
    for key, is_needed in SECTIONS.items():
        if key not in data:
            example = _EXAMPLE if key == "grid" else "model: ./model"
            problems += [f"{key}: missing: write it, such as {key}: with {example} below."] if is_needed else []
        elif not isinstance(data[key], Mapping) and not (key == "asha" and data[key] is None):
            problems.append(f"{key}: {data[key]!r:.60} is not a mapping of options.")
    if problems:
        return problems
    if not data["grid"]:
        return [f"grid: empty: name options and their values, such as {_EXAMPLE}."]
    for key, values in data["grid"].items():
        problems += _axis_problems(str(key), values, is_drawn="random" in data)
    for section, rules in _NUMBERS.items():
        for key, value in (data.get(section) or {}).items():
            if key not in rules:
                problems.append(f"{section}.{key}: unknown: it has {', '.join(rules)}.")
            elif not isinstance(value, int) or isinstance(value, bool) or value < rules[key]:
                problems.append(f"{section}.{key}: {value!r:.60} is not a whole number from {rules[key]} up.")
    if "random" in data and "trials" not in data["random"]:
        problems.append("random.trials: missing: the number of trials to draw.")
    return problems


_NUMBERS = {"random": {"trials": 1, "seed": 0}, "asha": {"factor": 2, "first": 1}}
"""Section → key → least value."""


def _axis_problems(key: str, values: object, *, is_drawn: bool) -> Iterator[str]:
    if any(f"{key}.".startswith(f"{fixed}.") for fixed in SAME_FOR_ALL):
        yield f"grid.{key}: has to be the same for all trials, which could not be compared. Set it in base."
    elif isinstance(values, Mapping):
        low, high = (values.get(end, math.nan) for end in ("low", "high"))
        numbers = [end for end in (low, high) if isinstance(end, (int, float)) and not isinstance(end, bool)]
        if not is_drawn:
            yield f"grid.{key}: a range is drawn from: add random: {{trials: 20}}, or give a list of values."
        elif set(values) - {"low", "high", "log"} or len(numbers) < 2 or not all(map(math.isfinite, numbers)):
            yield f"grid.{key}: {values!r:.60} is not {{low: NUMBER, high: NUMBER}}, with log: true if you like."
        elif not low < high or (values.get("log") and low <= 0):
            yield f"grid.{key}: from {low} to {high}: low must be below high{' and above 0' if low <= 0 else ''}."
        elif not isinstance(values.get("log", False), bool):
            yield f"grid.{key}.log: {values['log']!r:.60} is neither true nor false."
    elif not isinstance(values, list) or not values:
        yield f"grid.{key}: {values!r:.60} is not a list of values: write {key}: [A, B]."
    elif len({to_json(value) for value in values}) < len(values):
        yield f"grid.{key}: a value is there twice: keep one."


def _checked_base(path: Path, given: Record) -> Recipe:
    """The recipe of the base. Raises RecipeError for one that is not a recipe by itself."""
    recipe = load.validate(given, where=f"{path}: base")
    if not recipe.model or not recipe.data.train:
        raise RecipeError(f"{path}: base: {'data.train' if recipe.model else 'model'}: missing: every trial needs it.")
    return recipe


def _usual_metric(base: Recipe, axes: Record) -> str:
    """Key of the measure that ranks trials where the base names none: the reward where answers are graded, since
    their loss is only minus the reward, and otherwise the loss."""
    graded = {task.name for task in TASKS.values() if task.samples}
    sections = {key.partition(".")[0] for key in axes}  # a section of one task has its name
    is_graded = base.reinforce.grader is not None or graded & {base.task, *sections}
    return REWARD_KEY if is_graded else "loss"


def _drawn(axes: Record, how: Mapping[str, int]) -> Iterator[JsonObject]:
    """Different choices, drawn by the seed; fewer than wanted where lists hold no more."""
    draw, seen = random.Random(how.get("seed", 0)), set[bytes]()
    for _ in range(100 * how["trials"]):
        chosen = {key: _one_of(values, draw) for key, values in axes.items()}
        if (words := to_json(chosen)) not in seen:
            seen.add(words)
            yield chosen
        if len(seen) == how["trials"]:
            return


def _one_of(values: Any, draw: random.Random) -> Any:
    if isinstance(values, list):
        return draw.choice(values)
    low, high = values["low"], values["high"]
    is_log = values.get("log")
    drawn = math.exp(draw.uniform(math.log(low), math.log(high))) if is_log else draw.uniform(low, high)
    return round(drawn) if isinstance(low, int) and isinstance(high, int) else float(f"{drawn:.3g}")


def _recipes(path: Path, text: str, base: Record, chosen: Sequence[Record]) -> list[Recipe]:
    """The recipe of each choice. Raises RecipeError with each problem once, at the line of its key."""
    problems: dict[str, None] = {}
    recipes = []
    for options in chosen:
        settings = [f"{key}={yaml_io.dump(value)}" for key, value in options.items()]
        try:
            recipes.append(load.load(None, settings, base))
        except RecipeError as error:
            for line in str(error).splitlines():
                problems[_placed(line, path, text, options)] = None
    if problems:
        raise RecipeError("\n".join(yaml_io.first_of(list(problems))))
    return recipes


def _placed(problem: str, path: Path, text: str, options: Record) -> str:
    """A problem that names --set or the recipe, with the place in the file instead."""
    rest = problem.removeprefix(load.SETTING_OPTION).removeprefix("recipe").lstrip(": ")
    key = next((key for key in sorted(options, key=len, reverse=True) if rest.startswith(key)), None)
    written = re.compile(rf"(^|[{{,\s])['\"]?{re.escape(key or '')}['\"]?\s*:")
    at = [i for i, line in enumerate(text.splitlines(), 1) if key and written.search(line)]
    return f"{path}{f':{at[-1]}' if at else ''}: grid: {rest}"


def _refuse_unjudged(path: Path, grid: Grid) -> None:
    if grid.metric not in METRICS:
        raise RecipeError(
            f"{path}: base: evaluation.metric: {grid.metric} is not a measure: one of {', '.join(METRICS)}."
        )
    if METRICS[grid.metric].better == "neither":
        raise RecipeError(f"{path}: base: evaluation.metric: {grid.metric} is neither better high nor low.")
    if grid.asha is not None and grid.every is None:
        raise RecipeError(
            f"{path}: base: evaluation.every: missing: asha stops trials by their evaluations on the way. Set "
            "it to the steps between them, or leave asha out."
        )


@dataclass(frozen=True, slots=True)
class Asha:
    """When trials are judged."""

    factor: int = 3
    """Each rung lets one trial in `factor` continue, and comes `factor` times later than the rung before."""
    first: int = 1
    """Evaluations before the first rung."""


@dataclass
class Judge:
    """The rungs of a sweep, with what each trial measured there."""

    asha: Asha
    every: int
    """Steps between evaluations."""
    lower_is_better: bool
    rungs: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step of the rung → trial → its measure, lower is better; worse than any where it is not a number."""

    def is_rung(self, step: int) -> bool:
        """Whether trials are judged after this step."""
        evaluations, rest = divmod(step, self.every * self.asha.first)
        while evaluations > 1 and evaluations % self.asha.factor == 0:
            evaluations //= self.asha.factor
        return rest == 0 and evaluations == 1

    def hear(self, trial: str, step: int, value: float) -> JsonObject | None:
        """Note an evaluation; {"step", "value", "rank", "of"} if the trial has to stop, None if it continues.

        `rank` counts from 1 among the `of` trials that have reached the rung so far.
        """
        if not self.is_rung(step):
            return None
        worth = value if self.lower_is_better else -value
        rung = self.rungs.setdefault(step, {})
        rung[trial] = worth if math.isfinite(worth) else math.inf
        rank = 1 + sum(other < rung[trial] for other in rung.values())
        survivors = max(1, len(rung) // self.asha.factor)
        if rank <= survivors and rung[trial] < math.inf:
            return None
        return {"step": step, "value": value, "rank": rank, "of": len(rung)}
