"""Owns the control socket: a Unix socket in the data directory, mode 0600, one JSON request and its answers a line each.

Only who can open files of the data directory can speak to it: the file system is the authentication (P17).
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

from powermail.admin.operations import Operations, Progress
from powermail.base import limits
from powermail.base.errors import OperatorError, PowerMailError, Trouble

NAME = "control.sock"


class NotRunning(Exception):
    """No server listens on that data directory."""


class ControlServer:
    """Answers the command line."""

    def __init__(self, path: str, operations: Operations) -> None:
        self._path = path
        self._operations = operations
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens. Raises OperatorError."""
        if os.path.exists(self._path):
            os.unlink(self._path)  # the index lock says that no other server lives here
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=limits.CONTROL_LINE_OCTETS_MAX)
        except OSError as error:
            raise OperatorError(f"cannot listen on {self._path}: {error}") from error
        finally:
            os.umask(before)

    async def stop(self) -> None:
        """Stops listening."""
        if self._server is not None:
            self._server.close()
            if os.path.exists(self._path):
                os.unlink(self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def progress(done: int, total: int) -> None:
            writer.write(msgspec.json.encode({"progress": [done, total]}) + b"\n")
            await writer.drain()

        try:
            line = await reader.readline()
            answer = await self._answer(line, progress)
            writer.write(msgspec.json.encode(answer) + b"\n")
            await writer.drain()
        except (ConnectionError, ValueError):
            pass
        finally:
            writer.close()

    async def _answer(self, line: bytes, progress: Progress) -> dict[str, Any]:
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
            result = await self._operations.call(str(request["call"]), dict(request["arguments"]), progress)
        except (PowerMailError, Trouble) as error:
            return {"error": str(error)}
        except (msgspec.DecodeError, KeyError, ValueError, TypeError) as error:
            return {"error": f"bad request: {error}"}
        return {"result": result}


async def ask(path: str, call: str, arguments: dict[str, Any], progress: Progress) -> Any:
    """Calls an operation on a running server. Raises NotRunning, OperatorError."""
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=256 * limits.MIB)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotRunning from error
    try:
        writer.write(msgspec.json.encode({"call": call, "arguments": arguments}) + b"\n")
        await writer.drain()
        while line := await reader.readline():
            answer = msgspec.json.decode(line, type=dict[str, Any])
            if "progress" in answer:
                await progress(*answer["progress"])
            elif "error" in answer:
                raise OperatorError(answer["error"])
            else:
                return answer["result"]
        raise OperatorError("the server closed the connection without an answer")
    finally:
        writer.close()
