"""Configuration files of LLaMA-Factory and Axolotl, translated into a recipe as far as it goes.

Their options by name: docs/guide/coming-from.md, held equal by `tests/recipe/test_other_tools.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tunesmith.types import JsonObject, Record

Convert = Callable[[Any, Record], Any]
"""(their value, all of their options) → our value, None where nothing has to be said, or `Untranslated`."""


class Untranslated:
    """Why an option has no counterpart."""

    def __init__(self, why: str) -> None:
        self.why = why


def tool_of(data: Record) -> str | None:
    """The tool that a configuration file is for, by options that only it has."""
    if {"model_name_or_path", "finetuning_type"} & set(data) and "model" not in data:
        return "LLaMA-Factory"
    if "base_model" in data:
        return "Axolotl"
    return None


def translate(data: Record, tool: str) -> tuple[JsonObject, dict[str, str]]:
    """(options of ours by dotted name, what was not translated: their option → why)."""
    table = LLAMA_FACTORY if tool == "LLaMA-Factory" else AXOLOTL
    ours: JsonObject = {} if tool == "LLaMA-Factory" or data.get("adapter") else {"method.name": "full"}
    left: dict[str, str] = {}
    for key, value in data.items():
        if value is None or key in AUTOMATIC:
            continue
        if key not in table:
            left[key] = "no option of this name here; see docs/guide/coming-from.md"
            continue
        option, convert = table[key]
        try:
            converted = convert(value, data)
        except (AttributeError, TypeError, ValueError):
            converted = Untranslated(f"{str(value)[:40]}: is not understood here")
        if isinstance(converted, Untranslated):
            left[key] = converted.why
        elif converted is not None:
            ours[option] = converted
    if ours.get("method.name") == "full":
        left |= {key: "has no meaning in full tuning" for key in ("lora_r", "lora_rank", "lora_alpha") if key in data}
        others = [key for key in ours if key.startswith("method.") and key != "method.name"]
        ours = {key: value for key, value in ours.items() if key not in others}
    return ours, left


_METHODS = "LoRA, DoRA, QLoRA and full tuning are offered"


def _same(value: Any, _: Record) -> Any:
    return value


def _number(value: Any, _: Record) -> Any:
    return float(value)


def _above_zero(value: Any, _: Record) -> Any:
    return value if isinstance(value, (int, float)) and value > 0 else None


def _rows_per_step(value: Any, data: Record) -> Any:
    """Rows of an update: theirs are rows of a pass on a device, times the passes that are added up."""
    return int(value) * int(data.get("gradient_accumulation_steps") or 1)


def _warmup_steps(value: Any, _: Record) -> Any:
    return int(value) if value and int(value) >= 1 else None


def _schedule(value: Any, _: Record) -> Any:
    known = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
    return known.get(str(value), Untranslated(f"schedule {value}: linear, cosine and constant are offered"))


def _optimizer(value: Any, _: Record) -> Any:
    name = str(value)
    if "8bit" in name:
        return "adamw_8bit"
    plain = name.removesuffix("_fused").removesuffix("_torch").removesuffix("_hf")
    return plain if plain in {"adamw", "lion", "adafactor", "muon"} else Untranslated(f"optimizer {value}: not offered")


def _targets(value: Any, _: Record) -> Any:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    return None if names in (["all"], ["all-linear"]) else names


def _prompts(value: Any, _: Record) -> Any:
    return Untranslated("only answers are trained here, and every answer of a chat") if value else None


def _precision(name: str) -> Convert:
    return lambda value, data: name if value is True else None


def _factory_method(value: Any, data: Record) -> Any:
    if value == "lora":
        return "qlora" if data.get("quantization_bit") else "dora" if data.get("use_dora") else "lora"
    return value if value == "full" else Untranslated(f"{value}: {_METHODS}")


def _factory_stage(value: Any, _: Record) -> Any:
    tasks = {"pt": "text", "dpo": "prefer", "kto": "prefer", "rm": "reward"}
    if value == "sft":
        return None  # the task is seen in the rows
    return tasks.get(str(value), Untranslated(f"stage {value}: not offered"))


def _preference_loss(value: Any, _: Record) -> Any:
    known = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
    return known.get(str(value), Untranslated(f"loss {value}: not offered"))


def _factory_data(value: Any, _: Record) -> Any:
    names = value.split(",") if isinstance(value, str) else list(value)
    return [f"{name.strip()}.json" for name in names]


def _axolotl_data(value: Any, _: Record) -> Any:
    paths = [entry.get("path") for entry in value if isinstance(entry, Mapping)]
    return [path if "." in str(path).rpartition("/")[2] else f"hf://datasets/{path}" for path in paths if path]


def _axolotl_method(value: Any, data: Record) -> Any:
    if value == "lora" and data.get("peft_use_dora"):
        return "dora"
    return value if value in ("lora", "qlora") else Untranslated(f"{value}: {_METHODS}")


def _axolotl_task(value: Any, _: Record) -> Any:
    is_known = value in ("dpo", "ipo", "kto", "orpo", "simpo")
    return "prefer" if is_known else Untranslated(f"rl {value}: not offered")


def _share(value: Any, _: Record) -> Any:
    return value if isinstance(value, (int, float)) and 0 <= value < 1 else Untranslated("give a share below 1")


def _trackers(value: Any, _: Record) -> Any:
    names = [value] if isinstance(value, str) else list(value)
    return [name for name in names if name in ("tensorboard", "wandb", "mlflow", "trackio")] or None


_BOTH: dict[str, tuple[str, Convert]] = {
    "learning_rate": ("optim.lr", _number),
    "max_steps": ("train.max_steps", _above_zero),
    "warmup_ratio": ("optim.warmup", _same),
    "warmup_steps": ("optim.warmup", _warmup_steps),
    "weight_decay": ("optim.weight_decay", _same),
    "max_grad_norm": ("optim.clip", _same),
    "lora_alpha": ("method.alpha", _same),
    "lora_dropout": ("method.dropout", _same),
    "seed": ("seed", _same),
    "eval_steps": ("evaluation.every", _above_zero),
    "save_steps": ("checkpoint.every", _above_zero),
    "save_total_limit": ("checkpoint.keep", _above_zero),
    "train_on_inputs": ("", _prompts),
    "bf16": ("precision", _precision("bfloat16")),
    "fp16": ("precision", _precision("float16")),
}
LLAMA_FACTORY = _BOTH | {
    "model_name_or_path": ("model", _same),
    "stage": ("task", _factory_stage),
    "finetuning_type": ("method.name", _factory_method),
    "lora_rank": ("method.rank", _same),
    "lora_target": ("method.targets", _targets),
    "dataset": ("data.train", _factory_data),
    "eval_dataset": ("data.eval", _factory_data),
    "cutoff_len": ("data.max_tokens", _same),
    "val_size": ("data.held_out", _share),
    "num_train_epochs": ("train.epochs", _number),
    "per_device_train_batch_size": ("train.rows_per_step", _rows_per_step),
    "lr_scheduler_type": ("optim.schedule", _schedule),
    "optim": ("optim.name", _optimizer),
    "pref_beta": ("prefer.beta", _same),
    "pref_loss": ("prefer.loss", _preference_loss),
    "report_to": ("track", _trackers),
}
AXOLOTL = _BOTH | {
    "base_model": ("model", _same),
    "rl": ("task", _axolotl_task),
    "adapter": ("method.name", _axolotl_method),
    "lora_r": ("method.rank", _same),
    "lora_target_modules": ("method.targets", _targets),
    "datasets": ("data.train", _axolotl_data),
    "test_datasets": ("data.eval", _axolotl_data),
    "sequence_len": ("data.max_tokens", _same),
    "val_set_size": ("data.held_out", _share),
    "num_epochs": ("train.epochs", _number),
    "micro_batch_size": ("train.rows_per_step", _rows_per_step),
    "lr_scheduler": ("optim.schedule", _schedule),
    "optimizer": ("optim.name", _optimizer),
}
_AUTOMATIC = """
gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs flash_attn flash_attention
packing sample_packing eval_sample_packing pad_to_sequence_len group_by_length do_train do_eval eval_strategy
ddp_timeout overwrite_cache overwrite_output_dir output_dir logging_steps plot_loss preprocessing_num_workers
save_only_model dataloader_num_workers dataset_prepared_path dataset_dir template chat_template quantization_bit
quantization_method load_in_4bit load_in_8bit use_dora peft_use_dora lora_target_linear
per_device_eval_batch_size eval_batch_size tf32 strict resume_from_checkpoint bf16_full_eval trust_remote_code
wandb_project model_type tokenizer_type special_tokens
"""
AUTOMATIC = frozenset(_AUTOMATIC.split())
"""Options that are decided here by themselves, are part of another, or words of the command line (`--out`)."""
