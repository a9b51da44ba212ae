"""Owns the central database of a cluster on this machine: one PostgreSQL, or a pair under Patroni, which asks an etcd.

Of a pair one is written to, and the other is its synchronous standby: it takes the place of the first when that one dies, some
20 s later, and no commit is lost by it. All this runs without being root, from the programs of the distribution's packages.
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
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol
from urllib.parse import quote

import msgspec

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.cli.ground import Namespaces
from powermail.cli.servers import Servers, as_user, run, system_user

_START_S = 90.0
_LOOK_S = 0.05
_POSTGRES_LEAST = 15
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")
_PORT, _REST, _ETCD = 5432, 8008, 2379
_PACKAGES = ("patroni", "python3-etcd", "python3-psycopg2", "etcd-server")
_CREATE = "CREATE DATABASE powermail ENCODING 'UTF8' TEMPLATE template0"
# A failover is as quick as Patroni allows: its leader key lives 20 s, and loop_wait + 2 * retry_timeout must fit in.
_PACE: dict[str, object] = {"ttl": 20, "loop_wait": 2, "retry_timeout": 3, "primary_start_timeout": 0}


class Database(Protocol):
    """What a cluster is built on, and a torture takes apart."""

    @property
    def machines(self) -> Sequence[str]:
        """Those that have its servers."""

    async def make(self, servers: Servers) -> str:
        """Starts it; its address. Raises OperatorError."""

    async def leader(self) -> str:
        """The machine that is written to now; "" if none is found."""

    async def follow(self, gone: str) -> None:
        """Until another machine has taken the place of one that died, if there is another. Raises TimeoutError."""

    async def is_whole(self) -> bool:
        """True if it takes connections, and nothing that takes its place is missing."""


class Single:
    """One server."""

    machines = ("postgresql",)

    def __init__(self) -> None:
        self._host = ""

    async def make(self, servers: Servers) -> str:
        """Reached by its socket alone, where the ground has no addresses of its own."""
        programs, user = postgres_programs(), system_user()
        place = _directory(servers, "postgresql", user)
        made = ["-D", "postgresql/data", "-U", "powermail", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        await servers.command(shlex.join(["initdb", *made]), *as_user(user), f"{programs}/initdb", *made)
        host = servers.ground.database(place)
        if host:
            with open(f"{place}/data/pg_hba.conf", "a", encoding="ascii") as file:
                file.write(f"host all powermail {servers.ground.net}.0/24 trust\n")
        options = ["-D", "postgresql/data", "-c", f"listen_addresses={host}", "-k", place]
        leash = "INT" if servers.leash == "TERM" else ""
        await servers.start(
            "postgresql", [f"{programs}/postgres", *options], shlex.join(["postgres", *options]),
            end_by=signal.SIGINT, leash=leash, user=user,
        )  # fmt: skip

        async def is_ready() -> bool:
            return (await run([f"{programs}/pg_isready", "-q", "-h", place], servers.root))[0] == 0

        await _until(is_ready, servers, self.machines)
        await _create(servers, place)
        self._host = host or place
        return f"postgresql://powermail@{host or quote(place, safe='')}/powermail"

    async def leader(self) -> str:
        return self.machines[0]

    async def follow(self, gone: str) -> None:
        pass

    async def is_whole(self) -> bool:
        return bool(await _asked(self._host, "SELECT 1"))


class Pair:
    """Two machines, each with Patroni and its PostgreSQL; the etcd is on the first machine of the cluster."""

    machines = ("postgresql-1", "postgresql-2")

    def __init__(self, spaces: Namespaces) -> None:
        """Each is in a namespace of its own: nobody else reaches servers that trust whom they see. Raises OperatorError."""
        self._programs = {name: _program(name) for name in ("patroni", "etcd")}
        self._at = {name: spaces.at(name) for name in self.machines}
        self._etcd = spaces.at("")

    async def make(self, servers: Servers) -> str:
        user = system_user()
        place, client = _directory(servers, "etcd", user), f"http://{self._etcd}:{_ETCD}"
        words = ["--data-dir", f"{place}/data", "--listen-client-urls", client, "--advertise-client-urls", client]
        words += ["--listen-peer-urls", "http://127.0.0.1:2380"]
        await servers.start("etcd", [self._programs["etcd"], *words], shlex.join(["etcd", *words]), user=user, where="etcd")
        for name in self.machines:
            place = _directory(servers, name, user)
            with open(f"{place}.yml", "wb") as file:  # JSON is YAML
                file.write(msgspec.json.encode(self._configuration(name, place)))
            _give(file.name, user)
            await servers.start(name, [self._programs["patroni"], file.name], f"patroni {name}.yml", user=user, where=name)
        await _until(self.is_whole, servers, ("etcd", *self.machines))
        if not (leader := await self.leader()):
            raise OperatorError(f"none of {', '.join(self.machines)} leads any more:\n{servers.log_of(self.machines[0])}")
        await _create(servers, self._at[leader])
        return f"postgresql://powermail@{','.join(self._at.values())}/powermail"

    def _configuration(self, name: str, place: str) -> dict[str, object]:
        """patroni(1): settings of the cluster, of how it is made, and of this server."""
        host = self._at[name]
        trusted = [f"host {what} all {host.rpartition('.')[0]}.0/24 trust" for what in ("all", "replication")]
        dcs: dict[str, object] = {**_PACE, "synchronous_mode": True, "postgresql": {"use_pg_rewind": True}}
        return {
            "scope": "powermail",
            "name": name,
            "restapi": {"listen": f"{host}:{_REST}", "connect_address": f"{host}:{_REST}"},
            "etcd3": {"host": f"{self._etcd}:{_ETCD}"},
            "bootstrap": {"dcs": dcs, "initdb": [{"auth": "trust"}, {"encoding": "UTF8"}, {"locale": "C"}]},
            "postgresql": {
                "listen": f"{host}:{_PORT}",
                "connect_address": f"{host}:{_PORT}",
                "data_dir": f"{place}/data",
                "bin_dir": postgres_programs(),
                "pgpass": f"{place}/pgpass",
                "pg_hba": ["local all all trust", *trusted],
                "parameters": {"unix_socket_directories": place},
                "authentication": {"superuser": {"username": "powermail"}, "replication": {"username": "replicator"}},
            },
        }

    async def leader(self) -> str:
        asked = "SELECT NOT pg_is_in_recovery()"
        found = await asyncio.gather(*(_asked(host, asked, "postgres") for host in self._at.values()))
        return next((name for name, leads in zip(self._at, found, strict=True) if leads), "")

    async def follow(self, gone: str) -> None:
        async with asyncio.timeout(_START_S):
            while await self.leader() in ("", gone):
                await asyncio.sleep(_LOOK_S)

    async def is_whole(self) -> bool:
        asked = "SELECT NOT pg_is_in_recovery() AND EXISTS (SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync')"
        return any(await asyncio.gather(*(_asked(host, asked, "postgres") for host in self._at.values())))


async def _until(holds: Callable[[], Awaitable[bool]], servers: Servers, names: Sequence[str]) -> None:
    """Waits until it holds. Raises OperatorError when one of these has ended, or it takes too long: with what was said last."""
    try:
        async with asyncio.timeout(_START_S):
            while not await holds():
                for name in names:
                    if servers.served[name].process.returncode is not None:
                        raise OperatorError(f"{name} ended:\n{servers.log_of(name)}")
                await asyncio.sleep(_LOOK_S)
    except TimeoutError as error:
        said = "\n".join(f"{name}: {servers.log_of(name)}" for name in names)
        raise OperatorError(f"the database is not ready after {_START_S:.0f} s:\n{said}") from error


async def _create(servers: Servers, host: str) -> None:
    whose = ["-q", "-h", host, "-U", "powermail", "-d", "postgres", "-c"]
    await servers.command(f'psql {shlex.join(whose)} "{_CREATE}"', f"{postgres_programs()}/psql", *whose, _CREATE)


async def _asked(host: str, question: str, database: str = "powermail") -> bool:
    """What the first column of the first row is; False if it does not answer."""
    import asyncpg

    try:
        async with asyncio.timeout(limits.INDEX_CONNECT_S):
            connection = await asyncpg.connect(host=host, port=_PORT, user="powermail", database=database)
            try:
                return bool(await connection.fetchval(question))
            finally:
                connection.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False


def _directory(servers: Servers, name: str, user: str) -> str:
    """One of its own for what `user` runs, through which nobody else passes."""
    place = f"{servers.root}/{name}"
    os.mkdir(place, 0o700)
    _give(place, user)
    return place


def _give(path: str, user: str) -> None:
    if user:
        found = pwd.getpwnam(user)
        os.chown(path, found.pw_uid, found.pw_gid)


def _program(name: str) -> str:
    if not (found := shutil.which(name)):
        raise OperatorError(f"no {name} is installed; Debian's packages: {', '.join(_PACKAGES)}")
    return found


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
