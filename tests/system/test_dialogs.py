r"""Golden dialogs: text files in `tests/dialogs`, each replayed whole, in small pieces and octet by octet.

A file begins with what it needs, then says who says what:

    mailbox ADDRESS / forward ADDRESS DESTINATION...     rows of the directory; the password is `secret`
    door NAME                                           which door (smtp, submission, lmtp, pop3)
    C: text      the client sends this line and CRLF; \r \n \0 \xNN and \\ are octets
    C- text      the same without CRLF
    C* N text    the client sends this line N times
    S: pattern   the last line of the next reply, with * for anything
    S. pattern   one line of a multi-line POP3 answer
    TLS          both switch to TLS
    CLOSED       the server has closed
    MAIL ADDRESS N      that mailbox now holds N messages
    HOLDS ADDRESS text  its last message ends with these octets

A 250 needs the nodes, not the index: on a busy machine a message may be entered behind it (law 4). MAIL and HOLDS therefore
ask once reconcile has entered whatever the nodes hold.
"""

from __future__ import annotations

import fnmatch
import re
import sqlite3
from pathlib import Path

import pytest

from powermail.base import limits
from tests.system.conftest import Client, Running

DIALOGS = sorted(Path("tests/dialogs").glob("*.txt"))


def octets(text: str) -> bytes:
    """The octets a line of a dialog stands for."""
    names = {"r": b"\r", "n": b"\n", "0": b"\0", "\\": b"\\"}

    def one(match: re.Match[str]) -> str:
        word = match.group(1)
        value = names[word] if word in names else bytes([int(word[1:], 16)])
        return value.decode("latin-1")

    return re.sub(r"\\(x[0-9a-f]{2}|[rn0\\])", one, text).encode("latin-1")


class Replay:
    """One dialog on one connection."""

    def __init__(self, running: Running, piece: int) -> None:
        self._running = running
        self._piece = piece
        self._client: Client | None = None
        self._door = "smtp"

    async def _open(self) -> Client:
        if self._client is None:
            self._client = await self._running.connect(self._door)
        return self._client

    async def _send(self, data: bytes) -> None:
        client = await self._open()
        if not self._piece:
            client.send(data)
            return
        for start in range(0, len(data), self._piece):
            client.send(data[start : start + self._piece])
            await client.writer.drain()

    async def line(self, line: str) -> None:
        """Does what one line says."""
        word, _, rest = line.partition(" ")
        if word in ("mailbox", "forward"):
            address, *destinations = rest.split()
            password = "{plain}secret" if word == "mailbox" else ""
            await self._running.mailbox(address, password=password, forward=destinations)
        elif word == "door":
            self._door = rest
        elif word == "C:":
            await self._send(octets(rest) + b"\r\n")
        elif word == "C-":
            await self._send(octets(rest))
        elif word == "C*":
            count, _, text = rest.partition(" ")
            await self._send((octets(text) + b"\r\n") * int(count))
        else:
            await self._check(word, rest)

    async def _check(self, word: str, rest: str) -> None:
        client = await self._open()
        if word == "S:":
            answer = await (client.line() if self._door.startswith("pop") else client.reply())
            assert fnmatch.fnmatchcase(answer, rest.replace("[", "[[]")), f"expected {rest!r}, got {answer!r}"
        elif word == "S.":
            answer = await client.line()
            assert fnmatch.fnmatchcase(answer, rest.replace("[", "[[]")), f"expected {rest!r}, got {answer!r}"
        elif word == "TLS":
            await client.start_tls()
        elif word == "CLOSED":
            assert await client.closed()
        elif word == "MAIL":
            address, count = rest.split()
            assert len(await self._mail(address)) == int(count)
        elif word == "HOLDS":
            address, _, text = rest.partition(" ")
            found = (await self._mail(address))[-1]
            assert found.endswith(octets(text)), found
        else:
            raise AssertionError(f"a dialog cannot say {word!r}")

    async def _mail(self, address: str) -> list[bytes]:
        await self._running.powermail.core.reconciler.settle()
        return await self._running.read(address)


@pytest.mark.parametrize("piece", [0, 7, 1], ids=["whole", "pieces", "octets"])
@pytest.mark.parametrize("path", DIALOGS, ids=lambda path: path.stem)
async def test_dialog(running: Running, path: Path, piece: int) -> None:
    replay = Replay(running, piece)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        try:
            await replay.line(line)
        except (AssertionError, OSError, TimeoutError) as error:
            raise AssertionError(f"{path}:{number}: {error!r}") from error


async def test_a_dialog_finds_mail_that_the_index_entered_behind_its_250(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose disk is busy for longer than a 250 waits for the index."""
    await running.stop()
    monkeypatch.setattr(limits, "INDEX_BUSY_TIMEOUT_S", 0.05)
    await running.start()
    replay = Replay(running, 0)
    await replay.line("mailbox ann@local.example")
    other = sqlite3.connect(running.data / "index.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        for line in (
            "C: HELO client.example", "S: 250 *", "C: MAIL FROM:<bob@elsewhere.example>", "S: 250 *",
            "C: RCPT TO:<ann@local.example>", "S: 250 *", "C: DATA", "S: 354 *", "C: late", "C: .", "S: 250 2.6.0 *",
        ):  # fmt: skip
            await replay.line(line)
        assert running.lines("index-late"), "or the index was in time and this shows nothing"
    finally:
        other.execute("ROLLBACK")
        other.close()
    await replay.line("MAIL ann@local.example 1")
    await replay.line("HOLDS ann@local.example late\\r\\n")
