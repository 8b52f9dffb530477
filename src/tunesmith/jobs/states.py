"""The states of a job: one table says what may follow."""

from __future__ import annotations

from typing import Literal, TypeAlias

from tunesmith.serve.protocol import RequestError

JobState: TypeAlias = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Action: TypeAlias = Literal["cancel", "pause", "resume"]

ENDED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")
WAITING: tuple[JobState, ...] = ("validating_files", "queued")

_AFTER: dict[Action, dict[JobState, JobState]] = {
    "cancel": dict.fromkeys(("validating_files", "queued", "running", "paused"), "cancelled"),
    "pause": dict.fromkeys(("validating_files", "queued", "running", "paused"), "paused"),
    "resume": {"validating_files": "validating_files", "queued": "queued", "running": "running", "paused": "queued"},
}
_WORDS = {"cancel": "cancelled", "pause": "paused", "resume": "resumed"}


def state_after(state: JobState, action: Action, job: str) -> JobState:
    """The state that a client's action leads to; the same one if there is nothing to do.

    Raises RequestError for a job that has ended. Status 400: clients repeat a 409, which changes nothing.
    """
    if state not in _AFTER[action]:
        ended = "is already cancelled" if state == "cancelled" else f"has already {state}"
        message = f"Job {job} {ended} and cannot be {_WORDS[action]}."
        raise RequestError(message, code="invalid_job_state")
    return _AFTER[action][state]
