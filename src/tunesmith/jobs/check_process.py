"""The process that reads the files of a job before its run, within limits of its own.

`python -m tunesmith.jobs.check_process REQUEST` prints what a run has to know or the fault as a line of JSON.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import orjson

from tunesmith.environment.process import limit_process
from tunesmith.jobs.training_files import FAILED, CheckedFile, FileFault, check_file
from tunesmith.types import JsonObject, Record

GRACE_S = 5
"""Processor time from the signal to the end by the kernel."""


class _OutOfTimeError(Exception):
    """The limit of processor time is reached."""


def answer_to(request: Record) -> JsonObject:
    """The facts of the files, {num_rows, task, num_validation}, or {fault} of it or of the validation file."""
    method, files = request["method"], request["files"]
    which = "training"
    try:
        more = {"method": method, "grader": request.get("grader")}
        checked = check_file(Path(files[which]), which, min_examples=request["min_examples"], **more)
        if "validation" in files:
            which = "validation"
            other = check_file(Path(files[which]), which, min_examples=1, **more)
            if other.task != checked.task:
                message = "The validation file has rows of another shape than the training file."
                raise FileFault("invalid_validation_file", message, "validation_file")
            checked = replace(checked, num_validation=other.num_rows)
    except FileFault as fault:
        return {"fault": asdict(fault)}
    except (_OutOfTimeError, MemoryError, SystemError) as error:  # orjson's, where memory ends in it
        what = f"{request['memory_bytes'] >> 20:,} MiB of memory"
        if isinstance(error, _OutOfTimeError):
            what = f"{request['seconds']:,} s of a processor"
        message = (
            f"{FAILED.format(which=which)} Reading it takes more than {what}. Send shorter rows with fewer fields."
        )
        return {"fault": asdict(FileFault(f"invalid_{which}_file", message, f"{which}_file"))}
    return asdict(checked)


def facts_of(answer: Record) -> CheckedFile:
    """Read the facts of a training file from an answer. Raises FileFault."""
    if "fault" in answer:
        raise FileFault(**answer["fault"])
    return CheckedFile(**answer)


def _limit(memory_bytes: int, seconds: int) -> None:
    """Let this process have `memory_bytes` and `seconds` of a processor beyond what it has taken."""

    def end(*signal_and_frame: object) -> None:
        raise _OutOfTimeError

    signal.signal(signal.SIGXCPU, end)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a server, that ends this one
    limit_process(memory_bytes=memory_bytes, seconds=seconds, grace_s=GRACE_S)
    with suppress(OSError):  # where memory is short nevertheless, Linux ends this process before the server
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    request = orjson.loads(sys.argv[1])
    _limit(request["memory_bytes"], request["seconds"])
    sys.stdout.buffer.write(orjson.dumps(answer_to(request)) + b"\n")
