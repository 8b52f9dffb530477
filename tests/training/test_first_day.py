"""What a first day on a card would break, shown without one: kernels, memory and proofs of the code around training."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from packed import rows_of, sharp
from tiny_run import tiny_recipe
from tunesmith.generation import kv_cache
from tunesmith.methods import master_weights
from tunesmith.methods.master_weights import MasterWeights
from tunesmith.models import cuda_attention, fused_loss
from tunesmith.models.card import exact_products
from tunesmith.models.packing_check import check_packing
from tunesmith.models.segments import Segments, _Spread, _summed
from tunesmith.parallel import exchange
from tunesmith.planning import devices
from tunesmith.planning.devices import named
from tunesmith.training import selftest as proofs
from tunesmith.training import setup as setups
from tunesmith.training.resolve import resolve_run
from tunesmith.training.selftest import selftest
from tunesmith.training.setup import prepare
from tunesmith.types import Segment


def test_gradients_of_masters_are_widened_in_one_call_and_added_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grouped addition of two types starts a kernel a tensor."""
    drawn = torch.Generator().manual_seed(0)
    weights = {str(i): nn.Parameter(torch.randn(5, 3, generator=drawn).bfloat16()) for i in range(4)}
    gradients = [[torch.randn(5, 3, generator=drawn).bfloat16() for _ in weights] for _ in range(3)]
    found: list[list[Any]] = []
    add = torch._foreach_add_

    def grouped(totals: list[Any], more: list[Any]) -> None:
        assert {one.dtype for one in (*totals, *more)} == {torch.float32}
        add(totals, more)

    for together in (False, True):
        monkeypatch.setattr(master_weights, "_in_one_call", lambda tensor, together=together: together)
        monkeypatch.setattr(torch, "_foreach_add_", grouped)
        masters = MasterWeights(weights, free_early=False)
        for each in gradients:
            for weight, gradient in zip(weights.values(), each, strict=True):
                weight.grad = gradient.clone()
            list(weights.values())[2].grad = None
            masters.collect()
            assert all(weight.grad is None for weight in weights.values())
        found.append([None if one.grad is None else one.grad.tolist() for one in masters.trained.values()])
    assert found[0] == found[1]
    assert found[1][2] is None


def test_sums_over_ranks_are_copied_back_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(exchange.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copied.append(len(to)) or copy(to, of))
    tensors = [torch.full((n,), float(n)) for n in (3, 5, 7)]
    exchange.sum_over_ranks(tensors)
    assert copied == [3]
    assert [one.tolist() for one in tensors] == [[2.0 * n] * n for n in (3, 5, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_shared_prefixes_are_added_by_one_kernel(dtype: torch.dtype) -> None:
    pieces = [Segment(9), Segment(4, ((0, 9),)), Segment(3, ((0, 9), (9, 4))), Segment(5)]
    shared = Segments.sharing(pieces, device=torch.device("cpu")).shared
    assert shared is not None
    grads = torch.randn(len(shared.index_K), 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    right, _ = _Spread.backward(SimpleNamespace(shared=shared, saved_tensors=()), grads)
    found = _summed(grads, shared, torch.float32)
    assert found.dtype == dtype
    torch.testing.assert_close(found, right, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_keys_are_repeated_if_a_mask_with_grouped_heads_keeps_all_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 6, 8, generator=draw)
    key, value = (torch.randn(1, 2, 6, 8, generator=draw) for _ in range(2))
    how = kv_cache.AttentionOptions(True, 0.0, None, None, None)
    segments = Segments.of([6], device=torch.device("cpu"))
    found, calls = [], []
    right = F.scaled_dot_product_attention

    def sdpa(*args: Any, **given: Any) -> Any:
        calls.append((given["attn_mask"] is not None, given["enable_gqa"]))
        return right(*args, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    for repeats in (False, True):
        monkeypatch.setattr(kv_cache, "repeats_keys", lambda query, repeats=repeats: repeats)
        slot = kv_cache.SequenceSlot(None, kv_cache.KVPool(16))
        for start, stop in ((0, 4), (4, 6)):
            part = tuple(x[:, :, start:stop] for x in (query, key, value))
            out = kv_cache._prefill((slot, slice(0, stop - start)), 0, part, how, segments)
            slot.length = stop
        found.append(out)
    torch.testing.assert_close(found[0], found[1])
    assert calls == [(False, True), (True, True), (False, True), (True, False)]


def test_the_probe_compares_with_products_that_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    products: Any = torch.backends.cuda.matmul
    before, seen = products.fp32_precision, []
    case = cuda_attention.AttentionCase(torch.float32, 2, 2, 8, 8, True, False, False, False, False)
    right = cuda_attention._answers
    noting = lambda *given: seen.append(products.fp32_precision) or right(*given)  # noqa: E731
    monkeypatch.setattr(cuda_attention, "_answers", noting)
    assert cuda_attention.probe(cuda_attention.KERNELS[1], case, torch.device("cpu")) == ""
    assert seen == ["ieee", "ieee"]
    with exact_products():
        pass
    assert products.fp32_precision == before


def test_a_piece_of_logits_counts_both_types_and_shrinks_on_small_cards() -> None:
    assert fused_loss.chunk_on_card(16 * 10**9) == 128 * 2**20
    assert fused_loss.chunk_on_card(24 * 10**9) == 512 * 2**20


def test_an_output_layer_that_gives_other_logits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [note for note in prepare(tiny_recipe(tmp_path), root=tmp_path).notes if "logits" in note]
    monkeypatch.setattr(setups, "find_output_layer", lambda model: None)
    notes = prepare(tiny_recipe(tmp_path), root=tmp_path).notes
    assert [note for note in notes if "takes more memory than was foreseen" in note]


def test_a_model_that_refuses_packed_rows_is_left_whole() -> None:
    """FSDP's state is undefined after a forward that raised."""
    model = sharp("llama")
    resets: list[str] = []
    layer = model.model.layers[0]
    layer.reset_iter_state = lambda: resets.append("layer")

    def fail(*args: Any, **how: Any) -> Any:
        raise NotImplementedError("no such kernel")

    layer.forward = fail
    assert check_packing(model, "causal", rows_of((9, 5))).reason == "no such kernel"
    assert resets == ["layer"]


@pytest.mark.parametrize("arch", ["gemma2", "llama"])
def test_squashed_scores_are_in_the_forecast(tmp_path: Path, arch: str) -> None:
    """They are spelled out in float32 on every device, for the square of a row's length."""
    data, text = tmp_path / "rows.jsonl", " ".join(["word"] * 60)
    line = f'{{"prompt": "a", "completion": "{text}"}}\n'
    data.write_text(line * 8)
    (tmp_path / "held.jsonl").write_text(line)  # one row: what measuring takes is not the most
    how = {
        "data": {"train": [str(data)], "eval": [str(tmp_path / "held.jsonl")]},
        "task": "generate",
        "precision": "bfloat16",
    }
    recipe = tiny_recipe(tmp_path, arch=arch, **how, train={"tokens_per_pass": 8192, "rows_per_step": 2})
    found = resolve_run(recipe, root=tmp_path, device=named("H100"))
    assert found.forecast is not None, found.notes
    heavy, sizes = found.forecast.heavy, found.forecast.sizes
    scores = 18 * sizes.heads * heavy.load.squares * sizes.layers
    assert heavy.load.squares > 0
    assert (found.forecast.memory.activations > scores) == (arch == "gemma2")


@pytest.fixture
def noisy_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of attention adds in another order each time, unless kernels have to repeat."""
    right = F.scaled_dot_product_attention

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any) -> Any:
            return query.view_as(query)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            strict = torch.are_deterministic_algorithms_enabled()
            state = torch.random.get_rng_state()
            torch.seed()
            noise = torch.randn_like(grad) * grad.abs().max() * (0 if strict else 1e-6)
            torch.random.set_rng_state(state)
            return grad + noise

    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *a, **k: right(Noisy.apply(query), *a, **k))


def test_the_proof_that_a_run_resumes_asks_for_kernels_that_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noisy_attention: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = {proof.name: proof.passed for proof in selftest(tiny_recipe(tmp_path))}
    assert found["a resumed run is the same run"]
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {proof.name: proof.passed for proof in selftest(tiny_recipe(tmp_path))}
    assert not found["a resumed run is the same run"], "the planted noise is not seen"
    gc.collect()
    assert proofs.STEPS == 4


def test_a_card_is_waited_for_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices._fastest(lambda: None, "cuda:1", seconds=0)
    devices._fastest(lambda: None, "cuda:1", seconds=1e-9)
    assert waited
    assert set(waited) == {"cuda:1"}
