"""The self-check: passes where packing is right, fails where it is not, whatever the precision."""

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from often import often
from packed import CAN, CANNOT, OFTEN, VOCAB, rows_of, sharp
from tiny_model import tiny_model
from tunesmith.models import attention, forward
from tunesmith.models.packing_check import check_packing
from tunesmith.types import HeadName, Labels

PRECISIONS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("arch", often(CAN, *OFTEN))
def test_agrees_where_packing_is_right(arch):
    """In bfloat16: test_neighbours."""
    found = check_packing(sharp(arch), "causal", rows_of((37, 11, 20)))
    assert found.ok, found
    assert found.error <= 1e-4  # of the spread of logits


def with_head(arch: str, head: HeadName) -> PreTrainedModel:
    labels = Labels("tags", ("O", "B")) if head == "tokens" else Labels("number")
    return sharp(arch, head=head, labels=labels)


@pytest.mark.parametrize("head", ["sequence", "tokens"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_agrees_of_models_with_heads(arch, head):
    assert check_packing(with_head(arch, head).bfloat16(), "causal", rows_of((37, 11, 20))).ok


@pytest.mark.parametrize("head", ["sequence", "tokens"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_disagrees_of_models_with_heads_when_rows_read_each_other(head, dtype, monkeypatch):  # trap: T11
    real = forward.Segments.of
    monkeypatch.setattr(forward.Segments, "of", lambda lengths, device: real([sum(lengths)], device=device))
    assert not check_packing(with_head("llama", head).to(dtype), "causal", rows_of((37, 11))).ok


def test_disagrees_of_a_head_on_an_attention_that_cannot_be_replaced():
    assert "cannot be replaced" in check_packing(with_head("bloom", "sequence"), "causal", rows_of((37, 11))).reason


@pytest.mark.parametrize("arch", CANNOT)
def test_disagrees_where_the_attention_cannot_be_replaced(arch):
    found = check_packing(sharp(arch), "causal", rows_of((37, 11)))
    assert not found.ok
    assert "cannot be replaced" in found.reason


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_disagrees_when_rows_read_each_other(dtype, monkeypatch):  # trap: T11
    real = forward.Segments.of
    monkeypatch.setattr(forward.Segments, "of", lambda lengths, device: real([sum(lengths)], device=device))
    found = check_packing(sharp("llama").to(dtype), "causal", rows_of((37, 11)))
    assert not found.ok
    assert "packed rows change its logits" in found.reason


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_disagrees_when_positions_do_not_restart(dtype):  # trap: T12
    model = sharp("gpt2").to(dtype)
    real = model.forward

    def counting_on(*, position_ids=None, **kwargs):
        return real(position_ids=None if position_ids is None else torch.arange(position_ids.shape[1])[None], **kwargs)

    model.forward = counting_on
    assert not check_packing(model, "causal", rows_of((37, 11))).ok


def test_disagrees_when_a_window_is_in_the_mask_alone(monkeypatch):
    """Rows of 128 tokens cannot show a window of 4096: what the model asked for does."""
    real = attention.packed_attention
    monkeypatch.setattr(
        attention, "packed_attention", lambda *args, **kw: real(*args, **{**kw, "sliding_window": None})
    )
    found = check_packing(sharp("mistral", sliding_window=400), "causal", rows_of((37, 11)))
    assert not found.ok
    assert "400 tokens by a mask alone" in found.reason


def test_disagrees_with_the_words_of_a_model_that_cannot_be_called_so():
    model = sharp("llama")
    real = model.forward

    def strict(input_ids, attention_mask, use_cache):
        return real(input_ids=input_ids, use_cache=use_cache)

    model.forward = strict
    found = check_packing(model, "causal", rows_of((5, 3)))
    assert not found.ok
    assert "position_ids" in found.reason


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (2,), (300, 5)])
def test_needs_no_certain_rows(lengths: Sequence[int]):
    assert check_packing(sharp("llama"), "causal", rows_of(lengths)).ok


@pytest.mark.parametrize("arch", ["llama", "gemma2", "bloom"])
def test_leaves_the_model_as_it_was(arch):
    model = tiny_model(arch, vocab_size=VOCAB, dropout=0.1)
    model.train()
    model.get_input_embeddings().eval()
    own = model.config._attn_implementation
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    check_packing(model, "causal", rows_of((9, 4)))
    assert model.config._attn_implementation == own
    assert model.training
    assert not model.get_input_embeddings().training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("window", [{"sliding_window": 0}, {"sliding_window": 8, "use_sliding_window": False}])
def test_a_window_that_no_layer_uses_is_none(window):
    """transformers makes the mask of every kind of layer that there could be: a window of 0 for Qwen2-MoE."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = tiny_model("qwen2_moe", vocab_size=VOCAB, shared_expert_intermediate_size=32, **sizes, **window)
    found = check_packing(model, "causal", rows_of((37, 11, 20)))
    assert found.ok, found


def test_a_window_that_a_mask_alone_knows_is_still_seen(monkeypatch):
    real = attention.trace_call
    monkeypatch.setattr(attention, "trace_call", lambda window: real(None))
    assert "limited to 8 tokens by a mask alone" in check_packing(sharp("mistral"), "causal", rows_of((37, 11))).reason
