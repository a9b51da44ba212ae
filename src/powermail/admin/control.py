"""Owns the control socket: a Unix socket in the data directory, mode 0600, one JSON request and its answers a line each.

Only who can open files of the data directory can speak to it: the file system is the authentication (P17). A long operation
shows every second that it lives; a server that shows nothing for five seconds is said to be silent, not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import pwd
import socket
import struct
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from powermail.admin.operations import Operations
from powermail.admin.table import Progress
from powermail.base import limits
from powermail.base.errors import NoSuch, OperatorError, PowerMailError, Trouble
from powermail.base.tasks import report_bug

NAME = "control.sock"
PARTS = ("keeper.sock", "front*.sock")  # of an installation of several processes: the keeper answers first
_SILENT_S = limits.OPERATOR_ANSWER_S + 0.5
_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: pid, uid, gid (unix(7))


class NotRunning(Exception):
    """No server listens on that data directory."""


class Silent(Trouble):
    """A server is there and does not answer."""


class Ask(Struct):
    """One request."""

    call: str
    arguments: dict[str, object]


class Answer(Struct, omit_defaults=True):
    """One line of an answer: progress, a sign of life, or the end: a result or an error of a kind."""

    progress: tuple[int, int] | None = None
    beat: bool = False
    error: str | None = None
    kind: str = ""
    result: msgspec.Raw = msgspec.Raw()


KINDS: dict[str, type[PowerMailError]] = {"no-such": NoSuch, "misuse": OperatorError, "trouble": Trouble}


def kind_of(error: PowerMailError) -> str:
    """The name by which programs know an error."""
    return next((name for name, kind in KINDS.items() if isinstance(error, kind)), "trouble")


def _peer(end: socket.socket) -> tuple[int, int]:
    """(process, user) at the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(pid), int(uid)


def user_name(uid: int) -> str:
    """A user's name, or the number of one who has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def check_place(data: str) -> None:
    """Raises OperatorError if a data directory is too deep for a server to be reached in it."""
    octets = len(os.fsencode(f"{data}/{NAME}"))
    if octets > limits.CONTROL_PATH_OCTETS_MAX:
        raise OperatorError(
            f"{data}/{NAME} is longer than the path of a socket may be ({octets} octets of "
            f"{limits.CONTROL_PATH_OCTETS_MAX}): give a shorter path, a relative one or a link"
        )


class ControlServer:
    """Answers the command line."""

    def __init__(self, path: str, operations: Operations) -> None:
        self._path = path
        self._operations = operations
        self._server: asyncio.Server | None = None
        self._made = 0  # which file our socket is: a process that replaces this one makes another of the name

    async def start(self) -> None:
        """Listens. Raises OperatorError."""
        if os.path.exists(self._path):
            os.unlink(self._path)  # the lock says that no other server lives here
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=limits.CONTROL_LINE_OCTETS_MAX)
        except OSError as error:
            raise OperatorError(f"cannot listen on {self._path}: {error}") from error
        finally:
            os.umask(before)
        self._made = os.stat(self._path).st_ino

    async def stop(self) -> None:
        """Stops listening."""
        if self._server is not None:
            self._server.close()
            if os.path.exists(self._path) and os.stat(self._path).st_ino == self._made:
                os.unlink(self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def say(answer: Answer) -> None:
            await _write(writer, msgspec.json.encode(answer) + b"\n")

        async def progress(done: int, total: int) -> None:
            try:
                await say(Answer(progress=(done, total)))
            except OSError as error:
                raise Trouble(f"who asked is gone: {error}") from error

        async def beat() -> None:
            while True:
                await asyncio.sleep(limits.OPERATOR_BEAT_S)
                await say(Answer(beat=True))

        try:
            line = await reader.readline()
            who = user_name(_peer(writer.get_extra_info("socket"))[1])
            beating = asyncio.create_task(beat())
            try:
                answer = await self._answer(line, progress, who)
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
            await say(answer)
        except (OSError, ValueError):
            pass  # nobody is there any more
        finally:
            writer.close()

    async def _answer(self, line: bytes, progress: Progress, who: str) -> Answer:
        try:
            request = msgspec.json.decode(line, type=Ask)
        except ValueError as error:
            return Answer(error=f"bad request: {error}", kind="misuse")
        try:
            result = await self._operations.call(request.call, request.arguments, progress, who)
        except PowerMailError as error:
            return Answer(error=str(error), kind=kind_of(error))
        except Exception as error:  # noqa: BLE001  who asked is told, and the log says where
            report_bug(self._operations.desk.world.log, error, f"operation {request.call}")
            return Answer(error=f"{request.call}: a fault of this program, the log says where: {error}", kind="trouble")
        return Answer(result=msgspec.Raw(msgspec.json.encode(result)))


async def ask_any(data: str, call: str, arguments: Mapping[str, object], progress: Progress) -> bytes:
    """Calls an operation of whichever process of this data directory answers. Raises as `ask_raw`."""
    named = [path for name in PARTS for path in sorted(glob.glob(f"{glob.escape(data)}/{name}"))]
    for path in (f"{data}/{NAME}", *named):
        try:
            return await ask_raw(path, call, arguments, progress)
        except NotRunning:
            continue
    raise NotRunning


async def ask_raw(path: str, call: str, arguments: Mapping[str, object], progress: Progress) -> bytes:
    """Calls an operation of the server; its result as JSON. Raises NotRunning, OperatorError, Trouble; Silent after 5 s."""
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=256 * limits.MIB)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotRunning from error
    except PermissionError as error:
        raise OperatorError(f"{path} is not yours: run this as the owner of the data directory, or as root") from error
    except OSError as error:
        raise OperatorError(f"cannot reach the server by {path}: {error.strerror or error}") from error
    try:
        await _write(writer, msgspec.json.encode(Ask(call, dict(arguments))) + b"\n")
        while (line := await _line(reader, writer)).endswith(b"\n"):  # else it died in the middle of it
            answer = msgspec.json.decode(line, type=Answer)
            if answer.progress is not None:
                await progress(*answer.progress)
            elif answer.error is not None:
                raise KINDS.get(answer.kind, OperatorError)(answer.error)
            elif not answer.beat:
                return bytes(answer.result)
        raise Trouble("the server closed the connection without an answer")
    except ConnectionError as error:
        raise Trouble(f"the server closed the connection: {error}") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _write(writer: asyncio.StreamWriter, octets: bytes) -> None:
    """Raises ConnectionError also where the other end has gone before: uvloop would raise a RuntimeError, asyncio nothing."""
    if writer.is_closing():
        raise ConnectionResetError("the connection is closed")
    writer.write(octets)
    await writer.drain()


async def _line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    try:
        async with asyncio.timeout(_SILENT_S):
            return await reader.readline()
    except TimeoutError as error:
        pid = _peer(writer.get_extra_info("socket"))[0]
        raise Silent(f"the server (process {pid}) does not answer within {_SILENT_S:g} s: it is stopped, or stuck") from error
