"""Configuration files of other tools are refused with the recipe that means the same."""

import re
from pathlib import Path
from textwrap import dedent

import pytest

from shape.tree import ROOT
from tunesmith.errors import RecipeError
from tunesmith.recipe import yaml_io
from tunesmith.recipe.docs import options
from tunesmith.recipe.load import OTHER_NAMES, load
from tunesmith.recipe.other_tools import AXOLOTL, LLAMA_FACTORY

FACTORY_FILE = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/llama3-8b/lora/sft
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
AXOLOTL_FILE = """
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: true
bf16: auto
"""


def refusal(tmp_path: Path, text: str) -> tuple[dict[str, object], str]:
    """(the recipe that the refusal offers, the whole of it)."""
    path = tmp_path / "theirs.yaml"
    path.write_text(dedent(text))
    with pytest.raises(RecipeError) as caught:
        load(str(path))
    message = str(caught.value)
    offered = "\n".join(line.removeprefix("  ") for line in message.splitlines() if line.startswith("  "))
    (tmp_path / "ours.yaml").write_text(offered)
    return yaml_io.parse(offered, "ours"), message


def test_a_file_of_llama_factory(tmp_path: Path) -> None:
    ours, message = refusal(tmp_path, FACTORY_FILE)
    assert ours == {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "method": {"name": "lora", "rank": 8},
        "data": {"train": ["identity.json", "alpaca_en_demo.json"], "max_tokens": 2048},
        "train": {"rows_per_step": 8, "epochs": 3.0},
        "optim": {"lr": 1e-4, "schedule": "cosine", "warmup": 0.1},
        "precision": "bfloat16",
    }
    assert "this is a configuration of LLaMA-Factory" in message
    assert "not translated: max_samples: no option of this name here" in message
    assert load(str(tmp_path / "ours.yaml")).train.rows_per_step == 8


def test_a_file_of_axolotl(tmp_path: Path) -> None:
    ours, message = refusal(tmp_path, AXOLOTL_FILE)
    assert ours["method"] == {"name": "qlora", "rank": 32, "alpha": 16, "targets": ["q_proj", "v_proj"]}
    assert ours["data"] == {
        "train": ["hf://datasets/teknium/GPT4-LLM-Cleaned"],
        "held_out": 0.1,
        "max_tokens": 2048,
    }
    assert ours["train"] == {"rows_per_step": 8, "epochs": 1.0}
    assert "not translated: train_on_inputs: only answers are trained here" in message
    load(str(tmp_path / "ours.yaml"))


def test_without_an_adapter_axolotl_tunes_all_weights(tmp_path: Path) -> None:
    ours, message = refusal(tmp_path, "base_model: gpt2\nlora_r: 8\nrl: grpo\noptimizer: came_pytorch\n")
    assert ours == {"model": "gpt2", "method": {"name": "full"}}
    assert "not translated: rl: rl grpo: not offered" in message
    assert "not translated: optimizer: optimizer came_pytorch: not offered" in message
    assert "not translated: lora_r: has no meaning in full tuning" in message


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate: fast", "per_device_train_batch_size: auto", "dataset: [1]", "dataset: 3", "lora_target: 3",
        "warmup_steps: 5 %",
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_left_out_and_named(tmp_path: Path, line: str) -> None:
    ours, message = refusal(tmp_path, f"model_name_or_path: gpt2\n{line}\n")
    assert ours == {"model": "gpt2"}
    assert f"not translated: {line}: is not understood here" in message


def test_a_value_that_we_do_not_take_is_named(tmp_path: Path) -> None:
    _, message = refusal(tmp_path, "model_name_or_path: gpt2\nlearning_rate: -1\n")
    assert "to be corrected: " in message
    assert "optim.lr" in message


def test_a_recipe_of_ours_is_no_file_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: gpt2\nmethod:\n  rank: 4\n")
    assert load(str(path)).model == "gpt2"


def test_every_option_has_a_row_in_docs_and_is_one_of_ours() -> None:
    page = (ROOT / "docs" / "guide" / "coming-from.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|$", page, re.MULTILINE))
    tables = {(key, value[0]) for key, value in (LLAMA_FACTORY | AXOLOTL).items() if value[0]}
    tables |= {(key, value[0]) for key, value in LLAMA_FACTORY.items() if value[0]} | set(OTHER_NAMES.items())
    assert rows == tables
    assert {option for _, option in rows} <= set(options())
