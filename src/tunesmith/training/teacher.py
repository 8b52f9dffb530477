"""The teacher of a run of task distil: loaded, compared with the model that learns, its likely tokens written
down.

    rows/<side>/<key>-<digest>.teacher    float32 [M, C], see `data.teacher_rows.columns`

The digest is of everything that the numbers follow from, so another run on the same rows finds them next to the
encoded rows in the folder of all runs.
"""

# I rows, M targets of all rows, N targets of one, C numbers of each, V vocabulary, D hidden size of the teacher

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.collate import build_batch
from tunesmith.data.dataset import RowStore
from tunesmith.data.kept_replies import KeptReplies
from tunesmith.data.row_targets import write_teacher
from tunesmith.data.sampler import make_micro_batches, pass_cost
from tunesmith.data.splits import Splits
from tunesmith.data.teacher_rows import MOST_IDS, columns
from tunesmith.errors import DoesNotFitError, RecipeError
from tunesmith.inference.load import LoadedModel, load_any
from tunesmith.models.forward import hidden_states, logits_at_targets
from tunesmith.models.fused_loss import OutputLayer, find_output_layer
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import eval_mode
from tunesmith.parallel.world import World
from tunesmith.phrases import size
from tunesmith.recipe.distillation import Distil
from tunesmith.recipe.schema import resolved
from tunesmith.runs.atomic import free_bytes, storing, writing
from tunesmith.training.served_teacher import ServedTeacher
from tunesmith.types import Batch, OnProgress, Row, Source

SPARE_BYTES = 256 * 2**20
"""Room on the disk beyond what is written."""
PIECE = 256
"""Targets whose lists are made together."""
_OTHER_WAYS = (
    "Let it write answers (`tunesmith predict TEACHER ROWS --out FILE`) and train on these by task chat, or let it "
    "grade answers as a `score_model` of task reinforce."
)


@dataclass
class Teacher:
    """A model that reads rows and is not trained."""

    loaded: LoadedModel | None
    """None: it has left the memory."""
    options: Distil
    vocabulary: int
    """Number of tokens that both models have; further ones are padding of one model."""
    output: OutputLayer | None
    identity: dict[str, str]
    """Hashes of everything that its answers depend on."""
    device: str
    """The device that it computes on."""

    @property
    def digest(self) -> str:
        """SHA-256 of its identity."""
        return hashlib.sha256(orjson.dumps(self.identity, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @property
    def top(self) -> int:
        """Number of tokens in a list; at least one token of the vocabulary is left for the rest."""
        return min(resolved(self.options.top), self.vocabulary - 1)

    @property
    def computed(self) -> Mapping[str, Any]:
        """Settings of this machine that its numbers depend on."""
        return {
            "computed": [self.device, torch.get_num_threads()],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def free(self) -> None:
        """Free the memory of the model."""
        self.loaded = self.output = None
        gc.collect()
        free_cached_memory()

    @torch.no_grad()
    def hidden(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """[N, D] of each row, what its output layer reads at the row's targets."""
        of_rows: dict[int, NDArray[np.float32]] = {}
        for members, batch in self._passes(rows):
            hidden_ND = hidden_states(self._model, batch)[batch.predict_N].float().cpu()
            parts = torch.split(hidden_ND, [int(rows[i].trained.sum()) for i in members])
            of_rows |= {i: part_ND.numpy() for i, part_ND in zip(members, parts, strict=True)}
        return [of_rows[i] for i in range(len(rows))]

    @torch.no_grad()
    def lists(self, rows: Sequence[Row]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The number of each row, and [N, C] of its targets; rows of like length come together."""
        for members, batch in self._passes(rows):
            values_NC = torch.cat([self._list(part_NV) for part_NV in self._logits(batch)]).cpu()
            parts = torch.split(values_NC, [int(rows[i].trained.sum()) for i in members])
            yield from ((i, part_NC.numpy()) for i, part_NC in zip(members, parts, strict=True))

    def _logits(self, batch: Batch) -> Iterator[Tensor]:
        """[N, V] of the targets of a batch, some at a time."""
        if self.output is None:
            yield from torch.split(logits_at_targets(self._model, batch), PIECE)
            return
        hidden_ND = hidden_states(self._model, batch)[batch.predict_N]
        yield from map(self.output.logits, torch.split(hidden_ND, PIECE))

    def _list(self, logits_NV: Tensor) -> Tensor:
        logp_NV = (logits_NV[:, : self.vocabulary].float() / self.options.temperature).log_softmax(-1)
        best = logp_NV.topk(self.top)
        rest_N1 = logp_NV.scatter(1, best.indices, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([best.indices.float(), best.values, rest_N1], 1)

    @property
    def _model(self) -> PreTrainedModel:
        assert self.loaded is not None, "it is still needed"
        return self.loaded.model

    def _passes(self, rows: Sequence[Row]) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """Padded batches of the rows, each with the numbers of its rows."""
        assert self.loaded is not None, "it is still needed"
        most, device = self.loaded.tokens_per_pass, self.loaded.model.device
        lengths = [len(row.ids) for row in rows]
        cost = pass_cost(device)
        passes = make_micro_batches(range(len(rows)), lengths, tokens_per_pass=most, layout="padded", cost=cost)
        with eval_mode(self.loaded.model):
            for members in passes:
                inside, pad_id = [rows[i] for i in members], self.loaded.pad_id
                yield members, build_batch(inside, members, layout="padded", device=device, pad_id=pad_id)


AnyTeacher: TypeAlias = Teacher | ServedTeacher
"""A model on this machine, or at an address."""


def load_teacher(
    options: Distil, place: str, tokenizer: PreTrainedTokenizerBase, *, device: str, root: Path, offline: bool
) -> Teacher:
    """The teacher at a place, on a device, for a model with this tokenizer.

    Raises RecipeError for one of another vocabulary, and for one whose probabilities cannot be computed piece
    by piece where that is needed; and what loading it does.
    """
    name = str(options.teacher)
    loaded = load_any(place, root=root, offline=offline)
    if loaded.head != "next_token" or loaded.renderer.kind != "causal":
        raise RecipeError(f"distil.teacher: {name}: it does not write text token by token. Name a model that does.")
    refuse_other_vocabulary(name, tokenizer, loaded.renderer.tokenizer)
    loaded.model.to(device)
    output, vocabulary = find_output_layer(loaded.model), len(tokenizer)
    if options.on_policy and output is None:
        raise RecipeError(
            f"distil.teacher: {name}: its logits need more than its output layer, which distil.on_policy does not "
            "compute. Leave distil.on_policy out."
        )
    num_outputs = int(loaded.model.get_output_embeddings().weight.shape[0])
    if num_outputs < vocabulary or vocabulary >= MOST_IDS:
        raise RecipeError(
            f"distil.teacher: {name}: {num_outputs:,} outputs for {vocabulary:,} tokens. Use another teacher."
        )
    return Teacher(loaded, options, vocabulary, output, loaded.identity(), str(loaded.model.device))


def refuse_other_vocabulary(name: str, learner: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise RecipeError unless every token of the one is the same text, under the same id, of the other: two
    vocabularies can spell a probe alike."""
    ours, theirs = learner.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    text, token = min(ours.items() ^ theirs.items(), key=lambda entry: (entry[1], entry[0]))
    raise RecipeError(
        f"distil.teacher: {name}: its vocabulary differs from the learning model's: {len(theirs):,} and "
        f"{len(ours):,} tokens, and token {token}, {text!r}, is in one only. Their probabilities cannot be compared. "
        f"{_OTHER_WAYS}"
    )


def use_teacher(
    teacher: AnyTeacher | None, rows: Splits, run_rows: Path, world: World, *, on_progress: OnProgress
) -> None:
    """Write what the teacher finds likely into the rows that need it: those that are measured, and those that
    are trained on unless answers are drawn. It then leaves the memory, unless it is needed at each step.

    `run_rows`: the run's folder of rows, where it finds them when it goes on, and what a server has said of
    them until all are there. The first rank of a machine has the rows read, and the others find its lists.
    Raises StorageError, TeacherError, and DoesNotFitError for a disk without room.
    """
    if teacher is None:
        return
    leader, of_rank = leader_of(world), f"-{world.rank}" if world.rank else ""
    if world.rank != leader:
        world.wait_for(f"lists of {leader}", leader)
    elif isinstance(teacher, ServedTeacher):
        teacher.replies = KeptReplies(run_rows / f"asked{of_rank}.jsonl", columns(teacher.top))
    if isinstance(teacher, ServedTeacher) and teacher.options.on_policy:
        teacher.drawn_replies = KeptReplies(run_rows / f"drawn{of_rank}.jsonl", 1)
    sides = [(rows.held_store, rows.held_rows)]
    if not teacher.options.on_policy:
        sides.append((rows.store, rows.train_rows))
    for store in dict.fromkeys(store for store, _ in sides):
        rows_I = np.unique(np.concatenate([side_I for other, side_I in sides if other is store]))
        if len(rows_I):
            name = f"{store.key[:16]}-{_digest(teacher, rows_I)}.teacher"
            places = [run_rows / ("train" if store is rows.store else "held_out") / name, store.folder / name]
            write_teacher(store, rows_I, kept_lists(teacher, store, rows_I, places, on_progress=on_progress))
    if isinstance(teacher, ServedTeacher) and teacher.replies is not None:
        teacher.replies.remove()
        teacher.replies = None
    if world.rank == leader:
        world.publish(f"lists of {leader}", True)
    if not teacher.options.on_policy:
        teacher.free()


def leader_of(world: World) -> int:
    """The first rank of this rank's machine."""
    return world.rank - world.place.local_rank


def stand_in(teacher: AnyTeacher | None, rows: Splits, longest: int) -> None:
    """Lists that say nothing, for a run that is tried: a teacher on this machine reads a row of `longest`
    tokens, for its memory."""
    if teacher is None:
        return
    if isinstance(teacher, Teacher):
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


def kept_lists(
    teacher: AnyTeacher, store: RowStore, rows_I: NDArray[np.int64], places: Sequence[Path], *, on_progress: OnProgress
) -> NDArray[np.float32]:
    """[M, C] of the targets of these rows, mapped into memory from a file that is at one of `places`, or is
    written now; then it is at all of them. The first place is the run's own; what another run has left of a
    teacher at an address is compared with what that says now."""
    counts_I, width = store.targets[rows_I].astype(np.int64), columns(teacher.top)
    shape, num_bytes = (int(counts_I.sum()), width), 4 * int(counts_I.sum()) * width
    known = [path for path in places if path.exists() and path.stat().st_size == num_bytes]
    if isinstance(teacher, ServedTeacher) and known and known[0] != places[0]:
        first_NC = np.memmap(known[0], np.float32, "r", shape=shape)[: counts_I[0]]
        teacher.refuse_other(store.row(int(rows_I[0])), first_NC, known[0])
    if not known:
        known = [places[-1]]
        _refuse_small_disk(known[0].parent, num_bytes)
        ends_I, done = np.cumsum(counts_I), 0
        with writing(known[0], num_bytes=num_bytes) as file:
            file.truncate(num_bytes)
            values_MC = np.memmap(file.name, np.float32, "r+", shape=shape)
            for i, values_NC in teacher.lists([store.row(int(row)) for row in rows_I]):
                values_MC[ends_I[i] - len(values_NC) : ends_I[i]] = values_NC
                done += 1
                on_progress("teacher", done, len(rows_I))
            values_MC.flush()
    for path in places:
        if path not in known:
            _link(known[0], path)
    return np.memmap(known[0], np.float32, "r", shape=shape)


def _link(source: Path, path: Path) -> None:
    """Put a file at another place too, by hard link where the disk allows."""
    with storing(path, num_bytes=source.stat().st_size):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(source, path)
        except OSError:
            with open(source, "rb") as content, writing(path) as copy:
                shutil.copyfileobj(content, copy, 1 << 20)


def _refuse_small_disk(folder: Path, num_bytes: int) -> None:
    if (free := free_bytes(folder)) < num_bytes + SPARE_BYTES:
        raise DoesNotFitError(
            f"{folder}: what the teacher finds likely at the tokens of all rows takes {size(num_bytes)}, and "
            f"{size(free)} are free. Lower distil.top, or set distil.on_policy, which keeps it of measured rows only.",
            needed=num_bytes + SPARE_BYTES,
            room=free,
        )


def _digest(teacher: AnyTeacher, rows_I: NDArray[np.int64]) -> str:
    parts = {
        "format": 1,
        "teacher": teacher.digest,
        "rows": hashlib.sha256(rows_I.tobytes()).hexdigest(),
        "options": [teacher.top, teacher.options.temperature],
        **teacher.computed,
    }
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
