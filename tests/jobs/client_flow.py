"""From upload to chat with the openai package of the interpreter that runs this: python client_flow.py URL FOLDER.

Imports nothing of this repository, so that any version of the package can run it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import sys
import time
from pathlib import Path
from typing import Any

import openai

HOW = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 4.0}
HELLO: Any = [{"role": "user", "content": "hello"}]


def wait(client: Any, job: Any) -> Any:
    started = time.monotonic()
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() - started < 120, job
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    return job


def main(url: str, folder: Path) -> None:
    """Raises what goes wrong."""
    client = openai.OpenAI(base_url=url, api_key="none")
    content = (folder / "rows.jsonl").read_bytes()
    named = io.BytesIO(content)
    named.name = "named.jsonl"
    train = client.files.create(file=folder / "rows.jsonl", purpose="fine-tune")
    valid = client.files.create(file=named, purpose="fine-tune")
    assert client.files.create(file=content, purpose="fine-tune").status == "processed"
    assert (train.filename, valid.filename) == ("rows.jsonl", "named.jsonl")
    assert len(list(client.files.list(purpose="fine-tune"))) >= 3
    body: dict[str, Any] = {"model": "tiny", "training_file": train.id, "validation_file": valid.id, "suffix": "flow"}
    job = wait(client, client.fine_tuning.jobs.create(hyperparameters=HOW, **body))
    assert job.fine_tuned_model.startswith("ft:tiny:tunesmith:flow:")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert len({event.id for event in events}) == len(events)
    models = [job.fine_tuned_model]
    if hasattr(client.files, "content"):  # not in 1.1
        lines = base64.b64decode(client.files.content(job.result_files[0]).read()).decode().splitlines()
        assert lines[0].startswith("step,train_loss,")
        assert client.files.with_raw_response.retrieve(train.id).parse().id == train.id
    if hasattr(client.fine_tuning.jobs, "checkpoints"):
        models += [one.fine_tuned_model_checkpoint for one in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
        assert len(models) == 3, "the result twice, and the end of the first epoch"
    if hasattr(client, "uploads"):
        upload = client.uploads.create(bytes=len(content), filename="p", mime_type="text/jsonl", purpose="fine-tune")
        parts = [client.uploads.parts.create(upload.id, data=piece).id for piece in (content[:500], content[500:])]
        done = client.uploads.complete(upload.id, part_ids=parts)
        assert done.file is not None
        assert client.files.content(done.file.id).read() == content
    for model in models:
        made = client.chat.completions.create(model=model, messages=HELLO, max_tokens=8, temperature=0)
        assert made.choices[0].message.content
        assert client.models.retrieve(model).id == model
    asyncio.run(beside(url, job.id, train.id))
    assert client.models.delete(job.fine_tuned_model).deleted
    assert client.files.delete(valid.id).deleted
    print(f"openai {openai.__version__}: {len(events)} events, {len(models)} models")


async def beside(url: str, job: str, file: str) -> None:
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    assert job in [one.id async for one in client.fine_tuning.jobs.list(limit=2)]
    made = await client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert (await client.fine_tuning.jobs.cancel(made.id)).status == "cancelled"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
