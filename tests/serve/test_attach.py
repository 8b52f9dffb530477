"""Runs are put on a base that answers, and taken off, without a difference to any answer."""

from __future__ import annotations

import json
import queue
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_run import tiny_recipe
from tunesmith.errors import ModelError, RunError
from tunesmith.generation.scheduler import Scheduler
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import Delta, EngineOptions, GenerationRequest
from tunesmith.serve.registry import Registry, open_registry
from tunesmith.serve.served_model import ServedModel
from tunesmith.serve.worker import Worker
from tunesmith.training.trainer import train

OPTIONS = EngineOptions(attaches=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("attached")
    return train(
        tiny_recipe(folder, train={"epochs": 1}), root=folder / "runs", out=folder / "runs" / "r", offline=True
    )


@pytest.fixture
def registry(run: Run) -> Registry:
    base = run.recipe().model
    return open_registry([base], root=Path("nowhere"), options=OPTIONS, note=lambda text: None)


def test_the_error_of_a_run_that_cannot_be_read_keeps_its_words() -> None:
    def read_run(name: str, run: Path) -> None:
        raise OSError("the disk is gone")

    worker, sent = object.__new__(Worker), []
    worker.inbox, worker._wanted, worker._send = queue.SimpleQueue(), set(), sent.append
    worker._registry = SimpleNamespace(read_run=read_run)
    worker._try(1, worker._read_run, "a", Path())
    [[(_, error)]] = sent
    assert (error.code, str(error)) == ("not_servable", "OSError: the disk is gone")


def texts(registry: Registry, asked: list[tuple[str, str]], at: dict[int, object]) -> list[str]:
    """Answers of a batch, one request (model, text) each; `at`: what happens before a step."""
    [decoder] = registry.decoders
    scheduler = Scheduler(decoder, streams=8)
    written = [""] * len(asked)
    for key, (name, text) in enumerate(asked):
        request = GenerationRequest(name, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=12)
        scheduler.add(registry.find(name, ServedModel).prepare(key, request, OPTIONS))
    step = 0
    while scheduler.is_busy:
        if step in at:
            at[step]()  # type: ignore[operator]
        for key, event in scheduler.step():
            if isinstance(event, Delta):
                written[key] += event.text
        step += 1
    assert step > max(at, default=0)
    return written


def test_answers_under_way_stay_and_the_run_answers_as_from_the_start(run: Run, registry: Registry) -> None:
    base = next(iter(registry.models))
    asked = [(base, "hello"), (base, "the quick brown fox jumps over")]
    expected = texts(registry, asked, {})
    found = texts(registry, asked, {3: lambda: registry.attach(registry.read_run("ft:x", run.path))})
    assert found == expected

    whole = open_registry([str(run.path)], root=run.path.parent, options=EngineOptions(), note=lambda text: None)
    tuned = texts(whole, [("r", "hello")], {})
    assert texts(registry, [("ft:x", "hello"), *asked], {}) == [*tuned, *expected]
    assert tuned[0] != expected[0]

    # An answer that is under way is finished by the run that is taken off, which is dropped when none is.
    assert texts(registry, [("ft:x", "hello"), *asked], {3: lambda: registry.detach("ft:x")}) == [*tuned, *expected]
    assert "ft:x" not in registry.models
    registry.drop_detached()
    assert registry.detached == set()
    assert texts(registry, asked, {}) == expected
    registry.attach(registry.read_run("ft:x", run.path))
    assert texts(registry, [("ft:x", "hello")], {}) == tuned


def test_a_run_that_started_from_another_answers_on_the_base_of_both(run: Run, registry: Registry) -> None:
    folder = run.path.parents[1]
    recipe = run.recipe().model_copy(update={"model": str(run.path), "seed": 5})
    second = train(recipe, root=folder / "runs", out=folder / "runs" / "second", offline=True)
    assert second.started_from() == run
    registry.attach(registry.read_run("ft:x", run.path))
    registry.attach(registry.read_run("ft:y", second.path))
    whole = open_registry([str(second.path)], root=run.path.parent, options=EngineOptions(), note=lambda text: None)
    asked = ["hello", "the quick brown fox jumps over", "yes please"]
    tuned = texts(whole, [("second", text) for text in asked], {})
    assert texts(registry, [("ft:y", text) for text in asked], {}) == tuned
    assert texts(registry, [("ft:x", text) for text in asked], {}) != tuned
    config = run.adapter_path / "adapter_config.json"
    kept = config.read_bytes()
    config.write_bytes(kept + b" ")
    try:
        with pytest.raises(RunError, match="not as the run left it"):  # the adapter below it counts too
            registry.read_run("ft:z", second.path)
    finally:
        config.write_bytes(kept)


def test_a_run_that_does_not_fit_is_refused_and_nothing_changes(run: Run, registry: Registry, tmp_path: Path) -> None:
    base = next(iter(registry.models))
    expected = texts(registry, [(base, "hello")], {})

    def damaged(name: str, change) -> Path:
        shutil.copytree(run.path, tmp_path / name)
        weights = tmp_path / name / "adapter" / "adapter_model.safetensors"
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)
        (tmp_path / name / "result.json").unlink()
        return tmp_path / name

    path = damaged("nan", lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()])
    with pytest.raises(ModelError, match="holds NaN or infinite values"):
        registry.read_run("ft:nan", path)
    found = registry.read_run("ft:zero", damaged("zero", lambda tensors: [one.zero_() for one in tensors.values()]))
    with pytest.raises(RunError, match="changes nothing"):
        registry.attach(found)
    shutil.copytree(run.path, tmp_path / "changed")
    config = tmp_path / "changed" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    with pytest.raises(RunError, match="not as the run left it"):
        registry.read_run("ft:changed", tmp_path / "changed")
    assert list(registry.models) == [base]
    assert texts(registry, [(base, "hello")], {}) == expected
