"""Owns how results look to people: tables as wide as they are, one record a line, local times, the meter, the welcome."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from powermail.admin.messages import Findings, Listing
from powermail.admin.nodes import NodeFacts
from powermail.admin.owners import DirectoryFindings
from powermail.admin.system import Status

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from powermail.app.setup import FirstMailbox
    from powermail.keeper.rebuild import Rebuilt


class Meter:
    """A progress bar that appears with the first report, at a terminal only."""

    def __init__(self, name: str, enabled: bool = True) -> None:
        self._name = name
        self._enabled = enabled and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    async def progress(self, done: int, total: int) -> None:
        """Shows how far a long operation is."""
        if not self._enabled:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                                 TimeRemainingColumn(), console=Console(stderr=True), transient=True)  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


def note(text: str) -> None:
    """Something beside the result, for whoever looks on."""
    sys.stderr.write(f"powermail: {text}\n")


def local(at: datetime) -> str:
    """A time as people here read it."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def cell(value: object) -> str:
    """A value on one line; what cannot be printed is a question mark."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return local(value)
    if isinstance(value, list | tuple):
        return " ".join(cell(item) for item in value) or "-"
    if isinstance(value, dict):
        return " ".join(f"{name}={cell(one)}" for name, one in value.items()) or "-"
    if isinstance(value, Struct):
        return cell(dict(_items(value)))
    return "".join(c if c.isprintable() else "?" for c in str(value)) or "-"


def _items(facts: Struct) -> list[tuple[str, object]]:
    """Names and values of a record, as they are named for programs."""
    names = [field.encode_name for field in msgspec.structs.fields(facts)]
    return list(zip(names, msgspec.structs.asdict(facts).values(), strict=True))


def size(count: int) -> str:
    """Octets for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns side by side, as wide as they are: nothing is folded or cut, whatever it is printed on."""
    widths = [max(len(name), *(len(line[at]) for line in lines)) for at, name in enumerate(names)]
    for line in (names, *lines):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def rows(found: Sequence[Struct]) -> None:
    """A table of records of one kind."""
    if not found:
        print("none")
        return
    names = [name for name, _ in _items(found[0])]
    table(names, [[cell(value) for _, value in _items(row)] for row in found])


def record(facts: Struct) -> None:
    """One record, a fact a line; records that it holds follow as a table."""
    held = {name: value for name, value in _items(facts) if isinstance(value, list) and value and isinstance(value[0], Struct)}
    facts_of([(name, value) for name, value in _items(facts) if name not in held])
    for name, value in held.items():
        print(f"\n{name}:")
        rows(value)


def facts_of(items: Sequence[tuple[str, object]]) -> None:
    """Names and values, one a line."""
    width = max(len(name) for name, _ in items)
    for name, value in items:
        print(f"{name.ljust(width)}  {cell(value)}")


def anything(result: object) -> None:
    """A record, or a table of records."""
    if isinstance(result, list):
        rows(result)
    elif isinstance(result, Struct):
        record(result)
    else:
        print(cell(result))


def messages(result: Listing) -> None:
    """`powermail list`."""
    for message in result.messages:
        warning = "" if message.redundant else "  NOT REDUNDANT"
        warning += "" if message.readable else "  UNREADABLE NOW"
        copies = " ".join(message.nodes) or "-"
        print(
            f"{message.uid:>8}  {message.key}  {size(message.octets):>10}  {local(message.received_at)}  "
            f"nodes: {copies}  groups: {' '.join(message.groups)}{warning}"
        )
    total = len(result.messages)
    share = 100 * result.not_redundant / total if total else 0.0
    print(f"{total} messages, {result.not_redundant} not redundant ({share:.1f} %)")


def nodes(found: Sequence[NodeFacts]) -> None:
    """A table of nodes: figures first, the reason last."""
    names = ("node", "group", "site", "priority", "state", "messages", "live", "log", "free", "damaged", "bad copies", "owed",
             "probe", "reason")  # fmt: skip
    lines = [
        (
            row.id, row.group, cell(row.site), str(row.priority), _doing(row), str(row.messages),
            size(row.live_octets), size(row.log_octets), size(row.free_octets), str(row.damaged),
            f"{row.bad_copies}, last {local(row.bad_copy_at)}" if row.bad_copy_at else "0", cell(row.owed),
            f"{row.probe_ms} ms", cell(row.reason or "-"),
        )
        for row in found
    ]  # fmt: skip
    table(names, lines)


def _doing(row: NodeFacts) -> str:
    """The state; also of one that is well, and is given no mail yet."""
    waits = row.state == "read-write" and not row.takes_mail
    return row.state + (" slow" if row.slow else "") + (", takes no mail yet" if waits else "")


def status(result: Status) -> None:
    """`powermail status`."""
    if not result.running and not result.nodes:
        for problem in result.degraded:
            print(f"STOPPED          {cell(problem)}")
        return
    if result.note:
        print(cell(result.note))
        return
    nodes(result.nodes)
    thin = result.not_redundant
    left = f", about {thin.seconds_left} s to full redundancy" if thin.seconds_left is not None else ""
    print(f"\ncopies required  {result.copies_required}    takes mail  {cell(result.takes_mail)}")
    print(f"not redundant    {thin.messages} messages, {size(thin.octets)}{left}")
    if result.site or result.in_too_few_sites.messages:
        few = result.in_too_few_sites
        print(f"site             {cell(result.site)}; {few.messages} messages, {size(few.octets)}, lie in too few sites")
    print(f"totals           {cell(result.totals)}")
    print(f"connections      {cell(result.connections)}")
    if result.certificate_days_left is not None:
        print(f"certificate      {result.certificate_days_left} days left in the cluster")
    _processes(result)
    for move in result.moves:
        left = f", about {move.seconds_left} s left" if move.seconds_left is not None else ""
        why = f": {cell(move.note)}" if move.note else ""
        print(f"move             {move.name}, {move.phase}, {move.percent} % ({move.done} of {move.total} copies){left}{why}")
    for worker in result.workers:
        print(f"worker           {worker.name.ljust(12)} {cell(worker.status)}, {worker.units} units, {worker.errors} errors")
    for problem in result.degraded:
        print(f"DEGRADED         {cell(problem)}")
    if not result.degraded:
        print("healthy")


def _processes(result: Status) -> None:
    """The cluster's processes, who does what, and the nodes as keepers have noted them; nothing where all is one process."""
    if not result.processes:
        return
    print()
    lines = [
        (one.process + (" (here)" if one.here else ""), one.machine, str(one.pid), one.version, local(one.since),
         f"{one.silent_s:.0f} s ago", one.died)
        for one in result.processes
    ]  # fmt: skip
    table(("process", "machine", "pid", "version", "since", "heard", "died before"), lines)
    by_process: dict[str, list[str]] = {}
    for job in result.jobs:
        by_process.setdefault(f"{job.process} on {job.machine} (pid {job.pid})", []).append(job.job)
    for who, jobs in by_process.items():
        print(f"jobs             {cell(who)}: {', '.join(cell(job) for job in jobs)}")
    for member in result.members:
        said = [word for word, holds in (("blocked", member.blocked), ("owes a walk", member.owes_walk)) if holds]
        said += [] if member.compared else ["not compared yet"]
        said += [f"missing since {local(member.missing_since)}"] if member.missing_since else []
        print(f"member           {cell(member.id)}: {', '.join(said) or 'there'}")
    print()


def parts(names: Sequence[str], ports: dict[str, int]) -> None:
    """The welcome of several processes."""
    print(f"PowerMail is ready: {', '.join(f'{name} {port}' for name, port in ports.items()) or 'no doors here'}")
    print(f"processes: {', '.join(names)}; SIGHUP replaces front ends and keepers one after the other")
    print("Ctrl-C drains and stops.", flush=True)


def rebuilt(result: Rebuilt) -> None:
    """`powermail rebuild`: the figures, then by name what could not be had."""
    facts_of([(name, value) for name, value in result._asdict().items() if not isinstance(value, tuple | list | str)])
    if result.began_anew:
        print(cell(result.began_anew))
    for account, mailbox, uid, key in result.lost:
        print(f"lost: account {account}, {cell(mailbox)}, UID {uid}, message {key}")
    for key in result.unreadable_keys:
        print(f"unreadable: message {key}")
    for what in result.left_out:
        print(f"left out: {cell(what)}")


def findings(result: Findings) -> None:
    """`powermail verify`."""
    for problem in result.problems:
        print(cell(problem))
    print(f"{result.messages} messages checked, {result.wrong} with problems, {len(result.problems)} findings")


def doubts(result: DirectoryFindings) -> None:
    """`powermail directory check`."""
    for doubt in result.problems:
        print(f"{cell(doubt.address)}: {cell(doubt.problem)}" if doubt.address else cell(doubt.problem))
    print(f"{result.rows} rows checked, {len(result.problems)} problems")


def first_mailbox(data: str, first: FirstMailbox, nodes: int, copies: int) -> None:
    """What `init` says, once."""
    print(f"made {data} with {nodes or 'no'} storage nodes and {copies} copies of each message")
    print(f"first mailbox  {first.address}\npassword       {first.password}   (shown only now)")
    if nodes:
        print(f"start it with  powermail serve --data {shlex.quote(data)}")
    else:
        print(f"go on with     powermail cluster init --data {shlex.quote(data)}")


def try_it(
    ports: dict[str, int], hosts: dict[str, str], shared: list[list[str]], copies: int, first: FirstMailbox | None,
    hostname: str, data: str, command: str,
) -> None:  # fmt: skip
    """The welcome: where it listens and what to paste where it is read; lines for closed doors are left out."""
    print(f"PowerMail is ready: {', '.join(f'{name} {port}' for name, port in ports.items())}")
    for names in shared:
        print(f"note: nodes {', '.join(names)} share one disk. {copies} copies protect from damage there, not from its loss.")
    address = first.address if first else f"postmaster@{hostname}"
    password = first.password if first else "PASSWORD"
    if first:
        print(f"first mailbox: {first.address}  password: {first.password}  (shown only now)")
    print("try it now, in another terminal:")
    if "smtp" in ports:
        print(
            "  printf 'From: me@example.org\\r\\nSubject: hello\\r\\n\\r\\nIt works.\\r\\n' | curl -sS "
            f"smtp://{hosts['smtp']}:{ports['smtp']} --mail-from me@example.org --mail-rcpt {address} -T -"
        )
    if "pop3s" in ports:
        print(f"  curl -sSk --user '{address}:{password}' pop3s://{hosts['pop3s']}:{ports['pop3s']}/1")
    print(f"  {command} list {shlex.quote(address)} --data {shlex.quote(data)}")
    print("Ctrl-C drains and stops.", flush=True)
