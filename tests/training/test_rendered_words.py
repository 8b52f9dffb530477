"""SmolLM2 with a random tower and projector grafted on reads words that are drawn in fonts."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.grafted import SIZE, graft
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from smollm2 import NEEDS_SMOLLM2, SMOLLM2
from tunesmith.inference.load import load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.recipe.load import validate
from tunesmith.training.trainer import train

WORDS = ("house", "river", "green", "seven", "bread", "cloud", "music", "horse",
         "table", "light", "paper", "stone", "water", "night", "fruit", "sugar")  # fmt: skip
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneralBol")
WIDTH = 60
"""Most pixels of a word."""
WAYS = tuple(product(FONTS, range(1, 4), range(4, 7), (0, 60)))
"""Each word is drawn in all of these ways: font, place from the left and from above, grey."""
HELD = 3
"""Ways of each word that are held out, others for each word."""


def drawn(word: str, name: str, left: int, top: int, grey: int) -> Image.Image:
    """A word, dark on white, as large as its picture is wide."""
    file = str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf")
    fitting = [font for size in range(8, 33) if (font := ImageFont.truetype(file, size)).getlength(word) <= WIDTH]
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(picture).text((left, top), word, fill=(grey, grey, grey), font=fitting[-1])
    return picture


def draw_rows(folder: Path) -> tuple[Path, Path, Path]:
    """Rows to learn, rows that are held out, and these again with the pictures of other words."""
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "held": [], "permuted": []}
    order = np.random.default_rng(0)
    for number, word in enumerate(WORDS):
        for place, way in enumerate(order.permutation(len(WAYS))):
            name = f"{word}-{place}.png"
            drawn(word, *WAYS[way]).save(folder / name)
            row = {"images": [name], "prompt": "<image>Which word?", "completion": word}
            sides["held" if place < HELD else "train"].append(row)
            if place < HELD:
                sides["permuted"].append({**row, "completion": WORDS[number - 1]})
    for name, rows in sides.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "train.jsonl", folder / "held.jsonl", folder / "permuted.jsonl"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@NEEDS_SMOLLM2
def test_words_are_read_back(tmp_path: Path) -> None:
    """The tower stays random: adapters on the language part and the projector learn what it shows. Chance is one in
    sixteen. About ten minutes on one thread."""
    rows, held, permuted = draw_rows(tmp_path)
    recipe: dict[str, Any] = {
        "model": str(graft(str(SMOLLM2), tmp_path / "grafted", "words")),
        "task": "chat",
        "method": {"name": "lora", "also_train": ["projector"]},
        "data": {"train": [str(rows)], "eval": [str(held)]},
        "optim": {"lr": 1e-3},
        "train": {"epochs": 10, "max_steps": 200, "rows_per_step": 16},
        "evaluation": {"samples": 0, "general": False, "surprising": 0},
        "checkpoint": {"every": 10_000},
        "threads": 1,
    }
    run = load_run(train(validate(recipe), root=tmp_path / "runs", offline=True), offline=True)
    right, chance = (
        evaluate_file(run, str(file), samples=HELD * len(WORDS)).measures["exact_match"]["value"]
        for file in (held, permuted)
    )
    print(f"{right:.1%} of {HELD * len(WORDS)} words, {chance:.1%} with the pictures of other words")
    assert right >= 0.9
    assert chance <= 0.1
