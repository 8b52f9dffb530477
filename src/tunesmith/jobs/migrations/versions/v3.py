"""Expiry of files and runs, and webhooks that are to be sent."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from tunesmith.jobs.migrations.steps import BIG, make_table, needed

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """Nothing that is there expires by itself."""
    op.add_column("files", sa.Column("expires_at", BIG))
    op.add_column("uploads", sa.Column("expires_after_s", BIG))
    op.add_column("jobs", sa.Column("run_removed_at", BIG))
    make_table(
        "webhooks", "id", needed("project"), needed("job"), needed("type"), needed("next_at", BIG, index=True),
        needed("attempts", sa.Integer), sa.Column("ended_at", BIG), sa.Column("failure", sa.String),
    )  # fmt: skip
