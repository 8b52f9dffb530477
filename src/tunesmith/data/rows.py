"""The rows of a run: encoded, split into those trained on and those held out, with everything left out counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.examples import examples, held_out_mask
from tunesmith.data.render import Renderer
from tunesmith.data.store import RowStore, build
from tunesmith.errors import DataError
from tunesmith.recipe.knobs import Data, DataFile
from tunesmith.types import Example, Problem, Shape

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rows:
    """Encoded rows and who they are for."""

    data: Data
    store: RowStore
    """Of the training files."""
    held_store: RowStore
    """Of the held-out files; the same store when a part of the training files is held out."""
    train_rows: NDArray[np.int64]
    """Rows of `store` that are trained on."""
    held_rows: NDArray[np.int64]
    """Rows of `held_store` that are measured, by ascending content hash."""
    notes: list[str]

    @property
    def skipped(self) -> int:
        """Rows read that cannot be used and were left out."""
        return self.store.skipped + (0 if self.held_store is self.store else self.held_store.skipped)

    def keep(self, folder: Path) -> None:
        """Put the encoded rows into the run's own folder, by hard link where the disk allows."""
        self.store.keep(folder / "train")
        if self.held_store is not self.store:
            self.held_store.keep(folder / "held_out")

    def sample_examples(self, num: int) -> list[Example]:
        """The first `num` held-out rows as they were read, for prompts that a person can look at."""
        wanted = {str(self.held_store.source(int(i))): n for n, i in enumerate(self.held_rows[:num])}
        found: dict[int, Example] = {}
        for _, example in examples(self._held_files, self.data, lambda problem: None):
            place = wanted.get(str(example.source))
            if place is not None:
                found[place] = example
                if len(found) == len(wanted):
                    break
        return [found[place] for place in sorted(found)]

    @property
    def _held_files(self) -> Sequence[DataFile]:
        return self.data.eval or self.data.train


def peek_shape(data: Data) -> Shape:
    """The shape of the first row that can be read."""
    problems: list[Problem] = []
    for _, example in examples(data.train, data, problems.append):
        return example.shape
    raise DataError("data.train: no row can be read", problems)


def encode_rows(data: Data, renderer: Renderer, *, cache: Path, max_held: int | None, on_progress: OnProgress) -> Rows:
    """Every row encoded once and split. Bad rows are an error or are counted, as `data.bad_rows` says.

    Raises:
        DataError: rows cannot be used, no row is left, or rows of both sides overlap and `data.overlap` is "error".
    """
    problems: list[Problem] = []
    store = _encode(data, data.train, renderer, cache=cache, problems=problems, on_progress=on_progress)
    held_store = store
    if data.eval:
        held_store = _encode(data, data.eval, renderer, cache=cache, problems=problems, on_progress=on_progress)
    errors = [p for p in problems if p.severity == "error" and not (p.code == "too_long" and data.too_long == "drop")]
    if errors and data.bad_rows == "error":
        raise DataError(_summary(errors), errors)
    if len(store) == 0:
        raise DataError("data.train: no row is left to train on", errors)
    notes = _counted(problems)
    if data.eval:
        train = np.arange(len(store))
        held = np.arange(len(held_store))
        notes += _overlap(data, store, held_store)
    else:
        mask = held_out_mask(store.hashes, data.held_out)
        train, held = np.flatnonzero(~mask), np.flatnonzero(mask)
    if len(held) == 0:
        notes.append("nothing is held out: the run is not measured")
    held = held[np.argsort(held_store.hashes[held], kind="stable")]
    if max_held is not None and len(held) > max_held:
        notes.append(f"{max_held:,} of {len(held):,} held-out rows are measured (evaluation.max_rows)")
        held = held[:max_held]
    return Rows(data, store, held_store, train, held, notes)


def _encode(
    data: Data,
    files: Sequence[DataFile],
    renderer: Renderer,
    *,
    cache: Path,
    problems: list[Problem],
    on_progress: OnProgress,
) -> RowStore:
    return build(
        cache,
        data=data,
        files=files,
        renderer=renderer,
        on_problem=problems.append,
        progress=lambda done, total: on_progress("encode", done, total),
    )


def _summary(errors: Sequence[Problem]) -> str:
    first = "\n".join(map(str, errors[:20]))
    more = f"\n... and {len(errors) - 20:,} more" if len(errors) > 20 else ""
    return f"{len(errors):,} rows cannot be used (data.bad_rows: skip leaves them out):\n{first}{more}"


def _counted(problems: Iterable[Problem]) -> list[str]:
    """One line a kind of finding, with its first place."""
    by_code: dict[str, list[Problem]] = {}
    for problem in problems:
        by_code.setdefault(problem.code, []).append(problem)
    return [f"{code}: {len(found):,} rows, the first at {found[0].source}" for code, found in by_code.items()]


def _overlap(data: Data, store: RowStore, held_store: RowStore) -> list[str]:
    shared = np.flatnonzero(np.isin(held_store.hashes, store.hashes))
    if len(shared) == 0:
        return []
    text = (
        f"{len(shared):,} of {len(held_store):,} held-out rows also stand in the training files, "
        f"the first at {held_store.source(int(shared[0]))}"
    )
    if data.overlap == "error":
        raise DataError(f"{text}. Remove them, or set data.overlap: warn.")
    return [f"{text}: the measures flatter the tuned model"]
