"""What nodes are told of the cluster's membership: layouts, fences, who was expelled; no restart forgets it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from powermail.base import limits
from powermail.base.errors import NodeTrouble, OperatorError
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.noded.obeyed import Obeyed
from powermail.storage.contract import Chunk, Mark, NodeState, Origin
from powermail.wire import node_forms as forms
from powermail.wire.node_server import NodeServer
from powermail.wire.node_verbs import Failure, Role
from tests.noded.installation import CLUSTER, Installation, installation, until
from tests.noded.speaking import frame, hello, operation
from tests.storage.support import key


@pytest.fixture
async def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Installation]:
    """A node that is served; who does not say soon that he goes by a newer layout never will."""
    monkeypatch.setattr(limits, "NODE_FOLLOW_WAIT_S", 0.2)
    async with installation(tmp_path) as made:
        made.service.obeyed = Obeyed(made.world, str(tmp_path / "obeyed"))
        yield made


async def restarted(there: Installation, tmp_path: Path) -> None:
    """The process ends, and another one serves the node."""
    await there.service.close(0.0)
    await there.serve()
    there.service.obeyed = Obeyed(there.world, str(tmp_path / "obeyed"))


async def test_an_older_commit_and_delete_are_refused_also_after_a_restart(there: Installation, tmp_path: Path) -> None:
    """Destructive changes: the fence is durable before the change counts (cluster membership, without a consensus)."""
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    assert await keeper.layout() == (0, 0, b"")
    assert await keeper.set_layout(7, 6, b"layout 7") == (7, 6, b"")
    for round_ in range(2):
        for role, fence, heard in (("front", 5, False), ("keeper", 5, False), ("front", 6, True), ("keeper", 7, True)):
            raw = await there.raw(there.client(f"{role}-9", role))
            verb, _, meta, body = await raw.hello(session=9, fence=fence, instance=bytes([round_]) * 16)
            assert (verb == "REPLY") is heard
            if not heard:
                assert (meta[0], meta[2], body) == (Failure.FENCED, 7, b"layout 7")
                raw.say(frame("COMMIT", 2, [key(1), 1, "", 0.0, 1, 2, []], b"{}"), frame("DELETE", 3, [0.0, 0], key(1)))
                assert await raw.end() == []
        await restarted(there, tmp_path)
    assert not {"commit", "delete"} & {*there.node.calls}


async def test_who_goes_by_an_older_layout_is_cut_off_and_nothing_of_its_is_written_behind_the_answer(
    there: Installation,
) -> None:
    old = await there.welcomed("keeper-2", "keeper", fence=3)
    there.node.hold()
    chunks = [[0, 0, 1, 1]]
    old.say(frame("COMMIT", 2, [key(1), 1, "", 0.0, 1, 2, chunks], b"{}x"))
    await until(lambda: "commit" in there.node.calls)
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    telling = asyncio.ensure_future(keeper.set_layout(4, 4, b"layout 4"))
    assert await old.end() == []
    await until(lambda: there.service.obeyed.fence == 4 and "fence" in there.node.calls)
    assert not telling.done(), "the commit may still be written"
    there.node.release()
    assert (await telling)[:2] == (4, 4)
    assert there.world.counters.get("noded.fenced") == 1


async def test_a_front_end_that_was_away_takes_the_layout_and_asks_again(there: Installation) -> None:
    """P14: also while it reaches no database."""
    front = there.remote("front-1")
    where = front._link._where
    told: list[tuple[int, bytes]] = []

    def take(version: int, layout: bytes) -> None:
        told.append((version, layout))
        where.fence = version

    await front.open()
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    large = bytes(range(256)) * (limits.NODE_LAYOUT_OCTETS_MAX // 256)
    where.told = take
    await keeper.set_layout(12, 11, large)
    await until(lambda: told and front.state is NodeState.READ_WRITE)
    assert told == [(12, large)] and await front.layout() == (12, 11, large)
    await front.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, front.stamp(), Origin.DELIVERY)


async def test_a_newer_layout_cuts_nobody_off_without_a_fence(there: Installation) -> None:
    """What is added may be seen late."""
    raw = await there.welcomed(fence=0)
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    assert await keeper.set_layout(3, 0, b"layout 3") == (3, 0, b"")
    raw.say(frame("LAYOUT", 2, []))
    assert (await raw.hear("REPLY"))[1:] == (2, [3, 0], b"layout 3")


async def test_versions_and_fences_only_rise(there: Installation, tmp_path: Path) -> None:
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    await keeper.set_layout(5, 2, b"layout 5")
    assert await keeper.set_layout(4, 0, b"layout 4") == (5, 2, b"layout 5"), "who is behind hears what is known"
    assert await keeper.set_layout(5, 5, b"layout 5") == (5, 5, b""), "the fence of a layout that is known already"
    assert await keeper.set_layout(5, 1, b"layout 5") == (5, 5, b"")
    with pytest.raises(OperatorError, match="two were made"):
        await keeper.set_layout(5, 5, b"another 5")
    again = Obeyed(there.world, str(tmp_path / "obeyed"))
    assert (again.version, again.fence, again.layout) == (5, 5, b"layout 5")


@pytest.mark.parametrize(
    ("meta", "body"), [([0, 0], b"x"), ([3, 4], b"x"), ([3, 3], b""), ([3, 3], bytes(limits.NODE_LAYOUT_OCTETS_MAX + 1))]
)
async def test_layouts_that_are_none_are_refused(there: Installation, meta: list[int], body: bytes) -> None:
    raw = await there.welcomed("keeper-1", "keeper", lane=1)
    size = limits.NODE_PIECE_OCTETS
    parts = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    last = len(parts) - 1
    raw.say(*[frame("SET_LAYOUT", 2, None if at else meta, part, int(at < last)) for at, part in enumerate(parts)])
    assert (await raw.hear())[2][0] == Failure.MALFORMED and there.service.obeyed.version == 0


async def test_who_is_expelled_is_cut_off_and_stays_out_also_after_a_restart(there: Installation, tmp_path: Path) -> None:
    """R07, and by whom: every role's right is in the table that `test_machines` tries."""
    front, other = await there.welcomed("front-1"), await there.welcomed("front-2")
    operator = there.remote("operator-1", "operator")
    await operator.open()
    await operator.expel(["front-1", "front-7"])
    assert await front.end() == []
    other.say(frame("PING", 2))
    await other.hear("REPLY")
    for _ in range(2):
        for name in ("front-1", "front-7"):
            raw = await there.raw(there.client(name))
            raw.say(frame("HELLO", 1, hello(cluster=CLUSTER)))
            ((verb, _, (_, text), _),) = await raw.end()
            assert verb == "GOAWAY" and "expelled" in text
        await restarted(there, tmp_path)
    await there.welcomed("front-2", session=5)


async def test_nobody_expels_itself_and_ids_are_ids(there: Installation) -> None:
    keeper = await there.welcomed("keeper-1", "keeper")
    for number, ids in enumerate((["keeper-1"], ["../x"], [""], ["x" * 65], ["a\n"], ["x"] * 513), 2):
        keeper.say(frame("EXPEL", number, [ids]))
        assert (await keeper.hear())[0] == "ERROR"
    assert not there.service.obeyed.expelled


async def test_what_could_not_be_written_is_obeyed_and_not_confirmed(there: Installation, tmp_path: Path) -> None:
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    (tmp_path / "obeyed.new").mkdir()
    for call in (keeper.set_layout(4, 4, b"layout 4"), keeper.expel(["front-1"])):
        with pytest.raises(NodeTrouble):
            await call
    late = await there.raw()
    ((verb, _, _, _),) = await late.end()
    assert verb == "GOAWAY" and there.service.obeyed.fence == 4
    assert not (tmp_path / "obeyed").exists()
    (tmp_path / "obeyed.new").rmdir()
    await keeper.set_layout(4, 4, b"layout 4")
    again = Obeyed(there.world, str(tmp_path / "obeyed"))
    assert (again.fence, list(again.expelled)) == (4, ["front-1"]), "all of it, with the next thing that is told"


async def test_a_fence_is_not_confirmed_while_a_node_hangs(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked before may still be written there."""
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    there.node.fail_next("fence")
    with pytest.raises(NodeTrouble):
        await keeper.set_layout(4, 4, b"layout 4")
    there.node.miss()
    assert (await keeper.set_layout(4, 4, b"layout 4"))[:2] == (4, 4), "one that is away takes nothing"


@pytest.mark.parametrize(
    "spoil", [lambda octets: octets[:-1], lambda octets: b"", lambda octets: octets.replace(b"1", b"2", 1)]
)
async def test_a_damaged_file_is_never_taken_for_one_that_says_nothing(tmp_path: Path, spoil: Any) -> None:
    world, path = system_world(MemoryLog()), tmp_path / "obeyed"
    obeyed = Obeyed(world, str(path))
    obeyed.take(3, 3, b"layout 3")
    await obeyed.keep()
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(OperatorError, match="damaged"):
        Obeyed(world, str(path))


def test_ids_that_are_expelled_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_EXPELLED_MAX", 3)
    obeyed = Obeyed(system_world(MemoryLog()))
    obeyed.expel(["a", "b", "c"])
    obeyed.expel(["a"])
    with pytest.raises(OperatorError):
        obeyed.expel(["d"])
    assert list(obeyed.expelled) == ["a", "b", "c"]


def test_what_only_the_expelled_have_said_is_void_and_what_others_said_stays() -> None:
    obeyed = Obeyed(system_world(MemoryLog()))
    assert obeyed.expel(["a", "b"], "keeper-1") == (2, 0)
    assert obeyed.expel(["b", "c", "keeper-1"], "keeper-2") == (2, 1), "a was said by keeper-1 alone"
    assert obeyed.expelled == {"b": ("keeper-1", "keeper-2"), "c": ("keeper-2",), "keeper-1": ("keeper-2",)}
    assert obeyed.expel(["keeper-2"], "keeper-3", more=True) == (1, 0), "it goes on, and says the others again"
    assert obeyed.expel(["b", "c"], "keeper-3") == (0, 1)
    assert set(obeyed.expelled) == {"b", "c", "keeper-2"}


def test_a_full_list_takes_who_filled_it_with_what_that_one_alone_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_EXPELLED_MAX", 4)
    obeyed = Obeyed(system_world(MemoryLog()))
    obeyed.expel(["a", "b", "c", "d"], "thief")
    assert obeyed.expel(["d", "thief"], "keeper-1", more=True) == (1, 3)
    assert set(obeyed.expelled) == {"d", "thief"}


@pytest.mark.parametrize("by", [[], [["keeper-1"]]])
async def test_ids_that_an_older_program_wrote_are_refused_still(tmp_path: Path, by: list[list[str]]) -> None:
    """P19: it writes no `by`, or that of others; what nobody is known to have said is never void."""
    world, path = system_world(MemoryLog()), tmp_path / "obeyed"
    body = msgspec.json.encode({"expelled": ["a", "b"], "by": by})
    path.write_bytes(b"powermail-obeyed 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    obeyed = Obeyed(world, str(path))
    obeyed.expel(["a", "c", "keeper-1"], "keeper-2")
    await obeyed.keep()
    assert Obeyed(world, str(path)).expelled == {"a": (), "b": (), "c": ("keeper-2",), "keeper-1": ("keeper-2",)}


async def test_marks_of_others_are_not_touched_by_a_fence(there: Installation) -> None:
    """Law 2: the wait names no stamp, so that no commit of those who are heard is refused for it."""
    front, keeper = there.remote("front-1"), there.remote("keeper-1", "keeper")
    await keeper.open()
    front._link._where.fence = 4
    await front.open()
    stamp = front.stamp()
    await keeper.set_layout(4, 4, b"layout 4")
    await front.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, stamp, Origin.DELIVERY)
    assert (await there.node.facts()).mark == Mark()


def test_the_examples_of_the_document_are_the_programs_octets() -> None:
    text = Path("docs/peer-protocol.md").read_text()
    asked = operation("SET_LAYOUT", 2, forms.LayoutForm(5, 4), b"abc")
    machine = NodeServer(frozenset({Role.KEEPER}))
    list(machine.receive(frame("HELLO", 1, hello())))
    machine.refuse(1, "old", 5, b"abc")
    for octets in (asked, machine.to_send()):
        meta = int.from_bytes(octets[6:8], "little")
        for part in (octets[:16], octets[16:24], octets[24 : 24 + meta], octets[24 + meta :]):
            assert f"    {part.hex(' ')}   " in text
