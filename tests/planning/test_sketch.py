"""What a pass is said to keep and compute, from shapes alone, is what the same pass keeps and computes with numbers."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from packed import rows_of
from tiny_model import tiny_model
from tiny_run import model_folder
from tiny_tasks import encoder_folder
from tunesmith.data.collate import build_batch
from tunesmith.models.quantized import QuantizedLinear
from tunesmith.models.resolve_model import ModelRef, resolve_model
from tunesmith.planning.memory import Pass, highest, step_peak, timeline
from tunesmith.planning.sketch import Kept, Sketch, Stack
from tunesmith.planning.tracing import Segment, Tracer
from tunesmith.recipe.load import validate
from tunesmith.recipe.methods import QloraMethod
from tunesmith.recipe.schema import Recipe
from tunesmith.training.setup import prepare
from tunesmith.types import Batch, Row


def recipe_for(method: str, *, precision: str = "bfloat16", **more) -> Recipe:
    settings = {"name": method} if method == "full" else {"name": method, "rank": 4}
    return validate(
        {"model": "m", "task": "text", "method": settings, "precision": precision, "device": "cpu", "threads": 1}
        | {"optim": {"lr": 1e-3, "name": more.pop("optim", "adamw")}, **more}
    )


def sketch_of(located: ModelRef, recipe: Recipe) -> Sketch:
    return Sketch(recipe, located, head="next_token", labels=None)


def batch_of(lengths: tuple[int, ...] = (9, 9, 5)) -> Batch:
    return build_batch(rows_of(lengths), range(len(lengths)), layout="packed", device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> ModelRef:
    return resolve_model(str(model_folder(tmp_path_factory.mktemp("models") / "llama")))


def layers_of(located: ModelRef, path: Path, layers: int) -> ModelRef:
    """The same model with more layers, and no weights at all."""
    config = (located.path / "config.json").read_text()
    path.mkdir()
    (path / "config.json").write_text(config.replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}'))
    return ModelRef("folder", path, str(path))


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_held_is_what_a_prepared_run_holds(llama, tmp_path, method, precision):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"the quick brown fox number {i}"}) for i in range(30))
    )
    recipe = recipe_for(method, precision=precision, data={"train": [str(tmp_path / "a.jsonl")], "max_tokens": 32})
    setup = prepare(recipe.model_copy(update={"model": str(llama.path)}), root=tmp_path)
    sketch = Sketch(recipe, llama, head="next_token", labels=None, store=setup.rows.store)
    trained = setup.attachment.trained.values()
    model = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(setup.model)}
    assert sketch.kept == Kept(
        weights=sum(model.values()),
        masters=sum(t.nbytes for t in trained if t.untyped_storage().data_ptr() not in model),
        gradients=sum(t.nbytes for t in trained),
        optimizer=setup.optimizer.state_bytes(),
        trained_parameters=sum(t.numel() for t in trained),
    )


def _tensors(model) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_packed_base_holds_what_packing_leaves_and_one_layer_unpacked(llama, tmp_path, quant):
    """Within 2 %: bits of a weight are those of large layers, where the table of 1 KiB in each says nothing."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"the quick brown fox {i}"}) for i in range(30)))
    recipe = recipe_for("qlora", data={"train": [str(tmp_path / "a.jsonl")], "max_tokens": 32})
    recipe = recipe.model_copy(update={"method": QloraMethod(rank=4, quant=quant)})
    setup = prepare(recipe.model_copy(update={"model": str(llama.path)}), root=tmp_path)
    assert setup.forecast is not None
    packed = [module for module in setup.model.modules() if isinstance(module, QuantizedLinear)]
    model = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(setup.model)}
    largest = max(2 * prod(module.weight_shape) for module in packed)
    tables = sum(module.nested_code.nbytes for module in packed if module.is_double)
    assert setup.forecast.memory.weights == pytest.approx(sum(model.values()) + largest - tables, rel=0.02)


def bytes_saved(method: str, batch: Batch, *, precision: str) -> int:
    """What a real forward keeps for its backward: every storage that is not the model's, once."""
    from tunesmith.methods import METHODS
    from tunesmith.models.attention import use_packed_attention
    from tunesmith.tasks import bind

    recipe = recipe_for(method, precision=precision)
    model = tiny_model("llama", vocab_size=512, dtype=getattr(torch, precision))
    use_packed_attention(model)
    attachment = METHODS[method].attach(model, recipe.method, seed=0)
    known = {t.untyped_storage().data_ptr() for t in (*_tensors(model), *attachment.trained.values())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = bind("text", None, recipe.loss).loss_sum(model.train(), batch)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_layers_keep_is_what_a_real_pass_saves(llama, method, precision):
    """Within 3 %: the real one keeps its batch too, and a few numbers a token that go with the head."""
    batch = batch_of((64, 64, 40))
    sketch = sketch_of(llama, recipe_for(method, precision=precision))
    segments = sketch.step_pass(batch, recompute=False, accumulating=False)
    forward = [s for s in segments if s.place[0] in ("start", "forward")]
    head = next(s for s in segments if s.place == ("between", 0, 0))
    kept = sum(segment.delta for segment in forward)
    real = bytes_saved(method, batch, precision=precision)
    assert kept < real <= 1.03 * (kept + head.peak)


def kept_forward(sketch: Sketch) -> int:
    segments = sketch.step_pass(batch_of(), recompute=False, accumulating=False)
    return sum(segment.delta for segment in segments if segment.place[0] == "forward")


def test_planted_a_tracer_that_counts_views_would_be_seen(llama, monkeypatch):
    """Counting what a view shows instead of the memory that it shares doubles what a layer keeps."""
    sketch = sketch_of(llama, recipe_for("full"))
    true = kept_forward(sketch)

    def count(self: Tracer, tensor: Tensor) -> bool:
        self._live += tensor.numel() * tensor.element_size()
        return True

    monkeypatch.setattr(Tracer, "_count", count)
    assert kept_forward(sketch) > 1.5 * true


def test_a_pass_ends_with_nothing_alive_but_gradients(llama):
    for recompute in (False, True):
        segments = sketch_of(llama, recipe_for("full")).step_pass(batch_of(), recompute=recompute, accumulating=False)
        kept = sketch_of(llama, recipe_for("full")).kept
        assert sum(s.gradients for s in segments) == kept.gradients
        # What is left beside gradients is the batch's own positions and the like.
        assert kept.gradients <= sum(s.delta for s in segments) <= kept.gradients + 20_000


@pytest.mark.parametrize("recomputed", [0, 3, 7])
def test_three_layers_stand_for_seven(llama, tmp_path, recomputed):
    """A stack of 7 from the 3 that are run, and all 7 run one by one: the same peak, and the same products."""
    located = layers_of(llama, tmp_path / "seven", 7)
    sketch = sketch_of(located, recipe_for("lora"))
    assert sketch.stacks == [Stack((0, 1, 1, 1, 1, 1, 2))]
    one = Pass(*(sketch.step_pass(batch_of(), recompute=again, accumulating=False) for again in (False, True)))
    short = step_peak(sketch.kept, sketch.stacks, one, recomputed=recomputed, accumulating=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.planning.sketch._cut", lambda model: [Stack(tuple(range(7)))])
        whole = sketch_of(located, recipe_for("lora"))
    every = Pass(*(whole.step_pass(batch_of(), recompute=again, accumulating=False) for again in (False, True)))
    long = step_peak(whole.kept, whole.stacks, every, recomputed=recomputed, accumulating=False)
    assert short == long
    flops = [
        sum(p.flops * n for s in timeline(some, stacks, recomputed) for p, n in s.products.items())
        for some, stacks in ((one, sketch.stacks), (every, whole.stacks))
    ]
    assert flops[0] == flops[1] > 0


def test_recomputed_layers_keep_their_inputs_alone(llama):
    sketch = sketch_of(llama, recipe_for("lora"))
    batch = batch_of()
    segments = sketch.step_pass(batch, recompute=True, accumulating=False)
    hidden = 2 * sum(batch.lengths) * sketch.model.config.hidden_size
    assert [s.delta for s in segments if s.place == ("forward", 0, 1)] == [hidden]


def test_frozen_layers_below_the_first_adapter_keep_nothing(llama, tmp_path):
    located = layers_of(llama, tmp_path / "six", 6)
    recipe = recipe_for("lora").model_copy(
        update={"method": recipe_for("lora").method.model_copy(update={"layers": ("last:2",)})}
    )
    sketch = sketch_of(located, recipe)
    assert sketch.stacks == [Stack((0, 1, 1, 1, 2, 3))]
    segments = {s.place: s for s in sketch.step_pass(batch_of(), recompute=False, accumulating=False)}
    assert ("backward", 0, 1) not in segments
    assert segments["forward", 0, 1].delta < segments["forward", 0, 2].delta / 10


def test_products_are_counted_two_a_multiply_and_add(llama):
    """Forward: 2 operations a weight and token; backward of LoRA as much again for its inputs. Attention, norms and
    the low-rank paths come on top, so a bound from below is exact and one from above loose."""
    sketch = sketch_of(llama, recipe_for("lora"))
    batch = batch_of()
    config = sketch.model.config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    weights = 2 * hidden * hidden + 2 * hidden * heads + 3 * hidden * inner
    segments = {s.place: s for s in sketch.step_pass(batch, recompute=False, accumulating=False)}
    for way in ("forward", "backward"):
        flops = sum(p.flops * n for p, n in segments[way, 0, 1].products.items())
        assert 1 <= flops / (2 * weights * sum(batch.lengths)) < 1.6


def test_an_encoder_with_a_head_of_its_own_can_be_traced(tmp_path):
    located = resolve_model(str(encoder_folder(tmp_path / "bert")))
    recipe = recipe_for("full", precision="float32")
    sketch = Sketch(recipe, located, head="masked_token", labels=None)
    rows = [Row(row.ids % 20, row.trained, row.source, labels=row.ids[row.trained] % 20) for row in rows_of((7, 5))]
    batch = build_batch(rows, range(2), layout="padded", device="cpu", has_types=True)
    segments = sketch.step_pass(batch, recompute=False, accumulating=False)
    assert sum(s.gradients for s in segments) == sketch.kept.gradients


def test_the_highest_point_is_found_between_the_ends():
    segments = [
        Segment(("start", 0, 0), delta=10, peak=12),
        Segment(("between", 0, 0), delta=0, peak=50),
        Segment(("backward", 0, 0), delta=-5, gradients=5, peak=8),
    ]
    from tunesmith.planning.memory import Memory

    found = highest("step", Memory("rest", weights=100), iter(segments))
    assert (found.total, found.activations, found.logits, found.gradients) == (160, 10, 50, 0)
