"""The task's measures on any file of answered rows: what a run says of its held-out rows, of rows that come later."""

# I rows

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.examples import content_hash, examples
from tunesmith.data.feed import Feed, Masking
from tunesmith.data.given import texts_in_order
from tunesmith.data.labels import count_classes, find_kind, refuse_unknown, see, weights_of
from tunesmith.data.rows import counted, refuse_bad
from tunesmith.data.store import RowStore, build
from tunesmith.errors import InputError, NonFiniteError
from tunesmith.evaluation.bootstrap import Interval
from tunesmith.evaluation.generate import (
    MOST_SHORT,
    PromptLimit,
    Sampling,
    answer_samples,
    has_short_answers,
    new_tokens_for,
    sample_notes,
    sample_prompts,
)
from tunesmith.evaluation.predict_rows import constant_answer, predict_rows, row_lines, row_results
from tunesmith.evaluation.scores import RowResult, answer_scores, score, score_answers
from tunesmith.evaluation.verdicts import (
    answer_baseline,
    baseline_sentence,
    capitalized,
    never_right,
    row_baseline,
    too_few,
)
from tunesmith.formatting import plural
from tunesmith.inference.load import Speaker
from tunesmith.inference.trained import Trained, find_trained
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS, bind
from tunesmith.types import Layout, Problem

OnProgress = Callable[[str, int, int], None]


SAMPLES = 50
"""Rows of a file that are answered by default, by tasks whose answers are measured; `MOST_SHORT` of short ones."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model on one file."""

    task: str
    num_rows: int
    measures: dict[str, Interval]
    baseline: dict[str, Any] | None
    """What a constant answer gets on the same rows: see `row_baseline`."""
    headline: list[str]
    """What that proves, and on how few rows, in sentences."""
    details: dict[str, Any]
    """Of `score`: confusion matrix, per class, ..."""
    samples: list[dict[str, Any]]
    """Prompts, their references and answers."""
    num_trained: int | None
    """Rows that the run was trained on; None: nothing is known of that."""
    notes: list[str]


def evaluate_file(
    speaker: Speaker,
    path: str,
    *,
    samples: int | None = None,
    keep: Callable[[Iterator[dict[str, Any]]], None] = lambda lines: None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """Measures of all rows of a file, each with its interval, and of answers to `samples` of them.

    `samples` None: `SAMPLES` for the tasks chat, generate and summarize, 0 for others. `keep` is given a line for each
    row, as in a run's evaluation/after.jsonl; a line is made as it is taken.

    Raises:
        InputError: answers are asked of a model that writes nothing.
        DataError: rows cannot be used, or have labels that the model does not know; see `build`.
    """
    task = speaker.renderer.task_name
    if samples and speaker.head != "next_token":
        raise InputError(
            f"--samples: a model of task {task} that has no head for writing gives no answers. Leave it out."
        )
    data = _data_of(speaker, path)
    trained = None if speaker.run is None else find_trained(speaker.run)
    speaker, weight_notes = _weighed(speaker, trained)
    problems: list[Problem] = []
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        store = _encoded(speaker, data, Path(folder), problems, on_progress)
        rows_I = np.arange(len(store))
        outcomes = predict_rows(
            speaker.model,
            bind(task, speaker.labels),
            _feed(speaker, store),
            [int(i) for i in rows_I],
            tokens_per_pass=speaker.tokens_per_pass(store.lengths.tolist()),
            progress=lambda done, total: on_progress("evaluate", done, total),
        )
        results = row_results(speaker.head, speaker.labels, outcomes, store.hashes)
        measures, details, baseline = _judged(speaker, trained, store, results)
        _refuse_no_numbers(measures, speaker, path)
        texts = texts_in_order((example for _, example in examples(data.train, data, ignore, task=task)), store)
        keep(row_lines(store, rows_I, results, tokenizer=speaker.renderer.tokenizer, texts=texts))
        num_trained = None if trained is None or speaker.is_base else trained.count(store.hashes)
    notes = [*weight_notes, *counted([store], problems), *_trained_on(speaker, num_trained, len(rows_I))]
    told, remarks = _answered(speaker, data, store, samples, on_progress)
    answers, references = [[sample[key] for sample in told] for key in ("answer", "reference")]
    measures |= score_answers(answers, references, bleu=speaker.recipe.evaluation.bleu)
    if baseline is None and told:
        scored = zip(told, answer_scores(answers, references), strict=True)
        baseline = answer_baseline([{**sample, **scores} for sample, scores in scored])
    headline = _headline(task, measures, baseline, details, store)
    return Evaluation(task, len(rows_I), measures, baseline, headline, details, told, num_trained, [*notes, *remarks])


def _encoded(speaker: Speaker, data: Data, folder: Path, problems: list[Problem], on_progress: OnProgress) -> RowStore:
    """The rows of the file, with the labels that the model answers with."""
    store = build(
        folder,
        data=data,
        files=data.train,
        renderer=speaker.renderer,
        on_problem=problems.append,
        progress=lambda rows, done, total: on_progress("encode", done, total),
    )
    refuse_bad(data, [store], problems)
    if speaker.labels is not None:
        find_kind(speaker.renderer.task_name, data, [see(store)])
        refuse_unknown(speaker.labels, store)
        store.use(speaker.labels)
    return store


def _judged(
    speaker: Speaker, trained: Trained | None, store: RowStore, results: list[RowResult]
) -> tuple[dict[str, Interval], dict[str, Any], dict[str, Any] | None]:
    """Measures, details, and what a constant answer gets: by the training rows' labels, where they are known."""
    rows_I, labels = np.arange(len(store)), speaker.labels
    constant = constant_answer(labels, store, rows_I) if trained is None else trained.constant(labels)
    measures, details = score(
        results,
        classes=() if labels is None else labels.names,
        constant=constant,
        constant_from="the rows measured" if trained is None else "the training rows",
    )
    return measures, details, row_baseline(results, details.get("constant"), details.get("labels", ()))


def _headline(
    task: str, measures: dict[str, Interval], baseline: dict[str, Any] | None, details: dict[str, Any], store: RowStore
) -> list[str]:
    """What the measures prove, and on how few rows."""
    sentence = [] if baseline is None else [f"{capitalized(baseline_sentence(measures, baseline))}."]
    few = too_few(len(np.unique(store.hashes)), "document") if task == "text" else too_few(len(store), "row")
    return [*sentence, *never_right(details), *few]


def _weighed(speaker: Speaker, trained: Trained | None) -> tuple[Speaker, list[str]]:
    """The speaker whose loss weighs classes as in training. Runs of earlier versions say "balanced" and no weights:
    they follow from the training rows, where those are kept."""
    labels = speaker.labels
    if labels is None or speaker.recipe.train.class_weights != "balanced":
        return speaker, []
    if trained is None:
        return speaker, [
            "the loss is not weighted as in training: the rows that train.class_weights follows from are gone"
        ]
    counts_C = count_classes(labels, trained.store, trained.rows_I)
    weights_C = weights_of("balanced", labels.kind, labels.names, counts_C)
    return replace(speaker, labels=replace(labels, weights_C=weights_C)), []


def ignore(problem: Problem) -> None:
    """Problems of rows that were encoded before were told then."""


def _refuse_no_numbers(measures: Mapping[str, Interval], speaker: Speaker, path: str) -> None:
    """Raise NonFiniteError where the loss is none: the model is broken, and what it answers means nothing."""
    loss = measures.get("loss")
    if loss is not None and not math.isfinite(loss["value"]):
        raise NonFiniteError(
            f"{path}: the loss of its rows is {loss['value']}: the weights of {speaker.result or speaker.located.path} "
            "hold values that are not finite, or lead to them. Nothing was measured."
        )


def _trained_on(speaker: Speaker, num_trained: int | None, num_rows: int) -> Iterator[str]:
    if num_trained:
        were = "was" if num_trained == 1 else "were"
        yield f"{num_trained:,} of {plural(num_rows, 'row')} {were} trained on by this run: the measures flatter it"
    elif num_trained is None and speaker.run is not None and not speaker.is_base:
        yield "whether rows were trained on by this run is not known: it keeps no rows that this release reads"


def _data_of(speaker: Speaker, path: str) -> Data:
    """How the file is read: as the training files were, with the classes that the model knows."""
    labels = speaker.labels
    known: dict[str, Any] = {}
    if labels is not None:
        known = {"labels": labels.names} | ({} if labels.kind == "tags" else {"label_kind": labels.kind})
    update = {"train": (DataFile(path=path),), "eval": (), "replay": (), **known}
    return speaker.recipe.data.model_copy(update=update)


def _feed(speaker: Speaker, store: RowStore) -> Feed:
    """Passes that are padded: the rows of one are of like length, and no kind of model needs it otherwise."""
    layout: Layout = "encoder_decoder" if speaker.renderer.kind == "encoder_decoder" else "padded"
    masking = None
    if speaker.head == "masked_token":
        # The seed by which every run masks its held-out rows, so that measures compare.
        masking = Masking.of(speaker.renderer.tokenizer, share=speaker.recipe.train.masked, seed=0)
    return Feed(
        store,
        layout=layout,
        device=speaker.model.device,
        masking=masking,
        decoder_start=getattr(speaker.model.config, "decoder_start_token_id", None),
        has_types=speaker.has_types,
        pad_id=speaker.pad_id,
    )


def _answered(
    speaker: Speaker, data: Data, store: RowStore, num: int | None, on_progress: OnProgress
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of smallest content hash, whatever their order in the file, answered; and what to say of that."""
    task = speaker.renderer.task_name
    if num is None:
        usual = MOST_SHORT if has_short_answers(store.targets) else SAMPLES
        num = usual if TASKS[task].writes_answers else 0
    if num == 0:
        return [], []
    new_tokens = new_tokens_for(store.targets, speaker.recipe.evaluation.sample_tokens)
    rows = (example for _, example in examples(data.train, data, ignore, task=task))
    chosen = heapq.nsmallest(num, rows, key=content_hash)
    room = PromptLimit.of(speaker.renderer, model_tokens=speaker.room, new_tokens=new_tokens)
    prompts = sample_prompts(speaker.renderer, chosen, limit=room, new_tokens=new_tokens)
    how = Sampling(max_new_tokens=new_tokens)
    told = list(answer_samples(speaker.model, speaker.renderer, prompts, how, on_progress))
    were = "was" if len(told) == 1 else "were"
    said = f"{plural(len(told), 'row')} {were} answered, with {new_tokens:,} tokens at most (--samples; 0: none)"
    return told, [said, *sample_notes(prompts, num_rows=len(chosen))]
