"""Words that the steps share."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def make_table(name: str, key: str, *columns: sa.Column[Any]) -> None:
    """A table whose rows have a number, a time and a unique `key`."""
    op.create_table(
        name,
        sa.Column("seq", BIG, primary_key=True),
        sa.Column("created_at", BIG, nullable=False),
        needed(key, unique=True),
        *columns,
        sqlite_autoincrement=True,
    )


def needed(name: str, kind: Any = sa.String, **more: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, **more)
