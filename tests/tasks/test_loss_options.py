"""Label smoothing and z-loss: equal to plain references, counted as the loss is, and never measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.test_loss import VOCAB, rows_of
from tiny_model import tiny_model
from tiny_run import same_run, stopped, tiny_recipe
from tunesmith.data.collate import build_batch
from tunesmith.errors import RecipeError
from tunesmith.models.attention import use_packed_attention
from tunesmith.recipe.schema import Loss
from tunesmith.tasks import bind
from tunesmith.tasks.losses import target_losses
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train
from tunesmith.types import Labels

LOSSES = {
    "plain": Loss(),
    "smoothing": Loss(label_smoothing=0.1),
    "z": Loss(z_loss=1e-2),
    "both": Loss(label_smoothing=0.2, z_loss=1e-3),
}
every = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def reference(logits_NV: Tensor, targets_N: Tensor, loss: Loss) -> Tensor:
    """The definition, one target at a time, in the dtype it is given."""
    total = logits_NV.new_zeros(())
    for logits_V, target in zip(logits_NV, targets_N, strict=True):
        probabilities_V = logits_V.exp() / logits_V.exp().sum()
        total = total - (1 - loss.label_smoothing) * probabilities_V[target].log()
        total = total - loss.label_smoothing * probabilities_V.log().mean()
        total = total + loss.z_loss * logits_V.exp().sum().log() ** 2
    return total


@every
def test_losses_and_gradients_equal_the_definition_in_float64(loss: Loss) -> None:
    logits = torch.randn(11, 37, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.randint(0, 37, (11,), generator=torch.Generator().manual_seed(1))
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    target_losses(ours, targets, loss).sum().backward()
    reference(theirs, targets, loss).backward()
    found, expected = target_losses(ours, targets, loss).sum(), reference(theirs, targets, loss)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)  # float32
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


LENGTHS = [3, 5, 9, 40, 4, 17, 28, 11]
CUTS = {"1×8": [range(8)], "8×1": [[i] for i in range(8)], "4×2": [[i, i + 1] for i in range(0, 8, 2)]}


def step(loss_sum: Any, cut: str, *, layout: str = "packed") -> tuple[float, Tensor]:
    """Loss and gradients of one step over eight rows, divided once by its targets."""
    model, rows = tiny_model("llama", vocab_size=VOCAB).train(), rows_of(LENGTHS)
    use_packed_attention(model)
    count, total = sum(int(row.trained[1:].sum()) for row in rows), 0.0
    for members in CUTS[cut]:
        batch = build_batch([rows[i] for i in members], members, layout=layout, device="cpu")  # type: ignore[arg-type]
        summed = loss_sum(model, batch)
        (summed / count).backward()
        total += float(summed.detach().double()) / count
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def cuts_agree(loss_sum: Any) -> None:
    """1e-5: float32 noise; whatever is normalised by pass is off by far more."""
    loss, gradient = step(loss_sum, "1×8")
    for cut, layout in (("8×1", "packed"), ("4×2", "packed"), ("4×2", "padded")):
        other_loss, other = step(loss_sum, cut, layout=layout)
        assert other_loss == pytest.approx(loss, rel=1e-5), cut
        assert float((other - gradient).norm() / gradient.norm()) <= 1e-5, cut


@every
def test_passes_change_neither_loss_nor_gradients(loss: Loss) -> None:  # trap: L1, L4
    cuts_agree(bind("chat", None, loss).loss_sum)


@pytest.mark.parametrize("loss", [LOSSES["smoothing"], LOSSES["z"]], ids=["smoothing", "z"])
def test_the_pass_test_sees_an_addition_divided_by_its_own_pass(loss: Loss) -> None:  # trap: L4 planted
    plain, whole = bind("chat", None).loss_sum, bind("chat", None, loss).loss_sum

    def loss_sum(model: Any, batch: Any) -> Tensor:
        once = plain(model, batch)
        return once + (whole(model, batch) - once) / batch.num_targets

    with pytest.raises(AssertionError):
        cuts_agree(loss_sum)


def held_out(events: Any) -> list[Any]:
    return [event.values["loss"] for event in events if event.kind == "evaluation"]


def test_held_out_rows_are_measured_by_the_plain_loss(tmp_path: Path) -> None:  # trap: L11
    """Before the first step the weights are the same whatever will be added, and so is what is measured."""
    found = {}
    for name, loss in {"plain": {}, "all": {"label_smoothing": 0.3, "z_loss": 0.1}}.items():
        setup = prepare(tiny_recipe(tmp_path, loss=loss), root=tmp_path)
        batch = setup.held_collator.batch([int(i) for i in setup.rows.held_rows], step=0)
        setup.model.eval()
        found[name] = (setup.task.measure(setup.model, batch).losses_N, next(training_steps(setup)).values["loss"])
    assert torch.equal(found["plain"][0], found["all"][0])
    assert found["all"][1] > found["plain"][1] + 0.01


@pytest.mark.slow  # they are no state: test_resume.py
def test_a_run_with_all_of_them_resumes_bit_for_bit(tmp_path: Path) -> None:
    loss = {"label_smoothing": 0.1, "z_loss": 1e-3}
    straight = train(tiny_recipe(tmp_path, rows=12, dropout=0.1, loss=loss), root=tmp_path / "straight")
    same_run(resume(stopped(straight.recipe(), tmp_path / "stopped", 3)), straight)


def test_class_weights_multiply_all_that_a_target_adds() -> None:
    labels = Labels("one", ("a", "b", "c"), weights_C=np.array([1.0, 2.0, 0.5]))
    model = tiny_model("bert", vocab_size=VOCAB, head="sequence", labels=labels, pad_token_id=0).eval()
    rows = [replace(row, labels=np.array([i % 3])) for i, row in enumerate(rows_of([5, 6, 7]))]
    for row in rows:
        row.trained[:] = [True] + [False] * (len(row.ids) - 1)
    batch = build_batch(rows, range(3), layout="padded", device="cpu")
    loss = Loss(label_smoothing=0.1, z_loss=0.01)
    plain = bind("classify", replace(labels, weights_C=None), loss)
    with torch.no_grad():
        logits = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
        expected = (target_losses(logits, batch.targets_N, loss) * torch.tensor([1.0, 2.0, 0.5])).sum()
        assert float(bind("classify", labels, loss).loss_sum(model, batch)) == pytest.approx(float(expected), rel=1e-5)
        assert float(plain.loss_sum(model, batch)) == pytest.approx(
            float(target_losses(logits, batch.targets_N, loss).sum()), rel=1e-5
        )
    assert F.cross_entropy(logits, batch.targets_N).isfinite()


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
@pytest.mark.parametrize("kind", ["many", "number"])
def test_what_is_not_defined_for_labels_is_refused(kind: Any, option: str) -> None:
    with pytest.raises(RecipeError, match=rf"loss.{option}: is for one class of several"):
        bind("classify", Labels(kind, ("a", "b")), Loss(**{option: 0.1}))
