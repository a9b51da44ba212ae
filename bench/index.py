"""Owns the figures of the index alone: deliveries a second and CPU for 1,000, on SQLite or on PostgreSQL.

    python -m bench.index sqlite [--deliveries N]
    python -m bench.index postgresql://user@host/database

Batches of 64 deliveries into 1,000 mailboxes, as one front end makes them; for PostgreSQL the tables must be there, and as many
batches wait as its connections carry. CPU is this process's; what the server used is the machine's to say.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from typing import Any

from powermail.base.log import NullLog
from powermail.base.world import system_world
from powermail.index.contract import Delivery
from powermail.index.postgres import PostgresIndex
from powermail.index.sqlite import SqliteIndex
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.storage.contract import START, Position, Receipt

MAILBOXES, BATCH = 1000, 64
CLUSTER = "00" * 16


class Mail:
    """Messages that were never there before, each to a mailbox drawn from a seed."""

    def __init__(self, first: int) -> None:
        self.number = first
        self.chance = random.Random(1)

    def batch(self) -> list[Delivery]:
        return [self._one() for _ in range(BATCH)]

    def _one(self) -> Delivery:
        self.number += 1
        number, to = self.number, Target(account=f"u{self.chance.randrange(MAILBOXES)}", mailbox="INBOX")
        record = Commit(4096, f"{number:064x}", [4096], 1.8e9, Envelope("from@example.org"), [to])
        receipts = tuple(Receipt(node, f"{node}-1", Position(1, number)) for node in "ab")
        return Delivery(number.to_bytes(16, "big"), record, receipts)


async def deliver(index: Any, mail: Mail, count: int, at_once: int) -> None:
    """Enters so many; `at_once` batches are on their way."""

    async def some() -> None:
        for _ in range(count // BATCH // at_once):
            await asyncio.gather(*[index.deliver(each) for each in mail.batch()])

    index.expect(BATCH * at_once)
    await asyncio.gather(*[some() for _ in range(at_once)])
    index.expect(-BATCH * at_once)


async def measure(where: str, deliveries: int) -> None:
    """Prints one line."""
    with tempfile.TemporaryDirectory() as directory:
        shared = where != "sqlite"
        index: Any = PostgresIndex(system_world(NullLog()), where) if shared else None
        index = index or SqliteIndex(system_world(NullLog()), f"{directory}/index.db")
        await index.open(CLUSTER)
        for node, group in (("a", "north"), ("b", "south"), ("c", "west")):
            await index.admit_node(node, group, f"{node}-1", "boot", START, START)
        mail, at_once = Mail(time.time_ns()), 2 if shared else 1
        await deliver(index, mail, deliveries // 5, at_once)  # every mailbox is there, and every statement was prepared
        began, cpu = time.perf_counter(), time.process_time()
        await deliver(index, mail, deliveries, at_once)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        print(f"{deliveries / seconds:,.0f} deliveries/s, {cpu / deliveries * 1000:.4f} CPU s for 1,000")
        await index.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("where", help="sqlite, or the address of a PostgreSQL database")
    parser.add_argument("--deliveries", type=int, default=32_000)
    options = parser.parse_args()
    asyncio.run(measure(options.where, options.deliveries))


if __name__ == "__main__":
    main()
