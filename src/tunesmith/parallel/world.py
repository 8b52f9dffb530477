"""The group of processes that train one run: each has a rank, from 0, and a device of its own.

A run that is alone has the world `World()`, which never imports torch.distributed. A group is made by an agent
(ours in `launch`, or torchrun, Slurm, Kubernetes, Ray), which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT. Its ranks first find each other through a store of small values, where waiting has no limit but
a heartbeat, and `connect` once they have something to sum.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from tunesmith.environment.version import __version__
from tunesmith.errors import GroupError, InputError, NonFiniteError, OutOfMemoryError, Stopped, TunesmithError, WayOut
from tunesmith.types import JsonObject, Record

JOIN_S = 600.0
"""Seconds in which every rank must have come: from a cold network disk imports take minutes."""
DEAD_S, SAY_S = 60.0, 10.0
"""Seconds after which a rank without a sign of life is given up, and between two words on who has come."""
HEARTBEAT_S = 5.0
POLL_S, WORD_S = 0.05, 1.0
"""Seconds between two looks at what others say, and for which the reason of a rank
that failed is waited for."""
COLLECTIVE_S = 7200.0
"""Seconds that a sum waits for the slowest rank, which may save or measure; a dead one is noticed at once."""
OWN_AGENT = "TUNESMITH_AGENT"
"""Set in ranks that `launch` started."""
FAILED_KEY = "failed"
_TRANSPORT = re.compile(r"gloo|NCCL|[Pp]rocess ?[Gg]roup|[Cc]onnection")
"""Words of an error of torch.distributed, which has no class of its own."""
AGREED = (Stopped, NonFiniteError, OutOfMemoryError)
"""Errors that all ranks raise together, after they met."""


Say = Callable[[int, int], None]
"""(ranks that are there, ranks)."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of this process among others, as its environment says."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this machine."""
    was_started: bool = False
    """Whether somebody's agent started it, who may start it again."""


def place_of(environ: Mapping[str, str]) -> Place:
    """Read the variables that torchrun and its like set. Raises InputError for a missing one or no number."""
    size_given = environ.get("WORLD_SIZE", "")
    if not size_given.isdecimal() or ("RANK" not in environ and int(size_given) < 2):
        return Place()

    def number(name: str, default: str | None = None) -> int:
        text = environ.get(name, default)
        if text is None or not text.isdecimal():
            raise InputError(
                f"{name}={text or ''}: not a number, but WORLD_SIZE says that this process is one of several. "
                "Let torchrun start it, or unset WORLD_SIZE."
            )
        return int(text)

    rank, size = number("RANK"), number("WORLD_SIZE")
    local_rank = number("LOCAL_RANK", "0" if size == 1 else None)
    place = Place(rank, size, local_rank, number("LOCAL_WORLD_SIZE", "1"), OWN_AGENT not in environ)
    if not (place.rank < place.size and place.local_rank < max(1, place.local_size) <= place.size):
        raise InputError(f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of {place.local_size}: impossible")
    return place


class World:
    """A process and its group."""

    def __init__(self, place: Place | None = None, store: Any = None) -> None:
        self.place = place or Place()
        self.rank, self.size = self.place.rank, self.place.size
        self.wants_stop: Callable[[], bool] = lambda: False
        """Whether this rank got a request to stop; read when ranks meet."""
        self.stops = False
        """Whether any rank had one when they last met."""
        self.joined: list[JsonObject] = []
        """Facts that each rank gave of itself when it joined."""
        self.mesh: Any = None
        """torch's mesh of ranks over which layers of the model are split; None: each rank has it whole."""
        self.card = ""
        """The card of this rank where CUDA ran before it came, as torch names it; else cuda:0 is its own."""
        self._store = store
        self._is_connected = False
        self._over = threading.Event()

    @property
    def is_first(self) -> bool:
        """Whether this rank owns the run folder, its events and its display."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """(rank, size)."""
        return self.rank, self.size

    @property
    def is_sharded(self) -> bool:
        """Whether every pass through the model is a meeting of all ranks, see `fsdp`."""
        return self.mesh is not None

    @property
    def cards(self) -> list[str]:
        """Names of the ranks' cards, each kind once; none on processors."""
        return sorted({facts["card"] for facts in self.joined if facts.get("card")})

    def join(self, facts: Record, say: Say = lambda here, size: None) -> None:
        """Wait until every rank is there, and compare their versions, kinds of device and cards.

        Raises:
            GroupError: a rank did not come within ten minutes.
            InputError: a rank has other versions, another kind of device, or the card of another rank.
        """
        self._put(f"here/{self.rank}", _own_facts(facts))
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        until, due = time.monotonic() + JOIN_S, time.monotonic() + SAY_S
        while missing := [rank for rank in range(self.size) if not self._store.check([f"here/{rank}"])]:
            self._raise_failure()
            if time.monotonic() > until:
                named = ", ".join(map(str, missing[:8]))
                raise GroupError(
                    f"WORLD_SIZE={self.size}: no word of rank {named} within {JOIN_S:.0f} s. Start as many "
                    "processes as WORLD_SIZE says, and let all reach MASTER_ADDR and MASTER_PORT."
                )
            if time.monotonic() > due:
                say(self.size - len(missing), self.size)
                due += SAY_S
            time.sleep(POLL_S)
        self.joined = [self._get(f"here/{rank}") for rank in range(self.size)]
        first, owners = self.joined[0], dict[Any, int]()
        for rank, peer in enumerate(self.joined):
            owner = owners.setdefault((peer["host"], peer["uuid"]) if peer.get("uuid") else rank, rank)
            if owner != rank:
                raise InputError(
                    f"rank {rank} and rank {owner} on {peer['host']} have one card, {peer['card']}. Name as "
                    "many in CUDA_VISIBLE_DEVICES as there are processes, or start fewer."
                )
            for key, value in first["same"].items():
                if peer["same"].get(key) != value:
                    raise InputError(
                        f"rank {rank} on {peer['host']} has {key} {peer['same'].get(key)}, rank 0 on "
                        f"{first['host']} {value}: they would not compute the same. Use equal machines and "
                        "installations."
                    )

    def publish(self, key: str, value: object) -> None:
        """Give the others a value; they `wait_for` it."""
        if self.size > 1:
            self._put(key, value)

    def wait_for(self, key: str, rank: int = 0) -> Any:
        """The value that `rank` publishes, however long it takes while that rank lives."""
        seen, changed = -1, time.monotonic()
        while not self._store.check([key]):
            self._raise_failure()
            beats = self._store.add(f"beat/{rank}", 0)
            if beats != seen:
                seen, changed = beats, time.monotonic()
            elif time.monotonic() > changed + DEAD_S:
                raise GroupError(f"rank {rank} of {self.size} gave no sign of life for {DEAD_S:.0f} s.")
            time.sleep(POLL_S)
        return self._get(key)

    def connect(self) -> None:
        """Make the process group: gloo between processors, NCCL between CUDA cards."""
        if self.size == 1 or self._is_connected:
            return
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        if dist.is_initialized():  # by Ray, whose it stays
            return
        self.publish(f"ready/{self.rank}", True)
        for rank in range(self.size):  # a group is made by all at once, and would wait long for a lost one
            self.wait_for(f"ready/{rank}", rank)
        with self.reaching():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=COLLECTIVE_S),
            )
        self._is_connected = True

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """A block that talks to the other ranks; GroupError with the reason where one of them is gone."""
        try:
            yield
        except RuntimeError as error:  # every error of torch.distributed is one
            text = " ".join(str(error).split())
            until = time.monotonic() + WORD_S
            while time.monotonic() < until:  # the rank that failed says why, if it can
                self._raise_failure()
                time.sleep(POLL_S)
            raise GroupError(
                f"rank {self.rank} of {self.size} lost the others: one was killed, or its machine is gone "
                f"({text[:200]})"
            ) from error

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A block that runs the model: where its layers are split, every pass talks to the other ranks."""
        try:
            yield
        except RuntimeError as error:
            if not self.is_sharded or not _TRANSPORT.search(str(error)):
                raise
            with self.reaching():
                raise

    def gather(self, content: bytes) -> list[bytes]:
        """The bytes of every rank, in order of ranks, on every rank."""
        if self.size == 1:
            return [content]
        import torch
        import torch.distributed as dist

        with self.reaching():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(content)]))
            longest = max(1, *(int(size) for size in sizes))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
            received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(received, padded)
        return [buffer[: int(size)].numpy().tobytes() for buffer, size in zip(received, sizes, strict=True)]

    def gather_values(self, value: object) -> list[Any]:
        """Values that JSON holds, of every rank, in order of ranks. Numbers keep every bit, and may be NaN."""
        if self.size == 1:
            return [value]
        return [json.loads(content) for content in self.gather(json.dumps(value).encode())]

    def agree_to_stop(self) -> None:
        """Set `stops` on all ranks if any rank got a request to stop; a run alone reads its own."""
        self.stops = self.size > 1 and any(self.gather_values(bool(self.wants_stop())))

    def fail(self, error: BaseException) -> None:
        """Leave the reason of this rank's end to the others."""
        if isinstance(error, AGREED) or not isinstance(error, Exception):
            return
        is_own = isinstance(error, TunesmithError)
        failed = {
            "rank": self.rank,
            "text": str(error) if is_own else f"{type(error).__name__}: {error}",
            "code": error.exit_code if isinstance(error, TunesmithError) else 1,
            "ways": [asdict(way) for way in error.ways] if isinstance(error, TunesmithError) else [],
        }
        with suppress(RuntimeError):
            self._store.compare_set(FAILED_KEY, "", json.dumps(failed))  # the first one counts

    def close(self) -> None:
        """Leave the group."""
        self._over.set()
        if self._is_connected:
            import torch.distributed as dist

            self._is_connected = False
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def _beat(self) -> None:
        while not self._over.is_set():
            with suppress(RuntimeError):  # the store is gone, which the main thread notices
                self._store.add(f"beat/{self.rank}", 1)
            self._over.wait(HEARTBEAT_S)

    def _raise_failure(self) -> None:
        """Raise GroupError if a rank has said why it ended."""
        with suppress(RuntimeError):
            if self._store.check([FAILED_KEY]):
                failed = self._get(FAILED_KEY)
                text = f"rank {failed['rank']} of {self.size}: {failed['text']}"
                error = GroupError(text, ways=[WayOut(**way) for way in failed["ways"]])
                error.exit_code = failed["code"]
                raise error

    def _put(self, key: str, value: object) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))


def _own_facts(facts: Record) -> JsonObject:
    same = {"tunesmith": __version__, "torch": version("torch"), "transformers": version("transformers")}
    same["Python"] = ".".join(platform.python_version_tuple()[:2])
    return {"host": socket.gethostname(), **facts, "same": {**same, **facts.get("same", {})}}


@contextmanager
def group(place: Place, facts: Callable[[], Record], say: Say = lambda here, size: None) -> Iterator[World]:
    """The world of this process until the block ends. `facts`: what this rank says of itself, {"room", "same"};
    `say` gets how many ranks are there, of how many, while this one waits for the others."""
    if place.size == 1:
        yield World(place)
        return
    world = World(place, _store(place, say))
    try:
        world.join(facts(), say)
        yield world
    except BaseException as error:
        world.fail(error)
        raise
    finally:
        world.close()


@contextmanager
def _saying(say: Say, size: int) -> Iterator[None]:
    """A block that waits for the others without being able to say so itself."""
    over = threading.Event()

    def speak() -> None:
        while not over.wait(SAY_S):
            say(0, size)

    threading.Thread(target=speak, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _store(place: Place, say: Say) -> Any:
    """The store that all ranks reach. Raises InputError, GroupError."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return PrefixStore("tunesmith", _get_default_store())
    where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR', '')} MASTER_PORT={os.environ.get('MASTER_PORT', '')}"
    if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT", "").isdecimal():
        raise InputError(f"{where}: RANK and WORLD_SIZE are set, but not where ranks meet. Let torchrun start them.")
    try:
        with _saying(say, place.size):
            store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=JOIN_S)))
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text or "in use" in text:
            raise InputError(f"{where}: another program uses this port. Choose another MASTER_PORT.") from error
        raise GroupError(
            f"{where}: not reached within {JOIN_S:.0f} s by all {place.size} ranks: {text[:200]}"
        ) from error
    return PrefixStore(f"tunesmith/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
