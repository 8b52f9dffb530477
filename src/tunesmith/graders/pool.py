"""Grade many answers at once: threads, children that run code, and grades that are made only once."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from tunesmith.environment.process import num_cpus
from tunesmith.errors import InputError
from tunesmith.graders import formula, judge, remote, schema, texts
from tunesmith.graders.children import Children
from tunesmith.graders.grade import Answer, Grade, GradeError
from tunesmith.graders.templates import render
from tunesmith.types import Record

JUDGED_AT_ONCE = 8
TOO_DEEP = "the JSON of the answer or the row nests too deeply"
MOST_REWARD = 1e30
"""Largest reward: sums of larger ones would overflow."""
_CODE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
IN_CHILDREN = schema.CodeGrader | schema.Regex | schema.JsonSchema
"""Graders that need a process of their own: they run code, or match patterns, which may never end. Where
processes fork, comparisons of long texts join them."""


class _OfPart(NamedTuple):
    """The reward by one part of a grader, with its further numbers and those that are none, see `Grade`."""

    reward: float
    scores: Mapping[str, float] = {}
    left_out: Mapping[str, str] = {}


class Scorer(Protocol):
    """Grades answers in this process, see `schema.RewardRun`."""

    identity: Mapping[str, str]
    """Hashes of everything that its numbers depend on."""

    def __call__(self, item: Record, text: str, /) -> float: ...


def _no_scorer(part: schema.RewardRun) -> Scorer:
    raise InputError(f"reward_run: {part.run}: runs grade in `train` and `grade` only.")


class Pool:
    """Grades answers by a grader. A context manager: on exit it ends all its processes.

    `kept`: grades by the digest of everything that they depend on, so that none is made twice; a caller passes
    a mapping that outlives the pool. `scorer_of` loads a reward run. Raises InputError for a grader that cannot
    be loaded.
    """

    def __init__(
        self,
        grader: schema.Grader,
        *,
        at_once: int | None = None,
        kept: MutableMapping[str, Grade] | None = None,
        scorer_of: Callable[[schema.RewardRun], Scorer] = _no_scorer,
    ) -> None:
        self.grader = grader
        self._parts = schema.parts_of(grader)
        self._kept: MutableMapping[str, Grade] = {} if kept is None else kept
        self._underway: dict[str, Future[Grade]] = {}
        self._lock = Lock()
        self._formula: ast.expr | None = None
        if isinstance(grader, schema.Multi):
            self._formula = formula.parse(grader.calculate_output, tuple(self._parts), "calculate_output")
        for part in self._parts.values():
            texts.refuse_lacking(part)
            if isinstance(part, schema.ScoreModel):
                remote.key_of(part.key_env)
        has_judge = any(isinstance(part, schema.ScoreModel) for part in self._parts.values())
        self._threads = ThreadPoolExecutor(at_once or (JUDGED_AT_ONCE if has_judge else max(1, num_cpus() - 1)))
        self.children: dict[str, Children] = {}
        self._scorers: dict[str, Scorer] = {}
        try:
            for name, part in self._parts.items():
                if isinstance(part, schema.RewardRun):
                    self._scorers[name] = scorer_of(part)
                if isinstance(part, IN_CHILDREN) or (isinstance(part, schema.TextSimilarity) and hasattr(os, "fork")):
                    self.children[name] = Children(part)
        except BaseException:
            self.close()
            raise
        coded = [name for name in self.children if isinstance(self._parts[name], IN_CHILDREN)]
        files = {name: sorted(self.children[name].files.values()) for name in coded}
        runs = {name: dict(scorer.identity) for name, scorer in self._scorers.items()}
        described = without_places(grader.model_dump(mode="json"))
        self.identity = _digest([described, files, *([runs] if runs else [])])
        """SHA-256 of the grader, of the files of its code and of its reward runs, wherever these are."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(wait=error is None, cancel_futures=True)
        self.close()

    def close(self) -> None:
        """End the processes and drop the reward runs: nothing can be graded afterwards."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self.children.values():
            child.close()
        self._scorers.clear()

    @property
    def notes(self) -> list[str]:
        """A note where code that should have no network has one."""
        is_open = any(child.closes_network and not child.offline for child in self.children.values())
        return ["this system lets no ordinary program close its network, so the grader's code has one"] * is_open

    def submit(self, answer: Answer, item: Record) -> Future[Grade]:
        """The grade of an answer to the prompt of a row, `item`, once it is made. Equal answers share one."""
        parts = [self.identity, dict(item), answer.text, list(answer.tools), answer.ended, answer.tokens]
        key = _digest([*parts, answer.prefix] if answer.prefix else parts)  # so that earlier grades still count
        with self._lock:
            if key not in self._underway:
                self._underway[key] = self._threads.submit(self._grade, key, answer.as_sample(), item)
            future = self._underway[key]
        future.add_done_callback(lambda _: self._underway.pop(key, None))  # its grade is kept
        return future

    def _grade(self, key: str, sample: Record, item: Record) -> Grade:
        if key in self._kept:
            return self._kept[key]
        start = time.monotonic()
        try:
            grade = self._made(sample, item, int(key[:15], 16))
        except GradeError as error:
            grade = Grade(None, kind=error.kind, error=str(error))
        except RecursionError:
            grade = Grade(None, kind="exception", error=TOO_DEEP)
        self._kept[key] = grade = replace(grade, seconds=time.monotonic() - start)
        return grade

    def _made(self, sample: Record, item: Record, seed: int) -> Grade:
        """The grade by all parts of the grader. Raises GradeError, RecursionError."""
        rewards, scores, left_out, is_unread = dict[str, float](), dict[str, float](), dict[str, str](), False
        for name, part in self._parts.items():
            try:
                of_part = self._of_part(name, part, sample, item, seed)
            except GradeError as error:
                if error.kind == "not_json":  # a fault of the answer, from which a model has to learn
                    rewards[name], is_unread = getattr(part, "range", (0.0,))[0], True
                    continue
                raise GradeError(error.kind, f"{name}: {error}" if name else str(error)) from None
            before = f"{name}." if name else ""
            rewards[name] = of_part.reward
            scores |= {before + score: value for score, value in of_part.scores.items()}
            left_out |= {before + score: value for score, value in of_part.left_out.items()}
        reward = rewards[""] if self._formula is None else formula.compute(self._formula, rewards)
        if abs(reward) > MOST_REWARD:
            raise GradeError("not_a_number", f"a grade is a number up to {MOST_REWARD:g}, and this is {reward:g}")
        scores |= {name: value for name, value in rewards.items() if name}
        return Grade(reward, scores, left_out=left_out, is_unread=is_unread)

    def _of_part(self, name: str, part: schema.Single, sample: Record, item: Record, seed: int) -> _OfPart:
        if isinstance(part, schema.ScoreModel):
            return _OfPart(judge.ask(part, sample, item))
        if isinstance(part, schema.RewardRun):
            return _OfPart(self._scorers[name](item, render(part.input, sample, item)))
        if isinstance(part, schema.TextGrader) and name not in self.children:
            return _OfPart(texts.grade_text(part, sample, item))
        if isinstance(part, schema.UnitTests):
            tests = _tests_of(part, item)
            request = {"code": code_of(sample["output_text"]), "tests": tests, "seed": seed}
            return _OfPart(float(self.children[name].ask(request, len(tests))["value"]))
        answer = self.children[name].ask({"sample": sample, "item": dict(item), "seed": seed})
        return _OfPart(float(answer["value"]), answer.get("scores", {}), answer.get("left_out", {}))


def without_places(value: Any) -> Any:
    """A grader as JSON, without the paths of its files and runs."""
    if not isinstance(value, dict):
        return value
    place = {"function": "file", "reward_run": "run"}.get(str(value.get("type")))
    return {key: without_places(part) for key, part in value.items() if key != place}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code_of(text: str) -> str:
    """The last fenced block of an answer, or all of it where there is none."""
    blocks = _CODE.findall(text)
    return str(blocks[-1]) if blocks else text


def _tests_of(part: schema.UnitTests, item: Record) -> list[str]:
    tests = item.get(part.tests)
    listed = [tests] if isinstance(tests, str) else tests
    if not isinstance(listed, list) or not listed or not all(isinstance(test, str) and test.strip() for test in listed):
        raise GradeError(
            "no_code", f"{part.tests}: a text or a list of texts is needed, each with statements that assert"
        )
    if any("TestCase" in test for test in listed):
        raise GradeError(
            "no_code", f"{part.tests}: classes of unittest are not run. Write assert, or functions test_..."
        )
    return listed
