"""The directory in a database: made by a command, used by all others, named when it cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.support import Done, powermail
from tests.servers import Database


@pytest.fixture(params=["postgresql", "mysql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A fresh database of each server."""
    found: Database = request.getfixturevalue(request.param)
    return found


def configured(data: str, database: Database, *more: str) -> list[str]:
    """The common words that choose this database."""
    chosen = (f"directory.backend={database.server.kind}", f"directory.database={database.url}", *more)
    return ["--data", data, *(word for each in chosen for word in ("--set", each))]


def test_the_table_is_made_by_a_command_only_and_then_all_commands_work(data: str, database: Database) -> None:
    common = configured(data, database)

    def run(*words: str, given: str = "") -> Done:
        return powermail(*words, *common, given=given)

    refused = run("account", "list")
    assert refused.status == 2 and "`powermail directory init` makes it" in refused.sentence()
    made = run("directory", "init", "--json")
    assert made.status == 0 and made.json() == {"versions": [1]}
    assert "is there" in run("directory", "init").out
    assert run("account", "add", "Ann@Example.org", "--quota", "20M", "--password-stdin", given="secret\n").status == 0
    assert run("forward", "add", "sales@example.org", "ann@example.org", "x@else.example").status == 0
    database.sql("INSERT INTO accounts (address, password) VALUES ('bob@example.org', '{plain}x')")
    listed = run("account", "list", "--json").json()
    assert [row["address"] for row in listed] == ["ann@example.org", "bob@example.org", "sales@example.org"]
    assert listed[0]["quota_octets"] == 20 * 2**20 and listed[0]["password"] == "argon2id"
    assert run("account", "set", "bob@example.org", "--send-as", "b@x.yy", "--enabled", "no").status == 0
    renamed = run("account", "rename", "bob@example.org", "rob@example.org", "--json")
    assert renamed.status == 0 and renamed.json()["send_as"] == ["b@x.yy"] and not renamed.json()["enabled"]
    again = run("account", "add", "ANN@example.org")
    assert again.status == 2 and "ann@example.org exists" in again.sentence()
    rows = "".join(f'{{"address": "m{number}@example.org"}}\n' for number in range(300))
    assert run("account", "import", "-", "--json", given=rows).json() == {"added": 300, "updated": 0, "dry_run": False}
    assert run("account", "delete", "rob@example.org").status == 0
    assert run("directory", "check", "--json").json() == {"rows": 302, "problems": []}


def test_a_backup_has_no_directory_that_lies_elsewhere(data: str, database: Database, tmp_path: Path) -> None:
    common = configured(data, database)
    assert powermail("directory", "init", *common).status == 0
    assert powermail("backup", str(tmp_path / "backup"), *common).status == 0
    assert {path.name for path in (tmp_path / "backup").iterdir()} == {"index.db", "files", "backup.json"}
    assert powermail("restore", str(tmp_path / "backup"), "--yes", *common).status == 0
    assert (Path(data) / "directory.db").exists(), "what is not in it stays"


def test_statements_of_ones_own_are_read_and_never_changed(data: str, database: Database) -> None:
    database.sql("CREATE TABLE users (n INTEGER, mail VARCHAR(99))", "INSERT INTO users VALUES (7, 'ann@example.org')")
    listing = "SELECT n AS id, mail AS address FROM users WHERE mail > :after ORDER BY mail LIMIT :limit"
    common = configured(
        data,
        database,
        "directory.find=SELECT n AS id FROM users WHERE mail = :address",
        "directory.serves=SELECT 1 FROM users WHERE mail LIKE '%@' || :domain",
        f"directory.listing={listing}",
    )
    assert powermail("account", "show", "ann@example.org", "--json", *common).json()["id"] == "7"
    assert [row["address"] for row in powermail("account", "list", "--json", *common).json()] == ["ann@example.org"]
    assert powermail("directory", "check", *common).status == 0
    for words in (
        ("account", "add", "new@example.org"),
        ("account", "rename", "ann@example.org", "bob@example.org"),
        ("account", "delete", "ann@example.org"),
        ("directory", "init"),
    ):
        done = powermail(*words, *common)
        assert done.status == 2, words
        assert "directory.find" in done.sentence(), words
    assert powermail("account", "show", "ann@example.org", "--json", *common).json()["enabled"], "nothing was noted either"
    wrong = powermail("directory", "check", *common, "--set", "directory.serves=SELECT 1 FROM domainz WHERE name = :domain")
    assert wrong.status == 2 and wrong.sentence().startswith("directory.serves: ") and "domainz" in wrong.sentence()


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (("backend=oracle",), "directory.backend: 'oracle' is none of sqlite, postgresql, mysql"),
        (("backend=mysql",), "directory.database is for backend postgresql or mysql, and they need it"),
        (("database=mysql://u@h/n",), "directory.database is for backend postgresql or mysql"),
        (("backend=mysql", "database=postgresql://u@h/n"), "directory.database is not mysql://USER@HOST"),
        (("backend=mysql", "database=mysql://u:secret@h/n"), "a password belongs in a file of its own"),
        (("backend=mysql", "database=mysql://u@h:x/n"), "directory.database: the port of host 1 is no number from 1 to 65535"),
        (("backend=mysql", "database=mysql://h/n"), "names no user"),
        (("find=SELECT 1 AS id",), "directory.find needs directory.serves"),
        (("serves=SELECT 1",), "are for directory.find, which is empty"),
        (
            ("find=SELECT 1 AS id WHERE :address = ''", "serves=DROP TABLE x"),
            "directory.serves: it begins with neither SELECT nor WITH",
        ),
        (("backend=mysql", "database=mysql://u@h/n", "database_password_file=none"), "directory.database_password_file: "),
        (("database_tls=maybe",), "directory.database_tls: 'maybe' is neither none nor required"),
    ],
)
def test_settings_of_the_directory_that_cannot_be_are_named(looked_at: str, chosen: tuple[str, ...], told: str) -> None:
    words = [word for each in chosen for word in ("--set", f"directory.{each}")]
    done = powermail("account", "list", "--data", looked_at, *words)
    assert done.status == 2 and told in done.sentence()
    assert "secret" not in done.err


def test_a_password_comes_from_a_file_that_nobody_else_may_read(data: str, mysql: Database) -> None:
    mysql.sql("CREATE USER mail@'127.0.0.1' IDENTIFIED BY 'p:w@/%'", f"GRANT ALL ON {mysql.name}.* TO mail@'127.0.0.1'")
    try:
        path = Path(data) / "directory.password"
        path.write_text("p:w@/%\n")
        path.chmod(0o600)
        common = configured(data, mysql, "directory.database_password_file=directory.password")
        common = [word.replace("mysql://root@", "mysql://mail@") for word in common]
        assert powermail("directory", "init", *common).status == 0
        assert powermail("account", "list", *common).status == 0
        path.chmod(0o644)
        refused = powermail("account", "list", *common)
        assert refused.status == 2 and "holds a secret and everybody may read it" in refused.sentence()
        path.chmod(0o600)
        path.write_text("wrong\n")
        wrong = powermail("directory", "init", *common)
        assert wrong.status == 2 and "Access denied" in wrong.sentence() and "wrong" not in wrong.err
    finally:
        mysql.sql("DROP USER mail@'127.0.0.1'")


def test_the_file_needs_no_command(data: str) -> None:
    done = powermail("directory", "init", "--data", data)
    assert done.status == 2 and "it is made, and brought on, when it is opened" in done.sentence()
