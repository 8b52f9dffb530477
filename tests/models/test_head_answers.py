"""Every head answers about a row in a batch as about the row alone, by the model's own forward."""

# B rows, T tokens, N targets, C classes, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from often import often
from tiny_model import ENCODERS, TRANSLATORS, tiny_model
from tunesmith.data.collate import build_batch
from tunesmith.models import forward
from tunesmith.models.attention import Segments, use_packed_attention
from tunesmith.models.forward import logits_at_targets, sequence_logits
from tunesmith.models.packing_check import check_packing
from tunesmith.types import Batch, HeadName, Labels, Layout, Row, Source

VOCAB = 96
THREE = Labels("one", ("a", "b", "c"))
TAGS = Labels("tags", ("B", "I", "O"))
CAUSAL = ("llama", "gpt2", "qwen2")
OFTEN = ("bert", "roberta", "deberta-v2")
"""Encoders of each time: with types of tokens, with positions that begin at the padding, not packed."""
EOS = 2


def sharp(arch: str, head: HeadName, **settings: object) -> PreTrainedModel:
    """Weights large enough that a token read by mistake moves answers by tenths; rounding moves them by 1e-6."""
    labels = {"sequence": THREE, "tokens": TAGS}.get(head)
    # T5 knows no initializer_range; its factor of 1 is sharp already.
    wide = {} if arch == "t5" else {"init_std" if arch == "bart" else "initializer_range": 0.15}
    return tiny_model(arch, vocab_size=VOCAB, head=head, labels=labels, **wide, **settings).eval()


def rows_with(trained: Callable[[int], Sequence[int]], *, last: int | None = None) -> list[Row]:
    """Rows of 9, 17, 5 and 9 tokens with classes at the places that `trained` says."""
    generator = np.random.default_rng(0)
    rows = []
    for length in (9, 17, 5, 9):
        ids = generator.integers(3, VOCAB, length).astype(np.int32)
        if last is not None:
            ids[-1] = last
        mask = np.zeros(length, bool)
        mask[list(trained(length))] = True
        rows.append(Row(ids, mask, Source("x", 1), labels=np.zeros(int(mask.sum()), np.int64), second=length // 2))
    return rows


def batch_of(rows: Sequence[Row], layout: Layout, **how: object) -> Batch:
    return build_batch(rows, range(len(rows)), layout=layout, device="cpu", **how)


def own(model: PreTrainedModel, row: Row, **inputs: Tensor) -> Tensor:
    """The model's own answer about one row alone."""
    ids_1T = torch.tensor(row.ids[None].astype(np.int64))
    answer: Tensor = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), **inputs).logits[0]
    return answer


def has_types(model: PreTrainedModel) -> bool:
    return getattr(model.config, "type_vocab_size", 0) > 1


def types_of(model: PreTrainedModel, row: Row) -> dict[str, Tensor]:
    types_1T = (torch.arange(len(row.ids)) >= row.second).long()[None]
    return {"token_type_ids": types_1T} if has_types(model) else {}


@pytest.mark.parametrize("arch", often(ENCODERS, *OFTEN))
@torch.no_grad()
def test_encoders_answer_about_a_text_as_alone(arch: str) -> None:
    model, rows = sharp(arch, "sequence"), rows_with(lambda length: [0])
    expected_BC = torch.stack([own(model, row, **types_of(model, row)) for row in rows])
    answers_BC = sequence_logits(model, batch_of(rows, "padded", has_types=has_types(model)))
    assert answers_BC.shape == (4, 3)
    assert (answers_BC - expected_BC).abs().max() <= 1e-5
    assert (expected_BC[0] - expected_BC[3]).abs().max() > 1e-2


@pytest.mark.parametrize("head", ["tokens", "masked_token"])
@pytest.mark.parametrize("arch", often(ENCODERS, *OFTEN))
@torch.no_grad()
def test_encoders_answer_about_tokens_as_alone(arch: str, head: HeadName) -> None:
    model, rows = sharp(arch, head), rows_with(lambda length: range(1, length, 3))
    batch = batch_of(rows, "padded", has_types=has_types(model))
    expected_NC = torch.cat([own(model, row, **types_of(model, row))[row.trained] for row in rows])
    answers_NC = logits_at_targets(model, batch)
    assert answers_NC.shape == (batch.num_targets, VOCAB if head == "masked_token" else 3)
    assert (answers_NC - expected_NC).abs().max() <= 1e-4 if head == "masked_token" else 1e-5
    assert expected_NC.std() > 1e-2


@torch.no_grad()
def test_the_output_layer_of_an_encoder_sees_the_targets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = sharp("bert", "masked_token"), rows_with(lambda length: [1, 2])
    seen: list[tuple[int, ...]] = []
    model.cls.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    logits_at_targets(model, batch_of(rows, "padded"))
    assert seen == [(1, 8, 64)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("arch", CAUSAL)
@torch.no_grad()
def test_causal_models_tag_as_alone(arch: str, layout: Layout) -> None:
    model, rows = sharp(arch, "tokens"), rows_with(lambda length: range(0, length, 2))
    expected_NC = torch.cat([own(model, row)[row.trained] for row in rows])
    use_packed_attention(model)
    assert (logits_at_targets(model, batch_of(rows, layout)) - expected_NC).abs().max() <= 1e-5


def transformers_own(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The planted bug: the text's last token looked for by the pad token's id."""
    assert batch.mask_BT is not None
    ids_BT = batch.ids_BT.masked_fill(batch.mask_BT == 0, model.config.pad_token_id)
    logits_BC: Tensor = model(input_ids=ids_BT, attention_mask=batch.mask_BT).logits
    return logits_BC


# trap: A10
def assert_the_last_token_is_pooled(arch: str, layout: Layout, ask: Callable[[PreTrainedModel, Batch], Tensor]) -> None:
    """Texts that end in the end token, which pads too: the answer is that of the model without a pad token, alone."""
    model, rows = sharp(arch, "sequence", pad_token_id=None), rows_with(lambda length: [length - 1], last=EOS)
    with torch.no_grad():
        expected_BC = torch.stack([own(model, row) for row in rows])
        model.config.pad_token_id = model.config.eos_token_id = EOS
        use_packed_attention(model)
        answers_BC = ask(model, batch_of(rows, layout))
    assert (answers_BC - expected_BC).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_causal_models_classify_as_alone_even_if_padding_is_the_end_token(arch: str, layout: Layout) -> None:
    assert_the_last_token_is_pooled(arch, layout, sequence_logits)


@pytest.mark.parametrize("arch", CAUSAL)
def test_the_pooling_test_sees_a_last_token_that_is_known_by_its_id(arch: str) -> None:
    with pytest.raises(AssertionError):
        assert_the_last_token_is_pooled(arch, "padded", transformers_own)


def targets_as_written(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, labels=None, trained=np.arange(len(row.ids)) >= row.second) for row in rows]


# trap: A10
def assert_translators_answer_as_alone(arch: str) -> None:
    model, rows = sharp(arch, "next_token"), targets_as_written(rows_with(lambda length: [0]))
    start = model.config.decoder_start_token_id
    expected = []
    with torch.no_grad():
        for row in rows:
            source, target = (torch.tensor(part.astype(np.int64))[None] for part in np.split(row.ids, [row.second]))
            decoder_ids = torch.cat([torch.tensor([[start]]), target[:, :-1]], dim=1)
            expected.append(model(input_ids=source, decoder_input_ids=decoder_ids).logits[0])
        answers_NV = logits_at_targets(model, batch_of(rows, "encoder_decoder", decoder_start=start))
    # Logits of several units, and of tens for T5, whose output layer is not scaled down.
    assert (answers_NV - torch.cat(expected)).abs().max() <= 1e-4


@pytest.mark.parametrize("arch", TRANSLATORS)
def test_encoder_decoders_answer_as_alone(arch: str) -> None:
    assert_translators_answer_as_alone(arch)


@pytest.mark.parametrize("arch", TRANSLATORS)
def test_the_encoder_decoder_test_sees_padding_that_is_read(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward._inputs

    def unmasked(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {**right(model, batch), "attention_mask": torch.ones_like(batch.ids_BT)}

    monkeypatch.setattr(forward, "_inputs", unmasked)
    with pytest.raises(AssertionError):
        assert_translators_answer_as_alone(arch)


PACKED = ("bert", "roberta", "distilbert", "electra")
"""Encoders whose rows can be packed; of the others the check says no."""


@pytest.mark.parametrize("arch", often(ENCODERS, *OFTEN))
@pytest.mark.parametrize("head", ["sequence", "tokens", "masked_token"])
@torch.no_grad()
def test_packed_encoders_answer_as_alone_or_are_not_packed(arch: str, head: HeadName) -> None:
    model, rows = sharp(arch, head), rows_with(lambda length: [0] if head == "sequence" else range(length))
    found = check_packing(model, "encoder", rows, has_types=has_types(model))
    assert found.ok == (arch in PACKED), found.reason
    if not found.ok:
        assert found.reason
        return
    use_packed_attention(model)
    batch = batch_of(rows, "packed", has_types=has_types(model))
    answers = (sequence_logits if head == "sequence" else logits_at_targets)(model, batch)
    model.set_attn_implementation("sdpa")
    expected = torch.cat([own(model, row, **types_of(model, row)).reshape(-1, answers.shape[-1]) for row in rows])
    assert (answers - expected).abs().max() <= 1e-5


def test_the_check_catches_rows_that_read_each_other(monkeypatch: pytest.MonkeyPatch) -> None:  # trap: T11 planted
    model, rows = sharp("bert", "sequence"), rows_with(lambda length: [0])
    whole = Segments.of([sum(len(row.ids) for row in [*rows, rows[0]])], device=torch.device("cpu"))
    monkeypatch.setattr(forward.Segments, "of", lambda lengths, device: whole)
    assert not check_packing(model, "encoder", rows, has_types=True).ok


def test_the_check_catches_a_head_that_reads_every_token() -> None:
    model, rows = sharp("bert", "sequence"), rows_with(lambda length: [0])
    pooler = model.bert.pooler
    pooler.forward = lambda hidden: pooler.activation(pooler.dense(hidden.mean(1)))
    assert not check_packing(model, "encoder", rows, has_types=True).ok
