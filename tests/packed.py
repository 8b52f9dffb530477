"""Rows, batches and models for tests of packing."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from tiny_model import SETTINGS, tiny_model
from tunesmith.data.collate import build_batch
from tunesmith.types import Batch, Row, Source

VOCAB = 96
CANNOT = ("bloom", "falcon")
CAN = tuple(arch for arch in SETTINGS if arch not in CANNOT)
OFTEN = ("llama", "gpt2", "gemma2", "qwen3_moe")
"""Run each time: rotary and learned positions, tied tables, caps and windows, experts. The others before a release."""
LENGTHS = (23, 11, 11, 11, 7, 4, 2)
"""Longer than the tiny models' sliding windows, three of equal length, and one of a single target."""


def rows_of(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Row]:
    generator = np.random.default_rng(seed)
    return [Row(generator.integers(3, VOCAB, n).astype(np.int32), np.ones(n, bool), Source("x", 1)) for n in lengths]


def batch_of(rows: Sequence[Row], layout: str = "packed") -> Batch:
    return build_batch(rows, range(len(rows)), layout=layout, device="cpu")


def sharp(arch: str, **settings) -> PreTrainedModel:
    """Weights large enough that a token read by mistake moves logits by whole units, as in a trained model."""
    wide = {} if arch == "bloom" else {"initializer_range": 0.3}
    return tiny_model(arch, vocab_size=VOCAB, **wide, **settings).eval()


def alone(model: PreTrainedModel, rows: Sequence[Row]) -> torch.Tensor:
    """[N, V], one row at a time, by the model's own attention."""
    logits = [model(input_ids=torch.tensor(row.ids[None].astype(np.int64)), use_cache=False).logits for row in rows]
    return torch.cat([logits_1LV[0, :-1] for logits_1LV in logits])
