"""Owns the second version of the tables on PostgreSQL: who does which background job, and until when."""

from __future__ import annotations

from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Makes the table; what runs meanwhile does not know it."""
    op.execute(
        'CREATE TABLE leases (job TEXT COLLATE "C" NOT NULL PRIMARY KEY, owner TEXT COLLATE "C" NOT NULL,'
        " until DOUBLE PRECISION NOT NULL)"
    )
