"""docs/peer-protocol.md says what the programs do: its tables are theirs."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from powermail.base import errors, limits
from powermail.cluster.node_values import error_of
from powermail.wire import node_forms as forms
from powermail.wire.node_frames import EMPTY_SUM, HEADER_OCTETS
from powermail.wire.node_verbs import TABLE, Failure, Role

TEXT = Path("docs/peer-protocol.md").read_text()
FORMS = {
    name: form
    for name, form in vars(forms).items()
    if isinstance(form, type) and issubclass(form, msgspec.Struct) and form is not msgspec.Struct
}


def rows(*head: str) -> list[list[str]]:
    """The rows of the table with that head."""
    lines = TEXT.split(f"| {' | '.join(head)} |\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_the_table_of_verbs_is_the_programs() -> None:
    wanted = [
        [
            verb.name,
            str(verb.number),
            verb.way.value,
            ", ".join(role.value for role in Role if role in verb.roles) or "—",
            "yes" if verb.needs_hello else "no",
            verb.lane.value,
            verb.meta.__name__,
            verb.reply.__name__ if verb.reply else "ACKS" if verb.name == "COMMIT" else "—",
        ]
        for verb in TABLE
    ]
    assert rows("verb", "number", "way", "asked by", "needs HELLO", "connection", "meta", "reply") == wanted


def test_the_forms_are_the_programs() -> None:
    found = {}
    for name, *cells in rows("form", "fields"):
        fields = [re.sub(r" \(.*?\)", "", field) for field in re.split(r", (?![^(]*\))", cells[0]) if field]
        found[name] = fields
    assert found == {
        name: [f"{field.name}{'' if field.required else '?'}" for field in msgspec.structs.fields(form)]
        for name, form in FORMS.items()
    }


def test_fields_without_defaults_are_those_of_the_first_version() -> None:
    """P19: what is appended has a default, so that an older writer's meta is read."""
    for name, form in FORMS.items():
        required = [field.required for field in msgspec.structs.fields(form)]
        assert required == sorted(required, reverse=True), name
        assert form.__struct_config__.array_like and not form.__struct_config__.forbid_unknown_fields, name


def test_the_classes_of_errors_are_the_programs() -> None:
    wanted = [[failure.name, str(failure.value), type(error_of(failure, "")).__name__] for failure in Failure]
    assert [[row[0], row[1], row[3]] for row in rows("class", "number", "means", "becomes")] == wanted
    assert all(issubclass(getattr(errors, row[2]), errors.PowerMailError) for row in wanted)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(NODE_[A-Z_]+)`", TEXT))))
def test_limits_that_are_named_exist(name: str) -> None:
    assert getattr(limits, name) > 0


def test_figures_in_words_are_the_limits() -> None:
    figures = {
        "at most 1 MiB (`NODE_PAYLOAD_OCTETS_MAX`)": limits.NODE_PAYLOAD_OCTETS_MAX == limits.MIB,
        "64 KiB (`NODE_PIECE_OCTETS`)": limits.NODE_PIECE_OCTETS == 64 * limits.KIB,
        "4 MiB of payload (`NODE_WINDOW_OCTETS`)": limits.NODE_WINDOW_OCTETS == 4 * limits.MIB,
        "1,024 operations (`NODE_WINDOW_OPERATIONS`)": limits.NODE_WINDOW_OPERATIONS == 1024,
        "17 MiB (`NODE_OPERATION_OCTETS_MAX`)": limits.NODE_OPERATION_OCTETS_MAX == 17 * limits.MIB,
        "for 4 s (`NODE_PING_TIMEOUT_S`)": limits.NODE_PING_TIMEOUT_S == 4,
        "for 15 s (`NODE_BULK_TIMEOUT_S`)": limits.NODE_BULK_TIMEOUT_S == 15,
        "15 s after its deadline (`NODE_OVERDUE_S`)": limits.NODE_OVERDUE_S == 15,
        "for 3 s (`NODE_ROOM_WAIT_S`)": limits.NODE_ROOM_WAIT_S == 3,
        "256 KiB ahead (`NODE_UNSENT_OCTETS`)": limits.NODE_UNSENT_OCTETS == 256 * limits.KIB,
        "sees no octet move for 6 s": limits.NODE_CLOSE_WAIT_S + limits.NODE_CALL_GRACE_S == 6,
        "50 pings a second (`NODE_PINGS_PER_S_MAX`)": limits.NODE_PINGS_PER_S_MAX == 50,
        "within 10 s (`NODE_HELLO_TIMEOUT_S`)": limits.NODE_HELLO_TIMEOUT_S == 10,
        "for 10 s (`NODE_FRAME_TIMEOUT_S`)": limits.NODE_FRAME_TIMEOUT_S == 10,
        "for 10 s (`NODE_OPERATION_TIMEOUT_S`)": limits.NODE_OPERATION_TIMEOUT_S == 10,
        "for 15 s (`NODE_SILENCE_S`)": limits.NODE_SILENCE_S == 15,
        "for 15 s (`NODE_WRITE_TIMEOUT_S`)": limits.NODE_WRITE_TIMEOUT_S == 15,
        "more than 128 MiB of unanswered operations (`NODE_HELD_OCTETS_MAX`)": limits.NODE_HELD_OCTETS_MAX == 128 * limits.MIB,
        "beyond 4 MiB (`NODE_PAGE_OCTETS`)": limits.NODE_PAGE_OCTETS == 4 * limits.MIB,
        "within 100 ms": limits.NODE_STAT_INTERVAL_S == 0.1,
        "no more than 16 run at once": limits.NODE_READS_AT_ONCE == 16,
        "`limit` is 1 to 10,000": limits.NODE_PAGE_ITEMS_MAX == 10_000,
        f"`{EMPTY_SUM:016x}`": HEADER_OCTETS == 24,
    }
    flat = re.sub(r"\s+", " ", TEXT)
    for words, right in figures.items():
        assert words in flat and right, words
