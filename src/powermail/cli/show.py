"""Owns how results look to people: tables, meters, the welcome of a new server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from powermail.app.setup import FirstMailbox

_console = Console(highlight=False)


class Meter:
    """A progress bar that appears with the first report."""

    def __init__(self, name: str, enabled: bool = True) -> None:
        self._name = name
        self._enabled = enabled and _console.is_terminal
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    async def progress(self, done: int, total: int) -> None:
        """Shows how far a long operation is."""
        if not self._enabled:
            return
        if self._bar is None:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                                 TimeRemainingColumn(), console=_console, transient=True)  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(_cell(item) for item in value) or "-"
    if isinstance(value, dict):
        return " ".join(f"{k}={_cell(v)}" for k, v in value.items()) or "-"
    return "".join(c if c.isprintable() else "?" for c in str(value))


def size(count: int) -> str:
    """Octets for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def rows(found: list[dict[str, Any]]) -> None:
    """A table of records of one kind."""
    if not found:
        _console.print("none")
        return
    table = Table(box=None, pad_edge=False)
    for name in found[0]:
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(*(_cell(value) for value in row.values()))
    _console.print(table, markup=False)


def record(facts: dict[str, Any]) -> None:
    """One record, a fact a line."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        _console.print(f"{name.ljust(width)}  {_cell(value)}", markup=False)


def messages(result: dict[str, Any]) -> None:
    """`powermail list`."""
    for message in result["messages"]:
        at = datetime.fromtimestamp(message["received_at"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        warning = "" if message["redundant"] else "  NOT REDUNDANT"
        warning += "" if message["readable"] else "  UNREADABLE NOW"
        copies = " ".join(message["nodes"]) or "-"
        _console.print(
            f"{message['uid']:>8}  {message['key']}  {size(message['octets']):>10}  {at}  "
            f"nodes: {copies}  groups: {' '.join(message['groups'])}{warning}",
            markup=False,
            soft_wrap=True,
        )
    total = len(result["messages"])
    share = 100 * result["not_redundant"] / total if total else 0.0
    _console.print(f"{total} messages, {result['not_redundant']} not redundant ({share:.1f} %)")


def nodes(found: list[dict[str, Any]]) -> None:
    """A table of nodes."""
    table = Table(box=None, pad_edge=False)
    for name in ("node", "group", "priority", "state", "messages", "live", "log", "free", "damaged", "owed", "probe"):
        table.add_column(name)
    for row in found:
        state = row["state"] + (f" ({row['reason']})" if row["reason"] else "") + (" slow" if row["slow"] else "")
        table.add_row(
            row["id"], row["group"], str(row["priority"]), state, str(row["messages"]), size(row["live_octets"]),
            size(row["log_octets"]), size(row["free_octets"]), str(row["damaged"]), str(row["owed"]),
            f"{row['probe_ms']} ms",
        )  # fmt: skip
    _console.print(table, markup=False)


def status(result: dict[str, Any]) -> None:
    """`powermail status`."""
    nodes(result["nodes"])
    _console.print()
    thin = result["not_redundant"]
    left = f", about {thin['seconds_left']} s to full redundancy" if thin["seconds_left"] is not None else ""
    _console.print(f"copies required  {result['copies_required']}    takes mail  {_cell(result['takes_mail'])}")
    _console.print(f"not redundant    {thin['messages']} messages, {size(thin['octets'])}{left}")
    _console.print(f"totals           {_cell(result['totals'])}", markup=False)
    _console.print(f"connections      {_cell(result['connections'])}", markup=False)
    for worker in result["workers"]:
        text = f"{worker['status']}, {worker['units']} units, {worker['errors']} errors"
        _console.print(f"worker           {worker['name'].ljust(12)} {text}", markup=False)
    for problem in result["degraded"]:
        _console.print(f"DEGRADED         {problem}", markup=False)
    if not result["degraded"]:
        _console.print("healthy")


def rebuilt(result: dict[str, Any]) -> None:
    """`powermail rebuild`: the figures, then by name what could not be had."""
    record({name: value for name, value in result.items() if not isinstance(value, tuple | list)})
    for account, mailbox, uid, key in result["lost"]:
        _console.print(f"lost: account {account}, {mailbox}, UID {uid}, message {key}", markup=False, soft_wrap=True)
    for key in result["unreadable_keys"]:
        _console.print(f"unreadable: message {key}", markup=False, soft_wrap=True)
    for what in result["left_out"]:
        _console.print(f"left out: {what}", markup=False, soft_wrap=True)


def findings(result: dict[str, Any]) -> None:
    """`powermail verify`."""
    for problem in result["problems"]:
        _console.print(problem, markup=False, soft_wrap=True)
    _console.print(f"{result['messages']} messages checked, {len(result['problems'])} problems")


def first_mailbox(data: str, first: FirstMailbox) -> None:
    """What `init` says, once."""
    _console.print(f"made {data} with three storage nodes and two copies of each message", markup=False)
    _console.print(
        f"first mailbox  {first.address}\npassword       {first.password}   (shown only now)", markup=False, soft_wrap=True
    )


def try_it(ports: dict[str, int], shared: list[list[str]], copies: int, first: FirstMailbox | None, hostname: str) -> None:
    """The welcome: where it listens and what to paste."""
    listening = ", ".join(f"{name} {port}" for name, port in ports.items())
    _console.print(f"PowerMail is ready: {listening}", markup=False, soft_wrap=True)
    for names in shared:
        _console.print(
            f"note: nodes {', '.join(names)} share one disk. {copies} copies protect from damage there, not from its loss.",
            markup=False,
            soft_wrap=True,
        )
    address = first.address if first else f"postmaster@{hostname}"
    password = first.password if first else "PASSWORD"
    if first:
        _console.print(
            f"first mailbox: {first.address}  password: {first.password}  (shown only now)", markup=False, soft_wrap=True
        )
    _console.print("try it now, in another terminal:", markup=False)
    _console.print(
        f"  printf 'From: me@example.org\\r\\nSubject: hello\\r\\n\\r\\nIt works.\\r\\n' | curl -sS "
        f"smtp://127.0.0.1:{ports.get('smtp', 0)} --mail-from me@example.org --mail-rcpt {address} -T -\n"
        f"  curl -sSk --user '{address}:{password}' pop3s://127.0.0.1:{ports.get('pop3s', 0)}/1\n"
        f"  .venv/bin/powermail list {address}",
        markup=False,
        soft_wrap=True,
    )
    _console.print("Ctrl-C drains and stops.", markup=False)
