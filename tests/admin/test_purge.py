"""Purging has a time of grace, in which it can be undone and nothing is touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from powermail.base.errors import NoSuch, OperatorError, Trouble
from powermail.keeper.leases import Leases, Process
from powermail.keeper.purges import Plan, Purges
from tests.system.conftest import Running

_DAY_S = 86_400.0


async def purge(running: Running, account: str, **how: object) -> dict[str, Any]:
    found = await running.operation("purge", account=account, **how)
    assert isinstance(found, dict)
    return found


async def orphan(running: Running) -> str:
    """The id of an account that went, with two messages."""
    await running.mailbox("ann@local.example")
    await running.fill(2)
    account = await running.powermail.core.directory.find("ann@local.example")
    assert account is not None
    await running.operation("account_delete", address="ann@local.example")
    return account.id


def later(running: Running, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """The clock of the process goes on."""
    at = running.powermail.world.clock.now() + days * _DAY_S
    monkeypatch.setattr(running.powermail.world.clock, "now", lambda: at)


async def test_a_purge_can_be_undone_until_it_is_due(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    account = await orphan(running)
    found = await purge(running, account, confirm=True)
    assert (found["messages"], found["purged"]) == (2, False) and found["due_at"] is not None
    (row,) = await rows(running)
    assert row["purge_at"] == found["due_at"] and row["messages"] == 2
    await running.powermail.keeping.purges.step()
    assert (await purge(running, account, undo=True))["undone"] == 1
    with pytest.raises(NoSuch, match="no purge of these is waiting"):
        await purge(running, account, undo=True)
    later(running, monkeypatch, 30)
    await running.powermail.keeping.purges.step()
    assert (await rows(running))[0]["messages"] == 2


async def rows(running: Running) -> list[dict[str, Any]]:
    found = await running.operation("orphans")
    assert isinstance(found, list)
    return found


async def test_when_it_is_due_it_is_done_also_by_the_next_process(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    account = await orphan(running)
    await purge(running, account, confirm=True)
    await running.stop()
    await running.start()
    assert (await rows(running))[0]["purge_at"] is not None
    later(running, monkeypatch, 8)
    await running.powermail.keeping.purges.step()
    assert await rows(running) == []
    assert await running.powermail.keeping.purges.plans() == {}


async def test_an_orphan_that_is_known_again_is_kept(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row was deleted by mistake, and put back as it was."""
    account = await orphan(running)
    await purge(running, account, confirm=True)
    import sqlite3

    with sqlite3.connect(running.data / "directory.db") as other:
        other.execute(
            "INSERT INTO accounts (id, address, password) VALUES (?, 'ann@local.example', '{plain}secret')", (int(account),)
        )
    other.close()
    running.powermail.front.resolver.directory.clear()
    later(running, monkeypatch, 8)
    await running.powermail.keeping.purges.step()
    assert len(await running.read("ann@local.example")) == 2


async def test_an_account_that_goes_on_loses_what_it_had_and_not_what_came_since(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.mailbox("ann@local.example")
    await running.fill(2)
    await purge(running, "ann@local.example", confirm=True)
    (new,) = await running.fill(1, 2)
    later(running, monkeypatch, 8)
    await running.powermail.keeping.purges.step()
    assert await running.read("ann@local.example") == [new]


async def test_at_once_is_at_once(running: Running) -> None:
    account = await orphan(running)
    await purge(running, account, confirm=True)
    assert (await purge(running, account, confirm=True, now=True))["purged"] is True
    assert await rows(running) == []
    assert await running.powermail.keeping.purges.plans() == {}


async def test_plans_that_cannot_be_read_purge_nothing(running: Running) -> None:
    account = await orphan(running)
    (running.data / "purges.json").write_text("{nonsense")
    with pytest.raises(Trouble, match=r"purges\.json cannot be read"):
        await running.powermail.keeping.purges.step()
    (running.data / "purges.json").unlink()
    assert (await rows(running))[0]["account"] == account


@pytest_asyncio.fixture
async def beside(running: Running) -> AsyncIterator[Purges]:
    """The purges of another process of this machine, which has looked at them before anything was ordered."""
    core = running.powermail.core
    purges = Purges(core.world, core.cluster, core.index, core.directory, f"{running.data}/purges.json")
    yield purges
    purges.close()


async def test_what_was_undone_is_purged_by_no_process(
    running: Running, beside: Purges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P9: a process that knew of the order, and heard nothing since, brings back neither the mail's end nor the order."""
    account = await orphan(running)
    await beside.step()
    await purge(running, account, confirm=True)
    assert list(await beside.plans()) == [account]
    assert (await purge(running, account, undo=True))["undone"] == 1
    await beside.order([("of another", True)], 0.0)
    assert list(await running.powermail.keeping.purges.plans()) == ["of another"]
    later(running, monkeypatch, 30)
    await beside.step()
    assert (await rows(running))[0]["messages"] == 2
    assert await running.powermail.keeping.purges.plans() == {}


async def test_an_order_that_is_undone_while_others_are_done_is_undone(
    running: Running, beside: Purges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P9: until its turn comes. One that is given again meanwhile stays."""
    account = await orphan(running)
    await beside.order([("first", True)], 0.0)
    await beside.order([(account, True)], 0.0)
    run = beside.run

    async def slow(name: str, plan: Plan) -> int:
        assert name == "first"
        await purge(running, account, undo=True)
        await running.powermail.keeping.purges.order([("first", True)], 1000.0)
        return await run(name, plan)

    monkeypatch.setattr(beside, "run", slow)
    await beside.step()
    assert (await rows(running))[0]["messages"] == 2
    assert list(await beside.plans()) == ["first"]


async def test_who_changes_the_orders_waits_for_who_does_and_not_for_ever(running: Running, beside: Purges) -> None:
    lock = running.powermail.world.disk.lock(f"{running.data}/purges.json.lock")
    ordering = asyncio.create_task(beside.order([("one", True)], 1000.0))
    await asyncio.sleep(0.05)
    assert not ordering.done()
    lock.release()
    await ordering
    assert list(await running.powermail.keeping.purges.plans()) == ["one"]
    held = running.powermail.world.disk.lock(f"{running.data}/purges.json.lock")
    with pytest.raises(Trouble, match="another process holds its lock"):
        await beside.undo(["one"])
    held.release()


async def test_on_a_front_end_alone_it_is_refused_with_where_to_say_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes take no note of it, so that it would fail for ever: law 13 wants the note before a row goes."""
    account = await orphan(running)
    core, desk = running.powermail.core, running.powermail.operations.desk
    front = Purges(core.world, core.cluster, core.index, core.directory, f"{running.data}/purges.json", keeps=False)
    monkeypatch.setattr(desk, "purges", front)
    assert (await purge(running, account))["purged"] is False, "what would be is said anywhere"
    for how in ({}, {"now": True}):
        with pytest.raises(OperatorError, match="say it on a machine that has the role keeper"):
            await purge(running, account, confirm=True, **how)
    for part, machine in (("front1", "alpha"), ("keeper", "beta")):
        leases = Leases(core.world, core.index, Process(part, machine, 7, "1", 1000.0, part))
        await leases.show()
        assert part != "keeper" or await leases.take("repair")
    with pytest.raises(OperatorError, match="say it on beta, which has the role keeper"):
        await purge(running, account, confirm=True)
    assert await front.plans() == {} and (await rows(running))[0]["messages"] == 2
    front.close()


async def test_an_order_on_a_machine_that_is_no_keeper_any_more_holds_up_no_other(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await orphan(running)
    core = running.powermail.core
    front = Purges(core.world, core.cluster, core.index, core.directory, f"{running.data}/purges.json", keeps=False)
    await front.order([(account, True), ("goes-on", False)], 0.0)
    with pytest.raises(Trouble, match=f"the purge of {account} was ordered here.*purge {account} --undo"):
        await front.step()
    assert list(await front.plans()) == [account], "what needs no note is done"
    assert (await rows(running))[0]["messages"] == 2
    await running.powermail.keeping.purges.step()
    assert await front.plans() == {} and await rows(running) == []
    front.close()
