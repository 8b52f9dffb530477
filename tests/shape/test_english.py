"""Sentences have a subject and a verb, and names say what they hold. The bounds are what is left: they only fall."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shape.tree import ROOT, SOURCE, name_of, parsed, source_files, walked

PHRASES = {"those of": 14, "that of": 11, "of one that": 2, "so many": 6, "of now": 0, "of before": 0}
"""Phrases in the source and in docs, and how often each may still be there."""
VAGUE_NAMES = {"found", "one", "own", "some", "how", "kept", "said", "there", "whole", "given"}
MOST_VAGUE = 60
"""Assignments to names that say nothing of what they hold. Fields and parameters do not count."""
RIDDLE = re.compile(r"^(Of|What|Whoever|One that|Those|The same|With|Over|Where|Which|How)\b")
MOST_RIDDLES = 8
"""Docstrings that begin with neither a subject nor a verb."""
LONGEST_TEST_NAME = 70
UNREAD = ("EXPERIMENTS.md", "CHANGELOG.md")
"""Pages of records, which stay as they were written; so do the decisions."""


def pages() -> list[Path]:
    written = [page for page in (ROOT / "docs").rglob("*.md") if "decisions" not in page.parts]
    return [page for page in [ROOT / "README.md", *sorted(written)] if page.name not in UNREAD]


def phrases_in(texts: Sequence[str]) -> Counter[str]:
    """How often each phrase is there; words of rows in a tutorial, which are quoted, do not count."""
    pattern = re.compile(rf"\b({'|'.join(PHRASES)})\b")
    return Counter(match.group() for text in texts for match in pattern.finditer(text))


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Names that an assignment, a loop, a `with` or a walrus binds."""
    for node in walked(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of modules, classes and functions, and texts below fields and constants."""
    for node in walked(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def test_stilted_phrases_only_become_fewer() -> None:
    texts = [path.read_text("utf-8") for path in (*source_files(), *pages())]
    found = phrases_in(texts)
    assert {phrase: num for phrase, num in found.items() if num > PHRASES[phrase]} == {}, "say whose it is, or how many"


def test_local_names_say_what_they_hold() -> None:
    vague = Counter(
        f"{path.relative_to(SOURCE).parts[0]}: {name}"
        for path in source_files()
        for name in bound_names(parsed(path))
        if name in VAGUE_NAMES
    )
    assert vague.total() <= MOST_VAGUE, vague.most_common()


def test_docstrings_begin_with_a_subject_or_a_verb() -> None:
    riddles = [
        f"{name_of(path)}: {text[:60]}"
        for path in source_files()
        for text in docstrings(parsed(path))
        if RIDDLE.match(text)
    ]
    assert len(riddles) <= MOST_RIDDLES, riddles


def test_names_of_tests_can_be_read_at_a_glance() -> None:
    names = [
        f"{name_of(path)}: {name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
        if len(name) > LONGEST_TEST_NAME
    ]
    assert names == [], "conditions belong in the ids of parametrize"


def test_every_helper_of_the_tests_is_in_their_readme() -> None:
    readme = (ROOT / "tests" / "README.md").read_text("utf-8")
    helpers = [
        path.relative_to(ROOT / "tests").as_posix()
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if not path.name.startswith(("test_", "conftest", "__init__"))
    ]
    assert [helper for helper in helpers if f"({helper})" not in readme] == []
    words = set(re.findall(r"\w+", "\n".join((ROOT / "tests" / helper).read_text("utf-8") for helper in helpers)))
    rows = [line for line in readme.splitlines() if line.startswith("| ")]
    assert [name for row in rows for name in re.findall(r"`([a-z_]+)`", row) if name not in words] == []


@pytest.mark.parametrize(
    ("text", "num"), [("The rate is that of A", 1), ("in so many steps, those of a", 2), ("that offers", 0)]
)
def test_phrases_are_noticed(text: str, num: int) -> None:
    assert phrases_in([text]).total() == num
