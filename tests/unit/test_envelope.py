"""The envelope and the commit record: one form in memory, the stored form of every release."""

from __future__ import annotations

import msgspec
import pytest

from powermail.mail.envelope import Commit, CommitForm, Envelope, Target

STORED = (
    b'{"octets":7,"sha256":"00","sizes":[3,4],"received_at":1.5,"reverse_path":"a@b.cc","targets":[{"account":"7"}],'
    b'"envid":"x+2By","ret":"HDRS","body":"8BITMIME","smtputf8":true,"hops":2,"plain":true}'
)
ENVELOPE = Envelope("a@b.cc", "8BITMIME", True, "HDRS", "x+2By")


def test_the_stored_form_is_as_it_always_was() -> None:
    record = Commit(7, "00", [3, 4], 1.5, ENVELOPE, [Target(account="7")], 2, True)
    assert record.format() == STORED
    assert Commit.parse(STORED) == record


def test_what_is_not_said_is_not_stored() -> None:
    record = Commit(7, "00", [7], 1.5, Envelope(), [Target(destination="x@y.zz")])
    stored = b'{"octets":7,"sha256":"00","sizes":[7],"received_at":1.5,"reverse_path":"","targets":[{"destination":"x@y.zz"}]}'
    assert record.format() == stored
    assert Commit.parse(stored) == record


def test_fields_of_other_releases_are_passed_over_or_kept() -> None:
    newer = STORED[:-1] + b',"mark":9,"extra":{"k":"v"}}'
    record = Commit.parse(newer)
    assert record.envelope == ENVELOPE
    assert record.extra == {"k": "v"}
    assert record.format() == STORED[:-1] + b',"extra":{"k":"v"}}'


def test_what_readers_get_of_a_binary_message_is_kept_where_it_differs() -> None:
    record = Commit(7, "00", [3, 4], 1.5, ENVELOPE, [Target(account="7")], 2, True, as_text=9)
    assert record.format() == STORED[:-1] + b',"as_text":9}'
    assert Commit.parse(record.format()) == record and record.shown_octets == 9
    assert Commit.parse(STORED).shown_octets == 7


def test_a_reader_of_small_messages_takes_the_same_record() -> None:
    assert CommitForm.parse(STORED) == CommitForm([3, 4], True)


@pytest.mark.parametrize("bad", [b"", b"{}", b"[]", STORED[:-1], STORED.replace(b"[3,4]", b'"3"'), b"\xff" + STORED])
def test_a_damaged_record_is_refused(bad: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        Commit.parse(bad)
