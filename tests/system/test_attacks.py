"""Bad input that the dialogs cannot say: floods, floods of connections, odd sizes, changed accounts, certificates."""

from __future__ import annotations

import asyncio
import base64
import resource
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

import pytest

from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.tls import make_self_signed
from powermail.base.world import system_world
from powermail.directory.sqlite import SqliteDirectory
from tests.system.conftest import DOORS, Client, PopClient, Running


def plain(name: str, password: str) -> str:
    """The argument of AUTH PLAIN."""
    return base64.b64encode(f"\0{name}\0{password}".encode()).decode()


async def test_slow_clients_do_not_hold_up_a_quick_one(running: Running) -> None:
    """S28: many connections that say one octet now and then; a legitimate delivery beside them."""
    await running.mailbox("ann@local.example")
    cap = running.powermail.settings.smtp.connections_per_address_max
    slow = [await running.connect() for _ in range(cap - 5)]
    for number, client in enumerate(slow):
        client.send(b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\nRCPT TO:<ann@local.example>\r\nDATA\r\nS: x"[: 10 + number])
    began = time.monotonic()
    assert (await running.send(["ann@local.example"], b"S: quick\r\n\r\n")).startswith("250")
    assert time.monotonic() - began < 1.0
    assert len(await running.read("ann@local.example")) == 1


async def test_a_dripping_client_is_cut_off_whatever_it_drips(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """S28: one deadline for a whole command; a minimum data rate for a body."""
    await running.mailbox("ann@local.example")
    monkeypatch.setattr(limits, "SMTP_COMMAND_TIMEOUT_S", 1.0)
    monkeypatch.setattr(limits, "SMTP_DATA_RATE_GRACE_S", 1.0)
    command, body = await running.connect(), await running.connect()
    await body.ask("EHLO x")
    await body.ask("MAIL FROM:<a@b.cc>")
    await body.ask("RCPT TO:<ann@local.example>")
    await body.ask("DATA")

    async def drip(client: Client) -> str:
        async def go_on() -> None:
            while True:
                client.send(b"x")
                await asyncio.sleep(0.2)

        dripping = asyncio.create_task(go_on())
        try:
            return await client.line()
        finally:
            dripping.cancel()

    replies = await asyncio.gather(drip(command), drip(body))
    assert replies[0].startswith("421 4.4.2")
    assert replies[1].startswith("421 4.4.2")
    assert await running.read("ann@local.example") == []


async def test_ten_thousand_recipients(running: Running) -> None:
    """S09: 452 past the limit; the earlier ones still get the mail."""
    await running.mailbox("*@local.example")
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<a@b.cc>")
    most = running.powermail.settings.smtp.recipients_max
    for start in range(0, 10_000, 500):
        client.send("\r\n".join(f"RCPT TO:<u{number}@local.example>" for number in range(start, start + 500)))
        replies = [await client.line() for _ in range(500)]
        for number, reply in enumerate(replies, start):
            assert reply.startswith("250" if number < most else "452 4.5.3"), reply
    await client.ask("DATA")
    assert (await client.ask(b"S: x\r\n\r\n.\r\n")).startswith("250")
    assert len(await running.read("x@local.example")) == 1


async def test_a_tls_handshake_on_the_plain_port_is_closed_at_once(running: Running) -> None:
    """S14: no line end ever comes."""
    client = await running.connect()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    handshake = context.wrap_bio(incoming, outgoing, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        handshake.do_handshake()
    client.send(outgoing.read())
    assert (await client.line()).startswith("554")
    assert await client.closed()


async def test_credentials_of_any_size_are_refused_before_hashing(running: Running) -> None:
    """U09."""
    await running.mailbox("ann@local.example")
    client = await running.connect("submission")
    await client.ask("EHLO x")
    await client.ask("STARTTLS")
    await client.start_tls()
    await client.ask("EHLO x")
    began = time.monotonic()
    assert (await client.ask("AUTH PLAIN " + "A" * 1_000_000)).startswith("500")
    assert (await client.ask("AUTH PLAIN " + plain("ann@local.example", "x" * 2000))).startswith("501")
    await client.ask("AUTH LOGIN")
    assert (await client.ask("B" * 100_000)).startswith("501")
    assert (await client.ask("AUTH PLAIN " + plain("x" * 2000, "secret"))).startswith("501")
    assert time.monotonic() - began < 1.0
    assert running.powermail.world.counters.get("auth.failures") == 0
    assert (await client.ask("AUTH PLAIN " + plain("ann@local.example", "secret"))).startswith("235")


@pytest.mark.parametrize(
    "change", [{"password": "{plain}other"}, {"enabled": False}, None], ids=["password", "disabled", "gone"]
)
async def test_a_changed_account_ends_its_open_sessions(
    running: Running, change: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U14: on every front door, and DELE marks are forgotten."""
    monkeypatch.setattr(limits, "SESSION_RECHECK_S", 0.0)
    await running.mailbox("ann@local.example")
    await running.send(["ann@local.example"], b"S: x\r\n\r\n")
    reader = await running.log_in("ann@local.example")
    sender = await running.connect("submission")
    await sender.ask("EHLO x")
    await sender.ask("STARTTLS")
    await sender.start_tls()
    await sender.ask("EHLO x")
    assert (await sender.ask("AUTH PLAIN " + plain("ann@local.example", "secret"))).startswith("235")
    assert (await reader.ask_pop("DELE 1")).startswith("+OK")
    if change is None:
        await running.operation("account_delete", address="ann@local.example")
    else:
        await running.operation("account_set", address="ann@local.example", **change)
    assert (await reader.ask_pop("QUIT")).startswith("-ERR [AUTH]")
    assert (await sender.ask("MAIL FROM:<ann@local.example>")).startswith("421")
    assert await reader.closed()
    assert await sender.closed()
    assert (await running.powermail.core.index.totals())["entries"] == 1, "nothing was deleted"


async def test_an_upgraded_password_does_not_end_its_own_session(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SESSION_RECHECK_S", 0.0)
    await running.mailbox("ann@local.example", password="{md5}5ebe2294ecd0e0f08eab7690d2a6ee69")
    reader = await running.log_in("ann@local.example")
    assert (await reader.ask_pop("STAT")).startswith("+OK")
    account = await running.powermail.core.directory.find("ann@local.example")
    assert account is not None and account.password.startswith("{argon2id}")
    assert (await reader.ask_pop("QUIT")).startswith("+OK")


@pytest.mark.parametrize(
    "destination",
    [
        "a@b.example\r\nX: y",
        "a@b.example>",
        "two@b.example words@c.example",
        "-oQ/tmp@b.example",
        "no-at-sign",
        "a@b..example",
        "",
    ],
)
async def test_bad_destinations_are_refused_at_write(running: Running, destination: str) -> None:
    """F01."""
    with pytest.raises(Exception, match=r"address|dash|blank|destination"):
        await running.mailbox("fwd@local.example", password="", forward=[destination])


async def test_bad_destinations_in_the_table_are_refused_at_use(running: Running) -> None:
    """F01: a row written around our checks leads nowhere, and its neighbours still work."""
    await running.mailbox("ann@local.example")
    directory = running.powermail.core.directory
    assert isinstance(directory, SqliteDirectory) and directory._db is not None
    db = directory._db
    for address, forward in (("one", "a@b.example>\r\nX:y"), ("two", "ann@local.example bad@@x")):
        db.execute("INSERT INTO accounts (address, forward) VALUES (?, ?)", (f"{address}@local.example", forward))
    assert (await running.send(["one@local.example"], b"x")).startswith("550")
    assert (await running.send(["two@local.example"], b"S: x\r\n\r\n")).startswith("250")
    assert len(await running.read("ann@local.example")) == 1


async def test_nasty_messages_are_stored_as_they_came(running: Running) -> None:
    """M01, M03, M05, M07, M09: nothing is parsed that need not be; every octet comes back."""
    await running.mailbox("ann@local.example")
    nasty = [
        b"",
        b"no header at all",
        b" leading blank: x\r\n\r\nbody",
        b"X: 1\r\n" * 200_000 + b"\r\nbody",
        b"X: " + b"y" * 3_000_000 + b"\r\n\r\nbody",
        b"Subject: " + b"=?utf-8?q?=0d=0a?=" * 20_000 + b"\r\n\r\n",
        b"".join(b"Content-Type: multipart/mixed; boundary=%d\r\n\r\n--%d\r\n" % (n, n) for n in range(5000)),
        b"From: " + b"(" * 10_000 + b"\r\n\r\n",
        b"Received: a\r\nreceived : b\r\n\r\nReceived: c\r\n" + bytes(range(256)).replace(b"\n", b"").replace(b"\r", b""),
    ]
    for octets in nasty:
        assert (await running.send(["ann@local.example"], octets)).startswith("250")
    assert await running.read("ann@local.example") == [octets + b"\r\n" for octets in nasty]


async def test_old_tls_is_refused(running: Running) -> None:
    """T02, RFC 8996."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", running.powermail.front.listening["pop3s"], ssl=context)


async def test_certificates_are_reloaded_and_a_bad_one_is_not(running: Running) -> None:
    """T12: a new pair is used for new connections; a missing, cut or mismatched one is refused and the old kept."""
    certificates = running.powermail.front.certificates
    assert certificates is not None
    place = running.data / "tls"

    async def serving() -> bytes:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", running.powermail.front.listening["pop3s"], ssl=_unverified(), server_hostname="localhost"
        )
        octets = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        await reader.read()
        assert isinstance(octets, bytes)
        return octets

    first = await serving()
    from powermail.base.clock import utc

    certificate, key = make_self_signed("localhost", utc(time.time()))
    (place / "certificate.pem").write_bytes(certificate)
    assert not certificates.reload(), "it does not fit the key yet"
    assert await serving() == first
    (place / "key.pem").write_bytes(key)
    assert certificates.reload()
    second = await serving()
    assert second != first
    (place / "certificate.pem").write_bytes(certificate[:100])
    assert not certificates.reload()
    (place / "certificate.pem").unlink()
    assert not certificates.reload()
    assert await serving() == second


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def test_two_pop_sessions_and_a_delivery(running: Running) -> None:
    """P07: the second is told [IN-USE]; what arrives meanwhile changes no number of the first."""
    await running.mailbox("ann@local.example")
    await running.send(["ann@local.example"], b"S: 1\r\n\r\n")
    first = await running.log_in("ann@local.example")
    assert (await first.ask_pop("STAT")).startswith("+OK 1 ")
    second = await running.connect("pop3")
    assert isinstance(second, PopClient)
    await second.start_tls_pop()
    await second.ask_pop("USER ann@local.example")
    assert (await second.ask_pop("PASS secret")).startswith("-ERR [IN-USE]")
    await running.send(["ann@local.example"], b"S: 2\r\n\r\n")
    assert (await first.ask_pop("STAT")).startswith("+OK 1 ")
    assert (await first.ask_pop("RETR 2")).startswith("-ERR")
    assert (await first.ask_pop("QUIT")).startswith("+OK")
    assert (await second.ask_pop("USER ann@local.example")).startswith("+OK")
    assert (await second.ask_pop("PASS secret")).startswith("+OK 2 messages")


@pytest.mark.timeout(120)
async def test_few_descriptors_and_many_clients(tmp_path: Path) -> None:
    """X03: 256 open files, 600 clients: the surplus is refused, storage goes on, nothing spins, nothing acked is lost."""
    data = tmp_path / "data"
    first = await initialise(system_world(MemoryLog()), str(data), "localhost")
    ports = {door: _free_port() for door in DOORS}
    words = [f'--set={door}=["127.0.0.1:{port}"]' for door, port in ports.items()]

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "powermail", "serve", "--data", str(data), *words],
        *["--set=smtp.connections_per_address_max=5000", "--set=cluster.reserve_octets=0", "--set=log.level=error"],
        preexec_fn=few,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            if (data / "control.sock").exists():
                break
            await asyncio.sleep(0.05)
        open_clients = []
        refused = 0
        for _ in range(600):
            reader, writer = await asyncio.open_connection("127.0.0.1", ports["smtp.listen"])
            open_clients.append((reader, writer))
        for reader, _ in open_clients:
            try:
                async with asyncio.timeout(10):
                    refused += not (await reader.readline()).startswith(b"220")
            except ConnectionError:
                refused += 1
        assert 400 < refused < 600
        reader, writer = open_clients[0]
        for line, code in (
            (b"EHLO x", b"250"),
            (b"MAIL FROM:<a@b.cc>", b"250"),
            (b"RCPT TO:<%s>" % first.address.encode(), b"250"),
            (b"DATA", b"354"),
            (b"S: x\r\n\r\nbody\r\n.", b"250"),
        ):
            writer.write(line + b"\r\n")
            while (reply := await reader.readline())[3:4] == b"-":
                pass
            assert reply.startswith(code), reply
        before = _cpu_s(process.pid)
        await asyncio.sleep(1.0)
        assert _cpu_s(process.pid) - before < 0.5, "it spins"
        for _, writer in open_clients:
            writer.close()
        await asyncio.sleep(0.5)
        reader, writer = await asyncio.open_connection("127.0.0.1", ports["smtp.listen"])
        assert (await reader.readline()).startswith(b"220"), "it takes new ones again"
        writer.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100
