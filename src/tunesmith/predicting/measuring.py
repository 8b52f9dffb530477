"""The task's measures on any file of answered rows: what a run says of its held-out rows, of rows that come later."""

# I rows

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.examples import content_hash, examples
from tunesmith.data.feed import Feed, Masking
from tunesmith.data.labels import find_kind, refuse_unknown, see
from tunesmith.data.rows import counted, refuse_bad
from tunesmith.data.store import RowStore, build
from tunesmith.errors import DataError
from tunesmith.evaluation.answers import answer_measures
from tunesmith.evaluation.intervals import Interval
from tunesmith.evaluation.measure import evaluate
from tunesmith.evaluation.row_lines import row_lines
from tunesmith.evaluation.samples import answer_samples, sample_prompts
from tunesmith.evaluation.scores import score
from tunesmith.generation import Sampling
from tunesmith.loading import Speaker
from tunesmith.models.size import size
from tunesmith.recipe.knobs import Data, DataFile
from tunesmith.tasks import bind
from tunesmith.types import Layout, Problem

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model on one file."""

    task: str
    measures: dict[str, Interval]
    details: dict[str, Any]
    """Of `score`: confusion matrix, per class, ..."""
    lines: list[dict[str, Any]]
    """One a row, as in a run's evaluation/after.jsonl."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Prompts, their references and answers."""
    notes: list[str] = field(default_factory=list)


def evaluate_file(
    speaker: Speaker,
    path: str,
    *,
    samples: int = 0,
    majority: int | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """Measures of all rows of a file, each with its interval; with `samples`, of answers to that many of them too.

    `majority`: id of the commonest class in training, for the baseline.

    Raises:
        DataError: rows cannot be used, or have labels that the model does not know; see `build`.
    """
    recipe, task = speaker.recipe, speaker.renderer.task_name
    data = _data_of(speaker, path)
    problems: list[Problem] = []
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        store = build(
            Path(folder),
            data=data,
            files=data.train,
            renderer=speaker.renderer,
            on_problem=problems.append,
            progress=lambda rows, done, total: on_progress("encode", done, total),
        )
        refuse_bad(data, [store], problems)
        if speaker.labels is not None:
            find_kind(task, data, [see(store)])
            refuse_unknown(speaker.labels, store)
            store.use(speaker.labels)
        rows_I = np.arange(len(store))
        outcomes = evaluate(
            speaker.model,
            bind(task, speaker.labels),
            _feed(speaker, store),
            [int(i) for i in rows_I],
            tokens_per_pass=speaker.tokens_per_pass,
            progress=lambda done, total: on_progress("evaluate", done, total),
        )
        measures, details = score(speaker.head, speaker.labels, outcomes, task=task, majority=majority, mean=None)
        tokenizer = speaker.renderer.tokenizer
        lines = list(row_lines(store, rows_I, outcomes, head=speaker.head, labels=speaker.labels, tokenizer=tokenizer))
    told = list(_answered(speaker, data, samples, on_progress)) if samples and speaker.head == "next_token" else []
    if told:
        answers, references = [[sample[key] for sample in told] for key in ("answer", "reference")]
        measures = {**measures, **answer_measures(answers, references, bleu=recipe.evaluation.bleu)}
    return Evaluation(task, measures, details, lines, told, counted([store], problems))


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
    )


def _answered(speaker: Speaker, data: Data, num: int, on_progress: OnProgress) -> Iterator[dict[str, Any]]:
    """The rows of smallest content hash, whatever their order in the file, answered."""
    task, new_tokens = speaker.renderer.task_name, speaker.recipe.evaluation.sample_tokens
    rows = (example for _, example in examples(data.train, data, lambda problem: None, task=task))
    chosen = heapq.nsmallest(num, rows, key=content_hash)
    room = size(speaker.located).max_tokens - new_tokens
    prompts = sample_prompts(speaker.renderer, chosen, max_tokens=room, new_tokens=new_tokens)
    if not prompts:
        raise DataError(f"{data.train[0].path}: no row has a prompt that leaves the model room for an answer")
    how = Sampling(max_new_tokens=new_tokens)
    yield from answer_samples(speaker.model, speaker.renderer, prompts, how, on_progress)
