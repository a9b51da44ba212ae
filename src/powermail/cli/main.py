"""Owns the command line's table of commands and how they reach a running or a stopped installation."""

from __future__ import annotations

import argparse
import asyncio
import gc
import getpass
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import msgspec

from powermail import __version__
from powermail.admin.control import NAME as CONTROL_NAME
from powermail.admin.control import ControlServer, NotRunning, ask
from powermail.app.compose import PowerMail
from powermail.app.core import inside
from powermail.app.setup import SETTINGS_NAME, FirstMailbox, discard, initialise, shared_disks
from powermail.base.errors import OperatorError, PowerMailError
from powermail.base.log import Event, NullLog, StreamLog
from powermail.base.settings import DATA_VARIABLE, Settings, load_file, reference_page
from powermail.base.world import World, system_world
from powermail.cli import show
from powermail.directory import password as pw

Arguments = argparse.Namespace
_IMPORT_ROWS = 2000  # rows of one transaction; as JSON they fit in one line of the control socket


def run(work: Coroutine[Any, Any, int]) -> int:
    """Runs on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


# -- reaching an installation ---------------------------------------------------------------------------------------


async def operate(arguments: Arguments, call: str, **values: Any) -> Any:
    """Calls an operation on the running server, or on the installation opened for this one call."""
    return (await operate_all(arguments, call, [values]))[0]


async def operate_all(arguments: Arguments, call: str, requests: Iterable[dict[str, Any]]) -> list[Any]:
    """The same for many calls, one after the other; a stopped installation is opened once for all."""
    data = arguments.data.rstrip("/")
    meter = show.Meter(call, enabled=not arguments.json)
    left = iter(requests)
    results: list[Any] = []
    request: dict[str, Any] | None = None
    try:
        for request in left:
            results.append(await ask(f"{data}/{CONTROL_NAME}", call, request, meter.progress))
    except NotRunning:
        assert request is not None
        settings = load_file(f"{data}/{SETTINGS_NAME}", arguments.set)
        powermail = PowerMail(system_world(NullLog()), settings, data, _die)
        try:
            await powermail.start(doors=False, workers=False)
            for values in chain([request], left):
                results.append(await powermail.operations.call(call, values, meter.progress))
        finally:
            await powermail.stop()
    finally:
        meter.close()
    return results


def _die(error: BaseException) -> None:
    sys.stderr.write(f"powermail: a storage invariant broke, stopping: {error}\n")
    os._exit(70)


def _print(arguments: Arguments, result: Any, table: Callable[[Any], None]) -> None:
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
    else:
        table(result)


# -- serving ----------------------------------------------------------------------------------------------------------


async def do_init(arguments: Arguments) -> int:
    """Makes a new installation."""
    first = await initialise(system_world(NullLog()), arguments.data, arguments.hostname)
    show.first_mailbox(arguments.data, first)
    return 0


async def do_serve(arguments: Arguments) -> int:
    """Serves until interrupted."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    data = arguments.data.rstrip("/")
    first: FirstMailbox | None = None
    if arguments.init and not os.path.exists(f"{data}/{SETTINGS_NAME}"):
        first = await initialise(system_world(NullLog()), data, "localhost")
    settings = load_file(f"{data}/{SETTINGS_NAME}", arguments.set)
    world = system_world(NullLog())
    log = StreamLog(world.clock.now, settings.log.level, settings.log.json)
    world.log = log
    powermail = PowerMail(world, settings, data, _die)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await powermail.start()
        control = ControlServer(f"{data}/{CONTROL_NAME}", powermail.operations)
        await control.start()
        _welcome(world, settings, data, powermail, first)
        await stop.wait()
        world.log.event(Event.DRAINING)
        await control.stop()
    except BaseException:
        await powermail.stop()
        log.close()
        if first is not None:
            discard(data)  # nothing half-made: its password was never shown
        raise
    await powermail.stop()
    world.log.event(Event.STOPPED)
    log.close()
    return 0


def _welcome(world: World, settings: Settings, data: str, powermail: PowerMail, first: FirstMailbox | None) -> None:
    paths = {node.id: inside(data, node.path) for node in settings.cluster.nodes}
    show.try_it(
        powermail.front.listening,
        shared_disks(world, paths),
        settings.cluster.copies_required,
        first,
        settings.hostname,
    )


# -- looking ----------------------------------------------------------------------------------------------------------


async def do_status(arguments: Arguments) -> int:
    result = await operate(arguments, "status")
    _print(arguments, result, show.status)
    return 1 if result["degraded"] else 0


async def do_list(arguments: Arguments) -> int:
    result = await operate(arguments, "list_messages", address=arguments.address)
    _print(arguments, result, show.messages)
    return 1 if result["not_redundant"] else 0


async def do_usage(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "usage", address=arguments.address), show.record)
    return 0


async def do_dir(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "dir"), show.rows)
    return 0


async def do_orphans(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "orphans"), show.rows)
    return 0


async def do_purge(arguments: Arguments) -> int:
    for account in arguments.account:
        confirm = arguments.yes and not arguments.dry_run
        result = await operate(arguments, "purge", account=account, confirm=confirm)
        _print(arguments, result, show.record)
        if result["messages"] and not result["purged"] and not arguments.json:
            print("nothing was deleted; add --yes to delete it for good")
    return 0


async def do_where(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "where", key=arguments.key), show.record)
    return 0


async def do_whatif(arguments: Arguments) -> int:
    result = await operate(arguments, "whatif", nodes=arguments.node)
    _print(arguments, result, show.record)
    return 1 if result["unreadable"]["messages"] else 0


async def do_verify(arguments: Arguments) -> int:
    result = await operate(arguments, "verify")
    _print(arguments, result, show.findings)
    return 1 if result["problems"] else 0


# -- accounts and forwards -----------------------------------------------------------------------------------------------


def _password(arguments: Arguments) -> str:
    if arguments.password_stdin:
        return sys.stdin.readline().rstrip("\n")
    if arguments.password:
        return str(arguments.password)
    return getpass.getpass("password: ") if sys.stdin.isatty() else ""


def octets(text: str) -> int:
    """`250k`, `1G` or a plain number of octets. Raises OperatorError: a quota is never read as unlimited by mistake."""
    units = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    number, unit = (text[:-1], units.get(text[-1:].lower(), 0)) if text[-1:].isalpha() else (text, 1)
    if not number.isascii() or not number.isdigit() or not unit:
        raise OperatorError(f"{text!r} is not a size like 250k, 20M or 1G")
    return int(number) * unit


async def do_account_add(arguments: Arguments) -> int:
    values = {
        "address": arguments.address,
        "password": _password(arguments),
        "quota_octets": octets(arguments.quota),
        "forward": [],
        "keep_copy": False,
    }
    _print(arguments, await operate(arguments, "account_add", **values), show.record)
    return 0


async def do_account_import(arguments: Arguments) -> int:
    """Reads JSON lines of {address, password, quota_octets, forward, keep_copy} from a file or standard input."""
    with open(arguments.file, encoding="utf-8") if arguments.file != "-" else sys.stdin as file:
        total = sum(await operate_all(arguments, "account_import", _batches(file)))
    _print(arguments, {"added": total}, show.record)
    return 0


def _batches(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    rows = (line for line in lines if line.strip())
    number = 1
    while part := list(islice(rows, _IMPORT_ROWS)):
        try:
            yield {"rows": [decode(line) for line in part]}
        except msgspec.DecodeError as error:
            raise OperatorError(f"lines {number} to {number + len(part) - 1}: {error}; those before are added") from error
        number += len(part)


async def do_account_set(arguments: Arguments) -> int:
    changes: dict[str, Any] = {}
    if arguments.quota is not None:
        changes["quota_octets"] = octets(arguments.quota)
    if arguments.enabled is not None:
        changes["enabled"] = arguments.enabled == "yes"
    if arguments.send_per_hour is not None:
        changes["send_per_hour"] = arguments.send_per_hour
    _print(arguments, await operate(arguments, "account_set", address=arguments.address, **changes), show.record)
    return 0


async def do_account_password(arguments: Arguments) -> int:
    password = _password(arguments)
    if not password:
        raise OperatorError("an empty password admits nobody; give one")
    await operate(arguments, "account_set", address=arguments.address, password=password)
    return 0


async def do_account_delete(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "account_delete", address=arguments.address), show.record)
    return 0


async def do_account_list(arguments: Arguments) -> int:
    found: list[Any] = []
    after = ""
    while page := await operate(arguments, "account_list", after=after, limit=1000):
        found += [row for row in page if row["forward"] or not arguments.forwards]
        after = page[-1]["address"]
    _print(arguments, found, show.rows)
    return 0


async def do_account_show(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "account_show", address=arguments.address), show.record)
    return 0


async def do_forward_add(arguments: Arguments) -> int:
    values = {
        "address": arguments.address,
        "password": "",
        "quota_octets": 0,
        "forward": arguments.destination,
        "keep_copy": arguments.keep_copy,
    }
    _print(arguments, await operate(arguments, "account_add", **values), show.record)
    return 0


async def do_forward_set(arguments: Arguments) -> int:
    changes = {"forward": arguments.destination, "keep_copy": arguments.keep_copy}
    _print(arguments, await operate(arguments, "account_set", address=arguments.address, **changes), show.record)
    return 0


# -- nodes and queue -------------------------------------------------------------------------------------------------------


async def do_node_list(arguments: Arguments) -> int:
    rows = await operate(arguments, "node_list")
    _print(arguments, rows, show.nodes)
    return 1 if any(row["state"] != "read-write" for row in rows) else 0


async def do_node_block(arguments: Arguments) -> int:
    for node in arguments.node:
        _print(arguments, await operate(arguments, "node_block", node=node, blocked=arguments.blocked), show.record)
    return 0


async def do_node_call(arguments: Arguments) -> int:
    result = await operate(arguments, arguments.call, node=arguments.node)
    _print(arguments, result, show.record)
    return 1 if result.get("bad") else 0


async def do_node_expel(arguments: Arguments) -> int:
    result = await operate(arguments, "node_expel", node=arguments.node, confirm=arguments.yes)
    _print(arguments, result, show.record)
    if not result["expelled"] and not arguments.json:
        print("nothing was changed; add --yes to expel it for good")
    return 0


async def do_queue_list(arguments: Arguments) -> int:
    found: list[Any] = []
    while page := await operate(arguments, "queue_list", after=found[-1]["id"] if found else 0, limit=1000):
        found += page
    _print(arguments, found, show.rows)
    return 0


async def do_queue_show(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "queue_show", number=arguments.number), show.record)
    return 0


async def do_queue_set(arguments: Arguments) -> int:
    if not arguments.number and not arguments.all:
        raise OperatorError("name rows, or --all")
    result = await operate(arguments, "queue_set", numbers=arguments.number, held=arguments.held, due=arguments.due)
    _print(arguments, result, show.record)
    return 0


async def do_queue_delete(arguments: Arguments) -> int:
    _print(arguments, await operate(arguments, "queue_delete", numbers=arguments.number), show.record)
    return 0


# -- the rest ----------------------------------------------------------------------------------------------------------------


async def do_rebuild(arguments: Arguments) -> int:
    """Makes a new index from the nodes alone; the old one must have been moved away."""
    data = arguments.data.rstrip("/")
    meter = show.Meter("rebuild", enabled=not arguments.json)
    powermail = PowerMail(system_world(NullLog()), load_file(f"{data}/{SETTINGS_NAME}", arguments.set), data, _die)
    try:
        done = await powermail.rebuild(meter.progress, arguments.without)
    finally:
        meter.close()
        await powermail.stop()
    _print(arguments, done._asdict(), show.rebuilt)
    return 1 if done.lost or done.unreadable or done.left_out else 0


async def do_demo(arguments: Arguments) -> int:
    from powermail.cli.demo import demo

    return await demo(arguments.corpus)


async def do_sim(arguments: Arguments) -> int:
    """Runs the production program in simulated worlds; the simulator is loaded for this command alone."""
    from powermail.cli.simulate import fix_hashes, simulation

    fix_hashes()
    return await simulation(arguments)


async def do_config(arguments: Arguments) -> int:
    if arguments.reference:
        print(reference_page(), end="")
        return 0
    settings = load_file(f"{arguments.data}/{SETTINGS_NAME}", arguments.set)
    print(msgspec.json.format(msgspec.json.encode(settings), indent=2).decode())
    return 0


async def do_password_hash(arguments: Arguments) -> int:
    password = _password(arguments)
    if not password:
        raise OperatorError("an empty password admits nobody; give one")
    print(pw.hash_scram(password, os.urandom(16)) if arguments.scheme == "scram-sha-256" else pw.hash_password(password))
    return 0


def parser() -> argparse.ArgumentParser:
    """The table of commands."""
    top = argparse.ArgumentParser(prog="powermail", description="Redundant mail: receive, store, forward, read.")
    top.add_argument("--version", action="version", version=f"powermail {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", default=os.environ.get(DATA_VARIABLE, "data"), help="data directory")
    common.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides a setting")
    common.add_argument("--json", action="store_true", help="print JSON")
    words = top.add_subparsers(required=True, metavar="COMMAND")

    def command(
        where: Any, name: str, work: Callable[[Arguments], Awaitable[int]], text: str, **defaults: Any
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = where.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(work=work, **defaults)
        return made

    def group(name: str, text: str) -> Any:
        return words.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="ACTION")

    def secret(made: argparse.ArgumentParser) -> None:
        made.add_argument("--password", help="visible to other users of this machine; better --password-stdin")
        made.add_argument("--password-stdin", action="store_true")

    command(words, "init", do_init, "make a new installation").add_argument("--hostname", default="localhost")
    command(words, "serve", do_serve, "serve mail").add_argument("--init", action="store_true", help="init if needed")
    made = command(words, "rebuild", do_rebuild, "make a new index from the nodes alone")
    made.add_argument("--without", action="append", default=[], metavar="NODE", help="go on although this node is away")
    made = command(words, "demo", do_demo, "show what PowerMail promises, on a throw-away installation")
    made.add_argument("--corpus", help="directory of messages (*.eml, or a messages.zip)")
    made = command(words, "sim", do_sim, "run the program in simulated worlds, with faults drawn from seeds, and check it")
    made.add_argument("--seeds", type=int, default=10, help="how many")
    made.add_argument("--first", type=int, default=0, help="the first seed")
    made.add_argument("--seconds", type=float, default=60.0, help="virtual time in which faults happen")
    made.add_argument("--only", action="append", default=[], metavar="FAULT", help="only faults of this kind; may be repeated")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    made.add_argument("--shrink", action="store_true", help="look for the shortest run that still fails")
    made.add_argument("--trace", help="file for the trace (of the last seed)")
    command(words, "status", do_status, "nodes, redundancy, queue, workers")
    for name, work, text in (
        ("list", do_list, "each message of an address and where its copies lie"),
        ("usage", do_usage, "octets used by an address"),
    ):
        command(words, name, work, text).add_argument("address")
    command(words, "dir", do_dir, "accounts that have mail")
    command(words, "orphans", do_orphans, "mail of accounts the directory no longer knows")
    made = command(words, "purge", do_purge, "delete all mail of an address or account id")
    made.add_argument("account", nargs="+")
    made.add_argument("--yes", action="store_true", help="really delete")
    made.add_argument("--dry-run", action="store_true", help="only say what would be deleted (as without --yes)")
    command(words, "where", do_where, "everything about one message").add_argument("key")
    command(words, "whatif", do_whatif, "what is lost if these nodes are lost now").add_argument("node", nargs="+")
    command(words, "verify", do_verify, "check index and every copy")
    command(words, "config", do_config, "print the settings in force").add_argument("--reference", action="store_true")

    account = group("account", "mailboxes")
    made = command(account, "add", do_account_add, "make a mailbox")
    made.add_argument("address")
    made.add_argument("--quota", default="0", help="like 250k, 20M, 1G; 0 is unlimited")
    secret(made)
    command(account, "import", do_account_import, "add many from JSON lines").add_argument("file")
    made = command(account, "set", do_account_set, "change a mailbox")
    made.add_argument("address")
    made.add_argument("--quota")
    made.add_argument("--enabled", choices=["yes", "no"])
    made.add_argument("--send-per-hour", type=int)
    made = command(account, "password", do_account_password, "set a password")
    made.add_argument("address")
    secret(made)
    command(account, "delete", do_account_delete, "remove a mailbox or forward").add_argument("address")
    command(account, "list", do_account_list, "all mailboxes and forwards", forwards=False)
    command(account, "show", do_account_show, "one mailbox or forward").add_argument("address")

    forward = group("forward", "forwards")
    for name, work, text in (("add", do_forward_add, "make a forward"), ("set", do_forward_set, "change a forward")):
        made = command(forward, name, work, text)
        made.add_argument("address")
        made.add_argument("destination", nargs="+")
        made.add_argument("--keep-copy", action="store_true")
    command(forward, "delete", do_account_delete, "remove a forward").add_argument("address")
    command(forward, "list", do_account_list, "all forwards", forwards=True)

    node = group("node", "storage nodes")
    command(node, "list", do_node_list, "all nodes")
    command(node, "block", do_node_block, "no new mail on a node", blocked=True).add_argument("node", nargs="+")
    command(node, "unblock", do_node_block, "new mail again", blocked=False).add_argument("node", nargs="+")
    for name, call, text in (
        ("scrub", "node_scrub", "read and check every copy of a node"),
        ("verify", "node_scrub", "the same as scrub"),
        ("replace", "node_replace", "make an empty disk this node's store"),
        ("confirm", "node_confirm", "confirm a held mass deletion"),
    ):
        command(node, name, do_node_call, text, call=call).add_argument("node")

    made = command(node, "expel", do_node_expel, "end the membership of a node that will not come back")
    made.add_argument("node")
    made.add_argument("--yes", action="store_true", help="really expel it; without, only say what is at risk")

    queue = group("queue", "mail that waits to leave")
    command(queue, "list", do_queue_list, "all rows")
    command(queue, "show", do_queue_show, "one row").add_argument("number", type=int)
    for name, held, due, text in (
        ("retry", None, True, "try now"),
        ("hold", True, False, "do not try until released"),
        ("release", False, True, "try again"),
    ):
        made = command(queue, name, do_queue_set, text, held=held, due=due)
        made.add_argument("number", type=int, nargs="*")
        made.add_argument("--all", action="store_true")
    command(queue, "delete", do_queue_delete, "forget without a bounce").add_argument("number", type=int, nargs="+")

    password = group("password", "password hashes")
    made = command(password, "hash", do_password_hash, "print a stored form for the directory")
    made.add_argument("--scheme", choices=["argon2id", "scram-sha-256"], default="argon2id")
    secret(made)
    return top


def main(argv: list[str] | None = None) -> int:
    """The entry point; the exit status is 0, 1 (degraded) or 2 (mistake or trouble, said in one sentence)."""
    arguments = parser().parse_args(argv)
    os.umask(0o077)  # what this program makes is nobody else's
    try:
        return run(arguments.work(arguments))
    except (OperatorError, PowerMailError) as error:
        sys.stderr.write(f"powermail: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
