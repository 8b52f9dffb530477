"""Predictions of held-out rows: independent of batching and of dropout, equal to a sum by hand, written row by row."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation.predictions import classes, numbers, results, sets, tokens
from tiny_model import tiny_model
from tunesmith.data.collate import Collator, build_batch
from tunesmith.data.row_targets import RowTargets
from tunesmith.evaluation.predict_rows import predict_rows, row_results, sample_rows
from tunesmith.models.attention import use_packed_attention
from tunesmith.tasks import bind
from tunesmith.types import Labels, Row, Source

VOCAB = 80


class Shelf:
    """As much of a row store as an evaluation needs."""

    def __init__(self, lengths) -> None:
        draw = np.random.default_rng(0)
        self.rows = []
        for n in lengths:
            trained = np.arange(n) >= n // 2
            self.rows.append(Row(draw.integers(3, VOCAB, n).astype(np.int32), trained, Source("x.jsonl", 1)))
        self.lengths = np.array(lengths, np.int32)
        self.denominators = np.array([row.trained[1:].sum() for row in self.rows], np.float64)
        self.num_bytes = np.zeros(len(lengths), np.int32)
        self.learnt = RowTargets()

    def lengths_in(self, layout: str) -> np.ndarray:
        return self.lengths

    def row(self, index: int) -> Row:
        return self.rows[index]


SHELF = Shelf([3, 9, 40, 5, 17, 28, 4, 33])


def model_of(arch: str, *, dropout: float = 0.0):
    model = tiny_model(arch, vocab_size=VOCAB, dropout=dropout)
    use_packed_attention(model)
    return model


def outcomes(model, tokens_per_pass: int, *, layout="packed", rows=range(8)):
    collator = Collator(SHELF, layout=layout, device="cpu", masking=None, decoder_start=None, has_types=False)
    return predict_rows(model, bind("chat", None), collator, rows, tokens_per_pass=tokens_per_pass)


def loss(model, tokens_per_pass: int, *, layout="packed") -> float:
    found = outcomes(model, tokens_per_pass, layout=layout)
    return found.losses_I.sum() / found.counts_I.sum()


def independent_of_batching(measure) -> None:
    losses = [measure(tokens) for tokens in (1, 50, 100, 10_000)]
    assert max(losses) - min(losses) <= 1e-6 * max(losses)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_loss_does_not_depend_on_batching(layout):  # trap: L5
    model = model_of("gpt2")
    independent_of_batching(lambda tokens: loss(model, tokens, layout=layout))


def test_batching_test_catches_a_mean_of_batch_means():  # trap: L5 planted
    from tunesmith.data.collate import build_batch
    from tunesmith.data.sampler import make_micro_batches

    model = model_of("gpt2").eval()

    def broken(tokens: int) -> float:
        passes = make_micro_batches(range(8), SHELF.lengths.tolist(), tokens_per_pass=tokens, layout="packed")
        means = []
        for members in passes:
            batch = build_batch([SHELF.row(i) for i in members], members, layout="packed", device="cpu")
            measured = bind("chat", None).measure(model, batch)
            means.append(float(measured.losses_N.mean()))
        return sum(means) / len(means)

    with pytest.raises(AssertionError):
        independent_of_batching(broken)


def test_loss_is_the_sum_by_hand_over_the_targets():  # trap: L5
    model = model_of("llama").eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in SHELF.rows:
            ids = torch.from_numpy(row.ids.astype(np.int64))
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
            keep = torch.from_numpy(row.trained[1:])
            total += float(F.cross_entropy(logits[keep], ids[1:][keep], reduction="sum"))
            count += int(keep.sum())
    assert outcomes(model, 100).counts_I.sum() == count
    assert loss(model, 100) == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_logits_are_made_in_pieces(arch, monkeypatch):
    """Losses to rounding, and the same words, as of all logits at once, which never exist."""
    from tunesmith.models import fused_loss
    from tunesmith.tasks import bind

    model = model_of(arch).eval()
    batch = build_batch([SHELF.row(i) for i in range(8)], range(8), layout="packed", device="cpu")
    whole = bind("chat", None).measure(model, batch)
    output = fused_loss.find_output_layer(model)
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", {"cpu": 0})
    monkeypatch.setattr(fused_loss, "CHUNK_TARGETS", 5)
    sizes: list[int] = []
    logits = fused_loss.OutputLayer.logits
    monkeypatch.setattr(
        fused_loss.OutputLayer, "logits", lambda self, hidden: sizes.append(len(hidden)) or logits(self, hidden)
    )
    found = bind("chat", None, output=output).measure(model, batch)
    assert sum(sizes) == batch.num_targets > max(sizes) == 5
    assert torch.allclose(found.losses_N, whole.losses_N, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.outputs_N, whole.outputs_N)
    assert found.losses_N.dtype == torch.float32


def test_every_row_keeps_its_own_outcome_in_the_order_asked_for():
    model = model_of("llama").eval()
    order = [5, 0, 7, 2]
    some, every = outcomes(model, 60, rows=order), outcomes(model, 10_000)
    for i, row in enumerate(order):
        assert some.losses_I[i] == pytest.approx(every.losses_I[row], rel=1e-5)
        assert some.outputs[i].tolist() == every.outputs[row].tolist()
        assert some.targets[i].tolist() == SHELF.rows[row].ids[1:][SHELF.rows[row].trained[1:]].tolist()


def dropout_is_off_and_modes_come_back(model, measure) -> None:
    model.train()
    model.get_submodule("transformer.h.0").eval()
    modes = [module.training for module in model.modules()]
    assert measure() == measure()
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_and_every_mode_comes_back():  # trap: L11
    model = model_of("gpt2", dropout=0.5)
    dropout_is_off_and_modes_come_back(model, lambda: loss(model, 100))


def test_dropout_test_catches_a_model_left_in_training():  # trap: L11 planted
    from tunesmith.data.collate import build_batch

    model = model_of("gpt2", dropout=0.5)
    batch = build_batch(SHELF.rows, range(8), layout="packed", device="cpu")
    with pytest.raises(AssertionError):
        dropout_is_off_and_modes_come_back(
            model, lambda: float(bind("chat", None).measure(model, batch).losses_N.sum())
        )


@pytest.mark.parametrize("most", [0, 1, 7, 40, 60, 100])
def test_rows_of_smallest_hashes_equal_the_head_of_a_full_sort(most: int):
    generator = np.random.default_rng(0)
    store = SimpleNamespace(hashes=generator.integers(2**62, size=80).astype(np.uint64) // np.uint64(2**57))
    rows_I = generator.permutation(80)[:60]
    assert len(np.unique(store.hashes)) < 40, "some are equal, so that the order of rows has a say"
    expected = rows_I[np.argsort(store.hashes[rows_I], kind="stable")][:most]
    assert sample_rows(store, rows_I, most).tolist() == expected.tolist()


FIVE = Labels("one", ("a", "b", "c", "d", "e"))
TAGS = Labels("tags", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"))


def test_results_of_rows_by_head():
    def fields(head, labels, found):
        return [
            {k: v for k, v in row.items() if k not in ("hash", "loss", "count")} for row in results(head, labels, found)
        ]

    assert fields("next_token", None, tokens([[5, 6]], [[5, 7]])) == [{"correct": 1}]
    assert fields("tokens", TAGS, tokens([[0, 1]], [[0, 3]])) == [{"tags": ["O", "B-LOC"], "predicted": ["O", "B-PER"]}]
    assert fields("sequence", Labels("number"), numbers([2], [1])) == [{"value": 1, "predicted": 2}]
    [one] = fields("sequence", FIVE, classes((np.eye(5) * 0.95 + 0.01)[[3]], [1]))
    assert one == {"label": "b", "predicted": "d", "probability": pytest.approx(0.96, abs=1e-6)}
    [many] = fields("sequence", Labels("many", ("a", "b")), sets([[0.9, 0.2]], [[1, 1]]))
    assert many == {"label": ["a", "b"], "predicted": ["a"], "probability": [pytest.approx(0.9, abs=1e-6)]}


def test_results_have_the_bytes_that_the_loss_is_of():
    found = tokens([[5], [6]], [[5], [6]], num_bytes=[4, 0])
    assert [row.get("bytes") for row in results("next_token", None, found)] == [4, None]
    assert [row.get("bytes") for row in results("masked_token", None, found)] == [None, None]


def test_results_begin_with_hash_loss_and_count():
    found = tokens([[1]], [[1]], losses=[0.5], counts=[2.0])
    assert row_results("next_token", None, found, np.array([255], np.uint64)) == [
        {"hash": "00000000000000ff", "loss": 0.5, "count": 2.0, "correct": 1}
    ]
