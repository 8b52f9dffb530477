"""The task's measures on any file of answered rows: what a run says of its held-out rows, of rows that come later."""

# I rows

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.examples import content_hash, examples
from tunesmith.data.feed import Feed, Masking
from tunesmith.data.labels import find_kind, refuse_unknown, see
from tunesmith.data.rows import counted, refuse_bad
from tunesmith.data.store import RowStore, build
from tunesmith.errors import InputError
from tunesmith.evaluation.answers import answer_measures
from tunesmith.evaluation.intervals import Interval
from tunesmith.evaluation.measure import evaluate
from tunesmith.evaluation.row_lines import row_lines
from tunesmith.evaluation.samples import PromptRoom, answer_samples, remarks_on, sample_prompts
from tunesmith.evaluation.scores import score
from tunesmith.generation import Sampling
from tunesmith.loading import Speaker
from tunesmith.predicting.trained import find_trained
from tunesmith.recipe.knobs import Data, DataFile
from tunesmith.tasks import bind
from tunesmith.types import Layout, Problem

OnProgress = Callable[[str, int, int], None]


SAMPLES = 50
"""Rows of a file that are answered where nothing else is asked for, by tasks whose answers are measured."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model on one file."""

    task: str
    num_rows: int
    measures: dict[str, Interval]
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
        known = {"majority": None, "mean": None} if trained is None else trained.baseline(speaker.labels)
        measures, details = score(speaker.head, speaker.labels, outcomes, task=task, hashes_I=store.hashes, **known)
        tokenizer = speaker.renderer.tokenizer
        keep(row_lines(store, rows_I, outcomes, head=speaker.head, labels=speaker.labels, tokenizer=tokenizer))
        num_trained = None if trained is None or speaker.is_base else trained.count(store.hashes)
    notes = [*counted([store], problems), *_trained_on(speaker, num_trained, len(rows_I))]
    if samples is None:
        samples = SAMPLES if task in ("chat", "generate", "summarize") else 0
    told, remarks = _answered(speaker, data, samples, on_progress) if samples else ([], [])
    answers, references = [[sample[key] for sample in told] for key in ("answer", "reference")]
    measures |= answer_measures(answers, references, bleu=speaker.recipe.evaluation.bleu)
    return Evaluation(task, len(rows_I), measures, details, told, num_trained, [*notes, *remarks])


def _trained_on(speaker: Speaker, num_trained: int | None, num_rows: int) -> Iterator[str]:
    if num_trained:
        yield f"{num_trained:,} of {num_rows:,} rows were trained on by this run: the measures flatter it"
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
    )


def _answered(
    speaker: Speaker, data: Data, num: int, on_progress: OnProgress
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of smallest content hash, whatever their order in the file, answered; and what to say of that."""
    task, new_tokens = speaker.renderer.task_name, speaker.recipe.evaluation.sample_tokens
    rows = (example for _, example in examples(data.train, data, lambda problem: None, task=task))
    chosen = heapq.nsmallest(num, rows, key=content_hash)
    room = PromptRoom.of(speaker.renderer, model_tokens=speaker.room, new_tokens=new_tokens)
    prompts = sample_prompts(speaker.renderer, chosen, room=room, new_tokens=new_tokens)
    how = Sampling(max_new_tokens=new_tokens)
    told = list(answer_samples(speaker.model, speaker.renderer, prompts, how, on_progress))
    said = f"{len(told):,} rows were answered, with {new_tokens:,} tokens at most (--samples; 0: none)"
    return told, [said, *remarks_on(prompts, num_rows=len(chosen))]
