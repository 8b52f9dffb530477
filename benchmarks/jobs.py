"""`python -m benchmarks.jobs --model FOLDER`: what a server of fine-tuning jobs costs, beside copying and `tunesmith train`.

One client on the loopback, a store with 10,000 jobs and files. `--only lists` for a part; each prints a line for each bound
of docs/performance.md.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tunesmith.environment import for_child
from tunesmith.jobs.names import derived_id
from tunesmith.jobs.store import Store, event
from tunesmith.jobs.tables import events, files, jobs, models
from tunesmith.runs.folder import Run

EVENTS = 20
"""Of each job that is there from the start."""
BLOCK = 1 << 20
PART_BYTES = 64 << 20
ROW = {
    "messages": [
        {"role": "user", "content": "Where is my order?"},
        {"role": "assistant", "content": "On its way. " * 8},
    ]
}
Words = tuple[str, ...]


def fill(folder: Path, num: int) -> None:
    """A store of `num` files, and as many jobs that have succeeded, each with a model that was deleted."""
    store, now = Store(folder), int(time.time())
    request = {"training_file": "file-a", "validation_file": None, "seed": 1, "metadata": {"team": "a"}, "suffix": None,
               "integrations": [], "method": "supervised", "hyperparameters": {}}  # fmt: skip
    numbers = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    names = [derived_id("ftjob-", i) for i in range(num)]
    with store.writing() as connection:
        connection.execute(sa.insert(files), [
            {"id": derived_id("file-", i), "created_at": now, "purpose": "fine-tune", "filename": f"{i}.jsonl",
             "bytes": 1000, "sha256": ""} for i in range(num)
        ])  # fmt: skip
        connection.execute(sa.insert(jobs), [
            {"id": name, "created_at": now, "status": "succeeded", "finished_at": now, "base": "a", "model": "a",
             "tuned_name": f"ft:{name}", "request": request, "numbers": numbers, "is_checked": True} for name in names
        ])  # fmt: skip
        connection.execute(sa.insert(models), [
            {"name": f"ft:{name}", "created_at": now, "job": name, "base": "a", "step": 9, "metrics": {}, "deleted_at": now}
            for name in names
        ])  # fmt: skip
        for name in names:
            connection.execute(
                sa.insert(events), [event(name, f"Step {i}", once=i, data={"step": i}) for i in range(EVENTS)]
            )
    store.close()


class Server:
    """`tunesmith serve --jobs` in a folder, and connections to it."""

    def __init__(self, folder: Path, words: Words) -> None:
        started = time.perf_counter()
        with open(folder / "server", "wb") as out:
            serve = [sys.executable, "-m", "tunesmith", "serve", "--jobs", *words, "--port", "0", "--json", "--offline"]
            self.process = subprocess.Popen(serve, cwd=folder, stdout=out, env=for_child())
        while b'"serving"' not in (said := (folder / "server").read_bytes()):
            assert self.process.poll() is None, said.decode()
            time.sleep(0.01)
        url = next(json.loads(line)["url"] for line in said.splitlines() if b'"serving"' in line)
        self.host, self.start_s = url.removeprefix("http://"), time.perf_counter() - started
        self.connection = http.client.HTTPConnection(self.host, timeout=300)

    def memory_mb(self) -> float:
        """Most memory of the process without the model."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        raw = body if body is None or hasattr(body, "read") or isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(method, f"/v1{path}", raw, {"Content-Type": "application/json", **headers})
        answer = self.connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        return found

    def upload(self, path: str, content: bytes | Path, name: str, **fields: str) -> Any:
        """A form with a file, streamed from the disk."""
        head = "".join(
            f'--b\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{text}\r\n' for key, text in fields.items()
        )
        head += f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        pieces = blocks(content) if isinstance(content, Path) else iter([content])
        sent = (piece for part in ([head.encode()], pieces, [b"\r\n--b--\r\n"]) for piece in part)
        self.connection.request("POST", f"/v1{path}", sent, {
            "Content-Type": "multipart/form-data; boundary=b", "Content-Length": str(len(head.encode()) + size + 9)
        })  # fmt: skip
        answer = self.connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        return found

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


@contextmanager
def serving(folder: Path, words: Words) -> Iterator[Server]:
    server = Server(folder, words)
    try:
        yield server
    finally:
        server.end()


def timed(what: str, call: Callable[[], Any], num: int) -> None:
    seconds = []
    for _ in range(num):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    p99 = sorted(seconds)[int(0.99 * num)]
    print(f"{what}: p50 {1000 * statistics.median(seconds):.1f} ms, p99 {1000 * p99:.1f} ms", flush=True)


def lists(folder: Path, words: Words, num: int) -> None:
    """Latencies, start and memory with a full store."""
    with serving(folder, (*words, "--store", "empty")) as server:
        empty = server.start_s
    fill(folder / "jobs", num)
    with serving(folder, words) as server:
        print(f"start with {num:,} jobs: {server.start_s - empty:+.2f} s beside {empty:.2f} s with none", flush=True)
        job = server.ask("GET", "/fine_tuning/jobs?limit=1")["data"][0]["id"]
        timed("GET jobs (20)", lambda: server.ask("GET", "/fine_tuning/jobs"), 1000)
        timed("GET job", lambda: server.ask("GET", f"/fine_tuning/jobs/{job}"), 1000)
        timed("GET events (20)", lambda: server.ask("GET", f"/fine_tuning/jobs/{job}/events"), 1000)
        file = server.upload("/files", json.dumps(ROW).encode(), "file", purpose="fine-tune")[
            "id"
        ]  # too few rows to run
        body = {"model": server.ask("GET", "/models")["data"][0]["id"], "training_file": file}
        timed("POST jobs", lambda: server.ask("POST", "/fine_tuning/jobs", body), 300)
        begun = time.perf_counter()
        server.connection.request("GET", "/v1/files")
        answer = server.connection.getresponse()
        answer.read(1)
        first = time.perf_counter() - begun
        answer.read()
        print(f"GET files, all: {time.perf_counter() - begun:.2f} s, first byte {first:.2f} s; "
              f"memory {server.memory_mb():.0f} MB", flush=True)  # fmt: skip


def uploads(folder: Path, words: Words, num_bytes: int, rounds: int = 3) -> None:
    """A file whole and in parts beside a copy with SHA-256 and fsync, in turns."""
    source = folder / "source"
    with open(source, "wb") as file:
        for _ in range(num_bytes // BLOCK):
            file.write(os.urandom(BLOCK))

    def copy() -> None:
        digest, target = hashlib.sha256(), folder / "copy"
        with open(target, "wb") as out:
            for block in blocks(source):
                digest.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        target.unlink()

    def whole() -> None:
        made = server.upload("/files", source, "file", purpose="user_data")
        assert made["bytes"] == num_bytes
        server.ask("DELETE", f"/files/{made['id']}")

    def parts() -> None:
        body = {"bytes": num_bytes, "filename": "f", "mime_type": "text/plain", "purpose": "user_data"}
        upload, ids = server.ask("POST", "/uploads", body)["id"], []
        with open(source, "rb") as file:
            while piece := file.read(PART_BYTES):
                ids.append(server.upload(f"/uploads/{upload}/parts", piece, "data")["id"])
        made = server.ask("POST", f"/uploads/{upload}/complete", {"part_ids": ids})
        server.ask("DELETE", f"/files/{made['file']['id']}")

    with serving(folder, words) as server:
        before, seconds = server.memory_mb(), {}
        for _ in range(rounds):
            for way in (copy, whole, parts):
                begun = time.perf_counter()
                way()
                seconds.setdefault(way.__name__, []).append(time.perf_counter() - begun)
        usual = {name: statistics.median(found) for name, found in seconds.items()}
        for name, found in usual.items():
            print(f"{name}: {num_bytes / found / 1e6:.0f} MB/s, {usual['copy'] / found:.2f} of a copy", flush=True)
        print(f"memory: {server.memory_mb() - before:+.0f} MB", flush=True)
    source.unlink()


def training(folder: Path, words: Words, rounds: int, steps: int) -> None:
    """A job under a server that is asked ten times a second beside `tunesmith train` of its recipe, in turns."""
    batch = 4
    rows = b"".join(json.dumps({**ROW, "n": i}).encode() + b"\n" for i in range(batch * steps))
    ratios, starts, answers = [], [], []
    for num in range(rounds):
        with serving(folder, (*words, "--store", f"store-{num}")) as server:
            file = server.upload("/files", rows, "file", purpose="fine-tune")["id"]
            how = {"n_epochs": 1, "batch_size": batch}
            body = {
                "model": server.ask("GET", "/models")["data"][0]["id"],
                "training_file": file,
                "hyperparameters": how,
            }
            begun = time.time()
            job = server.ask("POST", "/fine_tuning/jobs", {**body, "seed": 1})["id"]
            while (state := server.ask("GET", f"/fine_tuning/jobs/{job}"))["status"] != "succeeded":
                assert state["status"] != "failed", state
                server.ask("GET", f"/fine_tuning/jobs/{job}/events")
                time.sleep(0.1)
            asked = time.perf_counter()
            ask = {"model": state["fine_tuned_model"], "messages": ROW["messages"][:1], "max_tokens": 1}
            server.ask("POST", "/chat/completions", ask)
            answers.append(time.perf_counter() - asked)
        there = folder / f"store-{num}"
        recipe = there / "recipes" / f"{job}.yaml"
        train = [
            sys.executable,
            "-m",
            "tunesmith",
            "train",
            "--recipe",
            str(recipe),
            "--out",
            f"alone-{num}",
            "--offline",
        ]
        subprocess.run([*train, "--json"], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=for_child())
        served, alone = (step_seconds(Run(path)) for path in (there / "runs" / job, folder / f"alone-{num}"))
        first = next(one.time for one in Run(there / "runs" / job).events() if one.kind == "step")
        starts.append(first - begun)
        ratios.append(alone / served)
        print(f"round {num + 1}: a step takes {served:.3f} s under the server, {alone:.3f} s alone", flush=True)
    print(f"speed beside `tunesmith train`: {statistics.median(ratios):.3f}; create → first step "
          f"{statistics.median(starts):.1f} s; succeeded → answer {statistics.median(answers):.2f} s")  # fmt: skip


def step_seconds(run: Run) -> float:
    """Median of all steps but the first three."""
    times = [one.time for one in run.events() if one.kind == "step"]
    return statistics.median(b - a for a, b in zip(times[3:], times[4:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--only", choices=["lists", "uploads", "training"], action="append")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the upload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--work", help="folder on the disk that is measured; default: a temporary one")
    options = parser.parse_args()
    words = (str(Path(options.model).resolve()),)
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        for name in options.only or ("lists", "uploads", "training"):
            (folder := Path(place, name)).mkdir()
            if name == "lists":
                lists(folder, words, options.jobs)
            elif name == "uploads":
                uploads(folder, words, int(options.gib * 2**30), options.rounds)
            else:
                training(folder, words, options.rounds, options.steps)


if __name__ == "__main__":
    main()
