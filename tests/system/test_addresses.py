"""Who exists: long local parts, domains in every spelling, postmaster, forwards; and how much fits."""

from __future__ import annotations

import pytest

from tests.system.conftest import Running
from tests.system.submitting import submitter

LONG = "bounces+" + "0123456789abcdef" * 10


async def test_local_parts_beyond_64_octets_are_taken(running: Running) -> None:
    await running.mailbox(f"{LONG}@local.example")
    client = await running.connect()
    await client.ask("EHLO x")
    assert (await client.ask(f"MAIL FROM:<{LONG}@bulk.example>")).startswith("250")
    assert (await client.ask(f"RCPT TO:<{LONG}@local.example>")).startswith("250")
    await client.ask("DATA")
    assert (await client.ask(b"x\r\n.\r\n")).startswith("250")
    assert len(await running.read(f"{LONG}@local.example")) == 1


DOMAINS = ["b\u00fccher.test", "xn--bcher-kva.test", "bu\u0308cher.test", "B\u00dcCHER.test", "XN--BCHER-KVA.TEST"]


@pytest.mark.parametrize("stored", ["b\u00fccher.test", "xn--bcher-kva.test", "bu\u0308cher.test"])
async def test_a_domain_beyond_ascii_is_one_however_it_is_written(running: Running, stored: str) -> None:
    await running.mailbox(f"j\u00f6rg@{stored}")
    await running.mailbox(f"*@all.{stored}")
    await running.mailbox("ann@local.example")
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<a@b.cc> SMTPUTF8")
    for number, domain in enumerate(DOMAINS):
        local = ("j\u00f6rg", "jo\u0308rg", "J\u00d6RG")[number % 3]
        assert (await client.ask(f"RCPT TO:<{local}@{domain}>")).startswith("250"), domain
        assert (await client.ask(f"RCPT TO:<someone@all.{domain}>")).startswith("250"), domain
        assert (await client.ask(f"RCPT TO:<nobody@{domain}>")).startswith("550 5.1.1"), domain
    await client.ask("DATA")
    assert (await client.ask(b"x\r\n.\r\n")).startswith("250")
    for domain in DOMAINS[:3]:
        assert len(await running.read(f"j\u00f6rg@{domain}")) == 1
        assert len(await running.read(f"any@all.{domain}")) == 1


async def test_a_forward_to_a_domain_beyond_ascii_stays_here(running: Running) -> None:
    await running.mailbox("j\u00f6rg@b\u00fccher.test")
    await running.mailbox("ann@local.example", password="", forward=["j\u00f6rg@xn--bcher-kva.test"])
    assert (await running.send(["ann@local.example"], b"x")).startswith("250")
    assert len(await running.read("j\u00f6rg@b\u00fccher.test")) == 1


async def test_a_sender_is_ones_own_in_every_spelling_of_its_domain(running: Running) -> None:
    await running.mailbox("joe@b\u00fccher.test")
    client = await submitter(running, "joe@xn--bcher-kva.test")
    for sender in ("joe@xn--bcher-kva.test", "joe@b\u00fccher.test"):
        assert (await client.ask(f"MAIL FROM:<{sender}> SMTPUTF8")).startswith("250"), sender
        await client.ask("RSET")
    assert (await client.ask("MAIL FROM:<joe@bucher.test>")).startswith("553")


async def test_postmaster_of_every_served_domain_is_accepted(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.mailbox("postmaster@own.example")
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<>")
    for address in ("postmaster@local.example", "PostMaster@LOCAL.example", "postmaster", "postmaster@own.example"):
        assert (await client.ask(f"RCPT TO:<{address}>")).startswith("250"), address
    assert (await client.ask("RCPT TO:<postmaster@elsewhere.example>")).startswith("550 5.7.1")
    await client.ask("DATA")
    assert (await client.ask(b"x\r\n.\r\n")).startswith("250")
    assert len(await running.entries("postmaster@localhost")) == 1
    assert len(await running.entries("postmaster@own.example")) == 1


@pytest.mark.parametrize("running", [("directory.postmaster=chief@local.example",)], indirect=True)
async def test_postmaster_is_who_the_setting_says(running: Running) -> None:
    await running.mailbox("chief@local.example")
    assert (await running.send(["postmaster@local.example"], b"x")).startswith("250")
    assert (await running.send(["postmaster"], b"x")).startswith("250")
    assert len(await running.read("chief@local.example")) == 2


async def test_a_forward_to_one_of_ours_that_is_gone_is_refused_and_never_sent_on(running: Running) -> None:
    for name in ("ann", "bob"):
        await running.mailbox(f"{name}@local.example")
    await running.mailbox("one@local.example", password="", forward=["bob@local.example"])
    await running.mailbox("both@local.example", password="", forward=["ann@local.example", "bob@local.example"])
    await running.mailbox("far@local.example", password="", forward=["bob@local.example", "x@elsewhere.example"])
    await running.operation("account_delete", address="bob@local.example")
    assert (await running.send(["one@local.example"], b"x")).startswith("550 5.1.1")
    assert (await running.send(["both@local.example"], b"x")).startswith("250")
    assert (await running.send(["far@local.example"], b"x")).startswith("250")
    assert [row.destination for row in await running.index.queue_rows(0, 10)] == ["x@elsewhere.example"]
    assert len(await running.read("ann@local.example")) == 1


@pytest.mark.parametrize("running", [("directory.quota_strict=true",)], indirect=True)
async def test_strict_quotas_are_exact_without_size(running: Running) -> None:
    await running.mailbox("small@local.example", quota_octets=1000)
    await running.mailbox("large@local.example")
    for order in (["large@local.example", "small@local.example"], ["small@local.example", "large@local.example"]):
        assert (await running.send(order, b"x" * 2000)).startswith("552 5.2.2")
    assert (await running.send(["large@local.example"], b"x" * 2000)).startswith("250")
    assert await running.read("small@local.example") == []


async def test_an_announced_size_that_fits_nobody_is_refused_before_it_is_sent(running: Running) -> None:
    await running.mailbox("small@local.example", quota_octets=1000)
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<a@b.cc> SIZE=2000")
    assert (await client.ask("RCPT TO:<small@local.example>")).startswith("250")
    assert (await client.ask("DATA")).startswith("552 5.2.2")
    assert (await client.ask("NOOP")).startswith("250")


async def test_destinations_that_differ_in_case_are_two(running: Running) -> None:
    """RFC 5321 §2.4: the case of a local part is its own host's to judge."""
    await running.mailbox("ann@local.example", password="", forward=["Bob@far.example", "bob@far.example", "bob@FAR.example"])
    assert (await running.send(["ann@local.example"], b"x")).startswith("250")
    rows = await running.index.queue_rows(0, 10)
    assert sorted(row.destination for row in rows) == ["Bob@far.example", "bob@far.example"]
