"""Mixtures of experts: no word for a group of layers means one that chooses experts, in any architecture."""

import re
from functools import lru_cache

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny_model import tiny_model
from tunesmith.methods import targets as module
from tunesmith.methods.lora import attach
from tunesmith.methods.targets import find_targets, inner_linears, shape_OI
from tunesmith.recipe.methods import LoraMethod

ROUTERS = {
    "afmoe": {"mlp.router.gate"},
    "hunyuan_v1_moe": {"mlp.gate.wg"},
    "jetmoe": {"mlp.router.layer", "self_attention.experts.router.layer"},
    "longcat_flash": {"mlp.router.classifier"},
    "qwen2_moe": {"mlp.shared_expert_gate"},
    "qwen3_5_moe": {"mlp.shared_expert_gate"},
    "qwen3_5_moe_text": {"mlp.shared_expert_gate"},
    "qwen3_next": {"mlp.shared_expert_gate"},
    "zaya": {f"mlp.gate.{name}" for name in ("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj")},
}
"""Those that are plain linear layers; of other families they are modules of their own, or numbers of a tensor."""
NEEDED = {"hunyuan_v1_moe": {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}}
LAYERS = 6


@lru_cache
def made(name: str) -> PreTrainedModel | None:
    """The model of a family in its usual sizes, of few layers and without numbers; None: it has no experts, or is not
    made of a config alone."""
    try:
        config = CONFIG_MAPPING[name](**NEEDED.get(name, {}))
        text = config.get_text_config()
        if not any("expert" in key for key in vars(text)):
            return None
        for key in ("num_hidden_layers", "num_layers"):
            if isinstance(getattr(text, key, None), int):
                setattr(text, key, min(getattr(text, key), LAYERS))
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:LAYERS]
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever a config without a model behind it brings
        return None


def ends(names: list[str]) -> set[str]:
    """Names inside their layer."""
    return {re.sub(r"^.*?\d+\.", "", name) for name in names}


def sizes(model: PreTrainedModel) -> set[int]:
    text = vars(model.config.get_text_config())
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {value for key in keys if isinstance(value := text.get(key), int)}


def assert_no_group_means_a_router(model: PreTrainedModel, expected: set[str]) -> None:  # trap: A19
    every = {one.name: one.module for one in inner_linears(model, unread=False)}
    adapted = {one.name: one.module for one in find_targets(model, ["all-linear"])}
    assert ends([name for name in every if name not in adapted]) == expected
    odd = [name for name, linear in adapted.items() if shape_OI(linear)[0] in {1, *sizes(model)} and "expert" in name]
    assert [name for name in odd if not name.endswith(("gate_proj", "up_proj"))] == []


FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow  # imports every architecture of transformers
@pytest.mark.parametrize("first", range(0, len(FAMILIES), 40))
def test_no_group_means_a_router_in_any_family(first: int) -> None:
    for name in FAMILIES[first : first + 40]:
        model = made(name)
        if model is not None and inner_linears(model, unread=False):
            assert_no_group_means_a_router(model, ROUTERS.get(name, set()))


@pytest.mark.parametrize("name", ROUTERS)
def test_every_family_with_such_a_router_is_seen(name: str) -> None:
    model = made(name)
    assert model is not None
    assert_no_group_means_a_router(model, ROUTERS[name])


@pytest.mark.slow
def test_groups_that_mean_routers_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_router", lambda model, name: False)
    for name, expected in ROUTERS.items():
        with pytest.raises(AssertionError):
            assert_no_group_means_a_router(made(name), expected)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def test_routers_are_said_and_may_be_named() -> None:
    settings = {**MIXTURE, "shared_expert_intermediate_size": 32}
    model = tiny_model("qwen2_moe", vocab_size=32, **settings)
    words = "2 layers such as model.layers.0.mlp.shared_expert_gate choose experts: they have no adapter but where"
    assert any(note.startswith(words) for note in attach(model, LoraMethod(), seed=0).notes)
    named = attach(
        tiny_model("qwen2_moe", vocab_size=32, **settings), LoraMethod(targets=("shared_expert_gate",)), seed=0
    )
    assert ends(list(named.layers)) == {"mlp.shared_expert_gate"}
    assert not any("choose experts" in note for note in named.notes)


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router() -> None:
    """As of Qwen3-Next: 512 experts, and 512 numbers inside the shared one."""
    settings = {**MIXTURE, "num_experts": 32, "shared_expert_intermediate_size": 32}
    adapted = find_targets(tiny_model("qwen2_moe", vocab_size=32, **settings), ["mlp"])
    assert ends([one.name for one in adapted]) == {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}


def test_experts_in_a_list_are_no_routers_and_the_layer_beside_them_is() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 3, bias=False)
            self.experts = nn.ModuleList(
                nn.ModuleDict({"w1": nn.Linear(8, 3), "w2": nn.Linear(3, 8)}) for _ in range(3)
            )
            self.conv = nn.Conv1d(3, 3, 4)

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Mixture(), "out": nn.Linear(8, 3)})])})
    found = {one.name.removeprefix("layers.0.") for one in find_targets(model, ["all-linear"])}
    assert found == {"out", *(f"mlp.experts.{i}.{name}" for i in range(3) for name in ("w1", "w2"))}
