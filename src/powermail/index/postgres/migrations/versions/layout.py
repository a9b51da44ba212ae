"""Owns the third version of the tables on PostgreSQL: which nodes the cluster has, and the moves of copies under way."""

from __future__ import annotations

from alembic import op

revision = "3"
down_revision = "2"

_TEXT = 'TEXT COLLATE "C" NOT NULL'
_TABLES = (
    f"CREATE TABLE layout (id {_TEXT} PRIMARY KEY, failure_group {_TEXT}, address {_TEXT}, site {_TEXT},"
    f" priority BIGINT NOT NULL, state {_TEXT}, told {_TEXT})",
    f"CREATE TABLE moves (name {_TEXT} PRIMARY KEY, phase {_TEXT}, total BIGINT NOT NULL, done BIGINT NOT NULL,"
    f" began_at DOUBLE PRECISION NOT NULL, after BYTEA NOT NULL, note {_TEXT})",
)


def upgrade() -> None:
    """Makes the tables; what runs meanwhile does not know them."""
    for statement in _TABLES:
        op.execute(statement)
