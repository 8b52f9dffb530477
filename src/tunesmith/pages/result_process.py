"""The sections of a report as HTML for its page: `python -m tunesmith.pages.result_process RUN
DATA RUNS` prints one line of JSON.

A process of its own: matplotlib, and what the report is made of, would stay in the server's memory.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

from tunesmith.evaluation.report.pages import block_template
from tunesmith.evaluation.report.sections import make_page
from tunesmith.evaluation.report.values import kept_report
from tunesmith.evaluation.series import RunSeries
from tunesmith.pages.local_files import LocalFiles, row_address
from tunesmith.runs.atomic import to_json
from tunesmith.runs.folder import Run
from tunesmith.types import JsonObject

_STYLE = re.compile(r' style="([^"]*)"')


def sections_of(run: Run, files: LocalFiles) -> JsonObject:
    """{summary, sections: [{name, title, html}]} of a finished run, with links to its rows. Raises RunError."""
    page = make_page(run, RunSeries.of(run.events()), kept_report(run))
    template = block_template(partial(row_address, files.places()))
    draw = template.module.draw  # type: ignore[attr-defined]
    sections = []
    for section in page.sections:
        html = "".join(without_styles(str(draw(block))) for block in section.blocks)
        sections.append({"name": section.name, "title": section.title, "html": html})
    return {"kind": "sections", "summary": page.summary, "sections": sections}


def without_styles(html: str) -> str:
    """The HTML with styles of elements as attributes: a page allows no style of an element."""

    def attributes(match: re.Match[str]) -> str:
        rules = [rule.partition(":") for rule in match[1].split(";") if ":" in rule]
        return "".join(f' {name.strip()}="{value.strip()}"' for name, _, value in rules)

    return _STYLE.sub(attributes, html)


if __name__ == "__main__":
    path, data, root = map(Path, sys.argv[1:])
    sys.stdout.buffer.write(to_json(sections_of(Run(path), LocalFiles(data, root))) + b"\n")
