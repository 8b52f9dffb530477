"""The judge of `python -m benchmarks answers --beside`: how near the two tokens are at which answers part.

    python answers_ties.py JOB.json RESULT.json

A forward pass in float32 over the prompt and the tokens that both sides wrote.
"""

from __future__ import annotations

from typing import Any

from given_rows import run


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"ties": of each pair that parts {"answer", "at", "tokens", "logits", "ranks", "rounding"}}. Logits
    and ranks are those of float32; `rounding` is how far those of bfloat16 are from them, at most."""
    import torch

    from tunesmith.inference.load import load_model

    torch.set_num_threads(job["threads"])
    loaded = load_model(job["model"])
    narrow, tokenizer = loaded.model.to(torch.bfloat16), loaded.renderer.tokenizer
    wide = load_model(job["model"]).model.to(torch.float32)
    ties = []
    for pair in job["pairs"]:
        ids_1T = torch.tensor([pair["common"]])
        with torch.no_grad():
            logits_V = wide(ids_1T, use_cache=False).logits[0, -1]
            rounded_V = narrow(ids_1T, use_cache=False).logits[0, -1].float()
        both = torch.tensor(pair["tokens"])
        ties.append({
            "answer": pair["answer"], "at": pair["at"], "tokens": [tokenizer.decode([int(i)]) for i in both],
            "logits": logits_V[both].tolist(),
            "ranks": [int((logits_V > value).sum()) + 1 for value in logits_V[both]],
            "rounding": float((rounded_V - logits_V)[both].abs().max()),
        })  # fmt: skip
    return {"ties": ties}


if __name__ == "__main__":
    run(judge)
