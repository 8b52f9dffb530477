"""A grader written into a file, and a process of graders with a bug planted into it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.graders import children, schema
from tunesmith.graders.grade import Answer, Grade
from tunesmith.graders.pool import Pool


def function_in(folder: Path, source: str, *, seconds: float = 20.0, **options: Any) -> schema.Function:
    file = folder / "grader.py"
    file.write_text(source)
    return schema.Function(type="function", file=str(file), seconds=seconds, **options)


def grades(grader: Any, *texts: str, item: dict[str, Any] | None = None) -> list[Grade]:
    with Pool(grader, at_once=1) as pool:
        return [pool.submit(Answer(text), item or {}).result() for text in texts]


def grade(value: Any, text: str, item: dict[str, Any] | None = None) -> Grade:
    """By a grader as a file of JSON says it."""
    return grades(schema.from_value(value), text, item=item)[0]


def plant(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Let processes of graders begin with `bug`, in which `c` is their module."""
    code = f"import os, subprocess, sys, json, tunesmith.graders.child as c\n{bug}\nc.main()"
    monkeypatch.setattr(children, "python_words", lambda module: [sys.executable, "-c", code])
