"""Metrics of a model on any file of labelled rows, as a run measures its held-out rows."""

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
from numpy.typing import NDArray

from tunesmith.data.examples import content_hash, examples
from tunesmith.data.feed import Feed, Masking
from tunesmith.data.folders import expand
from tunesmith.data.given import texts_in_order
from tunesmith.data.labels import count_classes, find_kind, refuse_unknown, see, weights_of
from tunesmith.data.rows import counted, refuse_bad
from tunesmith.data.sides import split
from tunesmith.data.store import RowStore, build, kept
from tunesmith.errors import DataError, InputError, NonFiniteError
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
from tunesmith.evaluation.scores import Constant, RowResult, answer_scores, score, score_answers
from tunesmith.evaluation.verdicts import (
    answer_baseline,
    baseline_sentence,
    capitalized,
    never_right,
    row_baseline,
    too_few,
)
from tunesmith.formatting import plural
from tunesmith.inference.load import LoadedModel
from tunesmith.recipe.schema import Data, DataFile, resolved
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS, bind
from tunesmith.types import Labels, Layout, Problem

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
    loaded: LoadedModel,
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
    task = loaded.renderer.task_name
    if samples and loaded.head != "next_token":
        raise InputError(
            f"--samples: a model of task {task} that has no head for writing gives no answers. Leave it out."
        )
    data = _data_of(loaded, path)
    trained = None if loaded.run is None else load_training_rows(loaded.run)
    loaded, weight_notes = _weighed(loaded, trained)
    problems: list[Problem] = []
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        store = _encoded(loaded, data, Path(folder), problems, on_progress)
        rows_I = np.arange(len(store))
        outcomes = predict_rows(
            loaded.model,
            bind(task, loaded.labels),
            _feed(loaded, store),
            [int(i) for i in rows_I],
            tokens_per_pass=loaded.tokens_per_pass(store.lengths.tolist()),
            progress=lambda done, total: on_progress("evaluate", done, total),
        )
        results = row_results(loaded.head, loaded.labels, outcomes, store.hashes)
        measures, details, baseline = _judged(loaded, trained, store, results)
        _refuse_no_numbers(measures, loaded, path)
        texts = texts_in_order((example for _, example in examples(data.train, data, ignore, task=task)), store)
        keep(row_lines(store, rows_I, results, tokenizer=loaded.renderer.tokenizer, texts=texts))
        num_trained = None if trained is None or loaded.is_base else trained.count(store.hashes)
    notes = [*weight_notes, *counted([store], problems), *_trained_on(loaded, num_trained, len(rows_I))]
    told, remarks = _answered(loaded, data, store, samples, on_progress)
    answers, references = [[sample[key] for sample in told] for key in ("answer", "reference")]
    measures |= score_answers(answers, references, bleu=loaded.recipe.evaluation.bleu)
    if baseline is None and told:
        scored = zip(told, answer_scores(answers, references), strict=True)
        baseline = answer_baseline([{**sample, **scores} for sample, scores in scored])
    headline = _headline(task, measures, baseline, details, store)
    return Evaluation(task, len(rows_I), measures, baseline, headline, details, told, num_trained, [*notes, *remarks])


def _encoded(
    loaded: LoadedModel, data: Data, folder: Path, problems: list[Problem], on_progress: OnProgress
) -> RowStore:
    """The rows of the file, with the labels that the model answers with."""
    store = build(
        folder,
        data=data,
        files=data.train,
        renderer=loaded.renderer,
        on_problem=problems.append,
        progress=lambda rows, done, total: on_progress("encode", done, total),
    )
    refuse_bad(data, [store], problems)
    if loaded.labels is not None:
        find_kind(loaded.renderer.task_name, data, [see(store)])
        refuse_unknown(loaded.labels, store)
        store.use(loaded.labels)
    return store


def _judged(
    loaded: LoadedModel, trained: TrainingRows | None, store: RowStore, results: list[RowResult]
) -> tuple[dict[str, Interval], dict[str, Any], dict[str, Any] | None]:
    """Measures, details, and what a constant answer gets: by the training rows' labels, where they are known."""
    rows_I, labels = np.arange(len(store)), loaded.labels
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


def _weighed(loaded: LoadedModel, trained: TrainingRows | None) -> tuple[LoadedModel, list[str]]:
    """The loaded whose loss weighs classes as in training. Runs of earlier versions say "balanced" and no weights:
    they follow from the training rows, where those are kept."""
    labels = loaded.labels
    if labels is None or loaded.recipe.train.class_weights != "balanced":
        return loaded, []
    if trained is None:
        return loaded, [
            "the loss is not weighted as in training: the rows that train.class_weights follows from are gone"
        ]
    counts_C = count_classes(labels, trained.store, trained.rows_I)
    weights_C = weights_of("balanced", labels.kind, labels.names, counts_C)
    return replace(loaded, labels=replace(labels, weights_C=weights_C)), []


def ignore(problem: Problem) -> None:
    """Problems of rows that were encoded before were told then."""


def _refuse_no_numbers(measures: Mapping[str, Interval], loaded: LoadedModel, path: str) -> None:
    """Raise NonFiniteError where the loss is none: the model is broken, and what it answers means nothing."""
    loss = measures.get("loss")
    if loss is not None and not math.isfinite(loss["value"]):
        raise NonFiniteError(
            f"{path}: the loss of its rows is {loss['value']}: the weights of {loaded.result or loaded.located.path} "
            "hold values that are not finite, or lead to them. Nothing was measured."
        )


def _trained_on(loaded: LoadedModel, num_trained: int | None, num_rows: int) -> Iterator[str]:
    if num_trained:
        were = "was" if num_trained == 1 else "were"
        yield f"{num_trained:,} of {plural(num_rows, 'row')} {were} trained on by this run: the measures flatter it"
    elif num_trained is None and loaded.run is not None and not loaded.is_base:
        yield "whether rows were trained on by this run is not known: it keeps no rows that this release reads"


def _data_of(loaded: LoadedModel, path: str) -> Data:
    """How the file is read: as the training files were, with the classes that the model knows."""
    labels = loaded.labels
    known: dict[str, Any] = {}
    if labels is not None:
        known = {"labels": labels.names} | ({} if labels.kind == "tags" else {"label_kind": labels.kind})
    update = {"train": (DataFile(path=path),), "eval": (), "replay": (), **known}
    return loaded.recipe.data.model_copy(update=update)


def _feed(loaded: LoadedModel, store: RowStore) -> Feed:
    """Passes that are padded: the rows of one are of like length, and no kind of model needs it otherwise."""
    layout: Layout = "encoder_decoder" if loaded.renderer.kind == "encoder_decoder" else "padded"
    masking = None
    if loaded.head == "masked_token":
        # The seed by which every run masks its held-out rows, so that measures compare.
        masking = Masking.of(loaded.renderer.tokenizer, share=loaded.recipe.train.masked, seed=0)
    return Feed(
        store,
        layout=layout,
        device=loaded.model.device,
        masking=masking,
        decoder_start=getattr(loaded.model.config, "decoder_start_token_id", None),
        has_types=loaded.has_types,
        pad_id=loaded.pad_id,
    )


def _answered(
    loaded: LoadedModel, data: Data, store: RowStore, num: int | None, on_progress: OnProgress
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of smallest content hash, whatever their order in the file, answered; and what to say of that."""
    task = loaded.renderer.task_name
    if num is None:
        usual = MOST_SHORT if has_short_answers(store.targets) else SAMPLES
        num = usual if TASKS[task].writes_answers else 0
    if num == 0:
        return [], []
    new_tokens = new_tokens_for(store.targets, loaded.recipe.evaluation.sample_tokens)
    rows = (example for _, example in examples(data.train, data, ignore, task=task))
    chosen = heapq.nsmallest(num, rows, key=content_hash)
    room = PromptLimit.of(loaded.renderer, model_tokens=loaded.max_tokens, new_tokens=new_tokens)
    prompts = sample_prompts(loaded.renderer, chosen, limit=room, new_tokens=new_tokens)
    how = Sampling(max_new_tokens=new_tokens)
    told = list(answer_samples(loaded.model, loaded.renderer, prompts, how, on_progress))
    were = "was" if len(told) == 1 else "were"
    said = f"{plural(len(told), 'row')} {were} answered, with {new_tokens:,} tokens at most (--samples; 0: none)"
    return told, [said, *sample_notes(prompts, num_rows=len(chosen))]


@dataclass(frozen=True)
class TrainingRows:
    """The rows that a run was trained on."""

    store: RowStore
    rows_I: NDArray[np.int64]

    def count(self, hashes: NDArray[np.uint64]) -> int:
        """The number of these content hashes that are among them."""
        return int(np.isin(hashes, self.store.hashes[self.rows_I]).sum())

    def constant(self, labels: Labels | None) -> Constant | None:
        """The baseline answer; see `constant_answer`."""
        return constant_answer(labels, self.store, self.rows_I)


def load_training_rows(run: Run) -> TrainingRows | None:
    """The rows that a run was trained on; None where they are gone, or were written by another release."""
    store = kept(run.rows_path / "train", run.identity().get("rows"))
    recipe = run.recipe()
    held_store = kept(run.rows_path / "held_out", run.identity().get("held-out rows")) if recipe.data.eval else store
    if store is None or held_store is None:
        return None
    try:
        num_replay = len(expand(recipe.data.replay, lambda problem: None))
    except DataError:  # a folder that is gone: which rows were the run's own cannot be told
        return None
    own = tuple(DataFile(path=path) for path in store.paths[: len(store.paths) - num_replay])
    data = recipe.data.model_copy(update={"train": own})
    train, *_ = split(data, store, held_store, resolved(recipe.task))
    return TrainingRows(store, train)
