"""What the events of a run tell of it, gathered in one reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tunesmith.evaluation.metrics import METRICS
from tunesmith.types import Event

Interval = Mapping[str, float]
"""{"value"} and, where rows were drawn again and again, {"low", "high"} of its 95 % interval."""


class Step(NamedTuple):
    """One update."""

    step: int
    loss: float
    lr: float
    tokens_per_second: float
    peak_bytes: int


@dataclass
class Log:
    """A resumed run starts and plans again: the later telling counts."""

    plan: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    """Hashes of all that the run rests on."""
    steps: list[Step] = field(default_factory=list)
    evaluations: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    """Step and values, in order."""
    answers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Values of the "answers" events by their name."""
    general: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> Log:
        log = cls()
        for event in events:
            log._hear(event)
        return log

    def _hear(self, event: Event) -> None:
        values, timing = event.values, event.timing
        if event.kind == "start":
            self.identity = values.get("identity", {})
        elif event.kind == "plan":
            self.plan = values
        elif event.kind == "step":
            speed, peak = timing["tokens_per_second"], timing["peak_bytes"]
            self.steps.append(Step(event.step, values["loss"], values["lr"], speed, peak))
        elif event.kind == "evaluation":
            self.evaluations.append((event.step, values))
        elif event.kind == "answers":
            self.answers[values["name"]] = values
        elif event.kind == "general":
            self.general[values["name"]] = values
        elif event.kind == "sample":
            told = {key: values[key] for key in ("prompt", "reference", "source")}
            sample = self.samples.setdefault(values["index"], told)
            sample[values["name"]] = values["answer"]
            sample[f"{values['name']}_stopped"] = values["stopped"]
        elif event.kind == "note":
            self.notes.append(values["text"])

    def course(self, kept: int) -> list[tuple[int, Mapping[str, Any]]]:
        """One evaluation a step, in order, each of that step's own weights: of the last step without that of the
        result, where the weights of step `kept` were put back for it."""
        return list({s: values for s, values in self.evaluations if values["name"] != "after" or s == kept}.items())

    def score(self, name: str) -> dict[str, Any] | None:
        """What the evaluation of that name found, with the measures of answers and of general text, and the number of
        `answers` and of `general_tokens` they rest on; None if nothing was held out."""
        found = next((values for _, values in reversed(self.evaluations) if values["name"] == name), None)
        if found is None:
            return None
        measures, rest_on = measures_of(found), {}
        if name in self.answers:
            measures |= self.answers[name]["measures"]
            rest_on["answers"] = self.answers[name]["num"]
        if name in self.general:
            measures["general_loss"] = {"value": self.general[name]["loss"]}
            rest_on["general_tokens"] = self.general[name]["tokens"]
        known = [key for key in METRICS if key in measures]
        ordered = {key: measures[key] for key in (*known, *(key for key in measures if key not in METRICS))}
        return {**{key: value for key, value in found.items() if key != "name"}, **rest_on, "measures": ordered}


def measures_of(evaluation: Mapping[str, Any]) -> dict[str, Interval]:
    """Every measure of an evaluation; the loss has no interval where none was made."""
    return {"loss": {"value": evaluation["loss"]}, **evaluation.get("measures", {})}
