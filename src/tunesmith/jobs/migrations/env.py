"""Alembic's entry: runs the steps on the connection of the store, in its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
context.run_migrations()
