"""What stands beside a row in its pass changes nothing of it: models where it would are known, and run apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from packed import CAN, VOCAB, rows_of, sharp
from tiny import tiny_tokenizer
from tiny_run import tiny_recipe
from tunesmith.evaluation.generate import Sampling, generate
from tunesmith.inference import load as loading
from tunesmith.models import attention, packing_check
from tunesmith.models.packing_check import check_packing
from tunesmith.serve import startup_checks
from tunesmith.serve.adapters import AdapterSet
from tunesmith.serve.decoder import SequentialDecoder
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import train

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


def hybrid(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **HYBRIDS[kind]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


# trap: T19
def assert_rows_are_not_packed(kind: str) -> None:
    """Though its leak is less than what bfloat16 rounds."""
    assert not check_packing(hybrid(kind), "causal", rows_of((37, 11, 20))).ok


@pytest.mark.parametrize("kind", HYBRIDS)
def test_models_with_a_state_are_neither_packed_nor_decoded_together(kind: str) -> None:
    assert "carry a state" in packing_check.recurrent_layer(hybrid(kind))
    assert_rows_are_not_packed(kind)
    assert "carry a state" in startup_checks.why_sequential(hybrid(kind), AdapterSet(hybrid(kind)))


@pytest.mark.parametrize("kind", ["recurrent_gemma"])
def test_a_tolerance_alone_would_let_them_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """trap T19, planted: neither the kinds of layers nor two different neighbours are looked at."""
    monkeypatch.setattr(packing_check, "recurrent_layer", lambda model: "")
    assert_rows_are_not_packed(kind)  # the neighbours alone find it
    monkeypatch.setattr(packing_check, "leak_tolerance", lambda model: 1.0)
    with pytest.raises(AssertionError):
        assert_rows_are_not_packed(kind)


@pytest.mark.parametrize("arch", [*CAN, "mixtral"])
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
    assert startup_checks.why_sequential(model, AdapterSet(model)) == ""


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_model_that_is_decoded_apart_says_what_it_says_alone_or_is_refused(kind: str) -> None:
    model = hybrid(kind)
    problem = startup_checks.why_single(model, AdapterSet(model))
    assert (REFUSED.get(kind, "") in problem) if kind in REFUSED else problem == ""


REFUSED = {"recurrent_gemma": "a text changes the logits of another", "minimax": "uses cache of its own"}
"""The first keeps its state in itself, where the next text would find it."""


# --- Positions that follow from the longest text of a pass


def longrope(**settings: Any) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        **{**COMMON, "initializer_range": 0.3, "num_hidden_layers": 2, "vocab_size": len(tiny_tokenizer())},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        original_max_position_embeddings=BORDER,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BORDER, **factors,
        },
        **settings,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def folder_of(path: Path) -> str:
    longrope().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def test_the_border_is_found_also_by_type_of_layer() -> None:
    assert attention.longrope_limit(longrope().config) == BORDER
    config = sharp("llama").config
    assert attention.longrope_limit(config) is None
    config.rope_parameters = {
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 100},
        "sliding_attention": {"rope_type": "default"},
    }
    assert attention.longrope_limit(config) == 100
    assert attention.longrope_conflict(config, 100) == ""
    assert "more than 100 tokens" in attention.longrope_conflict(config, 101)


def passes_of(folder: Path, num_words: int) -> list[list[int]]:
    """Of each pass of an epoch, and of the held-out rows, how many tokens its rows have."""
    words = [num_words if i % 2 else 1 + i % 4 for i in range(18)]
    said = [[("user", f"{'a ' * num}{i}"), ("assistant", "yes")] for i, num in enumerate(words)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said]
    file = folder / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = tiny_recipe(
        folder, model=folder_of(folder / "phi"), train={"tokens_per_pass": 512}, data={"train": [str(file)]}
    )
    setup = prepare(recipe, root=folder / "runs")
    steps = [rows for step in range(setup.sampler.steps_per_epoch) for rows in setup.sampler.step(step + 1)]
    return [[int(setup.rows.store.lengths[i]) for i in rows] for rows in steps]


# trap: T17
def assert_no_row_is_beside_one_beyond_the_border(folder: Path) -> None:
    passes = passes_of(folder, 60)
    assert max(map(max, passes)) > BORDER
    assert all(len(rows) == 1 for rows in passes if max(rows) > BORDER)


def test_a_row_beyond_the_border_goes_alone_in_training(tmp_path: Path) -> None:
    assert_no_row_is_beside_one_beyond_the_border(tmp_path)


def test_rows_that_are_packed_with_one_beyond_the_border_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "longrope_limit", lambda config: None)  # planted: T17
    with pytest.raises(AssertionError):
        assert_no_row_is_beside_one_beyond_the_border(tmp_path)


def test_rows_below_the_border_are_packed(tmp_path: Path) -> None:
    assert max(map(len, passes_of(tmp_path, 6))) > 1


def logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return out


def test_texts_are_decoded_apart_where_one_can_cross_the_border() -> None:
    """And one that crosses while it is written says what the model says of it whole."""
    model = longrope()
    adapters = AdapterSet(model)
    assert startup_checks.why_sequential(model, adapters, longest=BORDER) == ""
    assert "changes the positions" in startup_checks.why_sequential(model, adapters, longest=BORDER + 1)
    decoder = SequentialDecoder(model, adapters)
    ids = torch.randint(3, VOCAB, (BORDER + 4,), generator=torch.Generator().manual_seed(0)).tolist()
    slot = decoder.open(None, BORDER - 4)
    decoder.step({}, [(slot, ids[: BORDER - 4])])
    [slot] = decoder.fork(slot, 1)
    for num in range(BORDER - 4, BORDER + 4):
        _, [said] = decoder.step({slot: ids[num]}, [])
        torch.testing.assert_close(said, logits(model, ids[: num + 1]), atol=1e-4, rtol=1e-4)


def test_answers_to_short_prompts_do_not_change_with_a_long_one_beside_them(tmp_path: Path) -> None:
    speaker = loading.load_model(folder_of(tmp_path / "phi"), task="generate", offline=True)
    short, long = list(range(30, 40)), list(range(30, 30 + BORDER + 20))
    how = Sampling(max_new_tokens=8)
    [alone] = generate(speaker.model, speaker.renderer, [short], how)
    assert generate(speaker.model, speaker.renderer, [short, long], how)[0] == alone


def test_a_measure_of_rows_beyond_the_border_is_that_of_each_alone(tmp_path: Path) -> None:
    speaker = loading.load_model(folder_of(tmp_path / "phi"), task="generate", offline=True)
    assert speaker.tokens_per_pass([BORDER, 3]) > 1
    assert speaker.tokens_per_pass([BORDER + 1, 3]) == 1


def test_dynamic_frequencies_never_move_below_the_positions_that_a_config_names() -> None:
    """No row or text is longer than those, so nothing of the kind lives in the module from pass to pass."""
    model = sharp("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone()
    first = logits(model, [5, 6, 7])
    logits(model, [5] * model.config.max_position_embeddings)
    assert torch.equal(rotary.inv_freq, before)
    assert torch.equal(logits(model, [5, 6, 7]), first)


def test_a_run_of_it_ends(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, model=folder_of(tmp_path / "phi"), train={"max_steps": 2})
    assert train(recipe, root=tmp_path / "runs").state() == "done"
