"""Attention by block products is attention: forward and every gradient, against torch's kernel one row at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from packed import batch_of, rows_of, sharp
from tunesmith.models import short_row_attention
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.short_row_attention import BlockLayout, dropout_mask, kept_share, longest
from tunesmith.models.short_row_attention import short_row_attention as attend


def inputs(lengths: list[int], *, heads: int, groups: int, size: int, dtype=torch.float64) -> list[Tensor]:
    """Queries, keys and values as a model hands them over: transposed, not contiguous."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(1, sum(lengths), n, size) for n in (heads, groups, groups)]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [tensor.transpose(1, 2).requires_grad_() for tensor in drawn]


def row_by_row(qkv_1HTD: list[Tensor], lengths: list[int], *, causal: bool, scaling: float | None) -> Tensor:
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in qkv_1HTD), strict=True)
    out = [F.scaled_dot_product_attention(*row, is_causal=causal, scale=scaling, enable_gqa=True) for row in rows]
    return torch.cat(out, dim=2).transpose(1, 2)


def layout_of(lengths: list[int], qkv_1HTD: list[Tensor], *, causal: bool) -> BlockLayout:
    query, key, _ = qkv_1HTD
    heads = {"num_heads": query.shape[1], "num_groups": key.shape[1]}
    return BlockLayout.of([(n, n) for n in lengths], **heads, causal=causal, like=query.detach())


def answers(attend, qkv_1HTD: list[Tensor]) -> list[Tensor]:
    """The result, and the gradient of every input under one fixed random gradient of the result."""
    out = attend(qkv_1HTD)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, qkv_1HTD, grad)]


@given(
    lengths=st.lists(st.integers(1, 12) | st.integers(20, 40), min_size=1, max_size=6),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    size=st.sampled_from([1, 4, 6]),
    causal=st.booleans(),
    scaling=st.sampled_from([None, 0.3]),
)
@settings(deadline=None, max_examples=60)
def test_it_is_attention_row_by_row(lengths, *, groups, shared, size, causal, scaling):
    """float64: 1e-12 is its rounding over a dozen products. Lengths are such that rows are filled up, and some not."""
    qkv = inputs(lengths, heads=groups * shared, groups=groups, size=size)
    layout = layout_of(lengths, qkv, causal=causal)
    ours = answers(lambda t: attend(*t, layout, scaling=scaling), qkv)
    expected = answers(lambda t: row_by_row(t, lengths, causal=causal, scaling=scaling), qkv)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def spelled_out_with(
    masks: Tensor, qkv_1HTD: list[Tensor], lengths: list[int], *, causal: bool, share: float
) -> Tensor:
    """Attention row by row, of whose weights [S, G, R, L, K] those are left that `masks` has as ones."""
    out = []
    for mask_GRLK, *row in zip(masks, *(tensor.split(lengths, dim=2) for tensor in qkv_1HTD), strict=True):
        query, key, value = row
        num = query.shape[2]
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(num, num, dtype=torch.bool).tril(), -torch.inf)
        left = mask_GRLK.flatten(0, 1)[None, :, :num, :num]
        out.append(scores.softmax(-1) * left / share @ value)
    return torch.cat(out, dim=2).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_with_dropout_it_is_attention_with_the_weights_that_are_left(causal, p):
    """float64, one block with rows that are filled up; what is drawn follows from torch's generator."""
    lengths, groups, shared = [7, 5, 4], 2, 3
    qkv = inputs(lengths, heads=groups * shared, groups=groups, size=4)
    layout = layout_of(lengths, qkv, causal=causal)
    [block] = layout.blocks

    def ours(tensors: list[Tensor]) -> Tensor:
        torch.manual_seed(5)
        return attend(*tensors, layout, scaling=None, dropout=p)

    torch.manual_seed(5)
    masks = dropout_mask(torch.empty(block.num, block.queries, block.keys, dtype=torch.float64), p)
    share = kept_share(p)
    masks = masks.view(len(lengths), groups, shared, 7, 7)
    assert 0 < masks.mean() < 1
    expected = answers(lambda t: spelled_out_with(masks, t, lengths, causal=causal, share=share), qkv)
    for one, other in zip(answers(ours, qkv), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_where_it_is_the_faster_way():
    """Whole rows in float32 are left to torch's kernel, which has none of the operations that dropout asks for."""
    query = torch.zeros(1, 2, 3, 4)
    for dtype, dropout, cap, expected in (
        (torch.float32, 0.0, None, 0),
        (torch.float32, 0.1, None, 1024),
        (torch.bfloat16, 0.0, None, 512),
        (torch.bfloat16, 0.1, None, 1024),
        (torch.bfloat16, 0.0, 30.0, 0),
        (torch.float64, 0.1, None, 0),
    ):
        given = query.to(dtype)
        assert longest(given, given, dropout=dropout, softcap=cap, shared=False) == expected
    assert longest(query, query, dropout=0.0, softcap=None, shared=True) == 96


def test_in_bfloat16_it_is_as_near_to_the_truth_as_torchs_kernel():
    """Relative distance to float64, result and gradients: rounding in bfloat16 is 2^-9 = 0.002 a number."""
    lengths = [60, 60, 41, 40]
    exact = inputs(lengths, heads=6, groups=2, size=32)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    layout = layout_of(lengths, rounded, causal=True)
    truth = answers(lambda t: row_by_row(t, lengths, causal=True, scaling=None), exact)
    ours = answers(lambda t: attend(*t, layout, scaling=None), rounded)
    torchs = answers(lambda t: row_by_row(t, lengths, causal=True, scaling=None), rounded)
    for true, one, other in zip(truth, ours, torchs, strict=True):
        away, torchs_away = ((x.double() - true).norm() / true.norm() for x in (one, other))
        assert away < max(0.006, 1.5 * torchs_away)


def test_blocks_of_short_rows_compute_in_float32_whatever_the_inputs():
    """So that only what goes in and comes out is rounded: 2^-9 a number, half the distance of products in bfloat16."""
    lengths = [20, 18, 9]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs(lengths, heads=6, groups=2, size=32)]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    layout = layout_of(lengths, rounded, causal=False)
    assert {block.bias.dtype for block in layout.blocks} == {torch.float32}
    ours = answers(lambda t: attend(*t, layout, scaling=None), rounded)
    truth = answers(lambda t: row_by_row(t, lengths, causal=False, scaling=None), exact)
    for one, true in zip(ours, truth, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - true).norm() / true.norm() < 0.003
    assert {b.bias.dtype for b in layout_of([40, 20], rounded, causal=False).blocks} == {torch.bfloat16}


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2", "gpt2"])
def test_models_in_bfloat16_run_on_it(arch, monkeypatch):
    """mistral: rows longer than its window of 8 go to torch's kernel; gemma2's cap is spelled out."""
    seen = []
    real = attend
    monkeypatch.setattr(
        short_row_attention, "short_row_attention", lambda *args, **how: seen.append(args[3]) or real(*args, **how)
    )
    model, rows = sharp(arch).bfloat16(), rows_of()
    use_packed_attention(model)
    logits_at_targets(model, batch_of(rows))
    if arch == "gemma2":
        assert not seen
    else:
        assert seen
        assert all(block.keys <= (8 if arch == "mistral" else 23) for layout in seen for block in layout.blocks)


@pytest.mark.parametrize("most", [7, 11, 256])
def test_short_and_long_rows_of_one_pass_answer_alike(most, monkeypatch):
    """Whichever way a row is attended to: float32 through both, 1e-4 on logits of several units."""
    model, rows = sharp("llama"), rows_of()
    use_packed_attention(model)
    expected = logits_at_targets(model, batch_of(rows))
    monkeypatch.setattr(short_row_attention, "longest", lambda *args, **how: most)
    assert (logits_at_targets(model, batch_of(rows)) - expected).abs().max() <= 1e-4


def test_rows_of_like_length_are_multiplied_together():
    """12 to 28 lie within 16 of each other; 60 stands alone."""
    qkv = inputs([28, 60, 12, 20], heads=2, groups=1, size=4)
    layout = layout_of([28, 60, 12, 20], qkv, causal=True)
    assert [(block.num, block.queries, block.keys) for block in layout.blocks] == [(1, 120, 60), (3, 56, 28)]


@pytest.mark.parametrize("causal", [True, False])
def test_the_test_catches_gradients_of_what_is_filled_up(monkeypatch, causal):
    """Planted: answers of the filled places are learnt from."""
    real = BlockLayout.of

    def forgetful(*args, **how):
        return replace(real(*args, **how), filled=torch.empty(0, dtype=torch.int64))

    monkeypatch.setattr(BlockLayout, "of", forgetful)
    with pytest.raises(AssertionError):
        test_it_is_attention_row_by_row.hypothesis.inner_test(
            [5, 3], groups=2, shared=2, size=4, causal=causal, scaling=None
        )


def test_the_test_catches_rows_that_read_what_is_filled_up(monkeypatch):
    """Planted: an encoder's row without its bars."""
    real = BlockLayout.of

    def forgetful(*args, **how):
        layout = real(*args, **how)
        blocks = tuple(replace(block, bias=torch.zeros_like(block.bias)) for block in layout.blocks)
        return replace(layout, blocks=blocks)

    monkeypatch.setattr(BlockLayout, "of", forgetful)
    with pytest.raises(AssertionError):
        test_it_is_attention_row_by_row.hypothesis.inner_test(
            [5, 3], groups=2, shared=2, size=4, causal=False, scaling=None
        )


NUM = 400_000


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share(p: float, dtype: torch.dtype) -> None:
    """Within five deviations of the count of 400,000 draws; `kept_share` is exact to 2^-17."""
    mask = dropout_mask(torch.empty(NUM, dtype=dtype), p)
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(kept_share(p) - (1 - p)) <= 2**-17
    assert abs(float(mask.double().mean()) - kept_share(p)) <= 5 * (p * (1 - p) / NUM) ** 0.5
    assert kept_share(1e-9) == 1 - 1 / short_row_attention.LEVELS  # rare drops are drops


def test_elements_that_share_a_draw_are_dropped_independently() -> None:
    """All of its 64 bits are used: no correlation beyond five deviations, 1 / √n."""
    mask = dropout_mask(torch.empty(NUM), 0.5)
    four = mask.view(-1, 4)
    assert (four.mean(0) - 0.5).abs().max() <= 5 * 0.5 / len(four) ** 0.5
    related = torch.corrcoef(four.t()) - torch.eye(4)
    assert related.abs().max() <= 5 / len(four) ** 0.5
    assert (torch.corrcoef(torch.stack([mask[:-4], mask[4:]]))[0, 1]).abs() <= 5 / NUM**0.5


def test_the_test_catches_draws_of_63_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: torch's default range, with which one element in four is hardly ever dropped."""
    own = torch.Tensor.random_
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *args, **kwargs: own(self))
    with pytest.raises(AssertionError):
        test_elements_that_share_a_draw_are_dropped_independently()
