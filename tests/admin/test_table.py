"""The operator's table: everything is derived from it, so every row must say all."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import uvloop

from powermail.admin.control import ControlServer, ask_raw
from powermail.admin.operations import ROWS, TABLE
from powermail.admin.table import Operation, Progress, Request, fields_of, unseen
from powermail.base import limits
from powermail.base.errors import NoSuch, OperatorError, Trouble
from powermail.base.log import Event, MemoryLog
from tests.system.conftest import Running

IDS = [row.name for row in ROWS]


@pytest.mark.parametrize("name", IDS)
def test_every_row_says_what_it_takes_gives_and_does(name: str) -> None:
    row: Operation[Request, object] = TABLE[name]
    assert row.text and row.text[0].islower() and not row.text.endswith(".")
    assert msgspec.inspect.type_info(row.result), "the result has a type"
    info = msgspec.inspect.type_info(row.request)
    assert isinstance(info, msgspec.inspect.StructType) and info.forbid_unknown_fields
    marked = {one.name for one in fields_of(row.request)}
    for entry in info.fields:
        assert entry.name in marked or not entry.required or not row.command, f"{entry.name} cannot be given on a command line"


def test_names_and_commands_are_used_once() -> None:
    assert len(TABLE) == len(ROWS)
    commands = [row.command for row in ROWS if row.command]
    assert len(set(commands)) == len(commands)


def test_the_room_has_no_way_around_its_types() -> None:
    for path in Path("src/powermail/admin").glob("*.py"):
        found = re.search(r"\bAny\b|getattr|setattr|copy\.copy|\*\*kwargs", path.read_text())
        assert found is None, f"{path}: {found}"


async def test_a_request_that_is_none_is_refused_with_the_field(running: Running) -> None:
    for name, arguments, said in (
        ("nonsense", {}, "unknown operation 'nonsense'"),
        ("account_show", {}, "missing required field `address`"),
        ("account_show", {"address": 7}, "got `int` - at `$.address`"),
        ("account_show", {"address": "a@b", "more": 1}, "unknown field `more`"),
        ("queue_set", {"numbers": ["7"], "held": True}, "Expected `int`, got `str`"),
        ("node_block", {"node": [1]}, "node_block"),
    ):
        with pytest.raises(OperatorError, match=said.replace("$", r"\$").replace("[", r"\[")):
            await running.operation(name, **arguments)


async def test_changes_are_logged_and_looks_are_not(running: Running) -> None:
    await running.operation("account_add", address="ann@example.org", password="tell-nobody")
    await running.operation("account_list")
    (line,) = running.lines("operator")
    assert "what=account_add" in line and "address=ann@example.org" in line
    assert "tell-nobody" not in line
    assert Event.OPERATOR.value == ("operator", "info")


async def test_a_change_that_was_refused_is_logged_as_refused(running: Running) -> None:
    await running.operation("account_add", address="ann@example.org")
    with pytest.raises(OperatorError):
        await running.operation("account_add", address="ann@example.org")
    done, refused = running.lines("operator")
    assert "failed=" not in done
    assert refused.endswith('failed="the directory refuses it: ann@example.org exists"')


async def hang(*_: object) -> None:
    """A call that never answers."""
    await asyncio.Event().wait()


async def test_what_does_not_end_in_time_says_what_it_waits_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(limits, "OPERATOR_ANSWER_S", 1.1)
        patch.setattr(running.index, "queue_rows", hang)
        patch.setattr(running.index, "totals", hang)
        with pytest.raises(Trouble, match=r"queue list did not end in time: the index does not answer \(locked, or its disk"):
            await running.operation("queue_list")


async def test_a_fault_of_this_program_is_answered_and_written_down(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("a bug")

    running.bugs_expected = True
    path = str(running.data / "control.sock")
    server = ControlServer(path, running.powermail.operations)
    await server.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(running.index, "queue_rows", broken)
            with pytest.raises(Trouble, match="queue_list: a fault of this program, the log says where: 'a bug'"):
                await ask_raw(path, "queue_list", {}, unseen)
        assert await ask_raw(path, "queue_list", {}, unseen) == b"[]"
    finally:
        await server.stop()
    (line,) = running.lines("bug")
    assert 'where="operation queue_list"' in line and "test_table.py" in line


@pytest.mark.parametrize("said", [b"", b'{"result":[1,2', b'{"beat":true}\n{"res'])
async def test_a_server_that_dies_in_its_answer_is_trouble(tmp_path: Path, said: bytes) -> None:
    """Not a traceback: half a line is no answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(said)
        writer.close()

    path = str(tmp_path / "control.sock")
    async with await asyncio.start_unix_server(serve, path):
        with pytest.raises(Trouble, match="closed the connection without an answer"):
            await ask_raw(path, "queue_list", {}, unseen)


class Slow:
    """Operations of which one takes until it is let go on, with progress or without; no more of them is needed here."""

    def __init__(self) -> None:
        self.desk = SimpleNamespace(world=SimpleNamespace(log=MemoryLog()))
        self.asked, self.go_on, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def call(self, name: str, arguments: Mapping[str, object], progress: Progress, who: str) -> object:
        self.asked.set()
        try:
            await self.go_on.wait()
            if name == "with progress":
                for done in range(5):
                    await progress(done, 5)
            return "x" * 1000
        finally:
            self.ended.set()


@pytest.mark.parametrize("name", ["without", "with progress"])
@pytest.mark.parametrize("loop", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_who_hangs_up_before_the_answer_is_no_fault_of_this_program(
    tmp_path: Path, loop: Callable[[Coroutine[None, None, None]], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop refuses octets for a connection that is gone by a RuntimeError, asyncio by none or by an OSError."""
    complaints: list[str] = []
    monkeypatch.setattr(limits, "OPERATOR_BEAT_S", 0.01)

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
        slow, path = Slow(), str(tmp_path / "control.sock")
        server = ControlServer(path, slow)  # type: ignore[arg-type]
        await server.start()
        before = asyncio.all_tasks()
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(msgspec.json.encode({"call": name, "arguments": {}}) + b"\n")
        await slow.asked.wait()
        writer.transport.abort()
        await asyncio.sleep(0.1)  # beats find nobody there
        slow.go_on.set()
        await slow.ended.wait()
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.01)
        await server.stop()
        assert not [line for line in slow.desk.world.log.lines if "bug" in line]

    loop(body())
    gc.collect()
    assert not complaints, complaints


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**30])
async def test_a_number_that_no_database_holds_is_refused(running: Running, number: int) -> None:
    for name, arguments in (("queue_show", {"number": number}), ("queue_delete", {"numbers": [1, number]})):
        with pytest.raises(OperatorError, match="digits is beyond all bounds"):
            await running.operation(name, **arguments)


async def test_status_answers_although_the_index_does_not(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(limits, "OPERATOR_INDEX_S", 0.05)
        for name in ("totals", "under_copied_total", "orders_total"):
            patch.setattr(running.index, name, hang)
        status = await running.status()
    assert "index: the index did not answer within 0.05 s" in status["degraded"]
    assert [node["owed"] for node in status["nodes"]] == [None, None, None]


async def test_no_such_is_another_error_than_misuse(running: Running) -> None:
    with pytest.raises(NoSuch):
        await running.operation("account_show", address="none@example.org")
    with pytest.raises(OperatorError) as misuse:
        await running.operation("account_show", address="none")
    assert not isinstance(misuse.value, NoSuch)
