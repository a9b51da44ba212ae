"""Owns the processes of a cluster on this machine: starts them on their ground, tells what it does, and ends what it started.

They die with us, also when we are killed (prctl(2), PR_SET_PDEATHSIG, where there is setpriv).
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.cli.ground import Ground

TAIL = 2000  # characters of what one says that failed
_SYSTEM_USER = "postgres"  # PostgreSQL refuses to run as root

Run = Callable[[Sequence[str], str], Awaitable[tuple[int, str]]]  # words and where: the exit status, and what was said
Say = Callable[[str], None]


class Served:
    """One process of the cluster that serves until it is ended."""

    def __init__(self, process: asyncio.subprocess.Process, words: Sequence[str], end_by: signal.Signals, where: str) -> None:
        self.process = process
        self.words = words
        self.end_by = end_by
        self.where = where

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


class Servers:
    """All of them, by the names of their machines."""

    def __init__(self, root: str, ground: Ground, say: Say, leash: str) -> None:
        """`root`: where all lies; `say` hears each command; `leash` is the signal that our servers get when we die."""
        self.root = root
        self.ground = ground
        self.say = say
        self.leash = leash
        self.served: dict[str, Served] = {}

    async def command(self, shown: str, *words: str) -> None:
        """Runs a program to its end. Raises OperatorError."""
        self.say(f"$ {shown}")
        status, said = await run(words, self.root)
        if status:
            raise OperatorError(f"{shown}: {said.strip()[-TAIL:]}")

    async def start(
        self, name: str, words: Sequence[str], shown: str, *, end_by: signal.Signals = signal.SIGTERM, leash: str = "",
        user: str = "", ready: str = "", where: str = "",
    ) -> Served:  # fmt: skip
        """Starts what serves, in a session of its own: Ctrl-C is for us alone. `leash`: another signal for it; `user`: whose it
        is, if not ours; `ready`: a socket that hears when it is; `where`: its working directory below the root.
        """
        command = [*self.ground.enter(name), *_leashed(leash or self.leash, user), *words]
        served = await self._spawn(name, command, end_by, where, ready)
        self.say(f"$ {shown} &    # process {served.process.pid}, log in {name}.log")
        return served

    async def _spawn(self, name: str, words: Sequence[str], end_by: signal.Signals, where: str, ready: str = "") -> Served:
        environment = dict(os.environ, NOTIFY_SOCKET=ready) if ready else dict(os.environ)
        with open(f"{self.root}/{name}.log", "ab") as log:
            process = await asyncio.create_subprocess_exec(
                *words,
                cwd=os.path.join(self.root, where),
                env=environment,
                start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.served[name] = served = Served(process, words, end_by, where)
        return served

    async def again(self, name: str) -> None:
        """Starts a machine that has ended, as it was started before; it is not waited for."""
        before = self.served[name]
        await self._spawn(name, before.words, before.end_by, before.where)

    def log_of(self, name: str) -> str:
        """The end of it."""
        return Path(f"{self.root}/{name}.log").read_text(encoding="utf-8", errors="replace")[-TAIL:]


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


def system_user() -> str:
    """Who runs PostgreSQL; "": we ourselves. Raises OperatorError."""
    if os.geteuid():
        return ""
    try:
        pwd.getpwnam(_SYSTEM_USER)
    except KeyError as error:
        raise OperatorError(
            f"PostgreSQL does not run as root, and there is no user {_SYSTEM_USER}: run this as somebody else"
        ) from error
    return _SYSTEM_USER


def as_user(user: str) -> list[str]:
    """The head of a command that another user runs, if any."""
    return ["setpriv", "--reuid", user, "--regid", str(pwd.getpwnam(user).pw_gid), "--clear-groups"] if user else []


def _leashed(by: str, user: str) -> list[str]:
    """The same; the kernel sends it this signal when we die, however that happens."""
    if not user and not shutil.which("setpriv"):
        return []
    return [*(as_user(user) or ["setpriv"]), "--pdeathsig", by, "--"]
