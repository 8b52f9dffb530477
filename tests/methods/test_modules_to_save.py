"""Modules trained as they are beside adapters, tied ones above all."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods.saved import save_adapter
from methods.test_adapter_format import IDS, VOCAB, logits
from tiny_model import tiny_model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.adapter_format import CONFIG, WEIGHTS, load_adapter
from tunesmith.methods.lora import LoraAttachment, attach
from tunesmith.recipe.methods import LoraMethod


def base(arch: str = "llama", *, tied: bool = False) -> PreTrainedModel:
    return tiny_model(arch, vocab_size=VOCAB, tie_word_embeddings=tied).eval()


def trained(model: PreTrainedModel, **settings: object) -> LoraAttachment:
    """Three steps of plain gradient descent."""
    attachment = attach(model, LoraMethod(rank=4, **settings), seed=0)
    for _ in range(3):
        F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).backward()
        attachment.collect_gradients()
        with torch.no_grad():
            for tensor in attachment.trained.values():
                tensor.sub_(tensor.grad, alpha=0.3)
                tensor.grad = None
        attachment.publish()
    return attachment


# trap: A3
def assert_live_is_merged_is_reloaded(
    words: tuple[str, ...], folder: Path, *, tied: bool, save: Callable[..., None] = save_adapter
) -> None:
    model = base(tied=tied)
    attachment = trained(model, also_train=words)
    live = logits(model)
    assert (live - logits(base(tied=tied))).abs().max() > 0.01
    save(attachment, folder / "adapter", base="tiny/base")
    again = base(tied=tied)
    load_adapter(again, folder / "adapter")
    assert (logits(again) - live).abs().max() <= 1e-5
    theirs = peft.PeftModel.from_pretrained(base(tied=tied), folder / "adapter").eval()
    assert (logits(theirs) - live).abs().max() <= 1e-5
    attachment.merge()
    assert (logits(model) - live).abs().max() <= 1e-5
    model.save_pretrained(folder / "merged")
    assert model.config.tie_word_embeddings == tied
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert (logits(reloaded) - live).abs().max() <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")])
def test_embeddings_and_head_are_right_live_merged_and_reloaded(
    words: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    assert_live_is_merged_is_reloaded(words, tmp_path, tied=tied)


@pytest.mark.filterwarnings("ignore")
def test_the_tied_test_sees_one_of_two_names_left_out(tmp_path: Path) -> None:
    def save(attachment: LoraAttachment, folder: Path, *, base: str) -> None:
        save_adapter(attachment, folder, base=base)
        tensors = load_file(folder / WEIGHTS)
        del tensors["base_model.model.lm_head.weight"]
        save_file(tensors, folder / WEIGHTS)
        config = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(config.replace('"model.embed_tokens",\n    "lm_head"', '"model.embed_tokens"'))

    with pytest.raises((AssertionError, ModelError)):
        assert_live_is_merged_is_reloaded(("embed_tokens",), tmp_path, tied=True, save=save)


def test_a_tied_weight_is_trained_once_and_said(tmp_path: Path) -> None:
    model = base(tied=True)
    attachment = attach(model, LoraMethod(also_train=("embed_tokens",)), seed=0)
    assert [name for name in attachment.trained if ".lora_" not in name] == ["model.embed_tokens.weight"]
    assert attachment.notes == (
        "method.also_train: lm_head is trained with model.embed_tokens: they are one weight (tied)",
    )


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    attachment = trained(base(tied=True), also_train=("embed_tokens",))
    save_adapter(attachment, tmp_path, base="tiny/base")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight and lm_head.weight differ, but are one weight"):
        load_adapter(base(tied=True), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"also_train": ("nrom",)}, "method.also_train: 'nrom' matches no module with weights. Did you mean norm"),
        ({"also_train": ("mlp",)}, "method.also_train: 'mlp': model.layers.0.mlp.down_proj has an adapter"),
        ({"also_train": ("q_proj",)}, "method.also_train: 'q_proj': model.layers.0.self_attn.q_proj has an adapter"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        attach(base(), LoraMethod(**settings), seed=0)
    assert str(caught.value).startswith(message)


def test_a_module_inside_another_is_trained_once() -> None:
    settings = LoraMethod(also_train=("layers.0", "layers.0.mlp", "norm"), targets=("re:layers\\.1\\.",))
    attachment = attach(base(), settings, seed=0)
    whole = [name for name in attachment.trained if ".lora_" not in name]
    assert whole[-1] == "model.norm.weight"
    assert len(whole) == len(set(whole)) == 9 + 1  # seven projections and two norms of layer 0, and the last norm
    assert all(name.startswith("model.layers.1") for name in attachment.layers)


def test_a_base_that_changed_cannot_be_looked_past() -> None:
    assert attach(base(), LoraMethod(), seed=0).keeps_base
    assert not attach(base(), LoraMethod(also_train=("norm",)), seed=0).keeps_base
