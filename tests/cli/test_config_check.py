"""`powermail config check`: what is wrong is said with its cure, and nothing is changed."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from powermail.base.findings import of_postgres
from powermail.base.tls import make_self_signed
from powermail.directory.checking import of_mysql
from tests.cli.support import powermail
from tests.servers import Database, Postgres, standby_of

ONE_DISK = "lie on one disk"  # which is so wherever these tests run


def found(data: str, *words: str) -> list[dict[str, str]]:
    """The findings, but for the one that holds for every test."""
    done = powermail("config", "check", "--data", data, "--json", *words)
    findings: list[dict[str, str]] = done.json()["findings"]
    assert done.status == int(bool(findings))
    assert all(one["about"] and one["what"] and one["cure"] for one in findings)
    return [one for one in findings if ONE_DISK not in one["what"]]


def said(data: str, *words: str) -> str:
    """The findings as lines."""
    return "\n".join(f"{one['about']}: {one['what']}" for one in found(data, *words))


def everything(data: str) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    paths = [path for path in Path(data).rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def test_a_new_installation_has_nothing_wrong_but_its_one_disk(looked_at: str) -> None:
    before = everything(looked_at)
    assert found(looked_at) == []
    assert everything(looked_at) == before
    done = powermail("config", "check", "--data", looked_at)
    assert done.status == 1 and "put each on a disk of its own" in done.out, "for people each finding has its cure below it"
    assert powermail("config", "--data", looked_at).json()["hostname"] == "localhost", "config alone prints them, as before"


def test_settings_that_cannot_be_read_are_the_finding(data: str) -> None:
    Path(f"{data}/powermail.toml").write_text("[smtp]\nlisten = 3\n")
    (one,) = found(data)
    assert "smtp.listen" in one["what"]


def test_files_that_others_may_read_and_files_that_are_missing(data: str) -> None:
    os.chmod(data, 0o755)
    os.chmod(f"{data}/tls/key.pem", 0o604)
    os.unlink(f"{data}/directory.db")
    text = said(data, "--set", "outbound.smarthost_ca=away.pem")
    assert "others may look into" in text and "key.pem: it holds a secret" in text
    assert "directory.db is missing" in text and "away.pem cannot be read" in text


def test_certificates(data: str, tmp_path: Path) -> None:
    assert "this host is mail.example.org" in said(data, "--set", "hostname=mail.example.org")
    Path(f"{data}/tls/certificate.pem").write_text("no certificate")
    assert "tls: " in said(data) and "cannot be used" in said(data)


@pytest.mark.parametrize(("days", "what"), [(-2, "ended 2 days ago"), (5, "ends in")])
def test_a_certificate_near_its_end(data: str, days: int, what: str) -> None:
    certificate, key = make_self_signed("localhost", datetime.now(UTC) - timedelta(days=3650 - days))
    Path(f"{data}/tls/certificate.pem").write_bytes(certificate)
    Path(f"{data}/tls/key.pem").write_bytes(key)
    assert what in said(data)


def test_ports_that_are_taken_or_given_twice(looked_at: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = said(looked_at, "--set", f'smtp.lmtp=["127.0.0.1:{port}"]', "--set", 'pop.listen=["127.0.0.1:2525"]')
    assert f"127.0.0.1:{port} cannot be listened on: something else has it" in text
    assert "127.0.0.1:2525 is the address of" in text


def test_nodes_and_groups(data: str) -> None:
    os.rename(f"{data}/nodes/a/identity", f"{data}/nodes/a/elsewhere")
    identity = Path(f"{data}/nodes/b/identity")
    identity.write_text(identity.read_text().replace('"b"', '"x"'))
    text = said(data, "--set", "cluster.reserve_octets=1000000000000000", "--set", "cluster.copies_required=3")
    assert "node a: there is no identity" in text and "is the store of node x" in text
    assert "MiB are free" in text and "no mail is taken while one is away" in text


def test_names(looked_at: str) -> None:
    words = ("--set", 'smtp.listen=["0.0.0.0:2525"]')
    assert "hostname is 'localhost'" in said(looked_at, *words)
    assert "do not know mail.powermail.invalid" in said(looked_at, *words, "--set", "hostname=mail.powermail.invalid")
    assert "relay.powermail.invalid" in said(looked_at, "--set", "outbound.smarthost=relay.powermail.invalid:25")


def test_an_index_that_is_missing_damaged_or_of_another_cluster(data: str) -> None:
    path = Path(f"{data}/index.db")
    whole = path.read_bytes()
    path.write_bytes(b"no database at all" * 100)
    assert "index.db is damaged" in said(data)
    path.unlink()
    assert "index.db is missing" in said(data)
    path.write_bytes(whole)
    assert said(data) == ""


# -- PostgreSQL ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_database(data: str, postgresql: Database) -> str:
    """An installation whose index is in a database."""
    with open(f"{data}/powermail.toml", "a", encoding="utf-8") as settings:
        settings.write(f'\n[index]\ndatabase = "{postgresql.url}"\n')
    return data


def test_a_database_of_the_index(in_database: str, postgresql: Database) -> None:
    text = said(in_database)
    assert "it has no tables of the index" in text and "fsync is off" in text, "as the server of the tests runs"
    assert powermail("index", "migrate", "--data", in_database).status == 0
    (one,) = found(in_database)
    assert one["what"].startswith("fsync is off")
    postgresql.sql(f"ALTER DATABASE {postgresql.name} SET synchronous_commit = off")
    assert "synchronous_commit is off: what was answered is lost" in said(in_database)
    postgresql.sql(f"ALTER DATABASE {postgresql.name} SET default_transaction_read_only = on")
    assert "transactions are read-only by default" in said(in_database)
    name = postgresql.name
    wrong = [f"UPDATE meta SET value = '9' WHERE name = '{each}'" for each in ("cluster", "timeline")]
    postgresql.sql("SET default_transaction_read_only = off", f"ALTER DATABASE {name} RESET ALL", *wrong)
    text = said(in_database)
    assert "its index belongs to cluster 9" in text and "was restored or promoted" in text
    postgresql.sql("UPDATE index_version SET version_num = '0'")
    assert "its tables are of version 0" in said(in_database)


def test_rights_that_the_user_lacks(in_database: str, postgresql: Database, postgresql_server: Postgres) -> None:
    assert powermail("index", "migrate", "--data", in_database).status == 0
    postgresql.sql("CREATE ROLE reader LOGIN", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    try:
        url = postgresql.url.replace("powermail@", "reader@")
        text = said(in_database, "--set", f"index.database={url}")
        assert "the user lacks DELETE on" in text
    finally:
        postgresql.sql("DROP OWNED BY reader", "DROP ROLE reader")


def test_hosts_that_do_not_answer_do_not_take_writes_or_are_no_copies(in_database: str, postgresql_server: Postgres,
                                                                      postgresql: Database) -> None:  # fmt: skip
    assert powermail("index", "migrate", "--data", in_database).status == 0
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        closed = silent.getsockname()[1]
    standby = standby_of(postgresql_server)
    try:
        first, second = f"127.0.0.1:{postgresql_server.port}", f"127.0.0.1:{standby.port}"

        def with_hosts(*hosts: str) -> str:
            return said(in_database, "--set", f"index.database=postgresql://powermail@{','.join(hosts)}/{postgresql.name}")

        text = with_hosts(first, second, f"127.0.0.1:{closed}")
        assert f"127.0.0.1:{closed}: it does not answer" in text
        assert "1 standbys follow asynchronously" in text, "promoting it would lose commits"
        assert "no host takes writes" not in text and "not copies" not in text
        assert "no host takes writes" in with_hosts(second)
        standby.promote()
        assert "are not copies of one database" in with_hosts(first, second)
    finally:
        standby.remove()


GOOD = {"server_version_num": "150004", "server_encoding": "UTF8", "fsync": "on", "full_page_writes": "on",
        "synchronous_commit": "on", "synchronous_standby_names": "", "default_transaction_read_only": "off"}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "standbys", "what"),
    [
        ({"server_version_num": "140011"}, {}, "PostgreSQL 14 is older"),
        ({"server_encoding": "LATIN1"}, {}, "as LATIN1"),
        ({"full_page_writes": "off"}, {}, "full_page_writes is off"),
        ({"transaction_timeout": "1000"}, {}, "transaction_timeout is 1000 ms"),
        ({}, {"async": 2}, "2 standbys follow asynchronously"),
        ({}, {"": 1}, "1 standbys follow asynchronously"),
        ({"synchronous_standby_names": "one", "synchronous_commit": "local"}, {"sync": 1}, "synchronous_commit is local"),
        ({"synchronous_standby_names": "one"}, {"async": 1}, "none of 1 standbys is synchronous"),
    ],
)  # fmt: skip
def test_settings_of_a_server(settings: dict[str, str], standbys: dict[str, int], what: str) -> None:
    (one,) = of_postgres("db", {**GOOD, **settings}, standbys, 15)
    assert what in one.what and one.cure


@pytest.mark.parametrize(
    ("settings", "standbys"),
    [
        ({}, {}),
        ({"transaction_timeout": "0"}, {}),
        ({"synchronous_standby_names": "one"}, {"sync": 1, "async": 3}),
        ({"synchronous_standby_names": "ANY 1 (one)"}, {"quorum": 2}),
        ({"synchronous_standby_names": "one"}, {"": 1}),  # without the right to see more than that there is one
    ],
)
def test_a_server_as_it_should_be(settings: dict[str, str], standbys: dict[str, int]) -> None:
    assert of_postgres("db", {**GOOD, **settings}, standbys, 15) == []


# -- the directory ---------------------------------------------------------------------------------------------------------


def of_directory(data: str, kind: str, url: str) -> str:
    return said(data, "--set", f"directory.backend={kind}", "--set", f"directory.database={url}")


def test_a_directory_in_postgresql(looked_at: str, postgresql: Database) -> None:
    assert "has no table accounts" in of_directory(looked_at, "postgresql", postgresql.url)
    words = ("--set", "directory.backend=postgresql", "--set", f"directory.database={postgresql.url}")
    assert powermail("directory", "init", "--data", looked_at, *words).status == 0
    assert [one["what"].partition(":")[0] for one in found(looked_at, *words)] == ["fsync is off"]
    postgresql.sql("UPDATE accounts_version SET version = 0")
    assert "is of version 0" in of_directory(looked_at, "postgresql", postgresql.url)
    assert "it cannot be asked" in of_directory(looked_at, "postgresql", f"{postgresql.url}x")


def test_a_directory_in_mysql(looked_at: str, mysql: Database) -> None:
    assert "has no table accounts" in of_directory(looked_at, "mysql", mysql.url)
    words = ("--set", "directory.backend=mysql", "--set", f"directory.database={mysql.url}")
    assert powermail("directory", "init", "--data", looked_at, *words).status == 0
    text = of_directory(looked_at, "mysql", mysql.url)
    assert "innodb_flush_log_at_trx_commit is 2" in text, "as the server of the tests runs"
    assert "lacks" not in text
    mysql.sql("CREATE USER reader@'127.0.0.1'", f"GRANT SELECT ON {mysql.name}.* TO reader@'127.0.0.1'")
    try:
        text = of_directory(looked_at, "mysql", mysql.url.replace("root@", "reader@"))
        assert "the user lacks INSERT, UPDATE, DELETE" in text
    finally:
        mysql.sql("DROP USER reader@'127.0.0.1'")
    mysql.sql("ALTER TABLE accounts ENGINE = MyISAM")
    assert "knows no transactions" in of_directory(looked_at, "mysql", mysql.url)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("transaction_isolation", "READ-UNCOMMITTED", "have not committed"),
        ("tx_isolation", "READ-UNCOMMITTED", "have not committed"),
        ("sql_mode", "NO_ENGINE_SUBSTITUTION", "not strict"),
        ("character_set_database", "latin1", "latin1"),
        ("autocommit", "OFF", "autocommit is off"),
        ("innodb_doublewrite", "OFF", "innodb_doublewrite is OFF"),
        ("version", "10.1.48-MariaDB", "does not know"),
        ("version", "5.7.44", "does not know"),
    ],
)
def test_settings_of_mysql(name: str, value: str, what: str) -> None:
    good = {"version": "10.11.6-MariaDB", "sql_mode": "STRICT_TRANS_TABLES", "autocommit": "ON", "innodb_doublewrite": "ON",
            "character_set_database": "utf8mb4", "innodb_flush_log_at_trx_commit": "1"}  # fmt: skip
    assert of_mysql("db", good, True) == [] and of_mysql("db", {**good, "version": "8.0.36"}, True) == []
    (one,) = of_mysql("db", {**good, name: value}, True)
    assert what in one.what and one.cure
