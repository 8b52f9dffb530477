"""Writes st_losses.json: losses of sentence-transformers for fixed vectors. Run by the Python of an environment that
has it: `python tests/tasks/st_losses.py [FILE]`."""

import json
import sys
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, ListNetLoss
from sentence_transformers.sentence_transformer import losses
from torch.nn import functional as F

NUM, SIZE = 6, 10


def vectors(num_texts: int, seed: int) -> torch.Tensor:
    """[rows, texts, size]: each text of a row a little like its anchor."""
    draw = torch.Generator().manual_seed(seed)
    anchors = torch.randn(NUM, 1, SIZE, generator=draw, dtype=torch.float64)
    return F.normalize(anchors + torch.randn(NUM, num_texts, SIZE, generator=draw, dtype=torch.float64), dim=-1)


SCORES = [0.1, 0.9, 0.4, 0.4, 0.7, 0.0]
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
CASES = {
    "ranking": (2, losses.MultipleNegativesRankingLoss, {}, {"loss": "ranking"}),
    "ranking with negatives": (4, losses.MultipleNegativesRankingLoss, {}, {"loss": "ranking"}),
    "ranking, scale 5": (3, losses.MultipleNegativesRankingLoss, {"scale": 5.0}, {"loss": "ranking", "scale": 5}),
    "symmetric": (2, losses.MultipleNegativesRankingLoss, BOTH, {"loss": "ranking", "symmetric": True}),
    "cosent": (2, losses.CoSENTLoss, {}, {"loss": "cosent"}),
    "angle": (2, losses.AnglELoss, {}, {"loss": "angle"}),
    "cosine": (2, losses.CosineSimilarityLoss, {}, {"loss": "cosine"}),
    "margin": (3, losses.MarginMSELoss, {}, {"loss": "margin"}),
    "dims": (3, losses.MultipleNegativesRankingLoss, {}, {"loss": "ranking", "dims": [SIZE, 4]}),
}


class Scores(CrossEncoder):
    """A cross-encoder that says given scores."""

    device, num_labels = torch.device("cpu"), 1

    def __init__(self, scores: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.scores = scores

    def preprocess(self, pairs: Any, **how: Any) -> dict[str, Any]:
        return {}

    def forward(self, features: Any) -> dict[str, torch.Tensor]:
        return {"scores": self.scores.flatten()}


def rankings() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(5)
    scores, wanted = torch.randn(3, 4, generator=draw), torch.rand(3, 4, generator=draw).round()
    queries, documents = ["q"] * 3, [["d"] * 4] * 3
    weight = torch.tensor(3.0)
    flat = [["q"] * 12, ["d"] * 12]
    found = {
        "pointwise": ({}, BinaryCrossEntropyLoss(Scores(scores))(flat, wanted.flatten())),
        "weighted": (
            {"positive_weight": 3.0},
            BinaryCrossEntropyLoss(Scores(scores), pos_weight=weight)(flat, wanted.flatten()),
        ),
        "listwise": (
            {"loss": "listwise"},
            ListNetLoss(Scores(scores), mini_batch_size=-1)([queries, documents], list(wanted)),
        ),
    }
    same = {"scores": scores.tolist(), "wanted": wanted.tolist()}
    return [{"name": name, "options": how, "loss": float(loss), **same} for name, (how, loss) in found.items()]


def main() -> None:
    cases = []
    for seed, (name, (num_texts, make, settings, options)) in enumerate(CASES.items()):
        rows = vectors(num_texts, seed)
        loss = make(None, **settings)
        wanted = torch.tensor(SCORES, dtype=torch.float64)
        sizes = options.get("dims", [SIZE])
        found = 0.0
        for size in sizes:  # as MatryoshkaLoss adds them
            cut = F.normalize(rows[..., :size], dim=-1)
            columns = [cut[:, k] for k in range(num_texts)]
            found += float(loss.compute_loss_from_embeddings(columns, wanted))
        cases.append({"name": name, "options": options, "rows": rows.tolist(), "scores": SCORES, "loss": found})
    versions = {"sentence-transformers": sentence_transformers.__version__, "torch": torch.__version__}
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"versions": versions, "cases": cases, "rankings": rankings()}) + "\n", "utf-8")


if __name__ == "__main__":
    main()
