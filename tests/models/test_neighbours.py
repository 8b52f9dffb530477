"""What stands beside a row in its pass changes nothing of it: models where it would are known, and run apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from often import often
from packed import CAN, OFTEN, VOCAB, rows_of, sharp
from tiny import tiny_tokenizer
from tunesmith.generation.adapters import AdapterSet
from tunesmith.generation.decoder import BatchedDecoder, SequentialDecoder, why_unlike
from tunesmith.models import packing_check, size
from tunesmith.models.packing_check import check_packing
from tunesmith.models.resolve_model import resolve_model
from tunesmith.models.size import model_size

BORDER = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.02,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 64},
    "falcon_h1": {"num_hidden_layers": 2, **MAMBA},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
        "n_groups": 1,
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, **LINEAR, **EXPERTS,
                   "shared_expert_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "num_local_experts": 4},
}  # fmt: skip


REFUSED = {"recurrent_gemma": "others beside a text change its logits", "minimax": "uses cache of its own"}
"""The first keeps its state in itself, where the next text would find it."""


def hybrid(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **HYBRIDS[kind]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


# trap: T19
def assert_rows_are_not_packed(kind: str) -> None:
    """Though its leak is less than what bfloat16 rounds."""
    assert not check_packing(hybrid(kind), "causal", rows_of((37, 11, 20))).ok


@pytest.mark.parametrize("kind", often(HYBRIDS, "recurrent_gemma", "lfm2"))
def test_models_with_a_state_are_neither_packed_nor_decoded_together(kind: str) -> None:
    assert "carry a state" in packing_check.recurrent_layer(hybrid(kind))
    assert_rows_are_not_packed(kind)


@pytest.mark.parametrize("kind", ["recurrent_gemma"])
def test_a_tolerance_alone_would_let_them_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """trap T19, planted: neither the kinds of layers nor two different neighbours are looked at."""
    monkeypatch.setattr(packing_check, "recurrent_layer", lambda model: "")
    assert_rows_are_not_packed(kind)  # the neighbours alone find it
    monkeypatch.setattr(packing_check, "leak_tolerance", lambda model: 1.0)
    with pytest.raises(AssertionError):
        assert_rows_are_not_packed(kind)


@pytest.mark.parametrize("arch", often([*CAN, "mixtral"], *OFTEN))
def test_sound_models_are_packed_as_ever(arch: str) -> None:
    if arch == "mixtral":
        torch.manual_seed(0)
        config = AutoConfig.for_model(arch, **{**COMMON, "num_hidden_layers": 2, "num_local_experts": 4})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    else:
        model = sharp(arch).to(torch.bfloat16)
    assert packing_check.recurrent_layer(model) == ""
    found = check_packing(model, "causal", rows_of((37, 11, 20)))
    assert found.ok, found
    assert why_unlike(BatchedDecoder, model, AdapterSet(model)) == ""


@pytest.mark.parametrize("kind", often(HYBRIDS, *REFUSED, "lfm2"))
def test_a_model_decoded_with_others_answers_as_alone_or_is_refused(kind: str) -> None:
    model = hybrid(kind)
    problem = why_unlike(SequentialDecoder, model, AdapterSet(model))
    assert (REFUSED.get(kind, "") in problem) if kind in REFUSED else problem == ""


# --- Positions that follow from the longest text of a pass


def logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return out


def longrope() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BORDER, **factors}
    config = Phi3Config(
        **{**COMMON, "initializer_range": 0.3, "num_hidden_layers": 2, "vocab_size": len(tiny_tokenizer())},
        pad_token_id=0, bos_token_id=1, eos_token_id=2, original_max_position_embeddings=BORDER, rope_parameters=rope,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


# trap: T17
def assert_longer_texts_change_no_shorter_one(folder: Path) -> None:
    """The longest text that may come, beside a short one."""
    model = longrope()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    longest = model_size(resolve_model(str(folder))).max_tokens
    short, long = list(range(30, 40)), [5] * longest
    ids = torch.tensor([short + [0] * (longest - len(short)), long])
    with torch.no_grad():
        together = model(ids, attention_mask=(ids > 0).long(), use_cache=False).logits[0, len(short) - 1]
    torch.testing.assert_close(together, logits(model, short), atol=1e-4, rtol=1e-4)


def test_a_model_with_other_positions_for_long_texts_ends_where_they_begin(tmp_path: Path) -> None:
    assert_longer_texts_change_no_shorter_one(tmp_path)


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_border_is_found_if_only_position_settings_name_it(by_layer: bool) -> None:
    rope: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": 100}
    config = MistralConfig(max_position_embeddings=4096)
    config.rope_parameters = (
        {"full_attention": rope, "sliding_attention": {"rope_type": "default"}} if by_layer else rope
    )
    assert size._max_tokens(config) == 100


def test_a_longer_text_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "_max_tokens", lambda config: BORDER + 1)  # planted: T17
    with pytest.raises(AssertionError):
        assert_longer_texts_change_no_shorter_one(tmp_path)


def test_dynamic_frequencies_never_move_within_the_configs_positions() -> None:
    """No row or text is longer than those, so nothing of the kind lives in the module from pass to pass."""
    model = sharp("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone()
    first = logits(model, [5, 6, 7])
    logits(model, [5] * model.config.max_position_embeddings)
    assert torch.equal(rotary.inv_freq, before)
    assert torch.equal(logits(model, [5, 6, 7]), first)
