"""`tunesmith explain`: every error names a part of the page, and the page is there without a network."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shape.tree import ROOT
from tunesmith import errors
from tunesmith.cli.app import app
from tunesmith.cli.errors import as_values, explained
from tunesmith.cli.explain import parts

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TunesmithError)]


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["explain", *words])
    return done.exit_code, done.output


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_topic_of_an_error_is_a_part_of_the_page(kind: type[errors.TunesmithError]) -> None:
    assert kind.topic in {"", *parts()}
    assert kind.topic or kind in {errors.TunesmithError, errors.InputError, errors.Stopped}


def test_words_are_the_anchors_of_the_page() -> None:
    text = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text("utf-8")
    assert list(parts()) == re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"[a-z-]+", word) for word in parts())


def test_an_error_ends_with_the_command_that_explains_it() -> None:
    error = errors.NonFiniteError("step 3: loss nan")
    assert explained(error)[-1] == "More: tunesmith explain loss-is-nan"
    assert as_values(error)["topic"] == "loss-is-nan"


def test_a_part_is_printed_and_without_a_word_all_are_listed() -> None:
    code, text = run("loss-is-nan")
    assert code == 0
    assert "Divide `--lr` by 3 to 10" in text
    code, text = run()
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == list(parts())


def test_an_unknown_word_gets_the_nearest_one() -> None:
    code, text = run("out-of-memry")
    assert code == 2
    assert "out-of-memry: no such word. Did you mean out-of-memory?" in text


def test_a_wheel_holds_the_page() -> None:
    packed = '"docs/guide/troubleshooting.md" = "tunesmith/troubleshooting.md"'
    assert packed in Path(ROOT / "pyproject.toml").read_text()


def test_every_word_that_is_named_anywhere_is_a_part_of_the_page() -> None:
    """By code, help or docs: also the words of notes."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    text = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text("utf-8")) for path in files)
    named = set(re.findall(r"tunesmith explain ([a-z][a-z-]+)", text))
    assert named <= set(parts())
    assert named >= {"it-forgets", "one-class", "it-copies-rows", "answers-never-end", "loss-does-not-fall"}
