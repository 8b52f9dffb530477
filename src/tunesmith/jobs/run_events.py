"""Events of a run as events of its job, with OpenAI's words; and the results file made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tunesmith.jobs.store import event
from tunesmith.phrases import option, plural
from tunesmith.runs.folder import Run
from tunesmith.types import Event

_COLUMNS = (
    "step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy", "full_valid_loss",
    "full_valid_mean_token_accuracy",
)  # fmt: skip
"""Of the results file. The accuracy of training steps is not measured."""
SAMPLES_AN_EVENT = 10
_MEASURED = {"before": "untouched model", "after": "result"}


class EventTranslator:
    """Turns the events of one run into rows of `store.events`, each with an id that follows from what it says."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.total_steps = 0
        self.last_loss: float | None = None

    def __call__(self, found: Iterable[Event]) -> list[dict[str, Any]]:
        return [{**row, "created_at": int(one.time)} for one in found for row in self._rows(one)]

    def _rows(self, one: Event) -> Iterator[dict[str, Any]]:
        values = one.values
        if one.kind == "plan":
            self.total_steps = values["steps"]
            yield event(self.job, f"Plan: {plural(self.total_steps, 'step')}", once=f"plan {self.total_steps}")
            texts = [f"{one['key']} = {option(one['value'])}: {one['reason']}" for one in values["choices"]]
            if texts:  # one event: clients look at the last ten
                values_alone = [(one["key"], one["value"]) for one in values["choices"]]
                yield event(self.job, "Chosen: " + "\n".join(texts), once=f"choices {values_alone}")
        if one.kind == "step":
            self.last_loss = _number(values["loss"])
            data = {"step": one.step, "train_loss": self.last_loss, "total_steps": self.total_steps}
            text = f"Step {one.step}/{self.total_steps}: training loss={values['loss']:.2f}"
            yield event(self.job, text, data=data, once=f"step {one.step}")
            if one.step == self.total_steps:  # what follows takes up to a minute, or longer on a large base
                text = "All steps are done: the result is measured, saved and loaded next"
                yield event(self.job, text, once="measured next")
        if one.kind == "evaluation" and values["name"] != "before":
            loss = _number(values["loss"])
            data = {
                "step": one.step, "train_loss": self.last_loss, "total_steps": self.total_steps,
                **held_out_metrics(values),
            }  # fmt: skip
            text = f"Step {one.step}/{self.total_steps}: training loss={self.last_loss or 0:.2f}"
            text += f", validation loss={loss or 0:.2f}, full validation loss={loss or 0:.2f}"
            yield event(self.job, text, data=data, once=f"measured {one.step}")
        if one.kind == "resume":
            text = f"Fine-tuning job goes on after step {values['from_step']}"
            yield event(self.job, text, once=f"resume {values['from_step']} {one.time}")
        if one.kind == "sample" and one.values["index"] % SAMPLES_AN_EVENT == 0:
            text = f"Measuring the {_MEASURED[values['name']]}: sample prompts answered: {values['index'] + 1}"
            yield event(self.job, text, once=f"sample {values['name']} {values['index']}")
        if one.kind == "general":
            text = f"Measuring the {_MEASURED[values['name']]}: loss on general text {values['loss']:.2f}"
            yield event(self.job, text, once=f"general {values['name']}")
        if one.kind == "note":
            yield event(self.job, values["text"], level="warn", once=f"note {one.step} {values['text']}")


def held_out_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a checkpoint from an evaluation: the whole validation file, under both of OpenAI's names."""
    loss = _number(values["loss"])
    found = {"valid_loss": loss, "full_valid_loss": loss}
    if (accuracy := values["measures"].get("token_accuracy")) is not None:
        right = _number(accuracy["value"])
        found |= {"valid_mean_token_accuracy": right, "full_valid_mean_token_accuracy": right}
    return found


def metrics_by_step(found: Iterable[Event]) -> dict[int, dict[str, Any]]:
    """The metrics of each step, with those of the validation file where it was measured."""
    steps: dict[int, dict[str, Any]] = {}
    for one in found:
        if one.kind == "step":
            steps[one.step] = {"step": one.step, "train_loss": _number(one.values["loss"])}
        elif one.kind == "evaluation" and one.step in steps:
            steps[one.step] |= held_out_metrics(one.values)
    return steps


def results_file(found: Iterable[Event]) -> bytes:
    """step_metrics.csv: a line for each step, blank where nothing was measured."""
    lines = [",".join(_COLUMNS)]
    for row in metrics_by_step(found).values():
        lines.append(",".join("" if row.get(name) is None else str(row[name]) for name in _COLUMNS))
    return "".join(f"{line}\n" for line in lines).encode()


def trained_tokens(found: Iterable[Event]) -> int:
    """Tokens of all rows that were trained on, each as often as it was."""
    return sum(int(one.values["tokens"]) for one in found if one.kind == "step")


def missing_exports(job: str, run: Run, why: str) -> list[dict[str, Any]]:
    """A warning for each export of the recipe that is not in the folder of a finished run, with the way to make it."""
    found = []
    for target, _, value in (word.partition(":") for word in run.recipe().export.to):
        if not run.export_path(f"{target}:{value}").exists():
            how = f" {'--dtype' if target == 'merged' else '--quant'} {value}" if value else ""
            text = f"Not made: the export {target}{how}. {why}".rstrip()
            text += f" Make it on the server: tunesmith export runs/{job} --to {target}{how}"
            found.append(event(job, text, level="warn", once=f"export {target}{how}"))
    return found


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
