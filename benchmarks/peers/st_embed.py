"""sentence-transformers' CachedMultipleNegativesRankingLoss on given steps. Run by the Python of its environment:

    python st_embed.py rows TRAIN.jsonl HELD.jsonl [FIRST]      terms of ICD-10-CM and the descriptions of their codes
    python st_embed.py train JOB.json RESULT.json

JOB.json: "model", "steps" (a list of [anchor, positive] a step), "lr", "mini_batch", "threads". RESULT.json: "losses",
"seconds" of each step, "versions".
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

HELD = 1000


def write_rows(train: Path, held: Path, start: int) -> None:
    """Each term once. Trained is one term of each code, so that no step has a text twice; held out are others, from the
    one at `start` on."""
    import simple_icd_10_cm as icd

    seen: set[str] = set()
    first: list[dict[str, str]] = []
    others: list[dict[str, str]] = []
    described: set[str] = set()
    codes = icd.get_all_codes(with_dots=True)
    texts = {icd.get_description(code).lower() for code in codes}
    for code in codes:
        for term in icd.get_inclusion_term(code):
            row = {"anchor": term, "positive": icd.get_description(code)}
            if term.lower() in seen or term.lower() in texts:
                continue
            seen.add(term.lower())
            is_first = row["positive"].lower() not in described
            described.add(row["positive"].lower())
            (first if is_first else others).append(row)
    others.sort(key=lambda row: hashlib.sha256(row["anchor"].encode()).digest())
    for path, rows in ((train, first), (held, others[start : start + HELD])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Losses and seconds of each step, dropout off."""
    import sentence_transformers
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    torch.set_num_threads(job["threads"])
    model = SentenceTransformer(job["model"], device="cpu").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss_of = CachedMultipleNegativesRankingLoss(model, mini_batch_size=job["mini_batch"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0)
    losses, seconds = [], []
    for pairs in job["steps"]:
        began = time.perf_counter()
        features = [model.preprocess([pair[side] for pair in pairs]) for side in (0, 1)]
        loss = loss_of(features, torch.empty(0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
    versions = {"sentence-transformers": sentence_transformers.__version__, "torch": torch.__version__}
    return {"losses": losses, "seconds": seconds, "versions": versions}


if __name__ == "__main__":
    verb, first_path, second_path, *start = sys.argv[1:]
    if verb == "rows":
        write_rows(Path(first_path), Path(second_path), int(*start))
    else:
        found = train(json.loads(Path(first_path).read_text("utf-8")))
        Path(second_path).write_text(json.dumps(found), "utf-8")
