"""The version of a store's tables, and its upgrade. Each file in `versions` is one step, in Alembic's form."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

_FOLDER = Path(__file__).parent
FIRST = "1"
"""Version of the stores that were made before there were others."""


def newest() -> str:
    """The version that this program reads and writes."""
    return ScriptDirectory(str(_FOLDER)).get_current_head() or FIRST


def known() -> set[str]:
    """All versions up to the newest."""
    return {step.revision for step in ScriptDirectory(str(_FOLDER)).walk_revisions()}


def version_of(connection: sa.Connection) -> str | None:
    """The version of the tables of a database; None: it has none of ours.

    Raises LookupError if there are tables of something else in their place.
    """
    version = MigrationContext.configure(connection).get_current_revision()
    if version is None and "files" in sa.inspect(connection).get_table_names():
        if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA user_version").scalar() == 1:
            return FIRST
        raise LookupError("tables of another program")
    return version


def upgrade(connection: sa.Connection) -> None:
    """Make the tables, or bring them to the newest version, inside the transaction of the connection."""
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    is_first = version_of(connection) == FIRST and MigrationContext.configure(connection).get_current_revision() is None
    if is_first:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")
    if connection.dialect.name == "sqlite":  # programs before the second version look here
        connection.exec_driver_sql(f"PRAGMA user_version = {int(newest())}")
