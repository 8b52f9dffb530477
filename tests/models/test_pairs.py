"""Encoder–decoders on rows packed end to end: the answers, losses and gradients of padded batches, by either way of
computing attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from packed import VOCAB
from tunesmith.data.batch import build_batch
from tunesmith.data.filling import WHOLE, fill
from tunesmith.models import agreement, attention, distances, dropping, grouped, norms
from tunesmith.models.agreement import pairs_agree
from tunesmith.models.attention import UnsupportedAttentionError, use_ragged
from tunesmith.models.blocks import Layout
from tunesmith.models.checkpointing import checkpoint_layers
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.segments import PairSegments, Segments
from tunesmith.types import Batch, Row, Source

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {}),
    "t5 v1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", {}),
    "umt5": ("umt5", {}),
}
SIDES = ((20, 7), (5, 30), (11, 3), (40, 12), (17, 7), (1, 1))
"""Tokens of source and target; as many sources longer than their targets as not, two of equal targets."""


def model_of(kind: str) -> PreTrainedModel:
    """Biases and queries so large that a wrong distance or row moves logits by whole units."""
    name, more = KINDS[kind]
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, vocab_size=VOCAB, **sizes, **ids, **more))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_(std=2.0)
            if name.endswith(".q.weight"):
                weight.mul_(4)
    return model


def rows_of(sides: Sequence[tuple[int, int]] = SIDES) -> list[Row]:
    draw = np.random.default_rng(0)
    drawn = [(draw.integers(3, VOCAB, source + target).astype(np.int32), source) for source, target in sides]
    return [Row(ids, np.arange(len(ids)) >= source, Source("x", 1)) for ids, source in drawn]


def batch_of(layout: str, sides: Sequence[tuple[int, int]] = SIDES) -> Batch:
    return build_batch(rows_of(sides), range(len(sides)), layout=layout, device="cpu", decoder_start=0)


def answers(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The loss, and the gradient of every weight."""
    model.zero_grad()
    logits_NV = logits_at_targets(model, batch)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    loss = F.cross_entropy(logits_NV.to(wide), batch.targets_N, reduction="sum")
    loss.backward()
    return {"loss": loss.detach(), **{name: weight.grad.clone() for name, weight in model.named_parameters()}}


def assert_alike(ours: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Of the largest number of each tensor."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_answer_and_learn_as_padded_ones(kind, dtype, tolerance, plain):
    """1e-12 and 1e-5 of the largest are rounding in another order. Filled up to whole sizes too."""
    model = model_of(kind).to(dtype)
    expected = answers(model, batch_of("encoder_decoder"))
    assert all(grad.abs().max() > 0 for grad in expected.values())
    use_ragged(model, plain=plain)
    packed = batch_of("ragged_pairs")
    assert packed.num_computed == packed.num_tokens < batch_of("encoder_decoder").num_computed
    assert_alike(answers(model, packed), expected, tolerance=tolerance)
    assert_alike(answers(model, fill(packed)), expected, tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_after_it_padded_batches_and_writing_are_what_they_were(kind):
    model, batch = model_of(kind).eval(), batch_of("encoder_decoder")
    told = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "max_new_tokens": 6, "do_sample": False}
    expected, written = answers(model, batch), model.generate(**told)
    use_ragged(model)
    assert_alike(answers(model, batch), expected, tolerance=0)
    assert torch.equal(model.generate(**told), written)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_alone_reads_packed_rows_too(kind):
    """A model that is no encoder–decoder, but has its attention: it gets whole rows, and no pairs."""
    encoder = model_of(kind).double().eval().get_encoder()
    rows = [torch.tensor(row.ids[None], dtype=torch.int64) for row in rows_of()]
    alone = torch.cat([encoder(input_ids=ids_1T).last_hidden_state for ids_1T in rows], dim=1)
    segments = Segments.of([ids_1T.shape[1] for ids_1T in rows], device=torch.device("cpu"))
    for plain in (False, True):
        use_ragged(encoder, plain=plain)
        with attention.ragged_pass() as trace:
            packed = encoder(input_ids=torch.cat(rows, dim=1), segments=segments).last_hidden_state
        assert trace.calls == 2
        torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_have_the_same_gradients(kind):
    model, batch = model_of(kind).train(), batch_of("ragged_pairs")
    use_ragged(model)
    expected = answers(model, batch)
    checkpoint_layers(model, 3)
    assert_alike(answers(model, batch), expected, tolerance=0)


def test_in_bfloat16_packed_rows_are_as_near_to_the_truth_as_padded_ones():
    """Relative distance of all gradients to those in float64."""
    model = model_of("t5").bfloat16()
    truth = answers(copy.deepcopy(model).double(), batch_of("encoder_decoder"))
    padded = answers(model, batch_of("encoder_decoder"))
    use_ragged(model)
    packed = answers(model, batch_of("ragged_pairs"))

    def away(found: dict[str, Tensor]) -> float:
        return float(sum((found[name].double() - true).norm() / true.norm() for name, true in truth.items()))

    assert away(packed) < 1.2 * away(padded)


def mean_loss(model: PreTrainedModel, layout: str, num: int) -> float:
    batch = batch_of(layout, SIDES[:3])
    with torch.no_grad():
        losses = [F.cross_entropy(logits_at_targets(model, batch), batch.targets_N) for _ in range(num)]
    return float(torch.stack(losses).mean())


def test_dropout_of_attention_is_drawn_from_the_same_distribution():
    """The mean loss of 400 draws: two of them differ by less than a third of what dropout changes."""
    model = model_of("t5").train()
    for module in model.modules():
        if hasattr(module, "relative_attention_num_buckets"):
            module.dropout = 0.3
    torch.manual_seed(0)
    padded = mean_loss(model, "encoder_decoder", 400)
    use_ragged(model)
    packed, without = mean_loss(model, "ragged_pairs", 400), mean_loss(model.eval(), "ragged_pairs", 1)
    assert abs(packed - padded) < abs(packed - without) / 3


def test_no_biases_are_made_but_those_of_the_longest_row(monkeypatch):
    """41 sources of 20 tokens: 820 × 820 numbers a head would be 1,600 times as many as are needed."""
    model, batch = model_of("umt5"), batch_of("ragged_pairs", [(20, 12)] * 41)
    use_ragged(model)
    asked, real = [], type(model.encoder.block[0].layer[0].SelfAttention).compute_bias

    def noted(module: nn.Module, queries: int, keys: int, **how: Any) -> Tensor:
        asked.append((queries, keys))
        return real(module, queries, keys, **how)

    monkeypatch.setattr(type(model.encoder.block[0].layer[0].SelfAttention), "compute_bias", noted)
    logits_at_targets(model, batch)
    assert asked == [(20, 20)] * 2 + [(12, 12)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_agrees(kind, dtype):
    found = pairs_agree(model_of(kind).to(dtype), rows_of()[:3])
    assert found.ok, found
    if dtype == torch.float32:
        assert found.max_difference <= 1e-4  # of logits of several units


def joined(side: str) -> Any:
    """Segments of which one side is one piece: its rows read each other."""
    real = PairSegments.of

    def of(sources: Sequence[int], targets: Sequence[int], *, device: torch.device) -> PairSegments:
        right = real(sources, targets, device=device)
        if side == "across":
            return replace(right, across=Segments.across([sum(targets)], [sum(sources)], device=device))
        return replace(right, **{side: Segments.of([sum(getattr(right, side).sizes[0])], device=device)})

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_self_check_sees_targets_that_read_every_source(dtype, monkeypatch):  # trap: T11
    monkeypatch.setattr("tunesmith.models.forward.PairSegments.of", joined("across"))
    assert "packed rows change its logits" in pairs_agree(model_of("t5").to(dtype), rows_of()[:3]).reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_self_check_sees_biases_of_other_distances(dtype, monkeypatch):
    real = distances._forward

    def moved(module: Any, own: Any, hidden: Tensor, *args: Any, **given: Any) -> Any:
        if given.get("segments") is not None and given.get("position_bias") is not None:
            given["position_bias"] = given["position_bias"].roll(1, -1)
        return real(module, own, hidden, *args, **given)

    monkeypatch.setattr(distances, "_forward", moved)
    assert not pairs_agree(model_of("t5").to(dtype), rows_of()[:3]).ok


def test_a_model_that_counts_positions_through_the_pass_stays_padded():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", vocab_size=VOCAB, **sizes, **heads))
    found = pairs_agree(bart, rows_of()[:3])
    assert not found.ok
    assert found.reason == "it counts its positions from the beginning of a pass, not of a row"


def test_experts_that_turn_tokens_away_stay_padded():
    """Which ones they turn away depends on what else stands in the line."""
    model = model_of("t5")
    model.config.expert_capacity = 64
    with pytest.raises(UnsupportedAttentionError, match="limited number"):
        use_ragged(model)


def test_a_bias_of_another_shape_is_refused():
    query = torch.zeros(1, 2, 5, 4)
    segments = Segments.of([3, 2], device=query.device)
    with pytest.raises(UnsupportedAttentionError, match="position biases"):
        attention.ragged_attention(
            nn.Identity(), query, query, query, None, segments=segments, position_bias=torch.zeros(1, 2, 5, 5)
        )


def test_both_sides_are_filled_or_none():
    """A side that is whole by itself gets a whole size more, for the row behind it needs a source to read."""
    batch = fill(batch_of("ragged_pairs", [(WHOLE, 5)]))
    assert (batch.filling, batch.decoder_filling) == (WHOLE, WHOLE - 5)
    assert batch.decoder_ids_BU is not None
    assert batch.decoder_ids_BU.shape == (1, WHOLE)


def test_norms_of_this_kind_are_one_node():
    model = model_of("t5")
    expected = answers(model, batch_of("encoder_decoder"))
    assert norms.use_fast_norms(model) == 2 * 2 + 1 + 2 * 3 + 1
    assert_alike(answers(model, batch_of("encoder_decoder")), expected, tolerance=1e-5)


def attended(sizes: Sequence[tuple[int, int]], three: list[Tensor], bias_HMM: Tensor | None, causal: bool) -> Tensor:
    """Row by row, spelled out."""
    query, key, value = (t.split([size[i] for size in sizes], dim=2) for t, i in zip(three, (0, 1, 1), strict=True))
    out = []
    for q, k, v in zip(query, key, value, strict=True):
        num_queries, num_keys = q.shape[2], k.shape[2]
        scores = q @ k.transpose(-1, -2) * 0.7
        if bias_HMM is not None:
            scores = scores + bias_HMM[:, :num_queries, :num_keys]
        if causal:
            scores = scores.masked_fill(torch.ones(num_queries, num_keys).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, dim=2).transpose(1, 2)


LENGTH = st.integers(1, 12) | st.integers(20, 40)


@given(sizes=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=7), reads=st.sampled_from(["across", "itself"]),
       causal=st.booleans(), has_bias=st.booleans(), heads=st.integers(1, 3))  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_grouped_products_with_a_bias_or_across_are_attention_row_by_row(sizes, *, reads, causal, has_bias, heads):
    """float64: 1e-11 of numbers of about 1 is rounding, summed over rows in the gradient of the bias."""
    if reads == "itself":
        sizes = [(num, num) for num, _ in sizes]
    causal = causal and reads == "itself"
    most = max(map(max, sizes))
    draw = torch.Generator().manual_seed(most)
    shapes = [(1, sum(size[i] for size in sizes), heads, 4) for i in (0, 1, 1)]
    three = [torch.randn(shape, generator=draw, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    for tensor in three:
        tensor.requires_grad_()
    bias = torch.randn(heads, most, most, generator=draw, dtype=torch.float64).requires_grad_() if has_bias else None
    layout = Layout.of(sizes, num_heads=heads, num_groups=heads, causal=causal, like=three[0].detach())
    ours = grouped.attend(*three, layout, scaling=0.7, bias_HMM=bias)
    expected = attended(sizes, three, bias, causal)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
    grad = torch.randn(ours.shape, generator=draw, dtype=torch.float64)
    leaves = [*three, *([] if bias is None else [bias])]
    found, true = (torch.autograd.grad(out, leaves, grad) for out in (ours, expected))
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_with_dropout_a_bias_has_the_gradient_of_the_weights_that_are_left():
    """One block of three rows whose sources are filled up."""
    sizes, heads, p = [(7, 9), (5, 8), (7, 6)], 2, 0.4
    draw = torch.Generator().manual_seed(3)
    three = [
        torch.randn(1, sum(size[i] for size in sizes), heads, 4, generator=draw, dtype=torch.float64).transpose(1, 2)
        for i in (0, 1, 1)
    ]
    bias = torch.randn(heads, 9, 9, generator=draw, dtype=torch.float64).requires_grad_()
    layout = Layout.of(sizes, num_heads=heads, num_groups=heads, causal=False, like=three[0])
    [block] = layout.blocks
    torch.manual_seed(5)
    ours = grouped.attend(*three, layout, scaling=1.0, dropout=p, bias_HMM=bias)
    torch.manual_seed(5)
    masks, share = dropping.kept(torch.empty(block.num, block.queries, block.keys, dtype=torch.float64), p)
    masks_SHQK = masks.view(len(sizes), heads, block.queries, block.keys)
    out = [torch.empty(0)] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], -sizes[i][0]))
    parts = [t.split([size[i] for size in sizes], dim=2) for t, i in zip(three, (0, 1, 1), strict=True)]
    for place, i in enumerate(order):
        q, k, v = (part[i] for part in parts)
        num_queries, num_keys = sizes[i]
        weights = (q @ k.transpose(-1, -2) + bias[:, :num_queries, :num_keys]).softmax(-1)
        out[i] = weights * masks_SHQK[place, :, :num_queries, :num_keys] / share @ v
    expected = torch.cat(out, dim=2).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    grad = torch.randn(ours.shape, generator=draw, dtype=torch.float64)
    [one], [other] = (torch.autograd.grad(answer, [bias], grad) for answer in (ours, expected))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_rows_share_a_block_only_if_both_sides_are_like():
    """A source of 60 that a target of 3 reads, and one that a target of 60 reads, would be mostly filling together."""
    like = torch.empty(0, dtype=torch.float64)
    layout = Layout.of([(3, 60), (60, 60), (62, 50), (4, 20)], num_heads=1, num_groups=1, causal=False, like=like)
    assert [(block.num, block.queries, block.keys) for block in layout.blocks] == [(2, 62, 60), (1, 3, 60), (1, 4, 20)]


def test_the_self_check_leaves_the_attention_as_it_was():
    model = model_of("t5")
    own = model.config._attn_implementation
    pairs_agree(model, rows_of()[:3])
    assert model.config._attn_implementation == own
    assert max(map(max, SIDES)) < agreement.PROBE_TOKENS
