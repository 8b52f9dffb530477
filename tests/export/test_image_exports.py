"""Results of models that see: merged and adapter carry the processor and are proved with images; others are refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from export.exports import quick
from tiny_vision import vision_recipe
from tunesmith.errors import InputError
from tunesmith.export.export_run import export_run, refuse_planned
from tunesmith.models.vision import processor_class
from tunesmith.recipe.load import validate
from tunesmith.training.trainer import train


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exports")
    return train(vision_recipe(folder, train={"max_steps": 2}, evaluation={"samples": 0}), root=folder / "runs")


@pytest.mark.parametrize("target", ["merged", "adapter"])
def test_an_export_carries_the_processor_and_is_proved(
    target: str, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    done = export_run(tuned, target, out=tmp_path / "out", offline=True)
    assert done.found.same_ids
    assert done.found.kl < 1e-6
    assert done.found.carried == pytest.approx(1.0, abs=1e-3)
    assert processor_class(done.path) == "LlavaProcessor"
    if target == "merged":
        AutoModelForImageTextToText.from_pretrained(done.path)


@pytest.mark.parametrize("target", ["gguf", "ollama", "onnx"])
def test_other_exports_are_refused_by_name(target: str, tuned: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would hold its language part alone"):
        export_run(tuned, target, out=tmp_path / "out", offline=True)
    planned = validate({**tuned.recipe().model_dump(mode="json"), "export": {"to": [target]}})
    with pytest.raises(InputError, match="mmproj"):
        refuse_planned(planned, offline=True)
