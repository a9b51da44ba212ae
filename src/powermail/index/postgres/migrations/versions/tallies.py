"""Owns the sixth version of the tables on PostgreSQL: what several processes count together."""

from __future__ import annotations

from alembic import op

revision = "6"
down_revision = "5"


def upgrade() -> None:
    """Makes the table; what runs meanwhile counts in its process alone."""
    op.execute(
        'CREATE TABLE tallies (kind TEXT COLLATE "C" NOT NULL, name TEXT COLLATE "C" NOT NULL, period BIGINT NOT NULL,'
        " count BIGINT NOT NULL, PRIMARY KEY (kind, name)) WITH (fillfactor = 60)"
    )
