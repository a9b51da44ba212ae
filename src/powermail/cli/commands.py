"""Owns the table of commands: those of the operator's table, and those that are this program's own."""

from __future__ import annotations

import getpass
import os
import shlex
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Generic, Protocol

import msgspec
from msgspec import Struct

from powermail.admin import accounts, enrolment, members, owners, queue, system
from powermail.admin.accounts import AccountFacts, AccountImport, Imported, Page
from powermail.admin.control import NotRunning, ask_any, check_place
from powermail.admin.messages import Findings, Listing, Loss, Where
from powermail.admin.nodes import NodeFacts, Scrubbed
from powermail.admin.operations import TABLE
from powermail.admin.owners import DirectoryFindings
from powermail.admin.queue import QueueFacts, QueuePage
from powermail.admin.system import Status
from powermail.admin.table import Field, Operation, Q, R, Request, fields_of, file, option, place, secret, unseen, word, yes
from powermail.base import limits
from powermail.base.errors import NoSuch, OperatorError
from powermail.base.log import NullLog
from powermail.base.secrets import shown_settings
from powermail.base.settings import SETTINGS_NAME, inside, reference_page
from powermail.base.world import system_world
from powermail.cli import backup as backups
from powermail.cli import checking, importing, joining, moving, ownership, pages, show, tracing
from powermail.cli.reach import die, prepare, reach, settings_of
from powermail.cli.words import Common, Entry, octets, seconds
from powermail.directory import password as pw
from powermail.torture.plan import Kind


@dataclass(frozen=True)
class Command(Generic[Q]):
    """One command: its words, what it is asked, and what it does; the answer is the exit status."""

    command: str
    request: type[Q]
    text: str
    run: Callable[[Common, Q], Awaitable[int]]

    def entry(self) -> Entry:
        """What the parser needs of it."""
        return Entry(self.command, self.text, fields_of(self.request))

    async def parsed(self, common: Common, values: dict[str, object]) -> int:
        """Runs it on what the parser found. Raises OperatorError."""
        given = {one.name: value for one in fields_of(self.request) if (value := _value(one, values)) is not None}
        try:
            request = msgspec.convert(given, self.request)
        except msgspec.ValidationError as error:
            raise OperatorError(f"{self.command}: {error}") from error
        return await self.run(common, request)


def _value(one: Field, values: dict[str, object]) -> object:
    """What a field is set to; None where it keeps its default."""
    value = values.get(one.name)
    if one.kind == "secret":
        return _password(values)
    if value is None:
        return None
    if one.kind == "size":
        return octets(str(value))
    if one.kind == "duration":
        return seconds(str(value))
    if one.kind == "place":
        return os.path.abspath(str(value))
    return value == "yes" if one.choice else value


def _password(values: dict[str, object]) -> str | None:
    if values.get("password_stdin"):
        return _given()
    if values.get("password"):
        return str(values["password"])
    return getpass.getpass("password: ") if sys.stdin.isatty() else None


def _given() -> str:
    """The password in the first line of standard input. Raises OperatorError: who says that one comes has one in mind."""
    try:
        line = sys.stdin.readline()
        line.encode("utf-8")
    except UnicodeError as error:
        raise OperatorError("the password on standard input is not UTF-8") from error
    if not (given := line.removesuffix("\n").removesuffix("\r")):
        raise OperatorError("no password came on standard input")
    return given


# -- telling ------------------------------------------------------------------------------------------------------------


def print_json(result: object) -> None:
    """For programs."""
    print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())


def tell(common: Common, result: object) -> int:
    """Prints a result; the exit status is 1 when it is no good news."""
    if common.json:
        print_json(result)
    elif isinstance(result, Status):
        show.status(result)
    elif isinstance(result, Listing):
        show.messages(result)
    elif isinstance(result, Findings):
        show.findings(result)
    elif isinstance(result, DirectoryFindings):
        show.doubts(result)
    elif isinstance(result, list) and result and isinstance(result[0], NodeFacts):
        show.nodes(result)
    else:
        show.anything(result)
    if not common.json and (hint := _hint(result)):
        print(hint)
    return int(_is_bad(result))


def _hint(result: object) -> str:
    if isinstance(result, owners.Purged) and result.due_at is not None:
        return f"nothing is deleted before {show.local(result.due_at)}; until then `powermail purge ... --undo` keeps it"
    if isinstance(result, owners.Purged) and not result.purged and not result.undone and result.messages:
        return "nothing was deleted; add --yes to delete it for good"
    if isinstance(result, owners.Adopted) and not result.adopted:
        return "nothing was changed; add --yes to do it"
    if isinstance(result, members.Expelled) and not result.expelled:
        return "nothing was changed; add --yes to expel it for good"
    if isinstance(result, enrolment.Refused) and not result.expelled:
        return "nothing was changed; add --yes to expel it for good"
    if isinstance(result, enrolment.Invited):
        return f"run `{result.join}` on the new machine within the hour; the token is shown only now"
    if isinstance(result, joining.Founded):
        return (
            "start the server again, then `powermail node add NAME --group GROUP` invites a machine. Keep a copy of the "
            "authority's key where no mail server is"
        )
    if isinstance(result, joining.Joined):
        return f"`{result.serve}` starts it" if result.serve and not result.renewed else ""
    if isinstance(result, backups.Restored) and not result.restored:
        return "nothing was changed; add --yes to set what is there aside and put the backup in its place"
    return ""


def _is_bad(result: object) -> bool:
    if isinstance(result, Status):
        return bool(result.degraded) or not result.running
    if isinstance(result, Listing):
        return bool(result.not_redundant)
    if isinstance(result, Findings | DirectoryFindings):
        return bool(result.problems)
    if isinstance(result, Loss):
        return bool(result.unreadable.messages)
    if isinstance(result, Scrubbed):
        return bool(result.bad)
    if isinstance(result, Where):
        return not result.known and "good" not in result.copies.values()
    if isinstance(result, list):
        return any(isinstance(row, NodeFacts) and row.state != "read-write" for row in result)
    return False


# -- commands of the operator's table -----------------------------------------------------------------------------------


def of(row: Operation[Q, R]) -> Command[Q]:
    """The command of a row: asks, and prints the answer."""

    async def run(common: Common, request: Q) -> int:
        async with reach(common) as installation:
            result = await installation.call(row, request)
            return tell(common, result)  # before what was opened is closed

    return Command(row.command, row.request, row.text, run)


async def status(common: Common, request: Request) -> int:
    """A stopped server is said to be stopped; no lock is taken and nothing is opened."""
    settings = settings_of(common)
    try:
        raw = await ask_any(common.data, "status", {}, unseen)
    except NotRunning:
        if (settings.peers.authority_at or settings.index.database) and checking.locked(common.data):
            note = (
                "a process has this data directory and answers no operator: one that serves nodes alone or gives certificates "
                "(a front end or a keeper knows how it is), one that is starting, or another command"
            )
            return tell(common, Status(running=True, degraded=[], note=note))
        roles = checking.roles_to_say(common.data, settings)
        serve = f"powermail serve{roles} --data {shlex.quote(common.data)}"
        said = [f"no server runs on {common.data}; `{serve}` starts it"]
        for node in settings.cluster.nodes:
            path = inside(common.data, node.path)
            if node.path and not os.path.exists(f"{path}/identity"):
                said.append(f"node {node.id}: no identity in {path}: is its disk mounted?")
        return tell(common, Status(running=False, degraded=said))
    return tell(common, msgspec.json.decode(raw, type=Status))


async def _pages(common: Common, wanted: Callable[[AccountFacts], bool]) -> int:
    found: list[AccountFacts] = []
    after = ""
    async with reach(common) as installation:
        while page := await installation.call(accounts.listing_row, Page(after, 1000)):
            found += [row for row in page if wanted(row)]
            after = page[-1].address
    return tell(common, found)


async def account_list(common: Common, request: Request) -> int:
    """All rows, page by page."""
    return await _pages(common, lambda row: True)


async def forward_list(common: Common, request: Request) -> int:
    """Rows with destinations."""
    return await _pages(common, lambda row: bool(row.forward))


async def queue_list(common: Common, request: QueuePage) -> int:
    """All rows that are wanted, page by page."""
    found: list[QueueFacts] = []
    async with reach(common) as installation:
        while page := await installation.call(
            queue.listing_row, msgspec.structs.replace(request, after=found[-1].id if found else 0, limit=1000)
        ):
            found += page
    return tell(common, found)


class Import(Request):
    """What `powermail account import` is asked."""

    file: Annotated[str, file("JSON lines, or CSV with a head of column names; `-` is standard input")]
    update: Annotated[bool, option("change rows that exist, in the columns that are given")] = False
    dry_run: Annotated[bool, option("only check everything")] = False
    plain: Annotated[bool, option("passwords without {scheme} are clear text: hash them")] = False


async def account_import(common: Common, request: Import) -> int:
    """Reads all of it, checks all of it, then enters it: one bad line, and nothing is changed."""
    try:
        with open(request.file, encoding="utf-8-sig") if request.file != "-" else nullcontext(sys.stdin) as source:
            rows = list(importing.read(source))
    except OSError as error:
        raise OperatorError(f"cannot read {request.file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OperatorError(f"{request.file} is not UTF-8: {error.reason}; nothing was changed") from error
    importing.refuse_twice(rows)
    parts = list(importing.parts(rows, limits.CONTROL_LINE_OCTETS_MAX // 4))
    total = Imported(0, 0, request.dry_run)
    async with reach(common) as installation:
        for dry in (True,) if request.dry_run else (True, False):
            total = Imported(0, 0, request.dry_run)
            for part in parts:
                asked = AccountImport([row for _, row in part], [n for n, _ in part], request.update, dry, request.plain)
                done = await installation.call(accounts.import_row, asked)
                total.added += done.added
                total.updated += done.updated
    return tell(common, total)


# -- commands of this program -------------------------------------------------------------------------------------------


class Init(Request):
    """A new installation."""

    hostname: Annotated[str, option("this host's name in banners and trace fields")] = "localhost"
    node: Annotated[list[str], option("NAME=PATH:GROUP, a directory on a disk of its own; may be repeated. Default: three "
                                      "in the data directory")] = msgspec.field(default_factory=list)  # fmt: skip
    without_nodes: Annotated[bool, option("for the first machine of a cluster: its nodes join on others")] = False


class Made(Struct):
    """What `init` says, once."""

    data: str
    address: str
    password: str


async def init(common: Common, request: Init) -> int:
    """Makes a new installation; as root in a directory of somebody else, it is theirs."""
    from powermail.app.setup import THREE, copies_of, initialise, parse_place

    check_place(common.data)
    if request.node and request.without_nodes:
        raise OperatorError("init: --node and --without-nodes contradict each other; nothing was made")
    places = [parse_place(text) for text in request.node] if request.node or request.without_nodes else THREE
    owner = os.stat(common.data) if os.path.isdir(common.data) else None
    first = await initialise(system_world(NullLog()), common.data, request.hostname, places)
    if owner is not None and os.geteuid() == 0 and owner.st_uid != 0:
        for path in (common.data, *(place.path for place in places if place.path.startswith("/"))):
            ownership.give(path, owner.st_uid, owner.st_gid)
    if common.json:
        print_json(Made(common.data, first.address, first.password))
    else:
        show.first_mailbox(common.data, first, len(places), copies_of(places))
    return 0


class Serve(Request):
    """`--init` makes an installation first, if there is none."""

    init: Annotated[bool, option("make an installation first, if there is none")] = False
    roles: Annotated[str, option("of front, node, keeper, authority, with commas: a process for each; or all")] = "all"


async def serve(common: Common, request: Serve) -> int:
    """Serves until interrupted: one process, or several where the settings or `--roles` ask for them."""
    from powermail.app.roles import Role, parts
    from powermail.cli.serving import serve as run

    if request.init and not os.path.exists(f"{common.data}/{SETTINGS_NAME}"):
        return await run(common, True)
    ownership.become_owner(common.data)
    settings = settings_of(common)
    plan = parts(settings, request.roles, os.cpu_count() or 1)
    if not plan:
        return await run(common, request.init)
    if len(plan) == 1 and plan[0][1] in (Role.NODE, Role.AUTHORITY):
        from powermail.cli.serving_nodes import serve_role

        return await serve_role(common, plan[0][1])
    from powermail.cli.supervising import supervise

    check_place(common.data)
    return await supervise(common, settings, plan)


async def cluster_init(common: Common, request: joining.ClusterInit) -> int:
    """Makes the authority of a cluster, and the certificate of this machine, which is its first."""
    return tell(common, joining.cluster_init(common, request))


async def cluster_demo(common: Common, request: Request) -> int:
    """Loaded for this command alone."""
    from powermail.cli.tutorial import cluster_demo as run

    return await run()


async def cluster_show(common: Common, request: Request) -> int:
    """The certificate of this machine."""
    return tell(common, joining.cluster_show(common))


async def join(common: Common, request: joining.Join) -> int:
    """Makes this machine a member of a cluster."""
    return tell(common, await joining.join(common, request))


class Rebuild(Request):
    """A new index."""

    without: Annotated[list[str], option("go on although this node is away; may be repeated")] = msgspec.field(
        default_factory=list
    )
    yes: Annotated[bool, yes("also if there is an index that can be used: it is set aside")] = False
    by_settings: Annotated[bool, option("the settings name all nodes: the layout that was kept here is lost")] = False


async def rebuild(common: Common, request: Rebuild) -> int:
    """Makes a new index from the nodes alone; one that cannot be used is set aside."""
    from powermail.app.compose import PowerMail

    powermail = PowerMail(system_world(NullLog()), prepare(common), common.data, die)
    meter = show.Meter("rebuild", enabled=not common.json)
    try:
        done = await powermail.rebuild(meter.progress, request.without, request.yes, request.by_settings)
    finally:
        meter.close()
        await powermail.stop()
    if common.json:
        print_json(done._asdict())
    else:
        show.rebuilt(done)
    return 1 if done.lost or done.unreadable or done.left_out else 0


class Place(Request):
    """A directory."""

    path: Annotated[str, place("an empty or new directory")]


async def backup(common: Common, request: Place) -> int:
    """Copies directory, index, settings, keys and certificates while serving, and reads the copy again."""
    return tell(common, await backups.backup(common, request.path))


class Restore(Request):
    """A backup to put back."""

    path: Annotated[str, place("a directory that `powermail backup` made")]
    yes: Annotated[bool, yes("set aside what is there; without, only say what would be")] = False


async def restore(common: Common, request: Restore) -> int:
    """Checks a backup, then puts it back."""
    done = await backups.restore(common, request.path, request.yes)
    return tell(common, done) or int(not done.restored)


class Demo(Request):
    """What the demo sends."""

    corpus: Annotated[str | None, option("directory of messages (*.eml, or a messages.zip)")] = None


async def demo(common: Common, request: Demo) -> int:
    """Loaded for this command alone."""
    from powermail.cli.demo import demo as run

    return await run(request.corpus)


class Sim(Request):
    """What is simulated."""

    seeds: Annotated[int, option("how many")] = 10
    first: Annotated[int, option("the first seed")] = 0
    seconds: Annotated[float, option("virtual time in which faults happen")] = 60.0
    only: Annotated[list[str], option("only faults of this kind; may be repeated")] = msgspec.field(default_factory=list)
    cluster: Annotated[bool, option("many machines on one database, instead of one process that does everything")] = False
    jobs: Annotated[int, option("processes")] = os.cpu_count() or 1
    shrink: Annotated[bool, option("look for the shortest run that still fails")] = False
    trace: Annotated[str | None, option("file for the trace (of the last seed)")] = None


async def simulate(common: Common, request: Sim) -> int:
    """The simulator is loaded for this command alone."""
    from powermail.cli.simulate import fix_hashes, simulation

    fix_hashes()
    return await simulation(request, common.json)


class Torture(Request):
    """What `powermail torture` is asked."""

    seconds: Annotated[float, option("how long there are faults; building and healing take about a minute more")] = 600.0
    seed: Annotated[int, option("of the plan, so that it can be had again")] = 0
    faults: Annotated[str, option("only these, with commas: " + ", ".join(kind.value for kind in Kind))] = ""
    clients: Annotated[int, option("how many send at the same time")] = 12
    rate: Annotated[float, option("messages a second that they send together")] = 40.0
    preload: Annotated[int, option("messages that are there before the first fault")] = 1000
    gap: Annotated[float, option("seconds without a message received that are one violation")] = 5.0
    healed: Annotated[float, option("seconds from the admission of an empty disk to full redundancy that are too many")] = 60.0
    pair: Annotated[bool, option("two PostgreSQLs under Patroni, instead of one that comes back")] = False
    keep: Annotated[bool, option("keep logs, stores and the story, also if all held")] = False


async def torture(common: Common, request: Torture) -> int:
    """Loaded for this command alone."""
    from powermail.cli.torture import torture as run

    return await run(request, common.json)


class Trace(Request):
    """Whose story."""

    what: Annotated[str, word("a message key, an address, or a Message-ID")]
    log: Annotated[str, option("file of the log, `-` is standard input; default: the journal of powermail.service")] = ""


async def trace(common: Common, request: Trace) -> int:
    """Tells what the log says of a message: taken, refused, delivered, sent, deferred, bounced."""
    if not request.what:
        raise OperatorError("trace what? a message key, an address, or a Message-ID")
    lines = list(tracing.story(tracing.read(request.log), request.what))
    if not lines:
        raise NoSuch(f"nothing in the log tells of {request.what}")
    if common.json:
        print_json(lines)
    else:
        for line in lines:
            print(show.cell(line.told()))
    return 0


class Config(Request):
    """Which page."""

    reference: Annotated[bool, option("the page of all settings, for the documentation")] = False


async def config(common: Common, request: Config) -> int:
    """The settings in force, without the secrets in them."""
    if request.reference:
        print(reference_page(), end="")
    else:
        print_json(shown_settings(settings_of(common)))
    return 0


async def config_check(common: Common, request: checking.ConfigCheck) -> int:
    """Settings, files, certificates, ports, disks, names and databases: what is wrong, and what mends it."""
    found = await checking.check(common, request)
    if common.json:
        print_json(found)
    else:
        checking.tell(found)
    return int(bool(found.findings))


class Initialised(Struct):
    """The versions of our table that were reached now; none if it was there already."""

    versions: list[int]


async def directory_init(common: Common, request: Request) -> int:
    """Makes our table in the database of the settings, or brings it on; servers may use it meanwhile."""
    from powermail.app.directories import initialise_directory

    settings = prepare(common)
    done = await initialise_directory(system_world(NullLog()), settings, common.data)
    if common.json:
        print_json(Initialised(done))
    else:
        print(f"the table accounts is at version {done[-1]} now" if done else "the table accounts is there, as it should be")
    return 0


async def index_migrate(common: Common, request: Request) -> int:
    """Makes the tables of the index in the database of the settings, or brings them on, in one transaction."""
    from powermail.app.indexes import migrate_index

    await migrate_index(system_world(NullLog()), prepare(common), common.data)
    if common.json:
        print_json({})
    else:
        print("the tables of the index are as this program needs them")
    return 0


async def index_move(common: Common, request: moving.IndexMove) -> int:
    """Moves the index into a database, or back into a file; run again it goes on."""
    return tell(common, await moving.move_index(common, request))


async def directory_move(common: Common, request: moving.DirectoryMove) -> int:
    """Moves the accounts from the file into a database; run again it goes on."""
    return tell(common, await moving.move_directory(common, request))


class PasswordHash(Request):
    """A password and the form it is to have."""

    scheme: Annotated[str, option("argon2id or scram-sha-256")] = "argon2id"
    password: Annotated[str, secret("password")] = ""


class Hashed(Struct):
    """A stored form."""

    password: str


async def password_hash(common: Common, request: PasswordHash) -> int:
    """Prints a stored form for the directory."""
    if not request.password:
        raise OperatorError("an empty password admits nobody; give one")
    if request.scheme not in ("argon2id", "scram-sha-256"):
        raise OperatorError(f"scheme {request.scheme!r} is neither argon2id nor scram-sha-256")
    scram = request.scheme == "scram-sha-256"
    stored = pw.hash_scram(request.password, os.urandom(16)) if scram else pw.hash_password(request.password)
    if common.json:
        print_json(Hashed(stored))
    else:
        print(stored)
    return 0


class Man(Request):
    """Which form."""

    markdown: Annotated[bool, option("the page of commands, for the documentation")] = False


class Shell(Request):
    """Which shell."""

    shell: Annotated[str, word("bash, zsh or fish")]


async def completion(common: Common, request: Shell) -> int:
    """A script to be read by a shell."""
    print(pages.completion(request.shell, entries()), end="")
    return 0


async def man(common: Common, request: Man) -> int:
    """A manual page in roff: `powermail man > powermail.1`."""
    print(pages.reference(entries()) if request.markdown else pages.manual(entries()), end="")
    return 0


class Runnable(Protocol):
    """A command of any request."""

    @property
    def command(self) -> str:
        """Its words."""

    def entry(self) -> Entry:
        """What the parser needs of it."""

    async def parsed(self, common: Common, values: dict[str, object]) -> int:
        """Runs it on what the parser found."""


def _all() -> list[Runnable]:
    mine: dict[str, Runnable] = {
        "status": Command("status", Request, system.status_row.text, status),
        "account_list": Command("account list", Request, accounts.listing_row.text, account_list),
        "queue_list": Command("queue list", QueuePage, queue.listing_row.text, queue_list),
    }
    return [
        Command("init", Init, "make a new installation", init),
        Command("serve", Serve, "serve mail", serve),
        *(mine.get(name) or of(row) for name, row in TABLE.items() if row.command),
        Command("account import", Import, "add or change many, from JSON lines or CSV", account_import),
        Command("forward list", Request, "all forwards", forward_list),
        Command("cluster init", joining.ClusterInit, "make an authority: the installation becomes a cluster", cluster_init),
        Command("cluster show", Request, "the certificate of this machine", cluster_show),
        Command("cluster demo", Request, "make a whole cluster on this machine, to learn by and to play with", cluster_demo),
        Command("join", joining.Join, "make this machine a member of a cluster, with a token", join),
        Command("backup", Place, "copy all but the messages, while serving", backup),
        Command("restore", Restore, "put a backup back", restore),
        Command("trace", Trace, "tell a message's story from the log", trace),
        Command("rebuild", Rebuild, "make a new index from the nodes alone", rebuild),
        Command("index migrate", Request, "make the tables of the index in a database, or bring them on", index_migrate),
        Command("index move", moving.IndexMove, "move the index of a stopped server into a database, or back", index_move),
        Command("directory init", Request, "make our table in a database, or bring it on", directory_init),
        Command("directory move", moving.DirectoryMove, "move the accounts of a stopped server to a database", directory_move),
        Command("config", Config, "print the settings in force", config),
        Command("config check", checking.ConfigCheck, "what is wrong with settings, files, ports and databases", config_check),
        Command("password hash", PasswordHash, "print a stored form for the directory", password_hash),
        Command("completion", Shell, "print a script that completes commands in a shell", completion),
        Command("man", Man, "print the manual page", man),
        Command("demo", Demo, "show what PowerMail promises, on a throw-away installation", demo),
        Command("sim", Sim, "run the program in simulated worlds, with faults drawn from seeds, and check it", simulate),
        Command("torture", Torture, "take a real cluster on this machine apart while it is used, and judge it", torture),
    ]


COMMANDS = {command.command: command for command in _all()}


def entries() -> list[Entry]:
    """What the parser, completion and the manual page are made of."""
    return [command.entry() for command in COMMANDS.values()]
