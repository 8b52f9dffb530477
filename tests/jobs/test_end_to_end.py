"""`tunesmith serve --jobs` as a process, a tiny model, and the unmodified openai client from upload to chat."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from serve.running import wait_for  # noqa: E402
from tiny_run import chats, model_folder  # noqa: E402

SOURCE = str(Path(__file__).parents[2] / "src")
HOW = {"n_epochs": 12, "batch_size": 3, "learning_rate_multiplier": 4.0}


@dataclass
class Live:
    """A server process and its client."""

    popen: subprocess.Popen[bytes]
    client: openai.OpenAI

    @classmethod
    def start(cls, folder: Path) -> Live:
        words = ["serve", "--jobs", "tiny", "--port", "0", "--json", "--threads", "1", "--offline"]
        out = folder / "out"
        with open(out, "wb") as file:
            popen = subprocess.Popen(
                [sys.executable, "-m", "tunesmith", *words], stdout=file, cwd=folder,
                env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

        def url() -> str:
            assert popen.poll() is None, "it has ended"
            lines = [json.loads(line) for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            return next((line["url"] for line in lines if line["kind"] == "serving"), "")

        wait_for(url, timeout_s=120)
        return cls(popen, openai.OpenAI(base_url=f"{url()}/v1", api_key="none", max_retries=0))

    def finished(self, job: Any) -> Any:
        """The job, once it has ended, and the answer of its model in the next second."""
        wait_for(lambda: self.client.fine_tuning.jobs.retrieve(job.id).finished_at is not None, timeout_s=180)
        job = self.client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        started = time.monotonic()
        answer = self.answer(job.fine_tuned_model)
        assert time.monotonic() - started < 1
        return job, answer

    def answer(self, model: str) -> str | None:
        messages = [{"role": "user", "content": "hello"}]
        made = self.client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
        return made.choices[0].message.content


def adapter(folder: Path, job: Any) -> bytes:
    return (folder / "jobs" / "runs" / job.id / "adapter" / "adapter_model.safetensors").read_bytes()


def test_upload_to_chat_and_bitwise_after_a_kill(tmp_path: Path) -> None:
    model_folder(tmp_path / "tiny")
    live = Live.start(tmp_path)
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

        killed = client.fine_tuning.jobs.create(**body)
        log = tmp_path / "jobs" / "runs" / killed.id / "events.jsonl"
        wait_for(lambda: log.exists() and b'"kind":"step"' in log.read_bytes(), timeout_s=60)
        os.kill(int((log.parents[1] / f".{killed.id}.lock").read_text()), signal.SIGKILL)
        live.popen.kill()
        live.popen.wait()
        live = Live.start(tmp_path)
        client = live.client
        assert live.answer(job.fine_tuned_model) == tuned, "models are served again after a restart"
        again, answer = live.finished(killed)
        assert adapter(tmp_path, again) == adapter(tmp_path, job)
        assert answer == tuned
        steps = [one.data["step"] for one in client.fine_tuning.jobs.list_events(again.id) if one.type == "metrics"]
        assert sorted(steps) == [*range(1, 73), 72]

        assert client.models.delete(job.fine_tuned_model).deleted
        assert job.fine_tuned_model not in [model.id for model in client.models.list()]
        assert live.answer(again.fine_tuned_model) == tuned
    finally:
        live.popen.terminate()
        assert live.popen.wait(60) == 0


def look_at(client: openai.OpenAI, job: Any) -> None:
    """What a succeeded job has, and where."""
    assert job.fine_tuned_model.startswith("ft:tiny:tunesmith:try:")
    assert job.hyperparameters.model_dump() == HOW
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoint.step_number == 72
    assert checkpoint.metrics.full_valid_loss > 0
    lines = base64.b64decode(client.files.content(job.result_files[0]).read()).decode().splitlines()
    assert len(lines) == 73
    assert lines[-1].split(",")[3] != ""
    said = [one.message for one in client.fine_tuning.jobs.list_events(job.id, limit=10)]
    assert said[-1] == f"Created fine-tuning job: {job.id}"
    assert said[0] == "The job has successfully completed"
    assert said[1] == f"New fine-tuned model created: {job.fine_tuned_model}"
    assert "Files validated, moving job to queued state" in said
