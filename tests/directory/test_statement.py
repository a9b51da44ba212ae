"""Named parameters are found where they stand, and nowhere else; what is bound is never read as SQL."""

from __future__ import annotations

import pytest

from powermail.base.errors import OperatorError
from powermail.directory.statement import Statement, literal

KNOWN = ("address", "local", "domain")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("SELECT :address", ("address",)),
        ("SELECT :address, :local, :address", ("address", "local", "address")),
        ("SELECT 1 WHERE a=:address;", ("address",)),
        ("SELECT ':address', \":address\", `:address`", ()),
        ("SELECT 'it''s :address' || :local", ("local",)),
        ("SELECT 'a\\' || :local", ("local",)),
        ("SELECT E'it\\'s :address', :local", ("local",)),
        ("SELECT 1 -- :address\n, :local", ("local",)),
        ("SELECT 1 /* :address\n */, :local", ("local",)),
        ("SELECT $$ :address $$, $x$ :address $x$, :local", ("local",)),
        ("SELECT :address::text, x::citext, @a := 1, b[1:2]", ("address",)),
        ("SELECT 50 % 7 WHERE a LIKE '%:address%' AND b = ?", ()),
        ("SELECT 1", ()),
    ],
)
def test_parameters_are_found_outside_of_strings_names_and_comments(text: str, names: tuple[str, ...]) -> None:
    assert Statement(text, KNOWN).names == names


def test_each_engine_gets_its_own_form() -> None:
    statement = Statement("SELECT ':x' WHERE a = :address OR b = :local OR c = :address", KNOWN)
    assert statement.numbered == "SELECT ':x' WHERE a = $1 OR b = $2 OR c = $1" and statement.order == ("address", "local")
    assert statement.marked == "SELECT ':x' WHERE a = ? OR b = ? OR c = ?"
    written = statement.written({"address": "a'b\\", "local": None})
    assert written == "SELECT ':x' WHERE a = _utf8mb4 X'6127625c' OR b = NULL OR c = _utf8mb4 X'6127625c'"


def test_what_is_written_into_a_text_is_digits_only() -> None:
    assert [literal(value) for value in (7, -7, True, b"'\0", "\u00e9'", None)] == [
        "7", "-7", "1", "X'2700'", "_utf8mb4 X'c3a927'", "NULL",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SELECT :adress", "directory.find: there is no parameter :adress; there are :address, :local, :domain"),
        ("SELECT 1; DELETE FROM accounts", "directory.find: one statement, without a ; in it"),
        ("SELECT ';' ;; ", "directory.find: one statement, without a ; in it"),
    ],
)
def test_what_is_no_statement_is_refused_by_name(text: str, told: str) -> None:
    with pytest.raises(OperatorError) as caught:
        Statement(text, KNOWN, "directory.find")
    assert str(caught.value) == told
