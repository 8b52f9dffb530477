"""Adapters on experts: as PEFT computes and writes them, merged in float32, with everything else as it was."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.saved import save_adapter
from mixtures import FAMILIES, UNKNOWN, adapted, drawn, logits, loss, mixture
from often import often
from tiny_model import tiny_model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods import METHODS, expert_format
from tunesmith.methods.adapter_format import CONFIG, WEIGHTS, load_adapter, read_low_rank
from tunesmith.methods.expert_lora import ExpertLora, usual_rank
from tunesmith.methods.lora import attach
from tunesmith.models.experts import expert_layers, expert_modules
from tunesmith.recipe.methods import DoraMethod, LoraMethod, QloraMethod
from tunesmith.types import Aside

families = pytest.mark.parametrize("family", often(FAMILIES, "qwen3_moe", "gpt_oss"))


@families
def test_a_fresh_adapter_changes_nothing_to_the_last_bit(family: str) -> None:
    model = mixture(family)
    expected = logits(model)
    attachment = attach(model, LoraMethod(rank=8, targets=("experts",)), seed=0)
    assert torch.equal(logits(model), expected)
    with attachment.adapter_disabled():
        assert torch.equal(logits(model), expected)
    attachment.unload()
    assert torch.equal(logits(model), expected)
    assert not any("forward" in vars(experts) for _, experts in expert_modules(model))


# trap: A21
def assert_peft_computes_the_same(folder: Path, family: str) -> None:
    """PEFT reads our folder, and has our logits and gradients."""
    model = mixture(family)
    attachment = adapted(model, rank=8)
    save_adapter(attachment, folder, base="tiny/base")
    theirs = peft.PeftModel.from_pretrained(mixture(family), folder, is_trainable=True).eval()
    assert (logits(model) - logits(mixture(family))).abs().max() > 0.01
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    for one in (model, theirs):
        loss(one).backward()
    products = [name for name, layer in attachment.layers.items() if isinstance(layer, ExpertLora)]
    ours = expert_format.to_file({name: tensor.grad for name, tensor in attachment.trained.items()}, products)
    grads = {name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None}
    assert len(grads) == len(ours)
    for name, grad in ours.items():
        expected = grads[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@families
def test_peft_reads_our_folder_and_computes_the_same(family: str, tmp_path: Path) -> None:
    assert_peft_computes_the_same(tmp_path, family)


def test_a_slower_index_of_experts_in_b_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = expert_format.to_file

    def slow(tensors, products):
        turned = {
            name: tensor.flatten(0, 1).unflatten(0, (tensor.shape[1], -1)).transpose(0, 1)
            if tensor.ndim == 3 and "lora_B" in name
            else tensor
            for name, tensor in tensors.items()
        }
        return theirs(turned, products)

    monkeypatch.setattr(expert_format, "to_file", slow)
    with pytest.raises(AssertionError):
        assert_peft_computes_the_same(tmp_path, "qwen3_moe")


@families
def test_an_adapter_of_peft_is_read_and_written_again(family: str, tmp_path: Path) -> None:
    words = sorted({".".join(name.split(".")[-2:]) for name in expert_layers(mixture(family))})
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["o_proj", "dense"], target_parameters=words,
        rank_pattern={"experts.down_proj": 2},
    )  # fmt: skip
    theirs = peft.get_peft_model(mixture(family), config).eval()
    with torch.no_grad():
        for number, (name, weight) in enumerate(theirs.named_parameters()):
            if "lora_B" in name:
                weight.copy_(0.1 * drawn(weight.shape, number))
    theirs.save_pretrained(tmp_path / "theirs")
    model = mixture(family)
    attachment = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(attachment, tmp_path / "ours", base="tiny/base")
    ours, expected = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "ours" / CONFIG).read_text("utf-8"))["target_parameters"] == words
    again = mixture(family)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


# trap: A26
def assert_a_merge_keeps_small_updates(merged_in: torch.dtype) -> None:
    model = mixture("qwen3_moe", dtype=torch.bfloat16)
    attachment = attach(model, LoraMethod(rank=8, targets=("experts",)), seed=0)
    for number, tensor in enumerate(attachment.trained.values()):
        tensor.data.copy_(1e-3 * drawn(tensor.shape, number))
    attachment.publish()
    for name, layer in attachment.layers.items():
        a_ERI, b_EOR = (matrix.detach() for matrix in attachment.matrices(name))
        delta = layer.scale * b_EOR.double() @ a_ERI.double()
        merged = attachment.merged(name, layer).to(merged_in).double() - layer.weight.double()
        assert (merged - delta).norm() <= 1e-2 * delta.norm()


def test_experts_are_merged_in_float32() -> None:
    assert_a_merge_keeps_small_updates(torch.float32)


def test_small_updates_that_bfloat16_eats_would_be_seen() -> None:
    with pytest.raises(AssertionError):
        assert_a_merge_keeps_small_updates(torch.bfloat16)


@families
def test_the_merged_model_is_the_adapted_one(family: str) -> None:
    model = mixture(family)
    names = [name for name, _ in model.named_parameters()]
    attachment = adapted(model, rank=8)
    expected = logits(model)
    attachment.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)


@families
def test_steps_change_adapters_alone(family: str) -> None:
    model = mixture(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    attachment = adapted(model, rank=8)
    assert not any("router" in name or name.endswith((".gate", ".wg")) for name in attachment.layers)
    optimizer = torch.optim.AdamW(attachment.trained.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        attachment.collect_gradients()
        optimizer.step()
        attachment.publish()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    attachment.unload()
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


# trap: A22
def assert_no_balancing_loss(aux: Callable[[nn.Module], Tensor]) -> None:
    """The loss and its gradients are the same where the model's config asks for the routers' loss."""
    grads = []
    for asked in (False, True):
        model = mixture("qwen3_moe", output_router_logits=asked, router_aux_loss_coef=0.5)
        attachment = adapted(model, rank=8)
        aux(model).backward()
        grads.append([tensor.grad for tensor in attachment.trained.values()])
        assert model.config.output_router_logits is asked
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_a_balancing_loss_of_the_config_is_not_added() -> None:
    assert_no_balancing_loss(loss)


def test_a_balancing_loss_would_be_seen() -> None:
    from mixtures import IDS

    with pytest.raises(AssertionError):
        assert_no_balancing_loss(lambda model: model(IDS, labels=IDS).loss)


def test_qlora_adapts_packed_experts_and_loads_what_it_saved(tmp_path: Path) -> None:
    model, method = mixture("gpt_oss"), METHODS["qlora"]
    settings = QloraMethod(rank=8, targets=("all-linear", "experts"))
    notes = method.prepare_base(model, settings, device="cpu")
    assert "12 linear layers and 4 tensors of experts" in notes[0] or "8 linear layers and 4 tensors" in notes[0]
    attachment = method.attach(model, settings, seed=0)
    for number, tensor in enumerate(attachment.trained.values()):
        tensor.data.copy_(0.1 * drawn(tensor.shape, number))
    attachment.publish()
    loss(model).backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in attachment.trained.values())
    with pytest.raises(ModelError, match="its weight is quantised"):
        attachment.merge()
    save_adapter(attachment, tmp_path, base="tiny/base")
    again = mixture("gpt_oss")
    method.prepare_base(again, settings, device="cpu")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    dense = mixture("gpt_oss")
    for name, weight in attachment.merged_weights():
        dense.get_parameter(name).data.copy_(weight)
    torch.testing.assert_close(logits(dense), logits(again), rtol=1e-4, atol=1e-5)


# What is refused, and what is said


def refused(model: PreTrainedModel, settings: LoraMethod | DoraMethod) -> str:
    with pytest.raises(RecipeError) as caught:
        attach(model, settings, seed=0)
    return str(caught.value)


def test_what_experts_cannot_have_is_refused_with_the_way_out() -> None:
    model = mixture("qwen3_moe")
    targets = ("all-linear", "experts")
    assert "Use method: lora, or leave experts out" in refused(model, DoraMethod(targets=targets))
    assert "method.dropout: 0.1: not with experts" in refused(model, LoraMethod(dropout=0.1, targets=targets))
    wrong = refused(model, LoraMethod(targets=("gate_up_proj",)))
    assert "'gate_up_proj' matches no linear layer." in wrong
    assert "experts" in wrong.partition("There are: ")[2]


def test_models_without_such_experts_say_why() -> None:
    settings = LoraMethod(targets=("experts",))
    dense = tiny_model("llama", vocab_size=32)
    assert "'experts' means nothing here: this model is no mixture of experts" in refused(dense, settings)
    assert "experts" not in refused(dense, LoraMethod(targets=("wrong",))).partition("There are: ")[2]


@pytest.mark.parametrize("family", UNKNOWN)
def test_experts_that_compute_in_their_own_way_are_refused_by_name(family: str) -> None:
    message = refused(mixture(family), LoraMethod(targets=("experts",)))
    assert "is not possible here: model.layers.0." in message
    assert "train every weight with method: full" in message


def test_words_mean_the_experts_that_they_name() -> None:
    def names(*words: str) -> set[str]:
        return set(attach(mixture("qwen3_moe"), LoraMethod(targets=words), seed=0).layers)

    products = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
    assert names("experts") == names("mlp.experts") == names(r"re:experts\.") == products
    assert names("experts.down_proj") == {name for name in products if name.endswith("down_proj")}
    assert names(r"re:layers\.1\..*experts") == {name for name in products if ".1." in name}
    assert not names("attention") & products
    assert not names(r"re:layers\.1\.") & products  # as before there were adapters on experts


def test_ranks_are_divided_among_the_experts_of_a_token() -> None:
    assert [usual_rank(16, 1), usual_rank(16, 2), usual_rank(16, 8), usual_rank(64, 8), usual_rank(4, 2)] == [
        16, 8, 8, 8, 4,
    ]  # fmt: skip
    targets = ("all-linear", "experts")
    for patterns, rank in (({}, 8), ({"experts": 24}, 24), ({"experts.down_proj": 4}, 4)):
        layers = attach(mixture("qwen3_moe"), LoraMethod(targets=targets, rank_pattern=patterns), seed=0).layers
        of_experts = layers["model.layers.0.mlp.experts.down_proj"]
        assert of_experts.lora_A.shape == (4, rank, 32)
        assert of_experts.scale == 32 / rank
        assert layers["model.layers.0.self_attn.q_proj"].lora_A.shape[0] == 16


def test_what_is_adapted_is_said_in_one_line() -> None:
    with_them = attach(mixture("qwen3_moe"), LoraMethod(targets=("all-linear", "experts")), seed=0).notes
    assert (
        "adapters of rank 8 on gate_up_proj and down_proj of 4 experts in each of 2 layers, of which a token meets 2; "
        "what chooses experts stays as it is" in with_them
    )
    (hint,) = [text for text in attach(mixture("qwen3_moe"), LoraMethod(), seed=0).notes if "experts" in text[:12]]
    # Rank 8, for two of the experts that a token meets, times inputs and outputs of four experts in two layers.
    more = 2 * 4 * 8 * ((64 + 64) + (32 + 64))
    way = "method.targets: [all-linear, experts] adapts them"
    assert hint.endswith(f"have no adapter: {way}, {more:,} weights more to train in {16 * more // 1024}.0 KiB")
    assert not isinstance(hint, Aside)
    assert not any("experts" in text for text in attach(tiny_model("llama", vocab_size=32), LoraMethod(), seed=0).notes)


def test_an_adapter_with_experts_serves_alone_and_says_why(tmp_path: Path) -> None:
    settings = LoraMethod(targets=("all-linear", "experts"))
    assert "adapters on experts" in str(METHODS["lora"].unshareable(settings))
    assert METHODS["lora"].unshareable(LoraMethod()) is None
    save_adapter(adapted(mixture("qwen3_moe"), rank=8), tmp_path, base="tiny/base")
    with pytest.raises(ModelError, match="target_parameters: adapters on experts cannot share a base"):
        read_low_rank(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_parameters": ["experts.gate_up_proj"]}, "no weights for|which target_modules does not name"),
        ({"target_parameters": ["experts.gate_up_proj", "experts.up"]}, "experts.up is no tensor of experts"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters: a list of names"),
        ({"lora_dropout": 0.1}, "lora_dropout: only LoRA and DoRA"),
        ({"r": 4}, "has shape"),
    ],
    ids=str,
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    save_adapter(adapted(mixture("qwen3_moe"), rank=8), tmp_path, base="tiny/base")
    config = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")
    model = mixture("qwen3_moe")
    expected = logits(model)
    with pytest.raises(ModelError, match=words):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
