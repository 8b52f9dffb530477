"""From the words of a recipe to modules."""

import pytest
import torch
from torch import nn

from often import often
from tiny_model import ENCODERS, SETTINGS, TRANSLATORS, seeing_model, tiny_model
from tunesmith.errors import RecipeError
from tunesmith.methods.adapter_format import module_names, shortest_ends, to_config
from tunesmith.methods.lora import attach
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.methods.targets import by_pattern, check_expression, find_modules, find_targets, not_linear
from tunesmith.recipe.methods import LoraMethod
from tunesmith.types import Labels

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def names(model: nn.Module, *targets: str) -> list[str]:
    return [target.name for target in find_targets(model, targets)]


def test_all_linear_is_every_linear_layer_of_the_decoder() -> None:
    model = tiny_model("llama", vocab_size=32)
    assert len(names(model, "all-linear")) == 14  # 7 in each of 2 layers; the head is not one of them
    assert sorted({name.rpartition(".")[2] for name in names(model, "all-linear")}) == PROJECTIONS


@pytest.mark.parametrize("arch", often(sorted(SETTINGS), "llama", "gpt2", "phi3", "qwen3_moe", "falcon"))
def test_groups_split_the_decoder_of_every_family(arch: str) -> None:
    model = tiny_model(arch, vocab_size=32)
    everything, attention = names(model, "all-linear"), names(model, "attention")
    mlp = [] if arch == "qwen3_moe" else names(model, "mlp")  # its experts are one tensor, not linear layers
    assert everything == [name for name in everything if name in {*attention, *mlp}]
    assert len(everything) == len(attention) + len(mlp)
    assert attention
    linear = {name for name, module in model.named_modules() if type(module).__name__.endswith(("Linear", "Conv1D"))}
    assert linear - set(everything) <= {"lm_head", "embed_out"}


@pytest.mark.parametrize("word", ["all-linear", "q_proj"])
def test_layers_that_only_images_pass_through_have_no_adapter(word: str) -> None:
    """They would stay as they are, and vLLM refuses an adapter that names them."""
    model = seeing_model(vocab_size=32)
    found = names(model, word)
    assert len(found) == {"all-linear": 14, "q_proj": 2}[word]
    assert all(name.startswith("model.language_model.layers.") for name in found)
    attachment = attach(model, LoraMethod(targets=(word,)), seed=0)
    assert attachment.notes[-1].startswith("21 linear layers such as vision_tower.encoder.layers.0.")
    assert {name for name in module_names(model) if name in found} == set(found)
    written = to_config(attachment, base="b", revision=None)["target_modules"]
    assert sorted(found) == sorted(n for n in module_names(model) if any(f".{n}".endswith(f".{w}") for w in written))


def test_a_router_named_like_a_linear_has_no_adapter_and_falcons_layer_has() -> None:
    """PhiMoE's router gives a choice of experts, Falcon's layers a product written in its own way."""
    model = tiny_model("phimoe", vocab_size=32, num_local_experts=4, num_experts_per_tok=2)
    assert {name.rpartition(".")[2] for name in names(model, "all-linear")} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "model.layers.0.mlp.router" in not_linear(model)
    attach(model, LoraMethod(), seed=0)
    model(input_ids=torch.arange(8)[None])
    assert len(names(tiny_model("falcon", vocab_size=32), "all-linear")) == 8


def test_a_layer_whose_weight_and_bias_are_read_can_be_adapted() -> None:
    model = tiny_model("falcon_mamba", vocab_size=32, state_size=8)
    attach(model, LoraMethod(), seed=0)
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    "arch", often([*ENCODERS, *TRANSLATORS, "llama", "gpt2"], "bert", "deberta-v2", "electra", "t5", "gpt2")
)
def test_groups_split_layers_of_models_with_heads_and_encoder_decoders(arch: str) -> None:
    how = {} if arch in TRANSLATORS else {"head": "sequence", "labels": Labels("one", ("a", "b", "c"))}
    model = tiny_model(arch, vocab_size=32, **how)
    everything, attention, mlp = (names(model, word) for word in ("all-linear", "attention", "mlp"))
    assert everything == [name for name in everything if name in {*attention, *mlp}]
    assert len(everything) == len(attention) + len(mlp)
    linear = {name for name, module in model.named_modules() if type(module).__name__.endswith(("Linear", "Conv1D"))}
    whole = {name.removesuffix(".weight") for name in attach(model, LoraMethod(), seed=0).whole.head}
    # What is left: the output layer of encoder–decoders, and ELECTRA's step from narrow embeddings to its width.
    assert linear - set(everything) - whole <= {"lm_head", "electra.embeddings_project"}
    assert whole.isdisjoint(everything)
    counts = {"t5": 20, "bart": 20, "deberta-v2": 12, "modernbert": 4, "gpt2": 4, "llama": 8}
    assert len(attention) == counts.get(arch, 8) + (4 if arch in TRANSLATORS else 0)


def test_a_word_that_ends_layers_and_a_head_means_the_layers_alone() -> None:
    model = tiny_model("roberta", vocab_size=32, head="sequence", labels=Labels("one", ("a", "b")))
    assert len(names(model, "dense")) == 6  # attention.output, intermediate and output in each of 2 layers
    with pytest.raises(RecipeError, match=r"'out_proj': classifier.out_proj belongs to the head, which"):
        names(model, "out_proj")


def test_names_and_patterns() -> None:
    model = tiny_model("llama", vocab_size=32)
    assert names(model, "q_proj") == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert names(model, "mlp.up_proj", r"re:layers\.0\.mlp\.down") == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert names(model, r"re:layers\.[0-3]\..*v_proj") == names(model, "v_proj")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("re:(", "this is not a regular expression"),
        ("re:(?x)(a) *b", "has flags"),
        ("re:" + "a?" * 5, "could take forever"),
        ("re:" + "(aa)?" * 30, "could take forever"),
        ("re:" + "(a|a.)" * 30, "could take forever"),
        ("re:" + ".{1,}" * 5, "could take forever"),
    ],
)
def test_an_unusable_expression_is_refused_with_its_place(word: str, message: str) -> None:
    model = tiny_model("llama", vocab_size=32)
    with pytest.raises(RecipeError, match=rf"^method.targets: .*{message}"):
        names(model, word)
    with pytest.raises(RecipeError, match=rf"^method.also_train: .*{message}"):
        find_modules(model, [word], [])
    with pytest.raises(RecipeError, match=rf"^method.rank_pattern: .*{message}"):
        by_pattern(model, [], {word: 2}, option="method.rank_pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:[qkvo]_proj|up_proj).*?)|(?:\bmodel\.layers\.\d{1,}\.mlp)",
        r"^(?!.*visual).*(?:q_proj|v_proj)$",
        r"(?:a)(?:b)(?:c)(?:d)(?:e)(?P<f>f)\)*[)*+?{]",
    ],
)
def test_expressions_of_other_tools_are_read(pattern: str) -> None:
    check_expression(pattern)


def test_a_layer_that_two_words_mean_is_adapted_once() -> None:
    model = tiny_model("llama", vocab_size=32)
    attachment = attach(model, LoraMethod(targets=("all-linear", "q_proj", r"re:q_proj$")), seed=0)
    assert len(attachment.trained) == 2 * 14
    assert not any(isinstance(layer.base, LoraLinear) for layer in attachment.layers.values())


def test_a_layer_with_two_names_is_adapted_once_and_under_both() -> None:
    model = tiny_model("llama", vocab_size=32)
    first, second = model.model.layers
    second.self_attn.q_proj = first.self_attn.q_proj
    attachment = attach(model, LoraMethod(targets=("q_proj",)), seed=0)
    assert list(attachment.layers) == ["model.layers.0.self_attn.q_proj"]
    assert isinstance(first.self_attn.q_proj, LoraLinear)
    assert second.self_attn.q_proj is first.self_attn.q_proj


# trap: A15
def assert_every_word_is_answered(attach_to, model: nn.Module, *targets: str) -> None:  # type: ignore[no-untyped-def]
    refused = ""
    try:
        attach_to(model, LoraMethod(targets=targets), seed=0)
    except RecipeError as error:
        refused = str(error)
    assert "'q_porj' matches no linear layer. Did you mean q_proj?" in refused
    assert "There are: all-linear, attention, mlp, down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj" in refused


def test_a_target_that_means_nothing_is_refused_though_others_match() -> None:
    assert_every_word_is_answered(attach, tiny_model("llama", vocab_size=32), "v_proj", "q_porj")

    def ignoring(model, settings, *, seed):  # type: ignore[no-untyped-def]
        matched = [word for word in settings.targets if any(name.endswith(word) for name, _ in model.named_modules())]
        return attach(model, LoraMethod(targets=tuple(matched)), seed=seed)

    with pytest.raises(AssertionError):
        assert_every_word_is_answered(ignoring, tiny_model("llama", vocab_size=32), "v_proj", "q_porj")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        find_targets(tiny_model("llama", vocab_size=32), ["q_porj", "re:nothing", "embed_tokens"])
    assert [line.split(":")[1].strip() for line in str(caught.value).splitlines()] == [
        "'q_porj' matches no linear layer. Did you mean q_proj? There are",
        "'re",
        "'embed_tokens'",
    ]


def test_experts_that_are_no_linear_layers_are_said() -> None:
    model = tiny_model("qwen3_moe", vocab_size=32)
    attachment = attach(model, LoraMethod(), seed=0)
    assert attachment.notes == (
        "2 modules such as model.layers.0.mlp.gate are not linear layers: they have no adapter, stay frozen",
        "the experts, 62% of the weights, have no adapter: method.targets: [all-linear, experts] adapts them, "
        "14,336 weights more to train in 224.0 KiB",
    )
    with pytest.raises(RecipeError, match=r"'mlp' matches no linear layer. \(model.layers.0.mlp.experts and its"):
        find_targets(tiny_model("qwen3_moe", vocab_size=32), ["mlp"])


def test_adapters_on_adapters_are_refused() -> None:
    model = tiny_model("llama", vocab_size=32)
    attach(model, LoraMethod(targets=("q_proj",)), seed=0)
    with pytest.raises(RecipeError, match="carries adapters already"):
        attach(model, LoraMethod(targets=("v_proj",)), seed=0)


@pytest.mark.parametrize(
    ("arch", "targets", "ends"),
    [
        ("llama", ["all-linear"], PROJECTIONS),
        ("gpt2", ["all-linear"], ["c_attn", "c_fc", "c_proj"]),
        ("gpt2", ["attention"], ["attn.c_proj", "c_attn"]),
        ("llama", [r"re:layers\.1\..*q_proj"], ["1.self_attn.q_proj"]),
        ("gpt_neox", ["attention"], ["dense", "query_key_value"]),
    ],
)
def test_shortest_ends_mean_the_same_modules(arch: str, targets: list[str], ends: list[str]) -> None:
    model = tiny_model(arch, vocab_size=32)
    chosen = dict.fromkeys(names(model, *targets))
    assert shortest_ends(chosen, [name for name, _ in model.named_modules()]) == ends


def test_ranks_and_alphas_by_pattern() -> None:
    settings = LoraMethod(
        rank=8, alpha=16, rslora=True, rank_pattern={"mlp": 4, "down_proj": 2}, alpha_pattern={r"re:layers\.1\.": 6}
    )
    attachment = attach(tiny_model("llama", vocab_size=32), settings, seed=0)
    sizes = {name.removeprefix("model.layers."): (one.rank, one.alpha) for name, one in attachment.sizes.items()}
    assert sizes["0.self_attn.q_proj"] == (8, 16)
    assert sizes["0.mlp.up_proj"] == (4, 16)
    assert sizes["1.mlp.down_proj"] == (2, 6)
    for name, layer in attachment.layers.items():
        rank, alpha = sizes[name.removeprefix("model.layers.")]
        assert layer.lora_A.shape[0] == rank
        assert layer.scale == alpha / rank**0.5


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_means_no_adapted_layer_is_refused(option: str) -> None:
    with pytest.raises(RecipeError, match=rf"^method.{option}: 'mpl' matches no adapted layer. There are: down_proj, "):
        attach(tiny_model("llama", vocab_size=32), LoraMethod(**{option: {"mpl": 4}}), seed=0)
    with pytest.raises(RecipeError, match=rf"^method.{option}: 'mlp' matches no adapted layer"):
        attach(tiny_model("llama", vocab_size=32), LoraMethod(targets=("q_proj",), **{option: {"mlp": 4}}), seed=0)
