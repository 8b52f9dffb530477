"""TRL's SFTTrainer on rows that are rendered already, as its documentation says. Run by itself:

    python trl_train.py JOB.json RESULT.json

given_rows.py says what is in them; "arguments" go to SFTConfig.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from given_rows import labelled, run, versions
from peft import LoraConfig
from trainer_log import Clock
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

ROWS_PER_BATCH = 8
"""As TRL has it; a step accumulates as many batches as it needs."""


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json of one job."""
    torch.set_num_threads(job["threads"])
    batches = -(-job["rows_per_step"] // ROWS_PER_BATCH)
    given: dict[str, Any] = {
        "output_dir": job["folder"],
        "seed": job["seed"],
        "num_train_epochs": 1,
        "learning_rate": job["lr"],
        "logging_steps": 1,
        "per_device_train_batch_size": min(ROWS_PER_BATCH, job["rows_per_step"]),
        "gradient_accumulation_steps": batches,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    adapter = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**{**given, **job["arguments"]}),
        train_dataset=Dataset.from_list(labelled(job["rows"], "train")),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=adapter if job["method"] == "lora" else None,
        callbacks=[clock],
    )
    trainer.train()
    result = str(Path(job["folder"]) / "result")
    trainer.save_model(result)
    return {
        **clock.told(batches),
        "result": result,
        "versions": versions("torch", "transformers", "trl", "peft", "accelerate"),
    }


if __name__ == "__main__":
    run(train)
