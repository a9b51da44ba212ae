"""Forwards and submitted mail on their way out: a real receiving peer, refusals, bounces, hostile next hops."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator

import pytest

from powermail.outbound.routing import Route, Smarthost
from powermail.wire.dot import DotReader
from tests.system.conftest import Running


class Peer:
    """A next hop that answers as told."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.messages: list[tuple[str, str, bytes]] = []
        self.connections = 0
        self.port = 0

    async def start(self) -> int:
        """Listens; the port."""
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**24)
        return int(self.server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        sender = recipient = ""
        try:
            writer.write(self.answers.get("banner", b"220 peer\r\n"))
            while line := await reader.readline():
                verb = line[:4].decode().upper().strip()
                answer = self.answers.get(verb)
                if verb == "MAIL":
                    sender = line.decode().strip()
                if verb == "RCPT":
                    recipient = line.decode().strip()
                if verb == "EHLO":
                    writer.write(answer or b"250-peer\r\n250-PIPELINING\r\n250 DSN\r\n")
                elif verb == "DATA" and answer is None:
                    writer.write(b"354 go\r\n")
                    parser, body, done = DotReader(), b"", False
                    while not done:
                        part, _, done = parser.feed(await reader.readuntil(b"\n"))
                        body += part
                    final = self.answers.get("end", b"250 taken\r\n")
                    if not final:
                        break
                    if final.startswith(b"2"):
                        self.messages.append((sender, recipient, body))
                    writer.write(final)
                else:
                    writer.write(answer or b"250 ok\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def peer(running: Running) -> AsyncIterator[Peer]:
    """A peer that is the smarthost."""
    made = Peer()
    port = made.port = await made.start()
    running.powermail.front.outbound.router = Smarthost(Route("127.0.0.1", port))
    await running.mailbox("ann@local.example")
    await running.mailbox("fwd@local.example", password="", forward=["away@elsewhere.example"])
    yield made
    made.server.close()


async def push(running: Running) -> None:
    """Tries everything in the queue now."""
    outbound = running.powermail.front.outbound
    await outbound.idle()
    await running.operation("queue_set", numbers=[], held=None, due=True)
    await outbound.step()
    await outbound.idle()


async def queue(running: Running) -> list[dict[str, object]]:
    """The queue's rows."""
    rows = await running.operation("queue_list", after=0, limit=100)
    assert isinstance(rows, list)
    return rows


async def test_a_forward_arrives_with_its_octets_and_a_rewritten_sender(running: Running, peer: Peer) -> None:
    assert (await running.send(["fwd@local.example"], b"S: x\r\n\r\n..dot\r\nbare\rcr")).startswith("250")
    await push(running)
    ((sender, recipient, body),) = peer.messages
    assert sender.startswith("MAIL FROM:<SRS0=")
    assert recipient.startswith("RCPT TO:<away@elsewhere.example>")
    assert body.startswith(b"Received: ")
    assert body.endswith(b"S: x\r\n\r\n.dot\r\nbare\r\ncr\r\n")
    assert await queue(running) == []
    for _ in range(20):
        await running.each(running.powermail.keeping.collector.step)
    status = await running.operation("status")
    assert isinstance(status, dict)
    assert status["totals"]["messages"] == 0


@pytest.mark.parametrize(
    "answers",
    [
        {"banner": b"220-" + b"x" * 3000 + b"\r\n"},
        {"banner": b"999 what\r\n"},
        {"banner": b"421 busy\r\n"},
        {"RCPT": b"451 later\r\n"},
        {"RCPT": b"250-" + b"y" * 100 + b"\r\n251 z\r\n"},
        {"DATA": b"451 not now\r\n"},
        {"end": b"452 full\r\n"},
        {"end": b""},
        {"MAIL": b"250 \0\r\n"},
    ],
)
async def test_hostile_and_busy_hops_are_tried_again(running: Running, peer: Peer, answers: dict[str, bytes]) -> None:
    """F04, F05: deferred, never dropped; then it arrives once."""
    await running.send(["fwd@local.example"], b"S: x\r\n\r\nbody")
    peer.answers = answers
    await push(running)
    (row,) = await queue(running)
    assert row["attempts"] == 1
    assert "\r" not in str(row["last_status"])
    peer.answers = {}
    await push(running)
    assert len(peer.messages) == 1
    assert await queue(running) == []


async def test_a_permanent_failure_bounces_once_to_the_sender(running: Running, peer: Peer) -> None:
    """F10; and none for the null reverse-path."""
    peer.answers = {"RCPT": b"550 5.1.1 no such\r\n injected: line\r\n".replace(b"\r\n i", b" i")}
    await running.send(["fwd@local.example"], b"S: x\r\n\r\nbody", "ann@local.example")
    await push(running)
    assert await queue(running) == []
    (bounce,) = await running.read("ann@local.example")
    assert b"report-type=delivery-status" in bounce
    assert b"Final-Recipient: rfc822; fwd@local.example\r\n" in bounce
    assert b"Status: 5.1.1\r\n" in bounce
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<>")
    await client.ask("RCPT TO:<fwd@local.example>")
    await client.ask("DATA")
    assert (await client.ask(b"x\r\n.\r\n")).startswith("250")
    await push(running)
    assert await queue(running) == []
    assert len(await running.read("ann@local.example")) == 1


async def test_a_bounce_finds_its_way_back_through_the_rewritten_sender(running: Running, peer: Peer) -> None:
    await running.send(["fwd@local.example"], b"S: x\r\n\r\nbody", "origin@sender.example")
    await push(running)
    rewritten = peer.messages[0][0].split("<")[1].split(">")[0]
    assert (await running.send([rewritten], b"S: bounce", "")).startswith("250")
    await push(running)
    assert peer.messages[-1][0].startswith("MAIL FROM:<>")
    assert peer.messages[-1][1].startswith("RCPT TO:<origin@sender.example>")
    assert (await running.send([rewritten], b"S: I am away", "someone@else.example")).startswith("250")
    await push(running)
    assert peer.messages[-1][0].startswith("MAIL FROM:<SRS0="), "an auto-reply has a sender of its own"
    assert peer.messages[-1][1].startswith("RCPT TO:<origin@sender.example>")
    forged = rewritten.replace("origin", "victim")
    for sender in ("", "someone@else.example"):
        assert (await running.send([forged], b"bounce", sender)).startswith("550")


async def test_a_bounce_finds_its_way_back_to_a_sender_too_long_to_be_rewritten_whole(running: Running, peer: Peer) -> None:
    sender = "bounces+" + "x" * 50 + "@sender.example"
    await running.send(["fwd@local.example"], b"S: x\r\n\r\nbody", sender)
    await push(running)
    rewritten = peer.messages[0][0].split("<")[1].split(">")[0]
    assert rewritten.startswith("SRST=")
    assert len(rewritten.split("@")[0]) <= 64
    await running.stop()
    await running.start()
    running.powermail.front.outbound.router = Smarthost(Route("127.0.0.1", peer.port))
    assert (await running.send([rewritten], b"S: bounce", "")).startswith("250")
    await push(running)
    assert peer.messages[-1][1].startswith(f"RCPT TO:<{sender}>")
    assert (await running.send([rewritten.replace("=", "=a", 1)], b"bounce", "")).startswith("550")


async def test_success_at_home_is_told_where_it_was_asked_for(running: Running, peer: Peer) -> None:
    """RFC 3461 §4.1."""
    await running.mailbox("bob@local.example")
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<ann@local.example> ENVID=e1")
    assert (await client.ask("RCPT TO:<bob@local.example> NOTIFY=SUCCESS ORCPT=rfc822;bob@old.example")).startswith("250")
    await client.ask("DATA")
    assert (await client.ask(b"S: x\r\n\r\nbody\r\n.\r\n")).startswith("250")
    while not (found := await running.read("ann@local.example")):
        pass
    assert b"Action: delivered" in found[0]
    assert b"Original-Recipient: rfc822; bob@old.example" in found[0]
    assert b"Original-Envelope-Id: e1" in found[0]


async def test_a_notice_for_a_full_mailbox_is_logged_and_counted(running: Running, peer: Peer) -> None:
    await running.mailbox("full@local.example", quota_octets=10)
    peer.answers = {"RCPT": b"550 5.1.1 no such\r\n"}
    await running.send(["fwd@local.example"], b"S: x\r\n\r\nbody", "full@local.example")
    await push(running)
    assert await queue(running) == []
    (line,) = running.lines("notice-dropped")
    assert "full@local.example" in line
    assert (await running.status())["counters"]["delivery.notices_dropped"] == 1


@pytest.mark.parametrize("running", [["index.wait_s=0.2"]], indirect=True)
async def test_a_locked_index_ends_no_worker_and_nothing_is_sent_twice(running: Running, peer: Peer) -> None:
    """Longer than SQLite waits for a lock, and while the hop answers."""
    await running.send(["fwd@local.example"], b"S: first\r\n\r\nbody")
    await push(running)
    peer.answers["end"] = b""
    await running.send(["fwd@local.example"], b"S: second\r\n\r\nbody")
    peer.answers.clear()
    other = sqlite3.connect(running.data / "index.db", isolation_level=None)
    await running.operation("queue_set", numbers=[], held=None, due=True)
    await running.powermail.front.outbound.step()
    other.execute("BEGIN IMMEDIATE")
    await running.until(
        "trouble is said", lambda status: any("cannot be written down" in line for line in status["degraded"]), 30.0
    )
    other.execute("ROLLBACK")
    other.close()
    await running.until("all is well", lambda status: not status["degraded"] and not status["totals"]["queue"], 60.0)
    await running.send(["fwd@local.example"], b"S: third\r\n\r\nbody")
    await running.until("it is sent", lambda status: status["counters"].get("outbound.sent", 0) == 3)
    assert sorted(body[body.rindex(b"S: ") :].split()[1] for _, _, body in peer.messages) == [b"first", b"second", b"third"]


async def test_held_rows_stay_and_deleted_ones_go(running: Running, peer: Peer) -> None:
    await running.send(["fwd@local.example"], b"S: x\r\n\r\nbody")
    (row,) = await queue(running)
    await running.operation("queue_set", numbers=[row["id"]], held=True, due=False)
    await push(running)
    assert peer.messages == []
    await running.operation("queue_delete", numbers=[row["id"]])
    assert await queue(running) == []


async def test_original_defect_12_local_and_forward_in_one_transaction(running: Running, peer: Peer) -> None:
    assert (await running.send(["ann@local.example", "fwd@local.example"], b"S: both\r\n\r\nbody")).startswith("250")
    await push(running)
    assert len(peer.messages) == 1
    assert len(await running.read("ann@local.example")) == 1
