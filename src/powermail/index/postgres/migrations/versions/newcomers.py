"""Owns the fifth version of the tables on PostgreSQL: nodes that were admitted since the index was last known to be whole."""

from __future__ import annotations

from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    """Makes the table; what runs meanwhile remembers the same in its process."""
    op.execute('CREATE TABLE newcomers (node TEXT COLLATE "C" NOT NULL PRIMARY KEY, incarnation TEXT COLLATE "C" NOT NULL)')
