"""The sizes that the formula rests on are those of the prepared run; the formula moves as memory does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig

from tiny import tiny_tokenizer
from tiny_model import seeing_model
from tiny_run import tiny_recipe
from tunesmith.models.resolve_model import ModelRef
from tunesmith.planning.decisions import with_options
from tunesmith.planning.devices import CUDA_CONTEXT, Device, named
from tunesmith.planning.memory import Heavy, Load, Memory, Sizes, peak, sizes_of
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.training.setup import Setup, prepare
from tunesmith.types import Choice

CPU = Device("cpu", "cpu", 2**40)
SIZES = Sizes(
    weights=1000, masters=0, optimizer=800, trained_parameters=100, itemsize=4, layers=4, recomputable=4, features=40,
    kept=1.0, first=0, linear_weights=500, trains_linear=1.0, hidden=4, heads=2, outputs=50, trains_output=False,
    fused_loss=True, can_pack=True,
)  # fmt: skip


def held_by(setup: Setup) -> dict[str, int]:
    trained = setup.attachment.trained.values()
    tensors: list[Tensor] = [*setup.model.parameters(), *setup.model.buffers()]
    model = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "weights": sum(model.values()),
        "masters": sum(t.nbytes for t in trained if t.untyped_storage().data_ptr() not in model),
        "optimizer": setup.optimizer.state_bytes(),
        "trained_parameters": sum(t.numel() for t in trained),
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "lora", "rank": 4}, {"name": "dora", "rank": 4}])
def test_what_is_held_is_what_a_prepared_run_holds(tmp_path, method, precision):
    recipe = with_options(tiny_recipe(tmp_path, precision=precision), {"method": method})
    setup = prepare(recipe, root=tmp_path)
    sizes, _ = sizes_of(setup.recipe, setup.located, head=setup.head, labels=setup.rows.labels, store=setup.rows.store)
    assert {name: getattr(sizes, name) for name in held_by(setup)} == held_by(setup)
    assert sizes.gradients == 4 * sizes.trained_parameters
    assert sizes.layers == 2


WITH_EXPERTS = {"rank": 4, "targets": ["all-linear", "experts"]}


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_experts_are_held_whole_and_computed_as_far_as_a_token_meets_them(tmp_path, name):
    recipe = with_options(tiny_recipe(tmp_path, arch="qwen3_moe"), {"method": {"name": name, **WITH_EXPERTS}})
    setup = prepare(recipe, root=tmp_path)
    sizes, _ = sizes_of(setup.recipe, setup.located, head=setup.head, labels=setup.rows.labels, store=setup.rows.store)
    held = held_by(setup)
    assert {key: getattr(sizes, key) for key in held if key != "weights"} == {
        key: num for key, num in held.items() if key != "weights"
    }
    # Two of four experts of 32 inner numbers, and attention of 4 heads of 16 and 2 of keys and values; 2 layers.
    inside = 2 * ((64 + 2 * 32) + (32 + 64)) + (64 + 64) * 2 + (64 + 32) * 2
    assert sizes.features == 2 * inside
    assert sizes.linear_weights == 2 * (2 * 3 * 64 * 32 + 2 * 64 * 64 + 2 * 64 * 32)
    # In 4 bits one matrix of a layer or expert is unpacked at a time, and small tensors have scales of their own.
    assert sizes.weights == pytest.approx(held["weights"], rel=0.0 if name == "lora" else 0.1)


def test_layers_that_only_images_pass_through_keep_nothing(tmp_path):
    recipe = tiny_recipe(tmp_path)
    seeing_model(vocab_size=len(tiny_tokenizer())).save_pretrained(recipe.model)
    located = ModelRef("folder", Path(recipe.model), recipe.model)
    sizes, model = sizes_of(recipe, located, head="next_token", labels=None, store=None)
    assert (sizes.layers, sizes.recomputable, sizes.first) == (2, 2, 0)
    assert sizes.features == 2 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 128))
    assert sizes.weights >= sum(weight.nbytes for weight in model.model.vision_tower.parameters())


@pytest.mark.parametrize(
    ("arch", "settings"), [("mpnet", {}), ("albert", {"embedding_size": 8}), ("squeezebert", {"embedding_size": 32})]
)
def test_layers_that_cannot_be_recomputed_keep_activations_all_the_same(tmp_path, arch, settings):
    """Linear layers of a BERT-like layer of width 32 have 8 · 32 outputs, as many inputs. ALBERT uses one 3 times."""
    recipe, located = encoder(tmp_path, arch, num_hidden_layers=3, **settings)
    sizes, _ = sizes_of(recipe, located, head="masked_token", labels=None, store=None)
    assert (sizes.layers, sizes.recomputable, sizes.first) == (3, 0, 0)
    assert sizes.features >= 3 * 2 * 7 * 32
    assert needs(sizes).activations > 1000 * 4 * sizes.features


def encoder(folder: Path, arch: str, **settings: Any) -> tuple[Recipe, ModelRef]:
    """Full tuning of an encoder of width 32 whose weights are not made."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 50, **settings}
    AutoConfig.for_model(arch, **sizes).save_pretrained(folder)
    options = {"method": {"name": "full"}, "optim": {"lr": 1e-4}, "precision": "float32"}
    recipe = validate({"model": str(folder), **options})
    return recipe, ModelRef("folder", folder, str(folder))


@pytest.mark.parametrize(("train", "first"), [(["embed_tokens"], 0), (["layers.1"], 1), (["lm_head"], 2)])
def test_layers_above_trained_rows_of_the_embedding_keep_activations(tmp_path, train, first):
    """Full tuning trains the rows of the tokens in the data as tensors of their own, outside of the model."""
    method = Choice("method", {"name": "full", "train": train}, "")
    setup = prepare(with_options(tiny_recipe(tmp_path), {method.key: method.value}), root=tmp_path)
    sizes, _ = sizes_of(setup.recipe, setup.located, head=setup.head, labels=setup.rows.labels, store=setup.rows.store)
    assert setup.attachment.trains_token_rows is (first == 0)
    assert sizes.first == first


def needs(
    sizes: Sizes = SIZES, *, tokens: int = 1000, recomputed: int = 0, device: Device = CPU, **load: Any
) -> Memory:
    look = Load(2000, load.pop("looked", 0))
    heavy = Heavy(1, (0,), load.pop("accumulating", False), Load(1000, load.pop("targets", 10), **load))
    return peak(sizes, heavy, look, recomputed=recomputed, device=device, base=7)


def test_layers_keep_inputs_and_outputs_recomputed_ones_their_input():
    """4 layers of 10 features of 4 bytes a token, 0.7 of one at work; recomputed: 16 bytes, one layer whole."""
    assert needs().activations == 1000 * (4 * 40) + 28000
    assert needs(recomputed=4).activations == 1000 * (4 * 16 + 40) + 28000
    assert needs(recomputed=2).activations == 1000 * (2 * 16 + 40 + 2 * 40) + 28000
    assert needs(replace(SIZES, first=2)).activations == 1000 * (2 * 40) + 28000


@pytest.mark.parametrize(
    ("kernels", "precision", "less"), [("fast", "bfloat16", 0.43), ("fast", "float32", 0.28), ("plain", "bfloat16", 0)]
)
def test_layers_keep_less_where_norms_and_mlps_are_nodes(tmp_path, kernels, precision, less):
    setup = prepare(tiny_recipe(tmp_path, kernels=kernels, precision=precision), root=tmp_path)
    sizes, _ = sizes_of(setup.recipe, setup.located, head=setup.head, labels=setup.rows.labels, store=setup.rows.store)
    assert sizes.less == less
    assert sizes.again == (2 * sizes.hidden if less else 0), "the inputs of q, k, v and of the MLP"
    assert any("forward" in vars(module) for module in setup.model.modules()) is (kernels == "fast")
    assert needs(replace(SIZES, less=0.5)).activations == 1000 * (2 * 40) + 28000
    for device, is_less in ((named("H100-80G"), True), (Device("mps", "mps", 2**40), False)):
        less_kept = needs(replace(SIZES, less=0.5), device=device).activations
        assert (less_kept < needs(device=device).activations) is is_less
    assert needs(replace(SIZES, again=3)).activations == 1000 * 4 * (40 - 3 * 4) + 28000
    assert (
        needs(replace(SIZES, again=3), device=named("H100-80G")).activations
        == needs(device=named("H100-80G")).activations
    )


def test_scores_of_short_rows_are_kept_on_a_processor_in_bfloat16():
    narrow = replace(SIZES, itemsize=2)
    assert needs(narrow, short_squares=1000).activations - needs(narrow).activations == 4 * 2 * 2 * 1000
    assert needs(short_squares=1000).activations == needs().activations


def test_logits_are_those_of_a_piece_where_the_loss_is_fused():
    large = replace(SIZES, outputs=50_000)
    assert needs(large, targets=2000).logits == 4 * 128 * 50_000
    assert needs(replace(large, fused_loss=False), targets=2000).logits == 2000 * 50_000 * 16
    assert needs(replace(large, trains_output=True), targets=2000).gradients == 8 * 4 * 50_000


def test_pieces_of_a_card_that_others_fill_are_those_of_the_whole_card():
    large, card = replace(SIZES, outputs=100_000), named("80G")
    shared = replace(card, room=10 * 10**9, memory=card.room)
    assert needs(large, targets=5000, device=shared).logits == needs(large, targets=5000, device=card).logits
    assert needs(large, targets=5000, device=named("16G")).logits < needs(large, targets=5000, device=card).logits


def test_a_piece_in_half_precision_on_a_card_is_there_narrow_too():
    """Logits in bfloat16, in float32, their softmax, and the gradient in bfloat16: 2.5 times the float32 ones."""
    narrow, card = replace(SIZES, outputs=100_000, itemsize=2), named("80G")
    assert needs(narrow, targets=5000, device=card).logits == 2.5 * 512 * 2**20
    assert needs(replace(narrow, itemsize=4), targets=5000, device=card).logits == 2 * 512 * 2**20
    assert needs(narrow, targets=5000, device=named("16G")).logits == 2.5 * 128 * 2**20
    assert needs(narrow, targets=5000).logits == 1.5 * 4 * 128 * 100_000  # here the gradient takes the logits' place


def test_weights_of_attention_are_kept_on_apples_device():
    """Its attention with gradients is made of products and a softmax, which keeps them for every pair of tokens."""
    mac = Device("mps", "mps", 2**40)
    assert needs(device=mac, squares=1000).activations - needs(device=mac).activations == 4 * 4 * 2 * 1000
    assert needs(squares=1000).activations == needs().activations


def test_measured_rows_are_the_peak_if_they_have_more_logits():
    large = replace(SIZES, outputs=50_000)
    plain = needs(replace(large, fused_loss=False), looked=2000)
    assert (plain.gradients, plain.activations, plain.logits) == (0, 56000, 2000 * 50_000 * 8)
    assert needs(large, looked=2000).logits == 4 * 128 * 50_000


def test_gradients_are_there_before_a_pass_or_when_the_update_needs_more():
    assert (needs().gradients, needs(accumulating=True).gradients) == (0, 400)
    update = needs(replace(SIZES, trained_parameters=10**6))
    assert (update.gradients, update.activations, update.logits) == (4 * 10**6, 28000, 0)


def test_a_card_counts_its_context_and_what_its_allocator_cannot_use():
    found = needs(device=named("24G"))
    assert found.runtime == 7 + CUDA_CONTEXT
    assert found.unused_reserve == int(0.05 * (found.total - found.runtime - found.unused_reserve))
