"""The process of a probe.

    python -m tunesmith.training.probing.child

reads what to probe from its standard input, a line, and tells what it finds on its standard output, a line each. It
ends when its input does: with whoever asked, however that ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.errors import OutOfMemoryError, TunesmithError, is_out_of_memory
from tunesmith.recipe.load import validate
from tunesmith.training.probing.found import Timed
from tunesmith.training.probing.measuring import measure, peak
from tunesmith.training.setup import prepare


def main() -> int:
    """0: all was measured, or why not was told."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message

    def tell(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def on_progress(what: str, done: int, total: int) -> None:
        tell({"progress": [what, done, total]})

    try:
        recipe = validate(told["recipe"])
        setup = prepare(recipe, root=Path(told["root"]), offline=told["offline"], on_progress=on_progress)
        tell({"starting": asdict(Timed(time.time() - told["born"])), "peak": peak(recipe.device)})
        measure(setup, Path(told["folder"]), tell=tell, on_progress=on_progress)
    except OutOfMemoryError as error:
        tell({"ended": f"memory ended: {error}"})
    except (TunesmithError, MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, RuntimeError)) and not is_out_of_memory(error):
            raise
        tell({"ended": f"memory ended: {error}" if not isinstance(error, TunesmithError) else str(error)})
    return 0


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
