"""Several devices from the command line: the agent, kills, signals, exit codes and the words of what failed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import tunesmith
from fresh import Process, python
from parallel.group import start
from parallel.scenarios import LONG, make_inputs, recipe_of
from tiny_run import values_of
from tunesmith.environment.children import for_child
from tunesmith.errors import GroupError, InputError, NonFiniteError, RecipeError, RunError, Stopped
from tunesmith.parallel.launch import devices_of, ending, record_failure, report_failure
from tunesmith.parallel.own_card import take_card
from tunesmith.parallel.world import OWN_AGENT, Place, place_of
from tunesmith.recipe.docs import as_yaml
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import Listener, train
from tunesmith.types import Event

TUNESMITH = ("-m", "tunesmith")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("agent")
    make_inputs(made)
    recipe = recipe_of(made, **LONG)
    (made / "recipe.yaml").write_text(as_yaml(recipe, comments=False))
    return made


def begin(*words: str | Path) -> Process:
    return Process(*words, env=for_child(OMP_NUM_THREADS="1", FRESH_PYTHON=str(python())))


def train_words(folder: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--recipe", str(folder / "recipe.yaml"), "--out", str(out), "--quiet", *more]


def end(started: Process, limit_s: float = 90) -> tuple[int, str]:
    """Exit code, and what was printed to stderr."""
    try:
        code = started.wait(limit_s)
    except TimeoutError:
        started.send_signal(signal.SIGKILL)
        raise
    return code, started.communicate()[1]


def second_rank(out: Path) -> int:
    """The process that an agent started for rank 1 of the run in `out`."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(out) in process.cmdline() and process.environ().get("RANK") == "1":
                return process.pid
    raise AssertionError(f"no process is rank 1 of {out}")


def wait_for_step(out: Path, step: int, limit_s: float = 90) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        lines = (out / "events.jsonl").read_bytes().splitlines() if (out / "events.jsonl").exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Run:
    """The run that nothing happens to, of two ranks without an agent."""
    start(folder, "long")
    return Run(folder / "straight")


def assert_went_on(run: Run, straight: Run, times: int = 1) -> None:
    """From a checkpoint, and to the bits of the run that nothing happened to."""
    assert run.state() == "done"
    assert [event.values["from_step"] >= 10 for event in run.events() if event.kind == "resume"] == [True] * times
    assert values_of(run.events()) == values_of(straight.events())


KILLED = "rank 1: it was ended by Signal 9 (SIGKILL)"


# trap: D12, D18
@pytest.mark.parametrize("is_forked", [True, pytest.param(False, marks=pytest.mark.slow, id="each a new Python")])
def test_a_killed_rank_ends_all_with_its_name_and_the_run_goes_on(
    folder: Path, straight: Run, is_forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python, where its events are heard; then on the command line, where Ctrl-C stops all ranks together."""
    out, heard, killed = folder / f"killed-{is_forked}", list[str](), list[float]()
    if is_forked:
        monkeypatch.setenv("FRESH_PYTHON", str(python()))
        monkeypatch.setattr(sys, "executable", str(python()))

    def hear(event: Event) -> None:
        heard.append(event.kind)
        if event.step == 12 and not killed:
            os.kill(second_rank(out), signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(GroupError) as raised:
        tunesmith.train(
            recipe=str(folder / "recipe.yaml"), out=out, devices=2, offline=True, progress=False, on_event=hear
        )
    assert time.monotonic() < killed[0] + 30
    said = " ".join(str(raised.value).split())
    assert said.startswith(KILLED)
    assert f"tunesmith resume {out}" in said
    run = Run(out)
    assert run.state() == "failed"
    assert run.recipe().devices == 2
    assert heard == [event.kind for event in run.events()]
    started = begin(*TUNESMITH, "resume", out, "--quiet")
    wait_for_step(out, 26)
    started.send_signal(signal.SIGINT)
    code, said = end(started)
    assert code == Stopped.exit_code
    assert "stopped after step" in said
    assert run.state() == "stopped"
    start(folder, "goes_on", GOES_ON=str(out))
    assert_went_on(run, straight, times=2)


def test_the_test_sees_a_run_that_did_not_go_on(straight: Run) -> None:
    with pytest.raises(AssertionError):
        assert_went_on(straight, straight)


# trap: D13
@pytest.mark.slow  # an agent that sees a killed rank: above; a group that is started again: test_group.py
def test_torchrun_starts_it_again_and_it_goes_on(folder: Path, straight: Run) -> None:
    out = folder / "again"
    words = ["--standalone", "-m", "tunesmith", *train_words(folder, out)]
    started = begin(*TORCHRUN, *words)
    wait_for_step(out, 20)
    os.kill(second_rank(out), signal.SIGKILL)
    code, said = end(started, 120)
    assert code == 0, said
    assert_went_on(Run(out), straight)


def test_rows_that_cannot_be_used_end_with_2_and_are_named_once(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text('{"messages": 3}\n' * 30)
    words = train_words(folder, folder / "bad", "--set", f"data.train=[{bad}]", "--set", "devices=2")
    code, said = end(begin(*TUNESMITH, *words))
    assert code == InputError.exit_code
    assert said.count("30 problems") + said.count("bad.jsonl") >= 1
    assert said.count("Correct the data") <= 1
    assert "Traceback" not in said
    assert not (folder / "bad").exists()


def codes(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", OWN_AGENT):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    given = (Stopped(""), 3), (NonFiniteError(""), 1), (InputError(""), 2), (GroupError(""), 2)
    return [ending(error, code) for error, code in given]


def test_codes_of_a_rank_are_those_that_its_agent_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in (0, 1)
    ]
    ours = {OWN_AGENT: "folder"}
    assert codes({}, monkeypatch) == [(3, True), (1, True), (2, True), (2, True)]
    assert codes(ranks[0], monkeypatch) == [(0, True), (1, True), (2, True), (2, True)]
    assert codes(ranks[1], monkeypatch) == [(0, False), (0, False), (2, True), (2, True)]
    assert codes(ranks[0] | ours, monkeypatch) == [(3, True), (1, True), (2, True), (2, False)]
    assert codes(ranks[1] | ours, monkeypatch) == [(0, False), (0, False), (2, True), (2, False)]


def failure_of(folder: Path, error: Exception, rank: int, monkeypatch: pytest.MonkeyPatch) -> ProcessFailure:
    """What the agent finds after a rank ended with an error."""
    path = folder / f"error-{rank}.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("RANK", str(rank))
    code = getattr(error, "exit_code", 1)
    record_failure(error, code, str(error), is_printed=not isinstance(error, GroupError))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(path))


# trap: D18
@pytest.mark.parametrize(
    ("errors", "said", "code"),
    [
        ([GroupError("rank 1: bad"), InputError("bad")], ["error: rank 1: bad"], 2),
        ([InputError("bad"), GroupError("rank 0: bad")], [], 2),
        ([GroupError("lost"), ValueError("odd")], ["error: rank 1: odd"], 1),
        ([GroupError("rank 1: bad")], ["error: rank 1: bad"], 1),
    ],
)
def test_the_words_of_the_rank_that_failed_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[Exception], said: list[str], code: int
) -> None:
    failures = {rank: failure_of(tmp_path, error, rank, monkeypatch) for rank, error in enumerate(errors)}
    heard: list[str] = []
    assert report_failure(failures, tmp_path, heard.append) == code
    assert heard == said


def test_the_test_sees_the_words_of_a_rank_that_only_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [GroupError("lost the others"), ValueError("odd")]
    failures = {rank: failure_of(tmp_path, error, rank, monkeypatch) for rank, error in enumerate(errors)}
    heard: list[str] = []
    monkeypatch.setattr("tunesmith.parallel.launch.GroupError", type("Other", (Exception,), {}))
    report_failure(failures, tmp_path, heard.append)
    assert heard[0].startswith("error: rank 0: lost the others")


def test_one_process_that_is_started_again_finds_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    make_inputs(tmp_path)
    recipe, out = recipe_of(tmp_path, train={"max_steps": 4}), tmp_path / "run"
    with pytest.raises(Stopped):
        train(recipe, root=tmp_path, out=out, listener=Listener(should_stop=lambda: True))
    run = train(recipe, root=tmp_path, out=out)
    assert (run.path, run.state()) == (out, "done")
    assert [event.kind for event in run.events()].count("resume") == 1
    assert train(recipe, root=tmp_path, out=out).path == out
    with pytest.raises(RunError, match="a run of another recipe"):
        train(recipe.model_copy(update={"seed": 5}), root=tmp_path, out=out)


def test_examples_of_clusters_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "examples" / "clusters"
    subprocess.run(["bash", "-n", str(folder / "slurm.sh")], check=True)
    read = {name: yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("kubernetes", "skypilot")}
    assert read["kubernetes"]["spec"]["trainer"]["command"][:5] == [
        "torchrun",
        "--max-restarts",
        "3",
        "-m",
        "tunesmith",
    ]
    assert "-m tunesmith train" in read["skypilot"]["run"]
    assert all("--out" in str(text) for text in (read["kubernetes"], read["skypilot"]))


ODD = [
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "two", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "1"},
    {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
]


@pytest.mark.parametrize("environ", ODD, ids=str)
def test_a_place_that_cannot_be_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(InputError, match="RANK="):
        place_of(environ)


def test_a_process_that_nobody_placed_is_alone() -> None:
    assert place_of({}) == place_of({"WORLD_SIZE": "1"}) == place_of({"WORLD_SIZE": "many"}) == Place()


def test_more_devices_than_there_are_are_refused(folder: Path) -> None:
    recipe = recipe_of(folder).model_copy(update={"devices": 4096})
    with pytest.raises(RecipeError, match=r"devices: 4096: there (is|are) \d+ cores? .* Use at most"):
        devices_of(recipe, {})
    assert devices_of(recipe, {"RANK": "0", "WORLD_SIZE": "2"}) == 1
    assert devices_of(recipe.model_copy(update={"devices": "auto"}), {}) == 1


def test_a_process_cannot_be_several_by_itself(folder: Path) -> None:
    with pytest.raises(RecipeError, match="devices: 2: this process is alone"):
        train(recipe_of(folder).model_copy(update={"devices": 2}), root=folder / "runs")


@pytest.mark.parametrize(
    ("visible", "device", "seen"),
    [
        (None, "auto", "1"),
        ("4,6", "cuda", "6"),
        ("3", "cuda", "3"),
        (None, "cpu", None),
        ("4,6", "cpu", "4,6"),
        ("", "auto", ""),
    ],
)
def test_each_process_sees_a_card_of_its_own(visible: str | None, device: str, seen: str | None) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    take_card(Place(rank=3, size=4, local_rank=1, local_size=2), device, environ)
    assert environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_more_processes_than_cards_are_refused() -> None:
    place = Place(rank=0, size=3, local_rank=0, local_size=3)
    with pytest.raises(InputError, match=r"LOCAL_WORLD_SIZE=3: .* CUDA_VISIBLE_DEVICES names 2 cards"):
        take_card(place, "auto", {"CUDA_VISIBLE_DEVICES": "0,1"})
    with pytest.raises(RecipeError, match="device: cuda:1: one device, but 3 processes train"):
        take_card(place, "cuda:1", {})


def unmet(folder: Path, **more: str) -> tuple[int, str, float]:
    """One of two ranks, started by nobody."""
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    program = (
        "import tunesmith.parallel.world as world, sys; world.JOIN_S = 1.0\n"
        f"sys.argv = ['tunesmith', *{train_words(folder, folder / 'unmet')}]\n"
        "from tunesmith.cli import main; main()"
    )
    began = time.monotonic()
    code, said = end(Process("-c", program, env=for_child(**environ, **more)))
    return code, " ".join(said.split()), time.monotonic() - began


@pytest.fixture
def taken_port() -> Iterator[str]:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield str(taken.getsockname()[1])


def test_a_port_that_is_taken_and_a_rank_that_never_comes_are_said(folder: Path, taken_port: str) -> None:
    code, said, _ = unmet(folder, MASTER_PORT=taken_port)
    assert (code, f"MASTER_PORT={taken_port}: another program uses this port" in said) == (2, True), said
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code, said, seconds = unmet(folder, MASTER_PORT=port)
    assert code == 1, said
    assert seconds < 60
    assert "2 ranks" in said or "no word of rank 1" in said
    assert not (folder / "unmet").exists()
