"""TRL's RewardTrainer on pairs of token ids, in the order given, from an adapter that is there. Run by itself:

python trl_reward.py JOB.json RESULT.json
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from given_rows import run, versions
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from trl_steps import StepLog


class GivenIds(RewardTrainer):  # type: ignore[misc]
    """The rows are ids, and their order is that of the file."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def with_token_types(model: Any, tokenizer: Any) -> None:
    """An encoder with two types of tokens gets those of a pair: 1 behind the first mark between texts. RewardTrainer
    gives none."""

    def add(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = given["input_ids"] if "input_ids" in given else args[0]
        marks = (ids == tokenizer.sep_token_id).long()
        return args, {**given, "token_type_ids": ((marks.cumsum(1) - marks) > 0).long()}

    if "token_type_ids" in tokenizer.model_input_names and getattr(model.config, "type_vocab_size", 0) > 1:
        model.register_forward_pre_hook(add, with_kwargs=True)


def margins(model: Any, pairs: list[dict[str, list[int]]]) -> list[float]:
    """By how much the chosen answer of each pair has the higher reward; a pair at a time, without padding."""
    with torch.no_grad():
        rewards = [[float(model(torch.tensor([pair[f"{side}_ids"]])).logits[0, 0]) for side in ("chosen", "rejected")]
                   for pair in pairs]  # fmt: skip
    return [chosen - rejected for chosen, rejected in rewards]


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses", "seconds" of each step, "margins" of held-out pairs by each adapter, "versions"}."""
    torch.set_num_threads(job["threads"])
    how = {"num_labels": 1, "dtype": getattr(torch, job["precision"])}
    base = AutoModelForSequenceClassification.from_pretrained(job["model"], **how)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    with_token_types(base, tokenizer)
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    notes = StepLog("loss")
    arguments = RewardConfig(
        output_dir=job["folder"], learning_rate=job["lr"], lr_scheduler_type="constant",
        center_rewards_coefficient=job["center"], max_length=None, max_grad_norm=1.0, logging_steps=1,
        per_device_train_batch_size=job["pairs_per_batch"], max_steps=job["steps"], weight_decay=0.0,
        gradient_accumulation_steps=job["pairs_per_step"] // job["pairs_per_batch"], save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GivenIds(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(job["pairs"]),
        processing_class=tokenizer,
        callbacks=[notes],
    )
    trainer.train()
    seconds = [after - before for before, after in zip(notes.ends, notes.ends[1:], strict=False)]
    model.eval()
    found = {"trl": margins(model, job["held_out"])}
    model.load_adapter(job["tuned"], "ours")
    model.set_adapter("ours")
    found["ours"] = margins(model, job["held_out"])
    of = versions("torch", "transformers", "trl", "peft")
    return {"losses": notes.values, "seconds": seconds, "margins": found, "versions": of}


if __name__ == "__main__":
    run(train)
