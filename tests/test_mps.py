"""What a run does on Apple's device is something that torch can do there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from mps import kernels, pretended_mps
from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.recipe.schema import Recipe
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
    return tiny_recipe(folder, device="mps", train={"epochs": 1}, **sections)


def of_task(folder: Path, task: str, kind: str) -> Recipe:
    """Full tuning."""
    return task_recipe(folder, task, kind, rows=8, device="mps", train={"epochs": 1})


RUNS: dict[str, Callable[[Path], Recipe]] = {
    "lora": of_chats,
    "muon": partial(of_chats, optim={"name": "muon"}),
    "full": partial(of_task, task="chat", kind="causal"),
    "preferences": partial(of_task, task="prefer", kind="causal"),
    "embeddings": partial(of_task, task="embed", kind="encoder"),
}


@pytest.mark.parametrize("run", [pytest.param(name, marks=[] if name == "lora" else pytest.mark.slow) for name in RUNS])
def test_a_run_calls_nothing_that_is_missing_there(tmp_path: Path, run: str) -> None:
    """Loading, measuring before and after, answers, steps, checkpoints and the report. Each call in Python is looked
    at, which takes some seconds; what is computed in a layer again is not walked."""
    recipe = RUNS[run](tmp_path)
    with pretended_mps() as device:
        made = train(recipe, root=tmp_path / "runs")
        if run == "lora":
            assert tunesmith.predict(made, ["what is the tallest mountain"], max_new_tokens=4)
    assert {"_safe_softmax", "embedding", "mm"} <= device.called
    assert device.missing == set()
