"""The common judge: loss per target on held-out rows of what a contestant saved, by transformers and PEFT in float32:

    python held_out.py MODEL RESULT ROWS.json

RESULT: a folder of an adapter or of a whole model; MODEL: what an adapter was made for. Prints the loss in nats.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load(model: str, result: str) -> Any:
    """The tuned model."""
    if not (Path(result) / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), result).eval()


@torch.inference_mode()
def loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Mean over the targets of all rows, each row by itself: no padding, no packing."""
    total, num = 0.0, 0
    for row in rows:
        ids, trained = torch.tensor(row["ids"]), torch.tensor(row["trained"]).bool()[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1][trained]
        total += float(torch.nn.functional.cross_entropy(logits.double(), ids[1:][trained], reduction="sum"))
        num += int(trained.sum())
    return total / num


if __name__ == "__main__":
    held_out = json.loads(Path(sys.argv[3]).read_text("utf-8"))["eval"]
    print(loss(load(sys.argv[1], sys.argv[2]), held_out))
