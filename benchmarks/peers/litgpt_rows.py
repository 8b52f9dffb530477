"""Rows that are tokens already, as a data module of LitGPT."""

from __future__ import annotations

import torch
from given_rows import Counter, labelled
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from torch.utils.data import DataLoader

COUNTER = Counter(get_sft_collate_fn())
"""Collates, and counts, the rows that are trained on."""


class Rows(DataModule):
    """Those of rows.json, in a random order, as LitGPT's own modules have them."""

    def __init__(self, path: str, seed: int) -> None:
        super().__init__()
        self.path, self.seed = path, seed
        self.prompt_style = Default()
        self.batch_size = 1

    def connect(self, *_: object, batch_size: int = 1, **__: object) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[dict[str, object]]:
        order = torch.Generator().manual_seed(self.seed)
        rows = _tensors(self.path, "train")
        return DataLoader(rows, batch_size=self.batch_size, shuffle=True, generator=order, collate_fn=COUNTER)

    def val_dataloader(self) -> DataLoader[dict[str, object]]:
        """Of one row: what LitGPT measures beside training is set to the least."""
        return DataLoader(_tensors(self.path, "eval")[:1], collate_fn=get_sft_collate_fn())


def _tensors(path: str, side: str) -> list[dict[str, object]]:
    return [
        {
            **{name: torch.tensor(values) for name, values in row.items()},
            "token_counts": dict.fromkeys(("raw", "raw_plus_prompt_template"), len(row["input_ids"])),
        }
        for row in labelled(path, side)
    ]
