"""Looking at a model between steps: held-out rows measured, prompts answered, general ability, surprising rows.

Nothing here changes a weight or draws from the loop's random numbers.
"""

# I rows

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.data.images import thumbnail
from tunesmith.errors import RecipeError
from tunesmith.evaluation import general
from tunesmith.evaluation.bootstrap import Interval
from tunesmith.evaluation.compare import preference_notes
from tunesmith.evaluation.generate import FEW_ANSWERS
from tunesmith.evaluation.graded_scores import graded_notes, least_drawn
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.predict_rows import (
    MOST_HIGH_LOSS,
    Predictions,
    constant_answer,
    highest_loss,
    predict_rows,
    row_lines,
    row_results,
    sample_rows,
)
from tunesmith.evaluation.retrieval import other_rows, settled
from tunesmith.evaluation.scores import RowResult, answer_scores, loss_by_source, score, score_answers
from tunesmith.generation.continuation import Continuation
from tunesmith.recipe.schema import resolved
from tunesmith.runs.atomic import storing, to_json, write_atomic
from tunesmith.training.answers import continuation, prompts_of, samples
from tunesmith.training.graded import graded_rows
from tunesmith.training.progress import Session
from tunesmith.types import JsonObject

MOST_SHOWN = 8
"""Images of an answered prompt that the report shows, small; of the first `FEW_ANSWERS` prompts."""
_OF_AN_ANSWER = ("source", "prompt", "reference", "answer")


def evaluate_run(session: Session, name: str) -> None:
    """Measure everything that is compared before and after: held-out rows, sample prompts, general ability."""
    writing = continuation(session.setup, name, session.listener.on_progress)
    measure_held_out(session, name, writing)
    started = time.perf_counter()
    if writing is not None and writing.why and session.setup.world.is_first and name == "before":
        text = f"answers are written by themselves, not from the rows that are measured: {writing.why}"
        session.emit("note", {"text": text})
    _answer(session, name, writing)
    world = session.setup.world
    takes_part = world.is_first or world.is_sharded
    if resolved(session.setup.recipe.evaluation.general) and session.setup.can_generate and takes_part:
        session.listener.on_progress("general", 0, 1)
        _measure_general(session, name)
        session.listener.on_progress("general", 1, 1)
    session.progress.evaluate_seconds += time.perf_counter() - started


def measure_on_the_way(session: Session) -> None:
    """Measure held-out rows between steps, and answer the prompts of such an evaluation."""
    measure_held_out(session, "step")
    started = time.perf_counter()
    _answer(session, "step", None)
    session.progress.evaluate_seconds += time.perf_counter() - started


def measure_held_out(session: Session, name: str, writing: Continuation | None = None) -> None:
    """Emit an "evaluation" event; before and after, also write each row's outcome to the folder `evaluation`.
    `writing`: goes on from the prompts of some rows."""
    setup, progress = session.setup, session.progress
    if len(setup.rows.held_rows) == 0:
        return
    started = time.perf_counter()
    rows_I, labels, num_targets = setup.rows.held_rows, setup.rows.labels, 0
    if setup.drawing is not None:
        rows_I, results = graded_rows(session, name)
    else:
        outcomes = _outcomes(session, setup.held_collator, rows_I, "evaluate", writing)
        num_targets = len(outcomes.results) or sum(len(targets) for targets in outcomes.targets)
        if setup.teacher is not None:  # of its rows each token is a target
            num_targets = round(outcomes.counts_I.sum())
        results = row_results(setup.head, labels, outcomes, setup.rows.held_store.hashes[rows_I])
    hashes_I = setup.rows.held_store.hashes[rows_I]
    measures, details = score(
        results,
        classes=() if labels is None else labels.names,
        constant=constant_answer(labels, setup.rows.store, setup.rows.train_rows),
    )
    if setup.recipe.evaluation.every is not None:
        _metric(measures, setup.recipe.evaluation.metric)  # before the first step, not after the first hundred
    if name in ("before", "after") and setup.world.is_first:
        lines = _lines(session, setup.rows.held_store, rows_I, results)
        _write(session, f"{name}.jsonl", b"".join(to_json(line) + b"\n" for line in lines))
        _write(session, f"{name}.json", to_json(details))
    seconds = time.perf_counter() - started
    progress.evaluate_seconds += seconds
    is_whole = len(rows_I) == len(setup.rows.held_rows)
    sources = loss_by_source(results, setup.rows.held_sources()) if is_whole else {}
    documents = {"documents": len(np.unique(hashes_I))} if setup.task.in_windows else {}
    if name == "step":
        _remember(session, _metric(measures, setup.recipe.evaluation.metric), measures["loss"]["value"])
    values = {
        "name": name,
        "loss": measures["loss"]["value"],
        "rows": len(hashes_I),
        **documents,
        **({} if setup.drawing is None else {"drawn": least_drawn(results)}),
        "targets": num_targets or len(results),
        "measures": measures,
        **({"sources": sources} if sources else {}),
    }
    writes = {} if writing is None else {"answering": writing.seconds}
    session.emit("evaluation", values, {"seconds": seconds, **writes})
    for text in _notes(session, measures) if name == "after" and setup.world.is_first else ():
        session.emit("note", {"text": text})


def _notes(session: Session, measures: Mapping[str, Interval]) -> Iterator[str]:
    """Notes on a model that learnt something else than it should."""
    yield from preference_notes(measures)
    if session.setup.drawing is not None:
        measured = (event.values for event in session.run.events() if event.kind == "evaluation")
        before = [values["measures"] for values in measured if values["name"] == "before"]
        yield from graded_notes(before[0], measures) if before else ()


def _outcomes(
    session: Session, collator: Any, rows_I: NDArray[np.int64], what: str, writing: Continuation | None = None
) -> Predictions:
    setup, others = session.setup, []
    if setup.task.pools and what == "evaluate":  # anchors seek their positives among documents of others too
        sides = [(setup.held_collator, setup.rows.held_rows), (setup.collator, setup.rows.train_rows)]
        for other, other_I in other_rows(sides, collator.store, rows_I, most=setup.recipe.embed.documents):
            others.append((other.store, other_I, _predicted(session, other, other_I, "documents")))
    own = (collator.store, rows_I, _predicted(session, collator, rows_I, what, writing))
    recipe, tokenizer = setup.recipe, setup.renderer.tokenizer
    return settled(setup.task, own, others, embed=recipe.embed, prefer=recipe.prefer, tokenizer=tokenizer)


def _predicted(
    session: Session, collator: Any, rows_I: NDArray[np.int64], what: str, writing: Continuation | None = None
) -> Predictions:
    return predict_rows(
        session.setup.model,
        session.setup.task,
        collator,
        [int(i) for i in rows_I],
        tokens_per_pass=session.setup.sampler.tokens_per_pass,
        progress=lambda done, total: session.listener.on_progress(what, done, total),
        world=None if session.setup.task.pools else session.setup.world,  # which JSON does not carry
        answering=writing,
    )


def _lines(
    session: Session, store: RowStore, rows_I: NDArray[np.int64], results: list[RowResult]
) -> Iterator[JsonObject]:
    setup = session.setup
    known = setup.rows.texts(store, rows_I)
    texts = [known.get(int(row)) for row in rows_I]
    if (num := texts.count(None)) and not setup.task.in_windows:
        words = "row is shown as its tokens spell it" if num == 1 else "rows are shown as their tokens spell them"
        session.emit("note", {"text": f"{num:,} {words}: the data files are not here, or have changed"})
    return row_lines(store, rows_I, results, tokenizer=setup.renderer.tokenizer, texts=texts)


def _metric(measures: Mapping[str, Interval], key: str) -> float:
    if key not in measures:
        raise RecipeError(f"evaluation.metric: {key} is not defined for these rows. There are: {', '.join(measures)}.")
    return measures[key]["value"]


def _remember(session: Session, value: float, loss: float) -> None:
    """Record this evaluation if it is the best so far by the recipe's metric, or as good with a lower loss."""
    progress, best = session.progress, session.progress.best
    sign = -1.0 if METRICS[session.setup.recipe.evaluation.metric].better == "higher" else 1.0
    is_better = not best or (sign * value, loss) < (sign * best["value"], best.get("loss", -math.inf))
    if math.isfinite(value) and is_better:
        progress.best = {"step": progress.step, "value": value, "loss": loss}
        progress.without_best = 0
    else:
        progress.without_best += 1


def _answer(session: Session, name: str, writing: Continuation | None) -> None:
    """Emit a "sample" event for each prompt, then one "answers" event of all metrics; scores go to a file."""
    setup = session.setup
    if not prompts_of(setup, name):
        return
    written = []
    for index, sample in enumerate(samples(session, name, writing)):
        written.append(sample)
        shown = prompts_of(setup, name)[index].images[:MOST_SHOWN] if index < FEW_ANSWERS else ()
        images = {"images": [thumbnail(image) for image in shown]} if shown else {}
        session.emit("sample", {"name": name, "index": index, **sample, **images})
    if not setup.world.is_first or name == "step":
        return
    answers, references = [[sample[key] for sample in written] for key in ("answer", "reference")]
    scored = zip(written, answer_scores(answers, references), strict=True)
    lines = [{**{key: sample[key] for key in _OF_AN_ANSWER}, **scores} for sample, scores in scored]
    _write(session, f"answers-{name}.jsonl", b"".join(to_json(line) + b"\n" for line in lines))
    measures = score_answers(answers, references)
    session.emit("answers", {"name": name, "num": len(answers), "measures": measures})


def _measure_general(session: Session, name: str) -> None:
    """Emit a "general" event: loss on the general text of this package."""
    setup = session.setup
    losses_P, counts_P = general.text_losses(
        setup.model, setup.task, setup.renderer.tokenizer, layout=setup.sampler.layout, device=setup.device
    )
    loss = float(losses_P.sum() / counts_P.sum())
    values = {
        "name": name,
        "loss": loss,
        "tokens": int(counts_P.sum()),
        "passages": {"losses": losses_P.tolist(), "tokens": counts_P.tolist()},
    }
    session.emit("general", values)
    if name == "after" and setup.world.is_first:
        earlier = (event.values for event in session.run.events() if event.kind == "general")
        before = next((values for values in earlier if values["name"] == "before"), None)
        if before is None:  # the log has lost it
            return
        moved = general.loss_change(before["passages"]["losses"], losses_P.tolist(), counts_P.tolist())
        text, past_bound = general.assess(before["loss"], loss, moved)
        if past_bound:
            session.emit("note", {"text": text})


def find_high_loss_rows(session: Session) -> None:
    """Write the training rows of highest loss to `evaluation/surprising.json`.

    If training saw the rows, they come from the last epoch, each with the loss of its own step, before the
    update: nothing is measured for them but a head's answers for the listed rows. Other rows are measured.
    """
    setup, world = session.setup, session.setup.world
    most = resolved(setup.recipe.evaluation.surprising)
    if most == 0:
        return
    started, store, labels = time.perf_counter(), setup.rows.store, setup.rows.labels
    seen = dict[int, float](world.gather_values(_seen(session, most))[0])
    rows_I = np.array(list(seen), np.int64) if seen else sample_rows(store, setup.rows.train_rows, most)
    looked_at, source = len(rows_I), "training" if seen else "measuring"
    if seen:
        losses_I = np.array(list(seen.values())) / store.denominators[rows_I]
        rows_I = rows_I[np.argsort(-losses_I, kind="stable")][:MOST_HIGH_LOSS]
    if seen and labels is None:
        results: list[RowResult] = [{"hash": f"{hash_:016x}"} for hash_ in store.hashes[rows_I].tolist()]
    else:
        outcomes = _outcomes(session, setup.collator, rows_I, "surprise")
        results = row_results(setup.head, labels, outcomes, store.hashes[rows_I])
    if not world.is_first:
        return
    if seen:
        pairs = zip(results, rows_I.tolist(), store.denominators[rows_I].tolist(), strict=True)
        results = [{**result, "loss": seen[row], "count": count} for result, row, count in pairs]
    lines = highest_loss(_lines(session, store, rows_I, results))
    _write(session, "surprising.json", to_json({"looked_at": looked_at, "from": source, "rows": lines}))
    session.progress.evaluate_seconds += time.perf_counter() - started


def _seen(session: Session, most: int) -> list[tuple[int, float]]:
    """At most `most` rows of the last epoch with their losses, from the log of steps: on the first rank."""
    setup, last = session.setup, session.progress.step
    if not setup.world.is_first or not setup.task.sees_rows:
        return []
    seen: dict[int, float] = {}
    for event in session.run.events():
        if event.kind == "step" and event.step > last - setup.sampler.steps_per_epoch:
            seen.update(zip(event.values["rows"], event.values.get("row_losses", ()), strict=False))
    some_I = sample_rows(setup.rows.store, np.array(list(seen), np.int64), most)
    return [(row, seen[row]) for row in some_I.tolist()]


def _write(session: Session, name: str, content: bytes) -> None:
    folder = session.run.evaluation_path
    with storing(folder):
        folder.mkdir(exist_ok=True)
    write_atomic(folder / name, content)
