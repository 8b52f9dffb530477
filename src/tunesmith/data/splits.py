"""The rows of a run: encoded, split into trained and held-out ones, with all that is left out counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tunesmith.data.addresses import is_elsewhere
from tunesmith.data.dataset import RowStore, build
from tunesmith.data.examples import content_hash, examples
from tunesmith.data.formats import SEARCHED, SHAPES
from tunesmith.data.hold_out import choose_held_out, few_note, measured_rows, never_trained, overlap_notes, split
from tunesmith.data.labels import ClassWeights, resolve_labels, similar_names_notes
from tunesmith.data.problems import SKIP, SKIPPING, num_refused, refused, unusable
from tunesmith.data.read import expand_folders
from tunesmith.data.renderer import Renderer
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.runs.atomic import write_atomic
from tunesmith.types import Choice, Example, JsonObject, Labels, OnProgress, Problem, TaskName


@dataclass(frozen=True)
class Splits:
    """Encoded rows, split into those that are trained on and those that are held out."""

    data: Data
    """Names the files that were read: a folder is replaced by the documents in it."""
    store: RowStore
    """Rows of data.train, then of data.replay; `store.file_index` counts the files in this order."""
    held_store: RowStore
    """Rows of data.eval; the same store when a part of the training files is held out."""
    train_rows: NDArray[np.int64]
    """Rows of `store` that are trained on."""
    held_rows: NDArray[np.int64]
    """Rows of `held_store` that are measured, by ascending content hash."""
    problems: Sequence[Problem]
    """The first `data.limits.problems` findings of each side."""
    notes: list[str]
    task: TaskName
    labels: Labels | None = None
    """Classes of a new head; None for tasks without one."""
    choices: list[Choice] = field(default_factory=list)
    """Automatic decisions about held-out rows and labels."""
    _texts: dict[bool, dict[int, str]] = field(default_factory=dict, repr=False)
    """A cache of texts that were read, of held-out files (True) and of training files."""

    @property
    def sides(self) -> list[tuple[RowStore, NDArray[np.int64]]]:
        """(store, rows) of the training rows, then of the held-out ones."""
        return [(self.store, self.train_rows), (self.held_store, self.held_rows)]

    @property
    def has_images(self) -> bool:
        """Whether some row has an image."""
        return self.store.images is not None or self.held_store.images is not None

    @property
    def is_prompts(self) -> bool:
        """Whether rows are prompts alone, whose answers are drawn."""
        return SHAPES[self.task] == ("prompts",)

    @property
    def skipped(self) -> int:
        """Rows read that cannot be used and were left out."""
        return self.store.skipped + (0 if self.held_store is self.store else self.held_store.skipped)

    @property
    def found_again(self) -> str:
        """Rows that an earlier run or plan has encoded, by the hash of all that determines them; "": none."""
        stores = {"training": self.store}
        if self.held_store is not self.store:
            stores["held-out"] = self.held_store
        if not (reused := {what: store for what, store in stores.items() if store.reused}):
            return ""
        counts = " and ".join(f"{len(store):,} {what}" for what, store in reused.items())
        keys = " and ".join(store.key[:16] for store in reused.values())
        return f"{counts} rows of these files were encoded before by this tokenizer, and are used again (.rows/{keys})"

    @property
    def trained_per_file(self) -> list[int]:
        """Training rows of each file of data.train and data.replay."""
        num_files = len(self.data.train) + len(self.data.replay)
        counts: list[int] = np.bincount(self.store.file_index[self.train_rows], minlength=num_files).tolist()
        return counts

    def held_sources(self) -> list[str]:
        """The source of each held-out row that is measured."""
        files = self.data.eval or (*self.data.train, *self.data.replay)
        return [files[index].source for index in self.held_store.file_index[self.held_rows].tolist()]

    def keep(self, folder: Path) -> None:
        """Put encoded rows and what was found in them into the run's folder, by hard link where possible."""
        self.store.keep(folder / "train")
        if self.held_store is not self.store:
            self.held_store.keep(folder / "held_out")
        if self.problems:
            listed = [orjson.dumps({**asdict(problem), "source": str(problem.source)}) for problem in self.problems]
            write_atomic(folder / "problems.jsonl", b"\n".join(listed) + b"\n")

    def discard(self) -> None:
        """Remove what was encoded for this call; rows found there before stay."""
        for store in (self.store, self.held_store):
            store.discard()

    def texts(self, store: RowStore, rows_I: NDArray[np.int64]) -> dict[int, str]:
        """The texts of some rows of one of the two stores, as their file has them, by row; see `texts_of`."""
        is_held = store is self.held_store and store is not self.store
        files = self.data.eval if is_held else (*self.data.train, *self.data.replay)
        known = self._texts.setdefault(is_held, {})
        missing_I = np.array([row for row in map(int, rows_I) if row not in known], np.int64)
        known |= texts_of(files, self.data, self.task, store, missing_I)
        return known

    def prompts(self, store: RowStore, rows_I: NDArray[np.int64]) -> dict[int, Example]:
        """The prompts of some rows of one of the two stores with the rows as their
        file has them, which a grader reads.

        Raises DataError for a file that says something else than when it was encoded.
        """
        is_held = store is self.held_store and store is not self.store
        files = self.data.eval if is_held else self.data.train
        wanted = {row: str(store.source(row)) for row in map(int, rows_I)}
        by_source = examples_at(files, self.data, self.task, set(wanted.values()))
        for row, source in wanted.items():
            if source not in by_source or content_hash(by_source[source]) != int(store.hashes[row]):
                raise DataError(f"{source}: the row is another one than a moment ago: the file was changed meanwhile.")
        return {row: by_source[source] for row, source in wanted.items()}

    def sample_examples(self, num: int) -> list[Example]:
        """The first `num` held-out rows as they were read, for prompts that a person can look at."""
        files, rows_I = self.data.eval or self.data.train, self.held_rows
        if any(map(is_elsewhere, files)):  # not here: of the first file alone, if it has enough
            rows_I = rows_I[np.argsort(self.held_store.file_index[rows_I], kind="stable")]
        # Several rows can be windows of one document.
        wanted = list(islice(dict.fromkeys(str(self.held_store.source(int(i))) for i in rows_I), num))
        by_source = examples_at(files, self.data, self.task, wanted)
        return [by_source[source] for source in wanted if source in by_source]


def first_example(data: Data) -> Example:
    """The first row that can be used."""
    problems: list[Problem] = []
    for _, example in examples(data.train, data, problems.append):
        return example
    raise DataError("data.train: no row can be read", problems)


@dataclass(frozen=True, slots=True)
class CacheDirs:
    """Folders of encoded rows: they are reused if they are there, else written there."""

    train: Path
    held_out: Path


def encode_rows(
    data: Data,
    renderer: Renderer,
    *,
    cache_dirs: CacheDirs,
    max_held: int | None,
    task: TaskName,
    class_weights: ClassWeights = "equal",
    own_classes: Sequence[str] = (),
    on_progress: OnProgress,
) -> Splits:
    """Every row encoded once and split. Bad rows are an error or are counted, as `data.bad_rows` says.

    Raises:
        DataError: rows cannot be used, no row is left, rows of both sides overlap and `data.overlap` is
            "error", or labels cannot be learnt, see `resolve_labels`.
        RecipeError: data.labels or train.class_weights do not fit the labels, or data.columns the shapes.
    """
    # 1. The files of each side: folders become their documents.
    problems: list[Problem] = []
    sides = {side: getattr(data, side) for side in ("train", "replay", "eval")}
    expand = partial(expand_folders, on_problem=problems.append, how=data.reading)
    expanded = {side: expand(files, trained=side != "eval") for side, files in sides.items()}
    data, notes = data.model_copy(update=expanded), [str(problem) for problem in problems]

    def progress(rows: int, done: int, total: int) -> None:
        on_progress("encode", done, total)

    # 2. Every row as tokens, or as an earlier run encoded it.
    encode = partial(build, data=data, renderer=renderer, on_problem=problems.append, progress=progress)
    store = encode(cache_dirs.train, files=(*data.train, *data.replay))
    held_store = encode(cache_dirs.held_out, files=data.eval) if data.eval else store
    stores = [store, held_store] if data.eval else [store]
    try:
        # 3. Which rows are trained, which are held out, and what their labels are.
        refuse_bad(data, stores, problems)
        data, chosen = choose_held_out(data, store)
        train, held, split_notes = split(data, store, held_store, task)
        overlap = overlap_notes(data, store, held_store, train) if data.eval else []
        both = (store, held_store)
        labels, of_labels = _labels(data, task, both, train, class_weights=class_weights, own_classes=own_classes)
    except DataError:
        for refused in stores:
            refused.discard()
        raise
    # 4. What a person has to know of it.
    notes += [*counted(stores, problems), *overlap, *split_notes]
    if data.held_out == 0 and not data.eval:
        notes.append("nothing is held out, so nothing is measured: give --eval, more rows, or a data.held_out above 0")
    if labels is not None:
        notes += [*similar_names_notes(labels.names), *never_trained(labels, (store, held_store), train, held)]
    by_class = labels is not None and labels.kind == "one"
    held = measured_rows(held, held_store, max_held, notes, by_class=by_class)
    notes += [few] if (few := few_note(len(held))) else []
    return Splits(data, store, held_store, train, held, problems, notes, task, labels, [*chosen, *of_labels])


def _labels(
    data: Data, task: TaskName, stores: tuple[RowStore, RowStore], train_rows: NDArray[np.int64], **how: Any
) -> tuple[Labels | None, list[Choice]]:
    """The classes of a new head, if the task has one."""
    if not {"text_label", "tokens_tags", "scored_answers", "ranked_documents"} & set(SHAPES[task]):
        return None, []
    sides = [each.count_labels() for each in dict.fromkeys(stores)]
    return resolve_labels(task=task, data=data, trained=stores[0].count_labels(train_rows), sides=sides, **how)


def refuse_bad(
    data: Data, stores: Sequence[RowStore], problems: Sequence[Problem], way: str = f"leave such rows out: {SKIP}"
) -> None:
    """Raise DataError for rows that cannot be used, unless the recipe says to skip them."""
    errors = refused(data, problems)
    if num_bad := sum(num_refused(data, store.summary.errors) for store in stores):
        left = f", or {way}" if all(map(len, stores)) else ": no row is left without them"
        ways = [SKIPPING] if SKIP in left else []
        raise DataError(f"{unusable(num_bad)}. Correct the data{left}.", errors, ways=ways)
    for store in stores:
        if len(store) == 0:
            raise DataError(f"{', '.join(store.paths)}: no row is left to use", errors)


def counted(stores: Sequence[RowStore], problems: Sequence[Problem]) -> list[str]:
    """Notes on rows that were left out or changed: the first problem of each code, and the number of such
    rows."""
    totals: Counter[str] = Counter()
    for store in stores:
        totals.update(store.summary.errors)
        totals.update(store.summary.warnings)
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.code, problem)
    notes = []
    for code, num in sorted(totals.items()):
        notes.append(f"{first.get(code, code)}" + (f" ({num:,} such notes in all)" if num > 1 else ""))
    return notes


def given_text(example: Example) -> str | None:
    """The text of an example as a person reads it; None for a document, since its rows are windows."""
    if example.shape == "text":
        return None
    if example.shape == "tokens_tags":
        return " ".join(part.text for part in example.parts)
    prompt, *answers = (
        "\n".join(f"{part.role}: {part.text}" for part in parts) for parts in (example.parts, *example.branches)
    )
    if example.shape in SEARCHED:
        return "\n".join([prompt, *answers])
    if answers:
        names = ["chosen", *("rejected" for _ in answers[1:])] if len(answers) > 1 else ["answer"]
        return "\n\n".join([prompt, *(f"[{name}]\n{text}" for name, text in zip(names, answers, strict=True))])
    if example.plain or example.shape == "text_label":
        return "\n".join(part.text for part in example.parts)
    return prompt


def examples_at(files: Sequence[DataFile], data: Data, task: TaskName, sources: Collection[str]) -> dict[str, Example]:
    """Examples of some rows by their places, "file:line", as far as files have them. Raises as `examples`."""
    by_source: dict[str, Example] = {}
    for _, example in examples(files, data, lambda problem: None, task=task) if sources else ():
        if (source := str(example.source)) in sources:
            by_source[source] = example
            if len(by_source) == len(sources):
                break
    return by_source


def texts_of(
    files: Sequence[DataFile], data: Data, task: TaskName, store: RowStore, rows_I: NDArray[np.int64]
) -> dict[int, str]:
    """The texts of some rows, by the number of the row. Rows whose file is gone or has changed are left out."""
    wanted = {str(store.source(row)): row for row in map(int, rows_I)}
    if task == "text" or any(map(is_elsewhere, files)):
        return {}
    try:
        by_source = examples_at(files, data, task, wanted)
    except DataError:  # a file that is gone must not end a run: the caller decodes tokens, and says so
        return {}
    texts = {}
    for source, example in by_source.items():
        text, row = given_text(example), wanted[source]
        if text is not None and content_hash(example) == int(store.hashes[row]):
            texts[row] = text
    return texts


def times_per_epoch(data: Data, rows_F: Sequence[int]) -> NDArray[np.float64]:
    """[F], how often each row of each file of `data.train` and `data.replay` is seen in an epoch.

    `rows_F`: rows of each file that are trained. With `data.mix: times` these are the weights. With shares each
    source has its weight's share of the rows of `data.train`, and the epoch ends where the first source is used
    up: no row is seen twice in it.

    Raises DataError if a source that is to have a share has no row.
    """
    times_F = np.array([file.weight for file in (*data.train, *data.replay)])
    if data.mix == "times":
        return times_F
    rows_S, own_F = np.bincount(source_ids(data), rows_F), source_ids(data)[: len(data.train)]
    if len(empty_F := np.flatnonzero(rows_S[own_F] == 0)):
        empty = data.train[empty_F[0]].source
        raise DataError(f"data.train: {empty}: no row of it is trained, so it cannot have a share. Leave it out.")
    rates_F = times_F[: len(own_F)] / rows_S[own_F]
    times_F[: len(own_F)] = rates_F / rates_F.max()
    return times_F


def source_ids(data: Data) -> NDArray[np.int64]:
    """[F], the number of the source of each file of `data.train` and `data.replay`: a folder is one source."""
    names = [*(f"train {file.source}" for file in data.train), *(f"replay {file.source}" for file in data.replay)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def mix(data: Data, rows_F: Sequence[int]) -> list[JsonObject]:
    """Each source as {"path", "rows", "times", "share"}: its rows that are trained, how often each is seen per
    epoch, and its share of the rows of an epoch. Empty for a single source that is seen once."""
    files, times_F, by_source = (*data.train, *data.replay), times_per_epoch(data, rows_F), dict[int, JsonObject]()
    for file, source, num, times in zip(files, source_ids(data).tolist(), rows_F, times_F.tolist(), strict=True):
        entry = by_source.setdefault(source, {"path": file.source, "rows": 0, "times": times})
        entry["rows"] += int(num)
    total = sum(entry["rows"] * entry["times"] for entry in by_source.values())
    mixed = [
        {**entry, "share": entry["rows"] * entry["times"] / total if total else 0.0} for entry in by_source.values()
    ]
    return mixed if len(mixed) > 1 or any(entry["times"] != 1 for entry in mixed) else []
