"""Label smoothing, z-loss and NEFTune: equal to plain references, counted as the loss is, and never measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tiny_model import tiny_model
from tiny_run import same_run, stop_at, tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.data.collate import build_batch
from tunesmith.errors import ModelError, RecipeError, Stopped
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.neftune import EmbeddingNoise
from tunesmith.recipe.schema import Loss
from tunesmith.runs.folder import runs
from tunesmith.tasks import bind
from tunesmith.tasks.losses import target_losses
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train
from tunesmith.types import Batch, Labels, Row, Source

VOCAB = 96
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


def rows_of(lengths: list[int]) -> list[Row]:
    draw = np.random.default_rng(0)
    rows = []
    for n in lengths:
        trained = np.zeros(n, bool)
        trained[n - max(1, n // 2) :] = True
        rows.append(Row(draw.integers(3, VOCAB, n).astype(np.int32), trained, Source("x.jsonl", 1)))
    return rows


LENGTHS = [3, 5, 9, 40, 4, 17, 28, 11]
CUTS = {"1×8": [range(8)], "8×1": [[i] for i in range(8)], "4×2": [[i, i + 1] for i in range(0, 8, 2)]}


def step(loss_sum: Any, noise: EmbeddingNoise, cut: str, *, layout: str = "packed") -> tuple[float, Tensor]:
    """Loss and gradients of one step over eight rows, divided once by its targets."""
    model, rows = tiny_model("llama", vocab_size=VOCAB).train(), rows_of(LENGTHS)
    use_packed_attention(model)
    count, total = sum(int(row.trained[1:].sum()) for row in rows), 0.0
    for members in CUTS[cut]:
        batch = build_batch([rows[i] for i in members], members, layout=layout, device="cpu")  # type: ignore[arg-type]
        with noise.on(model, batch, step=3):
            summed = loss_sum(model, batch)
        (summed / count).backward()
        total += float(summed.detach().double()) / count
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def cuts_agree(loss_sum: Any, noise: EmbeddingNoise) -> None:
    """1e-5: float32 noise; whatever is normalised or drawn by pass is off by far more."""
    loss, gradient = step(loss_sum, noise, "1×8")
    for cut, layout in (("8×1", "packed"), ("4×2", "packed"), ("4×2", "padded")):
        other_loss, other = step(loss_sum, noise, cut, layout=layout)
        assert other_loss == pytest.approx(loss, rel=1e-5), cut
        assert float((other - gradient).norm() / gradient.norm()) <= 1e-5, cut


@every
@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_passes_change_neither_loss_nor_gradients(loss: Loss, alpha: float) -> None:  # trap: L1, L4
    cuts_agree(bind("chat", None, loss).loss_sum, EmbeddingNoise(alpha, seed=0))


@pytest.mark.parametrize("loss", [LOSSES["smoothing"], LOSSES["z"]], ids=["smoothing", "z"])
def test_the_pass_test_sees_an_addition_divided_by_its_own_pass(loss: Loss) -> None:  # trap: L4 planted
    plain, whole = bind("chat", None).loss_sum, bind("chat", None, loss).loss_sum

    def loss_sum(model: Any, batch: Any) -> Tensor:
        once = plain(model, batch)
        return once + (whole(model, batch) - once) / batch.num_targets

    with pytest.raises(AssertionError):
        cuts_agree(loss_sum, EmbeddingNoise(0.0, seed=0))


class OfThePass(EmbeddingNoise):
    """The bug of padded trainers: noise scaled by what a pass happens to hold."""

    def noise(self, batch: Any, step: int, *, width: int) -> Tensor:
        right = super().noise(batch, step, width=width)
        return right * (min(batch.lengths) / batch.num_tokens) ** 0.5


class OfTheOrder(EmbeddingNoise):
    """Drawn one after the other: another cut, other numbers."""

    def noise(self, batch: Any, step: int, *, width: int) -> Tensor:
        return super().noise(replace(batch, row_indices=tuple(range(len(batch.lengths)))), step, width=width)


@pytest.mark.parametrize("buggy", [OfThePass, OfTheOrder])
def test_the_pass_test_sees_noise_that_is_of_the_pass(buggy: type[EmbeddingNoise]) -> None:  # trap: L4 planted
    with pytest.raises(AssertionError):
        cuts_agree(bind("chat", None).loss_sum, buggy(50.0, seed=0))


def test_noise_is_uniform_by_the_length_of_each_row_and_never_on_padding() -> None:
    rows = rows_of([100, 400])
    batch = build_batch(rows, (7, 9), layout="padded", device="cpu")
    noise = EmbeddingNoise(5.0, seed=1).noise(batch, 2, width=64)
    assert noise.shape == (2, 400, 64)
    assert (noise[0, 100:] == 0).all()
    for line, length in ((noise[0, :100], 100), (noise[1], 400)):
        bound = 5.0 / (length * 64) ** 0.5
        assert line.abs().max() <= bound
        assert line.std() == pytest.approx(bound / 3**0.5, rel=0.02)  # that of a uniform distribution
        assert line.mean().abs() < 0.02 * bound
    ragged = EmbeddingNoise(5.0, seed=1).noise(build_batch(rows, (7, 9), layout="packed", device="cpu"), 2, width=64)
    assert torch.equal(ragged[0], torch.cat([noise[0, :100], noise[1]]))


def test_noise_follows_from_seed_step_and_row_and_leaves_other_random_numbers_alone() -> None:
    batch = build_batch(rows_of([8, 8]), (0, 1), layout="packed", device="cpu")
    before = torch.get_rng_state()
    first = EmbeddingNoise(5.0, seed=1).noise(batch, 2, width=16)
    assert torch.equal(first, EmbeddingNoise(5.0, seed=1).noise(batch, 2, width=16))
    assert torch.equal(torch.get_rng_state(), before)
    others = [
        EmbeddingNoise(5.0, seed=2).noise(batch, 2, width=16),
        EmbeddingNoise(5.0, seed=1).noise(batch, 3, width=16),
    ]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(first[0, :8], first[0, 8:])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "opt"])
def test_noise_is_added_to_what_the_model_looks_up(arch: str) -> None:
    model, batch = (
        tiny_model(arch, vocab_size=VOCAB).train(),
        build_batch(rows_of([6, 9]), (4, 5), layout="padded", device="cpu"),
    )
    seen: list[Tensor] = []
    noise = EmbeddingNoise(5.0, seed=0)
    with noise.on(model, batch, 1):
        hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
        model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT)
        hook.remove()
    plain = model.get_input_embeddings()(batch.ids_BT)
    torch.testing.assert_close(seen[0] - plain, noise.noise(batch, 1, width=plain.shape[-1]), rtol=1e-4, atol=1e-6)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_that_never_looks_its_tokens_up_is_refused() -> None:
    model, batch = tiny_model("llama", vocab_size=VOCAB), build_batch(rows_of([4]), (0,), layout="padded", device="cpu")
    with pytest.raises(ModelError, match="neftune_alpha"), EmbeddingNoise(5.0, seed=0).on(model, batch, 1):
        model(inputs_embeds=torch.zeros(1, 4, 64))


def held_out(events: Any) -> list[Any]:
    return [event.values["loss"] for event in events if event.kind == "evaluation"]


def test_held_out_rows_are_measured_by_the_plain_loss(tmp_path: Path) -> None:  # trap: L11
    """Before the first step the weights are the same whatever will be added, and so is what is measured."""
    found = {}
    for name, loss in {"plain": {}, "all": {"label_smoothing": 0.3, "z_loss": 0.1, "neftune_alpha": 15.0}}.items():
        setup = prepare(tiny_recipe(tmp_path, loss=loss), root=tmp_path)
        batch = setup.held_collator.batch([int(i) for i in setup.rows.held_rows], draw=0)
        setup.model.eval()
        found[name] = (setup.task.measure(setup.model, batch).losses_N, next(training_steps(setup)).values["loss"])
    assert torch.equal(found["plain"][0], found["all"][0])
    assert found["all"][1] > found["plain"][1] + 0.01


def test_a_run_with_all_of_them_resumes_bit_for_bit(tmp_path: Path) -> None:
    loss = {"label_smoothing": 0.1, "z_loss": 1e-3, "neftune_alpha": 5.0}
    straight = train(tiny_recipe(tmp_path, rows=12, dropout=0.1, loss=loss), root=tmp_path / "straight")
    with pytest.raises(Stopped):
        train(straight.recipe(), root=tmp_path / "stopped", listener=stop_at(3))
    same_run(resume(runs(tmp_path / "stopped")[0]), straight)


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


def test_noise_on_a_model_of_two_texts_is_refused(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "summarize", "encoder_decoder", loss={"neftune_alpha": 5.0})
    with pytest.raises(RecipeError, match=r"loss.neftune_alpha: is for models that read one text"):
        prepare(recipe, root=tmp_path)


def test_copies_of_a_row_in_one_step_have_noise_of_their_own(tmp_path: Path) -> None:  # trap: L15
    """In a run, where a row of weight 3 stands in a step three times: what the model looked up differs."""
    recipe = tiny_recipe(tmp_path, rows=2, loss={"neftune_alpha": 5.0}, train={"rows_per_step": 6, "max_steps": 1})
    file = recipe.data.train[0].model_copy(update={"weight": 3.0})
    data = recipe.data.model_copy(update={"train": (file,), "held_out": 0.0})
    setup = prepare(recipe.model_copy(update={"data": data}), root=tmp_path)
    drawn: list[Tensor] = []
    right = EmbeddingNoise.noise

    def keep(noise: EmbeddingNoise, batch: Batch, step: int, *, width: int) -> Tensor:
        found = right(noise, batch, step, width=width)
        ends = np.cumsum(batch.lengths)
        drawn.extend(found[0, end - length : end] for end, length in zip(ends, batch.lengths, strict=True))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingNoise, "noise", keep)
        [event] = training_steps(setup)
    assert sorted(event.values["rows"]) == [0, 0, 0, 1, 1, 1]
    assert len({str(noise.flatten()[:8].tolist()) for noise in drawn}) == 6
