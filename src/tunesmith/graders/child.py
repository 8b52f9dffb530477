"""The process that runs the code of graders.

    python -m tunesmith.graders.child

reads on its standard input what to load and then a line of JSON a grade, and writes a line for each to its
standard output. The code is loaded once. Each grade is made by a fork of this process, with a session, a folder
and limits of its own, so that nothing that a grade does, prints or leaves behind reaches the next one. What
code prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import runpy
import secrets
import select
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from shutil import rmtree
from typing import Any

from tunesmith.environment.process import limit_process
from tunesmith.graders.grade import GradeError
from tunesmith.phrases import listed
from tunesmith.types import REWARD_KEY, JsonObject, Record

Work = Callable[[Record], Any]
Limits = Record
"""{memory_bytes, seconds} of a grade, or of a test."""
Answer = JsonObject
"""{"value": what a grader returned}, or {"kind", "error"} as in `grade.Grade`."""
FILE_BYTES = 64 * 2**20
"""Largest file that a grade may write."""
MOST_TRACE, MOST_FIELDS, MOST_OF_VALUE = 2000, 12, 40
"""Characters of a traceback, fields of a row that are named, and characters of a value that is no number."""
PACKAGE = Path(__file__).resolve().parents[1]
MODULE = "tunesmith_grader"  # name of the module that a grader's file becomes
_SUBREAPER, _DEATH_SIGNAL, _NEW_USER, _NEW_NET = 36, 1, 0x10000000, 0x40000000
"""Linux: prctl.h and sched.h."""


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.register_at_fork(after_in_child=out.close)  # else a grade could write the answer of this process
    os.dup2(2, 1)
    sys.path[:] = [path for path in sys.path if path]

    def say(message: Record) -> None:
        out.write(json.dumps(message).encode() + b"\n")
        out.flush()

    to_load = json.loads(sys.stdin.buffer.readline() or b"{}")
    if not to_load:
        return
    _prctl(_SUBREAPER)
    offline = to_load["offline"] and _without_network()
    limits = {"memory_bytes": to_load["memory_bytes"], "seconds": to_load["seconds"]}
    try:
        work = _loaded(to_load)
    except BaseException as error:
        say(_problem(error))
        return
    say({"files": _own_files(to_load.get("file", "")), "offline": offline})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        say(_graded(request, work, limits, request["seed"]))


def _prctl(option: int, value: int = 1) -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        prctl(option, value)


def _without_network() -> bool:
    """Leave the network, if the kernel lets an ordinary user do so. Returns whether it did."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None) if sys.platform == "linux" else None
    return unshare is not None and unshare(_NEW_USER | _NEW_NET) == 0


def _loaded(to_load: Record) -> Work | None:
    """The function that grades; None: tests of answers are run."""
    if to_load["what"] == "tests":
        return None
    if to_load["what"] == "text":
        from tunesmith.graders.schema import TextGrader, TextSimilarity, from_value
        from tunesmith.graders.texts import grade_text, similarity

        grader = from_value(to_load["grader"])
        assert isinstance(grader, TextGrader), "no other kind is loaded from a text"
        if isinstance(grader, TextSimilarity):
            similarity(grader.evaluation_metric, "a", "a")  # its library is imported once, not by each fork
        return lambda request: grade_text(grader, request["sample"], request["item"])
    file = Path(to_load["file"])
    sys.path.insert(0, str(file.parent))
    try:
        module = _module(MODULE, file)
    finally:
        if hiding := _hiding(file):
            raise GradeError("exception", hiding)
    function = getattr(module, name := to_load["function"], None)
    if not callable(function):
        functions = [value for value in vars(module).values() if inspect.isfunction(value)]
        theirs = listed(value.__name__ for value in functions if value.__module__ == MODULE)
        raise GradeError("exception", f"it has no function {name}. There are: {theirs or 'none'}.")
    return _called(function)


def _module(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a file that ends in .py"
    assert spec.loader is not None, "a file that ends in .py"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _hiding(file: Path) -> str:
    """A sentence where some code imported a library and got the grader's file, which has its name; else ""."""
    if getattr(sys.modules.get(file.stem), "__file__", None) != str(file):
        return ""
    others = [path for path in sys.path if Path(path) != file.parent]
    is_library = file.stem in sys.stdlib_module_names or PathFinder.find_spec(file.stem, others) is not None
    return f"{file.name} hides the library {file.stem}: rename the file." if is_library else ""


def _called(function: Callable[..., Any]) -> Work:
    """`grade(sample, item)`, or as TRL calls rewards: lists of completions and of columns, of one answer."""
    signature = inspect.signature(function)
    names = list(signature.parameters)
    if "completions" not in names:
        try:
            signature.bind("sample", "item")
        except TypeError:
            rule = "a grader takes two arguments, (sample, item): the answer and its row"
            raise GradeError("exception", f"it takes {signature}: {rule}") from None
        return lambda request: function(request["sample"], request["item"])

    def as_trl(request: Record) -> Any:
        sample, item = request["sample"], request["item"]
        is_chat = isinstance(item.get("prompt", []), list)
        text = sample["output_text"]
        columns = {key: [value] for key, value in item.items()}
        columns.setdefault("prompts", [item.get("prompt", item.get("messages"))])
        columns["completions"] = [[{"role": "assistant", "content": text}] if is_chat else text]
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        rewards = function(**{key: value for key, value in columns.items() if takes_all or key in names})
        return rewards[0] if isinstance(rewards, (list, tuple)) and len(rewards) == 1 else rewards

    return as_trl


def _own_files(file: str) -> dict[str, str]:
    """SHA-256 of the grader's file and of the modules that it loaded from its folder and below, without the
    packages of an environment that is there."""
    if not file:
        return {}
    folder = Path(file).parent.resolve()
    installed = [place.resolve() for place in _installed()]
    others = {place for place in (*installed, PACKAGE) if place != folder and place not in folder.parents}
    paths = {Path(at) for module in list(sys.modules.values()) if (at := getattr(module, "__file__", None))}
    files = {path: set(path.resolve().parents) for path in sorted(paths) if path.is_file()}
    of_grader = [path for path, parents in files.items() if folder in parents and not parents & others]
    return {str(path.relative_to(folder)): _sha256(path) for path in of_grader}


def _installed() -> set[Path]:
    """The folders of Python and of installed packages."""
    return {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _graded(request: Record, work: Work | None, limits: Limits, seed: int) -> Answer:
    with suppress(OSError):
        os.ftruncate(2, 0)  # of what earlier grades printed
        os.lseek(2, 0, os.SEEK_SET)
    if work is not None:
        ready = work
        text, problem = _forked(lambda read, write: _say(write, _value_of(ready, request)), seed, limits)
        return problem or dict(json.loads(text))
    passed = sum(_passes(request["code"], test, seed, limits) for test in request["tests"])
    return {"value": passed / len(request["tests"])}


def _say(write: int, answer: Record) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        data = data[os.write(write, data) :]


def _trace(error: BaseException) -> str:
    """The end of a traceback, without the lines of this file and of libraries that the grader called, and
    without marks below the others."""
    trace = traceback.TracebackException.from_exception(error)
    frames = [frame for frame in trace.stack if frame.filename != __file__ and "importlib" not in frame.filename]
    while len(frames) > 1 and _installed() & {*Path(frames[-1].filename).parents}:
        frames.pop()  # the line of the grader that called it says more
    lines = traceback.format_list([(frame.filename, frame.lineno or 0, frame.name, frame.line) for frame in frames])
    return "".join([*lines, *trace.format_exception_only()]).strip()[-MOST_TRACE:]


def _problem(error: BaseException, request: Record | None = None) -> Answer:
    """The kind and message of an error, with the way out of usual slips. `request`: the answer and its row."""
    if isinstance(error, GradeError):
        return {"kind": error.kind, "error": str(error)}
    kind = "memory" if isinstance(error, MemoryError) else "exception"
    file = Path(getattr(sys.modules.get(MODULE), "__file__", None) or "")
    hiding = _hiding(file) if isinstance(error, (AttributeError, ImportError)) else ""
    ways_out = [hiding] if hiding else _ways_out(error, request or {})
    return {"kind": kind, "error": "\n".join([_trace(error), *ways_out])}


def _ways_out(error: BaseException, request: Record) -> list[str]:
    """The way out of a usual slip; none of other errors."""
    text, item = request.get("sample", {}).get("output_text", ""), request.get("item", {})
    if isinstance(error, FileNotFoundError) and not os.path.isabs(error.filename or os.sep):
        return ["It runs in an empty folder: find files next to its own by Path(__file__).parent."]
    if isinstance(error, ModuleNotFoundError):
        return [f"It runs in the Python of tunesmith: install the package with {sys.executable} -m pip."]
    if isinstance(error, AttributeError) and isinstance(error.obj, dict):
        return [f"sample and item are dicts: write [{error.name!r}] in place of .{error.name}."]
    if isinstance(error, json.JSONDecodeError) and error.doc.strip() in text:
        return ['An answer that is not JSON is a bad one: return 0.0 for it. sample["output_json"] is None then.']
    if isinstance(error, KeyError) and item and error.args and error.args[0] not in [*item, *item.values()]:
        return [f"The row has {listed(list(item), MOST_FIELDS)}."]
    return []


def _value_of(work: Work, request: Record) -> Answer:
    """The reward that a grader returns: a finite number, or numbers by name of which `reward` counts."""
    try:
        value = work(request)
    except Exception as error:
        return _problem(error, request)
    scores = dict(value) if isinstance(value, Mapping) else {REWARD_KEY: value}
    numbers = {str(name): _number(value) for name, value in scores.items()}
    if numbers.get(REWARD_KEY) is None:
        what = f"no {REWARD_KEY} among {', '.join(numbers) or 'nothing'}"
        if REWARD_KEY in scores:
            what = repr(scores[REWARD_KEY])[:80]
        what += ", as a function does that ends without return" if value is None else ""
        rule = f"a grade is a finite number, or a dict of numbers of which {REWARD_KEY!r} counts"
        return {"kind": "not_a_number", "error": f"it gave {what}; {rule}"}
    no_numbers = [name for name in scores if numbers[str(name)] is None]
    return {
        "value": numbers.pop(REWARD_KEY),
        "scores": {name: number for name, number in numbers.items() if number is not None},
        "left_out": {str(name): repr(scores[name])[:MOST_OF_VALUE] for name in no_numbers},
    }


def _number(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    return float(value) if isinstance(value, (bool, int, float)) and math.isfinite(value) else None


def _forked(
    work: Callable[[int, int], None], seed: int, limits: Limits, then: Callable[[], bytes] | None = None
) -> tuple[str, Answer | None]:
    """Call `work(read, write)` in a fork. Returns the line that it wrote, and a problem if there was one.

    `then` returns what is sent to the fork after its first line, which is no answer; it writes a second one.
    """
    folder = tempfile.mkdtemp(prefix="grade-")
    (from_fork, to_us), (from_us, to_fork) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(from_fork)
            os.close(to_fork)
            _enter(folder, seed, limits)
            work(from_us, to_us)
        except BaseException as error:
            _say(to_us, _problem(error))
        finally:
            os._exit(0)
    os.close(to_us)
    os.close(from_us)
    status = 0
    text: str | None = None
    try:
        ends = time.monotonic() + limits["seconds"]
        text = _line(from_fork, ends)
        if text and then is not None:
            word = then()
            with suppress(OSError):
                os.write(to_fork, word)
            text = _line(from_fork, ends)
    finally:
        os.close(from_fork)
        os.close(to_fork)
        status = _ended(pid, wait=text == "")
        rmtree(folder, ignore_errors=True)
    if text is None or status == -signal.SIGXCPU:
        return "", {"kind": "timeout", "error": f"it took more than {limits['seconds']:g} s and was ended"}
    ending = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    return text, None if text else {"kind": "died", "error": f"its process ended by itself ({ending})"}


def _line(source: int, ends: float) -> str | None:
    """The line that a fork writes; "" if it ended before, None if its time ended."""
    text = b""
    while (left := ends - time.monotonic()) > 0:
        if select.select([source], [], [], left)[0]:
            new = os.read(source, 1 << 16)
            text += new
            if not new or text.endswith(b"\n"):
                return text.decode("utf-8", "replace") if new else ""
    return None


def _enter(folder: str, seed: int, limits: Limits) -> None:
    """Make this fork a grade's: a session, a folder, limits and random numbers of its own."""
    import resource

    os.setsid()
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    os.chdir(folder)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limit_process(memory_bytes=limits["memory_bytes"], seconds=limits["seconds"] * (os.cpu_count() or 1))
    for which, most in ((resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):
            resource.setrlimit(which, (most, most))
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _ended(pid: int, *, wait: bool) -> int:
    """End a fork and everything that it started. Returns its exit code, or minus the number of its signal.
    `wait`: let it end by itself."""
    done, status, until = 0, 0, time.monotonic() + 1
    while wait and not done and time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)  # it has no group of its own yet
    if not done:
        _, status = os.waitpid(pid, 0)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    with suppress(OSError):  # on Linux orphans come to this process, also those that left the group
        while others := children.read_text("ascii").split():
            for other in map(int, others):
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
    return os.waitstatus_to_exitcode(status)


_RUN, _READ, _WRITE = runpy.run_path, os.read, os.write
"""As they are before the code of an answer can replace them."""


def _passes(code: str, test: str, seed: int, limits: Limits) -> bool:
    """Whether the code of an answer passes a test. Its pass is a word that this process alone knows until
    the code is loaded, and the test's last line says it: an exit, a print or a replaced function is no pass."""
    word = ""

    def then() -> bytes:
        # Drawn now: a fork has what its parent's frames held before.
        nonlocal word
        word = secrets.token_hex(16)
        # Written now, outside of the folder that the code knows, so that loading the code could not change it.
        (Path(place) / "test_of_answer.py").write_text(f"{test}\n\n__passed__()\n", "utf-8")
        return word.encode()

    with tempfile.TemporaryDirectory(prefix="test-") as place:
        text, _ = _forked(lambda read, write: _run_test(code, Path(place), read, write), seed, limits, then)
    return text == f"{word}\n"


def _run_test(code: str, place: Path, read: int, write: int) -> None:
    Path("answer.py").write_text(code, "utf-8")
    answer = vars(_module("answer", Path("answer.py").resolve()))
    _WRITE(write, b"loaded\n")
    word = _READ(read, 64)
    file = str(place / "test_of_answer.py")

    def passed() -> None:
        names = sys._getframe(1).f_globals
        for name in [name for name in names if name.startswith("test")]:
            if getattr(getattr(names[name], "__code__", None), "co_filename", "") == file:
                names[name]()
        _WRITE(write, word + b"\n")

    _RUN(file, {**answer, "__passed__": passed}, "test_of_answer")


if __name__ == "__main__":
    main()
