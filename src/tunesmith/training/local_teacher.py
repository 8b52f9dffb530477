"""A teacher on this machine: loaded, compared with the model that learns, and read from."""

# N targets of a row or a batch, C numbers of each, V vocabulary, D hidden size of the teacher

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.collate import build_batch
from tunesmith.data.sampler import make_micro_batches, pass_cost
from tunesmith.data.teacher_rows import MOST_IDS
from tunesmith.errors import RecipeError
from tunesmith.generation.draws import DrawnAnswer
from tunesmith.inference.load import LoadedModel, load_any
from tunesmith.models.forward import hidden_at_targets, logits_at_targets
from tunesmith.models.fused_loss import OutputLayer, find_output_layer
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import eval_mode
from tunesmith.parallel.world import World
from tunesmith.recipe.schema import resolved
from tunesmith.tasks.distil_losses import reverse_loss_sum
from tunesmith.training.resolve import ResolvedRun
from tunesmith.training.teacher import Teacher, leader_of, sha256_of
from tunesmith.types import Batch, LossSum, Row, required

PIECE = 256
"""Targets whose lists are made together."""
_OTHER_WAYS = (
    "Let it write answers (`tunesmith predict TEACHER ROWS --out FILE`) and train on these by task chat, or let it "
    "grade answers as a `score_model` of task reinforce."
)


@dataclass
class LocalTeacher(Teacher):
    """A model in the memory of this machine."""

    hashes: Mapping[str, str]
    """Hashes of everything that its answers depend on."""
    device: str
    """The device that it computes on."""
    loaded: LoadedModel | None = None
    """None: it has left the memory, or the first rank of this machine has it alone."""
    output: OutputLayer | None = None

    @property
    def digest(self) -> str:
        return sha256_of(self.hashes)

    @property
    def computed(self) -> Mapping[str, Any]:
        return {
            "computed": [self.device, torch.get_num_threads()],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def lists(self, rows: Sequence[Row]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `Teacher.lists`; rows of like length come together."""
        return self._read(rows, self._lists_of)

    def taught(
        self, rows: Sequence[Row], answers: Sequence[DrawnAnswer], output: OutputLayer | None
    ) -> tuple[list[NDArray[np.float32]], LossSum]:
        """[N, D] of each row, what its output layer reads at the row's targets, and the reverse divergence."""
        hidden = dict(self._read(rows, hidden_at_targets))
        loss_sum = partial(
            reverse_loss_sum,
            options=self.options,
            vocabulary=self.vocabulary,
            teacher=required(self.output),
            output=output,
        )
        return [hidden[i] for i in range(len(rows))], loss_sum

    def free(self) -> None:
        self.loaded = self.output = None
        gc.collect()
        free_cached_memory()

    @torch.no_grad()
    def _read(
        self, rows: Sequence[Row], numbers_of: Callable[[PreTrainedModel, Batch], Tensor]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The number of each row, and of its targets what `numbers_of` finds in the padded batch that has it."""
        loaded = required(self.loaded)
        device, lengths = loaded.model.device, [len(row.ids) for row in rows]
        passes = make_micro_batches(
            range(len(rows)), lengths, tokens_per_pass=loaded.tokens_per_pass, layout="padded", cost=pass_cost(device)
        )
        with eval_mode(loaded.model):
            for members in passes:
                inside = [rows[i] for i in members]
                batch = build_batch(inside, members, layout="padded", device=device, pad_id=loaded.pad_id)
                numbers_NC = numbers_of(loaded.model, batch).float().cpu()
                parts = torch.split(numbers_NC, [int(row.trained.sum()) for row in inside])
                yield from ((i, part_NC.numpy()) for i, part_NC in zip(members, parts, strict=True))

    def _lists_of(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """[N, C], from the logits of some targets at a time."""
        if self.output is None:
            parts = iter(torch.split(logits_at_targets(model, batch), PIECE))
        else:
            parts = map(self.output.logits, torch.split(hidden_at_targets(model, batch), PIECE))
        return torch.cat([self._list_of(logits_NV) for logits_NV in parts])

    def _list_of(self, logits_NV: Tensor) -> Tensor:
        logp_NV = (logits_NV[:, : self.vocabulary].float() / self.options.temperature).log_softmax(-1)
        best = logp_NV.topk(self.top)
        rest_N1 = logp_NV.scatter(1, best.indices, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([best.indices.float(), best.values, rest_N1], 1)


def teacher_here(plan: ResolvedRun, world: World) -> LocalTeacher:
    """The teacher of a run on this machine. Off policy the first rank of a machine alone loads it, and the
    others know whose lists they read.

    Raises RecipeError for one of another vocabulary, and for one whose probabilities cannot be computed piece by
    piece where that is needed; and what loading it does.
    """
    options, tokenizer, leader = plan.recipe.distil, plan.inputs.renderer.tokenizer, leader_of(world)
    if not options.on_policy and world.rank != leader:
        hashes, device = world.wait_for(f"teacher of {leader}", leader)
        return LocalTeacher(options, tokenizer, hashes, device)
    loaded = _load(plan, tokenizer)
    loaded.model.to(world.card or resolved(plan.recipe.device))
    output = find_output_layer(loaded.model)
    if options.on_policy and output is None:
        raise RecipeError(
            f"distil.teacher: {options.teacher}: its logits need more than its output layer, which distil.on_policy "
            "does not compute. Leave distil.on_policy out."
        )
    teacher = LocalTeacher(options, tokenizer, loaded.identity(), str(loaded.model.device), loaded, output)
    if world.rank == leader:
        world.publish(f"teacher of {leader}", [teacher.hashes, teacher.device])
    return teacher


def _load(plan: ResolvedRun, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """The model. Raises RecipeError for one that cannot teach a model with this tokenizer."""
    name = str(plan.recipe.distil.teacher)
    loaded = load_any(plan.recipe.teacher_at, root=plan.root, offline=plan.offline)
    if loaded.head != "next_token" or loaded.renderer.kind != "causal":
        raise RecipeError(f"distil.teacher: {name}: it does not write text token by token. Name a model that does.")
    refuse_other_vocabulary(name, tokenizer, loaded.renderer.tokenizer)
    num_outputs, num_tokens = int(loaded.model.get_output_embeddings().weight.shape[0]), len(tokenizer)
    if num_outputs < num_tokens or num_tokens >= MOST_IDS:
        raise RecipeError(
            f"distil.teacher: {name}: {num_outputs:,} outputs for {num_tokens:,} tokens. Use another teacher."
        )
    return loaded


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
