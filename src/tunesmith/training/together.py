"""One run in several processes: the same inputs on each, the first rank's weights at the start, the same at
every checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import GroupError, RunError
from tunesmith.models import machine
from tunesmith.parallel.launch import own_run
from tunesmith.parallel.own_card import card_of, take_card
from tunesmith.parallel.world import Place, World, group, place_of
from tunesmith.phrases import changes
from tunesmith.planning import devices
from tunesmith.recipe.schema import Recipe
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run
from tunesmith.training.progress import Progress, Session
from tunesmith.training.setup import Setup
from tunesmith.types import JsonObject, OnProgress

DIGEST = "recipe"
"""Key of run.json: the digest of the recipe as it was given."""
_MIXER = 0x9E3779B97F4A7C15


@contextmanager
def joined(device: str, on_progress: OnProgress = lambda what, done, total: None) -> Iterator[World]:
    """The world of this process, with its own card taken; alone unless an agent started several. While it waits
    for the others, `on_progress` is called every ten seconds.

    Raises InputError for fewer cards than processes, and what joining a group raises.
    """
    place = place_of(os.environ)
    named = take_card(place, device, os.environ)
    say = partial(on_progress, "join")
    with group(place, partial(_facts, place, named or device), say=say) as world:
        world.card = named
        yield world


def _facts(place: Place, device: str) -> JsonObject:
    name = machine.choose_device(device).value
    kind = torch.device(name).type
    room = devices.share_of_room(kind, devices.room(name), place.local_size)
    return {"room": room, "same": {"device": kind}, **card_of(place, name)}


def refuse_other_inputs(setup: Setup) -> None:
    """Connect the group, and raise RunError on a rank whose data, model or tokenizer differ from the first."""
    world = setup.world
    if world.size == 1:
        return
    world.connect()
    identity = {**setup.identity, "layout": setup.sampler.layout, "shared prefixes": str(setup.collator.shares)}
    first = world.gather_values(identity)[0]
    if changed := changes(first, identity, "{0} is {2}, on rank 0 {1}"):
        raise RunError(
            f"this rank does not train what rank 0 trains: {'; '.join(changed)}. Give all machines the same files."
        )


@dataclass(frozen=True, slots=True)
class GroupStart:
    """Start of a run, as the first rank sends it to ranks that have no folder,
    progress or checkpoint of their own."""

    run: Run
    progress: Progress
    is_fresh: bool
    saves: bool
    """Whether the checkpoint is saved again before the next step."""


def share_start(session: Session, newest: checkpoint.Checkpoint | None, *, saves: bool = False) -> None:
    """Give the other ranks the run, its progress, its weights and the state of its optimizer: of a fresh run
    without a checkpoint, or of a run that continues from its newest, which is then saved again if `saves`."""
    setup = session.setup
    if setup.world.size == 1:
        return
    own_run(session.run, 0)
    facts = {"run": str(session.run.path.absolute()), "progress": asdict(session.progress), "is_fresh": newest is None}
    facts["drawn"] = {} if newest is None else newest.state.get("drawn", {})
    setup.world.gather_values({**facts, "saves": saves and newest is not None})
    _broadcast_weights(setup)
    pieces = {} if newest is None else {name: newest.weights[name] for name in setup.attachment.shards}
    broadcast(setup, pieces)
    broadcast(setup, {} if newest is None else newest.optimizer)


def receive_start(setup: Setup) -> GroupStart:
    """Take what `share_start` gives on the first rank."""
    facts = setup.world.gather_values(None)[0]
    if setup.drawing is not None:
        setup.drawing.take(facts["drawn"])
    _broadcast_weights(setup)
    with torch.no_grad():
        for name, piece in (broadcast(setup, None) or {}).items():
            setup.attachment.trained[name].copy_(piece)
        setup.attachment.publish()
    optimizer = broadcast(setup, None)
    if optimizer:
        setup.optimizer.load(optimizer)
    return GroupStart(Run(Path(facts["run"])), Progress(**facts["progress"]), facts["is_fresh"], facts["saves"])


@torch.no_grad()
def _broadcast_weights(setup: Setup) -> None:
    """The first rank's trained tensors, one at a time."""
    import torch.distributed as dist

    attachment, world = setup.attachment, setup.world
    with world.reaching():
        for tensor in attachment.shared.values():
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=0)
            if not world.is_first:
                tensor.copy_(sent)
    attachment.publish()


def broadcast(setup: Setup, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The tensors that the first rank gives, on every rank; None where it gives none. Others pass None. Of what
    is split over the ranks each keeps its piece."""
    world = setup.world
    if world.size == 1:
        return None if tensors is None else dict(tensors)
    import torch.distributed as dist

    sent = tensors if world.is_first else None
    listed = None if sent is None else [[name, str(t.dtype)[6:], list(t.shape)] for name, t in sent.items()]
    listed = world.gather_values(listed)[0]
    if listed is None:
        return None
    received: dict[str, Tensor] = {}
    with world.reaching():
        for name, dtype, shape in listed:
            empty = torch.empty(shape, dtype=getattr(torch, dtype))
            received[name] = empty if sent is None else sent[name].detach().cpu().contiguous()
            as_bytes = received[name].reshape(-1).view(torch.uint8)
            if as_bytes.numel():
                dist.broadcast(as_bytes, src=0)
            received[name] = own_piece(setup, name, received[name])
    return received


def own_piece(setup: Setup, name: str, tensor: Tensor) -> Tensor:
    """The piece of a tensor of a checkpoint that this rank keeps."""
    if not setup.attachment.shards:
        return tensor
    from tunesmith.parallel.fsdp import piece_of

    return piece_of(name, tensor, setup.attachment.shards, setup.world.part)


def whole_state(setup: Setup) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained tensors and state of the optimizer for a checkpoint; `checkpoint.save` gathers split ones."""
    parts = dict(setup.attachment.trained), setup.optimizer.state()
    if not setup.attachment.shards:
        return parts
    from tunesmith.parallel.fsdp import as_whole

    weights, optimizer = (as_whole(part, setup.attachment.shards, setup.world.mesh) for part in parts)
    return weights, optimizer


def refuse_drift(session: Session) -> None:
    """Raise GroupError if the trained tensors of a rank differ from the first's. Where the cards are unlike,
    all ranks take the first's."""
    setup = session.setup
    if setup.world.size == 1:
        return
    if len(setup.world.cards) > 1:  # unlike cards may round unlike: all go on from the first rank's weights
        _broadcast_weights(setup)
        return
    digests = setup.world.gather_values(digest(setup))
    wrong = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if wrong:
        raise GroupError(
            f"step {session.progress.step}: the weights of rank {wrong[0]} are not those of rank 0: a device "
            "computes wrongly, or the method draws random numbers of its own. The checkpoint before this step "
            "is whole."
        )


@torch.no_grad()
def digest(setup: Setup) -> int:
    """64 bits of all trained tensors that every rank has whole, in order."""
    total = 0
    for tensor in setup.attachment.shared.values():
        bits = tensor.detach().contiguous().view(torch.int32)
        total = (total * _MIXER + int(bits.sum(dtype=torch.int64))) % 2**64
    return total


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe as it is given, but for the devices and how they share it."""
    values = recipe.model_dump(mode="json", exclude={"devices", "shard"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def unfinished(out: Path, recipe_sha: str) -> Run | None:
    """The run in `out` that a group which is started again goes on with; None: there is none yet.

    Raises RunError for a run of another recipe.
    """
    if not (out / "run.json").is_file():
        return None
    run = Run.open(out, out.parent)
    if run.read_json("run.json").get(DIGEST) != recipe_sha:
        raise RunError(f"{out}: a run of another recipe. A run never overwrites another: choose another --out.")
    return run
