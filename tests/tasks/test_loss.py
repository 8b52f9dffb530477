"""One definition of the loss: a sum over targets, divided once by the targets of the whole step."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tiny_model import tiny_model
from tunesmith.data.collate import build_batch
from tunesmith.models.attention import use_packed_attention
from tunesmith.tasks import bind
from tunesmith.types import Row, Source

VOCAB = 96
LOSS = bind("chat", None).loss_sum


def rows_of(lengths, *, seed=0) -> list[Row]:
    generator = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        trained = np.zeros(n, bool)
        trained[n - max(1, n // 2) :] = True
        rows.append(Row(generator.integers(3, VOCAB, n).astype(np.int32), trained, Source("x.jsonl", 1)))
    return rows


def model_of(arch: str):
    model = tiny_model(arch, vocab_size=VOCAB).train()
    use_packed_attention(model)
    return model


def gradients(model, rows, passes, *, layout="packed", divide="step"):
    """The loss and gradients of one step over `rows`, cut into `passes`."""
    model.zero_grad(set_to_none=True)
    count = sum(int(row.trained[1:].sum()) for row in rows)
    total = 0.0
    for members in passes:
        batch = build_batch([rows[i] for i in members], members, layout=layout, device="cpu")
        loss_sum = LOSS(model, batch)
        divisor = count if divide == "step" else batch.num_targets * len(passes)
        (loss_sum / divisor).backward()
        total += float(loss_sum.detach().double()) / divisor
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def splits_agree(model, *, layout="packed", divide="step") -> None:
    """1×8, 8×1 and 4×2 passes of mixed lengths: 1e-5 is float32 noise, a mean of means is off by one."""
    rows = rows_of([3, 5, 9, 40, 4, 17, 28, 11])
    loss, reference = gradients(model, rows, [range(8)], layout=layout)
    for size in (1, 2):
        passes = [range(k, k + size) for k in range(0, 8, size)]
        other_loss, other = gradients(model, rows, passes, layout=layout, divide=divide)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert relative(other, reference) <= 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_passes_do_not_change_loss_or_gradients(arch, layout):  # trap: L1
    splits_agree(model_of(arch), layout=layout)


def test_pass_test_catches_a_mean_of_means():  # trap: L1 planted
    with pytest.raises(AssertionError):
        splits_agree(model_of("llama"), divide="mean of means")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_loss_sum_equals_cross_entropy_in_float64_row_by_row(arch):  # trap: L4, T11, T12
    model = tiny_model(arch, vocab_size=VOCAB).eval()
    rows = rows_of([3, 5, 9, 40])
    expected = 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        labels = torch.where(torch.from_numpy(row.trained), ids, -100)[1:]
        expected += float(F.cross_entropy(logits, labels, reduction="sum"))
    use_packed_attention(model)
    for layout in ("packed", "padded"):
        batch = build_batch(rows, range(4), layout=layout, device="cpu")
        # 1e-5: float32 logits, compared with their float64 log-softmax
        assert float(LOSS(model, batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_targets_is_zero_and_never_nan():  # trap: L6
    model = model_of("llama")
    row = Row(np.array([5, 6, 7], np.int32), np.zeros(3, bool), Source("x.jsonl", 1))
    loss = LOSS(model, build_batch([row], (0,), layout="packed", device="cpu"))
    assert float(loss.detach()) == 0.0


def test_measure_tells_each_loss_and_each_first_choice():
    model = model_of("llama").eval()
    rows = rows_of([7, 9])
    batch = build_batch(rows, (0, 1), layout="packed", device="cpu")
    measured = bind("chat", None).measure(model, batch)
    with torch.no_grad():
        assert float(measured.losses_N.sum()) == pytest.approx(float(LOSS(model, batch)), rel=1e-6)
    assert len(measured.losses_N) == len(measured.outputs_N) == batch.num_targets
    assert batch.row_of_N.tolist() == [0] * int(rows[0].trained[1:].sum()) + [1] * int(rows[1].trained[1:].sum())
