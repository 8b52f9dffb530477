"""Filling a pass up to a whole size changes what it costs, and nothing of what it answers or teaches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from packed import batch_of, rows_of, sharp
from tunesmith.data.collate import pad_to_multiple
from tunesmith.data.prefixes import share_prefixes
from tunesmith.data.sampler import MULTIPLE, padded_size
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.forward import logits_at_targets
from tunesmith.types import Batch, Row, Source


def answers(model, batch: Batch) -> list[torch.Tensor]:
    """Logits, and the gradient of every weight."""
    model.zero_grad()
    logits_NV = logits_at_targets(model, batch)
    F.cross_entropy(logits_NV.float(), batch.targets_N).backward()
    return [logits_NV.detach(), *(weight.grad.clone() for weight in model.parameters())]


def assert_alike(model, batch: Batch, other: Batch) -> None:
    for one, expected in zip(answers(model, batch), answers(model, other), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)


def sizes(batch: Batch) -> tuple[int, int, int]:
    return batch.ids_BT.shape[1], batch.positions_BT.shape[1], batch.num_computed


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_model_answers_and_learns_the_same(arch):
    model, batch = sharp(arch).double(), batch_of(rows_of())
    use_packed_attention(model)
    whole = pad_to_multiple(batch)
    assert whole.filling > 0
    assert sizes(whole) == (padded_size(batch.num_tokens),) * 3
    assert (whole.num_tokens, whole.num_targets) == (batch.num_tokens, batch.num_targets)
    assert_alike(model, whole, batch)


def test_rows_that_share_what_they_begin_with_are_filled_too():
    first = np.arange(3, 23, dtype=np.int32)
    texts = [np.concatenate([first, np.array([i, i + 1], np.int32)]) for i in (4, 9)]
    rows = [Row(ids, np.ones(len(ids), bool), Source("x", 1)) for ids in texts]
    batch = batch_of(rows)
    shared = share_prefixes(batch, rows)
    assert shared.pieces
    model = sharp("llama").double()
    use_packed_attention(model)
    assert pad_to_multiple(shared).filling > 0
    assert_alike(model, pad_to_multiple(shared), shared)


def test_the_test_catches_filling_that_a_row_reads():
    """As if what stands behind belonged to the first rows: every row would be one place off."""
    model, batch = sharp("llama").double(), batch_of(rows_of())
    use_packed_attention(model)
    whole = pad_to_multiple(batch)
    joined = replace(whole, filling=0, lengths=(whole.filling, *batch.lengths))
    with pytest.raises(AssertionError):
        assert_alike(model, joined, batch)


def test_filling_is_a_token_of_the_data_at_positions_of_its_own():
    batch = replace(batch_of(rows_of((7, 5))), types_BT=torch.ones(1, 12, dtype=torch.int64))
    whole = pad_to_multiple(batch)
    assert whole.ids_BT[0, 12:].tolist() == [batch.ids_BT[0, -1].item()] * (MULTIPLE - 12)
    assert whole.positions_BT[0, 12:].tolist() == list(range(MULTIPLE - 12))
    assert whole.types_BT[0].tolist() == [1] * 12 + [0] * (MULTIPLE - 12)
