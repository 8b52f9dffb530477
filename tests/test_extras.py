"""What is missing is named with a command that installs it as the person runs tunesmith."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tunesmith.cli.doctor import EXTRAS
from tunesmith.environment.packages import install_command

ROOT = Path(__file__).parents[1]


def required() -> list[str]:
    """What the metadata of a package built from this checkout would require; that of an older one may be installed."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    lines = [line.partition(" = ") for line in extras.splitlines() if line]
    return [f"{package}; extra == '{extra}'" for extra, _, packages in lines for package in json.loads(packages)]


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("serve", {"fastapi", "uvicorn", "h11", "prometheus-client"}),
        ("llama-cpp", {"llama-cpp-python"}),
        ("json", {"llguidance"}),
    ],
)
def test_the_command_names_the_packages_and_this_python(
    extra: str, packages: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.environment.packages.requires", lambda name: required())
    python, *words = shlex.split(install_command(extra))
    assert python == sys.executable
    assert words[:3] == ["-m", "pip", "install"]
    assert {re.split("[<>=]", word)[0] for word in words[3:]} == packages


def test_doctor_lists_every_extra_for_users() -> None:
    assert set(EXTRAS) == {text.rpartition("== ")[2].strip("'") for text in required()} - {"test", "dev", "docs"}


def test_without_an_installed_tunesmith_the_command_is_that_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.environment.packages.requires", lambda name: None)
    assert install_command("serve") == f"{shlex.quote(sys.executable)} -m pip install '.[serve]'"


def test_nothing_says_to_install_tunesmith_by_its_name() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]
    assert [str(page) for page in pages if re.search(r"install\W+tunesmith\b", page.read_text("utf-8"))] == []
