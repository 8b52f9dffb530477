"""TRL's DPOTrainer on pairs of token ids, in the order given, from an adapter that is there. Run by itself:

python trl_prefer.py JOB.json RESULT.json
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from given_rows import run, versions
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_steps import StepLog


class GivenIds(DPOTrainer):  # type: ignore[misc]
    """The rows are ids, and their order is that of the file."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def logps(model: Any, pairs: list[dict[str, list[int]]]) -> list[list[float]]:
    """Log-probability of the chosen and the rejected answer of each pair under the active adapter."""

    def of(prompt: list[int], answer: list[int]) -> float:
        logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
        return float(torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(answer)[:, None]).sum())

    with torch.no_grad():
        return [[of(pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("chosen", "rejected")] for pair in pairs]


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses", "seconds" of each step, "held_out": log-probabilities of both answers of held-out pairs
    by the base and by each tuned adapter, "versions"}."""
    torch.set_num_threads(job["threads"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["precision"]))
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    notes = StepLog("loss")
    arguments = DPOConfig(
        output_dir=job["folder"], beta=job["beta"], learning_rate=job["lr"], lr_scheduler_type="constant",
        per_device_train_batch_size=job["pairs_per_batch"], max_steps=job["steps"], max_length=None,
        gradient_accumulation_steps=job["pairs_per_step"] // job["pairs_per_batch"], max_grad_norm=1.0, logging_steps=1,
        weight_decay=0.0, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GivenIds(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(job["pairs"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[notes],
    )
    if (
        "ref" in model.peft_config
    ):  # a copy of the adapter, which adds nothing yet: without it the base is the reference
        model.delete_adapter("ref")
    trainer.train()
    seconds = [after - before for before, after in zip(notes.ends, notes.ends[1:], strict=False)]
    model.eval()
    held_out = {"trl": logps(model, job["held_out"])}
    with model.disable_adapter():
        held_out["base"] = logps(model, job["held_out"])
    model.load_adapter(job["tuned"], "ours")
    model.set_adapter("ours")
    held_out["ours"] = logps(model, job["held_out"])
    of = versions("torch", "transformers", "trl", "peft")
    return {"losses": notes.values, "seconds": seconds, "held_out": held_out, "versions": of}


if __name__ == "__main__":
    run(train)
