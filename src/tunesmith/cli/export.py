"""tunesmith export, push"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import (
    BaseAt,
    Json,
    Offline,
    Root,
    RunName,
    named,
    refuse_lacking_export,
    refuse_unknown_target,
)
from tunesmith.cli.streams import console, json_line
from tunesmith.phrases import plural, visible
from tunesmith.runs.folder import Run

if TYPE_CHECKING:
    from tunesmith.export.export_run import Exported
    from tunesmith.runs.folder import Run


EXPORT_PHASES = {
    "tuned": "running the tuned model",
    "base": "running its base",
    "write": "writing",
    "quantize": "quantizing by llama.cpp",
    "verify": "comparing in a new process",
}


def export(
    run: RunName,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="merged, adapter, gguf, ollama, onnx.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder (default: exports/ in the run).")
    ] = None,
    quant: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Type of the matrices of a GGUF: f32, f16, bf16; for gguf and ollama also q8_0, q6_k, q5_k_m, q5_k_s, "
            "q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0.",
        ),
    ] = "f16",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="merged: dtype of the weights: bfloat16, float16, float32, or the first of them that agrees (auto).",
        ),
    ] = "auto",
    license: Annotated[str | None, typer.Option(metavar="ID", help="License in the model card.")] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the comparison with the tuned model; the card says so.")
    ] = False,
    model: BaseAt = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Export a run for other programs, and check that it equals the tuned model.

    tunesmith export last --to gguf --quant q8_0 --out support-gguf
    """
    refuse_unknown_target("--to", to)
    refuse_lacking_export("--to", to)
    opened = Run.open(named(run, root), root, base=model)
    opened.result()  # refused here, before torch is imported
    from tunesmith.cli.display import phases
    from tunesmith.export.export_run import export_run
    from tunesmith.export.target import ExportOptions

    options = ExportOptions(dtype=dtype, quant=quant, license=license)
    with phases(console(stderr=True), EXPORT_PHASES) as progress:
        done = export_run(
            opened,
            to,
            out=out,
            options=options,
            proof=not no_verify,
            offline=offline,
            on_progress=progress,
            on_note=print_note,
        )
    print_export(done, as_json=as_json)


def print_note(text: str) -> None:
    """Print a note on an export."""
    console(stderr=True).print(visible(f"note: {text}"), style="bright_black", soft_wrap=True)


def print_export(done: Exported, *, as_json: bool) -> None:
    """Print what was exported, and how far it is from the tuned model."""
    from dataclasses import asdict

    from tunesmith.export.hub import comparison_lines

    screen = console()
    if as_json:
        numbers = None if done.found is None else asdict(done.found)
        values = {"target": done.target, "path": str(done.path), "verified": done.found is not None, "proof": numbers}
        json_line({"kind": "export", **values, "bounds": asdict(done.allowed), "notes": list(done.notes)})
        return
    for note in done.notes:
        screen.print(visible(f"note: {note}"), style="bright_black")
    if done.found is None:
        screen.print("not verified (--no-verify): nobody has compared it with the tuned model", style="yellow")
    else:
        compared = f"{done.found.rows} {done.rows}, each alone, by {done.loaded_by}"
        screen.print(f"agrees with the tuned model within limits: {compared}:")
        for what, value, bound in comparison_lines(done.found, done.allowed):
            screen.print(f"  {what}: {value} ({bound})")
    screen.print(f"{done.target} in {done.path}")


def push(
    run: RunName,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name on the hub: owner/name.")],
    folder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Exported folder (default: the run's export of --to).")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="TARGET", help="Export of the run; made if it does not exist.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make it public (default: private).")] = False,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Upload an export to the Hugging Face hub. No other command uploads anything.

    tunesmith push last me/support-lora

    tunesmith push last me/support --to merged --public
    """
    opened = Run.open(named(run, root), root)
    from dataclasses import asdict

    from tunesmith.cli.display import phases
    from tunesmith.export.export_run import export_run
    from tunesmith.export.hub import push as upload

    if folder is None:
        target = to or ("adapter" if opened.adapter_path.exists() else "merged")
        folder = opened.export_path(target)
        if not folder.exists():
            with phases(console(stderr=True), EXPORT_PHASES) as progress:
                folder = export_run(opened, target, on_progress=progress).path
    done = upload(folder, name, private=not public)
    if as_json:
        json_line({"kind": "push", "folder": str(folder), "name": name, "private": not public, **asdict(done)})
        return
    screen = console()
    if not done.is_proven:
        screen.print("note: it was exported with --no-verify, and its card says so", style="yellow")
    whose = "everybody can see it" if public else "only you can see it (--public shows it to all)"
    screen.print(f"{plural(done.num_files, 'file')} at {done.url}; {whose}")
