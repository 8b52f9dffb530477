"""A run on a quantised base: stopped and resumed, answered from, exported."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.exports import quick
from serve.engines import OPTIONS
from tiny_run import same_run, stop_at, tiny_recipe
from tunesmith.errors import ExportError, InputError, Stopped
from tunesmith.export import verify
from tunesmith.export.export_run import export_run
from tunesmith.export.target import ExportOptions
from tunesmith.export.verify import ExportComparison, compare
from tunesmith.inference.load import LoadedModel, load_base, load_run
from tunesmith.models.quantized import QuantizedLinear
from tunesmith.runs.folder import Run
from tunesmith.serve.registry import open_registry
from tunesmith.training.trainer import resume, train


@pytest.fixture(scope="module", params=["nf4", "int8"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(f"qlora-{request.param}")
    method = {"name": "qlora", "quant": request.param, "rank": 4, "alpha": 8, "dropout": 0.1}
    return train(tiny_recipe(folder, dropout=0.1, method=method), root=folder / "runs")


def answers(speaker: LoadedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = speaker.model(torch.arange(20)[None]).logits
    return logits


def test_stopped_and_resumed_is_the_same_run(finished: Run) -> None:
    """Packing is deterministic, so that the base is the same in every process."""
    folder = finished.path.parents[1]
    with pytest.raises(Stopped):
        train(finished.recipe(), out=folder / "stopped", listener=stop_at(5))
    same_run(resume(Run.open(str(folder / "stopped"), folder)), finished)


def test_what_was_packed_is_said_in_the_plan_and_when_it_answers(finished: Run) -> None:
    plan = next(event.values for event in finished.events() if event.kind == "plan")
    said = next(note for note in plan["warnings"] if note.startswith("the base is quantised to "))
    assert load_run(finished).note == load_base(finished).note == said


def test_the_start_names_the_version_of_what_packs(finished: Run) -> None:
    start = next(event.values for event in finished.events() if event.kind == "start")
    assert start["versions"]["bitsandbytes"] == version("bitsandbytes")


def test_a_run_answers_from_the_base_that_it_was_trained_on(finished: Run) -> None:
    live, on_plain = load_run(finished), load_run(finished, as_trained=False)
    assert any(isinstance(module, QuantizedLinear) for module in live.model.modules())
    assert not any(isinstance(module, QuantizedLinear) for module in on_plain.model.modules())
    assert not torch.equal(answers(live), answers(on_plain))
    with live.adapter_disabled():
        assert torch.equal(answers(live), answers(load_base(finished)))


def test_an_export_is_on_the_base_as_it_was_and_says_what_that_does_to_the_loss(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    done = export_run(finished, "merged", out=finished.path / "original")
    moved = done.found.loss_exported - done.found.loss_tuned
    assert moved != 0
    quant = finished.recipe().method.quant
    assert done.notes[-1] == (
        f"trained on its base in {quant}, exported on the original base: held-out loss {done.found.loss_exported:.4f}, "
        f"{moved:+.4f} from the tuned model's"
    )
    # Weights are those of the 16-bit base plus delta.
    assert done.found.distance <= done.allowed.weights


def test_the_weights_that_were_tuned_on_can_be_exported_instead(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision is float32 here, so that the merge is held to rounding alone."""
    quick(monkeypatch)
    done = export_run(
        finished, "merged", out=finished.path / "dequantized", options=ExportOptions(merge_into="dequantized")
    )
    assert done.allowed.kl == 1e-6
    assert done.found.carried == pytest.approx(1, abs=1e-3)
    assert done.found.loss_exported == pytest.approx(done.found.loss_tuned, abs=1e-5)


@pytest.mark.parametrize(("moved", "is_refused"), [(0.03, True), (-0.3, False)])
def test_a_merge_that_does_worse_is_refused_with_a_way_out(
    finished: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moved: float, is_refused: bool
) -> None:
    quick(monkeypatch)
    found = compare

    def seen_to_move(*seen: Any, **how: Any) -> ExportComparison:
        right = found(*seen, **how)
        assert right.loss_tuned is not None
        return replace(right, loss_exported=right.loss_tuned + moved, loss_error=0.0)

    monkeypatch.setattr(verify, "compare", seen_to_move)
    refused = pytest.raises(ExportError, match="--merge-into dequantized takes the weights it was tuned on")
    with refused if is_refused else nullcontext():
        export_run(finished, "merged", out=tmp_path / "merged")
    assert (tmp_path / "merged").exists() != is_refused


def test_only_a_quantised_base_can_be_unpacked(tmp_path: Path) -> None:
    run = train(tiny_recipe(tmp_path), root=tmp_path / "runs")
    with pytest.raises(InputError, match=r"--merge-into: dequantized: .* was not tuned on a quantized base"):
        export_run(run, "merged", options=ExportOptions(merge_into="dequantized"))


def test_it_is_served_from_the_quantised_base_and_beside_no_other(finished: Run) -> None:
    """The proof before the first ask holds on it, and a base that is not quantised is another one."""
    notes: list[str] = []
    root = finished.path.parent
    serving = open_registry([str(finished.path)], root=root, options=OPTIONS, note=notes.append)
    assert finished.path.name in serving.models
    assert any("the base itself answers quantised too" in note for note in notes)
    with pytest.raises(InputError, match=rf"in {finished.recipe().method.quant}.*Serve apart"):
        open_registry([str(finished.path), finished.recipe().model], root=root, options=OPTIONS, note=notes.append)
