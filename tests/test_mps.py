"""What a run does on Apple's device is something that torch can do there."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from mps import kernels, pretended_mps
from tiny_run import tiny_recipe
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


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "full", "rank": None, "alpha": None, "dropout": None}},
        {"optim": {"name": "muon"}},
        {"train": {"checkpointed_layers": 2}},
    ],
    ids=["lora", "full", "muon", "recomputed"],
)
def test_a_run_calls_nothing_that_is_missing_there(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Loading, measuring before and after, answers, steps, checkpoints and the report."""
    recipe = tiny_recipe(tmp_path, device="mps", **sections)
    with pretended_mps() as device:
        run = train(recipe, root=tmp_path / "runs")
        assert tunesmith.predict(run, ["what is the tallest mountain"])
    assert {"_softmax", "embedding", "mm"} <= device.called
    assert device.missing == set()
