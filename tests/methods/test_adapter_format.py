"""Our adapter folders read by peft, peft's read by us, and everything that does not fit refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.saved import save_adapter
from tiny_model import tiny_model
from tunesmith.errors import ModelError, StorageError
from tunesmith.methods.adapter_format import CONFIG, WEIGHTS, load_adapter
from tunesmith.methods.lora import LoraAttachment, attach
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.recipe.methods import LoraMethod

VOCAB = 61
IDS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))


def base(arch: str = "llama") -> PreTrainedModel:
    return tiny_model(arch, vocab_size=VOCAB).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def trained_model(arch: str = "llama", **settings: object) -> tuple[PreTrainedModel, LoraAttachment]:
    """A model with adapters as training could have left them."""
    model = base(arch)
    attachment = attach(model, LoraMethod(**{"rank": 4, "alpha": 12, **settings}), seed=0)
    with torch.no_grad():
        for tensor in attachment.trained.values():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    attachment.publish()
    return model, attachment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter of the tiny llama."""
    _, attachment = trained_model(dropout=0.25)
    save_adapter(attachment, tmp_path / "adapter", base="tiny/llama", revision="abc")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("llama", ("all-linear",)),
        ("llama", ("re:layers[.]1[.].*(q|up)_proj",)),
        ("llama", ("v_proj", "lm_head")),
        ("gpt2", ("all-linear",)),
        ("gpt2", ("attention",)),
        ("gpt_neox", ("attention",)),
    ],
)
def test_peft_reads_our_folder_and_computes_the_same(arch: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    model, attachment = trained_model(arch, targets=targets)
    save_adapter(attachment, tmp_path / "adapter", base="tiny/base", revision="abc")
    theirs = peft.PeftModel.from_pretrained(base(arch), tmp_path / "adapter", is_trainable=True).eval()
    assert (logits(model) - logits(base(arch))).abs().max() > 0.1
    # 1e-6: logits of order 1 in float32, the same sums in the same order.
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-6
    adapted = {name.removesuffix(".lora_A.default") for name, _ in theirs.named_modules() if "lora_A.default" in name}
    assert adapted == {f"base_model.model.{name}" for name in attachment.layers}
    config = theirs.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision, config.task_type) == ("tiny/base", "abc", "CAUSAL_LM")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradients_of_whole_models_equal_pefts(arch: str, tmp_path: Path) -> None:
    model, attachment = trained_model(arch)
    save_adapter(attachment, tmp_path / "adapter", base="tiny/base")
    theirs = peft.PeftModel.from_pretrained(base(arch), tmp_path / "adapter", is_trainable=True).eval()
    for one in (model, theirs):
        F.cross_entropy(one(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    found = dict(theirs.named_parameters())
    for name, tensor in attachment.trained.items():
        grad = found[f"base_model.model.{name.removesuffix('.weight')}.default.weight"].grad
        # Sums over 26 tokens and up to 256 channels in another order, float32.
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-4, atol=1e-6)


def test_files_are_float32_and_named_as_peft_names_them(tmp_path: Path) -> None:
    _, attachment = trained_model()
    save_adapter(attachment, tmp_path / "ours", base="tiny/llama")
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, others = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in others.items()
    }


def test_a_bfloat16_model_saves_its_float32_masters(tmp_path: Path) -> None:
    model = base().to(torch.bfloat16)
    attachment = attach(model, LoraMethod(rank=4), seed=0)
    save_adapter(attachment, tmp_path / "adapter", base="tiny/llama")
    for name, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items():
        assert torch.equal(tensor, attachment.trained[name.removeprefix("base_model.model.")])


def test_loaded_and_saved_again_is_the_same_folder(folder: Path, tmp_path: Path) -> None:
    loaded = load_adapter(base(), folder)
    save_adapter(loaded, tmp_path / "again", base="tiny/llama", revision="abc")
    for name in (CONFIG, WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def pefts_own(folder: Path, arch: str = "llama", **settings: object) -> PreTrainedModel:
    """A folder written by peft, its adapters random; the model that wrote it."""
    config = peft.LoraConfig(**{"r": 16, "lora_alpha": 16, "target_modules": "all-linear", **settings})
    theirs = peft.get_peft_model(base(arch), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


# trap: A7
def assert_computes_what_peft_computes(folder: Path, theirs: nn.Module, *, arch: str, scale: float) -> None:
    model = base(arch)
    attachment = load_adapter(model, folder)
    assert {layer.scale for layer in attachment.layers.values()} == {scale}
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(("rank", "stabilized", "scale"), [(16, False, 1.0), (64, False, 0.25), (16, True, 4.0)])
def test_adapters_of_peft_are_read(tmp_path: Path, arch: str, rank: int, stabilized: bool, scale: float) -> None:
    theirs = pefts_own(tmp_path, arch, r=rank, use_rslora=stabilized)
    assert_computes_what_peft_computes(tmp_path, theirs, arch=arch, scale=scale)


def test_the_comparison_sees_stabilized_scaling_ignored(tmp_path: Path) -> None:
    theirs = pefts_own(tmp_path, use_rslora=True)
    edit(tmp_path, use_rslora=False)
    with pytest.raises(AssertionError):
        assert_computes_what_peft_computes(tmp_path, theirs, arch="llama", scale=4.0)


def test_peft_targets_as_patterns_and_exclusions_are_read(tmp_path: Path) -> None:
    theirs = pefts_own(tmp_path, target_modules=r".*\.(q_proj|up_proj)", exclude_modules=["layers.0.mlp.up_proj"])
    assert_computes_what_peft_computes(tmp_path, theirs, arch="llama", scale=1.0)


# trap: A6
def edit(folder: Path, **values: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


A_KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor is missing": (
        lambda f: rewrite(f, lambda t: t.pop(A_KEY)),
        "no weights for .*up_proj.lora_B",
    ),
    "a layer is missing": (
        lambda f: rewrite(f, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k]),
        "no weights for model.layers.1.mlp.up_proj",
    ),
    "a layer that nobody named": (
        lambda f: edit(f, target_modules=["q_proj"]),
        "weights for model.layers.0.mlp.down_proj, which target_modules does not name",
    ),
    "a layer the model lacks": (
        lambda f: rewrite(f, lambda t: t.update({A_KEY.replace("layers.1", "layers.7"): t[A_KEY].clone()})),
        "no linear layer model.layers.7.mlp.up_proj",
    ),
    "every key misnamed": (
        lambda f: rewrite(f, lambda t: [t.update({"x." + k: t.pop(k)}) for k in list(t)]),
        "no linear layer x.base_model.model",
    ),
    "a tensor of another kind": (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)})),
        "unknown tensor lm_head.weight",
    ),
    "a transposed tensor": (
        lambda f: rewrite(f, lambda t: t.update({A_KEY: t[A_KEY].t().contiguous()})),
        r"up_proj.lora_B.weight has shape \(4, 128\), expected \(128, 4\)",
    ),
    "another rank": (lambda f: edit(f, r=8), r"has shape \(4, 64\), expected \(8, 64\)"),
    "lengths that are missing": (
        lambda f: edit(f, use_dora=True),
        "no weights for .*lora_magnitude",
    ),
    "ranks by layer": (
        lambda f: edit(f, rank_pattern={"q_proj": 2}),
        r"q_proj.lora_A.weight has shape \(4, 64\), expected \(2, 64\)",
    ),
    "a pattern that is none": (lambda f: edit(f, rank_pattern={"(q_proj": 2}), "rank_pattern: missing \\), "),
    "biases": (lambda f: edit(f, bias="all"), "bias: only LoRA"),
    "a key of the future": (lambda f: edit(f, use_quantum=True), "use_quantum: only LoRA and DoRA that leave"),
    "a start that changed the base": (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights: only LoRA"),
    "a whole module without weights": (
        lambda f: edit(f, modules_to_save=["model.norm"]),
        "no weights for model.norm",
    ),
    "a whole module that is adapted": (lambda f: edit(f, modules_to_save=["q_proj"]), "q_proj is adapted and whole"),
    "layers that others were adapted in": (
        lambda f: edit(f, layers_to_transform=[0]),
        "weights for model.layers.1.mlp.down_proj, which target_modules does not name",
    ),
    "another method": (lambda f: edit(f, peft_type="IA3"), "not a LoRA adapter: peft_type 'IA3'"),
    "no config": (lambda f: (f / CONFIG).unlink(), "missing: the folder of an adapter holds"),
    "a broken config": (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
    "a config that is a list": (lambda f: (f / CONFIG).write_text("[]"), "not a JSON object"),
    "a rank that is a word": (lambda f: edit(f, r="many"), "rank: Input should be a valid integer"),
    "targets that are no pattern": (lambda f: edit(f, target_modules="(q_proj"), "target_modules: missing \\), "),
    "no targets": (lambda f: edit(f, target_modules=None), "target_modules: "),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "save the adapter as safetensors"),
    "half a file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "cannot be read"),
}


def assert_damage_is_refused(load: Callable[..., object], folder: Path, message: str) -> None:
    model = base()
    before = logits(model)
    refused = None
    try:
        load(model, folder)
    except ModelError as error:
        refused = error
    assert refused is not None, "loaded all the same"
    with pytest.raises(ModelError, match=message):
        raise refused
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_left_alone(damage: str, folder: Path) -> None:
    harm, message = DAMAGE[damage]
    harm(folder)
    assert_damage_is_refused(load_adapter, folder, message)


def test_the_refusal_test_sees_a_loader_that_takes_what_fits(folder: Path) -> None:
    def lenient(model: PreTrainedModel, folder: Path) -> LoraAttachment:
        attachment = attach(model, LoraMethod(rank=4), seed=0)
        saved = load_file(folder / WEIGHTS)
        for name, tensor in attachment.trained.items():
            if "base_model.model." + name in saved:
                tensor.data.copy_(saved["base_model.model." + name])
        return attachment

    harm, message = DAMAGE["every key misnamed"]
    harm(folder)
    with pytest.raises(AssertionError):
        assert_damage_is_refused(lenient, folder, message)


@pytest.mark.parametrize("indices", [{"embed_tokens": []}, []])
def test_an_empty_list_of_tokens_is_none(folder: Path, indices: Any) -> None:
    edit(folder, trainable_token_indices=indices)
    assert load_adapter(base(), folder).rows is None


def test_a_save_that_fails_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / WEIGHTS).read_bytes()
    _, attachment = trained_model()
    attachment.trained["model.layers.0.mlp.up_proj.lora_B.weight"].data.zero_()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(StorageError, match="ENOSPC"):
        save_adapter(attachment, folder, base="tiny/llama")
    assert (folder / WEIGHTS).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(" * 3000),
        ("target_modules", "a{99999999999999999999}"),
        ("rank_pattern", {"(" * 3000: 4}),
        ("alpha_pattern", {"a{99999999999999999999}": 4}),
    ],
)
def test_an_expression_that_python_cannot_read_is_named(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=f"{CONFIG}: {key}: "):
        load_adapter(base(), folder)


def test_json_that_nests_without_end_is_named(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ModelError, match=f"{CONFIG}: not JSON: "):
        load_adapter(base(), folder)
