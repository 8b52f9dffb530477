"""A run on a quantised base: stopped and resumed, answered from, exported."""

from importlib.metadata import version

import pytest
import torch

from export.exports import quick
from serve.engines import OPTIONS
from tiny_run import logits_of, same_run, stop_at, tiny_recipe
from tunesmith.errors import InputError, Stopped
from tunesmith.export.export_run import export_run
from tunesmith.inference.load import load_base, load_run
from tunesmith.models.quantized import QuantizedLinear
from tunesmith.runs.folder import Run
from tunesmith.serve.registry import open_registry
from tunesmith.training.trainer import resume, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("qlora")
    method = {"name": "qlora", "rank": 4, "alpha": 8, "dropout": 0.1}
    return train(tiny_recipe(folder, dropout=0.1, method=method), root=folder / "runs")


@pytest.mark.slow  # its adapter is one of LoRA: test_resume.py
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
    assert not torch.equal(logits_of(live), logits_of(on_plain))
    with live.adapter_disabled():
        assert torch.equal(logits_of(live), logits_of(load_base(finished)))


def test_an_export_uses_the_original_base_and_says_the_change_of_loss(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    done = export_run(finished, "merged", out=finished.path / "original")
    assert done.found.carried == pytest.approx(1, abs=1e-3)  # of that base plus delta
    beginning = "trained on its base in nf4, exported on the original base: the loss "
    (note,) = [note for note in done.notes if note.startswith(beginning)]
    assert abs(float(note.split()[-1])) < 0.1


def test_it_is_served_from_the_quantised_base_and_beside_no_other(finished: Run) -> None:
    """The proof before the first ask holds on it, and a base that is not quantised is another one."""
    notes: list[str] = []
    root = finished.path.parent
    serving = open_registry([str(finished.path)], root=root, options=OPTIONS, note=notes.append)
    assert finished.path.name in serving.models
    assert any("the base itself answers quantised too" in note for note in notes)
    with pytest.raises(InputError, match=r"in nf4.*Serve them separately"):
        open_registry([str(finished.path), finished.recipe().model], root=root, options=OPTIONS, note=notes.append)
