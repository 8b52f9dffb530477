"""`tunesmith serve --jobs` as a process, a tiny model, and the unmodified openai client from upload to chat."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

import fresh  # noqa: E402
from serve.running import wait_for  # noqa: E402
from tiny_run import chats, model_folder  # noqa: E402
from tunesmith.jobs.launcher import _holder  # noqa: E402

SECRETS = {name: f"planted-{name}" for name in ("WANDB_API_KEY", "PGPASSWORD", "HF_TOKEN", "OPENAI_API_KEY")}
"""Which no file, row, report or line of the server may hold."""
HOW = {"n_epochs": 4, "batch_size": 3, "learning_rate_multiplier": 12.0}


@dataclass
class Live:
    """A server process and its client."""

    popen: fresh.Process
    client: openai.OpenAI

    @classmethod
    def start(cls, folder: Path, *bases: str) -> Live:
        words = ["serve", "--jobs", *(bases or ["tiny"]), "--port", "0", "--json", "--threads", "1", "--offline"]
        out = folder / "out"
        own = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "FRESH_PYTHON": str(fresh.python())}
        with open(out, "wb") as file:
            popen = fresh.Process("-m", "tunesmith", *words, stdout=file.fileno(), cwd=folder, env=own)

        def url() -> str:
            assert popen.poll() is None, "it has ended"
            lines = [json.loads(line) for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            return next((line["url"] for line in lines if line["kind"] == "serving"), "")

        wait_for(url, timeout_s=120)
        return cls(popen, openai.OpenAI(base_url=f"{url()}/v1", api_key="none", max_retries=0))

    def end(self) -> None:
        self.popen.send_signal(signal.SIGTERM)
        assert self.popen.wait(60) == 0

    def finished(self, job: Any) -> Any:
        """The job, once it has ended, and the answer of its model in the next second."""
        wait_for(lambda: self.client.fine_tuning.jobs.retrieve(job.id).finished_at is not None, timeout_s=180)
        job = self.client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        started = time.monotonic()
        answer = self.answer(job.fine_tuned_model)
        assert time.monotonic() - started < 1
        return job, answer

    def engine(self) -> list[int]:
        """Its process, if it has one now."""
        children = Path(f"/proc/{self.popen.pid}/task").glob("*/children")
        found = [int(pid) for one in children for pid in one.read_text().split()]
        return [pid for pid in found if b"tunesmith.serve.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def answers(self) -> bool:
        with suppress(openai.InternalServerError):
            return self.answer("tiny") is not None
        return False

    def answer(self, model: str) -> str | None:
        messages = [{"role": "user", "content": "hello"}]
        made = self.client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
        return made.choices[0].message.content


def started_again(live: Live, folder: Path, job: Any) -> Live:
    """A new server, after the run of a job was killed in a step and then its server."""
    log = folder / "jobs" / "runs" / job.id / "events.jsonl"
    wait_for(lambda: log.exists() and b'"kind":"step"' in log.read_bytes(), timeout_s=60)
    os.kill(int((log.parents[1] / f".{job.id}.lock").read_text()), signal.SIGKILL)
    live.popen.send_signal(signal.SIGKILL)
    live.popen.wait()
    return Live.start(folder, "--bases", "bases.yaml")


def with_recipe(folder: Path, **options: Any) -> None:
    """A file of bases with the tiny model and options of its runs."""
    (folder / "bases.yaml").write_text(json.dumps({"bases": {"tiny": {"model": "tiny", "recipe": options}}}))


def adapter(folder: Path, job: Any) -> bytes:
    return (folder / "jobs" / "runs" / job.id / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_upload_to_chat_and_bitwise_after_a_kill(tmp_path: Path, is_killed: bool) -> None:
    """A server that is killed at each transaction, with a stand-in for runs: test_dispatcher.py."""
    model_folder(tmp_path / "tiny")
    with_recipe(tmp_path, evaluation={"general": False})
    live = Live.start(tmp_path, "--bases", "bases.yaml")
    try:
        client = live.client
        files = [
            client.files.create(file=chats(tmp_path / f"{name}.jsonl", num, seed=num), purpose="fine-tune").id
            for name, num in (("train", 18), ("valid", 5))
        ]
        body: dict[str, Any] = {
            "model": "tiny", "training_file": files[0], "validation_file": files[1], "suffix": "try", "seed": 7,
            "method": {"type": "supervised", "supervised": {"hyperparameters": HOW}},
        }  # fmt: skip
        before = live.answer("tiny")
        job, tuned = live.finished(client.fine_tuning.jobs.create(**body))
        assert tuned != before, "the tuned model answers as its base does"
        assert live.answer("tiny") == before
        look_at(client, job)
        for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
            assert live.answer(checkpoint.fine_tuned_model_checkpoint)

        if is_killed:
            killed = client.fine_tuning.jobs.create(**body)
            live = started_again(live, tmp_path, killed)
            client = live.client
            assert live.answer(job.fine_tuned_model) == tuned, "models are served again after a restart"
            again, answer = live.finished(killed)
            assert adapter(tmp_path, again) == adapter(tmp_path, job)
            assert answer == tuned
            look_at_steps(client, again)
        assert client.models.delete(job.fine_tuned_model).deleted
        assert job.fine_tuned_model not in [model.id for model in client.models.list()]
        if is_killed:
            assert live.answer(again.fine_tuned_model) == tuned
    finally:
        live.end()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if b"planted-" in path.read_bytes()] == []


NUM_KILLED = int(os.environ.get("TUNESMITH_KILLED_REAL_JOBS", "10"))


def next_target(runs: Path, made: list[str], seen: set[str], draw: random.Random) -> str:
    """What is killed next, after a wait: half of new checks of files and of new results are met in the act."""
    until = time.monotonic() + draw.uniform(1, 2)
    while time.monotonic() < until:
        for name in made:
            state = "put on" if (runs / name / "report.json").exists() else "check"
            is_met = state == "put on" or _holder(runs / f"{name}.check")
            if is_met and f"{state} {name}" not in seen:
                seen.add(f"{state} {name}")
                if draw.random() < 0.5:
                    return f"check {name}" if state == "check" else draw.choice(["server", "engine"])
        time.sleep(0.02)
    return draw.choice(["server", "engine", *(f"run {name}" for name in made if _holder(runs / name))])


def kill(live: Live, what: str, runs: Path) -> bool:
    """Whether it was there to be killed."""
    kind, _, name = what.partition(" ")
    engine = live.engine()
    pids = {"server": live.popen.pid, "engine": engine[0] if engine else None}
    pid = pids[kind] if not name else _holder(runs / (f"{name}.check" if kind == "check" else name))
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(180 + 60 * NUM_KILLED)
def test_ten_jobs_end_the_same_with_kills_each_second_or_two(tmp_path: Path) -> None:
    """The server, a check, a run or the engine, all of them real. Two minutes."""
    model_folder(tmp_path / "tiny")
    with_recipe(tmp_path, checkpoint={"every": 3}, evaluation={"general": False})
    draw, kills = random.Random(3), Counter[str]()
    live = Live.start(tmp_path, "--bases", "bases.yaml")
    try:
        file = live.client.files.create(file=chats(tmp_path / "rows.jsonl", 18), purpose="fine-tune").id
        body: dict[str, Any] = {"model": "tiny", "training_file": file, "hyperparameters": HOW}
        whole = [live.finished(live.client.fine_tuning.jobs.create(seed=seed, **body)) for seed in range(2)]
        said = [usual_events(live.client, job) for job, _ in whole]
        runs, started, made, seen = tmp_path / "jobs" / "runs", time.monotonic(), list[str](), set[str]()
        while (left := [name for name in made if not (runs / name / "report.json").exists()]) or len(made) < NUM_KILLED:
            assert time.monotonic() - started < 30 * (NUM_KILLED + 1), f"{len(left)} of {len(made)} are left: {kills}"
            while len(left) < 3 and len(made) < NUM_KILLED:  # so that files are checked all the time
                left.append(live.client.fine_tuning.jobs.create(seed=len(made) % 2, **body).id)
                made.append(left[-1])
            what = next_target(runs, made, seen, draw)
            if (kills[what] >= 2 and " " in what) or not kill(live, what, runs):  # the third would be its error
                continue
            kills[what] += 1
            if what == "server":
                live.popen.wait()
                live = Live.start(tmp_path, "--bases", "bases.yaml")
        for i, name in enumerate(made):
            wait_for(live.answers, timeout_s=60)
            job, answer = live.finished(live.client.fine_tuning.jobs.retrieve(name))
            assert adapter(tmp_path, job) == adapter(tmp_path, whole[i % 2][0])
            assert answer == whole[i % 2][1]
            assert usual_events(live.client, job) == said[i % 2]
        num = Counter(what.partition(" ")[0] for what in kills.elements())
        print(f"{NUM_KILLED} jobs in {time.monotonic() - started:.0f} s; killed: {dict(num)}")
    finally:
        live.end()


def usual_events(client: openai.OpenAI, job: Any) -> list[str]:
    """What is said of a job without a kill; AssertionError if anything is said twice."""
    found = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    assert len({one.id for one in found}) == len(found)
    messages = [one.message.replace(job.id, "JOB").replace(job.fine_tuned_model, "MODEL") for one in found]
    # Reasons of choices name the memory that is free.
    messages = [re.sub(r"(?s):\w{8}:ckpt|(?<=^Chosen: ).*", "", one) for one in messages]
    return sorted(one for one in messages if "again" not in one and "continues after" not in one)


@pytest.mark.slow
def test_a_job_by_dpo_tunes_a_tuned_model_further(tmp_path: Path) -> None:
    """A minute: three runs as processes."""
    model_folder(tmp_path / "tiny")
    live = Live.start(tmp_path)
    try:
        client = live.client
        rows = client.files.create(file=chats(tmp_path / "rows.jsonl", 18), purpose="fine-tune").id
        first, answer = live.finished(client.fine_tuning.jobs.create(model="tiny", training_file=rows, **OLD))
        liked = client.files.create(file=("pairs.jsonl", pairs(answer)), purpose="fine-tune").id
        how = {"beta": 0.05, **HOW, "n_epochs": 12, "learning_rate_multiplier": 50.0}
        body: dict[str, Any] = {"method": {"type": "dpo", "dpo": {"hyperparameters": how}}, "seed": 1}
        second, other = live.finished(
            client.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=liked, suffix="liked", **body)
        )
        assert second.method.dpo.hyperparameters.model_dump() == how
        assert second.fine_tuned_model.startswith("ft:tiny:tunesmith:liked:")
        assert second.model_extra["tunesmith"]["base"] == first.fine_tuned_model
        assert other != answer == live.answer(first.fine_tuned_model)
        step = list(client.fine_tuning.jobs.checkpoints.list(second.id))[-1].fine_tuned_model_checkpoint
        third, last = live.finished(client.fine_tuning.jobs.create(model=step, training_file=rows, **OLD))
        assert client.models.delete(first.fine_tuned_model).deleted
        live.end()
        live = Live.start(tmp_path)
        assert live.answer(second.fine_tuned_model) == other, "it needs the adapter of the deleted model"
        assert live.answer(third.fine_tuned_model) == last
    finally:
        live.end()


@pytest.mark.slow
def test_other_versions_of_the_client_go_from_upload_to_chat(tmp_path: Path) -> None:
    """OPENAI_CLIENTS: interpreters that have other versions of the openai package, as in PATH."""
    others = os.environ.get("OPENAI_CLIENTS", "")
    if not others:
        pytest.skip("OPENAI_CLIENTS names no interpreter with another version of the openai package")
    model_folder(tmp_path / "tiny")
    chats(tmp_path / "rows.jsonl", 18)
    live = Live.start(tmp_path)
    try:
        for python in (sys.executable, *others.split(os.pathsep)):
            words = [python, str(Path(__file__).with_name("client_flow.py")), str(live.client.base_url), str(tmp_path)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            print(done.stdout, end="")
    finally:
        live.end()


OLD: dict[str, Any] = {"hyperparameters": {"n_epochs": 3, "learning_rate_multiplier": 8.0}, "seed": 3}


def pairs(answer: str | None) -> bytes:
    """Preferences against an answer."""
    lines = []
    for i in range(12):
        sides = {"preferred_output": "a quick brown fox", "non_preferred_output": f"{answer} {i}"}
        said = {key: [{"role": "assistant", "content": side}] for key, side in sides.items()}
        lines.append({"input": {"messages": [{"role": "user", "content": "hello"}]}, **said})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def look_at_steps(client: openai.OpenAI, job: Any) -> None:
    steps = [one.data["step"] for one in client.fine_tuning.jobs.list_events(job.id) if one.type == "metrics"]
    assert sorted(steps) == sorted([*range(1, 25), *range(6, 25, 6)]), "each, and each end of an epoch measured"


def look_at(client: openai.OpenAI, job: Any) -> None:
    """What a succeeded job has, and where."""
    look_at_steps(client, job)
    assert job.fine_tuned_model.startswith("ft:tiny:tunesmith:try:")
    assert job.hyperparameters.model_dump() == HOW
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    assert [one.step_number for one in checkpoints] == [24, 18, 12]
    assert checkpoints[1].fine_tuned_model_checkpoint.endswith(":ckpt-step-18")
    for one in checkpoints:
        assert one.metrics.step == one.step_number
        assert one.metrics.full_valid_loss > 0
        assert one.metrics.full_valid_mean_token_accuracy >= 0
    lines = base64.b64decode(client.files.content(job.result_files[0]).read()).decode().splitlines()
    assert len(lines) == 25
    assert [line.split(",")[0] for line in lines[1:] if line.split(",")[3]] == [str(i) for i in range(6, 25, 6)]
    said = [one.message for one in client.fine_tuning.jobs.list_events(job.id, limit=10)]
    assert said[-1] == f"Created fine-tuning job: {job.id}"
    assert said[0] == "The job has successfully completed"
    assert said[1] == f"New fine-tuned model created: {job.fine_tuned_model}"
    assert "Files validated, moving job to queued state" in said
