"""Run every block of the tutorials and hold what they print against the ranges that they state: `make tutorials`.

`python scripts/tutorials.py [--keep FOLDER] [NAME …]`: all pages of docs/tutorials, or those whose names begin so. Each
page runs in an empty folder (below FOLDER, where it stays with the output of each block) with `examples/`, `scripts/`,
`models/` and `docs/` of this checkout, block after block in one shell:

- a notebook's code cells are run as one program;
- a block marked `sh` is run by bash, one marked `python` by Python; others show what they print;
- `<!-- expect: TEXT (NUMBER) in LOW..HIGH -->` after a block: a regular expression with one group that the block's
  output matches; the last match is a number within the range. Without `in`, the text alone has to be there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$|^<!-- expect: (.*?) -->$", re.MULTILINE | re.DOTALL)
LIMIT_S = 1800
"""Of a page: far above the eight minutes that one may take on two quiet cores, since other work may run."""


@dataclass
class Block:
    language: str
    code: str
    expected: list[str] = field(default_factory=list)


def main(words: list[str]) -> int:
    keep, names = (Path(words[1]), words[2:]) if words[:1] == ["--keep"] else (None, words)
    pages = [page for page in sorted([*PAGES.glob("*.md"), *PAGES.glob("*.ipynb")]) if page.name != "README.md"]
    chosen = [page for page in pages if not names or any(page.stem.startswith(name) for name in names)]
    problems: list[str] = []
    for page in chosen:
        began = time.monotonic()
        found = run_page(page, keep)
        print(f"{page.stem}: {'; '.join(found) or 'as it says'} ({time.monotonic() - began:.0f} s)", flush=True)
        problems += found
    return 1 if problems else 0


def blocks_of(text: str) -> list[Block]:
    blocks: list[Block] = []
    for match in BLOCK.finditer(text):
        if match[1]:
            blocks.append(Block(match[1], match[2]))
        else:
            blocks[-1].expected.append(match[3])
    return blocks


def cells_of(text: str) -> str:
    """The code cells of a notebook as one program, which draws nothing on a screen."""
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join(["import matplotlib", "matplotlib.use('agg')", *("".join(cell["source"]) for cell in cells)])


def run_page(page: Path, keep: Path | None = None) -> list[str]:
    """Run the blocks of a page, in a folder below `keep` if there is one; returns what differs from what it says."""
    text = page.read_text("utf-8")
    blocks = [Block("python", cells_of(text))] if page.suffix == ".ipynb" else blocks_of(text)
    with ExitStack() as stack:
        if keep is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tutorial-"))
        else:
            (keep / page.stem).mkdir(parents=True)
            folder = str(keep / page.stem)
        for name in ("examples", "scripts", "models", "docs"):
            (ROOT / name).mkdir(exist_ok=True)
            (Path(folder) / name).symlink_to(ROOT / name)
        outputs, code = run_blocks(blocks, Path(folder))
    problems = [f"ended with {code} in block {len(outputs)}:\n{outputs[-1][-2000:]}"] if code else []
    for number, (block, output) in enumerate(zip(blocks, outputs, strict=False), start=1):
        problems += [f"block {number}: {problem}" for words in block.expected if (problem := difference(words, output))]
    return problems


def run_blocks(blocks: list[Block], folder: Path) -> tuple[list[str], int]:
    """The output of each block that was run, and how the shell ended; servers in its background end with it."""
    parts = ["set -e -o pipefail"]
    for number, block in enumerate(blocks, start=1):
        if block.language == "python":
            (folder / f"block{number}.py").write_text(block.code, "utf-8")
        lines = f"python block{number}.py\n" if block.language == "python" else block.code
        parts += [f"exec > {number}.out 2>&1", lines]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "COLUMNS": "100", "TERM": "dumb"}
    (folder / "page.sh").write_text("\n".join(parts), "utf-8")
    shell = subprocess.Popen(["bash", "page.sh"], cwd=folder, env=environment, start_new_session=True)
    try:
        code = shell.wait(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        code = -1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    outputs = [folder / f"{number}.out" for number in range(1, len(blocks) + 1)]
    return [path.read_text("utf-8", "replace") for path in outputs if path.exists()], code


def difference(words: str, output: str) -> str:
    """What is wrong with an output; "" where it is as expected."""
    pattern, _, bounds = words.rpartition(" in ") if re.search(r" in \S+\.\.\S+$", words) else (words, "", "")
    matches = list(re.finditer(pattern, output))
    if not matches:
        return f"nothing reads {shlex.quote(pattern)} in:\n{output[-2000:]}"
    if not bounds:
        return ""
    value = float(matches[-1][1].replace(",", ""))
    low, high = (float(number) for number in bounds.split(".."))
    return "" if low <= value <= high else f"{pattern}: {value} is not within {low} to {high}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
