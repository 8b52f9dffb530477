"""Events of a run as events of its job, with OpenAI's words; and the results file made of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence

from tunesmith.jobs import reward_metrics
from tunesmith.jobs.reward_metrics import TRAINING_KEY, VALIDATION_KEY
from tunesmith.jobs.store import event
from tunesmith.phrases import option, plural
from tunesmith.runs.folder import Run
from tunesmith.types import REWARD_KEY, Event, JsonObject, Record

_COLUMNS = (
    "step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy", "full_valid_loss",
    "full_valid_mean_token_accuracy",
)  # fmt: skip
"""Columns of the results file. The accuracy of training steps is not measured."""
SAMPLES_AN_EVENT = 10
_MEASURED = {"before": "untouched model", "after": "result", "step": "model on the way"}


class EventTranslator:
    """Turns the events of one run into rows of `store.events`, with ids that follow from what they say."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.total_steps = 0
        self.last_loss: float | None = None
        self.last_reward: float | None = None

    def __call__(self, run_events: Iterable[Event]) -> list[JsonObject]:
        rows: list[JsonObject] = []
        for run_event in run_events:
            created_at = int(run_event.time)
            rows += [{**row, "created_at": created_at} for row in self._rows(run_event)]
        return rows

    def _rows(self, run_event: Event) -> Iterator[JsonObject]:
        values = run_event.values
        match run_event.kind:
            case "plan":
                yield from self._of_plan(values)
            case "step":
                yield self._of_step(run_event)
                if run_event.step == self.total_steps:  # what follows takes a minute, or longer
                    text = "All steps are done: the result is measured, saved and loaded next"
                    yield event(self.job, text, once="measured next")
            case "evaluation":
                yield from self._of_evaluation(run_event)
            case "resume":
                text = f"Fine-tuning job continues after step {values['from_step']}"
                yield event(self.job, text, once=f"resume {values['from_step']} {run_event.time}")
            case "sample" if values["index"] % SAMPLES_AN_EVENT == 0:
                text = f"Measuring the {_MEASURED[values['name']]}: sample prompts answered: {values['index'] + 1}"
                yield event(self.job, text, once=f"sample {values['name']} {values['index']}")
            case "general":
                text = f"Measuring the {_MEASURED[values['name']]}: loss on general text {values['loss']:.2f}"
                yield event(self.job, text, once=f"general {values['name']}")
            case "note":
                yield event(self.job, values["text"], level="warn", once=f"note {run_event.step} {values['text']}")

    def _of_plan(self, values: Record) -> Iterator[JsonObject]:
        self.total_steps = values["steps"]
        yield event(self.job, f"Plan: {plural(self.total_steps, 'step')}", once=f"plan {self.total_steps}")
        texts = [f"{choice['key']} = {option(choice['value'])}: {choice['reason']}" for choice in values["choices"]]
        if texts:  # one event: clients look at the last ten
            values_alone = [(choice["key"], choice["value"]) for choice in values["choices"]]
            yield event(self.job, "Chosen: " + "\n".join(texts), once=f"choices {values_alone}")

    def _of_step(self, run_event: Event) -> JsonObject:
        """A loss, or a reward."""
        values = run_event.values
        data: JsonObject = {"total_steps": self.total_steps}
        if REWARD_KEY in values:
            self.last_reward = values[REWARD_KEY]
            data |= reward_metrics.of_step(run_event)
            text = f" , train mean reward={values[REWARD_KEY]:.2f}"
        else:
            self.last_loss = _number(values["loss"])
            data |= {"step": run_event.step, "train_loss": self.last_loss}
            text = f": training loss={values['loss']:.2f}"
        return event(self.job, self._at(run_event) + text, data=data, once=f"step {run_event.step}")

    def _of_evaluation(self, run_event: Event) -> Iterator[JsonObject]:
        """The loss of the validation file, but not of the untouched model; or its reward."""
        values = run_event.values
        data: JsonObject = {"step": run_event.step, "total_steps": self.total_steps}
        if REWARD_KEY in values["measures"]:
            data |= reward_metrics.of_evaluation(run_event)
            text = " "
            if self.last_reward is not None:
                data[TRAINING_KEY] = self.last_reward
                text += f", train mean reward={self.last_reward:.2f}"
            text += f", full validation mean reward={data[VALIDATION_KEY]:.2f}"
        elif values["name"] != "before":
            data |= {"train_loss": self.last_loss, **held_out_metrics(values)}
            loss = data["valid_loss"] or 0
            text = f": training loss={self.last_loss or 0:.2f}, validation loss={loss:.2f}"
            text += f", full validation loss={loss:.2f}"
        else:
            return
        yield event(self.job, self._at(run_event) + text, data=data, once=f"measured {run_event.step}")

    def _at(self, run_event: Event) -> str:
        return f"Step {run_event.step}/{self.total_steps}"


def held_out_metrics(values: Record) -> JsonObject:
    """The metrics of a checkpoint from an evaluation: of the whole file; a loss
    under both of OpenAI's names."""
    if REWARD_KEY in values["measures"]:
        return {VALIDATION_KEY: values["measures"][REWARD_KEY]["value"]}
    loss = _number(values["loss"])
    metrics = {"valid_loss": loss, "full_valid_loss": loss}
    if (accuracy := values["measures"].get("token_accuracy")) is not None:
        right = _number(accuracy["value"])
        metrics |= {"valid_mean_token_accuracy": right, "full_valid_mean_token_accuracy": right}
    return metrics


def metrics_by_step(run_events: Iterable[Event]) -> dict[int, JsonObject]:
    """The metrics of each step, with the validation file's where it was measured."""
    steps: dict[int, JsonObject] = {}
    for run_event in run_events:
        if run_event.kind == "step":
            metrics = {"train_loss": _number(run_event.values["loss"])}
            if REWARD_KEY in run_event.values:
                metrics = {TRAINING_KEY: run_event.values[REWARD_KEY]}
            steps[run_event.step] = {"step": run_event.step, **metrics}
        elif run_event.kind == "evaluation" and run_event.step in steps:
            steps[run_event.step] |= held_out_metrics(run_event.values)
    return steps


def results_file(run_events: Iterable[Event]) -> bytes:
    """step_metrics.csv: a line for each step, blank where nothing was measured."""
    run_events = list(run_events)
    columns: Sequence[str] = _COLUMNS
    rows = list(metrics_by_step(run_events).values())
    if any(run_event.kind == "step" and REWARD_KEY in run_event.values for run_event in run_events):
        columns, rows = reward_metrics.table(run_events)
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(columns)
    table.writerows([row.get(name) for name in columns] for row in rows)
    return written.getvalue().encode()


def trained_tokens(run_events: Iterable[Event]) -> int:
    """Tokens of all rows that were trained on, each as often as it was."""
    return sum(int(run_event.values["tokens"]) for run_event in run_events if run_event.kind == "step")


def missing_exports(job: str, run: Run, why: str) -> list[JsonObject]:
    """A warning for each export of the recipe that a finished run's folder lacks, with the way to make it."""
    warnings = []
    for target, _, value in (word.partition(":") for word in run.recipe().export.to):
        if not run.export_path(f"{target}:{value}").exists():
            option = f" {'--dtype' if target == 'merged' else '--quant'} {value}" if value else ""
            text = f"Not made: the export {target}{option}. {why}".rstrip()
            text += f" Make it on the server: tunesmith export runs/{job} --to {target}{option}"
            warnings.append(event(job, text, level="warn", once=f"export {target}{option}"))
    return warnings


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
