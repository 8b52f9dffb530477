"""Traps in docs/inside/correctness.md and the markers in the tests agree, and the files of each plant bugs."""

import re

from shape.tree import ROOT

REQUIRED = {
    *(f"L{n}" for n in range(1, 18) if n != 13),  # no method adds a term to the loss
    "L3b",
    *(f"D{n}" for n in range(1, 20)),  # several devices
    *(f"T{n}" for n in range(1, 23)),
    *(f"R{n}" for n in (*range(1, 9), *range(19, 24), 38)),
    *("A1", "A2", "A3", "A4", "A6", "A7", "A8", "A9", "A15", "A18", "A19", "A20"),  # adapters
    *(f"A{n}" for n in range(21, 27)),  # experts
    *("A13", "A14"),  # GGUF
    *("A5", "A10", "A11", "A12"),  # heads, padding and classes
    *(f"S{n}" for n in (*range(1, 9), *range(10, 14), *range(20, 31))),
    *(f"M{n}" for n in range(1, 10)),  # what a measure proves
    *(f"P{n}" for n in range(1, 30)),  # preferences, rewards, vectors
    *(f"G{n}" for n in range(1, 36)),  # answers that are drawn and graded
    *(f"I{n}" for n in (*range(1, 17), *range(21, 25))),  # images
}
MARKER = re.compile(r"# trap: ([^#\n]*)$", re.MULTILINE)
PLANTED = re.compile(r"raises\(\(?AssertionError|raises\(pytest\.fail\.Exception")


def marked() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for ids in MARKER.findall(path.read_text("utf-8")):
            for trap in re.findall(r"\b[LTRASMDPGI]\d+b?\b", ids):
                found.setdefault(trap, set()).add(path.relative_to(ROOT).as_posix())
    return found


def table() -> list[tuple[str, str]]:
    """(id, test files) of each row, in order."""
    page = (ROOT / "docs/inside/correctness.md").read_text("utf-8")
    return re.findall(r"^\| ([LTRASMDPGI]\d+b?) \|.*\| ([^|]+) \|$", page, re.MULTILINE)


def documented() -> dict[str, set[str]]:
    return {trap: set(files.split(", ")) for trap, files in table()}


def test_each_trap_has_an_id_to_itself() -> None:
    ids = [trap for trap, _ in table()]
    assert sorted(set(ids)) == sorted(ids)


def test_table_and_markers_agree() -> None:
    assert documented() == marked()


def test_every_trap_that_exists_here_is_held() -> None:
    assert set(marked()) >= REQUIRED


def test_the_files_of_every_trap_plant_a_bug() -> None:
    for trap, files in marked().items():
        texts = [(ROOT / file).read_text("utf-8") for file in files]
        assert any(PLANTED.search(text) for text in texts), f"{trap}: no test in {sorted(files)} is seen to fail"
