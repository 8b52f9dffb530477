"""Token ids and targets of train.jsonl and eval.jsonl, as Tunesmith trains on them:

    python render_rows.py MODEL FOLDER

FOLDER/rows.json: "train" and "eval", for each row "ids" and "trained", 1 where a token is a target.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.data.dataset import RowStore
from tunesmith.recipe import load
from tunesmith.training.setup import prepare


def render(model: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows in the order of their files."""
    files = {f"data.{side}": str(folder / f"{side}.jsonl") for side in ("train", "eval")}
    given = {"model": model, **files, "evaluation.samples": 0}
    recipe = load.load(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    with tempfile.TemporaryDirectory() as root:
        rows = prepare(recipe, root=Path(root), offline=True).rows
        return {"train": _listed(rows.store), "eval": _listed(rows.held_store)}


def _listed(store: RowStore) -> list[dict[str, Any]]:
    rows = [store.row(i) for i in range(len(store))]
    return [{"ids": row.ids.tolist(), "trained": row.trained.astype(int).tolist()} for row in rows]


if __name__ == "__main__":
    place = Path(sys.argv[2])
    (place / "rows.json").write_text(json.dumps(render(sys.argv[1], place)), "utf-8")
