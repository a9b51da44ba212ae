"""A disk that was expelled is found again: its mail is brought back, deleted mail is not, and the disk never joins."""

from __future__ import annotations

import shutil
import sqlite3
from typing import Any

import pytest

from powermail.base.errors import OperatorError
from powermail.keeper.belief import compare_belief
from powermail.storage.contract import Held
from tests.system.conftest import Running

ANN = "ann@local.example"


async def expelled(running: Running) -> tuple[str, list[bytes]]:
    """Node a is dead and was expelled, with the only copies of some messages: the directory in which its disk was found then,
    and those.
    """
    await running.mailbox(ANN)
    await running.fill(8)
    messages = [await running.index.message(entry.key) for entry in await running.entries()]
    only = [message.key for message in messages if message is not None and "a" in message.nodes]
    await running.stop()
    shutil.move(running.data / "nodes/a", running.data / "found")
    await running.start()
    core = running.powermail.core
    assert await core.index.expel("a", await core.index.layout_version())
    await core.following.refresh()
    for node in running.nodes * 2:  # repair may have made a second one meanwhile
        for key in only:
            if (await node.has([key]))[0] is Held.LIVE:
                mark = await core.index.proof(core.index.connection)
                await node.drop([(key, await node.verify(key))], mark)
        await compare_belief(core.index, node, only)
    assert only and await core.index.under_copied_total(core.cluster.counted(), 1) == (len(only), sum([
        message.octets for message in messages if message is not None and message.key in only
    ]))  # fmt: skip
    return "found", only


async def salvage(running: Running, directory: str, **how: object) -> dict[str, Any]:
    result = await running.operation("node_salvage", directory=directory, **how)
    assert isinstance(result, dict)
    return result


async def test_what_only_an_expelled_disk_has_is_brought_back(running: Running) -> None:
    """Somebody expelled it too early: messages are listed, and nobody can read them."""
    running.problems_expected = True
    directory, only = await expelled(running)
    core = running.powermail.core
    counted = core.cluster.counted()
    looked = await salvage(running, directory)
    assert (looked["live"], looked["thin"], looked["copied"], looked["done"]) == (len(only), len(only), 0, False)
    assert (await core.index.under_copied_total(counted, 1))[0] == len(only)
    done = await salvage(running, directory, confirm=True)
    assert (done["copied"], done["left"], done["unknown"], done["done"]) == (len(only), 0, 0, True)
    assert await core.index.under_copied_total(counted, 2) == (0, 0)
    assert len(await running.read(ANN)) == 8
    again = await salvage(running, directory, confirm=True)
    assert again["thin"] == again["copied"] == 0
    assert "a" not in {row.id for row in await core.index.node_rows()}, "the disk has not joined"


async def test_deleted_mail_stays_deleted_and_unknown_mail_goes_where_it_is_told(running: Running) -> None:
    """P8: a key that is not known may be one whose deletion was forgotten."""
    running.problems_expected = True
    directory, only = await expelled(running)
    core = running.powermail.core
    inbox = await running.inbox()
    deleted, forgotten, *rest = only
    uids = {entry.key: entry.uid for entry in await running.entries()}
    await core.index.expunge(inbox.id, [uids[deleted], uids[forgotten]])
    with sqlite3.connect(running.data / "index.db") as other:
        other.execute("DELETE FROM messages WHERE key = ?", (forgotten,))
    looked = await salvage(running, directory, into="Salvaged")
    assert (looked["deleted"], looked["unknown"], looked["entered"], looked["live"]) == (1, 1, 0, len(rest))
    for expected in (1, 0):
        done = await salvage(running, directory, into="Salvaged", confirm=True)
        assert (done["unknown"], done["entered"], done["left"]) == (1, expected, 0)
    assert {entry.key for entry in await running.entries()} & {deleted, forgotten} == set()
    box = await core.index.find_mailbox(inbox.account, "Salvaged")
    assert box is not None and box.messages == 1
    (entry,) = await core.index.entries(box.id, 0, 1 << 32, 9)
    assert entry.key not in (deleted, forgotten)
    message = await core.index.message(entry.key)
    assert message is not None and len(message.nodes) == 2
    await running.heal()


async def test_what_is_no_such_disk_is_refused(running: Running) -> None:
    for directory, why in (
        ("nodes/a", "which is a member"),
        ("nowhere", "is no directory of a node"),
    ):
        with pytest.raises(OperatorError, match=why):
            await salvage(running, directory)
    directory = "found"
    shutil.copytree(running.data / "nodes/a", running.data / directory)
    identity = running.data / directory / "identity"
    identity.write_bytes(identity.read_bytes().replace(running.index.cluster.encode(), b"ab" * 16).replace(
        running.nodes[0].incarnation.encode(), b"cd" * 8))  # fmt: skip
    with pytest.raises(OperatorError, match="belongs to another cluster"):
        await salvage(running, directory)
    with pytest.raises(OperatorError, match="no name of a mailbox"):
        await salvage(running, directory, into="a\nb")
