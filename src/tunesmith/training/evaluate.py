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
from tunesmith.errors import RecipeError
from tunesmith.evaluation import general
from tunesmith.evaluation.bootstrap import Interval
from tunesmith.evaluation.compare import preference_notes
from tunesmith.evaluation.generate import ANSWER_BATCH, answer_samples
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.predict_rows import (
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
from tunesmith.recipe.schema import resolved
from tunesmith.runs.atomic import storing, to_json, write_atomic
from tunesmith.training.progress import Session
from tunesmith.training.setup import answer_tokens

_OF_AN_ANSWER = ("source", "prompt", "reference", "answer")


def evaluate_run(session: Session, name: str) -> None:
    """Measure everything that is compared before and after: held-out rows, sample prompts, general ability."""
    measure_held_out(session, name)
    started = time.perf_counter()
    _answer(session, name)
    world = session.setup.world
    takes_part = world.is_first or world.is_sharded
    if resolved(session.setup.recipe.evaluation.general) and session.setup.can_generate and takes_part:
        session.listener.on_progress("general", 0, 1)
        _measure_general(session, name)
        session.listener.on_progress("general", 1, 1)
    session.progress.evaluate_seconds += time.perf_counter() - started


def measure_held_out(session: Session, name: str) -> None:
    """Emit an "evaluation" event; before and after, also write each row's outcome to the folder `evaluation`."""
    setup, progress = session.setup, session.progress
    if len(setup.rows.held_rows) == 0:
        return
    started = time.perf_counter()
    outcomes = _outcomes(session, setup.held_collator, setup.rows.held_rows, "evaluate")
    hashes_I = setup.rows.held_store.hashes[setup.rows.held_rows]
    labels = setup.rows.labels
    results = row_results(setup.head, labels, outcomes, hashes_I)
    measures, details = score(
        results,
        classes=() if labels is None else labels.names,
        constant=constant_answer(labels, setup.rows.store, setup.rows.train_rows),
    )
    if setup.recipe.evaluation.every is not None:
        _metric(measures, setup.recipe.evaluation.metric)  # before the first step, not after the first hundred
    if name in ("before", "after") and setup.world.is_first:
        lines = _lines(session, setup.rows.held_store, setup.rows.held_rows, results)
        _write(session, f"{name}.jsonl", b"".join(to_json(line) + b"\n" for line in lines))
        _write(session, f"{name}.json", to_json(details))
    seconds = time.perf_counter() - started
    progress.evaluate_seconds += seconds
    sources = loss_by_source(results, setup.rows.held_sources())
    documents = {"documents": len(np.unique(hashes_I))} if setup.task.name == "text" else {}
    if name == "step":
        _remember(session, _metric(measures, setup.recipe.evaluation.metric))
    values = {
        "name": name,
        "loss": measures["loss"]["value"],
        "rows": len(hashes_I),
        **documents,
        "targets": len(outcomes.results) or sum(len(targets) for targets in outcomes.targets),
        "measures": measures,
        **({"sources": sources} if sources else {}),
    }
    session.emit("evaluation", values, {"seconds": seconds})
    for text in preference_notes(measures) if name == "after" else ():
        session.emit("note", {"text": text})


def _outcomes(session: Session, collator: Any, rows_I: NDArray[np.int64], what: str) -> Predictions:
    setup, others = session.setup, []
    if setup.task.pools and what == "evaluate":  # anchors look for their positives among documents of other rows too
        sides = [(setup.held_collator, setup.rows.held_rows), (setup.collator, setup.rows.train_rows)]
        for one, some_I in other_rows(sides, collator.store, rows_I, most=setup.recipe.embed.documents):
            others.append((one.store, some_I, _predicted(session, one, some_I, "documents")))
    own = (collator.store, rows_I, _predicted(session, collator, rows_I, what))
    return settled(setup.task, own, others, recipe=setup.recipe, tokenizer=setup.renderer.tokenizer)


def _predicted(session: Session, collator: Any, rows_I: NDArray[np.int64], what: str) -> Predictions:
    return predict_rows(
        session.setup.model,
        session.setup.task,
        collator,
        [int(i) for i in rows_I],
        tokens_per_pass=session.setup.sampler.tokens_per_pass,
        progress=lambda done, total: session.listener.on_progress(what, done, total),
        world=None if session.setup.task.pools else session.setup.world,  # which JSON does not carry
    )


def _lines(
    session: Session, store: RowStore, rows_I: NDArray[np.int64], results: list[RowResult]
) -> Iterator[dict[str, Any]]:
    setup = session.setup
    known = setup.rows.texts(store, rows_I)
    texts = [known.get(int(row)) for row in rows_I]
    if (num := texts.count(None)) and setup.task.name != "text":
        words = "row is shown as its tokens spell it" if num == 1 else "rows are shown as their tokens spell them"
        session.emit("note", {"text": f"{num:,} {words}: the data files are not here, or have changed"})
    return row_lines(store, rows_I, results, tokenizer=setup.renderer.tokenizer, texts=texts)


def _metric(measures: Mapping[str, Interval], key: str) -> float:
    if key not in measures:
        raise RecipeError(f"evaluation.metric: {key} is not defined for these rows. There are: {', '.join(measures)}.")
    return measures[key]["value"]


def _remember(session: Session, value: float) -> None:
    """Record this evaluation if it is the best so far by the recipe's metric."""
    progress = session.progress
    sign = -1.0 if METRICS[session.setup.recipe.evaluation.metric].better == "higher" else 1.0
    best = progress.best.get("value")
    if math.isfinite(value) and (best is None or sign * value < sign * best):
        progress.best = {"step": progress.step, "value": value}
        progress.without_best = 0
    else:
        progress.without_best += 1


def _answer(session: Session, name: str) -> None:
    """Emit a "sample" event for each prompt, then one "answers" event with the metrics of all; scores go to a file."""
    setup = session.setup
    if not setup.samples:
        return
    new_tokens = answer_tokens(setup.recipe, setup.rows)
    given = []
    for index, sample in enumerate(_samples(session, new_tokens)):
        given.append(sample)
        session.emit("sample", {"name": name, "index": index, **sample})
    if not setup.world.is_first:
        return
    answers, references = [[sample[key] for sample in given] for key in ("answer", "reference")]
    scored = zip(given, answer_scores(answers, references), strict=True)
    lines = [{**{key: sample[key] for key in _OF_AN_ANSWER}, **scores} for sample, scores in scored]
    _write(session, f"answers-{name}.jsonl", b"".join(to_json(line) + b"\n" for line in lines))
    measures = score_answers(answers, references)
    session.emit("answers", {"name": name, "num": len(answers), "measures": measures})


def _samples(session: Session, new_tokens: int) -> Iterator[dict[str, Any]]:
    """The answers to all prompts, in order; each rank of a group writes those of some batches."""
    setup, tick = session.setup, session.listener.on_progress
    rank, size = setup.world.part
    if size == 1 or setup.world.is_sharded:  # every rank takes part in every pass
        yield from answer_samples(setup.model, setup.renderer, setup.samples, new_tokens, tick)
        return
    batches = [setup.samples[at : at + ANSWER_BATCH] for at in range(0, len(setup.samples), ANSWER_BATCH)]
    mine = [list(answer_samples(setup.model, setup.renderer, batch, new_tokens, tick)) for batch in batches[rank::size]]
    ranks = setup.world.gather_values(mine)
    for i in range(len(batches)):
        yield from ranks[i % size][i // size]


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
    """Write the training rows with the highest loss under the tuned model to `evaluation/surprising.json`."""
    setup = session.setup
    most = resolved(setup.recipe.evaluation.surprising)
    if most == 0:
        return
    started = time.perf_counter()
    rows_I = sample_rows(setup.rows.store, setup.rows.train_rows, most)
    outcomes = _outcomes(session, setup.collator, rows_I, "surprise")
    if not setup.world.is_first:
        return
    results = row_results(setup.head, setup.rows.labels, outcomes, setup.rows.store.hashes[rows_I])
    lines = highest_loss(_lines(session, setup.rows.store, rows_I, results))
    _write(session, "surprising.json", to_json({"looked_at": len(rows_I), "rows": lines}))
    session.progress.evaluate_seconds += time.perf_counter() - started


def _write(session: Session, name: str, content: bytes) -> None:
    folder = session.run.evaluation_path
    with storing(folder):
        folder.mkdir(exist_ok=True)
    write_atomic(folder / name, content)
