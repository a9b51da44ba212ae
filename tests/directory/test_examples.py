"""The statements for schemas of others, taken from docs/directory.md, on real servers with tables of these columns."""

from __future__ import annotations

import sqlite3
import tomllib
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from powermail.base.clock import SystemClock
from powermail.base.counters import Counters
from powermail.base.errors import OperatorError
from powermail.base.settings import load
from powermail.base.world import World
from powermail.directory import password as pw
from powermail.directory.contract import Account
from powermail.directory.database import parse
from powermail.directory.file import SqliteFile
from powermail.directory.foreign import ForeignDirectory, Texts
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.directory.server import Server
from powermail.mail.address import parse as parse_address
from tests.servers import Database

# `secret`, by `openssl passwd -1`, `openssl passwd -6` and crypt(3)
MD5 = "$1$abcdefgh$cHJi5PXp/ki/ktXzqlk6I1"
SHA512 = "$6$abcdefgh$ltjgWl6579NluT/Vi1nwEvcil.G5Nbc4NiXZaNGStk8PSwGfQv72N2CKPPrVACtLtip/cZ/1GM/O6IND4WQhG."
BCRYPT = "$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"
LAST_KNOWN = {"5": "was@example.org", "6": "bob@example.org", "8": "gone@example.org"}


def example(name: str) -> dict[str, Any]:
    """The settings of `[directory]` below a heading of the document."""
    text = Path("docs/directory.md").read_text(encoding="utf-8")
    block = text.split(f"```toml\n# {name}\n", 1)[1].split("```", 1)[0]
    load(block, {})  # they are settings that a server takes
    found: dict[str, Any] = tomllib.loads(block)["directory"]
    return found


def foreign(world: World, name: str, database: Database | None, path: Path) -> ForeignDirectory:
    """The directory of an example, not opened yet."""
    found = example(name)
    texts = Texts(found["find"], found["serves"], found.get("identify", ""), found.get("listing", ""))

    async def last_known(ids: Sequence[str]) -> dict[str, str]:
        return {id: LAST_KNOWN[id] for id in ids if id in LAST_KNOWN}

    if database is None:
        return ForeignDirectory(world, SqliteFile(world, str(path)), texts, last_known)
    kind = database.server.kind
    return ForeignDirectory(world, Server(world, kind, parse(kind, database.url), 2, read_only=True), texts, last_known)


def run(database: Database | None, path: Path, statements: Sequence[str]) -> None:
    if database is not None:
        database.sql(*statements)
        return
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


FLAG = {"postgresql": "BOOLEAN NOT NULL DEFAULT", "mysql": "TINYINT(1) NOT NULL DEFAULT", "sqlite": "INTEGER NOT NULL DEFAULT"}
TIME = {"postgresql": "TIMESTAMP WITH TIME ZONE", "mysql": "DATETIME", "sqlite": "DATETIME"}


def postfixadmin(kind: str) -> list[str]:
    """Tables and rows."""
    flag, time = FLAG[kind], TIME[kind]
    rest = f"active {flag} TRUE, created {time} NOT NULL DEFAULT '2024-01-02 03:04:05', modified {time}"
    end = " CHARACTER SET latin1" if kind == "mysql" else ""
    mailbox = "INSERT INTO mailbox (username, password, quota, domain, active) VALUES"
    alias = "INSERT INTO alias (address, goto, domain, active) VALUES"
    return [
        "CREATE TABLE domain (domain VARCHAR(255) NOT NULL PRIMARY KEY, description VARCHAR(255) NOT NULL DEFAULT '',"
        f" maxquota BIGINT NOT NULL DEFAULT 0, backupmx {flag} FALSE, {rest}){end}",
        "CREATE TABLE mailbox (username VARCHAR(255) NOT NULL PRIMARY KEY, password VARCHAR(255) NOT NULL,"
        f" name VARCHAR(255) NOT NULL DEFAULT '', quota BIGINT NOT NULL DEFAULT 0, domain VARCHAR(255) NOT NULL, {rest}){end}",
        "CREATE TABLE alias (address VARCHAR(255) NOT NULL PRIMARY KEY, goto TEXT NOT NULL, domain VARCHAR(255) NOT NULL,"
        f" {rest}){end}",
        "CREATE TABLE alias_domain (alias_domain VARCHAR(255) NOT NULL PRIMARY KEY, target_domain VARCHAR(255) NOT NULL,"
        f" {rest}){end}",
        "INSERT INTO domain (domain, active) VALUES ('example.org', TRUE), ('alias.example', TRUE), ('old.example', TRUE),"
        " ('off.example', FALSE)",
        f"{mailbox} ('ann@example.org', '{MD5}', 5242880, 'example.org', TRUE),"
        f" ('bob@example.org', '{SHA512}', 0, 'example.org', TRUE),"
        f" ('cat@example.org', '{BCRYPT}', -1, 'example.org', TRUE), ('out@example.org', '{MD5}', 0, 'example.org', FALSE),"
        f" ('x@off.example', '{MD5}', 0, 'off.example', TRUE)",
        f"{alias} ('ann@example.org', 'ann@example.org', 'example.org', TRUE),"
        " ('bob@example.org', 'bob@example.org,copy@else.example', 'example.org', TRUE),"
        " ('cat@example.org', 'away@else.example', 'example.org', TRUE),"
        " ('sales@example.org', 'ann@example.org,bob@example.org,x@else.example', 'example.org', TRUE),"
        " ('idle@example.org', 'ann@example.org', 'example.org', FALSE),"
        " ('@example.org', 'ann@example.org', 'example.org', TRUE)",
        "INSERT INTO alias_domain (alias_domain, target_domain, active) VALUES ('alias.example', 'example.org', TRUE),"
        " ('old.example', 'example.org', FALSE)",
    ]


async def resolver_of(world: World, directory: ForeignDirectory) -> Resolver:
    return Resolver(DirectoryCache(directory, SystemClock(), Counters(), 30.0, 60.0), "+")


async def leads(resolver: Resolver, address: str) -> tuple[list[str], list[str]]:
    """Whose mailboxes mail for an address ends in, and where else it goes."""
    found = await resolver.resolve(parse_address(address))
    return [account.address for account in found.hosted], sorted(to for to, _ in found.remote)


@pytest.fixture
async def postfixadmin_directory(database: Database | None, world: World, tmp_path: Path) -> AsyncIterator[ForeignDirectory]:
    kind = database.server.kind if database else "sqlite"
    run(database, tmp_path / "postfix.db", postfixadmin(kind))
    made = foreign(world, "PostfixAdmin", database, tmp_path / "postfix.db")
    await made.open()
    yield made
    await made.close()


async def test_postfixadmin(postfixadmin_directory: ForeignDirectory, world: World) -> None:
    directory = postfixadmin_directory
    resolver = await resolver_of(world, directory)
    assert await leads(resolver, "ann@example.org") == (["ann@example.org"], [])
    assert await leads(resolver, "Ann+tag@Example.ORG") == (["ann@example.org"], [])
    assert await leads(resolver, "bob@example.org") == (["bob@example.org"], ["copy@else.example"])
    assert await leads(resolver, "cat@example.org") == ([], ["away@else.example"]), (
        "a mailbox that is not among its own aliases"
    )
    assert await leads(resolver, "sales@example.org") == (
        ["ann@example.org", "bob@example.org"],
        ["copy@else.example", "x@else.example"],
    )
    assert await leads(resolver, "ann@alias.example") == (["ann@example.org"], [])
    assert await leads(resolver, "sales@alias.example") == await leads(resolver, "sales@example.org")
    assert await leads(resolver, "nobody@example.org") == (["ann@example.org"], []), "the catch-all"
    assert await leads(resolver, "nobody@alias.example") == (["ann@example.org"], []), "that of the domain it stands for"
    for nobody in ("out@example.org", "idle@example.org", "x@off.example", "ann@old.example", "ann@else.example"):
        assert await leads(resolver, nobody) == ([], []), nobody
    for domain, served in {"example.org": True, "alias.example": True, "off.example": False, "else.example": False}.items():
        assert await directory.serves(domain) is served, domain
    ann = await resolver.login("ann@example.org")
    assert ann is not None and ann.quota_octets == 5242880 and ann.id.startswith("ann@example.org 2024-01-02 03:04:05")
    assert ann == await resolver.login("ann@alias.example"), "one mailbox, one id"
    for name, stored in {"ann": MD5, "bob": SHA512, "cat": BCRYPT}.items():
        account = await directory.find(f"{name}@example.org")
        assert account is not None and account.password == stored
        assert pw.judge(account.password, "secret") is None and pw.judge(account.password, "Secret") is not None
    listed = await directory.all("", 2)
    assert [account.address for account in listed] == ["ann@example.org", "bob@example.org"]
    assert await directory.doubts() == (5, [])


async def test_who_is_created_again_in_postfixadmin_never_sees_the_old_mail(
    postfixadmin_directory: ForeignDirectory, database: Database | None, tmp_path: Path
) -> None:
    before = await postfixadmin_directory.find("ann@example.org")
    run(
        database,
        tmp_path / "postfix.db",
        ["UPDATE mailbox SET created = '2025-01-02 03:04:05' WHERE username = 'ann@example.org'"],
    )
    after = await postfixadmin_directory.find("ann@example.org")
    assert before is not None and after is not None and before.id != after.id


ISPCONFIG = [
    "CREATE TABLE mail_domain (domain_id INT PRIMARY KEY AUTO_INCREMENT, server_id INT NOT NULL DEFAULT 1,"
    " domain VARCHAR(255) NOT NULL, active ENUM('n','y') NOT NULL) CHARACTER SET utf8",
    "CREATE TABLE mail_user (mailuser_id INT PRIMARY KEY, server_id INT NOT NULL DEFAULT 1, email VARCHAR(255) NOT NULL, login"
    " VARCHAR(255) NOT NULL DEFAULT '', password VARCHAR(255) NOT NULL, quota BIGINT NOT NULL DEFAULT 0, cc TEXT, postfix"
    " ENUM('n','y') NOT NULL DEFAULT 'y', KEY (email)) CHARACTER SET utf8",
    "CREATE TABLE mail_forwarding (forwarding_id INT PRIMARY KEY AUTO_INCREMENT, source VARCHAR(255) NOT NULL,"
    " destination TEXT, type ENUM('alias','aliasdomain','forward','catchall') NOT NULL, active ENUM('n','y') NOT NULL"
    " DEFAULT 'y', KEY (source)) CHARACTER SET utf8",
    "INSERT INTO mail_domain (domain, active) VALUES ('example.org', 'y'), ('alias.example', 'y'), ('off.example', 'n')",
    "INSERT INTO mail_user (mailuser_id, email, password, quota, cc, postfix) VALUES"
    f" (5, 'ann@example.org', '{SHA512}', 1048576, '', 'y'), (6, 'bob@example.org', '{MD5}', 0, 'copy@else.example', 'y'),"
    f" (7, 'out@example.org', '{MD5}', -1, NULL, 'n'), (9, 'x@off.example', '{MD5}', 0, NULL, 'y')",
    "INSERT INTO mail_forwarding (source, destination, type, active) VALUES"
    " ('info@example.org', 'ann@example.org', 'alias', 'y'),"
    " ('team@example.org', 'ann@example.org,bob@example.org\nx@else.example', 'forward', 'y'),"
    " ('idle@example.org', 'ann@example.org', 'alias', 'n'), ('@example.org', 'bob@example.org', 'catchall', 'y'),"
    " ('@alias.example', '@example.org', 'aliasdomain', 'y')",
]


async def test_ispconfig(mysql: Database, world: World, tmp_path: Path) -> None:
    mysql.sql(*ISPCONFIG)
    directory = foreign(world, "ISPConfig", mysql, tmp_path)
    try:
        await directory.open()
        resolver = await resolver_of(world, directory)
        assert await leads(resolver, "ann@example.org") == (["ann@example.org"], [])
        assert await leads(resolver, "bob@example.org") == (["bob@example.org"], ["copy@else.example"]), "cc keeps the mail too"
        assert await leads(resolver, "info@example.org") == (["ann@example.org"], [])
        assert await leads(resolver, "team@example.org") == (
            ["ann@example.org", "bob@example.org"],
            ["copy@else.example", "x@else.example"],
        )
        assert await leads(resolver, "ann@alias.example") == (["ann@example.org"], [])
        assert await leads(resolver, "info@alias.example") == (["ann@example.org"], [])
        assert await leads(resolver, "nobody@example.org") == (["bob@example.org"], ["copy@else.example"])
        assert await leads(resolver, "nobody@alias.example") == (["bob@example.org"], ["copy@else.example"])
        for nobody in ("out@example.org", "x@off.example", "ann@else.example"):
            assert await leads(resolver, nobody) == ([], []), nobody
        assert await directory.serves("alias.example") and not await directory.serves("off.example")
        ann = await resolver.login("ann@example.org")
        assert ann == Account("5", "ann@example.org", SHA512, 1048576)
        assert pw.judge(ann.password, "secret") is None
        assert await directory.ids(["5", "6", "8", "9"]) == {
            "5": "ann@example.org",  # it was renamed
            "6": "bob@example.org",
            "9": "x@off.example",  # never seen before
        }
        assert [account.address for account in await directory.all("bob@example.org", 9)] == [
            "out@example.org",
            "x@off.example",
        ]
        with pytest.raises(OperatorError, match="kept elsewhere"):
            await directory.add([Account("", "new@example.org")])
    finally:
        await directory.close()
