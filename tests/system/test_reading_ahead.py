"""POP3 to a reader who goes through a mailbox: what was read ahead is answered at once, and is the same as ever."""

from __future__ import annotations

import random

import pytest

from powermail.base import limits
from tests.system.conftest import PopClient, Running


async def answers(client: PopClient, commands: list[str], pieces: list[int]) -> list[bytes]:
    """The answers to commands that are sent in pieces of these sizes, in turn."""
    data = "".join(f"{command}\r\n" for command in commands).encode()
    position = turn = 0
    while position < len(data):
        size = pieces[turn % len(pieces)]
        client.send(data[position : position + size])
        await client.writer.drain()
        position, turn = position + size, turn + 1
    found = []
    for command in commands:
        line = await client.line()
        whole = command.split()[0].upper() in ("RETR", "TOP") and line.startswith("+OK")
        found.append(line.encode() + (await client.multiline() if whole else b""))
    return found


@pytest.mark.parametrize("pieces", [[10**6], [1], [7, 64, 3], [9]])
async def test_answers_come_in_order_and_are_the_same_for_every_chunking(running: Running, pieces: list[int]) -> None:
    await running.mailbox("ann@local.example")
    sent = await running.fill(12)
    chance = random.Random(len(pieces))
    commands = [f"RETR {number}" for number in range(1, 13)]
    for command in (
        "DELE 4",
        "RETR 4",
        "NOOP",
        "retr 2",
        "RETR 02",
        "RETR 99",
        "STAT",
        "TOP 3 0",
        "DELE 9",
        "RETR 9",
        "LIST 1",
    ):
        commands.insert(chance.randrange(2, len(commands)), command)
    client = await running.log_in("ann@local.example")
    found = await answers(client, commands, pieces)
    gone: set[int] = set()
    for command, answer in zip(commands, found, strict=True):
        verb, _, argument = command.partition(" ")
        number = int(argument.split()[0]) if argument else 0
        if verb == "DELE":
            gone.add(number)
        elif verb.upper() == "RETR":
            good = 1 <= number <= 12 and number not in gone
            assert answer.startswith(b"+OK" if good else b"-ERR"), command
            assert not good or answer.endswith(sent[number - 1]), command
    client.close()


async def test_what_was_read_ahead_is_bounded_and_given_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await running.mailbox("ann@local.example")
    sent = await running.fill(8)
    for together in (limits.READ_AHEAD_ALL_OCTETS_MAX, 2 * len(sent[0]), 0):
        monkeypatch.setattr(limits, "READ_AHEAD_ALL_OCTETS_MAX", together)
        assert await running.read("ann@local.example") == sent


async def test_a_reader_that_leaves_in_the_middle_leaves_nothing_in_memory(running: Running) -> None:
    from powermail.mailbox.maildrop import Maildrops

    await running.mailbox("ann@local.example")
    await running.fill(8)
    account = await running.powermail.core.directory.find("ann@local.example")
    assert account is not None
    core = running.powermail.core
    drops = Maildrops(core.index, core.opener, running.powermail.front.sessions)
    drop = await drops.open(account.id)
    await drop.load()
    assert await drop.whole(1) is not None
    assert drops.ahead_octets > 0
    assert drop.ready(2) is not None
    assert drop.ready(2) is None, "each is given once"
    drop.mark(3)
    assert drop.ready(3) is None
    drop.release()
    assert drops.ahead_octets == 0
