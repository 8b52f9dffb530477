"""tunesmith export"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import BaseAt, Json, Offline, Root, RunName, remember_json

if TYPE_CHECKING:
    from tunesmith.export.exporting import Exported
    from tunesmith.runs.folder import Run

PHASES = {
    "tuned": "looking at the tuned model",
    "write": "writing",
    "verify": "comparing in a new process",
}


def export(
    ctx: typer.Context,
    run: RunName,
    to: Annotated[
        str, typer.Option("--to", metavar="TARGET", help="merged, adapter, gguf, gguf-adapter, ollama, onnx.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to put it; else the run's folder exports.")
    ] = None,
    quant: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="How matrices of a GGUF are stored: f32, f16, bf16; for gguf and ollama also q8_0, q6_k, q5_k_m, "
            "q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0.",
        ),
    ] = "f16",
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="merged: what weights are stored in.")
    ] = "auto",
    bake_scale: Annotated[
        bool, typer.Option("--bake-scale", help="adapter: for servers that ignore rank-stabilised scaling.")
    ] = False,
    pre: Annotated[
        str | None, typer.Option(metavar="NAME", help="gguf, ollama: llama.cpp's rule of splitting text.")
    ] = None,
    merge_into: Annotated[
        str, typer.Option(metavar="original|dequantized", help="qlora: which weights of the base to take.")
    ] = "original",
    license: Annotated[str | None, typer.Option(metavar="ID", help="Licence in the model card.")] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare it with the tuned model; the card says so.")
    ] = False,
    model: BaseAt = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Turn a run into something others use, and prove that it is what was tuned.

    tunesmith export last --to gguf --quant q8_0 --out support-gguf
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.display import phases
    from tunesmith.cli.streams import console
    from tunesmith.export.exporting import export_run
    from tunesmith.export.options import Options
    from tunesmith.runs.folder import Run

    found = Run.open(run, root, base=model)
    options = Options(dtype=dtype, quant=quant, bake_scale=bake_scale, pre=pre, merge_into=merge_into, license=license)
    with phases(console(stderr=True), PHASES) as progress:
        done = export_run(
            found, to, out=out, options=options, proof=not no_verify, offline=offline, on_progress=progress
        )
    _tell(done, as_json=as_json)


def make_planned(run: Run, *, as_json: bool) -> None:
    """The exports that a finished run's recipe asks for, each told when it is there."""
    from tunesmith.cli.display import phases
    from tunesmith.cli.streams import console
    from tunesmith.export.planned import export_planned

    for word in run.recipe().export.to:
        with phases(console(stderr=True), PHASES) as progress:
            done = export_planned(run, word, on_progress=progress)
        _tell(done, as_json=as_json)


def _tell(done: Exported, *, as_json: bool) -> None:
    from dataclasses import asdict

    from tunesmith.cli.streams import json_line

    if not as_json:
        _draw(done)
        return
    values = {"target": done.target, "path": str(done.path), "verified": done.found is not None}
    numbers = None if done.found is None else asdict(done.found)
    json_line({"kind": "export", **values, "proof": numbers, "bounds": asdict(done.bounds), "notes": list(done.notes)})


def _draw(done: Exported) -> None:
    from tunesmith.cli.render import visible
    from tunesmith.cli.streams import console
    from tunesmith.export.card import proof_lines

    screen = console()
    for note in done.notes:
        screen.print(visible(f"note: {note}"), style="bright_black")
    if done.found is None:
        screen.print("not verified (--no-verify): nobody has compared it with the tuned model", style="yellow")
    else:
        screen.print(f"same as what was tuned, on {done.found.rows} {done.rows}, loaded by {done.loaded_by}:")
        for what, value, bound in proof_lines(done.found, done.bounds):
            screen.print(f"  {what}: {value}" + (f" (allowed {bound})" if bound else ""))
    screen.print(f"{done.target} in {done.path}")
