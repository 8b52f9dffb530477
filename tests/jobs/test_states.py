"""The table of states against the rules that clients rely on, and random sequences of actions against a dispatcher."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.places import FakeLauncher, FakeModels, dispatcher, put_file, put_job, rows
from tunesmith.jobs.states import ENDED, state_after
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import events
from tunesmith.serve.protocol import RequestError

OPEN = ("validating_files", "queued", "running", "paused")


@pytest.mark.parametrize("state", OPEN)
def test_an_open_job_can_be_cancelled_and_paused(state) -> None:
    assert state_after(state, "cancel", "j") == "cancelled"
    assert state_after(state, "pause", "j") == "paused"
    assert state_after(state, "resume", "j") == ("queued" if state == "paused" else state)


@pytest.mark.parametrize("state", ENDED)
@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_a_job_that_has_ended_stays_so(state, action) -> None:
    with pytest.raises(RequestError, match=rf"Job j (is|has) already {state} and cannot be") as caught:
        state_after(state, action, "j")
    assert (caught.value.status, caught.value.code) == (400, "invalid_job_state")  # a client repeats 409


@pytest.mark.parametrize("seed", range(5))
def test_random_actions_end_as_the_last_wish_says(opened: Callable[..., Store], tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    store, launcher, models = opened(tmp_path), FakeLauncher(), FakeModels()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, models)
    for _ in range(25):
        wish = draw.choice(["pause", "resume", "resume", "round", "round", "restart"])
        if wish == "round":
            working.round()
        elif wish == "restart":
            working = dispatcher(store, launcher, models)
            working.recover()
        elif store.job(name)["status"] not in ENDED:
            store.act(name, wish, wish)
    if store.job(name)["status"] == "paused":
        store.act(name, "resume", "resume")
    for _ in range(12):
        working.round()
    job = store.job(name)
    assert job["status"] == "succeeded"
    assert list(models.served) == [row["name"] for row in store.tuned()]
    assert job["tuned_name"] in models.served
    messages = [row["message"] for row in store.page(events, limit=200)[0]]
    steps = [one for one in messages if one.startswith("Step ")]
    assert steps[::-1] == [f"Step {i}/6: training loss={1 / i:.2f}" for i in range(1, 7)]  # each once
    store.close()
