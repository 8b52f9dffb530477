"""Uploads in parts, projects with keys, permissions, and the id of the store."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from tunesmith.jobs.migrations.steps import BIG, make_table, needed

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Give all rows to the first project."""
    if not sa.inspect(op.get_bind()).has_table("uploads"):
        make_table(
            "uploads", "id", needed("status"), needed("bytes", BIG), needed("filename"), needed("purpose"),
            needed("expires_at", BIG), sa.Column("part_ids", sa.JSON), sa.Column("file", sa.String),
        )  # fmt: skip
    for table in ("files", "jobs", "models", "uploads"):
        op.add_column(table, needed("project", server_default="tunesmith"))
        op.create_index(f"ix_{table}_project", table, ["project"])
    make_table(
        "keys", "id", needed("project"), needed("label"), needed("digest"), needed("scopes", sa.JSON),
        sa.Column("expires_at", BIG), sa.Column("revoked_at", BIG), sa.Column("used_at", BIG),
    )  # fmt: skip
    make_table("permissions", "id", needed("model", index=True), needed("reader"))
    make_table("stores", "id")
