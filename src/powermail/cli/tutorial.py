"""Owns `powermail cluster demo`: a whole cluster on this machine, made by the commands that a newcomer would type.

What it prints is the tutorial: each command as it is run, with what it says, and at the end what to try. All machines are
directories and addresses of the loopback (127.0.N.x); PostgreSQL is one of its own, reached by its socket alone, in a directory
that nobody else may enter. It ends what it started and nothing else, also when it is killed itself (prctl(2),
PR_SET_PDEATHSIG, where there is setpriv).
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from powermail.base.errors import OperatorError
from powermail.base.log import NullLog
from powermail.base.world import system_world
from powermail.cli.databases import Database, Single, postgres_programs
from powermail.cli.ground import Ground, Loopback
from powermail.cli.servers import TAIL, Run, Say, Served, Servers, run_ours, system_user

NODES, FRONTS = {"a": 11, "b": 12, "c": 13}, {"front-1": 21, "front-2": 22}  # name to the last number of the address
SMTP, POPS = 2525, 2995
_DOORS = (2700, 2701, SMTP, POPS)
_REPAIR_S = 20  # instead of minutes: who looks on does not wait so long
_SHOWN = 4  # lines of what a command says; the tables that `index move` compares are more
_START_S = 90.0


class Trial(NamedTuple):
    """What a newcomer may try, in lines for a shell."""

    title: str
    lines: list[str]


def _say(text: str) -> None:
    print(text, flush=True)


class Tutorial:
    """The cluster, step by step."""

    def __init__(
        self, root: str, run_ours: Run, ground: Ground | None = None, say: Say = _say, leash: str = "TERM",
        database: Database | None = None,
    ) -> None:  # fmt: skip
        """`root` is an empty directory through which everybody may pass; `run_ours` runs a `powermail` command; `say` hears
        the story; `leash` is what machines get when we die; `database`: a single PostgreSQL unless said.
        """
        self._root = root
        self._run_ours = run_ours
        self._say = say
        ground = ground or Loopback(_DOORS, (1, *NODES.values(), *FRONTS.values()))
        self.servers = Servers(root, ground, say, leash)
        self._ears: dict[str, tuple[socket.socket, asyncio.Event]] = {}  # those that are not ready yet
        self._net = ground.net
        self._address = self._password = ""
        self._database = database or Single()

    # -- tools ----------------------------------------------------------------------------------------------------

    async def _powermail(self, *words: str, quiet: bool = False) -> str:
        """The same for a command of ours, which shows what it says: that is returned."""
        shown = shlex.join(["powermail", *words])
        self._say(f"$ {shown}")
        status, said = await self._run_ours(words, self._root)
        if status:
            raise OperatorError(f"{shown}: {said.strip()[-TAIL:]}")
        lines = [] if quiet else said.rstrip().splitlines()
        for line in lines[:_SHOWN]:
            self._say(f"    {line}".rstrip())
        if len(lines) > _SHOWN:
            self._say(f"    ... {len(lines) - _SHOWN} more lines")
        return said

    async def _serve(self, name: str, *words: str) -> None:
        """Starts `powermail serve`; `_ready` waits for it."""
        path, heard = f"{self._root}/{name}.ready", asyncio.Event()
        ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        ear.bind(path)
        asyncio.get_running_loop().add_reader(ear, heard.set)
        self._ears[name] = ear, heard
        command = ["serve", *words, "--data", name]
        ours = [sys.executable, "-m", "powermail", *command]
        await self.servers.start(name, ours, shlex.join(["powermail", *command]), ready=path)

    async def _ready(self) -> None:
        """Waits until all that was started has said that it is ready (sd_notify(3)). Raises OperatorError."""
        try:
            for name, (_, heard) in self._ears.items():
                waits = [asyncio.ensure_future(heard.wait()), asyncio.ensure_future(self.servers.served[name].process.wait())]
                await asyncio.wait(waits, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if not heard.is_set():
                    raise OperatorError(f"powermail serve --data {name} did not get ready:\n{self.servers.log_of(name)}")
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
        self._say("\n# the central database. In earnest: one that is replicated, postgresql://powermail@db1,db2/powermail")
        await self._make_head(await self._database.make(self.servers))
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
        killed, serve = self.servers.served["node-b"].process.pid, "powermail serve --roles node --data node-b"
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

        await asyncio.gather(*(one(name, served) for name, served in self.servers.served.items()))

    async def end(self) -> None:
        """Ends all. Who needs others goes before them: front ends, the first machine, nodes, the database."""
        self.close()
        for kind in ("front", "head", "node", "postgresql", "etcd"):
            await asyncio.gather(*(served.end() for name, served in self.servers.served.items() if name.startswith(kind)))

    def still_served(self) -> list[str]:
        """Machines that somebody else serves by now: started again in another terminal."""
        disk, found = system_world(NullLog()).disk, []
        for name in self.servers.served:
            if os.path.exists(f"{self._root}/{name}/lock"):
                try:
                    disk.lock(f"{self._root}/{name}/lock").release()
                except BlockingIOError:
                    found.append(name)
        return found


# -- this machine -----------------------------------------------------------------------------------------------------


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
    root = tempfile.mkdtemp(prefix="powermail-cluster-")
    if system_user():
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
