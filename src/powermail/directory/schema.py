"""Owns our table on PostgreSQL and on MySQL, `accounts`, in which one INSERT makes a mailbox; and its versions.

    INSERT INTO accounts (address, password) VALUES ('ann@example.org', '{argon2id}...');

The columns are those of SQLite's (`sqlite`). Flags are numbers, 0 or 1, so that the same INSERT works everywhere. Addresses are
compared octet by octet, but for the case of letters. Ids are 63 random bits, never used again, whatever backup is put back.

The table is made, and brought on, by `powermail directory init` only: no start changes a schema. Between two releases columns
are only added, so that both work beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

VERSION = 1


def _ascii_lower(text: str) -> str:
    return text.lower() if text.isascii() else re.sub("[A-Z]+", lambda found: found[0].lower(), text)


class Dialect(NamedTuple):
    """What differs. `key` and `domain` are the expressions that are indexed; `fold` makes of an address what `key` has, and
    `destination` is true of a row `b` that has the address which `a` forwards to, by that index too.
    """

    key: str
    domain: str
    destination: str
    fold: Callable[[str], str]
    begin: str
    encoding: str  # asks for the encoding in which texts are kept
    versions: tuple[tuple[str, ...], ...]  # statements that lead to version 1, 2, ...; MySQL commits each by itself
    missing: tuple[str, ...]  # what the server says of a table that is not there


_POSTGRES_KEY = "lower(address)"  # of the collation C: letters of ASCII only
_POSTGRES_DOMAIN = "lower(substr(address, strpos(address, '@') + 1))"

POSTGRES = Dialect(
    key=_POSTGRES_KEY,
    domain=_POSTGRES_DOMAIN,
    destination='lower(b.address) = lower(a.forward COLLATE "C")',
    fold=_ascii_lower,
    begin="BEGIN ISOLATION LEVEL READ COMMITTED",
    encoding="SHOW server_encoding",
    missing=("does not exist",),
    versions=(
        (
            """
CREATE TABLE accounts (
    id BIGINT NOT NULL PRIMARY KEY
        DEFAULT ((floor(random() * 2147483648)::bigint << 32) | floor(random() * 4294967296)::bigint) CHECK (id > 0),
    address TEXT COLLATE "C" NOT NULL CHECK (address LIKE '_%@_%' AND address !~ '[[:cntrl:]]'),
    password TEXT NOT NULL DEFAULT '',
    quota_octets BIGINT NOT NULL DEFAULT 0 CHECK (quota_octets >= 0),
    forward TEXT NOT NULL DEFAULT '',
    keep_copy SMALLINT NOT NULL DEFAULT 0 CHECK (keep_copy IN (0, 1)),
    enabled SMALLINT NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    send_per_hour BIGINT NOT NULL DEFAULT 0 CHECK (send_per_hour >= 0),
    send_as TEXT NOT NULL DEFAULT ''
)""",
            f"CREATE UNIQUE INDEX accounts_address ON accounts ({_POSTGRES_KEY})",
            f"CREATE INDEX accounts_domain ON accounts ({_POSTGRES_DOMAIN})",
        ),
    ),
)

# Binary keys: as text, whatever its collation, MySQL takes `a` and `a ` for the same.
_TEXT = "CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"

MYSQL = Dialect(
    key="address_key",
    domain="domain_key",
    destination="b.address_key = CAST(lower(a.forward) AS BINARY)",
    fold=str.lower,
    begin="START TRANSACTION",
    encoding="SELECT @@character_set_connection",  # the table says its own
    missing=("doesn't exist",),
    versions=(
        (
            f"""
CREATE TABLE IF NOT EXISTS accounts (
    id BIGINT NOT NULL PRIMARY KEY
        DEFAULT (CAST(CONV(LEFT(SHA2(UUID(), 256), 16), 16, 10) AS UNSIGNED) & 9223372036854775807) CHECK (id > 0),
    address VARCHAR(512) {_TEXT} NOT NULL CHECK (address LIKE '_%@_%' AND address NOT REGEXP '[[:cntrl:]]'),
    password TEXT {_TEXT} NOT NULL DEFAULT (''),
    quota_octets BIGINT NOT NULL DEFAULT 0 CHECK (quota_octets >= 0),
    forward TEXT {_TEXT} NOT NULL DEFAULT (''),
    keep_copy TINYINT NOT NULL DEFAULT 0 CHECK (keep_copy IN (0, 1)),
    enabled TINYINT NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    send_per_hour BIGINT NOT NULL DEFAULT 0 CHECK (send_per_hour >= 0),
    send_as TEXT {_TEXT} NOT NULL DEFAULT (''),
    address_key VARBINARY(2048) AS (CAST(lower(address) AS BINARY)) VIRTUAL,
    domain_key VARBINARY(2048) AS (CAST(lower(substr(address, locate('@', address) + 1)) AS BINARY)) VIRTUAL,
    UNIQUE KEY accounts_address (address_key),
    KEY accounts_domain (domain_key)
) {_TEXT} ENGINE = InnoDB""",
        ),
    ),
)

DIALECTS = {"postgresql": POSTGRES, "mysql": MYSQL}
VERSIONS_TABLE = "CREATE TABLE accounts_version (version INTEGER NOT NULL PRIMARY KEY)"
assert all(len(dialect.versions) == VERSION for dialect in DIALECTS.values())
