"""Draw docs/terminal.svg from the events of a real run: what its person saw, with one moment of the live area.

python scripts/terminal_picture.py runs/demo docs/terminal.svg
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tunesmith.cli.display import Live
from tunesmith.evaluation.series import RunSeries
from tunesmith.runs.folder import Run

WIDTH = 100
MOST_LINES = 35
"""Of a picture that is read at a glance."""
MOMENT = 0.6
"""Share of the steps after which the live area is drawn."""
DARK = ((40, 44, 52), (224, 108, 117), (126, 201, 140), (229, 192, 123), (97, 175, 239), (198, 120, 221))
BRIGHT = ((110, 118, 132), (240, 113, 120), (152, 215, 160), (240, 205, 140), (120, 190, 250), (210, 140, 230))
THEME = TerminalTheme(
    (24, 26, 31),
    (214, 218, 226),
    [*DARK, (86, 192, 204), (171, 178, 191)],
    [*BRIGHT, (110, 210, 220), (230, 233, 240)],
)
# rich's own form fetches a font from a server each time the picture is looked at; this one takes what is there.
FORM = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g>
</svg>
"""


def main(run_path: str, target: str, question: str = "") -> None:
    run = Run.open(run_path, Path("runs"))
    recipe, events = run.recipe(), list(run.events())
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, markup=False, highlight=False)
    words = ["tunesmith", "train", recipe.model, *(file.path for file in recipe.data.train)]
    words += [word for file in recipe.data.eval for word in ("--eval", file.path)]
    plan = next(event.values for event in events if event.kind == "plan")
    if not any(choice["key"] == "method" for choice in plan["choices"]):
        words += ["--method", plan["method"]]
    if not re.search("-[0-9a-f]{4}$", run.path.name):
        words += ["--out", run_path]
    console.print(Text.assemble(("$ ", "green"), (shlex.join(words), "bold")))
    live = Live(console, RunSeries())
    drawn = False
    for event in events:
        live.event(event)
        if event.kind == "step" and not drawn and event.step >= MOMENT * live.series.total_steps:
            console.print(live.area.get_renderable())
            console.print("⋮", style="bright_black")
            drawn = True
    if question:
        ask(console, run_path, question)
    if (num := console.export_text(clear=False).count("\n")) > MOST_LINES:
        print(f"{target}: {num} lines, more than {MOST_LINES}: take a run with fewer evaluations", file=sys.stderr)
    svg = console.export_svg(title="tunesmith", theme=THEME, code_format=FORM, unique_id="tunesmith")
    Path(target).write_text(svg, encoding="utf-8")


def ask(console: Console, run_path: str, question: str) -> None:
    words = ["chat", run_path, "--compare", "--once", question]
    console.print("", Text.assemble(("$ ", "green"), (shlex.join(["tunesmith", *words]), "bold")), sep="\n")
    command = [sys.executable, "-m", "tunesmith", *words, "--max-tokens", "60", "--offline"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    console.print(said.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
