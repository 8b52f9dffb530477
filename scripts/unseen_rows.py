"""Held-out loss of a LoRA run on those held-out rows that do not stand in its training files too.

python scripts/unseen_rows.py runs/support-3f2a
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tunesmith.data.rows import Places, encode_rows
from tunesmith.evaluation.measure import Score, evaluate
from tunesmith.loading import load_run
from tunesmith.models.attention import use_ragged
from tunesmith.recipe.knobs import known
from tunesmith.run import Run
from tunesmith.tasks import TASKS


def main(name: str) -> None:
    run = Run.open(name, Path("runs"))
    recipe, speaker = run.recipe(), load_run(run)
    use_ragged(speaker.model)
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder), Path(folder))
        renderer, nothing = speaker.renderer, lambda what, done, total: None
        rows = encode_rows(recipe.data, renderer, places=places, max_held=None, on_progress=nothing)
        seen = np.isin(rows.held_store.hashes[rows.held_rows], rows.store.hashes[rows.train_rows])

        def score() -> Score:
            return evaluate(
                speaker.model,
                TASKS[known(recipe.task)],
                store=rows.held_store,
                rows=[int(i) for i in rows.held_rows[~seen]],
                tokens_per_pass=known(recipe.train.tokens_per_pass),
                layout="ragged",
                device=recipe.device,
            )

        after = score()
        with speaker.untuned():
            before = score()
    print(f"{int((~seen).sum())} of {len(seen)} held-out rows were never trained on")
    print(f"loss {before.loss:.4f} before, {after.loss:.4f} after")
    print(f"tokens guessed right {before.token_accuracy:.1%} before, {after.token_accuracy:.1%} after")


if __name__ == "__main__":
    main(sys.argv[1])
