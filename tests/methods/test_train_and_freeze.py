"""Full tuning of a part of a model: the words mean what they say, or are refused."""

import pytest
import torch

from tiny_model import tiny_model
from tunesmith.errors import RecipeError
from tunesmith.methods.full import attach
from tunesmith.recipe.methods import FullMethod
from tunesmith.types import Labels


def trained(arch: str = "llama", **settings: object) -> list[str]:
    labels = {"head": "sequence", "labels": Labels("one", ("a", "b"))} if arch == "bert" else {}
    return list(attach(tiny_model(arch, vocab_size=64, **labels), FullMethod(**settings), seed=0).trained)


def test_all_is_trained_unless_words_say_otherwise() -> None:
    model = tiny_model(vocab_size=64)
    assert trained() == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("word", ["layers.1", "1", "re:layers\\.1\\."])
def test_layers_are_meant_by_name_and_by_expression(word: str) -> None:
    found = trained(train=(word,))
    assert found == [name for name in trained() if ".layers.1." in name]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train": ("lm_head", "model.norm")}, ["model.norm.weight", "lm_head.weight"]),
        ({"train": ("q_proj.weight",)}, [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]),
        (
            {"train": ("self_attn",), "freeze": ("0", "k_proj", "v_proj", "o_proj")},
            ["model.layers.1.self_attn.q_proj.weight"],
        ),
    ],
)
def test_names_mean_modules_and_weights(settings: dict[str, object], expected: list[str]) -> None:
    assert trained(**settings) == expected


def test_a_tied_weight_is_meant_by_either_name() -> None:
    model = tiny_model(vocab_size=64, tie_word_embeddings=True)
    assert list(attach(model, FullMethod(train=("lm_head",)), seed=0).trained) == ["model.embed_tokens.weight"]
    model = tiny_model(vocab_size=64, tie_word_embeddings=True)
    assert "model.embed_tokens.weight" not in attach(model, FullMethod(freeze=("lm_head",)), seed=0).trained


def test_what_is_frozen_gets_no_gradient_and_is_said() -> None:
    model = tiny_model(vocab_size=64)
    attachment = attach(model, FullMethod(freeze=("embed_tokens",)), seed=0)
    model(torch.arange(8)[None]).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is None
    share = model.model.embed_tokens.weight.numel() / sum(p.numel() for p in model.parameters())
    assert attachment.notes == (
        f"frozen: 1 weights, {100 * share:.1f} % of the model, such as model.embed_tokens.weight",
    )


# trap: A15
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ("q_porj",)}, r"method.train: 'q_porj' means no weight. Did you mean q_proj\? There are: .*up_proj"),
        ({"freeze": ("embed_tokens", "wte")}, r"method.freeze: 'wte' means no weight. There are: "),
        ({"train": ("re:layer\\[0\\]",)}, r"method.train: .* means no weight"),
        ({"train": ("lm_head",), "freeze": ("lm_head",)}, r"method.freeze: every weight that would be trained"),
    ],
)
def test_a_word_that_means_nothing_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        trained(**settings)


def test_a_head_that_is_new_is_not_left_random() -> None:
    labels = Labels("one", ("a", "b"))
    for settings, message in (
        ({"train": ("layer.1",)}, "method.train: classifier.weight is new, .* Name it too"),
        ({"freeze": ("classifier",)}, "method.freeze: classifier.weight is new, .* Leave it out"),
    ):
        model = tiny_model("bert", vocab_size=64, head="sequence", labels=labels)
        model.new_param_names = ("classifier.weight", "classifier.bias")
        with pytest.raises(RecipeError, match=message):
            attach(model, FullMethod(**settings), seed=0)
