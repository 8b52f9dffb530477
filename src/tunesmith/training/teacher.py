"""A teacher, and what it finds likely at the tokens of rows: asked before step 1, kept in a file, written into
the rows.

    rows/<side>/<key>-<digest>.teacher    float32 [M, C], see `data.teacher_rows.columns`

The digest is of everything that the numbers follow from, so another run on the same rows finds them next to the
encoded rows in the folder of all runs.
"""

# I rows, M targets of all rows, N targets of one, C numbers of each

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.data.dataset import RowStore
from tunesmith.data.row_targets import write_teacher
from tunesmith.data.splits import Splits
from tunesmith.data.teacher_rows import columns
from tunesmith.errors import DoesNotFitError
from tunesmith.generation.draws import DrawnAnswer
from tunesmith.models.fused_loss import OutputLayer
from tunesmith.parallel.world import World
from tunesmith.phrases import plural, size
from tunesmith.recipe.distillation import Distil
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs.atomic import free_bytes, link_or_copy, storing, writing
from tunesmith.types import LossSum, OnProgress, Row, Source

SPARE_BYTES = 256 * 2**20
"""Room on the disk beyond what is written."""


@dataclass
class Teacher(ABC):
    """A model that reads rows and is not trained. Kinds of teachers differ in where they read."""

    options: Distil
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the model that learns."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens that both models have; further outputs of a model are padding."""
        return len(self.tokenizer)

    @property
    def top(self) -> int:
        """Number of tokens in a list; at least one token of the vocabulary is left for the rest."""
        return min(resolved(self.options.top), self.vocabulary - 1)

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of everything of the model that its answers depend on."""

    @property
    def computed(self) -> Mapping[str, Any]:
        """Settings of this machine that its numbers depend on."""
        return {}

    @abstractmethod
    def lists(self, rows: Sequence[Row]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The number of each row, and [N, C] of its targets, in any order."""

    @abstractmethod
    def taught(
        self, rows: Sequence[Row], answers: Sequence[DrawnAnswer], output: OutputLayer | None
    ) -> tuple[list[NDArray[np.float32]], LossSum]:
        """What it says of drawn answers, [N, C] of each row, and the loss that reads it. `output`: the output
        layer of the model that learns."""

    def keeping(self, folder: Path, of_rank: str) -> AbstractContextManager[None]:
        """A block in which rows are read; a teacher that is paid for keeps what it says in the folder."""
        return nullcontext()

    def refuse_other(self, row: Row, before_NC: NDArray[np.float32], place: Path) -> None:
        """Raise RecipeError where a list of another run at `place` is another model's, which no digest says."""
        return

    def free(self) -> None:
        """Free the memory that the model has on this machine."""
        return


def notes_on_teacher(recipe: Recipe, rows: Splits) -> list[str]:
    """A note where the teacher is the model itself; of one at an address how often it is asked, and what the
    divergence is of."""
    name, on_policy = f"distil.teacher: {recipe.distil.teacher}", recipe.distil.on_policy
    if recipe.distil.teacher is not None and Path(recipe.teacher_at).resolve() == Path(recipe.model).resolve():
        return [f"{name}: it is the model that learns, which has nothing to learn from itself"]
    if not recipe.distil.is_served:
        return []
    num_asked = 1 + len(rows.held_rows) + (0 if on_policy else len(rows.train_rows))
    steps = f", and {plural(resolved(recipe.train.rows_per_step), 'time')} in each step" * on_policy
    words = f"asked {plural(num_asked, 'time')} before the first step{steps}"
    top = resolved(recipe.distil.top)
    return [
        f"{name}: {words}: the time that it takes is not foreseen",
        f"{name}: the divergence from it is of its {top} likeliest tokens, and of all others as one",
    ]


def use_teacher(
    teacher: Teacher | None, rows: Splits, run_rows: Path, world: World, *, on_progress: OnProgress
) -> None:
    """Write what the teacher finds likely into the rows that need it: those that are measured, and those that
    are trained on unless answers are drawn. It then leaves the memory, unless it is needed at each step.

    `run_rows`: the run's folder of rows, where it finds them when it goes on. The first rank of a machine has the
    rows read, and the others find its lists. Raises StorageError, TeacherError, and DoesNotFitError for a disk
    without room.
    """
    if teacher is None:
        return
    leader = leader_of(world)
    if world.rank != leader:
        world.wait_for(f"lists of {leader}", leader)
    sides = [(rows.held_store, rows.held_rows)]
    if not teacher.options.on_policy:
        sides.append((rows.store, rows.train_rows))
    with teacher.keeping(run_rows, f"-{world.rank}" if world.rank else ""):
        for store in dict.fromkeys(store for store, _ in sides):
            rows_I = np.unique(np.concatenate([side_I for other, side_I in sides if other is store]))
            if len(rows_I):
                name = f"{store.key[:16]}-{_digest(teacher, rows_I)}.teacher"
                places = [run_rows / ("train" if store is rows.store else "held_out") / name, store.folder / name]
                write_teacher(store, rows_I, _kept_lists(teacher, store, rows_I, places, on_progress=on_progress))
    if world.rank == leader:
        world.publish(f"lists of {leader}", True)
    if not teacher.options.on_policy:
        teacher.free()


def leader_of(world: World) -> int:
    """The first rank of this rank's machine."""
    return world.rank - world.place.local_rank


def stand_in(teacher: Teacher | None, rows: Splits, longest: int) -> None:
    """Lists that say nothing, for a run that is tried: the teacher reads a row of `longest` tokens, for its
    memory."""
    if teacher is None:
        return
    ids_T = np.zeros(longest, np.int32)
    for _ in teacher.lists([Row(ids_T, np.arange(longest) > 0, Source("", 0))]):
        pass
    alike = np.full(teacher.top + 1, -np.log(teacher.top + 1), np.float32)
    values_C = np.concatenate([np.arange(teacher.top, dtype=np.float32), alike])
    for store in dict.fromkeys((rows.store, rows.held_store)):
        values_MC = np.broadcast_to(values_C, (int(store.targets.sum(dtype=np.int64)), len(values_C)))
        write_teacher(store, np.arange(len(store)), values_MC)
    if not teacher.options.on_policy:
        teacher.free()


def _kept_lists(
    teacher: Teacher, store: RowStore, rows_I: NDArray[np.int64], places: Sequence[Path], *, on_progress: OnProgress
) -> NDArray[np.float32]:
    """[M, C] of the targets of these rows, mapped into memory from a file that is at one of `places`, or is
    written now; then it is at all of them. The first place is the run's own."""
    counts_I = store.targets[rows_I].astype(np.int64)
    shape = int(counts_I.sum()), columns(teacher.top)
    num_bytes = 4 * shape[0] * shape[1]
    known = [path for path in places if path.exists() and path.stat().st_size == num_bytes]
    if known and known[0] != places[0]:
        first_NC = np.memmap(known[0], np.float32, "r", shape=shape)[: counts_I[0]]
        teacher.refuse_other(store.row(int(rows_I[0])), first_NC, known[0])
    if not known:
        known = [places[-1]]
        _refuse_small_disk(known[0].parent, num_bytes)
        ends_I = np.cumsum(counts_I)
        with writing(known[0], num_bytes=num_bytes) as file:
            file.truncate(num_bytes)
            values_MC = np.memmap(file.name, np.float32, "r+", shape=shape)
            lists = teacher.lists([store.row(int(row)) for row in rows_I])
            for done, (i, values_NC) in enumerate(lists, start=1):
                values_MC[ends_I[i] - len(values_NC) : ends_I[i]] = values_NC
                on_progress("teacher", done, len(rows_I))
            values_MC.flush()
    for path in (path for path in places if path not in known):
        with storing(path, num_bytes=num_bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            link_or_copy(known[0], path)
    return np.memmap(known[0], np.float32, "r", shape=shape)


def _refuse_small_disk(folder: Path, num_bytes: int) -> None:
    if (free := free_bytes(folder)) < num_bytes + SPARE_BYTES:
        raise DoesNotFitError(
            f"{folder}: what the teacher finds likely at the tokens of all rows takes {size(num_bytes)}, and "
            f"{size(free)} are free. Lower distil.top, or set distil.on_policy, which keeps it of measured rows only.",
            needed=num_bytes + SPARE_BYTES,
            room=free,
        )


def _digest(teacher: Teacher, rows_I: NDArray[np.int64]) -> str:
    parts = {
        "format": 1,
        "teacher": teacher.digest,
        "rows": hashlib.sha256(rows_I.tobytes()).hexdigest(),
        "options": [teacher.top, teacher.options.temperature],
        **teacher.computed,
    }
    return sha256_of(parts)[:16]


def sha256_of(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()
