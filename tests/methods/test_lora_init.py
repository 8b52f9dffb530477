"""First matrices: drawn by name, of the properties that their papers state, and undone where they are not zero."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_model import tiny_model
from tunesmith.errors import RecipeError
from tunesmith.methods.adapter_format import CONFIG, WEIGHTS, load_adapter, save_adapter
from tunesmith.methods.lora import LoraAttachment, attach
from tunesmith.recipe.methods import LoraMethod

VOCAB = 61
IDS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.1.mlp.up_proj"


def base() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=VOCAB).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def step(model: nn.Module, tensors: list[Tensor], *, lr: float = 0.1) -> None:
    """One step of plain gradient descent."""
    F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    with torch.no_grad():
        for tensor in tensors:
            tensor.sub_(tensor.grad, alpha=lr)
            tensor.grad = None


def test_pissa_starts_from_the_nearest_matrix_of_its_rank() -> None:
    model = base()
    with torch.no_grad():  # singular values as trained weights have them: each a little smaller than the one before
        u_OK, _, v_KI = torch.linalg.svd(model.get_parameter(f"{LAYER}.weight"), full_matrices=False)
        singular = 0.9 ** torch.arange(64)
        model.get_parameter(f"{LAYER}.weight").copy_(u_OK * singular @ v_KI)
    weight = model.get_parameter(f"{LAYER}.weight").detach().clone()
    attachment = attach(model, LoraMethod(rank=8, alpha=12, init="pissa"), seed=0)
    a_RI, b_OR = attachment.matrices(LAYER)
    principal = 1.5 * b_OR @ a_RI
    # Eckart and Young: what is left has the other singular values, and no matrix of rank 8 leaves less.
    assert torch.linalg.matrix_norm(weight - principal, 2).item() == pytest.approx(singular[8].item(), rel=1e-4)
    torch.testing.assert_close(torch.linalg.svdvals(principal)[:8], singular[:8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a_RI.norm(dim=1), b_OR.norm(dim=0), rtol=1e-4, atol=1e-5)  # each takes the root


def test_pissa_learns_as_the_paper_has_it_which_changes_the_base() -> None:
    """It subtracts the start from the weight, this from the path: one trajectory."""
    model, other = base(), base()
    attachment = attach(model, LoraMethod(rank=8, alpha=8, init="pissa"), seed=0)
    with torch.no_grad():
        for name, layer in attachment.layers.items():
            assert layer.start is not None
            a_RI, b_OR = layer.start
            other.get_parameter(f"{name}.weight").sub_(layer.scale * b_OR @ a_RI)
    theirs = attach(other, LoraMethod(rank=8, alpha=8), seed=0)
    with torch.no_grad():
        for name, tensor in theirs.trained.items():
            tensor.copy_(attachment.trained[name])
    for _ in range(4):
        step(other, list(theirs.trained.values()))
        step(model, list(attachment.trained.values()))
    assert (logits(model) - logits(base())).abs().max() > 0.01
    # Float32, four steps.
    assert (logits(model) - logits(other)).abs().max() <= 2e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_pissa_is_plain_lora_of_twice_the_rank_on_the_untouched_base(tmp_path: Path, rslora: bool) -> None:
    model = base()
    attachment = attach(model, LoraMethod(rank=8, alpha=12, init="pissa", rslora=rslora), seed=0)
    step(model, list(attachment.trained.values()))
    attachment.publish()
    save_adapter(attachment, tmp_path, base="tiny/base")
    again = base()
    loaded = load_adapter(again, tmp_path)
    assert (loaded.settings.rank, loaded.settings.rslora) == (16, False)
    assert {layer.scale for layer in loaded.layers.values()} == {next(iter(attachment.layers.values())).scale}
    assert torch.equal(logits(again), logits(model))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5


# trap: A7
def assert_saved_is(live: Tensor, attachment: LoraAttachment, folder: Path) -> None:
    save_adapter(attachment, folder, base="tiny/base")
    theirs = peft.PeftModel.from_pretrained(base(), folder).eval()
    assert (logits(theirs) - live).abs().max() <= 1e-5


def test_the_comparison_sees_a_start_that_was_not_taken_off(tmp_path: Path) -> None:
    model = base()
    attachment = attach(model, LoraMethod(rank=8, init="pissa"), seed=0)
    step(model, list(attachment.trained.values()))
    live = logits(model)
    assert_saved_is(live, attachment, tmp_path / "right")
    for layer in attachment.layers.values():
        layer.start = None  # the file then holds what A and B are, not how far they have come
    with pytest.raises(AssertionError):
        assert_saved_is(live, attachment, tmp_path / "wrong")


def test_pissa_needs_as_many_singular_values_as_its_rank() -> None:
    with pytest.raises(RecipeError, match=r"^method.rank: 65: model.layers.0.self_attn.q_proj has 64 singular values"):
        attach(base(), LoraMethod(rank=65, init="pissa", targets=("q_proj",)), seed=0)


def test_orthogonal_matrices_are_not_zero_but_their_product_is() -> None:
    attachment = attach(base(), LoraMethod(rank=8, init="orthogonal"), seed=0)
    a_RI, b_OR = attachment.matrices(LAYER)
    # Half the directions each: entries of spread 0.1 · √½ on average.
    assert a_RI.std().item() == pytest.approx(0.0707, rel=0.1)
    assert b_OR.std().item() == pytest.approx(0.0707, rel=0.1)
    assert (b_OR @ a_RI).abs().max() < 1e-7
    with pytest.raises(RecipeError, match=r"^method.rank: 7: "):
        attach(base(), LoraMethod(rank=7, init="orthogonal"), seed=0)


def test_a_start_is_drawn_from_seed_and_name_alone() -> None:
    alone = attach(base(), LoraMethod(rank=4, init="orthogonal", targets=("up_proj",)), seed=3)
    among = attach(base(), LoraMethod(rank=4, init="orthogonal"), seed=3)
    other = attach(base(), LoraMethod(rank=4, init="orthogonal"), seed=4)
    for name, tensor in alone.trained.items():
        assert torch.equal(tensor, among.trained[name])
        assert not torch.equal(tensor, other.trained[name])


def test_a_saved_orthogonal_start_has_the_rank_it_had(tmp_path: Path) -> None:
    attachment = attach(base(), LoraMethod(rank=4, init="orthogonal"), seed=0)
    save_adapter(attachment, tmp_path, base="tiny/base")
    assert '"r": 4' in (tmp_path / CONFIG).read_text()
    assert load_file(tmp_path / WEIGHTS)[f"base_model.model.{LAYER}.lora_A.weight"].shape == (4, 64)
