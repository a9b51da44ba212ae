"""Owns what alembic runs: the steps, over the connection it is handed, in one transaction."""

from __future__ import annotations

from alembic import context

from powermail.index.postgres.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
