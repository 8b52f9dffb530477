"""Kernels of CUDA devices: which one is taken for which call, and that each computes attention, seen on a processor."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from packed import alone, batch_of, rows_of, sharp
from tunesmith.models import attention, cuda_attention, segments
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.cuda_attention import KERNELS, AttentionCase, AttentionKernel, choose_kernel, probe
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.segments import AttentionOptions, Segments, UnsupportedAttentionError, explicit_attention

CPU = torch.device("cpu")
PLAIN = AttentionCase(
    dtype=torch.float32, heads=4, groups=2, head_size=16, value_size=16, causal=True, window=False, softcap=False,
    dropout=False, shared=False,
)  # fmt: skip
CASES = {
    "causal": PLAIN,
    "own keys for each head": replace(PLAIN, groups=4),
    "window": replace(PLAIN, window=True),
    "softcap": replace(PLAIN, softcap=True),
    "window and softcap": replace(PLAIN, window=True, softcap=True),
    "prefix": replace(PLAIN, shared=True),
    "prefix and window": replace(PLAIN, shared=True, window=True),
    "both ways": replace(PLAIN, causal=False),
    "both ways and softcap": replace(PLAIN, causal=False, softcap=True),
    "values of another size": replace(PLAIN, value_size=24),
}
BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def varlen_by_hand(  # noqa: PLR0917 — as torch has it
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int, **how: Any
) -> Tensor:
    """torch's variable-length attention as its documentation has it: windows of (left, right), queries last of the
    keys."""
    assert (most_q, most_k) == tuple(int(starts.diff().max()) for starts in (starts_q, starts_k))
    assert how["enable_gqa"] == (query.shape[1] != key.shape[1])
    left, right = how["window_size"]
    out = []
    for (a, b), (c, d) in zip(*(pairwise(s.tolist()) for s in (starts_q, starts_k)), strict=True):
        q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
        at = torch.arange(d - c - (b - a), d - c)[:, None]
        keys = torch.arange(d - c)
        mask = ((keys >= at - left) | (left < 0)) & ((keys <= at + right) | (right < 0))
        out.append(explicit_attention(q, k, v, mask, AttentionOptions(True, 0.0, how["scale"], None, None))[0])
    return torch.cat(out, 1).transpose(0, 1)


@pytest.fixture
def starts_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card."""
    of = Segments.sharing.__func__

    def with_starts(cls: Any, pieces: Any, *, device: torch.device) -> Segments:
        made = of(cls, pieces, device=device)
        queries, keys = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in zip(*made.sizes, strict=True))
        return replace(made, cu_seqlens_q=queries, cu_seqlens_k=keys)

    monkeypatch.setattr(Segments, "sharing", classmethod(with_starts))


@pytest.fixture
def varlen_on_a_processor(monkeypatch: pytest.MonkeyPatch, starts_of_pieces: None) -> None:
    monkeypatch.setattr(cuda_attention, "_varlen_attn", lambda: varlen_by_hand)


@pytest.mark.parametrize("name", CASES)
def test_padded_rows_pass_the_probe(name):
    assert probe(BY_NAME["padded"], CASES[name], CPU) == ""


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.softcap])
def test_variable_length_attention_gets_the_right_arguments(name, varlen_on_a_processor):
    assert probe(BY_NAME["varlen"], CASES[name], CPU) == ""


@pytest.mark.skipif(cuda_attention._varlen_attn() is None, reason="this torch has no such operation")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.softcap])
def test_torchs_variable_length_operation_is_traced_with_these_arguments(name, starts_of_pieces):
    """Forward and backward over tensors without numbers: the operation checks its arguments and gives the shapes."""
    case = replace(CASES[name], dtype=torch.bfloat16)
    rows = Segments.sharing(cuda_attention.PROBE_SHARING if case.shared else cuda_attention.PROBE_PIECES, device=CPU)
    options = replace(OPTIONS, causal=case.causal, window=16 if case.window else None)
    tokens, keys = (sum(sizes) for sizes in zip(*rows.sizes, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (
            torch.empty(1, heads, length, 16, dtype=torch.bfloat16, requires_grad=True)
            for heads, length in ((case.heads, tokens), (case.groups, keys), (case.groups, keys))
        )
        out = cuda_attention.varlen(q, k, v, rows, options)
        gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert (out.shape, out.dtype) == ((1, tokens, case.heads, 16), torch.bfloat16)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [20, 64])
def test_half_precision_is_within_its_tolerance(dtype, size):
    case = replace(PLAIN, dtype=dtype, head_size=size, value_size=size)
    assert probe(BY_NAME["padded"], case, CPU) == ""


def wrong(change: Callable[[Segments, AttentionOptions], tuple[Segments, AttentionOptions]]) -> AttentionKernel:
    right = BY_NAME["padded"].run
    run = lambda q, k, v, segments, options: right(q, k, v, *change(segments, options))  # noqa: E731
    return AttentionKernel("wrong", lambda case, capability: True, run)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("causal", lambda s, o: (Segments.of([sum(q for q, _ in s.sizes)], device=CPU), o)),  # rows read each other
        ("causal", lambda s, o: (s, replace(o, causal=False))),
        ("window", lambda s, o: (s, replace(o, window=o.window + 1))),  # one key more
        ("softcap", lambda s, o: (s, replace(o, softcap=None))),
        ("causal", lambda s, o: (s, replace(o, scaling=0.3))),
    ],
)
def test_the_probe_sees_a_kernel_that_computes_something_else(case, change):  # trap: T11 planted
    with pytest.raises(AssertionError):
        assert probe(wrong(change), CASES[case], CPU) == ""
    assert probe(wrong(change), replace(CASES[case], dtype=torch.bfloat16), CPU).startswith("answers are off by")


def test_the_probe_sees_a_wrong_gradient():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g / 2

    def run(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        return BY_NAME["padded"].run(q, Halved.apply(k), v, *how)

    assert probe(AttentionKernel("wrong", lambda case, capability: True, run), PLAIN, CPU) == "keys are off by 0.5"


def test_the_probe_tries_dropout_and_consumes_no_random_number():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert probe(BY_NAME["padded"], replace(PLAIN, dropout=True), CPU) == ""
    assert torch.equal(torch.rand(3), expected)

    def run(*args: Any) -> Tensor:
        if args[-1].dropout:
            raise RuntimeError("FA3 does not support dropout")
        return BY_NAME["padded"].run(*args)

    kernel = AttentionKernel("no dropout", lambda case, capability: True, run)
    assert probe(kernel, PLAIN, CPU) == ""
    assert probe(kernel, replace(PLAIN, dropout=True), CPU) == "RuntimeError: FA3 does not support dropout"


def test_the_end_of_memory_in_a_probe_is_no_verdict():
    def run(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        probe(AttentionKernel("large", lambda case, capability: True, run), PLAIN, CPU)


HALF = replace(PLAIN, dtype=torch.bfloat16, head_size=64, value_size=64)


@pytest.mark.parametrize(
    ("case", "capability", "order"),
    [
        (HALF, (8, 0), ["varlen", "padded"]),
        (replace(HALF, causal=False), (9, 0), ["varlen", "padded"]),
        (replace(HALF, window=True, shared=True), (8, 6), ["varlen", "padded"]),
        (replace(HALF, dropout=True), (9, 0), ["padded"]),
        (replace(HALF, softcap=True), (9, 0), ["padded"]),
        (replace(HALF, dtype=torch.float32), (9, 0), ["padded"]),
        (replace(HALF, dtype=torch.float16), (7, 5), ["padded"]),  # T4
        (replace(HALF, head_size=20, value_size=20), (9, 0), ["padded"]),
        (replace(HALF, head_size=288, value_size=288), (9, 0), ["padded"]),
        (replace(HALF, value_size=32), (9, 0), ["padded"]),
    ],
)
def test_kernels_are_tried_in_order_of_preference(monkeypatch, case, capability, order):
    monkeypatch.setattr(cuda_attention, "_varlen_attn", lambda: varlen_by_hand)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tried: list[str] = []
    monkeypatch.setattr(cuda_attention, "probe", lambda kernel, case, device: tried.append(kernel.name) or "wrong")
    choose_kernel.cache_clear()
    with pytest.raises(UnsupportedAttentionError, match=r"no attention kernel .*padded: wrong"):
        choose_kernel(case, torch.device("cuda:0"))
    assert tried == order
    monkeypatch.setattr(cuda_attention, "probe", lambda kernel, case, device: "" if kernel.name == order[-1] else "no")
    assert choose_kernel(case, torch.device("cuda:0")).name == order[-1]
    choose_kernel.cache_clear()


def test_a_probe_leaves_no_tensor_in_a_recomputed_layer(monkeypatch):
    """Its tensors, saved inside the layer, would be missing when the layer is recomputed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    choose_kernel.cache_clear()

    def layer(x: Tensor) -> Tensor:
        kernel = choose_kernel(PLAIN, CPU)
        return kernel.run(x, x[:, :2], x[:, :2], Segments.of([3, 4], device=CPU), OPTIONS)

    x = torch.randn(1, 4, 7, 16, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    choose_kernel.cache_clear()


OPTIONS = AttentionOptions(causal=True, dropout=0.0, scaling=None, window=None, softcap=None)
LENGTHS = [300, 290, 200, 120, 90, 60, 40, 33, 20, 8, 3, 1]


@pytest.mark.parametrize("causal", [True, False])
def test_rows_are_padded_to_less_than_twice_their_length_in_few_calls(monkeypatch, causal):
    calls: list[tuple[int, ...]] = []
    sdpa = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        calls.append(tuple(q.shape))
        assert not how["enable_gqa"]  # a grouped call would keep all scores
        assert how["is_causal"] == causal
        assert attn_mask is None or attn_mask.shape == (q.shape[0], 1, 1, q.shape[2])
        return sdpa(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(segments.F, "scaled_dot_product_attention", watched)
    rows = Segments.of(LENGTHS, device=CPU)
    q, k = torch.randn(1, 4, sum(LENGTHS), 8), torch.randn(1, 2, sum(LENGTHS), 8)
    cuda_attention.padded(q, k, k, rows, replace(OPTIONS, causal=causal))
    assert calls == [(2, 4, 300, 8), (1, 4, 200, 8), (2, 4, 120, 8), (3, 4, 60, 8), (4, 4, 20, 8)]


@pytest.fixture(params=["padded", "varlen"])
def kernel(request, monkeypatch) -> AttentionKernel:
    """A kernel in place of what a processor would take."""
    request.getfixturevalue("varlen_on_a_processor")
    monkeypatch.setattr(attention, "_by_pieces", BY_NAME[request.param].run)
    return BY_NAME[request.param]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mistral"])
@torch.no_grad()
def test_models_answer_as_for_each_row_alone(arch, kernel):  # trap: T11
    if arch == "gemma2" and kernel.name == "varlen":
        pytest.skip("it has no softcap")
    model, rows = sharp(arch), rows_of()
    expected = alone(model, rows)
    use_packed_attention(model)
    assert (logits_at_targets(model, batch_of(rows)) - expected).abs().max() <= 1e-4


def test_on_a_cuda_device_the_kernel_that_was_proven_is_taken(monkeypatch):
    """Tensors that only say that they are there: nothing else of the processor's way is reached."""
    asked: list[Any] = []
    taken = AttentionKernel("taken", lambda case, capability: True, lambda *args: args)
    monkeypatch.setattr(attention, "choose_kernel", lambda case, device: asked.append((case, device)) or taken)
    monkeypatch.setattr(attention, "_by_pieces", lambda *args: pytest.fail("that is a processor's"))
    shape, device = (1, 4, 7, 64), torch.device("cuda:0")
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=shape, device=device)
    k = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 7, 64), device=device)
    rows = Segments.of([3, 4], device=CPU)
    with attention.packed_forward() as trace:
        found, _ = attention.packed_attention(torch.nn.Module(), q, k, k, None, segments=rows, sliding_window=3)
    assert found[:4] == (q, k, k, rows)
    assert asked == [(replace(HALF, window=True), device)]
    assert trace.kernels == {"taken"}


@torch.no_grad()
def test_nobody_looks_for_the_rows_of_a_packed_pass(monkeypatch):
    """transformers would find them in their positions, and make the processor wait for the card in every pass."""
    model, batch = sharp("llama"), batch_of(rows_of())
    use_packed_attention(model)
    monkeypatch.setattr(attention, "_transformers_find", lambda positions: pytest.fail("it waits"))
    logits_at_targets(model, batch)
    with pytest.raises(pytest.fail.Exception, match="it waits"):
        model(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch, varlen_on_a_processor: None) -> Iterator[list[str]]:
    """FlashAttention 3 as installed on a Hopper: which implementation was switched to, in order."""
    switched: list[str] = []
    functions = {
        "activate_flash_attention_impl": switched.append,
        "restore_flash_attention_impl": lambda: switched.append("restored"),
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_attention, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda_attention.importlib, "import_module", lambda name: SimpleNamespace(**functions))
    monkeypatch.setattr(cuda_attention, "_DROPPING", set())
    cuda_attention.newest_flash.cache_clear()
    choose_kernel.cache_clear()
    yield switched
    cuda_attention.newest_flash.cache_clear()
    choose_kernel.cache_clear()


def test_flash_attention_3_is_taken_where_it_is_right(flash: list[str]) -> None:
    case = replace(PLAIN, dtype=torch.bfloat16)
    assert choose_kernel(case, CPU).name == "varlen by FlashAttention 3"
    assert flash == ["FA3"]
    assert choose_kernel(replace(case, softcap=True), CPU).name == "padded"


@pytest.mark.parametrize("is_measured_first", [True, False])
def test_a_model_with_dropout_does_without_flash_attention_3(flash: list[str], is_measured_first: bool) -> None:
    plain = replace(PLAIN, dtype=torch.bfloat16)
    if is_measured_first:
        assert choose_kernel(plain, CPU).name == "varlen by FlashAttention 3"
    assert choose_kernel(replace(plain, dropout=True), CPU).name == "padded"
    assert choose_kernel(plain, CPU).name == "varlen"
    assert flash == ["FA3", "restored"] * is_measured_first


def test_a_wrong_flash_attention_3_is_switched_off_again(flash: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_one_key_too_few(*args: Any, **how: Any) -> Tensor:
        if flash[-1:] == ["FA3"]:
            how["window_size"] = (20, 0)
        return varlen_by_hand(*args, **how)

    monkeypatch.setattr(cuda_attention, "_varlen_attn", lambda: reads_one_key_too_few)
    assert choose_kernel(replace(PLAIN, dtype=torch.bfloat16), CPU).name == "varlen"
    assert flash == ["FA3", "restored"]


def test_repeatable_runs_and_other_cards_do_without_flash_attention_3(
    flash: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert cuda_attention.newest_flash(CPU) == ""
    cuda_attention.newest_flash.cache_clear()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert cuda_attention.newest_flash(CPU) == ""
    assert flash == []
