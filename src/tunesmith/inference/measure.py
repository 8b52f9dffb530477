"""Metrics of a model on any file of labelled rows, as a run measures its held-out rows."""

from __future__ import annotations

import heapq
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.addresses import pin
from tunesmith.data.collate import Collator, Masking
from tunesmith.data.columns import usual_columns
from tunesmith.data.dataset import RowStore, build, open_kept
from tunesmith.data.examples import content_hash, examples
from tunesmith.data.hold_out import split
from tunesmith.data.labels import find_kind, refuse_unknown
from tunesmith.data.problems import refused
from tunesmith.data.read import expand_folders
from tunesmith.data.row_targets import write_reference, write_targets
from tunesmith.data.splits import counted, refuse_bad, texts_of
from tunesmith.errors import DataError, InputError, ModelError, NonFiniteError
from tunesmith.evaluation.bootstrap import Interval, intervals, ratio
from tunesmith.evaluation.compare import (
    MEASURE_MORE,
    answer_baseline,
    baseline_sentence,
    capitalized,
    left_out,
    never_right,
    row_baseline,
    too_few,
)
from tunesmith.evaluation.generate import (
    MOST_SHORT,
    PromptLimit,
    has_short_answers,
    new_tokens_for,
    sample_notes,
    sample_prompts,
    sample_values,
)
from tunesmith.evaluation.predict_rows import Predictions, constant_answer, predict_rows, row_lines, row_results
from tunesmith.evaluation.retrieval import settled
from tunesmith.evaluation.scores import MEASURED_ROWS, answer_scores, score, score_answers
from tunesmith.inference.load import LoadedModel, load_base
from tunesmith.inference.predict import Predictor
from tunesmith.methods import METHODS
from tunesmith.models.fused_loss import find_output_layer
from tunesmith.phrases import percent, plural
from tunesmith.planning.decisions import with_options
from tunesmith.recipe.schema import Data, DataFile, resolved
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS, bind, partner_tokens
from tunesmith.types import Example, JsonObject, Layout, OnProgress, Part, Problem, Record, TaskName

# I rows


SAMPLES = 50
"""Rows of a file that are answered by default, by tasks that write answers; `MOST_SHORT` of short ones."""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one model on one file."""

    task: str
    num_rows: int
    measures: dict[str, Interval]
    baseline: JsonObject | None
    """Metrics of a constant answer on the same rows: see `row_baseline`."""
    headline: list[str]
    """The verdict in sentences, with a warning of few rows."""
    details: JsonObject
    """Confusion matrix, scores of each class, ...: see `score`."""
    samples: list[JsonObject]
    """Prompts, their references and answers."""
    num_trained: int | None
    """Rows that the run was trained on; None if that is not known."""
    notes: list[str]


@dataclass(frozen=True)
class TrainingRows:
    """The rows that a run was trained on."""

    store: RowStore
    rows_I: NDArray[np.int64]

    def count(self, hashes: NDArray[np.uint64]) -> int:
        """The number of these content hashes that are among them."""
        return int(np.isin(hashes, self.store.hashes[self.rows_I]).sum())


def load_training_rows(run: Run) -> TrainingRows | None:
    """The rows that a run was trained on; None where they are gone, or were written by another release."""
    store = open_kept(run.rows_path / "train", run.identity().get("rows"))
    recipe = run.recipe()
    held_store = (
        open_kept(run.rows_path / "held_out", run.identity().get("held-out rows")) if recipe.data.eval else store
    )
    if store is None or held_store is None:
        return None
    try:
        num_replay = len(expand_folders(recipe.data.replay, lambda problem: None, how=recipe.data.reading))
    except DataError:  # a folder that is gone: the run's own rows cannot be separated from it
        return None
    own_files = tuple(DataFile(path=path) for path in store.paths[: len(store.paths) - num_replay])
    data = recipe.data.model_copy(update={"train": own_files})
    return TrainingRows(store, split(data, store, held_store, resolved(recipe.task))[0])


def evaluate_file(
    loaded: LoadedModel,
    path: str,
    *,
    samples: int | None = None,
    judge: LoadedModel | None = None,
    keep: Callable[[Iterator[JsonObject]], None] = lambda lines: None,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> EvaluationResult:
    """Metrics of all rows of a file, each with its interval, and of answers to `samples` of them.

    `samples` None: `SAMPLES` for tasks that write answers, 0 for others. `keep` gets an iterator of one line a
    row, as in a run's evaluation/after.jsonl. `judge`: says how often answers to the rows' prompts win against
    those from before; then nothing else is measured, and lines are answers.

    Raises:
        InputError: `samples` for a model that writes nothing, or a judge of what is not a run.
        DataError: rows cannot be used, or have labels that the model does not know; see `build`.
        NonFiniteError: the loss is not a number.
    """
    task = loaded.renderer.task_name
    if samples and loaded.head != "next_token":
        raise InputError(f"--samples: a model of task {task} has no head for writing answers. Leave it out.")
    if TASKS[task].samples and not judge:
        raise InputError(
            f"{path}: answers of task {task} are measured by a grader: "
            f"tunesmith grade {path} --grader GRADER --model RUN"
        )
    data, notes = _data_of(loaded, path, offline)
    if judge:
        rates = _judge_answers(loaded, data, judge, SAMPLES if samples is None else samples, on_progress)
        keep(iter(rates.samples))
        return replace(rates, notes=[*notes, *rates.notes])
    trained = None if loaded.run is None else load_training_rows(loaded.run)
    problems: list[Problem] = []
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        store = _encoded(loaded, data, Path(folder), problems, on_progress)
        rows_I = np.arange(len(store))
        loaded = _with_targets(loaded, store, rows_I, on_progress)
        predictions = _predicted(loaded, store, lambda done, total: on_progress("evaluate", done, total))
        results = row_results(loaded.head, loaded.labels, predictions, store.hashes)
        classes, known = () if loaded.labels is None else loaded.labels.names, trained or TrainingRows(store, rows_I)
        constant = constant_answer(loaded.labels, known.store, known.rows_I)
        source = MEASURED_ROWS if trained is None else "the training rows"
        measures, details = score(results, classes=classes, constant=constant, constant_from=source)
        _refuse_non_finite(measures["loss"]["value"], loaded, path)
        texts = map(texts_of(data.train, data, task, store, rows_I).get, rows_I.tolist())
        keep(row_lines(store, rows_I, results, tokenizer=loaded.renderer.tokenizer, texts=texts))
        num_trained = None if trained is None or loaded.is_base else trained.count(store.hashes)
    notes += [*counted([store], problems), *_beside_report(loaded, num_trained, len(store))]
    sampled, _, more = _answer(loaded, *_chosen(loaded, data, store, samples), on_progress)
    measures |= score_answers(*_columns(sampled))
    baseline = row_baseline(results, details.get("constant"), classes)
    if baseline is None and sampled:
        scored = zip(sampled, answer_scores(*_columns(sampled)), strict=True)
        baseline = answer_baseline([{**sample, **scores} for sample, scores in scored])
    headline, notes = _headline(task, measures, baseline, details, store), [*notes, *more]
    return EvaluationResult(task, len(rows_I), measures, baseline, headline, details, sampled, num_trained, notes)


def _with_targets(
    loaded: LoadedModel, store: RowStore, rows_I: NDArray[np.int64], on_progress: OnProgress
) -> LoadedModel:
    """The model with the options that these rows decide; how they are measured is written into their store."""
    sides, task = [(store, rows_I)], TASKS[loaded.renderer.task_name]
    if task.section:
        choices = task.section.from_rows(getattr(loaded.recipe, task.section.name), sides)
        loaded = replace(loaded, recipe=with_options(loaded.recipe, {choice.key: choice.value for choice in choices}))
    partners = partner_tokens(loaded.recipe)
    write_targets(sides, labels=loaded.labels, masked=masked_share(loaded), partner_tokens=partners)
    if task.compares:
        with _as_begun(loaded) as base:
            reference = _predicted(base, store, lambda done, total: on_progress("reference", done, total))
        write_reference(store, rows_I, np.array([result["logps"] for result in reference.results], np.float64))
    return loaded


def _chosen(loaded: LoadedModel, data: Data, store: RowStore, num: int | None) -> tuple[list[Example], int]:
    """Rows to answer, by content hash, whatever their order in the file, and most tokens of an answer."""
    task = loaded.renderer.task_name
    if num is None:
        usual = MOST_SHORT if has_short_answers(store.targets) else SAMPLES
        num = usual if TASKS[task].writes_answers else 0
    # Problems of rows were reported when they were encoded.
    rows = (example for _, example in examples(data.train, data, lambda problem: None, task=task)) if num else ()
    new_tokens = new_tokens_for(store.targets, loaded.recipe.evaluation.sample_tokens)
    return heapq.nsmallest(num, rows, key=content_hash), new_tokens


def _judge_answers(
    loaded: LoadedModel, data: Data, judge: LoadedModel, num: int, on_progress: OnProgress
) -> EvaluationResult:
    """Win rates of answers to a file's prompts against those from before. Raises DataError for rows without."""
    task, problems = loaded.renderer.task_name, list[Problem]()
    if loaded.run is None or loaded.is_base or not TASKS[task].writes_answers:
        raise InputError("--judge: compares the answers of a tuned run with those from before. Name a run that writes.")

    def read(*, answered: bool) -> list[Example]:
        problems.clear()
        pairs = examples(data.train, data, problems.append, task=task, answered=answered)
        return [example for _, example in pairs]

    empty = Part("assistant", "", True)  # rows without any answer are prompts as well
    rows = read(answered=True) or [replace(example, parts=(*example.parts, empty)) for example in read(answered=False)]
    if bad := refused(data, problems):
        raise DataError(f"{plural(len(bad), 'row')} cannot be answered", bad)
    chosen, new_tokens = heapq.nsmallest(num, rows, key=content_hash), loaded.recipe.evaluation.sample_tokens
    after, prompts, notes = _answer(loaded, chosen, new_tokens, on_progress)
    if not prompts:
        raise DataError("--judge: the file has no prompt that leaves room for an answer.")
    with _as_begun(loaded) as base:
        before, *_ = _answer(base, chosen, new_tokens, on_progress)
    rates, note = judged(judge, prompts, _columns(before)[0], _columns(after)[0])
    return EvaluationResult(task, len(prompts), rates, None, [], {}, after, None, [*notes, note])


def _columns(sampled: Sequence[Record]) -> list[list[str]]:
    return [[sample[key] for sample in sampled] for key in ("answer", "reference")]


def _predicted(loaded: LoadedModel, store: RowStore, progress: Callable[[int, int], None]) -> Predictions:
    in_pieces = loaded.recipe.kernels == "fast" and METHODS[loaded.recipe.method.name].fused_loss  # as in the run
    output = find_output_layer(loaded.model) if in_pieces else None
    task = bind(loaded.renderer.task_name, loaded.labels, output=output, recipe=loaded.recipe)
    predictions = predict_rows(
        loaded.model,
        task,
        feed(loaded, store),
        list(range(len(store))),
        tokens_per_pass=loaded.tokens_per_pass,
        progress=progress,
    )
    measured = (store, np.arange(len(store)), predictions)
    options, tokenizer = loaded.recipe, loaded.renderer.tokenizer
    return settled(task, measured, embed=options.embed, prefer=options.prefer, tokenizer=tokenizer)


@contextmanager
def _as_begun(loaded: LoadedModel) -> Iterator[LoadedModel]:
    """The model that the run of another began with, inside the block. Raises RunError if that is not here."""
    if loaded.has_base:
        with loaded.adapter_disabled():
            yield loaded
    elif loaded.run is not None and not loaded.is_base:
        yield replace(load_base(loaded.run, offline=True), recipe=loaded.recipe)
    else:
        yield loaded


def _headline(
    task: TaskName, measures: dict[str, Interval], baseline: Any, details: JsonObject, store: RowStore
) -> list[str]:
    """The verdict in sentences, with a warning of few rows."""
    sentence = [] if baseline is None else [f"{capitalized(baseline_sentence(measures, baseline))}."]
    are_documents = "text" in TASKS[task].shapes
    num, unit = (len(np.unique(store.hashes)), "document") if are_documents else (len(store), "row")
    return [*sentence, *never_right(details), *left_out(details), *too_few(num, unit, MEASURE_MORE)]


def _encoded(
    loaded: LoadedModel, data: Data, folder: Path, problems: list[Problem], on_progress: OnProgress
) -> RowStore:
    """The rows of the file, whose labels the model knows."""
    store = build(
        folder,
        data=data,
        files=data.train,
        renderer=loaded.renderer,
        on_problem=problems.append,
        progress=lambda rows, done, total: on_progress("encode", done, total),
    )
    refuse_bad(data, [store], problems, way="remove these rows from it")
    if why := loaded.without_vector(store.tokens):
        raise ModelError(f"{loaded.located.name}: {why}")
    if loaded.labels is not None:
        find_kind(loaded.renderer.task_name, data, [store.count_labels()])
        refuse_unknown(loaded.labels, store.count_labels())
    return store


def _refuse_non_finite(loss: float, loaded: LoadedModel, path: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"{path}: the loss of its rows is {loss}: the weights of {loaded.result or loaded.located.path} "
            "hold values that are not finite, or lead to them. Nothing was measured."
        )


def _beside_report(loaded: LoadedModel, num_trained: int | None, num_rows: int) -> Iterator[str]:
    """Notes on why these measures differ from a run's report."""
    most = loaded.recipe.evaluation.max_rows
    if loaded.recipe.train.class_weights == "balanced":
        yield "the loss is not weighted as in training: an early version kept no class weights of this run"
    if loaded.run is not None and isinstance(most, int) and num_rows > most:
        yield f"all {num_rows:,} rows are measured; the run's report is of at most {most:,} (evaluation.max_rows)"
    if num_trained:
        were = "was" if num_trained == 1 else "were"
        yield f"{num_trained:,} of {plural(num_rows, 'row')} {were} trained on by this run: the measures flatter it"
    elif num_trained is None and loaded.run is not None and not loaded.is_base:
        yield "whether rows were trained on by this run is not known: it keeps no rows that this release reads"


def _data_of(loaded: LoadedModel, path: str, offline: bool) -> tuple[Data, list[str]]:
    """The run's options of data for this file, with the classes of the model."""
    labels = loaded.labels
    known: dict[str, Any] = {}
    if labels is not None:
        known = {"labels": labels.names} | ({} if labels.kind == "tags" else {"label_kind": labels.kind})
    update = {"train": (DataFile(path=path),), "eval": (), "replay": (), "image_folder": None, **known}
    data, notes = pin(loaded.recipe.data.model_copy(update=update), offline=offline)
    usual = usual_columns(data, loaded.renderer.task_name)
    return (data, notes) if usual is None else (data.model_copy(update={"columns": usual[0]}), [*notes, usual[1]])


def masked_share(loaded: LoadedModel) -> float | None:
    """Share of a row's tokens that are measured under a mask; None: the model learnt none."""
    return loaded.recipe.train.masked if loaded.head == "masked_token" else None


def feed(loaded: LoadedModel, store: RowStore) -> Collator:
    """Padded micro-batches of rows of similar length, which every kind of model takes."""
    layout: Layout = "encoder_decoder" if loaded.renderer.kind == "encoder_decoder" else "padded"
    masking = None
    if (share := masked_share(loaded)) is not None:
        # The seed by which every run masks its held-out rows, so that metrics compare.
        masking = Masking.of(loaded.renderer.tokenizer, share=share, seed=0)
    return Collator(
        store,
        layout=layout,
        device=loaded.model.device,
        masking=masking,
        decoder_start=getattr(loaded.model.config, "decoder_start_token_id", None),
        has_types=loaded.has_types,
        pad_id=loaded.pad_id,
        pools=TASKS[loaded.renderer.task_name].pools,
        batch_images=loaded.renderer.batch_images,
    )


def _answer(
    loaded: LoadedModel, rows: Sequence[Example], new_tokens: int, on_progress: OnProgress
) -> tuple[list[JsonObject], list[Example], list[str]]:
    """Answers to rows, what was answered, and notes."""
    if not rows:
        return [], [], []
    limit = PromptLimit.of(loaded.renderer, model_tokens=loaded.max_tokens, new_tokens=new_tokens)
    prompts = sample_prompts(loaded.renderer, rows, limit=limit, new_tokens=new_tokens)
    num, writer = len(prompts), loaded.writer(new_tokens)
    ids, images = [prompt.ids for prompt in prompts], [prompt.images for prompt in prompts]
    answers = writer.write(ids, lambda done: on_progress("answer", done, num), images=images)
    sampled = list(map(sample_values, prompts, answers))
    were = "was" if len(sampled) == 1 else "were"
    note = f"{plural(len(sampled), 'row')} {were} answered, with {new_tokens:,} tokens at most (--samples; 0: none)"
    prompted = {
        str(example.source): replace(example, parts=example.last_prompt, branches=(), labels=()) for example in rows
    }
    notes = [note, *sample_notes(prompts, num_rows=len(rows))]
    return sampled, [prompted[sample["source"]] for sample in sampled], notes


QUESTION = (
    "Here are a request and two answers to it.\n\n{request}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\n"
    "Which answer is better? Reply with A or B alone."
)
_VERDICT = re.compile(
    r"[\W_]*(?i:(?:the\s+)?(?:better\s+|best\s+)?(?:answer|option|assistant|response|choice)(?:\s+is)?[\W_]*)?"
    r"([ABab])(?:[\W_]*$|\s*[.,:;)*\]\n]|\s+(?:is|was|wins|because)\b)"
)
"""A verdict at the beginning of what a judge writes: B, (B), **B**, "Answer B", "Option B is better than A"."""
_NAMED = re.compile(r"(?<![^\W_])[AB](?![^\W_])")
VERDICT_TOKENS = 8
"""Tokens of a verdict: those in which "The better answer is **B**" names one."""
MOST_UNREAD = 0.1
"""Share of verdicts that name neither answer, above which a note says so."""


def judged(
    judge: LoadedModel, prompts: Sequence[Example], before: Sequence[str], after: Sequence[str]
) -> tuple[dict[str, Interval], str]:
    """`win_rate` of the answers after against those before, and a note. A judge that writes sees both orders;
    if it contradicts itself, or says neither, that is a tie. Raises InputError for a judge that can do
    neither."""
    if judge.labels is not None and judge.labels.kind == "number":
        sides: list[Sequence[float]] = [_rewards(judge, prompts, answers) for answers in (before, after)]
    elif judge.head == "next_token":
        sides = [_choices(judge, prompts, *answers) for answers in ((after, before), (before, after))]
    else:
        raise InputError(f"--judge: {judge.located.name} neither gives rewards nor writes. Use a run of task reward.")
    won = (1 + np.sign(np.subtract(sides[1], sides[0]))) / 2  # a tie is half
    unread = sum(choice == 0 for side in sides for choice in side) if judge.labels is None else 0
    share = unread / (2 * len(won))
    old, new = (np.mean([len(text.split()) for text in texts]) for texts in (before, after))
    note = (
        f"{plural(len(won), 'prompt')} judged by {judge.run.path if judge.run else judge.located.name}; "
        f"{plural(int((won == 0.5).sum()), 'tie')}; answers are {new:.1f} words long on average, and were "
        f"{old:.1f} before: judges tend to prefer long ones"
    )
    if share > MOST_UNREAD:
        unnamed = f"{percent(share, 0)} of its verdicts name neither A nor B and count as ties"
        note += f"; {unnamed}: use a judge that names one"
    return intervals(len(won), {"win_rate": ratio(won)}), note


def _rewards(judge: LoadedModel, prompts: Sequence[Example], answers: Sequence[str]) -> list[float]:
    parts = [Part("assistant", answer or " ", True) for answer in answers]  # templates refuse an empty one
    pairs = zip(prompts, parts, strict=True)
    rows = [replace(example, parts=(*example.parts, part)) for example, part in pairs]
    return list(map(float, _values(judge, rows)))


def _choices(judge: LoadedModel, prompts: Sequence[Example], first: Sequence[str], second: Sequence[str]) -> list[int]:
    """1 where the second answer is chosen, -1 where the first is, else 0."""
    rows = []
    for example, a, b in zip(prompts, first, second, strict=True):
        request = "\n\n".join(f"{part.role}: {part.text}" for part in example.parts)
        parts = (Part("user", QUESTION.format(request=request, a=a, b=b), False),)
        rows.append(replace(example, parts=parts, tools=()))
    return [_choice(str(answer)) for answer in _values(judge, rows)]


def _choice(said: str) -> int:
    """-1 where a verdict names A, 1 where it names B, 0 where it names neither or both."""
    verdict = _VERDICT.match(said)
    named = {verdict[1].upper()} if verdict else set(_NAMED.findall(said))
    return (-1 if named == {"A"} else 1) if len(named) == 1 else 0


def _values(judge: LoadedModel, rows: Sequence[Example]) -> Iterator[Any]:
    """The judge's answer to each row. Raises DataError for a row that it cannot read."""
    for line in Predictor(judge, max_new_tokens=VERDICT_TOKENS)(rows, lambda done: None, lambda warning: None):
        if isinstance(line, Problem):
            raise DataError(f"--judge: {line}", [line])
        yield next(iter(line.values()))
