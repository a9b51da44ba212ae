"""Moving the accounts into a database: every row with its id, killed at any point or not, and nothing of somebody else's."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from powermail.base.errors import OperatorError
from powermail.base.settings_text import with_values
from tests.cli.support import Done, make, powermail
from tests.cli.test_moving import Killed, killed_at
from tests.servers import Database


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped installation with accounts of all sorts, one of them of an operator's own INSERT."""
    data = tmp_path_factory.mktemp("accounts") / "data"
    make(data)
    rows = tmp_path_factory.mktemp("rows") / "rows.csv"
    lines = [f"user{number}@example.org,x{number},{number},somebody@elsewhere.example" for number in range(30)]
    rows.write_text("\n".join(["address,password,quota_octets,forward", *lines]) + "\n")
    assert powermail("account", "import", str(rows), "--plain", "--data", str(data)).status == 0
    assert powermail("account", "add", "entwürfe@example.org", "--password", "ü'\\", "--data", str(data)).status == 0
    with contextlib.closing(sqlite3.connect(data / "directory.db", isolation_level=None)) as db:
        db.execute(
            "INSERT INTO accounts (address, password, send_as) VALUES ('Ann@Example.org', '{plain}a\\b', '*@example.org')"
        )
    return data


@pytest.fixture
def data(filled: Path, tmp_path: Path) -> str:
    shutil.copytree(filled, tmp_path / "data")
    return str(tmp_path / "data")


@pytest.fixture(params=["postgresql", "mysql"])
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(request.param)
    return found


def accounts(data: str) -> list[dict[str, Any]]:
    """All rows as the program reads them, ids among them."""
    found: list[dict[str, Any]] = powermail("account", "list", "--data", data, "--json").json()
    return found


def move(data: str, to: str) -> Done:
    return powermail("directory", "move", "--to", to, "--data", data, "--json")


def test_every_account_goes_with_its_id_and_the_file_is_set_aside(data: str, database: Database) -> None:
    before = accounts(data)
    done = move(data, database.url)
    assert done.status == 0, done
    assert done.json()["accounts"] == len(before) == 33 and len(done.json()["sha256"]) == 64
    assert not Path(f"{data}/directory.db").exists() and Path(done.json()["set_aside"]).exists()
    canonical = [{**row, "address": row["address"].lower()} for row in before]
    assert accounts(data) == canonical, "by the settings, the program reads the database now"
    assert powermail("directory", "check", "--data", data).status == 0
    again = move(data, database.url)
    assert again.status == 2 and "nothing was changed" in again.sentence()


def test_a_move_that_is_killed_at_any_point_goes_on(data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [{**row, "address": row["address"].lower()} for row in accounts(data)]
    for step in range(20):
        with killed_at(step, monkeypatch), contextlib.suppress(Killed):
            assert move(data, postgresql.url).status == 0
            break
        assert accounts(data), "from one of the two, whole"
    assert step >= 2, "it was killed before the settings, and before the file was set aside"
    assert accounts(data) == before


def test_a_half_moved_directory_goes_on_and_one_of_others_is_refused(data: str, postgresql: Database, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "other")
    assert move(str(tmp_path / "other"), postgresql.url).status == 0
    postgresql.sql("DELETE FROM accounts WHERE quota_octets > 10")
    assert move(data, postgresql.url).status == 0, "what lacks is put there"
    make(tmp_path / "third")
    refused = move(str(tmp_path / "third"), postgresql.url)
    assert refused.status == 2 and "name a database without accounts" in refused.sentence()
    assert Path(tmp_path / "third" / "directory.db").exists()


def test_a_row_that_cannot_be_read_is_named_and_nothing_is_moved(data: str, postgresql: Database) -> None:
    with contextlib.closing(sqlite3.connect(f"{data}/directory.db", isolation_level=None)) as db:
        db.execute("INSERT INTO accounts (address) VALUES ('two@at@example.org')")
    refused = move(data, postgresql.url)
    assert refused.status == 2 and "two@at@example.org" in refused.sentence(), refused
    assert Path(f"{data}/directory.db").exists() and "[directory]" not in Path(f"{data}/powermail.toml").read_text()


# -- the settings file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("a = 1\n", 'a = 1\n\n[index]\ndatabase = "x"\n'),
        ("[index]  # where\npath = 'p'\n[smtp]\n", "[index]  # where\ndatabase = \"x\"\npath = 'p'\n[smtp]\n"),
        ('[ index ]\ndatabase = "old" # why\n', '[ index ]\ndatabase = "x"\n'),
        ("[smtp]\ndatabase_ = 1\n[[n]]\n", '[smtp]\ndatabase_ = 1\n[[n]]\n\n[index]\ndatabase = "x"\n'),
        ('[index]\n# database = "no"\n', '[index]\ndatabase = "x"\n# database = "no"\n'),
    ],
)
def test_one_value_of_a_settings_file_is_changed_and_no_other_line(text: str, after: str) -> None:
    assert with_values(text, {"index.database": "x"}, "f") == after


@pytest.mark.parametrize("text", ["index.path = 'p'\n", "index = {path = 'p'}\n", "[index]\ndatabase = '''\na'''\n"])
def test_a_settings_file_that_is_written_in_another_way_is_left_alone(text: str) -> None:
    with pytest.raises(OperatorError, match=r'index\.database = "postgresql://u@h/n"$'):
        with_values(text, {"index.database": "postgresql://u@h/n"}, "f")


# -- broken off, and what is there already -------------------------------------------------------------------------------


def killed_before_it_was_set_aside(data: str, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings name the database, and the file is still there."""
    for step in range(20):
        with killed_at(step, monkeypatch), pytest.raises(Killed):
            move(data, to)
        if "[directory]" in Path(f"{data}/powermail.toml").read_text():
            assert Path(f"{data}/directory.db").exists()
            return
    raise AssertionError


def test_a_move_that_had_only_the_file_to_set_aside_copies_nothing_any_more(
    data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was served since: who was deleted there stays so, and a new password is the password."""
    killed_before_it_was_set_aside(data, postgresql.url, monkeypatch)
    assert powermail("account", "delete", "user1@example.org", "--data", data).status == 0
    assert powermail("account", "set", "user2@example.org", "--quota", "77", "--data", data).status == 0
    assert powermail("account", "add", "new@example.org", "--password", "x", "--data", data).status == 0
    before = accounts(data)
    done = move(data, postgresql.url)
    assert done.status == 0 and done.json()["accounts"] == 33 and len(done.json()["sha256"]) == 64, done
    assert accounts(data) == before and "user1@example.org" not in [row["address"] for row in before]
    assert not list(Path(data).glob("directory.db")) and not list(Path(data).glob("directory.db.moved"))


def test_a_file_that_was_never_moved_is_not_set_aside_for_a_database_that_the_settings_name(
    data: str, postgresql: Database
) -> None:
    words = ("--set", "directory.backend=postgresql", "--set", f"directory.database={postgresql.url}")
    assert powermail("directory", "init", "--data", data, *words).status == 0
    done = powermail("directory", "move", "--to", postgresql.url, "--data", data, *words)
    assert done.status == 2 and "was not moved there" in done.sentence(), done
    assert Path(f"{data}/directory.db").exists()


@pytest.mark.parametrize(
    "odd", ["INSERT INTO accounts (address) VALUES ('far@elsewhere.example')", "another row", "unreadable"]
)
def test_a_table_of_somebody_else_is_refused_before_anything_is_put_there(data: str, database: Database, odd: str) -> None:
    words = (
        "--set", f"directory.backend={database.server.kind}", "--set", f"directory.database={database.url}",
    )  # fmt: skip
    assert powermail("directory", "init", "--data", data, *words).status == 0
    statement = {
        "another row": "INSERT INTO accounts (address, quota_octets) VALUES ('user3@example.org', 12345)",
        "unreadable": "INSERT INTO accounts (address) VALUES ('two@at@example.org')",
    }.get(odd, odd)
    database.sql(statement)
    done = move(data, database.url)
    assert done.status == 2 and "Nothing was changed" in done.sentence() and "DELETE FROM accounts" in done.sentence(), done
    assert database.sql("SELECT count(*) FROM accounts").split() == ["1"]
    assert "[directory]" not in Path(f"{data}/powermail.toml").read_text()
