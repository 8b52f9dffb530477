"""The table of states against the rules that clients rely on, and random sequences of actions against a dispatcher."""

from __future__ import annotations

import random

import pytest

from jobs.places import FakeLauncher, FakeModels, dispatcher, put_file, put_job, rows
from jobs.postgres import opener
from tunesmith.jobs.rules import ProjectRules, Rules
from tunesmith.jobs.states import ENDED, state_after
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import events
from tunesmith.serve.protocol import RequestError

opened = opener("sqlite", "postgresql")
OPEN = ("validating_files", "queued", "running", "paused")
RULES = {
    **{("cancel", state): "cancelled" for state in OPEN},
    **{("pause", state): "paused" for state in OPEN},
    **{("resume", state): state for state in OPEN},
    ("resume", "paused"): "queued",
}
"""What the hosted service does; whatever is not here is refused."""
MOVES = {"checked": ("validating_files", "queued"), "started": ("queued", "running"), "done": ("running", "succeeded")}
"""What the dispatcher does."""


def test_random_sequences_of_actions_follow_the_rules(store: Store) -> None:
    draw = random.Random(7)
    store.rules = Rules(every_project=ProjectRules(jobs_waiting=10_000))
    file = put_file(store, rows(12))
    for _ in range(300 if store._database.is_sqlite else 50):
        state, name, said = "validating_files", put_job(store, file), 0
        for _ in range(draw.randint(1, 6)):
            wish = draw.choice([*MOVES, "cancel", "pause", "pause", "resume", "resume"])
            if wish in MOVES:
                before, after = MOVES[wish]
                moved = store.change_job(name, if_status=[before], status=after)
                assert moved == (state == before)
                state = after if moved else state
                continue
            after = RULES.get((wish, state))
            if after is None:
                with pytest.raises(RequestError, match=f"already {state}"):
                    store.act(name, wish, wish)
            else:
                assert store.act(name, wish, wish)["status"] == after
                said += after != state
                state = after
        job = store.job(name)
        assert job["status"] == state
        assert (job["finished_at"] is not None) == (state in ENDED)
        assert len(store.page(events, events.c.job == name, limit=50)[0]) == said + 2


@pytest.mark.parametrize("state", ENDED)
@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_a_job_that_has_ended_stays_so(state, action) -> None:
    with pytest.raises(RequestError, match=rf"Job j (is|has) already {state} and cannot be") as caught:
        state_after(state, action, "j")
    assert (caught.value.status, caught.value.code) == (400, "invalid_job_state")  # a client repeats 409


@pytest.mark.parametrize("seed", range(5))
def test_random_actions_end_as_the_last_wish_says(store: Store, seed: int) -> None:
    draw = random.Random(seed)
    launcher, models = FakeLauncher(), FakeModels()
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
