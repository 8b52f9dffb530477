"""Nothing is half added: tables, docs and tests name the same things, and links lead somewhere."""

import re
from pathlib import Path

import pytest

from shape.tree import ROOT, name_of, tracked_files

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
PAGES = [path for path in tracked_files() if path.suffix == ".md"]


def slug(title: str) -> str:
    """The anchor that a heading gets on the usual code hosts."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    missing = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            missing.append(target)
        elif anchor and path.suffix == ".md":
            headings = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
            anchors = {slug(line.lstrip("#").strip()) for line in headings}
            if anchor not in anchors:
                missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_brackets_that_the_site_would_read_as_a_reference_are_code(page: Path) -> None:
    """`[x, y] [W, B]` is a link to a page named `W, B` where the site is built, and ends the strict build."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))
    assert re.findall(r"\] ?\[[^\]\n]*\]", text) == []


READ_BY_USERS = [
    path for path in PAGES if path.name == "README.md" or path.parent.name in ("guide", "tutorials", "reference")
]
PROVENANCE = re.compile(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{7,40}\b|EPYC|Xeon|busy with other work")


@pytest.mark.parametrize("page", [path for path in READ_BY_USERS if "docs" in path.parts], ids=name_of)
def test_pages_of_users_leave_commits_and_processors_to_performance(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    assert [match[0] for match in PROVENANCE.finditer(text)] == []


def tables() -> list[tuple[str, str, str]]:
    """(table, row, docs page that has to have a heading or a table row for it)."""
    from tunesmith.data.formats import FORMATS
    from tunesmith.methods import METHODS
    from tunesmith.optim import OPTIMIZERS, SCHEDULES
    from tunesmith.tasks import TASKS

    names = {"METHODS": METHODS, "TASKS": TASKS, "FORMATS": FORMATS, "SCHEDULES": SCHEDULES, "OPTIMIZERS": OPTIMIZERS}
    return [(table, str(getattr(row, "NAME", row)), table.lower()) for table, rows in names.items() for row in rows]


@pytest.fixture(scope="module")
def docs() -> str:
    return "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))


@pytest.fixture(scope="module")
def tests() -> str:
    own = Path(__file__).parent
    return "\n".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("*.py") if own not in p.parents)


def test_every_row_of_a_table_is_documented_and_tested(docs: str, tests: str) -> None:
    rows = tables()
    assert (
        len(rows) >= 9
    )  # 2 methods, 2 tasks, 4 shapes and 3 schedules exist today: an empty table would pass by itself
    headings = "\n".join(re.findall(r"^#+ .*", docs, re.MULTILINE))
    first_cells = "\n".join(re.findall(r"^\|[^|\n]*", docs, re.MULTILINE))
    for table, row, _ in rows:
        headed = re.search(rf"\b{re.escape(row)}\b", headings, re.IGNORECASE)
        listed = f"`{row}`" in first_cells
        assert headed or listed, f"{table}: {row} has no section and no table row in docs/"
        assert f'"{row}"' in tests, f"{table}: no test names {row}"


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs/README.md"])
def test_page_exists(page: str) -> None:
    assert (ROOT / page).read_text("utf-8").strip()


def test_the_api_page_has_every_public_name() -> None:
    import tunesmith

    page = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: tunesmith\.(\w+)$", page, re.MULTILINE)) == sorted(tunesmith.__all__)


def test_docs_map_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page != "README.md" and f"({page})" not in index] == []
