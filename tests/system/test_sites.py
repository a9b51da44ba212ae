"""Two sites that are cut from each other and come together again: both go on receiving, and nothing is lost, there twice, back
from the dead, or renumbered (P1, P5, P8, P10, P12, P14).
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.servers import Database
from tests.system.process import START_S
from tests.system.several import Several
from tests.system.sites import SITE_OF, SITES, TwoSites

ANN = "ann@local.example"
MORE = 4


class Sent:
    """What clients of one site have sent, each message another one."""

    def __init__(self, site: str, front: Several) -> None:
        self.acknowledged: list[bytes] = []
        self.unknown: list[bytes] = []  # the connection was closed without an answer: there once, or not at all (P4)
        self._site = site
        self._front = front
        self._count = 0

    async def more(self, count: int) -> None:
        """Sends until so many more were acknowledged."""
        wanted = len(self.acknowledged) + count
        async with asyncio.timeout(START_S):
            while len(self.acknowledged) < wanted:
                self._count += 1
                body = b"Subject: %d from %s\r\n\r\ntext" % (self._count, self._site.encode())
                reply = await self._front.send([ANN], body)
                assert reply == "" or reply[0] in "24", reply
                if reply.startswith("250"):
                    self.acknowledged.append(body + b"\r\n")
                elif not reply:
                    self.unknown.append(body + b"\r\n")


def uids(postgresql: Database) -> dict[int, str]:
    """UID to key, as the index has it; one number names one message."""
    rows = [line.split("\t") for line in postgresql.sql("SELECT uid, encode(key, 'hex') FROM entries").splitlines()]
    found = {int(uid): key for uid, key in rows}
    assert len(found) == len(rows) == len(set(found.values()))
    return found


async def until_in_both(front: Several, count: int) -> None:
    """Waits until each message lies in both sites, where nodes that were slow for a moment did not get it at once, and nothing
    is owed: what was deleted is gone from all nodes.
    """
    await front.until(
        "each message lies in both sites",
        lambda status: not status["in_too_few_sites"]["messages"] and not any(node["owed"] for node in status["nodes"]),
        2 * START_S,
    )
    found = await front.operation("list_messages", address=ANN)
    assert isinstance(found, dict) and found["not_redundant"] == 0, found
    assert [{SITE_OF[node] for node in message["nodes"]} for message in found["messages"]] == [set(SITES)] * count


async def shown(front: Several, wanted: set[bytes]) -> list[bytes]:
    """What ann reads there once all that is wanted is shown; until then readers may have to wait, and never see less (P7)."""
    async with asyncio.timeout(2 * START_S):
        while True:
            try:
                found = await front.read(ANN)
            except (OSError, IndexError, ValueError, AssertionError, asyncio.IncompleteReadError):
                found = []
            if wanted <= set(found):
                return found
            await asyncio.sleep(0.2)


@pytest.mark.timeout(400)  # of a busy machine: nine processes, and what waits for nodes that are silent
async def test_two_sites_go_on_apart_and_come_together(tmp_path: Path, postgresql: Database) -> None:
    sites = TwoSites(tmp_path, postgresql)
    try:
        await sites.start()
        await go_on(sites, postgresql)
    finally:
        await sites.end()


async def go_on(sites: TwoSites, postgresql: Database) -> None:
    north, south = sites.front["north"], sites.front["south"]
    sent = {site: Sent(site, sites.front[site]) for site in SITES}
    await north.mailbox(ANN)
    await asyncio.gather(*(one.more(MORE) for one in sent.values()))
    before = sent["north"].acknowledged + sent["south"].acknowledged
    assert sorted(await shown(north, set(before))) == sorted(await shown(south, set(before))) == sorted(before)
    await until_in_both(north, len(before))
    listed = await north.operation("node_list")
    assert isinstance(listed, list) and {node["id"]: node["site"] for node in listed} == SITE_OF
    assert (await south.status())["site"] == "south"
    numbers = uids(postgresql)

    sites.cut()
    await asyncio.gather(*(one.more(MORE) for one in sent.values()))
    client = await south.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<a@b.example>")
    assert (await client.ask("RCPT TO:<nobody@local.example>")).startswith("4"), "who is not known may well exist"
    client.close()
    deleted = await delete_two(north)
    assert len(deleted) == 2 and set(deleted) <= set(before)
    reader = await south.log_in(ANN)
    assert not (await reader.ask_pop("STAT")).startswith("+OK"), "an error, and no listing that is short"
    reader.close()
    await asyncio.gather(*(one.more(1) for one in sent.values()))

    sites.heal()
    for front in (north, south):
        await front.until("all nodes are back", lambda status: {n["state"] for n in status["nodes"]} == {"read-write"}, START_S)
    keepers = [p["pid"] for p in (await north.status())["processes"] if (p["process"], p["machine"]) == ("keeper", "north")]
    os.kill(keepers[0], signal.SIGKILL)  # one that begins enters at once what it leaves to a delivery for a minute
    wanted = {body for one in sent.values() for body in one.acknowledged} - set(deleted)
    allowed = wanted | {body for one in sent.values() for body in one.unknown}
    for front in (north, south):
        found = await shown(front, wanted)
        assert len(found) == len(set(found)) and set(found) <= allowed, "nothing twice, nothing that was not sent, or deleted"
    now = uids(postgresql)
    gone = set(numbers.values()) - set(now.values())
    assert len(gone) == 2
    assert {uid: key for uid, key in now.items() if uid in numbers} == {u: k for u, k in numbers.items() if k not in gone}
    assert min(set(now) - set(numbers)) > max(numbers), "what is new has new numbers"

    await until_in_both(south, len(now))
    for key in now.values():
        where = await north.operation("where", key=key)
        assert isinstance(where, dict)
        assert {SITE_OF[node] for node, state in where["copies"].items() if state == "good"} == set(SITES), where
    assert uids(postgresql) == now and set(await shown(south, wanted)) <= allowed


async def delete_two(front: Several) -> list[bytes]:
    """Ann deletes the first two that she sees."""
    first = (await shown(front, set()))[:2]
    await front.dele(ANN, 1, 2)
    return first
