"""Owns the fourth version of the tables on PostgreSQL: who may join the cluster, who has a certificate, who was expelled."""

from __future__ import annotations

from alembic import op

revision = "4"
down_revision = "3"

_TEXT = 'TEXT COLLATE "C" NOT NULL'
_OCTETS = "BYTEA NOT NULL"
_TIME = "DOUBLE PRECISION"
_TABLES = (
    f"CREATE TABLE tokens (id {_TEXT} PRIMARY KEY, secret {_OCTETS}, identity {_TEXT}, roles {_TEXT}, site {_TEXT},"
    f" priority BIGINT NOT NULL, address {_TEXT}, expires_at {_TIME} NOT NULL, used_at {_TIME}, request {_OCTETS},"
    f" answer {_OCTETS}, failures BIGINT NOT NULL)",
    f"CREATE TABLE identities (id {_TEXT} PRIMARY KEY, roles {_TEXT}, ends_at {_TIME} NOT NULL, expelled_at {_TIME} NOT NULL)",
)


def upgrade() -> None:
    """Makes the tables; what runs meanwhile does not know them."""
    for statement in _TABLES:
        op.execute(statement)
