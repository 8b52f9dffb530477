"""What is kept for a next run is used again where all that it follows from is the same, and never otherwise."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_tasks import task_recipe
from tunesmith.data.tokenizer import fingerprint
from tunesmith.errors import RunError
from tunesmith.runs.folder import RESULT, Run
from tunesmith.training import reference
from tunesmith.training.inputs import start_from
from tunesmith.training.same_run import refuse_other_run
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import train

LORA = {"name": "lora", "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("kept")
    recipe = task_recipe(folder, "chat", "causal", method=LORA, dropout=0.0, train={"max_steps": 2})
    return train(recipe, root=folder / "runs")


def merged_weights(run: Run) -> dict[str, torch.Tensor]:
    start_from(str(run.path), root=run.path.parent, offline=True)
    return load_file(run.merged_path / "model.safetensors")


def test_a_merged_base_is_that_of_the_adapter_that_is_there(tuned: Run) -> None:
    """Also of one that was put back with its old time."""
    first = merged_weights(tuned)
    made = (tuned.merged_path / "model.safetensors").stat().st_mtime_ns
    merged_weights(tuned)
    assert (tuned.merged_path / "model.safetensors").stat().st_mtime_ns == made
    file = tuned.adapter_path / "adapter_model.safetensors"
    was = os.stat(file)
    tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    (tuned.path / RESULT).unlink()  # which knows the adapter by hash, and says how to use another one
    second = merged_weights(tuned)
    assert any(not torch.equal(second[name], tensor) for name, tensor in first.items())


def test_a_run_says_which_rows_it_found_again(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "chat", "causal", method=LORA, dropout=0.0, train={"max_steps": 1})
    runs = [train(recipe, root=tmp_path / "runs") for _ in range(2)]
    first, again = ([event.values["text"] for event in run.events() if event.kind == "note"] for run in runs)
    assert not any("encoded before" in note for note in first)
    identity = runs[1].identity()
    keys = " and ".join(identity[name][:16] for name in ("rows", "held-out rows"))
    words = "24 training and 8 held-out rows of these files were encoded before by this tokenizer, and are used again"
    assert f"{words} (.rows/{keys})" in again


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It named its tokenizer by a probe, and its rows by that; its files are those of now by their hashes."""
    recipe = task_recipe(tmp_path, "chat", "causal", method=LORA, dropout=0.0, train={"max_steps": 3})
    setup = prepare(recipe, root=tmp_path / "runs")
    named = fingerprint(setup.renderer.tokenizer, setup.renderer._encoder.template_text, vocabulary=False)
    earlier = {"tokenizer and template": named, "rows": "of version 4", "held-out rows": "of version 4"}
    run: Any = SimpleNamespace(path=tmp_path)
    refuse_other_run(run, setup, {**setup.identity, **earlier}, [])
    for other in ({"rows": "others"}, {**earlier, "tokenizer and template": "another"}):
        with pytest.raises(RunError, match="cannot resume exactly"):
            refuse_other_run(run, setup, {**setup.identity, **other}, [])


def digest(**changes: Any) -> str:
    """Of the reference of some rows, with one thing changed."""
    own = {"precision": "float32", "kernels": "fast", "device": "cpu", "threads": 1, "seed": 0, "rank": 4, "tokens": 64,
           "weights": "a", "layout": "packed", "shares": True, "pads": False, "rows": (0, 1), **changes}  # fmt: skip
    method = SimpleNamespace(model_dump=lambda mode: {"name": "lora", "rank": own["rank"]})
    names = ("precision", "kernels", "device", "threads", "seed")
    recipe = SimpleNamespace(method=method, **{key: own[key] for key in names})
    setup: Any = SimpleNamespace(
        recipe=recipe,
        identity={"model weights": own["weights"], "data x": own.get("data", "x")},
        sampler=SimpleNamespace(tokens_per_pass=own["tokens"]),
    )
    collator: Any = SimpleNamespace(**{key: own[key] for key in ("layout", "shares", "pads")})
    return reference._digest(setup, np.array(own["rows"]), collator)


CHANGES = {"precision": "bfloat16", "kernels": "plain", "device": "cuda", "threads": 2, "seed": 1, "rank": 8,
           "tokens": 32, "weights": "b", "layout": "padded", "shares": False, "pads": True, "rows": (0, 2)}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_of_the_key_of_a_reference_counts(name: str) -> None:
    assert digest(**{name: CHANGES[name]}) != digest() == digest(data="another name")


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_reference_of_another_library_is_another(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    monkeypatch.setattr(getattr(reference, library), "__version__", "0.0")
    assert digest() != before
