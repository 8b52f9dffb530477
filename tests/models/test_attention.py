"""Rows end to end in one pass answer as each alone: for every architecture that can, and seen to fail where it must."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError
from transformers import PreTrainedModel

from often import often
from packed import CAN, CANNOT, OFTEN, VOCAB, alone, batch_of, rows_of, sharp
from tiny_model import tiny_model
from tunesmith.models import attention, forward, short_row_attention
from tunesmith.models.attention import Segments, UnsupportedAttentionError, use_packed_attention
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.modes import checkpoint_layers
from tunesmith.types import Batch


@torch.no_grad()
def packed_answers_as_alone(arch: str, change=lambda batch: batch, **settings) -> None:
    """1e-4 absolute on logits of several units: rounding is 1e-5, one token read by mistake 1 and more."""
    model, rows = sharp(arch, **settings), rows_of()
    expected = alone(model, rows)
    use_packed_attention(model)
    assert (logits_at_targets(model, change(batch_of(rows))) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("arch", often(CAN, *OFTEN))
def test_packed_rows_answer_as_alone(arch):  # trap: T11, T12
    packed_answers_as_alone(arch)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_packed_test_catches_rows_that_read_each_other(arch, monkeypatch):  # trap: T11 planted
    real = attention.Segments.of
    monkeypatch.setattr(forward.Segments, "of", lambda lengths, device: real([sum(lengths)], device=device))
    with pytest.raises(AssertionError):
        packed_answers_as_alone(arch)


@torch.no_grad()
def test_packed_test_catches_a_mask_of_ones():  # trap: T11 planted
    model, rows = sharp("llama"), rows_of()
    expected, batch = alone(model, rows), batch_of(rows)
    logits_TV = model(
        input_ids=batch.ids_BT, position_ids=batch.positions_BT, attention_mask=torch.ones_like(batch.ids_BT)
    ).logits[0]
    assert (logits_TV[batch.predict_N] - expected).abs().max() > 1


def without_restart(batch: Batch) -> Batch:
    return replace(batch, positions_BT=torch.arange(batch.num_tokens)[None])


def test_packed_test_catches_positions_that_do_not_restart():  # trap: T12 planted
    with pytest.raises(AssertionError):
        packed_answers_as_alone("gpt2", change=without_restart)


def test_rotary_positions_hide_a_missing_restart():  # trap: T12, the reason why GPT-2 is in these tests
    packed_answers_as_alone("llama", change=without_restart)


@pytest.mark.parametrize(("arch", "dropped"), [("mistral", "sliding_window"), ("gemma2", "softcap")])
def test_packed_test_catches_an_ignored_keyword(arch, dropped, monkeypatch):
    real = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *args, **kw: real(*args, **{**kw, dropped: None}))
    cap = {"attn_logit_softcapping": 2.0} if arch == "gemma2" else {}
    with pytest.raises(AssertionError):
        packed_answers_as_alone(arch, **cap)


def test_softcap_is_honoured():
    packed_answers_as_alone("gemma2", attn_logit_softcapping=2.0)


@pytest.mark.parametrize("arch", often([*CAN, *CANNOT], *OFTEN, "bloom"))
@torch.no_grad()
def test_padded_rows_answer_as_alone(arch):
    model, rows = sharp(arch), rows_of()
    assert (logits_at_targets(model, batch_of(rows, "padded")) - alone(model, rows)).abs().max() <= 1e-4


@pytest.mark.parametrize("arch", often(["llama", "gpt2", "opt", "gemma2", "gemma3_text", "mistral"], "llama", "gemma2"))
def test_generation_is_the_same_with_the_ragged_attention_in_place(arch):
    """Left-padded prompts of two lengths, longer than a sliding window, with a cache."""
    model = sharp(arch)
    ids = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    expected = model.generate(ids, **how)
    use_packed_attention(model)
    assert torch.equal(model.generate(ids, **how), expected)


@pytest.mark.parametrize("arch", often(CAN, *OFTEN))
def test_no_mask_is_built_in_a_ragged_pass(arch, monkeypatch):
    model = sharp(arch)
    use_packed_attention(model)
    monkeypatch.setattr(attention, "sdpa_mask", lambda *args, **kwargs: pytest.fail("a mask was built"))
    logits_at_targets(model, batch_of(rows_of()))


def test_long_windows_are_cut_into_blocks():
    """Rows of 8 and more windows of 8 tokens, with a rest."""
    model, rows = sharp("mistral"), rows_of((77, 64, 9, 8))
    with torch.no_grad():
        expected = alone(model, rows)
        use_packed_attention(model)
        assert (logits_at_targets(model, batch_of(rows)) - expected).abs().max() <= 1e-4


def gradients(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    model.train().zero_grad()
    torch.manual_seed(1)
    F.cross_entropy(logits_at_targets(model, batch), batch.targets_N).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def recomputed_layers_give_the_same_gradients(arch: str) -> None:
    model, batch = sharp(arch, dropout=0.1), batch_of(rows_of())
    use_packed_attention(model)
    expected = gradients(model, batch)
    checkpoint_layers(model, 2)
    assert torch.equal(gradients(model, batch), expected)


@pytest.mark.parametrize("arch", often(CAN, *OFTEN))
def test_recomputed_layers_give_the_same_gradients_with_dropout(arch):  # trap: L10
    recomputed_layers_give_the_same_gradients(arch)


def test_recomputing_test_catches_a_recomputation_without_segments(monkeypatch):  # trap: L10 planted
    """As with a context that is closed before the backward: the recomputation attends over all rows."""
    real = attention.packed_attention
    forward_is_over = False

    def forgetful(*args, segments=None, **kwargs):
        return real(*args, segments=None if forward_is_over else segments, **kwargs)

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        nonlocal forward_is_over
        forward_is_over = False
        with attention.packed_forward():
            yield
        forward_is_over = True

    monkeypatch.setattr(attention, "packed_attention", forgetful)
    monkeypatch.setattr(forward, "packed_forward", watched)
    with pytest.raises((AssertionError, CheckpointError)):  # torch itself may notice that other tensors are saved
        recomputed_layers_give_the_same_gradients("llama")


@pytest.mark.parametrize(("dropout", "together"), [(0.1, [600, 600, 40]), (0.0, [40])])
def test_long_rows_are_multiplied_together_where_weights_are_dropped(monkeypatch, dropout, together):
    """torch's kernel has no dropout: a row goes through some twenty operations for it."""
    seen: list[int] = []
    attend = short_row_attention.short_row_attention

    def watched(query, key, value, layout, **settings):
        for block in layout.blocks:
            seen.extend([block.queries] * (block.num // key.shape[1]))
        return attend(query, key, value, layout, **settings)

    monkeypatch.setattr(short_row_attention, "short_row_attention", watched)
    q, k, v = (torch.randn(1, 2, 1240, 8, dtype=torch.bfloat16) for _ in range(3))
    segments = Segments.of([600, 600, 40], device=torch.device("cpu"))
    attention.packed_attention(torch.nn.Module(), q, k, v, None, segments=segments, dropout=dropout, is_causal=False)
    assert seen == together


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("lengths", [(7,), (5, 3), None])
def test_a_model_may_take_a_view_of_the_answers(lengths, softcap):
    """As AFMoE does with its heads; a pass may be one row."""
    q, k, v = torch.randn(3, 1, 4, sum(lengths or (7,)), 16)
    segments = lengths and Segments.of(lengths, device=torch.device("cpu"))
    out, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, segments=segments, softcap=softcap)
    assert out.view(1, q.shape[2], 64).shape == (1, q.shape[2], 64)


def test_attention_dropout_drops():
    model, batch = sharp("llama", dropout=0.5), batch_of(rows_of())
    use_packed_attention(model)
    with torch.no_grad():
        still = logits_at_targets(model, batch)
        assert not torch.equal(logits_at_targets(model.train(), batch), still)
        assert torch.equal(logits_at_targets(model.eval(), batch), still)


def layouts_train_alike(arch: str, layouts=("packed", "padded")) -> None:
    """20 steps of plain gradient descent: losses within 1e-5 of each other."""
    losses = []
    for layout in layouts:
        model = tiny_model(arch, vocab_size=VOCAB)
        use_packed_attention(model)
        descent = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for step in range(20):
            batch = batch_of(rows_of(seed=step % 3), layout)
            loss = F.cross_entropy(logits_at_targets(model, batch), batch.targets_N)
            descent.zero_grad()
            loss.backward()
            descent.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1  # it learns: equal losses of a model that stands still prove nothing


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_packed_and_padded_training_is_the_same(arch):  # trap: T13
    layouts_train_alike(arch)


def test_training_test_catches_rows_that_read_each_other(monkeypatch):  # trap: T13 planted
    real = attention.Segments.of
    monkeypatch.setattr(forward.Segments, "of", lambda lengths, device: real([sum(lengths)], device=device))
    with pytest.raises(AssertionError):
        layouts_train_alike("llama")


def test_a_model_that_swallows_the_segments_is_refused():
    model = sharp("llama")
    use_packed_attention(model)
    with attention.packed_forward(), pytest.raises(UnsupportedAttentionError):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
