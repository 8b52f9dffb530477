"""Plans for an NVIDIA card: made on any machine, and of nothing that belongs to a processor."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.planning import devices, duration, memory
from tunesmith.planning import fit as fitting
from tunesmith.planning.devices import Device, named
from tunesmith.planning.memory import Sizes
from tunesmith.recipe.schema import Recipe
from tunesmith.training.resolve import ResolvedRun, resolve_run

CARD = named("H100")
AUTO = {"train": {"tokens_per_pass": "auto", "rows_per_step": 3, "epochs": 2}, "precision": "bfloat16"}


def without_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a plan could take from a processor fails the test."""

    def fail(*args: Any, **how: Any) -> Any:
        pytest.fail("a plan for a card took something of a processor")

    class NoProcessor(dict[str, int]):
        def __getitem__(self, key: str) -> int:
            return fail() if key == "cpu" else super().__getitem__(key)

    for module, name in ((memory, "libraries_keep"), (devices, "_memory_free"), (devices, "_group_free")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(memory, "CHUNK_BYTES", NoProcessor())
    monkeypatch.setattr(devices, "here", fail)
    monkeypatch.setattr(devices, "_measured", fail)


def planned(recipe: Recipe, folder: Path, device: Device = CARD) -> ResolvedRun:
    found = resolve_run(recipe, root=folder, device=device)
    assert found.forecast is not None, found.notes
    assert found.forecast.phases[0].runtime == devices.CUDA_CONTEXT
    assert found.forecast.heavy.load.tokens == sum(found.forecast.sampler.lengths_of(found.forecast.heavy.rows))
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "full"])
def test_a_plan_for_a_card_takes_nothing_of_a_processor(tmp_path, monkeypatch, arch, method):
    without_a_processor(monkeypatch)
    recipe = tiny_recipe(tmp_path, arch=arch, **AUTO).model_dump() | {"method": {"name": method}}
    found = planned(Recipe.model_validate(recipe), tmp_path)
    assert found.forecast.sampler.layout == "packed"
    assert found.recipe.train.tokens_per_pass == 8192  # tiny layers take no time to hide


def test_so_does_one_of_an_encoder(tmp_path, monkeypatch):
    without_a_processor(monkeypatch)
    found = planned(task_recipe(tmp_path, "classify", "encoder", precision="bfloat16"), tmp_path)
    assert found.forecast.sampler.layout == "packed"


def test_the_test_sees_a_plan_that_does(tmp_path, monkeypatch):
    """A card whose kind is a processor's, as the first forecast took it."""
    without_a_processor(monkeypatch)
    monkeypatch.setattr("tunesmith.training.resolve._reason", lambda error: pytest.fail(str(error)))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        planned(tiny_recipe(tmp_path, **AUTO), tmp_path, Device("H100-80G", "cpu", 2**36, 1e14, 1e12))


def card_of(weights_B: float, layers: int, features: int) -> Sizes:
    return Sizes(
        weights=int(2e9 * weights_B), masters=0, optimizer=0, trained_parameters=0, itemsize=2,
        features_L=(features,) * layers, recomputable=layers, kept=1.33, first=0, linear_weights=int(1e9 * weights_B),
        trains_linear=0.0, hidden=2048, heads=32, outputs=128256, trains_output=False, fused_loss=True, can_pack=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weights_B", "layers", "features", "card", "tokens"),
    [
        (0.106, 30, 7 * 576 + 3 * 1536, "H100", 16384),  # SmolLM2-135M
        (0.97, 16, 7 * 2048 + 3 * 8192, "H100", 8192),
        (7.0, 32, 7 * 4096 + 3 * 14336, "H100", 8192),
        (0.106, 30, 7 * 576 + 3 * 1536, "L4", 8192),  # a slower card takes longer over as many tokens
        (0.106, 30, 7 * 576 + 3 * 1536, "24G", 8192),  # of unknown speed
    ],
)
def test_micro_batches_are_as_large_as_hides_the_start_of_operations(weights_B, layers, features, card, tokens):
    sizes, device = card_of(weights_B, layers, features), named(card)
    assert duration.card_tokens(sizes, device) == tokens
    if not device.products:
        return
    work = duration.step_seconds(sizes, memory.Load(tokens, 0), micro_batches=0, recomputed=0, device=device)
    launches = layers * duration.OPERATIONS * device.launch
    assert launches / (launches + work) < duration.LAUNCH_SHARE + 0.01


def test_they_are_no_larger_than_fits_without_computing_anything_twice():
    from planning.test_fit import predictor, recipe_with

    # 100 are held and 10 a layer of ten kept for 2,048 tokens: 8,192 take 500, 4,096 take 300.
    for room, tokens in ((600, 8192), (400, 4096), (250, 2048)):
        recipe, choices = fitting.fill_card(recipe_with(), predictor(room), tokens=8192)
        assert recipe.train.tokens_per_pass == tokens
        assert [choice.value for choice in choices] == ([tokens] if tokens > 2048 else [])


def fake_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(devices, "_measured", lambda device, **how: (4e14, 3e12))


def test_a_run_on_a_card_is_resolved_by_what_the_card_says(tmp_path, monkeypatch):
    fake_card(monkeypatch)
    recipe = tiny_recipe(tmp_path, **{**AUTO, "device": "auto", "precision": "auto"})
    found = resolve_run(recipe, root=tmp_path)
    assert (found.recipe.device, found.recipe.precision, found.recipe.train.tokens_per_pass) == (
        "cuda",
        "bfloat16",
        8192,
    )
    assert found.forecast is not None, found.notes
    assert found.forecast.device.room == 70 * 2**30 + devices.CUDA_CONTEXT
    assert found.forecast.memory.runtime == devices.CUDA_CONTEXT
    assert found.forecast.duration is not None


def test_a_card_is_timed_with_products_that_take_longer_than_their_launch(monkeypatch):
    shapes: list[Any] = []
    monkeypatch.setattr(devices, "_fastest", lambda do, device: shapes.append(device) or 1.0)
    monkeypatch.setattr(torch, "ones", lambda shape, **how: shapes.append(shape) or torch.empty(0, device="meta"))
    devices._measured.__wrapped__("cuda:0", threads=1, dtype=torch.bfloat16)
    assert shapes[:3] == [(8192, 4096), (4096, 4096), 512 * 2**20 // 4]
    assert 40 * devices.CUDA_LAUNCH < 2 * 8192 * 4096 * 4096 / 989e12


@pytest.mark.parametrize(("card", "precision"), [("T4", "float16"), ("V100-32G", "float16"), ("A100-40G", "bfloat16")])
def test_a_named_card_computes_in_what_it_multiplies(tmp_path, card, precision):
    recipe = tiny_recipe(tmp_path, **{**AUTO, "precision": "auto"})
    found = resolve_run(recipe, root=tmp_path, device=named(card))
    assert found.recipe.precision == precision
    given = resolve_run(tiny_recipe(tmp_path, **{**AUTO, "precision": "float32"}), root=tmp_path, device=named(card))
    assert given.recipe.precision == "float32"
