"""Measures delivery and reading beside the incumbent, in one run on one machine, and prints a table.

`python -m bench` takes some minutes; `--quick` a tenth of the messages; `--alone` leaves the incumbent out. Delivered means
in the mailbox: for PowerMail when the 250 has come, for Postfix when its queue is empty and Dovecot has all. CPU is that of
all processes of a system; the load generator takes its share of the same cores. What counts are the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time

import uvloop

from bench import machine, pop
from bench.incumbent import Incumbent, installed
from bench.load import MESSAGE_4K, Plan, send
from bench.ours import MAILBOXES, PASSWORD, Server, mailbox

System = Server | Incumbent
_RECIPIENTS = [mailbox(number).encode() for number in range(MAILBOXES)]


async def deliver(name: str, system: System, door: str, connections: int, messages: int) -> float:
    """One row: messages from many connections into 1,000 mailboxes. Delivered messages a second."""
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
    print(
        f"{name:<24} {connections:>4} connections {done / took:7.0f} delivered/s  p99 of the final reply {p99:6.1f} ms  "
        f"CPU {1000 * (machine.cpu_s(system.roots()) - cpu) / done:5.2f} s per 1,000  "
        f"disk {writes / done:5.1f} writes, {octets / done / 1000:5.1f} kB a message",
        flush=True,
    )
    return done / took


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


async def ours(copies: int, scale: int) -> dict[int, float]:
    """All rows of PowerMail."""
    name = f"PowerMail R={copies}"
    server = Server(copies)
    await server.start()
    try:
        await send(Plan(server.ports["smtp"], _RECIPIENTS, 2000), 16)  # warm: every mailbox has its row
        rates = {c: await deliver(name, server, "smtp", c, (60 if c == 1 else 1000) * scale) for c in (1, 32, 128)}
        await deliver(f"{name}, LMTP", server, "lmtp", 32, 1000 * scale)
        await written(server)
        await many_recipients(name, server, MAILBOXES)
        await large(server)
        await read(name, server, 200 * scale, 200 * scale)
        return rates
    finally:
        await server.stop()


async def theirs(scale: int) -> dict[int, float]:
    """All rows of the incumbent."""
    system = Incumbent()
    await system.start()
    try:
        await asyncio.sleep(1.0)
        name = "Postfix + Dovecot"
        rates = {c: await deliver(name, system, "smtp", c, (30 if c == 1 else 200) * scale) for c in (1, 32, 128)}
        for connections in (32, 128):
            await deliver("Dovecot LMTP alone", system, "lmtp", connections, 200 * scale)
        await many_recipients(name, system, MAILBOXES)
        await read(name, system, 200 * scale, 30 * scale)
        return rates
    finally:
        await system.stop()


async def main(quick: bool, alone: bool) -> None:
    """All systems, then the ratios."""
    scale = 2 if quick else 10
    single, double = await ours(1, scale), await ours(2, scale)
    if alone:
        return
    if not installed():
        sys.exit("bench: Postfix and Dovecot are not installed, or we are not root (bench/install-system-packages; --alone)")
    other = await theirs(scale)
    for connections, rate in other.items():
        print(
            f"{connections:>4} connections: {single[connections] / rate:.1f} times the incumbent with R=1, "
            f"{double[connections] / rate:.1f} times with R=2"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures PowerMail beside Postfix and Dovecot.")
    parser.add_argument("--quick", action="store_true", help="a fifth of the messages")
    parser.add_argument("--alone", action="store_true", help="without the incumbent")
    chosen = parser.parse_args()
    uvloop.run(main(chosen.quick, chosen.alone))
