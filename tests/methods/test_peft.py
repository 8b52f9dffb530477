"""Every kind of the installed peft library: trained by our loop as by peft's own model, or refused by name and why."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from often import often
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.errors import InputError, ModelError, RecipeError, StorageError
from tunesmith.methods import METHODS
from tunesmith.methods.peft import (
    MERGEABLE,
    UNSUPPORTED,
    PeftAttachment,
    attach,
    load_result,
    randomness,
    save_result,
)
from tunesmith.models.load import load_tokenizer
from tunesmith.models.resolve_model import resolve_model
from tunesmith.optim import Optimizer
from tunesmith.recipe.methods import PeftMethod
from tunesmith.recipe.schema import Optim

VOCAB = 512
KINDS = [str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
SUITED: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "OFT": {"r": 0, "oft_block_size": 16},
    "ROAD": {"group_size": 32},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 16, "vector_length": 16},
    "WAVEFT": {"n_frequency": 50},
}
"""Settings that suit a model of width 64 where peft's own do not."""


OFTEN = ("LORA", "IA3", "LN_TUNING", "OFT", "TRAINABLE_TOKENS", "PREFIX_TUNING")
"""Run each time: matrices, factors, norms, rotations, rows of a table, and one that is refused."""


def settings_of(kind: str) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)])}
    chooses = kind in ("IA3", "LN_TUNING", "LORA", "TRAINABLE_TOKENS")
    targets = {} if chooses or "target_modules" not in fields else {"target_modules": ["q_proj", "v_proj"]}
    return {**targets, **SUITED.get(kind, {})}


def base_model(arch: str = "llama", **how: Any) -> PreTrainedModel:
    return tiny_model(arch, vocab_size=VOCAB, **how).eval()


def ids_of(seed: int = 3, *, rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, **given: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(given or {"input_ids": ids_of()})).logits
    return found


def trained(model: PreTrainedModel, kind: str, *, steps: int = 3) -> PeftAttachment:
    attachment = attach(model, PeftMethod(kind=kind, settings=settings_of(kind)), seed=0)
    update = Optimizer(attachment.trained, Optim(lr=1e-2))
    model.train()
    for step in range(steps):
        ids = ids_of(step, rows=4, tokens=24)
        ids[:, :3] = torch.tensor([1, 2, 3])  # those that TRAINABLE_TOKENS trains
        found = model(ids).logits
        F.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        attachment.collect_gradients()
        update.step(1e-2)
        attachment.publish()
    model.eval()
    return attachment


def saved(attachment: PeftAttachment, folder: Path) -> Path:
    base = folder / "base"
    base_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    located = resolve_model(str(base))
    renderer: Any = SimpleNamespace(tokenizer=load_tokenizer(located, None), stop_ids=(2,), pooling=None)
    save_result(attachment, folder / "result", model=attachment.model, renderer=renderer, located=located)
    return folder / "result"


def by_peft(folder: Path, **given: Tensor) -> Tensor:
    """What peft's own model answers at the row's own tokens."""
    wrapped = peft.PeftModel.from_pretrained(base_model(), str(folder)).eval()
    given = given or {"input_ids": ids_of()}
    with torch.no_grad():
        found: Tensor = wrapped(**given).logits
    return found


@pytest.mark.parametrize("kind", often(KINDS, *OFTEN))
def test_every_kind_trains_as_peft_has_it_or_is_refused(kind: str, tmp_path: Path) -> None:
    model = base_model()
    if kind in UNSUPPORTED:
        with pytest.raises(RecipeError, match=rf"^method\.kind: {kind}: it needs .* Use one of"):
            attach(model, PeftMethod(kind=kind, settings=settings_of(kind)), seed=0)
        return
    probe = ids_of()
    probe[0, :3] = torch.tensor([1, 2, 3])
    before = logits(model, input_ids=probe)
    attachment = trained(model, kind)
    assert {module.training for module in model.modules()} == {False}
    live = logits(model, input_ids=probe)
    effect = float((live - before).norm())
    assert effect > 0
    with attachment.adapter_disabled():
        assert torch.equal(logits(model, input_ids=probe), before)
    assert torch.equal(logits(model, input_ids=probe), live)

    folder = saved(attachment, tmp_path)
    again = base_model()
    load_result(again, folder)
    # 2e-5: float32, what was multiplied out when it was saved in another order of sums.
    assert (logits(again, input_ids=probe) - live).abs().max() <= 2e-5
    assert (by_peft(folder, input_ids=probe) - live).abs().max() <= 2e-5

    if kind not in MERGEABLE:
        with pytest.raises(InputError, match="cannot be merged"):
            attachment.merge()
        return
    layout = {name: type(module) for name, module in base_model().named_modules()}
    attachment.merge()
    assert {name: type(module) for name, module in model.named_modules()} == layout
    assert float((logits(model, input_ids=probe) - live).norm()) <= 2e-4 * effect + 1e-5


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("IA4", {}, r"^method.kind: 'IA4': peft has no such method. Did you mean IA3\?"),
        ("IA3", {"target_module": ["k_proj"]}, "^method.settings: IA3: peft refuses them: .*'target_module'"),
        ("LORA", {"r": "eight"}, r"^method.kind: LORA does not fit LlamaForCausalLM: "),
        ("LORA", {"task_type": "CAUSAL_LM"}, r"^method.settings.task_type: follows from the model"),
        ("IA3", {"target_modules": ["kproj"]}, r"^method.kind: IA3 does not fit LlamaForCausalLM: .*kproj"),
        ("LORA", {"init_lora_weights": "pissa"}, r"^method.settings: LORA: they change the base itself"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        attach(base_model(), PeftMethod(kind=kind, settings=settings), seed=0)


def test_a_kind_may_be_written_small_and_with_dashes() -> None:
    assert PeftMethod(kind="ln-tuning").kind == "LN_TUNING"


def test_what_draws_in_training_is_known() -> None:
    assert randomness(PeftMethod(kind="PVERA")) == "PVERA"
    assert randomness(PeftMethod(kind="OFT", settings={"module_dropout": 0.1})) == "method.settings.module_dropout"
    assert randomness(PeftMethod(kind="OFT", settings={"module_dropout": 0.0})) is None


def test_what_does_not_fit_the_model_is_told_before_a_row_is_seen() -> None:
    with pytest.raises(RecipeError, match=r"IA3 does not fit .* Please specify `target_modules`"):
        attach(base_model("cohere"), PeftMethod(kind="IA3"), seed=0)


def test_a_tied_head_is_not_adapted() -> None:
    with pytest.raises(RecipeError, match="tied"):
        attach(
            base_model("llama", tie_word_embeddings=True),
            PeftMethod(kind="LORA", settings={"target_modules": ["lm_head"]}),
            seed=0,
        )


def test_equal_runs_write_equal_configs(tmp_path: Path) -> None:
    layers = ["v_proj", "q_proj", "up_proj", "o_proj", "k_proj", "gate_proj", "down_proj"]
    attachment = attach(base_model(), PeftMethod(kind="LORA", settings={"r": 2, "target_modules": layers}), seed=0)
    config = json.loads((saved(attachment, tmp_path) / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(layers)


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attachment = attach(base_model(), PeftMethod(kind="IA3"), seed=0)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(attachment.wrapped, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left"):
        saved(attachment, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_missing_tensor_is_not_loaded_in_silence(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(trained(base_model(), "IA3"), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    first, *_ = tensors
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"does not fit: no weights for {first}"):
        load_result(base_model(), folder)


def test_without_peft_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.methods.peft.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "peft")
    with pytest.raises(RecipeError, match=r"-m pip install 'peft>="):
        METHODS["peft"].attach(base_model(), PeftMethod(kind="IA3"), seed=0)
