"""Importing accounts: strict, whole or not at all, with the line and the address of what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.support import powermail


def import_(data: str, text: str, *words: str) -> tuple[int, str, dict[str, object]]:
    """(status, sentence, result) of an import from standard input."""
    done = powermail("account", "import", "-", *words, "--data", data, "--json", given=text)
    return done.status, done.sentence() if done.err else "", done.json()


def rows(data: str) -> dict[str, dict[str, object]]:
    return {row["address"]: row for row in powermail("account", "list", "--data", data, "--json").json()}


CSV = (
    "address,password,quota_octets,forward,enabled\n"
    "ann@example.org,{plain}x,20M,,yes\n"
    '"bob@example.org",$6$rounds=1000$abc$def,,"x@example.net y@example.net",no\n'
)
LINES = (
    '{"address":"ann@example.org","password":"{plain}x","quota_octets":20971520,"enabled":true}\n\n'
    '{"address":"bob@example.org","password":"$6$rounds=1000$abc$def","forward":["x@example.net","y@example.net"],"enabled":false}\n'
)


@pytest.mark.parametrize("text", [CSV, LINES, "\ufeff" + CSV, CSV.replace("\n", "\r\n")], ids=["csv", "json", "mark", "crlf"])
def test_csv_and_json_lines_mean_the_same(data: str, text: str) -> None:
    assert import_(data, text) == (0, "", {"added": 2, "updated": 0, "dry_run": False})
    found = rows(data)
    assert found["ann@example.org"]["quota_octets"] == 20 * 2**20
    assert found["bob@example.org"]["forward"] == ["x@example.net", "y@example.net"]
    assert (found["ann@example.org"]["enabled"], found["bob@example.org"]["enabled"]) == (True, False)
    assert (found["ann@example.org"]["password"], found["bob@example.org"]["password"]) == ("plain", "crypt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"address":"a@b.c","quota_octets":"50M"}', "line 3, a@b.c: Expected `int`, got `str` - at `$.quota_octets`"),
        ('{"address":"a@b.c","enabled":"no"}', "line 3, a@b.c: Expected `bool`, got `str`"),
        ('{"address":"a@b.c","quota":1}', "line 3, a@b.c: Object contains unknown field `quota`"),
        ('{"address":"a@b.c","forward":"x@y.z"}', "line 3, a@b.c: Expected `array`"),
        ('{"password":"{plain}x"}', "line 3: Object missing required field `address`"),
        ('{"address":"a@b.c"', "line 3: "),
        ('{"address":"nobody"}', "line 3, nobody: not an address"),
        ('{"address":"a@b.c","password":"clear"}', "line 3, a@b.c: a password without {scheme}"),
        ('{"address":"a@b.c","password":"{rot13}x"}', "line 3, a@b.c: password scheme {rot13} is none of"),
        ('{"address":"a@b.c","quota_octets":-1}', "line 3, a@b.c: a quota and a rate are whole numbers"),
        ('{"address":"postmaster@localhost"}', "line 3, postmaster@localhost: exists already; --update"),
        ('{"address":"OK@example.org"}', "line 3, OK@example.org: stands on line 1 already"),
        ('{"address":"f@example.org","forward":["-x@y.z"]}', "line 3, f@example.org: "),
    ],
    ids=lambda text: text if text.startswith("{") else "",
)
def test_what_is_refused_is_named_and_nothing_is_entered(data: str, text: str, said: str) -> None:
    status, sentence, _ = import_(data, '{"address":"ok@example.org"}\n\n' + text + "\n")
    assert status == 2
    assert sentence.startswith(said) and sentence.endswith("nothing was changed")
    assert list(rows(data)) == ["postmaster@localhost"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("address,quta_octets\na@b.c,1\n", "line 1: unknown column 'quta_octets'; did you mean 'quota_octets'?"),
        ("password\nx\n", "line 1: a CSV file begins with the names of its columns, address among them"),
        ("address,password\na@b.c\n", "line 2: 1 cells where the head has 2"),
        ("address,enabled\na@b.c,nope\n", "line 2, a@b.c: enabled is 'nope', neither yes nor no"),
        ("address,quota_octets\na@b.c,lots\n", "line 2, a@b.c: 'lots' is not a size"),
        ('address,password\n"a@b.c,x\n', "line 2: "),
    ],
)
def test_csv_that_is_refused(data: str, text: str, said: str) -> None:
    status, sentence, _ = import_(data, text)
    assert status == 2
    assert sentence.startswith(said)
    assert list(rows(data)) == ["postmaster@localhost"]


def test_update_changes_only_what_is_given(data: str) -> None:
    import_(data, LINES)
    before = rows(data)
    text = '{"address":"ann@example.org","quota_octets":5}\n{"address":"new@example.org"}\n'
    assert import_(data, text, "--update", "--dry-run")[2] == {"added": 1, "updated": 1, "dry_run": True}
    assert rows(data) == before
    assert import_(data, text, "--update")[2] == {"added": 1, "updated": 1, "dry_run": False}
    assert rows(data)["ann@example.org"] == before["ann@example.org"] | {"quota_octets": 5}
    assert rows(data)["bob@example.org"] == before["bob@example.org"]


def test_clear_text_is_hashed_when_it_is_said_to_be_clear_text(data: str) -> None:
    assert import_(data, '{"address":"a@b.c","password":"clear"}\n', "--plain")[0] == 0
    assert rows(data)["a@b.c"]["password"] == "argon2id"


def test_long_rows_go_in_parts_that_fit(data: str) -> None:
    """A request is one line of the control socket."""
    from powermail.admin.accounts import AccountRow
    from powermail.cli.importing import parts

    rows = [
        (number, AccountRow(f"u{number}@example.org", forward=[f"{'x' * 60}@{n}.example" for n in range(90)]))
        for number in range(50)
    ]
    found = list(parts(rows, 64 * 1024))
    assert [row for part in found for row in part] == rows
    assert len(found) > 4 and all(part for part in found)
    assert list(parts([], 10)) == [] and len(list(parts(rows[:3], 1))) == 3


def test_files_that_cannot_be_read_are_said(data: str, tmp_path: Path) -> None:
    assert "cannot read /nowhere: No such file" in powermail("account", "import", "/nowhere", "--data", data).sentence()
    (tmp_path / "latin").write_bytes(b"address\nj\xf6rg@example.org\n")
    assert "is not UTF-8" in powermail("account", "import", str(tmp_path / "latin"), "--data", data).sentence()
    assert import_(data, "")[2] == {"added": 0, "updated": 0, "dry_run": False}
