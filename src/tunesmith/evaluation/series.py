"""The events of a run, gathered by kind: what displays, `runs`, `show` and reports draw from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from tunesmith.evaluation.metrics import METRICS, is_restated
from tunesmith.types import REWARD_KEY, Event, JsonObject, Record

RECENT_STEPS = 20
"""Newest steps, from which the time left is estimated."""


class Step(NamedTuple):
    """One update."""

    step: int
    loss: float
    lr: float
    tokens_per_second: float
    peak_bytes: int
    seconds: float
    reward: float | None = None
    """Mean of the answers that it drew."""

    @property
    def value(self) -> float:
        """Its reward where it has one, else its loss."""
        return self.loss if self.reward is None else self.reward


@dataclass
class RunSeries:
    """A run after its events so far. One that is resumed repeats some of them: the later event counts."""

    plan: Record = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    """Hashes of model, data and settings."""
    started: bool = False
    step: int = 0
    """The newest."""
    steps: dict[int, Step] = field(default_factory=dict)
    drawn: dict[int, JsonObject] = field(default_factory=dict)
    """Values of the steps that drew answers, and "seconds" of drawing and grading."""
    peak_bytes: int = 0
    evaluations: list[tuple[int, Record]] = field(default_factory=list)
    """Step and values, in order."""
    answers: dict[str, Record] = field(default_factory=dict)
    """Values of the "answers" events by their name."""
    general: dict[str, Record] = field(default_factory=dict)
    samples: dict[int, JsonObject] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    """Notes that nobody has to act on."""
    report: Record = field(default_factory=dict)

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunSeries:
        series = cls()
        for event in events:
            series.add(event)
        return series

    def add(self, event: Event) -> None:
        values, timing = event.values, event.timing
        if event.kind in ("start", "resume"):
            self.started, self.step = True, event.step
            self.identity = values.get("identity", self.identity)
            self.steps = {step: step_values for step, step_values in self.steps.items() if step <= event.step}
            self.drawn = {step: step_values for step, step_values in self.drawn.items() if step <= event.step}
        elif event.kind == "plan":
            # A forecast does not repeat bit for bit: it depends on the memory that is free at the moment.
            self.plan = {**values, "forecast": timing.get("forecast")}
        elif event.kind == "step":
            self.step = event.step
            speed, peak = timing.get("tokens_per_second", 0.0), timing.get("peak_bytes", 0)
            seconds = timing.get("seconds", 0.0)
            self.peak_bytes = max(self.peak_bytes, peak)
            reward = values.get(REWARD_KEY)
            self.steps[event.step] = Step(event.step, values["loss"], values["lr"], speed, peak, seconds, reward)
            if reward is not None:
                taken = {key: timing.get(key, 0.0) for key in ("draw", "grade")}
                self.drawn[event.step] = {**values, "seconds": taken}
        elif event.kind == "evaluation":
            self.evaluations.append((event.step, values))
        elif event.kind == "answers":
            self.answers[values["name"]] = values
        elif event.kind == "general":
            self.general[values["name"]] = values
        elif event.kind == "sample":
            texts = {key: values.get(key, "") for key in ("prompt", "reference", "source")}
            sample = self.samples.setdefault(values["index"], texts)
            sample[values["name"]] = values["answer"]
            sample[f"{values['name']}_stopped"] = values.get("stopped", True)
            if values["name"] == "step":  # an answer on the way: the newest stays
                sample["step_of"] = event.step
            sample |= {"images": values["images"]} if "images" in values else {}
        elif event.kind == "note":
            (self.details if values.get("detail") or values.get("aside") else self.notes).append(values["text"])
        elif event.kind == "end":
            self.report = values.get("report", {})

    @property
    def has_new_head(self) -> bool:
        return bool(self.plan.get("new_head"))

    @property
    def total_steps(self) -> int:
        return int(self.plan.get("steps", 0))

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training left, by the mean of the newest steps; None before the first."""
        recent = [step.seconds for step in islice(reversed(self.steps.values()), RECENT_STEPS)]
        if not recent or not self.total_steps:
            return None
        return sum(recent) / len(recent) * (self.total_steps - self.step)

    def course(self, kept: int | None = None) -> list[tuple[int, Record]]:
        """One evaluation a step, in order, each of that step's own weights: the "after" of other weights, where
        those of step `kept` were put back, is left out. `kept` None: not known; a step's own evaluation
        counts."""
        by_step: dict[int, Record] = {}
        for step, values in self.evaluations:
            if values["name"] != "after" or (step == kept if kept is not None else step not in by_step):
                by_step[step] = values
        return list(by_step.items())

    @property
    def aim(self) -> str:
        """The measure that curves of the run show: "reward" where answers are graded, whose loss measures
        nothing, else "loss"."""
        is_graded = any(is_restated("loss", measures_of(values)) for _, values in self.evaluations)
        return REWARD_KEY if self.drawn or is_graded else "loss"

    def held_out(self, kept: int | None) -> dict[int, float]:
        """The held-out loss, or reward, by step, see `course`."""
        sign = -1 if self.aim == REWARD_KEY else 1
        return {step: sign * values["loss"] for step, values in self.course(kept)}

    @property
    def curve(self) -> list[float]:
        """Held-out losses, or rewards, in the order of their steps."""
        return [value for _, value in sorted(self.held_out(self.report.get("kept", {}).get("step")).items())]

    def score(self, name: str) -> JsonObject | None:
        """The evaluation of that name with the metrics of answers and of general text, and the number of
        `answers` and of `general_tokens` behind them; None if nothing was held out, or of the "before" of a new
        head."""
        evaluation = next((values for _, values in reversed(self.evaluations) if values["name"] == name), None)
        if evaluation is None or (name == "before" and self.has_new_head):
            return None
        measures, counts = measures_of(evaluation), {}
        if name in self.answers:
            measures |= self.answers[name]["measures"]
            counts["answers"] = self.answers[name].get("num", 0)
        if name in self.general:
            measures["general_loss"] = {"value": self.general[name]["loss"]}
            counts["general_tokens"] = self.general[name].get("tokens", 0)
        order = sorted(measures, key=lambda key: list(METRICS).index(key) if key in METRICS else len(METRICS))
        rest = {key: value for key, value in evaluation.items() if key != "name"}
        return {**rest, **counts, "measures": {key: measures[key] for key in order}}


def measures_of(evaluation: Record) -> dict[str, Mapping[str, float]]:
    """Every metric of an evaluation as {"value", "low", "high"}; the loss may have no interval."""
    return {"loss": {"value": evaluation["loss"]}, **evaluation.get("measures", {})}
