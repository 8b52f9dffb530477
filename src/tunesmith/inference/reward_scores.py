"""Answers graded by a run of task reward: the grader `reward_run`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from pathlib import Path
from threading import Lock

from tunesmith.data.formats.prompts import prompt_in
from tunesmith.data.problems import RowProblems
from tunesmith.errors import InputError
from tunesmith.graders import schema
from tunesmith.graders.grade import Grade, GradeError
from tunesmith.graders.pool import Pool
from tunesmith.graders.schema import RewardRun, parts_of
from tunesmith.inference.load import load_run, untuned_recipe
from tunesmith.inference.predict import Predictor
from tunesmith.models.resolve_model import ModelRef, resolve_base, resolve_model
from tunesmith.models.size import model_size
from tunesmith.recipe.schema import resolved
from tunesmith.runs.folder import Run, is_run
from tunesmith.tasks.scores import REWARD
from tunesmith.types import Example, Part, Problem, Record, Source

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class RewardScorer:
    """The numbers that a run of task reward gives to answers: one at a time, so that none depends on which
    others are graded with it. Raises what loading the run does, and InputError for a run of another task."""

    def __init__(self, grader: RewardRun, *, root: Path, offline: bool = False, device: str | None = None) -> None:
        run = reward_run(grader, root)
        loaded = load_run(run, offline=offline, on={} if device is None else {"device": device})
        self._predictor, self._lock = Predictor(loaded), Lock()
        self.identity: Mapping[str, str] = loaded.identity()

    def __call__(self, item: Record, text: str) -> float:
        """The reward of an answer to the prompt of a row. Raises GradeError for one
        that the run cannot read."""
        row = RowProblems(Source("", 0))
        prompt, _, tools = prompt_in(item, row)
        # Templates refuse an answer without a letter.
        parts = (*prompt, Part("assistant", text if text.strip() else " ", True))
        example = Example(parts, Source("", 0), "prompts", tools)
        warnings: list[Problem] = []
        with self._lock:
            [line] = self._predictor([example], lambda done: None, warnings.append)
        if isinstance(line, Problem):
            raise GradeError("exception", f"the reward run cannot read it: {line.message}")
        if cut := [warning.message for warning in warnings if warning.code == "cut"]:
            raise GradeError("exception", f"the reward run cannot read all of it: {cut[0]}")
        return float(line[REWARD.answer_key])


def pool_of(word: str, kept: MutableMapping[str, Grade], *, root: Path, offline: bool, device: str) -> Pool:
    """The pool of the grader that a recipe names, with its reward runs. Raises InputError for one that cannot
    be loaded."""
    scorer_of = partial(RewardScorer, root=root, offline=offline, device=device)
    return Pool(schema.load(word), kept=kept, scorer_of=scorer_of)


def reward_run(grader: RewardRun, root: Path) -> Run:
    """The run that a grader names. Raises InputError where there is none, or it gives no rewards."""
    run = Run.open(grader.run, root)
    if (task := run.recipe().task) != REWARD.name:
        raise InputError(f"reward_run: {grader.run}: is a run of task {task}. Name one of task reward.")
    return run


def weights_of(grader: schema.Grader, root: Path, *, offline: bool = False) -> int:
    """Bytes of the weights of all reward runs of a grader, which stay in memory as long as it grades."""
    runs = [reward_run(part, root) for part in parts_of(grader).values() if isinstance(part, RewardRun)]
    return sum(_weights_of_run(run, offline=offline) for run in runs)


def weights_of_any(target: str, root: Path, *, offline: bool) -> int:
    """Bytes of the weights of a run's model, or of any model as it would be loaded here."""
    if is_run(target, root):
        return _weights_of_run(Run.open(target, root), offline=offline)
    located = resolve_model(target, offline=offline, weights=False)
    return _bytes(located, resolved(untuned_recipe(located)[0].precision))


def _weights_of_run(run: Run, *, offline: bool) -> int:
    recipe = run.recipe()
    return _bytes(resolve_base(recipe, offline=offline, weights=False), resolved(recipe.precision))


def _bytes(located: ModelRef, precision: str) -> int:
    return model_size(located).num_params * BYTES[precision]
