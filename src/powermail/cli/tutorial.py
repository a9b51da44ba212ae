"""Owns `powermail cluster demo`: a whole cluster on this machine, made by the commands that a newcomer would type.

What it prints is the tutorial: each command as it is run, with what it says, and at the end what to try. All machines are
directories and addresses of the loopback (127.0.N.x); PostgreSQL is one of its own, reached by its socket alone, in a directory
that nobody else may enter. It ends what it started and nothing else, also when it is killed itself (prctl(2),
PR_SET_PDEATHSIG, where there is setpriv).
"""

from __future__ import annotations

import asyncio
import glob
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.log import NullLog
from powermail.base.world import system_world
from powermail.cli.ground import Ground, Loopback

NODES, FRONTS = {"a": 11, "b": 12, "c": 13}, {"front-1": 21, "front-2": 22}  # name to the last number of the address
SMTP, POPS = 2525, 2995
_DOORS = (2700, 2701, SMTP, POPS)
_REPAIR_S = 20  # instead of minutes: who looks on does not wait so long
_TAIL = 2000  # characters of what one says that failed
_SHOWN = 4  # lines of what a command says; the tables that `index move` compares are more
_POSTGRES_LEAST = 15
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")
_START_S = 90.0
_SYSTEM_USER = "postgres"  # PostgreSQL refuses to run as root


class Trial(NamedTuple):
    """What a newcomer may try, in lines for a shell."""

    title: str
    lines: list[str]


Run = Callable[[Sequence[str], str], Awaitable[tuple[int, str]]]  # words and where: the exit status, and what was said
Say = Callable[[str], None]


def _say(text: str) -> None:
    print(text, flush=True)


class Served:
    """One process of the cluster that serves until it is ended."""

    def __init__(self, process: asyncio.subprocess.Process, words: Sequence[str], end_by: signal.Signals) -> None:
        self.process = process
        self.words = words
        self.end_by = end_by

    async def end(self) -> None:
        """As an operator would; SIGKILL to one that does not end."""
        if self.process.returncode is not None:
            return
        self.process.send_signal(self.end_by)
        try:
            async with asyncio.timeout(limits.WORKER_LEAVE_S + 2 * limits.DRAIN_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def run(words: Sequence[str], where: str) -> tuple[int, str]:
    """Runs a program to its end, which is also ours."""
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=where,
        start_new_session=True,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said = (await process.communicate())[0].decode("utf-8", "replace")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said


async def run_ours(words: Sequence[str], where: str) -> tuple[int, str]:
    """Runs a command of this program."""
    return await run([sys.executable, "-m", "powermail", *words], where)


class Tutorial:
    """The cluster, step by step."""

    def __init__(self, root: str, run_ours: Run, ground: Ground | None = None, say: Say = _say, leash: str = "TERM") -> None:
        """`root` is an empty directory through which everybody may pass; `run_ours` runs a `powermail` command; `say` hears
        the story; `leash` is what machines get when we die.
        """
        self._root = root
        self._run_ours = run_ours
        self.ground = ground or Loopback(_DOORS, (1, *NODES.values(), *FRONTS.values()))
        self._say = say
        self._leash = leash
        self.served: dict[str, Served] = {}  # by the name of the machine
        self._ears: dict[str, tuple[socket.socket, asyncio.Event]] = {}  # those that are not ready yet
        self._net = self.ground.net
        self._address = self._password = ""
        self.database = ""  # the address of the central database

    # -- tools ----------------------------------------------------------------------------------------------------

    async def _command(self, shown: str, *words: str) -> None:
        """Runs a command of PostgreSQL to its end. Raises OperatorError."""
        self._say(f"$ {shown}")
        status, said = await run(words, self._root)
        if status:
            raise OperatorError(f"{shown}: {said.strip()[-_TAIL:]}")

    async def _powermail(self, *words: str, quiet: bool = False) -> str:
        """The same for a command of ours, which shows what it says: that is returned."""
        shown = shlex.join(["powermail", *words])
        self._say(f"$ {shown}")
        status, said = await self._run_ours(words, self._root)
        if status:
            raise OperatorError(f"{shown}: {said.strip()[-_TAIL:]}")
        lines = [] if quiet else said.rstrip().splitlines()
        for line in lines[:_SHOWN]:
            self._say(f"    {line}".rstrip())
        if len(lines) > _SHOWN:
            self._say(f"    ... {len(lines) - _SHOWN} more lines")
        return said

    async def _start(self, name: str, words: Sequence[str], end_by: signal.Signals, shown: str, ready: str = "") -> Served:
        """Starts what serves, in a session of its own: Ctrl-C is for us alone. `ready`: a socket that hears when it is."""
        served = await self._spawn(name, [*self.ground.enter(name), *words], end_by, ready)
        self._say(f"$ {shown} &    # process {served.process.pid}, log in {name}.log")
        return served

    async def _spawn(self, name: str, words: Sequence[str], end_by: signal.Signals, ready: str = "") -> Served:
        environment = dict(os.environ, NOTIFY_SOCKET=ready) if ready else dict(os.environ)
        with open(f"{self._root}/{name}.log", "ab") as log:
            process = await asyncio.create_subprocess_exec(
                *words,
                cwd=self._root,
                env=environment,
                start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.served[name] = served = Served(process, words, end_by)
        return served

    async def again(self, name: str) -> None:
        """Starts a machine that has ended, as it was started before; it is not waited for."""
        before = self.served[name]
        await self._spawn(name, before.words, before.end_by)

    def _log_of(self, name: str) -> str:
        return Path(f"{self._root}/{name}.log").read_text(encoding="utf-8", errors="replace")[-_TAIL:]

    async def _serve(self, name: str, *words: str) -> None:
        """Starts `powermail serve`; `_ready` waits for it."""
        path, heard = f"{self._root}/{name}.ready", asyncio.Event()
        ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        ear.bind(path)
        asyncio.get_running_loop().add_reader(ear, heard.set)
        self._ears[name] = ear, heard
        command = ["serve", *words, "--data", name]
        ours = [*_leash(self._leash), sys.executable, "-m", "powermail", *command]
        await self._start(name, ours, signal.SIGTERM, shlex.join(["powermail", *command]), path)

    async def _ready(self) -> None:
        """Waits until all that was started has said that it is ready (sd_notify(3)). Raises OperatorError."""
        try:
            for name, (_, heard) in self._ears.items():
                waits = [asyncio.ensure_future(heard.wait()), asyncio.ensure_future(self.served[name].process.wait())]
                await asyncio.wait(waits, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if not heard.is_set():
                    raise OperatorError(f"powermail serve --data {name} did not get ready:\n{self._log_of(name)}")
        finally:
            self.close()

    def close(self) -> None:
        """Waits for nobody any more."""
        for ear, _ in self._ears.values():
            asyncio.get_running_loop().remove_reader(ear)
            ear.close()
        self._ears.clear()

    def _at(self, number: int, port: int) -> str:
        return f"{self._net}.{number}:{port}"

    # -- the story ------------------------------------------------------------------------------------------------

    async def build(self) -> list[Trial]:
        """From nothing to a cluster; what to try then. Raises OperatorError."""
        self._say(f"# all of it lies in {self._root}; on machines of your own each directory is one of them")
        database = await self._make_database()
        await self._make_head(database)
        self._say("\n# storage nodes: three machines, each with a disk, in three failure domains. A token is good once")
        for name in NODES:
            await self._join_node(name)
        await self._ready()
        self._say(
            "\n# front ends: they take mail and serve mailboxes, and keep nothing. What all have in common they get by joining"
        )
        for name in FRONTS:
            await self._join_front(name)
        await self._ready()
        self._say("")
        await self._powermail("node", "list", "--data", "head")
        return self._trials()

    async def _make_database(self) -> str:
        """A PostgreSQL of its own; the address of its database."""
        self._say("\n# the central database. In earnest: one that is replicated, postgresql://powermail@db1,db2/powermail")
        programs, user = postgres_programs(), _user()
        place = f"{self._root}/postgresql"
        os.mkdir(place, 0o700)
        if user:
            found = pwd.getpwnam(user)
            os.chown(place, found.pw_uid, found.pw_gid)
        made = ["-D", "postgresql/data", "-U", "powermail", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        await self._command(shlex.join(["initdb", *made]), *_as(user), f"{programs}/initdb", *made)
        host = self.ground.database(place)
        if host:
            with open(f"{place}/data/pg_hba.conf", "a", encoding="ascii") as file:
                file.write(f"host all powermail {self._net}.0/24 trust\n")
        options = ["-D", "postgresql/data", "-c", f"listen_addresses={host}", "-k", place]
        words = [*_leash("INT" if self._leash == "TERM" else self._leash, user), f"{programs}/postgres", *options]
        server = await self._start("postgresql", words, signal.SIGINT, shlex.join(["postgres", *options]))
        async with asyncio.timeout(_START_S):
            while (await run([f"{programs}/pg_isready", "-q", "-h", place], self._root))[0]:
                if server.process.returncode is not None:
                    raise OperatorError(f"PostgreSQL ended:\n{self._log_of('postgresql')}")
                await asyncio.sleep(0.05)
        create = "CREATE DATABASE powermail ENCODING 'UTF8' TEMPLATE template0"
        whose = ["-q", "-h", place, "-U", "powermail", "-d", "postgres", "-c"]
        await self._command(f'psql {shlex.join(whose)} "{create}"', f"{programs}/psql", *whose, create)
        self.database = f"postgresql://powermail@{host or quote(place, safe='')}/powermail"
        return self.database

    async def _make_head(self, database: str) -> None:
        """The first machine: it has the authority, and a keeper."""
        self._say("\n# the first machine: it has the authority, which makes members, and a keeper, which repairs and deletes")
        said = await self._powermail("init", "--without-nodes", "--hostname", "mail.example", "--data", "head")
        self._address, self._password = _fact(said, "first mailbox"), _fact(said, "password")
        await self._powermail("cluster", "init", "--id", "head", "--listen", self._at(1, 2701), "--data", "head")
        await self._powermail("index", "move", "--to", database, "--data", "head")
        await self._powermail("directory", "move", "--to", database, "--data", "head")
        await self._serve("head", "--roles", "keeper,authority", "--set", f"cluster.repair_after_s={_REPAIR_S}")
        await self._ready()

    async def _join(self, invitation: str, name: str, *words: str) -> None:
        """On the new machine, as the invitation says."""
        command = shlex.split(_fact(invitation, "join"))[1:]
        await self._powermail(*command, *words, "--data", name)

    async def _join_node(self, node: str) -> None:
        words = ["--group", f"rack-{node}", "--address", self._at(NODES[node], 2700)]
        invitation = await self._powermail("node", "add", node, *words, "--data", "head", quiet=True)
        await self._join(invitation, f"node-{node}")
        await self._serve(f"node-{node}", "--roles", "node")

    async def _join_front(self, name: str) -> None:
        invitation = await self._powermail("cluster", "admit", name, "--data", "head", quiet=True)
        await self._join(invitation, name, "--hostname", f"{name}.example")
        smtp, pop = self._at(FRONTS[name], SMTP), self._at(FRONTS[name], POPS)
        lines = ["", "[smtp]", f'listen = ["{smtp}"]', "submission = []", "submissions = []", "lmtp = []"]
        text = "\n".join([*lines, "[pop]", "listen = []", f'listen_tls = ["{pop}"]', ""])
        self._say(f"$ cat >> {name}/powermail.toml <<END{text}END")
        with open(f"{self._root}/{name}/powermail.toml", "a", encoding="utf-8") as file:
            file.write(text)
        await self._serve(name, "--roles", "front")

    def _trials(self) -> list[Trial]:
        one, other = (self._at(number, port) for number, port in zip(FRONTS.values(), (SMTP, POPS), strict=True))
        mail = "From: me@example.org\\r\\nSubject: hello\\r\\n\\r\\nIt works.\\r\\n"
        send = f"printf '{mail}' | curl -sS smtp://{one} --mail-from me@example.org --mail-rcpt {self._address} -T -"
        killed, serve = self.served["node-b"].process.pid, "powermail serve --roles node --data node-b"
        return [
            Trial(
                "send a message to one front end, and read it from the other",
                [send, f"curl -sSk --user '{self._address}:{self._password}' pop3s://{other}/1"],
            ),
            Trial(
                "see where it lies, and how everything is",
                [f"powermail list {self._address} --data head", "powermail status --data head"],
            ),
            Trial(
                f"kill a node machine: mail is taken and read as before, and what it had is copied after {_REPAIR_S} s",
                [f"kill -9 {killed}", "powermail status --data head"],
            ),
            Trial(
                "let it come back with an empty disk in the place of its own",
                [f"rm -r node-b/nodes/b; mkdir node-b/nodes/b; {serve} &", "powermail node replace b --data head"],
            ),
            Trial(
                "empty a node, look how far it is, and take it out",
                [f"powermail {words} --data head" for words in ("node drain c", "moves", "node remove c --yes")],
            ),
        ]

    # -- the end --------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Says of each process that it ended, until all have."""

        async def one(name: str, served: Served) -> None:
            status = await served.process.wait()
            self._say(f"{name} ended: {signal.Signals(-status).name if status < 0 else f'exit status {status}'}")

        await asyncio.gather(*(one(name, served) for name, served in self.served.items()))

    async def end(self) -> None:
        """Ends all. Who needs others goes before them: front ends, the first machine, nodes, the database."""
        self.close()
        for kind in ("front", "head", "node", "postgresql"):
            await asyncio.gather(*(served.end() for name, served in self.served.items() if name.startswith(kind)))

    def still_served(self) -> list[str]:
        """Machines that somebody else serves by now: started again in another terminal."""
        disk, found = system_world(NullLog()).disk, []
        for name in self.served:
            if os.path.exists(f"{self._root}/{name}/lock"):
                try:
                    disk.lock(f"{self._root}/{name}/lock").release()
                except BlockingIOError:
                    found.append(name)
        return found


# -- this machine -----------------------------------------------------------------------------------------------------


def postgres_programs() -> str:
    """The directory with PostgreSQL's programs: distributions keep them apart by version. Raises OperatorError."""
    found = [os.path.dirname(path) for place in _PLACES for path in glob.glob(f"{place}/initdb")]
    known = {int(re.findall(r"\d+", place)[-1]): place for place in found}
    if known and max(known) >= _POSTGRES_LEAST:
        return known[max(known)]
    if not known and (path := shutil.which("initdb")):
        return os.path.dirname(path)
    what = f"only PostgreSQL {max(known)} is" if known else "no PostgreSQL is"
    raise OperatorError(
        f"{what} installed, and the cluster needs {_POSTGRES_LEAST} or later for its central database: install the package "
        "`postgresql` (Debian, Ubuntu) or `postgresql-server` (Fedora), for its programs alone; no server of it has to run"
    )


def _as(user: str) -> list[str]:
    """The head of a command that another user runs, if any. Raises OperatorError."""
    if not user:
        return []
    try:
        group = pwd.getpwnam(user).pw_gid
    except KeyError as error:
        raise OperatorError(
            f"PostgreSQL does not run as root, and there is no user {user}: run this as somebody else"
        ) from error
    return ["setpriv", "--reuid", user, "--regid", str(group), "--clear-groups"]


def _leash(by: str, user: str = "") -> list[str]:
    """The same; the kernel sends it this signal when we die, however that happens."""
    if not user and not shutil.which("setpriv"):
        return []
    return [*(_as(user) or ["setpriv"]), "--pdeathsig", by, "--"]


def _fact(said: str, name: str) -> str:
    """What a command says of something, on a line of its own."""
    line = next(line for line in said.splitlines() if line.startswith(f"{name} "))
    return line.removeprefix(name).partition("   (")[0].strip()


def _own_command() -> str:
    """What makes `powermail` a command in another terminal."""
    beside = os.path.dirname(sys.executable)
    if os.path.exists(f"{beside}/powermail"):
        return f"PATH={shlex.quote(beside)}:$PATH"
    return f"alias powermail={shlex.quote(f'{sys.executable} -m powermail')}"


def _user() -> str:
    """Who runs PostgreSQL, if not we."""
    return _SYSTEM_USER if os.geteuid() == 0 else ""


def _tell(root: str, trials: Sequence[Trial]) -> None:
    print("\nThe cluster is ready. Go on in another terminal:")
    print(f"  cd {shlex.quote(root)}; {_own_command()}")
    for trial in trials:
        print(f"# {trial.title}")
        for line in trial.lines:
            print(f"  {line}")
    print("Ctrl-C stops all and takes the directory away.", flush=True)


async def cluster_demo() -> int:
    """Makes the cluster, waits for Ctrl-C and ends it; 0 if it was ready. Raises OperatorError."""
    postgres_programs()
    _as(_user())
    root = tempfile.mkdtemp(prefix="powermail-cluster-")
    if _user():
        os.chmod(root, 0o711)  # noqa: S103  PostgreSQL passes through
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    failed = ready = False
    others: list[str] = []
    try:
        tutorial = Tutorial(root, run_ours)
        building, stopped = asyncio.ensure_future(tutorial.build()), asyncio.ensure_future(stop.wait())
        await asyncio.wait([building, stopped], return_when=asyncio.FIRST_COMPLETED)
        try:
            if building.done():
                failed = building.exception() is not None
                _tell(root, building.result())
                ready = True
                watching = asyncio.ensure_future(tutorial.watch())
                await stopped
                watching.cancel()
        finally:
            building.cancel()
            await asyncio.gather(building, return_exceptions=True)
            print("stopping: front ends, the first machine, nodes, the database", flush=True)
            await tutorial.end()
            others = tutorial.still_served()
    finally:
        if failed:
            print(f"kept for you to look at: {shlex.quote(root)}", flush=True)
        elif others:
            print(f"{', '.join(others)}: served by a process of yours; stop it, and remove {shlex.quote(root)}", flush=True)
        else:
            shutil.rmtree(root, ignore_errors=True)
    return 0 if ready else 1
