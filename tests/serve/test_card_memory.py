"""A server on a card takes room for keys and values from the card, shares it with jobs, and gives way where it ends."""

import asyncio
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.batches import Heard, alone, decoder, hear, job, prompts
from tunesmith.environment import process
from tunesmith.environment.process import CARD_SHARE
from tunesmith.errors import InputError
from tunesmith.generation import scheduler as schedulers
from tunesmith.generation.decoder import SequentialDecoder
from tunesmith.generation.scheduler import Scheduler
from tunesmith.jobs import launcher
from tunesmith.jobs.bases import Bases, PublicBase
from tunesmith.jobs.server import JobServer
from tunesmith.jobs.store import Store
from tunesmith.models import card
from tunesmith.planning import devices
from tunesmith.serve import engine, worker
from tunesmith.serve.protocol import EngineOptions

GIB = 2**30


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 of 80 GiB are free, and 18 are this process's, 16 of them weights."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 18 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 16 * GIB)


def test_keys_and_values_get_what_the_card_has_and_not_the_host(on_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = worker.free_for_keys(torch.device("cuda"), limit=2**50)
    assert found == int(0.9 * (60 + 18 - 16 - 1) * GIB)
    monkeypatch.setenv(CARD_SHARE, "0.4")
    assert worker.free_for_keys(torch.device("cuda"), limit=2**50) == int(0.9 * (32 - 16 - 1) * GIB)
    assert worker.free_for_keys(torch.device("cpu"), limit=2**50) > 2**49


def test_server_and_jobs_share_a_card(on_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.rest_of_card() == 0.6
    monkeypatch.setenv(CARD_SHARE, "0.25")
    assert launcher.rest_of_card() == 0.75
    monkeypatch.setenv(CARD_SHARE, "")
    assert launcher.rest_of_card() == 0.6
    monkeypatch.setenv(CARD_SHARE, "0.25")
    assert devices.room("cuda") == 20 * GIB + devices.CUDA_CONTEXT
    fractions: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, place: fractions.append(share))
    monkeypatch.setenv(card.OWN_SETTINGS[0], "max_split_size_mb:128")
    card.prepare_allocator("cuda")
    assert fractions == [0.25]
    monkeypatch.setenv(CARD_SHARE, "half")
    with pytest.raises(InputError, match="TUNESMITH_CARD_SHARE=half: no number"):
        devices.room("cuda")
    with pytest.raises(InputError, match="TUNESMITH_CARD_SHARE=half: no number"):
        launcher.rest_of_card()
    assert os.environ[CARD_SHARE] == "half"


def test_a_run_of_a_job_gets_what_the_server_leaves_of_their_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(launcher, "start_child", lambda run, module, words, variables: started.append(variables))
    for variables in ({"A": "b"}, {CARD_SHARE: "1"}):
        launcher.LocalLauncher(offline=True).start(tmp_path / "run", tmp_path / "recipe", variables)
    assert started == [{"A": "b", CARD_SHARE: "0.6"}, {CARD_SHARE: "1"}]


@pytest.mark.parametrize("share", ["0", "-1", "1.5", "nan", "inf"])
def test_what_is_no_share_of_a_card_is_refused(monkeypatch: pytest.MonkeyPatch, share: str) -> None:
    monkeypatch.setenv(CARD_SHARE, share)
    with pytest.raises(InputError, match=f"TUNESMITH_CARD_SHARE={share}: a share of a card is above 0 and at most 1"):
        process.card_share()


def test_a_server_that_leaves_its_jobs_nothing_of_the_card_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CARD_SHARE, "1")
    assert process.card_share() == 1
    bases = Bases(bases={"tiny": PublicBase(model="tiny")})
    start = JobServer.start(Store(tmp_path / "store"), bases, EngineOptions(), root=tmp_path, on_note=print)
    with pytest.raises(InputError, match=r"runs of jobs get what the server leaves .* Give at most 0.95"):
        asyncio.run(start)


def test_engines_of_several_bases_share_what_the_server_takes_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[str] = []

    async def start(to_load: Any, on_note: Any, **variables: str) -> None:
        shares.append(variables[CARD_SHARE])

    monkeypatch.setattr(engine.WorkerProcess, "start", start)
    for num in (1, 2):
        options = EngineOptions(attaches=True, engines=num)
        asyncio.run(engine.WorkerEngine(["base"], root=Path("runs"), options=options)._new_worker())
    assert shares == ["0.4", "0.2"]


def ends_once(made: Any, name: str, at: int) -> None:
    """Memory ends in one call, halfway: the layers have written then."""
    right, calls = getattr(made, name), [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            if name == "step":
                right(*args)
                for slot in args[0]:
                    slot.length -= 1
                for slot, ids in args[1]:
                    slot.length -= len(ids)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(*args)

    setattr(made, name, failing)


@pytest.mark.parametrize(("name", "at"), [("step", 1), ("step", 2), ("step", 5), ("fork", 3)])
def test_memory_that_ends_costs_the_youngest_request_and_no_other(name: str, at: int) -> None:
    made = decoder("llama")
    ends_once(made, name, at)
    batch, heard = Scheduler(made, streams=8), defaultdict[int, Heard](Heard)
    asked = prompts(3, longest=20)
    for key, prompt in enumerate(asked):
        batch.add(job(key, prompt, max_new_tokens=8))
    while batch.is_busy:
        hear(batch.step(), heard)
    refused = heard[2].refused
    assert refused is not None
    assert (refused.status, refused.code) == (503, "out_of_memory")
    for key in (0, 1):
        assert heard[key].answer() == alone("llama", None, tuple(asked[key]), 8)


def test_a_step_that_cannot_be_repeated_fails_its_requests_only() -> None:
    made = decoder("llama", SequentialDecoder)
    ends_once(made, "step", 2)
    batch, heard = Scheduler(made, streams=8), defaultdict[int, Heard](Heard)
    asked = prompts(3, longest=20)
    for key, prompt in enumerate(asked[:2]):
        batch.add(job(key, prompt, max_new_tokens=4))
    for _ in range(2):
        hear(batch.step(), heard)
    codes = {key: one.refused.code for key, one in heard.items() if one.refused}
    assert codes == dict.fromkeys((0, 1), "out_of_memory")
    batch.add(job(2, asked[2], max_new_tokens=4))
    while batch.is_busy:
        hear(batch.step(), heard)
    assert heard[2].answer() == alone("llama", None, tuple(asked[2]), 4)


def test_a_pool_that_grew_in_part_grows_the_rest() -> None:
    """Memory ended in the second layer, as a third sequence was added."""
    made = decoder("llama")
    right, calls = torch.cat, [0]

    def cat(tensors: Any, *args: Any, **how: Any) -> Any:
        if len(tensors) == 2 and tensors[0] is tensors[1]:
            calls[0] += 1
            if calls[0] == 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(tensors, *args, **how)

    batch, heard = Scheduler(made, streams=8), defaultdict[int, Heard](Heard)
    asked = prompts(4, longest=20)
    for key, prompt in enumerate(asked):
        batch.add(job(key, prompt, max_new_tokens=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", cat)
        while batch.is_busy:
            hear(batch.step(), heard)
    refused = [key for key in range(4) if heard[key].refused]
    assert len(refused) == 1
    for key in set(range(4)) - set(refused):
        assert heard[key].answer() == alone("llama", None, tuple(asked[key]), 6)


def test_other_errors_of_a_step_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder("llama")

    def fail(*args: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(made, "step", fail)
    batch = schedulers.Scheduler(made, streams=2)
    batch.add(job(0, (20, 21), max_new_tokens=2))
    with pytest.raises(RuntimeError, match="shapes"):
        batch.step()
