"""Owns real database servers for tests: a PostgreSQL and a MariaDB of this test process, thrown away at its end.

Use by fixtures (tests/conftest.py has them for every test):

    async def test_x(postgresql: Database) -> None:       # or `mysql`: a fresh, empty database, dropped after the test
        postgresql.sql("CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (1)")     # as an operator would, by psql
        connection = await asyncpg.connect(postgresql.url)                           # postgresql://powermail@127.0.0.1:PORT/NAME

    `postgresql_server`, `mysql_server`: the Server, for a template (`server.create(template=NAME)`, PostgreSQL only: a copy of
    a database to which nobody is connected), a second database, or a fault:

        server.kill()                     # SIGKILL to all of its processes: the machine died
        server.pause(), server.resume()   # SIGSTOP, SIGCONT to all of them: it hangs, and its kernel still accepts connections
        server.start(); await server.ready()       # up again, on the same port and socket, with the same data

    `standby_of(server)` makes a second PostgreSQL that follows the first; whoever makes it calls `remove()`.

A test may leave its server in any state: the next one that asks for it finds it running. Nobody else sees these servers: one
pair for each test process (a worker of xdist has its own: 3 s to start, and none waits for another's faults), in a directory
of its own in memory, on a unix socket and a port of the loopback. They run as `postgres` and `mysql` where the tests are run by
root, else as who runs them. They end by their process ids, with the test process at the latest, however that ends: the kernel
sends their SIGKILL (PR_SET_PDEATHSIG), and the next test process sweeps up the directory.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

READY_S = 60.0  # for a start, recovery included, on a machine that is busy
CALL_S = 30.0  # for a command of an operator
_LOOK_S = 0.02
_PREFIX = "powermail-tests-"

# A child is killed when the thread that started it ends: this one ends with the process.
_starter = ThreadPoolExecutor(1, "servers")


class Database:
    """One database of a server: fresh and empty, or a copy of a template."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name

    @property
    def url(self) -> str:
        """Its address over the loopback; no password is asked for."""
        return self.server.url(self.name)

    def sql(self, *statements: str) -> str:
        """Runs statements by the server's own command line client, in one session; rows are lines with tabs.

        Raises AssertionError with what the server said.
        """
        return self.server.sql(self.name, *statements)

    def drop(self) -> None:
        """Takes the database away, whoever is connected."""
        self.server.drop(self.name)


class Server(ABC):
    """One server with its directory. Starting it is left to `start`."""

    kind: str
    user: str  # the system user that runs it where we are root
    call_s = CALL_S

    def __init__(self, place: str = "") -> None:
        """`place` is the directory below which it lies; in memory, if nobody names one."""
        sweep()
        place = place or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
        self.directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place))
        self.port = _free_port()
        self._as: list[str] = []
        if os.geteuid() == 0:
            found = pwd.getpwnam(self.user)
            os.chown(self.directory, found.pw_uid, found.pw_gid)
            self._as = ["--reuid", self.user, "--regid", str(found.pw_gid), "--clear-groups"]
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._names = 0
        atexit.register(self.remove)

    # -- what each kind knows of itself -------------------------------------------------------------------------------

    @abstractmethod
    def url(self, database: str) -> str:
        """The address of a database over the loopback."""

    @abstractmethod
    def sql(self, database: str, *statements: str) -> str:
        """Runs statements on a database ("" for none of ours) by the command line client."""

    @abstractmethod
    def create(self, template: str = "") -> Database:
        """A fresh database."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Takes a database away."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The command line of the server itself."""

    @abstractmethod
    def _says_hello(self, connection: socket.socket) -> bool:
        """True if a new connection is answered as by a server that takes work."""

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts its process; `ready` or `wait` says when it can be used."""
        assert self._process is None or self._process.poll() is not None, "it runs"
        with (self.directory / "log").open("ab") as log:
            # The signal first, that no moment is left in which nobody would end it.
            command = ["setpriv", *self._as, "--pdeathsig", "KILL", "--", *self._command()]
            starting = _starter.submit(
                subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory
            )
            self._process = starting.result()

    def wait(self) -> Server:
        """Waits until it takes connections: for fixtures; a test awaits `ready`."""
        until = time.monotonic() + READY_S
        while not self._looks_ready(until):
            time.sleep(_LOOK_S)
        return self

    async def ready(self) -> None:
        """Waits until it takes connections. Raises AssertionError with its log if it does not."""
        until = time.monotonic() + READY_S
        while not self._looks_ready(until):
            await asyncio.sleep(_LOOK_S)

    def _looks_ready(self, until: float) -> bool:
        assert self._process is not None, "nobody started it"
        ended = self._process.poll() is not None
        if ended or time.monotonic() > until:
            log = (self.directory / "log").read_text(encoding="utf-8", errors="replace")
            raise AssertionError(f"{self.kind} {'ended' if ended else 'does not get ready'}:\n{log[-3000:]}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            return self._says_hello(connection)
        return False

    def processes(self) -> list[int]:
        """Its process and the children of that; the parent first, as it makes the others."""
        if self._process is None or self._process.poll() is not None:
            return []
        parent = self._process.pid
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        return [parent, *(int(pid) for pid in text.split())]

    def _signal(self, number: signal.Signals) -> list[int]:
        """To the parent first and again until no child is new: a child that it was just making gets it too."""
        told: list[int] = []
        while fresh := [pid for pid in self.processes() if pid not in told]:
            for pid in fresh:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            told += fresh
        return told

    def pause(self) -> None:
        """It hangs: connections stay, new ones are made by the kernel, nothing is answered."""
        told = self._signal(signal.SIGSTOP)
        self._paused = True
        _wait_for(lambda: all(_state(pid) in "TtZX" for pid in told), f"processes {told} do not stop")

    def resume(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)
        self._paused = False

    def kill(self) -> None:
        """The machine dies: nothing is written, no connection is closed by its own will."""
        if self._process is None:
            return
        self._signal(signal.SIGSTOP)  # that none is made or orphaned meanwhile
        told = self._signal(signal.SIGKILL)
        self._process.wait(CALL_S)
        _wait_for(lambda: all(_state(pid) in "ZX" for pid in told), f"processes {told} do not end")
        self._paused = False

    def heal(self) -> Server:
        """As it is found by a test: running and ready, whatever the last one did to it."""
        if self._paused:
            self.resume()
        if not self.processes():
            self.start()
        return self.wait()

    def remove(self) -> None:
        """Ends it and takes its directory away."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self.remove)

    def _name(self) -> str:
        self._names += 1
        return f"test_{self._names}"

    def _run(self, *command: str, given: str = "") -> str:
        """A command as the server's user: what it printed."""
        done = subprocess.run(
            ["setpriv", *self._as, "--", *command] if self._as else command,
            input=given,
            capture_output=True,
            text=True,
            timeout=self.call_s,
            check=False,
            cwd=self.directory,
            env={"PATH": os.environ.get("PATH", "") + ":/usr/sbin", "LC_ALL": "C.UTF-8", "HOME": str(self.directory)},
        )
        assert done.returncode == 0, f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}"
        return done.stdout


class Postgres(Server):
    """PostgreSQL. `options` are lines of its settings, like {"synchronous_commit": "off"}."""

    kind = "postgresql"
    user = "postgres"

    def __init__(self, follows: Postgres | None = None, options: dict[str, str] | None = None, place: str = "") -> None:
        super().__init__(place)
        data = str(self.directory / "data")
        if follows is None:
            made = ("--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions")
            self._run(_postgres("initdb"), "-D", data, "-U", "powermail", *made)
        else:
            whence = ("-h", "127.0.0.1", "-p", str(follows.port), "-U", "powermail")
            self._run(
                _postgres("pg_basebackup"), "-D", data, *whence, "--checkpoint=fast", "--no-sync", "--write-recovery-conf"
            )
        # What the kernel has survives a killed process; nothing here outlives the machine.
        chosen = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.directory),
            "fsync": "off",
            "shared_buffers": "32MB",
            "max_connections": "60",
            "autovacuum": "off",
            "jit": "off",
            **(options or {}),
        }
        self._options = [part for name, value in chosen.items() for part in ("-c", f"{name}={value}")]

    def _command(self) -> list[str]:
        return [_postgres("postgres"), "-D", str(self.directory / "data"), *self._options]

    def url(self, database: str) -> str:
        return f"postgresql://powermail@127.0.0.1:{self.port}/{database}"

    def sql(self, database: str, *statements: str) -> str:
        whose = ("-h", str(self.directory), "-p", str(self.port), "-U", "powermail", "-d", database or "postgres")
        form = ("-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1")
        return self._run(_postgres("psql"), *whose, *form, *(part for each in statements for part in ("-c", each)))

    def create(self, template: str = "") -> Database:
        database = Database(self, self._name())
        self.sql("", f"CREATE DATABASE {database.name} TEMPLATE {template or 'template0'}")
        return database

    def drop(self, name: str) -> None:
        self.sql("", f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def promote(self) -> None:
        """A standby becomes a primary."""
        self._run(_postgres("pg_ctl"), "promote", "-D", str(self.directory / "data"), "-w", "-t", str(int(CALL_S)))

    def _says_hello(self, connection: socket.socket) -> bool:
        """A start-up message of protocol 3.0 is answered with R (authentication), or with E while it is not ready."""
        body = (3 << 16).to_bytes(4, "big") + b"user\0powermail\0database\0postgres\0\0"
        connection.sendall((len(body) + 4).to_bytes(4, "big") + body)
        return connection.recv(1) == b"R"


def standby_of(primary: Postgres, options: dict[str, str] | None = None) -> Postgres:
    """A second server that follows the first and answers questions only; it is running and ready. Call `remove()`."""
    standby = Postgres(primary, options)
    standby.start()
    standby.wait()
    return standby


class Mysql(Server):
    """MariaDB."""

    kind = "mysql"
    user = "mysql"

    def __init__(self) -> None:
        super().__init__()
        small = "--innodb-log-file-size=8M"
        made = ("--auth-root-authentication-method=normal", "--skip-test-db", small)
        self._run("mariadb-install-db", "--no-defaults", f"--datadir={self.directory}/data", *made)

    def _command(self) -> list[str]:
        return [
            shutil.which("mariadbd", path=os.environ.get("PATH", "") + ":/usr/sbin") or "mariadbd",
            "--no-defaults",
            f"--datadir={self.directory}/data",
            f"--socket={self.directory}/socket",
            f"--pid-file={self.directory}/pid",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--innodb-log-file-size=8M",
            "--innodb-buffer-pool-size=16M",
            "--innodb-flush-log-at-trx-commit=2",
            "--performance-schema=OFF",
        ]

    def url(self, database: str) -> str:
        return f"mysql://root@127.0.0.1:{self.port}/{database}"

    def sql(self, database: str, *statements: str) -> str:
        form = ("--no-defaults", "--batch", "--skip-column-names", "--default-character-set=utf8mb4")
        whose = ("--socket", str(self.directory / "socket"), "--user", "root", *([database] if database else []))
        return self._run("mariadb", *form, *whose, given=";\n".join(statements) + ";\n")

    def create(self, template: str = "") -> Database:
        assert not template, "MariaDB copies no databases"
        database = Database(self, self._name())
        self.sql("", f"CREATE DATABASE {database.name}")
        return database

    def drop(self, name: str) -> None:
        self.sql("", f"DROP DATABASE IF EXISTS {name}")

    def _says_hello(self, connection: socket.socket) -> bool:
        """Its greeting comes unasked: three octets of length, a number, and the version of the protocol, 10."""
        return connection.recv(5)[4:] == b"\x0a"


def _postgres(name: str) -> str:
    """The path of a program of the newest PostgreSQL: Debian keeps them apart by version."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return str(found[-1]) if found else name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _state(pid: int) -> str:
    """The letter of a process's state (proc(5)): T is stopped; X, it is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _wait_for(done: Callable[[], bool], failed: str) -> None:
    """A signal is obeyed a moment after it was sent."""
    until = time.monotonic() + CALL_S
    while not done():
        assert time.monotonic() < until, failed
        time.sleep(_LOOK_S / 10)


def sweep() -> None:
    """Directories of test processes that are no more: only one that was killed leaves any."""
    for place in ("/dev/shm", tempfile.gettempdir()):
        for path in Path(place).glob(f"{_PREFIX}*-*"):
            owner = path.name.removeprefix(_PREFIX).partition("-")[0]
            if owner.isdecimal() and _state(int(owner)) in "ZX":
                shutil.rmtree(path, ignore_errors=True)


# -- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _postgresql_of_this_process() -> Iterator[Postgres]:
    server = Postgres()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def _mysql_of_this_process() -> Iterator[Mysql]:
    server = Mysql()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
def postgresql_server(_postgresql_of_this_process: Postgres) -> Postgres:
    """The PostgreSQL of this test process, running."""
    _postgresql_of_this_process.heal()
    return _postgresql_of_this_process


@pytest.fixture
def mysql_server(_mysql_of_this_process: Mysql) -> Mysql:
    """The MariaDB of this test process, running."""
    _mysql_of_this_process.heal()
    return _mysql_of_this_process


def _fresh(server: Server) -> Iterator[Database]:
    database = server.create()
    yield database
    server.heal()
    database.drop()


@pytest.fixture
def postgresql(postgresql_server: Postgres) -> Iterator[Database]:
    """A fresh database of PostgreSQL."""
    yield from _fresh(postgresql_server)


@pytest.fixture
def mysql(mysql_server: Mysql) -> Iterator[Database]:
    """A fresh database of MariaDB."""
    yield from _fresh(mysql_server)
