"""Files, jobs, events and models."""

from __future__ import annotations

import sqlalchemy as sa

from tunesmith.jobs.migrations.steps import BIG, make_table, needed

revision = "1"
down_revision = None


def upgrade() -> None:
    """The tables of the first version."""
    make_table(
        "files", "id", needed("purpose"), needed("filename"), needed("bytes", BIG), needed("sha256"),
        sa.Column("deleted_at", BIG),
    )  # fmt: skip
    make_table(
        "jobs", "id", needed("status", index=True), sa.Column("finished_at", BIG), needed("base"), needed("model"),
        needed("tuned_name"), needed("request", sa.JSON), needed("numbers", sa.JSON),
        needed("is_checked", sa.Boolean), sa.Column("trained_tokens", BIG), sa.Column("result_file", sa.String),
        sa.Column("error", sa.JSON), needed("attempts", sa.Integer), needed("last_checkpoint", sa.Integer),
    )  # fmt: skip
    make_table(
        "events", "id", needed("job", index=True), needed("level"), needed("message"), needed("type"),
        sa.Column("data", sa.JSON),
    )  # fmt: skip
    make_table(
        "models", "name", needed("job", index=True), needed("base"), needed("step", sa.Integer),
        needed("metrics", sa.JSON), sa.Column("deleted_at", BIG),
    )  # fmt: skip
