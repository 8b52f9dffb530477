"""A forecast that cannot be made ends no run: it is said, and the run trains to its end."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import RecipeError
from tunesmith.planning import devices, fitting, forecast, sketch, trying
from tunesmith.planning.tracing import Call, Operand, Product, Segment
from tunesmith.training import resolve as forecasting
from tunesmith.training import trainer as training
from tunesmith.training.resolve import foresee

ERRORS = (NotImplementedError, RuntimeError, KeyError, MemoryError, OSError, AttributeError)
SAID = "memory and time could not be forecast: "
SHORT: dict[str, Any] = {"train": {"max_steps": 1}, "evaluation": {"samples": 0, "surprising": 0}}


def functions_of(place: Any, name: str, package: str) -> Iterator[tuple[str, str]]:
    for key, value in vars(place).items():
        if inspect.isfunction(value) and value.__module__.startswith(package):
            yield name, key


STEPS = [
    *functions_of(forecast, "tunesmith.planning.forecast", "tunesmith.planning"),
    *functions_of(devices, "tunesmith.planning.devices", "tunesmith.planning.devices"),
    *functions_of(fitting, "tunesmith.planning.fitting", "tunesmith.planning.fitting"),
    *functions_of(forecast.Forecaster, "tunesmith.planning.forecast.Forecaster", "tunesmith"),
    *functions_of(sketch.Sketch, "tunesmith.planning.sketch.Sketch", "tunesmith"),
    *functions_of(trying.Tried, "tunesmith.planning.trying.Tried", "tunesmith"),
    ("tunesmith.planning.devices", "_measured"),
    *(("tunesmith.training.resolve", name) for name in ("give_back", "fit", "Forecaster", "Tried", "_general_tokens")),
    *(("tunesmith.planning.sketch", name) for name in ("model_of_shapes", "attach", "bind", "_kept", "_cut")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing")


@pytest.mark.parametrize(("place", "name"), STEPS)
def test_every_step_of_a_forecast_may_fail_and_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    error, called = ERRORS[STEPS.index((place, name)) % len(ERRORS)], []

    def fail(*args: Any, **how: Any) -> Any:
        called.append(name)
        raise error("aten::of_a_processor")

    recipe = tiny_recipe(folder, **SHORT)
    devices._measured.cache_clear()
    monkeypatch.setattr(f"{place}.{name}", fail)
    if STEPS.index((place, name)) % 5 == 0:  # each fifth: the rest of a run takes a second, and is the same
        run = training.train(recipe, root=folder / "runs")
        assert run.state() == "done"
        notes = next(event.values["warnings"] for event in run.events() if event.kind == "plan")
    else:
        notes = foresee(recipe, root=folder / "runs").notes
    said = [note for note in notes if note.startswith(SAID)]
    if name == "_try":  # what a device cannot run is an estimate
        assert bool(said) is not issubclass(error, RuntimeError)
    else:
        assert bool(said) is bool(called), f"{name} was called: {bool(called)}, notes: {notes}"
    assert all("of_a_processor" in note for note in said)


def test_the_steps_that_fail_in_turn_are_those_of_a_forecast() -> None:
    names = {name for _, name in STEPS}
    assert {"here", "room", "resident", "_measured", "look", "step_pass", "measure_pass", "_duration", "fit"} <= names
    assert len(STEPS) > 60


def test_what_a_device_cannot_run_is_an_estimate_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: the traced attention is one that only processors have, and its kernel is missing there."""
    tried = trying.Tried._try

    def dispatched(self: trying.Tried, call: Any) -> float:
        if "flash_attention_for_cpu" in str(call.func):
            raise NotImplementedError(f"Could not run '{call.func}' with arguments from the 'CUDA' backend.")
        return tried(self, call)

    monkeypatch.setattr(trying.Tried, "_try", dispatched)
    seen = foresee(tiny_recipe(tmp_path), root=tmp_path)
    assert seen.forecast is not None
    assert seen.forecast.duration is not None
    (note,) = seen.notes
    assert note.startswith("the time is partly an estimate: scaled_dot_product_flash_attention")
    assert note.endswith("could not be tried on cpu")


def test_an_operation_of_another_device_is_not_tried() -> None:
    """As torch's own dispatcher refuses it: this attention has kernels for cards alone."""
    query = Operand((1, 2, 8, 16), (256, 128, 16, 1), torch.float32)
    call = Call(torch.ops.aten._scaled_dot_product_flash_attention.default, (query, query, query), ())
    product = Product(10, 10, torch.float32, call)
    segment = Segment(("start", 0, 0), products=Counter({product: 3}))
    tried = trying.Tried("cpu", threads=1)
    tried.look([segment, segment])
    assert tried.refused == {"scaled_dot_product_flash_attention"}
    assert tried.seconds(product) is None, "it counts by the roofline"


def test_what_was_given_wrongly_is_an_error_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **how: Any) -> Any:
        raise RecipeError("method.targets: no layer is named so")

    monkeypatch.setattr("tunesmith.planning.sketch.attach", fail)
    with pytest.raises(RecipeError):
        foresee(tiny_recipe(tmp_path), root=tmp_path)


def test_an_interrupt_ends_a_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **how: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith.training.resolve.fit", fail)
    with pytest.raises(KeyboardInterrupt):
        foresee(tiny_recipe(tmp_path), root=tmp_path)


@pytest.mark.parametrize("verb", ["plan", "selftest"])
def test_other_verbs_say_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    def fail(*args: Any, **how: Any) -> Any:
        raise NotImplementedError("aten::of_a_processor")

    monkeypatch.setattr("tunesmith.planning.trying.Tried.look", fail)
    model, data = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 20)
    words = {"plan": ["plan", str(model), str(data), "--no-probe"], "selftest": ["selftest", str(model)]}[verb]
    done = CliRunner().invoke(app, [*words, "--runs", str(tmp_path / "runs"), "--offline"])
    assert done.exit_code == 0, done.output
    assert (SAID + "NotImplementedError: aten::of_a_processor" in done.output) or verb == "selftest"


def test_memory_of_a_card_counts_its_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card says is free is without the context of this process, which the forecast counts."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    assert devices.room("cuda:0") == 11 * 2**30 + devices.CUDA_CONTEXT
    assert devices.named("24G").room == 24 * devices.GB
    assert forecasting.devices is devices
