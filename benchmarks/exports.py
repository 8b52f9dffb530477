"""The tables of docs/EXPERIMENTS.md: how near each export is to what was tuned, by who loads it.

    python -m benchmarks.exports [ARCHITECTURE ...]      tiny models, an adapter drawn at random on each
    python -m benchmarks.exports --run RUN               one finished run, every target

A target that an architecture has not is a dash; an export that is not what was tuned fails, and says so in its place.
Needs the tests beside it, whose tiny models it exports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.export.export_run import Exported
    from tunesmith.export.verify import ExportComparison
    from tunesmith.runs.folder import Run

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 256
"""Size of the tiny models: what llama.cpp's K kinds cut rows into."""
COLUMNS = {
    "merged float32": ("merged", {}),
    "merged bfloat16": ("merged", {"dtype": "bfloat16"}),
    "adapter, by peft": ("adapter", {}),
    "onnx": ("onnx", {}),
    "gguf f16": ("gguf", {"quant": "f16"}),
    "gguf q8_0": ("gguf", {"quant": "q8_0"}),
    "gguf q4_k_m": ("gguf", {"quant": "q4_k_m"}),
    "gguf q4_0": ("gguf", {"quant": "q4_0"}),
    "ollama f16": ("ollama", {"quant": "f16"}),
    "gguf-adapter f16": ("gguf-adapter", {"quant": "f16"}),
}
ENCODERS = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "mpnet")
NONE, FAILED = "–", "fails"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description=__doc__)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="of the tiny models; else all")
    parser.add_argument("--run", type=Path, help="a finished run instead of tiny models")
    options = parser.parse_args(words)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    from transformers.utils import logging

    logging.disable_progress_bar()
    for line in real_table(options.run) if options.run else tiny_tables(options.architectures):
        print(line, flush=True)


def tiny_tables(names: Sequence[str]) -> Iterator[str]:
    """Architecture by target, as transformers, peft and onnxruntime load it; then the same in llama.cpp."""
    from export.exports import of_architecture, of_encoder
    from tunesmith.export import verify
    from tunesmith.export.gguf_models import ARCHITECTURES

    verify.launch = verify.do_job  # tiny models are compared in this process: a new one takes longer than all the rest
    theirs = []
    yield from _head(["", *COLUMNS])
    for name in names or (*ARCHITECTURES, *ENCODERS):
        run = of_encoder(name) if name in ENCODERS else of_architecture(name, hidden=WIDTH)
        found = {column: exported(run, column) for column in COLUMNS}
        yield _row([name, *(_brief(done if isinstance(done, str) else done.found) for done in found.values())])
        in_llama_cpp = {c: done if isinstance(done, str) else done.in_llama_cpp for c, done in found.items()}
        theirs.append((name, {c: in_llama_cpp[c] for c in COLUMNS if COLUMNS[c][0].startswith(("gguf", "ollama"))}))
    yield ""
    yield from _head(["in llama.cpp", *theirs[0][1]])
    yield from (
        _row([name, *map(_brief, cells.values())]) for name, cells in theirs if any(map(_is_found, cells.values()))
    )


def real_table(path: Path) -> Iterator[str]:
    """Every target of one run, a line for each program that loaded it."""
    from tunesmith.runs.folder import Run

    run = Run.open(str(path), path.parent)
    words = ["KL, mean (most)", "first choice", "share of the tuning effect", "held-out loss, tuned and exported"]
    yield from _head(["", *words, "greedy answers"])
    for column in COLUMNS:
        done = exported(run, column)
        if isinstance(done, str):
            yield _row([column, done, "", "", "", ""])
            continue
        yield _line(column, done.found)
        if done.in_llama_cpp is not None:
            yield _line(f"{column}, in llama.cpp", done.in_llama_cpp)


def exported(run: Run, column: str) -> Exported | str:
    """An export that is thrown away again; the word for none where the target does not take this model."""
    from tunesmith.errors import ExportError, InputError
    from tunesmith.export.export_run import export_run
    from tunesmith.export.target import ExportOptions

    target, words = COLUMNS[column]
    with TemporaryDirectory() as folder:
        try:
            return export_run(run, target, out=Path(folder) / "out", options=ExportOptions(**words), offline=True)
        except InputError:
            return NONE
        except ExportError as error:
            print(error, file=sys.stderr)
            return FAILED


def _is_found(cell: object) -> bool:
    return cell is not None and not isinstance(cell, str)


def _brief(found: ExportComparison | str | None) -> str:
    if isinstance(found, str):
        return found
    return NONE if found is None else f"{found.kl:.0e}, {found.top1:.0%}"


def _line(what: str, found: ExportComparison | None) -> str:
    assert found is not None, "every export here is proven"
    carried = NONE if found.carried is None else f"{found.carried:.1%}"
    losses = NONE if found.loss_tuned is None else f"{found.loss_tuned:.4f}, {found.loss_exported:.4f}"
    answers = f"{found.same_answers} of {found.answers}"
    return _row([what, f"{found.kl:.1e} ({found.kl_max:.1e})", f"{found.top1:.1%}", carried, losses, answers])


def _head(cells: Iterable[str]) -> Iterator[str]:
    cells = list(cells)
    yield _row(cells)
    yield "|---" * len(cells) + "|"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
