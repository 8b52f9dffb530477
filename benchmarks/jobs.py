"""`python -m benchmarks.jobs --model FOLDER`: a server of fine-tuning jobs, beside a copy and `tunesmith train`.

One client on the loopback, a store with 10,000 jobs and files. `--only lists` for a part. Results: performance.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from tunesmith.environment.children import for_child
from tunesmith.jobs import tables
from tunesmith.jobs.names import derived_id
from tunesmith.jobs.store import Store, event
from tunesmith.runs.folder import Run

BLOCK, PART_BYTES, NUM_JOBS, NUM_EVENTS = 1 << 20, 64 << 20, 10_000, 20
ASK = [{"role": "user", "content": "Where is my order?"}]
ROW = {"messages": [*ASK, {"role": "assistant", "content": "On its way. " * 8}]}
JOBS = "/fine_tuning/jobs"
PYTHON = [sys.executable, "-m", "tunesmith"]


def fill(folder: Path) -> None:
    """A store of files, and as many jobs that have succeeded, each with events and a model that was deleted."""
    store, now = Store(folder), int(time.time())
    request = dict.fromkeys(("training_file", "validation_file", "suffix", "seed", "metadata"))
    file = {"purpose": "fine-tune", "filename": "a.jsonl", "bytes": 1000, "sha256": ""}
    job = {"status": "succeeded", "finished_at": now, "base": "a", "model": "a", "is_checked": True, "numbers": {}}
    job["request"] = {**request, "integrations": []}
    model = {"base": "a", "step": 9, "metrics": {}, "deleted_at": now}
    ids = [derived_id("ftjob-", i) for i in range(NUM_JOBS)]
    rows: dict[sa.Table, Iterable[dict[str, Any]]] = {
        tables.files: ({"id": derived_id("file-", one), **file} for one in ids),
        tables.jobs: ({"id": one, "tuned_name": one, **job} for one in ids),
        tables.models: ({"name": one, "job": one, **model} for one in ids),
        tables.events: (event(one, f"Step {i}", once=i, data={"step": i}) for one in ids for i in range(NUM_EVENTS)),
    }
    with store.writing() as connection:
        for table, content in rows.items():
            connection.execute(sa.insert(table), [{"created_at": now, **row} for row in content])
    store.close()


class Server:
    """`tunesmith serve --jobs` in a folder, and a connection to it."""

    def __init__(self, folder: Path, *words: str) -> None:
        started, out = time.perf_counter(), folder / "server"
        serve = [*PYTHON, "serve", "--jobs", *words, "--port", "0", "--json", "--offline"]
        with open(out, "wb") as file:
            self.process = subprocess.Popen(serve, cwd=folder, stdout=file, env=for_child())
        while b'"serving"' not in (said := out.read_bytes()):
            assert self.process.poll() is None, said.decode()
            time.sleep(0.01)
        url = next(json.loads(line)["url"] for line in said.splitlines() if b'"serving"' in line)
        self.start_s = time.perf_counter() - started
        self.connection = HTTPConnection(url.removeprefix("http://"), timeout=300)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def memory_mb(self) -> float:
        """Most memory of the process that has no model."""
        return int(Path(f"/proc/{self.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1000

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, f"/v1{path}", body, {"Content-Type": "application/json", **named})
        return self.connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return read(self.send(method, path, None if body is None else json.dumps(body)))

    def look(self, path: str) -> bytes:
        """The body of an answer, by a client that costs next to nothing: it stands for one on another machine."""
        line = self.connection.sock
        line.sendall(f"GET /v1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head, _, body = line.recv(1 << 20).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < size:
            body += line.recv(1 << 20)
        return body

    def upload(self, path: str, name: str, size: int, pieces: Iterable[bytes], purpose: str = "") -> Any:
        """A form with a file, as it is read."""
        form = "--b\r\nContent-Disposition: form-data; name="
        head = f'{form}"purpose"\r\n\r\n{purpose}\r\n' if purpose else ""
        head += f'{form}"{name}"; filename="f"\r\n\r\n'
        body, length = chain([head.encode()], pieces, [b"\r\n--b--\r\n"]), str(len(head) + size + 9)
        kind = "multipart/form-data; boundary=b"
        return read(self.send("POST", path, body, **{"Content-Type": kind, "Content-Length": length}))


def read(answer: HTTPResponse) -> Any:
    found = json.loads(answer.read())
    assert answer.status == 200, found
    return found


def blocks(path: Path, size: int = BLOCK) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


class OtherPrograms:
    """The share of all cores that programs take which this one has not started, from here on."""

    def __init__(self) -> None:
        self.before, self.at = self.seconds(), time.monotonic()

    @staticmethod
    def seconds() -> float:
        """So far, and idle time with it."""
        whole, own = psutil.cpu_times(), psutil.Process()
        spent = sum(sum(one.cpu_times()[:4]) for one in (own, *own.children(recursive=True)))
        return float(sum(whole[:8]) - whole.idle - whole.iowait - spent)

    def share(self) -> float:
        return (self.seconds() - self.before) / (time.monotonic() - self.at) / (os.cpu_count() or 1)


def lists(folder: Path, options: argparse.Namespace) -> None:
    """Latencies, start and memory with a full store."""
    with Server(folder, options.model, "--store", "empty") as server:
        empty = server.start_s
    fill(folder / "jobs")
    with Server(folder, options.model) as server:
        print(f"start with {NUM_JOBS:,} jobs: {server.start_s - empty:+.2f} s beside {empty:.2f} s with none")
        job = server.ask("GET", JOBS)["data"][0]["id"]
        few = json.dumps(ROW).encode()  # too few rows for a run
        file = server.upload("/files", "file", len(few), [few], "fine-tune")["id"]
        body = {"model": server.ask("GET", "/models")["data"][0]["id"], "training_file": file}
        asks = [("GET", path, None, 1000) for path in (JOBS, f"{JOBS}/{job}", f"{JOBS}/{job}/events")]
        for method, path, sent, num in (*asks, ("POST", JOBS, body, 300)):
            seconds = sorted(timed(partial(server.ask, method, path, sent)) for _ in range(num))
            p50, p99 = 1000 * seconds[num // 2], 1000 * seconds[num * 99 // 100]
            print(f"{method} {path.replace(job, 'ID')}: p50 {p50:.1f} ms, p99 {p99:.1f} ms", flush=True)
        begun = time.perf_counter()
        answer = server.send("GET", "/files")
        first = time.perf_counter() - begun
        num = len(read(answer)["data"])
        print(f"GET files: {num:,} in {time.perf_counter() - begun:.2f} s, first byte after {first:.2f} s")
        print(f"memory without the model: {server.memory_mb():.0f} MB")


def uploads(folder: Path, options: argparse.Namespace) -> None:
    """A file whole and in parts beside a copy with SHA-256 and fsync, in turns."""
    source, target, num_bytes = folder / "source", folder / "copy", int(options.gib * 2**30) // BLOCK * BLOCK
    with open(source, "wb") as file:
        for _ in range(num_bytes // BLOCK):
            file.write(os.urandom(BLOCK))

    def copy() -> None:
        digest = hashlib.sha256()
        with open(target, "wb") as out:
            for block in blocks(source):
                digest.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())

    def parts() -> None:
        body = {"bytes": num_bytes, "filename": "f", "mime_type": "text/plain", "purpose": "user_data"}
        path = f"/uploads/{server.ask('POST', '/uploads', body)['id']}"
        sent = (server.upload(f"{path}/parts", "data", len(part), [part]) for part in blocks(source, PART_BYTES))
        server.ask("POST", f"{path}/complete", {"part_ids": [part["id"] for part in sent]})

    seconds: dict[str, list[float]] = {"copy": [], "whole": [], "in parts": []}
    with Server(folder, options.model) as server:
        before = server.memory_mb()
        for _ in range(options.rounds):
            whole = partial(server.upload, "/files", "file", num_bytes, blocks(source), "user_data")
            for name, way in zip(seconds, (copy, whole, parts), strict=True):
                seconds[name].append(timed(way))
                for one in server.ask("GET", "/files")["data"]:
                    server.ask("DELETE", f"/files/{one['id']}")
                target.unlink(missing_ok=True)
        for name, found in seconds.items():
            share = statistics.median(a / b for a, b in zip(seconds["copy"], found, strict=True))
            print(f"{name}: {num_bytes / statistics.median(found) / 1e6:.0f} MB/s, {share:.2f} of a copy")
        print(f"memory: {server.memory_mb() - before:+.0f} MB")


def training(folder: Path, options: argparse.Namespace) -> None:
    """A job under a server that is asked ten times a second beside `tunesmith train` of its recipe, in turns."""
    rows = b"".join(json.dumps({**ROW, "n": i}).encode() + b"\n" for i in range(4 * options.steps))
    ratios, starts, answers, polls = [], [], [], list[float]()
    for num in range(options.rounds):
        there, alone = folder / f"store-{num}", folder / f"alone-{num}"
        with Server(folder, options.model, "--store", there.name) as server:
            body = {"hyperparameters": {"n_epochs": 1, "batch_size": 4}, "seed": 1}
            body["training_file"] = server.upload("/files", "file", len(rows), [rows], "fine-tune")["id"]
            body["model"], begun = server.ask("GET", "/models")["data"][0]["id"], time.time()
            job, count, others = server.ask("POST", JOBS, body)["id"], 0, OtherPrograms()
            while b'"status":"succeeded"' not in (said := server.look(f"{JOBS}/{job}")):
                assert b'"status":"failed"' not in said, said
                if (count := count + 1) % 10 == 0:
                    polls.append(timed(partial(server.look, JOBS)))
                time.sleep(0.1)
            state, shares = json.loads(said), [others.share()]
            ask = {"model": state["fine_tuned_model"], "messages": ASK, "max_tokens": 1}
            answers.append(timed(partial(server.ask, "POST", "/chat/completions", ask)))
        train = [*PYTHON, "train", "--recipe", str(there / "recipes" / f"{job}.yaml"), "--out", str(alone), "--json"]
        others = OtherPrograms()
        subprocess.run([*train, "--offline"], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=for_child())
        times = [[one.time for one in Run(run).events() if one.kind == "step"] for run in (alone, there / "runs" / job)]
        ours, theirs = (statistics.median(b - a for a, b in pairwise(found[3:])) for found in times)
        ratios.append(ours / theirs)
        starts.append(times[1][0] - begun)
        shares.append(others.share())
        print(f"round {num + 1}: a step takes {theirs:.3f} s under the server, {ours:.3f} s alone", end="; ")
        print(f"other programs took {shares[0]:.1%} and {shares[1]:.1%} of the cores", flush=True)
    print(f"training beside `tunesmith train`: {statistics.median(ratios):.3f} of its speed")
    print(f"GET jobs with a run under way: p99 {1000 * sorted(polls)[len(polls) * 99 // 100]:.1f} ms")
    print(f"create → first step: {statistics.median(starts):.1f} s; succeeded → answer: {max(answers):.2f} s at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=lambda text: str(Path(text).resolve()), help="of a chat")
    parser.add_argument("--only", choices=(parts := {one.__name__: one for one in (lists, uploads, training)}))
    parser.add_argument("--gib", type=float, default=2.0, help="size of the upload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    for name in [options.only] if options.only else parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), options)


if __name__ == "__main__":
    main()
