"""What a run does on Apple's device is something that torch can do there."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from mps import kernels, pretended_mps
from serve.batches import Heard, hear
from serve.engines import OPTIONS, says
from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.export.export_run import export_run
from tunesmith.generation.scheduler import Scheduler
from tunesmith.recipe.schema import Recipe
from tunesmith.serve.registry import open_registry
from tunesmith.training.trainer import train


def test_the_pretended_device_refuses_what_mps_refuses() -> None:
    with pretended_mps() as device:
        x = torch.ones(3, device="mps")
        assert (x.device.type, (x * 2).device.type, x.cpu().device.type) == ("mps", "mps", "cpu")
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        assert (x + 1).cpu().double().numpy().tolist() == [2.0, 2.0, 2.0]
        assert not device.missing
        torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 2], device="mps"))
    assert device.missing == {"segment_reduce"}
    assert {"mul.Tensor", "bmm", "index_select", "_fused_adamw_"} <= kernels()
    assert not {"_fused_rms_norm_backward", "segment_reduce"} & kernels()


def of_chats(folder: Path, **sections: Any) -> Recipe:
    return tiny_recipe(folder, device="mps", **{"train": {"epochs": 1}, **sections})


def of_task(folder: Path, task: str, kind: str, **sections: Any) -> Recipe:
    """Full tuning."""
    return task_recipe(folder, task, kind, rows=8, device="mps", train={"epochs": 1}, **sections)


RUNS: dict[str, Callable[[Path], Recipe]] = {
    "lora": of_chats,
    "muon": partial(of_chats, optim={"name": "muon"}),
    "full": partial(of_task, task="chat", kind="causal"),
    "encoder-decoder": partial(of_task, task="summarize", kind="encoder_decoder"),
    "masked words": partial(of_task, task="text", kind="encoder"),
    "preferences": partial(of_task, task="prefer", kind="causal"),
    "rewards": partial(of_task, task="reward", kind="causal"),
    "classes": partial(of_task, task="classify", kind="encoder"),
    "classes, causal": partial(of_task, task="classify", kind="causal"),
    "tags": partial(of_task, task="tag", kind="encoder"),
    "ranks": partial(of_task, task="rank", kind="encoder"),
    "embeddings": partial(of_task, task="embed", kind="encoder"),
}


@pytest.mark.parametrize("run", [pytest.param(name, marks=[] if name == "lora" else pytest.mark.slow) for name in RUNS])
def test_a_run_calls_nothing_that_is_missing_there(tmp_path: Path, run: str) -> None:
    """Loading, measuring before and after, answers, steps, checkpoints and the report. Each call in Python is looked
    at, which takes some seconds; what a layer computes again is not walked: the pretence loses its device there."""
    recipe = RUNS[run](tmp_path)
    with pretended_mps() as device:
        made = train(recipe, root=tmp_path / "runs")
        if run == "lora":
            assert tunesmith.predict(made, ["what is the tallest mountain"], max_new_tokens=4)
    assert {"embedding", "mm"} <= device.called
    assert device.missing == set()


@pytest.mark.slow
def test_served_and_exported_it_calls_nothing_that_is_missing_there(tmp_path: Path) -> None:
    """Answers come from the engine on the device; the export is computed on the processor and proven there."""
    with pretended_mps() as device:
        run = train(of_chats(tmp_path), root=tmp_path / "runs")
        device.called.clear()
        notes: list[str] = []
        serving = open_registry([str(run.path)], root=tmp_path / "runs", options=OPTIONS, note=notes.append)
        served = serving.models[run.path.name]
        assert served.loaded.model.device.type == "mps"
        batch = Scheduler(served.decoder, streams=2)
        for key, text in enumerate(("hello", "what is the tallest mountain")):
            batch.add(served.prepare(key, says(run.path.name, text, max_tokens=5), OPTIONS))
        answered: dict[int, Heard] = defaultdict(Heard)
        while batch.is_busy:
            hear(batch.step(), answered)
        assert [len(answered[key].ended) for key in (0, 1)] == [1, 1]
        assert {"embedding", "mm"} <= device.called
        export_run(run, "merged", out=tmp_path / "merged", offline=True)
    assert device.missing == set()
