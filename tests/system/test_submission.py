"""Mail from users of ours: who readers will see as its author, what is added, what is kept out."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from tests.system.conftest import Running
from tests.system.submitting import submit, submitter

FORGED = [
    b"From: Bob <bob@local.example>\r\n\r\nx",
    b"From : Bob <bob@local.example>\r\n\r\nx",
    b"FROM\t: bob@local.example\r\n\r\nx",
    b"From:\r\n bob@local.example\r\n\r\nx",
    b"From: ann@local.example, bob@local.example\r\n\r\nx",
    b"From: ann@local.example\r\nFrom: bob@local.example\r\n\r\nx",
    b"From: (ann@local.example) bob@local.example\r\n\r\nx",
    b'From: "ann@local.example" <bob@local.example>\r\n\r\nx',
    b"From: us: ann@local.example, bob@local.example;\r\n\r\nx",
    b"From: ann@local.example\r\nSender: bob@local.example\r\n\r\nx",
    b"From: ceo@local.example\r\n\r\nx",
    b"From: someone@elsewhere.example\r\n\r\nx",
    b"From: <ann@local.example> <bob@local.example>\r\n\r\nx",
    b"From: ann@local.example <bob@local.example>\r\n\r\nx",
    b"From: =?utf-8?q?ann=40local.example?=\r\n\r\nx",
    b'From: "ann\r\n\r\nx',
    b"From: ann@local.example (bob\r\n\r\nx",
    b"From: undisclosed:;\r\n\r\nx",
    b"From:\r\n\r\nx",
    b"From: " + b"n" * 20_000 + b" <bob@local.example>\r\n\r\nx",
    b"From: \xff <ann@local.example>\r\n\r\nx",
    b"X: " + b"x" * 300_000 + b"\r\nFrom: bob@local.example\r\n\r\nx",
]
IN_CHUNKS = [
    b"Subject: x\nFrom: bob@local.example\r\n\r\nx",
    b"Subject: x\rFrom: bob@local.example\r\n\r\nx",
    b"Subject: x\r\rFrom: bob@local.example\r\n\r\nx",
    b"Subject: x\0\r\nFrom: ann@local.example\r\n\r\nx",
    b"From: ann@local.example\r\nX: \rFrom: bob@local.example\r\n\r\nx",
]


@pytest.mark.parametrize("chunked", [False, True])
async def test_who_readers_will_see_as_the_author_is_the_account(running: Running, chunked: bool) -> None:
    """U03, in every spelling that some reader shows."""
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example")
    client = await submitter(running, "ann@local.example")
    for octets in [*FORGED, *IN_CHUNKS] if chunked else FORGED:
        reply = await submit(client, "ann@local.example", "bob@local.example", octets, chunked)
        assert reply.startswith(("550 5.6.0", "553 5.7.1")), (octets[:60], reply)
    assert await running.read("bob@local.example") == []


@pytest.mark.parametrize(
    "author",
    [
        b"ann@local.example",
        b"Ann <ann@local.example>",
        b'"Ann, of here" <ANN@local.example> (that is me (really))',
        b"Ann Q. Public <ann@local.example>",
        b"=?utf-8?q?J=C3=B6rg?=\r\n <ann+tag@local.example>",
        "J\u00f6rg <ann@local.example>".encode(),
        b"us: Ann <ann@local.example>;",
        b'"Ann \\"the\\" (one" <ann@local.example>',
        b"Ann<ann@local.example>",
    ],
)
async def test_an_honest_author_is_taken(running: Running, author: bytes) -> None:
    await running.mailbox("ann@local.example")
    client = await submitter(running, "ann@local.example")
    octets = b"From: " + author + b"\r\n\r\nx"
    assert (await submit(client, "ann@local.example", "ann@local.example", octets)).startswith("250")


async def test_a_submission_gets_what_is_missing_and_bcc_stays_here(running: Running) -> None:
    """RFC 6409 §8.2, §8.3; RFC 5322 §3.6.3."""
    await running.mailbox("ann@local.example")
    client = await submitter(running, "ann@local.example")
    bare = b"bcc : secret@local.example,\r\n\tother@local.example\r\nSubject: x\r\nBCC:\r\n\r\nBcc: in the body"
    assert (await submit(client, "ann@local.example", "ann@local.example", bare)).startswith("250")
    whole = b"From: ann@local.example\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\nMessage-Id: <1@x>\r\n\r\nbody"
    assert (await submit(client, "ann@local.example", "ann@local.example", whole)).startswith("250")
    assert (await submit(client, "ann@local.example", "ann@local.example", b"")).startswith("250")
    assert (await submit(client, "ann@local.example", "ann@local.example", b"\r\nno header")).startswith("250")
    first, second, third, fourth = await running.read("ann@local.example")
    head, _, body = first.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n"))
    assert sorted(fields) == [b"Date", b"From", b"Message-ID", b"Subject"]
    assert fields[b"From"] == b"<ann@local.example>"
    assert fields[b"Message-ID"].endswith(b"@localhost>")
    assert body == b"Bcc: in the body\r\n"
    assert second == whole + b"\r\n"
    assert third.count(b"\r\n") == 4
    assert fourth.endswith(b"\r\n\r\nno header\r\n")


@pytest.mark.parametrize(
    ("allowed", "sender", "taken"),
    [
        ("sales@local.example, *@Brand.example", "sales@local.example", True),
        ("sales@local.example, *@Brand.example", "anybody@brand.example", True),
        ("joe@xn--bcher-kva.test", "joe@b\u00fccher.test", True),
        ("sales@local.example", "Sales@Local.Example", True),
        ("sales@local.example", "bob@local.example", False),
        ("sales@local.example", "sales@brand.example", False),
        ("", "sales@local.example", False),
    ],
)
async def test_a_row_may_allow_other_senders(running: Running, allowed: str, sender: str, taken: bool) -> None:
    """Aliases and "send as", for the envelope and the header alike."""
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example")
    await running.mailbox("sales@local.example", password="", forward=["ann@local.example", "bob@local.example"])
    await running.operation("account_set", address="ann@local.example", send_as=allowed)
    client = await submitter(running, "ann@local.example")
    reply = await client.ask(f"MAIL FROM:<{sender}> SMTPUTF8")
    assert reply.startswith("250" if taken else "553 5.7.1")
    await client.ask("RSET")
    octets = f"From: {sender}\r\n\r\nx".encode()
    reply = await submit(client, "ann@local.example", "bob@local.example", octets)
    assert reply.startswith("250" if taken else "553 5.7.1")


async def test_a_sender_in_the_table_that_is_none_allows_nothing(running: Running) -> None:
    await running.mailbox("ann@local.example")
    with closing(sqlite3.connect(running.data / "directory.db")) as database:
        database.execute("UPDATE accounts SET send_as = 'x @@ *@ sales@local.example' WHERE address = 'ann@local.example'")
        database.commit()
    client = await submitter(running, "ann@local.example")
    assert (await client.ask("MAIL FROM:<x@local.example>")).startswith("553 5.7.1")
    assert (await client.ask("MAIL FROM:<sales@local.example>")).startswith("250")


async def test_mail_of_strangers_is_not_touched(running: Running) -> None:
    await running.mailbox("ann@local.example")
    octets = b"Bcc: x@y.zz\r\nFrom : a, b\r\nSubject: x\r\n\r\nbody"
    assert (await running.send(["ann@local.example"], octets)).startswith("250")
    assert await running.read("ann@local.example") == [octets + b"\r\n"]
