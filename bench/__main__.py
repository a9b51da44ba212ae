"""Measures delivery and reading beside the incumbent, in one run on one machine, and prints medians and ratios.

All systems run side by side and are measured by turns, in rounds. `--quick` sends fewer messages, `--alone` leaves the
incumbent out. Delivered means in the mailbox: for PowerMail when the 250 has come, for Postfix when its queue is empty and
Dovecot has all. CPU is that of all processes of a system; the load generator takes its share of the same cores. What counts
are the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from typing import NamedTuple

import uvloop

from bench import leaving, machine, pop
from bench.incumbent import Incumbent, installed
from bench.load import MESSAGE_4K, Plan, send
from bench.ours import MAILBOXES, PASSWORD, Server, mailbox

System = Server | Incumbent
_INCUMBENT = "Postfix + Dovecot"
_ROUNDS = 3
_RECIPIENTS = [mailbox(number).encode() for number in range(MAILBOXES)]


class Row(NamedTuple):
    """One run of one system."""

    rate: float  # delivered messages a second
    p99_ms: float  # of the final reply
    cpu_s: float  # per 1,000 messages
    writes: float  # of the disk, per message
    octets: float


async def deliver(system: System, door: str, connections: int, messages: int) -> Row:
    """Messages from many connections into 1,000 mailboxes."""
    plan = Plan(system.ports[door], _RECIPIENTS, messages, lmtp=door == "lmtp")
    cpu, (writes, octets) = machine.cpu_s(system.roots()), machine.disk_writes("/tmp")
    began = time.perf_counter()
    await send(plan, connections)
    await system.delivered(len(plan.latencies))
    took = time.perf_counter() - began
    assert not plan.failures, plan.failures[:3]
    done = len(plan.latencies)
    writes, octets = (after - before for after, before in zip(machine.disk_writes("/tmp"), (writes, octets), strict=True))
    p99 = statistics.quantiles(plan.latencies, n=100)[98] * 1000
    return Row(done / took, p99, 1000 * (machine.cpu_s(system.roots()) - cpu) / done, writes / done, octets / done / 1000)


def show(name: str, connections: int, rows: list[Row]) -> None:
    """The medians of the rounds."""
    middle = Row(*(statistics.median(values) for values in zip(*rows, strict=True)))
    print(
        f"{name:<24} {connections:>4} connections {middle.rate:7.0f} delivered/s ({min(row.rate for row in rows):.0f} to"
        f" {max(row.rate for row in rows):.0f})  p99 of the final reply {middle.p99_ms:6.1f} ms  CPU {middle.cpu_s:5.2f} s per"
        f" 1,000  disk {middle.writes:5.1f} writes, {middle.octets:5.1f} kB a message",
        flush=True,
    )


async def written(server: Server) -> None:
    """What one copy of a message takes in the log."""
    octets, copies = await server.log_octets()
    await send(Plan(server.ports["smtp"], _RECIPIENTS, 1000), 16)
    octets, copies = (after - before for after, before in zip(await server.log_octets(), (octets, copies), strict=True))
    print(
        f"R={server.copies}: {octets / copies:.0f} octets in the log for each copy of a message of {len(MESSAGE_4K)},"
        f" {octets / copies / len(MESSAGE_4K):.2f} times",
        flush=True,
    )


async def many_recipients(name: str, system: System, recipients: int) -> None:
    """One message to many recipients: from the end of data to the reply, and to delivery."""
    took = []
    for _ in range(5):
        plan = Plan(system.ports["smtp"], _RECIPIENTS, 1, per_message=recipients)
        began = time.perf_counter()
        await send(plan, 1)
        if isinstance(system, Incumbent):
            await system.delivered(recipients)
        assert not plan.failures, plan.failures[:3]
        took.append((time.perf_counter() - began, plan.latencies[0]))
    whole, reply = (statistics.median(values) * 1000 for values in zip(*took, strict=True))
    print(f"{name:<24} one message to {recipients} recipients: {whole:.0f} ms in all, {reply:.0f} ms after its end", flush=True)


async def large(system: Server) -> None:
    """A message of 25 MB: what memory it takes while it streams."""
    line = b"x" * 76 + b"\r\n"
    body = b"Subject: large\r\n\r\n" + line * (25_000_000 // len(line)) + b".\r\n"
    pid = system.roots()[0]
    await send(Plan(system.ports["smtp"], _RECIPIENTS, 1, body=body), 1)  # warm: buffers of the allocator
    before = machine.resident_octets(pid)
    with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as file:  # noqa: ASYNC230
        file.write("5")  # the peak is counted anew
    plan = Plan(system.ports["smtp"], _RECIPIENTS, 1, body=body)
    took = await send(plan, 1)
    assert not plan.failures, plan.failures
    peak = machine.resident_octets(pid, peak=True)
    print(
        f"R={system.copies}: a message of 25 MB in {took:.2f} s, {(peak - before) / 1e6:.1f} MB of additional memory",
        flush=True,
    )


async def read(name: str, system: System, messages: int, short: int) -> None:
    """One row of POP3: a mailbox of many messages, then short sessions of all."""
    user = mailbox(0)
    plan = Plan(system.ports["smtp"], [user.encode()], messages)
    await send(plan, 32)
    await system.delivered(messages)
    single = statistics.median([await pop.one_by_one(system.ports["pop3"], user, PASSWORD) for _ in range(3)])
    pipelined = statistics.median([await pop.pipelined(system.ports["pop3"], user, PASSWORD) for _ in range(3)])
    users = [mailbox(number) for number in range(1, MAILBOXES)]
    rate = await pop.sessions(system.ports["pop3"], users, PASSWORD, short)
    print(
        f"{name:<24} POP3: {single:.0f} messages/s one by one, {pipelined:.0f} pipelined, {rate:.0f} sessions/s",
        flush=True,
    )


async def deliveries(systems: dict[str, System], scale: int) -> None:
    """All systems by turns, in rounds: what the machine does meanwhile hits each alike. Prints medians and ratios."""
    for connections in (1, 32, 128):
        rounds: dict[str, list[Row]] = {name: [] for name in systems}
        for _ in range(_ROUNDS):
            for name, system in systems.items():
                ours = isinstance(system, Server)
                share = (60 if ours else 30) if connections == 1 else (600 if ours else 120)
                rounds[name].append(await deliver(system, "smtp", connections, share * scale))
        for name, rows in rounds.items():
            show(name, connections, rows)
        theirs = rounds.get(_INCUMBENT)
        for name, rows in rounds.items():
            if theirs is not None and name != _INCUMBENT:
                ratio = statistics.median(mine.rate / other.rate for mine, other in zip(rows, theirs, strict=True))
                print(f"{name:<24} {connections:>4} connections: {ratio:.1f} times the incumbent", flush=True)
    local: dict[str, list[Row]] = {name: [] for name in systems}
    for _ in range(_ROUNDS):
        for name, system in systems.items():
            local[name].append(await deliver(system, "lmtp", 32, (600 if isinstance(system, Server) else 200) * scale))
    for name, rows in local.items():
        show("Dovecot alone, LMTP" if name == _INCUMBENT else f"{name}, LMTP", 32, rows)


async def main(quick: bool, alone: bool) -> None:
    """All systems side by side."""
    scale = 2 if quick else 5
    systems: dict[str, System] = {f"PowerMail R={copies}": Server(copies) for copies in (1, 2)}
    if not alone:
        if not installed():
            sys.exit(
                "bench: Postfix and Dovecot are not installed, or we are not root (bench/install-system-packages; --alone)"
            )
        systems[_INCUMBENT] = Incumbent()
    try:
        for system in systems.values():
            await system.start()
        print(machine.interpreter(), flush=True)
        await asyncio.sleep(1.0)
        for system in systems.values():  # warm: every mailbox has its row
            count = 2000 if isinstance(system, Server) else 200
            await send(Plan(system.ports["smtp"], _RECIPIENTS, count), 16)
            await system.delivered(count)
        await deliveries(systems, scale)
        for name, system in systems.items():
            await many_recipients(name, system, MAILBOXES)
            if isinstance(system, Server):
                await written(system)
                await large(system)
        for name, system in systems.items():
            await read(name, system, 400 * scale, (400 if isinstance(system, Server) else 60) * scale)
        await leaving.measure(1000 * scale)
    finally:
        for system in systems.values():
            await system.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures PowerMail beside Postfix and Dovecot.")
    parser.add_argument("--quick", action="store_true", help="two fifths of the messages")
    parser.add_argument("--alone", action="store_true", help="without the incumbent")
    chosen = parser.parse_args()
    uvloop.run(main(chosen.quick, chosen.alone))
