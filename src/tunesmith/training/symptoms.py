"""Signs of the commonest disappointments in a run, each with its word for `tunesmith explain`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.evaluation.compare import named
from tunesmith.evaluation.scores import RowResult
from tunesmith.recipe.schema import Loss
from tunesmith.tasks import TASKS
from tunesmith.tasks.task import PLAIN_LOSS
from tunesmith.types import Event, Record

FEWEST = 4
"""Answers, or steps, below which nothing is said of them."""
ONE_CLASS_ROWS = 10
"""Held-out rows below which one class for all may be right."""
FAR_BELOW = 0.25
"""Share of the held-out loss below which a training loss shows rows learnt by heart."""
BELOW = 0.7
"""Share of the training loss below which a held-out loss is odd: dropout and the next update explain less."""
TIMES_LONGER = 1.5
"""Least ratio of a cut answer's length to its reference's at which the answer counts as endless."""


def symptoms(task: str, events: Sequence[Event], rows: Sequence[RowResult], loss: Loss = PLAIN_LOSS) -> Iterator[str]:
    """A sentence for each. `events`: the run's; `rows`: results of its held-out rows after training; `loss`:
    additions, with which a training loss is above the held-out one by itself."""
    measured = {event.values["name"]: event.values for event in events if event.kind == "evaluation"}
    held = {name: float(values["loss"]) for name, values in measured.items()}
    before, after = held.get("before"), held.get("after")
    same_measure = not TASKS[task].samples  # the loss of drawn answers is no measure of how good they are
    learns_rows = same_measure and not any("answer_tokens" in event.values for event in events if event.kind == "step")
    if same_measure and before is not None and after is not None and after >= before:
        losses = f"{before:.4f} before, {after:.4f} after"
        measures = [measured[name].get("measures", {}) for name in ("before", "after")]
        right = [values.get("accuracy", {}).get("value", 0.0) for values in measures]
        is_surer = "; more answers are right, and the wrong ones are surer" if right[1] > right[0] else ""
        yield f"the held-out loss did not fall: {losses}{is_surer}: tunesmith explain loss-does-not-fall"
    yield from _one_class(rows)
    if not TASKS[task].writes_answers or TASKS[task].compares:
        return
    of_step = {event.step: float(event.values["loss"]) for event in events if event.kind == "step"}
    tail = [of_step[step] for step in sorted(of_step)][-max(FEWEST, len(of_step) // 4) :]
    if learns_rows and after is not None and len(tail) >= FEWEST:  # else the loss is of answers that were drawn
        yield from _apart(sum(tail) / len(tail), after, is_plain=loss == PLAIN_LOSS)
    yield from _endless(
        [event.values for event in events if event.kind == "sample" and event.values["name"] == "after"]
    )


def _one_class(rows: Sequence[RowResult]) -> Iterator[str]:
    classes = [(row["label"], row["predicted"]) for row in rows if isinstance(row.get("label"), str)]
    if len(classes) < ONE_CLASS_ROWS or len({label for label, _ in classes}) < 2:
        return
    if len({answer for _, answer in classes}) == 1:
        yield f"all {len(classes):,} held-out rows are called {named(classes[0][1])}: tunesmith explain one-class"


def _apart(trained: float, held: float, *, is_plain: bool) -> Iterator[str]:
    losses = f"the training loss is {trained:.4f} in the end, the held-out loss {held:.4f}"
    if trained < FAR_BELOW * held:
        yield f"{losses}: rows are learnt by heart: tunesmith explain it-copies-rows"
    if is_plain and held < BELOW * trained:
        yield f"{losses}: held-out rows are easier, or known: tunesmith explain held-out-better-than-training"


def _endless(samples: Sequence[Record]) -> Iterator[str]:
    known = [sample for sample in samples if sample.get("reference")]
    cut = [
        sample
        for sample in known
        if not sample["stopped"] and len(sample["answer"].split()) > TIMES_LONGER * len(sample["reference"].split())
    ]
    if len(known) >= FEWEST and 2 * len(cut) > len(known):
        yield (
            f"{len(cut):,} of {len(known):,} answers did not end within evaluation.sample_tokens and are "
            "longer than their references: tunesmith explain answers-never-end"
        )
