"""The way out as a whole: workers that live, messages that do not wait for each other, sessions that go stale."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.settings import OutboundSettings
from powermail.base.tasks import Worker
from powermail.outbound.client import Hop
from powermail.outbound.routing import Route
from tests.cluster.support import virtual
from tests.outbound.hop import ScriptedHop
from tests.outbound.rig import BODY, Rig, Routes


def failing(rig: Rig, name: str, lost: bool) -> Callable[[], None]:
    """The index fails at every call of that name, before or (its answer is lost) after it has done it; how to end that."""
    index: Any = rig.office.index
    real = getattr(index, name)

    async def call(*args: Any, **kwargs: Any) -> Any:
        if lost:
            await real(*args, **kwargs)
        raise IndexTrouble("database is locked")

    setattr(index, name, call)

    def mend() -> None:
        setattr(index, name, real)

    return mend


async def worker(rig: Rig) -> tuple[Worker, asyncio.Task[None]]:
    """The job as a process runs it."""
    world = rig.office.world
    made = Worker("outbound", rig.outbound.step, world.clock, world.log, rig.office.bugs.append)
    return made, asyncio.get_running_loop().create_task(made.run())


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("answer", ["250 taken", "550 5.1.1 no", "451 later"])
@virtual
async def test_an_index_locked_while_the_hop_answers_ends_no_worker_and_sends_nothing_twice(answer: str, lost: bool) -> None:
    rig = await Rig.open(ScriptedHop({"END": f"SLEEP 5|{answer}"} if answer[0] != "2" else {"END": "SLEEP 5|NEXT"}))
    job, task = await worker(rig)
    await rig.queue("one")
    await asyncio.sleep(4)
    mends = [failing(rig, name, lost) for name in ("finish", "defer", "give_back", "lease_due", "renew_leases")]
    await asyncio.sleep(400)
    if answer[0] == "2":
        assert rig.outbound.troubles(), "the status says so"
    assert len([line for line in rig.hop.lines if line.startswith("DATA")]) == 1
    for mend in mends:
        mend()
    rig.hop.script = {}
    await asyncio.sleep(40)
    assert rig.outbound.troubles() == []
    await rig.queue("two")
    await asyncio.sleep(400)
    assert not task.done()
    assert job.trouble == ""
    expected = {"2": ["one", "two"], "5": ["two"], "4": ["one", "two"]}[answer[0]]
    assert sorted(rig.hop.recipients()) == expected, "each arrives once"
    assert await rig.refused() == (["one"] if answer[0] == "5" else [])
    assert await rig.rows() == {}
    task.cancel()
    await rig.close()


@virtual
async def test_after_a_crash_between_250_and_the_index_a_message_is_sent_once_more() -> None:
    """The one case in which it is, as the documents say."""
    rig = await Rig.open()
    mend = failing(rig, "finish", False)
    await rig.queue("one")
    await rig.outbound.step()
    await asyncio.sleep(5)
    rig.tasks.abandon()
    mend()
    rig.start()
    await asyncio.sleep(limits.QUEUE_LEASE_S)
    await rig.push()
    assert rig.hop.recipients() == ["one", "one"]
    await rig.close()


@virtual
async def test_an_error_nobody_thought_of_ends_no_worker_and_loses_no_mail() -> None:
    rig = await Rig.open()
    _, task = await worker(rig)
    dispatcher: Any = rig.outbound._dispatcher
    real = dispatcher.dispatch

    async def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    dispatcher.dispatch = broken
    await rig.queue("one")
    await asyncio.sleep(5)
    assert rig.log("bug")
    rig.office.world.log.lines.clear()  # type: ignore[attr-defined]
    dispatcher.dispatch = real
    await asyncio.sleep(2 * limits.QUEUE_RETRY_FIRST_S)
    assert rig.hop.recipients() == ["one"]
    assert not task.done()
    task.cancel()
    await rig.close()


@pytest.mark.parametrize(
    "script",
    [
        {"CONNECT": "SILENT"},
        {"EHLO": "SILENT"},
        {"MAIL": "SILENT"},
        {"RCPT": "SILENT"},
        {"DATA": "SILENT"},
        {"END": "SLEEP 40|NEXT"},
        {"END": "SILENT"},
        {"RCPT": "550 no", "QUIT": "SILENT"},
        {"DATA": "451 later", "RSET": "SILENT"},
    ],
    ids=str,
)
@virtual
async def test_one_slow_session_delays_no_other_message(script: dict[str, str]) -> None:
    rig = await Rig.open(ScriptedHop(script))
    _, task = await worker(rig)
    await rig.queue("slow")
    await asyncio.sleep(2)
    rig.hop.script = {}
    await rig.queue("quick")
    await asyncio.sleep(2)
    assert "quick" in rig.hop.recipients()
    task.cancel()
    await rig.outbound._tasks.cancel()
    rig.hop.close()


@virtual
async def test_one_dead_hop_delays_no_other_hop_and_one_slow_domain_no_other_domain() -> None:
    rig = await Rig.open(ScriptedHop({"CONNECT": "SILENT"}), OutboundSettings(concurrency=4))
    other = ScriptedHop()
    await other.start(rig.office.world.net)
    rig.outbound.router = Routes({"": rig.route, "other.example": Route("127.0.0.1", other.port)})
    _, task = await worker(rig)
    for number in range(60):
        await rig.queue(f"dead{number}")
    await asyncio.sleep(3)
    await rig.queue("quick@other.example")
    await asyncio.sleep(2)
    assert other.recipients() == ["quick"]

    rig.hop.script = {"RCPT far.example": "SLEEP 40|NEXT"}
    await asyncio.sleep(limits.SMTP_CLIENT_REPLY_TIMEOUT_S + 40)
    for number in range(60):
        await rig.queue(f"slow{number}")
    await asyncio.sleep(3)
    await rig.queue("quick@third.example")
    await asyncio.sleep(45)
    assert "quick" in rig.hop.recipients()
    assert rig.counted("outbound.bugs") == 0
    task.cancel()
    await rig.outbound._tasks.cancel()
    rig.hop.close()
    other.close()


@virtual
async def test_who_waits_for_a_connection_too_long_lets_others_have_a_turn_and_no_attempt_is_counted() -> None:
    rig = await Rig.open(ScriptedHop({"CONNECT": "SILENT"}), OutboundSettings(concurrency=1))
    _, task = await worker(rig)
    for number in range(3):
        await rig.queue(f"each{number}")
    await asyncio.sleep(2 * limits.QUEUE_SLOT_WAIT_S)
    assert sorted(row.attempts for row in (await rig.rows()).values()) == [0, 0, 0]
    rig.hop.script = {}
    await asyncio.sleep(limits.SMTP_CLIENT_REPLY_TIMEOUT_S + 200)
    assert sorted(rig.hop.recipients()) == ["each0", "each1", "each2"]
    task.cancel()
    await rig.close()


@pytest.mark.parametrize(
    "how", ["RESET", "CLOSE", "421 4.3.2 idle for too long|CLOSE", "421 idle", "250 surplus", "550 5.1.1 no", "RAW 2"]
)
@pytest.mark.parametrize("moment", ["while idle", "just then"])
@virtual
async def test_a_stale_session_costs_no_attempt(how: str, moment: str) -> None:
    rig = await Rig.open()
    await rig.queue("first")
    await rig.push()
    (session,) = rig.hop.sessions
    if moment == "while idle":
        for step in how.split("|"):
            session._step(step)
        await asyncio.sleep(1)
    began = rig.office.world.clock.monotonic()
    await rig.queue("second")
    if moment == "just then" and how.startswith(("RESET", "CLOSE", "421")):
        rig.hop.once, rig.hop.script = True, {"MAIL": how}
    elif moment == "just then":
        session._step(how)  # it is on its way when the next message begins
    await rig.push()
    assert rig.hop.recipients() == ["first", "second"]
    assert await rig.rows() == {}
    assert rig.office.world.clock.monotonic() - began < 10, "at once"
    assert not rig.log("deferred")
    assert await rig.refused() == []
    assert all("550" not in line for line in rig.log("sent"))
    await rig.close()


@virtual
async def test_a_hop_that_forgets_how_a_session_stands_gets_a_fresh_one_at_once() -> None:
    rig = await Rig.open()
    await rig.queue("first")
    await rig.push()
    rig.hop.once, rig.hop.script = True, {"MAIL": "503 5.5.1 nested MAIL command", "RCPT": "503 5.5.1 no"}
    await rig.queue("second")
    await rig.push()
    assert rig.hop.recipients() == ["first", "second"]
    assert not rig.log("deferred")
    assert len(rig.hop.sessions) == 2
    await rig.close()


@virtual
async def test_sessions_are_used_again_and_closed_when_idle() -> None:
    rig = await Rig.open()
    for name in ("one", "two", "three"):
        await rig.queue(name)
        await rig.push()
    assert len(rig.hop.sessions) == 1
    await asyncio.sleep(limits.SMTP_CLIENT_IDLE_S + 3)
    assert rig.hop.lines[-1] == "QUIT"
    assert rig.hop.sessions[0].closed
    await rig.close()


@virtual
async def test_a_hop_that_breaks_its_own_pipelining_is_spoken_to_line_by_line() -> None:
    """It answers the first command of a row and forgets the others."""
    rig = await Rig.open()
    rig.hop.forgetful = True
    await rig.queue("one", "two")
    began = rig.office.world.clock.monotonic()
    await rig.push()
    assert rig.hop.recipients() == ["one", "two"]
    assert rig.office.world.clock.monotonic() - began < limits.SMTP_CLIENT_PIPELINE_S + 5
    assert not rig.log("deferred"), "no attempt is counted"
    before = len(rig.hop.lines)
    await rig.queue("next")
    await rig.push()
    assert [line[:4] for line in rig.hop.lines[before:]] == ["MAIL", "RCPT", "DATA"]
    assert rig.hop.recipients()[-1] == "next"
    await rig.close()


@virtual
async def test_a_hop_that_takes_its_time_for_a_recipient_gets_it() -> None:
    rig = await Rig.open(ScriptedHop({"RCPT": "SLEEP 200|NEXT"}))
    await rig.queue("one")
    await rig.push()
    assert rig.hop.recipients() == ["one"]
    assert not rig.log("deferred")
    await rig.close()


@virtual
async def test_recipients_a_transaction_has_no_room_for_get_another_at_once() -> None:
    rig = await Rig.open(ScriptedHop({"RCPT third": "452 4.5.3 too many recipients"}))
    await rig.queue("first", "second", "third")
    await rig.push()
    assert rig.hop.recipients()[:2] == ["first", "second"]
    assert (await rig.rows())["third"].attempts == 1, "the hop has no room for it alone either"
    assert len([line for line in rig.hop.lines if line.startswith("RCPT TO:<third")]) == 2
    await rig.close()


@virtual
async def test_many_recipients_go_in_transactions_of_a_hundred() -> None:
    rig = await Rig.open()
    await rig.queue(*[f"r{number}" for number in range(250)])
    await rig.push()
    assert sorted(len(taken.recipients) for taken in rig.hop.messages) == [50, 100, 100]
    assert len(set(rig.hop.recipients())) == 250
    await rig.close()


@virtual
async def test_without_a_route_mail_waits_and_expires_with_a_notice() -> None:
    rig = await Rig.open(settings=OutboundSettings(lifetime_s=3600.0))
    rig.outbound.router = Routes({})
    _, task = await worker(rig)
    await rig.queue("one")
    await asyncio.sleep(30)
    assert "no route" in (await rig.rows())["one"].last_status
    await asyncio.sleep(3600)
    (notice,) = await rig.notices()
    assert b"Status: 4.4.7" in notice
    assert b"no route" in notice
    assert await rig.rows() == {}
    task.cancel()
    await rig.close()


@virtual
async def test_a_route_that_comes_is_used_soon() -> None:
    rig = await Rig.open()
    rig.outbound.router = Routes({})
    _, task = await worker(rig)
    await rig.queue("one")
    await asyncio.sleep(7200)
    rig.outbound.router = Routes({"": rig.route})
    await asyncio.sleep(1.3 * limits.QUEUE_NO_ROUTE_RETRY_S)
    assert rig.hop.recipients() == ["one"]
    task.cancel()
    await rig.close()


@virtual
async def test_each_attempt_is_remembered_and_logged_with_its_host() -> None:
    rig = await Rig.open(ScriptedHop({"RCPT": "451 4.2.0 later"}))
    await rig.queue("one")
    await rig.push()
    await rig.hurry()
    (row,) = (await rig.rows()).values()
    attempts = await rig.office.index.queue_attempts(row.id)
    assert [(attempt.host, attempt.tls, attempt.status) for attempt in attempts] == [
        (f"127.0.0.1:{rig.hop.port}", "", "451 4.2.0 later")
    ] * 2
    assert all(f"host=127.0.0.1:{rig.hop.port}" in line for line in rig.log("deferred"))
    rig.hop.script = {}
    await rig.hurry()
    (line,) = rig.log("sent")
    assert "recipient=one@far.example" in line
    assert "attempt=3" in line
    assert "delay=" in line
    await rig.close()


@virtual
async def test_a_held_domain_waits_and_others_do_not() -> None:
    rig = await Rig.open()
    await rig.office.index.hold_domain("far.example", True)
    await rig.queue("held", "free@other.example")
    await rig.push()
    assert rig.hop.recipients() == ["free"]
    await rig.office.index.hold_domain("far.example", False)
    await rig.push()
    assert rig.hop.recipients() == ["free", "held"]
    await rig.close()


@virtual
async def test_recipients_that_differ_by_case_are_two() -> None:
    rig = await Rig.open()
    await rig.queue("Bob", "bob", "bob@FAR.example")
    await rig.push()
    assert rig.hop.recipients() == ["Bob", "bob"]
    await rig.close()


@virtual
async def test_trouble_of_our_storage_is_no_fault_of_the_message() -> None:
    rig = await Rig.open()
    await rig.queue("one", body=BODY * 5000)
    for node in rig.office.nodes:
        node.miss()
    await rig.push()
    assert "storage" in (await rig.rows())["one"].last_status
    assert rig.hop.messages == []
    for node in rig.office.nodes:
        await node.reopen() if hasattr(node, "reopen") else None
    rig.hop.close()


@virtual
async def test_the_null_sender_gets_no_notice() -> None:
    rig = await Rig.open(ScriptedHop({"RCPT": "550 no"}))
    await rig.queue("one", sender="")
    await rig.push()
    assert await rig.rows() == {}
    assert await rig.notices() == []
    await rig.close()


@virtual
async def test_a_stop_in_the_turn_in_which_the_outcome_comes_sends_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply was read, and who waits for it has not gone on yet: what it says is not lost with him."""
    rig = await Rig.open(ScriptedHop({"END": "SLEEP 5|NEXT"}))
    await rig.queue("one")
    await rig.outbound.step()
    await asyncio.sleep(2)
    received, stops = Hop.data_received, []

    def just_before(hop: Hop, data: bytes) -> None:
        stops.append(asyncio.create_task(rig.outbound.stop()))
        received(hop, data)

    monkeypatch.setattr(Hop, "data_received", just_before)
    await asyncio.sleep(5)
    await stops[0]
    monkeypatch.undo()
    assert rig.hop.recipients() == ["one"]
    rig.hop.script = {}
    rig.start()
    await asyncio.sleep(1)
    await rig.push()
    assert rig.hop.recipients() == ["one"]
    assert await rig.rows() == {}
    await rig.close()


@pytest.mark.parametrize("moment", ["CONNECT", "RCPT", "END"])
@virtual
async def test_a_stop_waits_for_outcomes_and_for_nothing_else(moment: str) -> None:
    rig = await Rig.open(ScriptedHop({moment: "SLEEP 5|NEXT"}))
    await rig.queue("one")
    await rig.outbound.step()
    await asyncio.sleep(2)
    began = rig.office.world.clock.monotonic()
    await rig.outbound.stop()
    took = rig.office.world.clock.monotonic() - began
    assert (took > 1) == (moment == "END")
    assert took < limits.QUEUE_SETTLE_WAIT_S
    assert rig.hop.recipients() == (["one"] if moment == "END" else [])
    rig.hop.script = {}
    rig.start()
    await asyncio.sleep(1)
    await rig.push()
    assert rig.hop.recipients() == ["one"]
    assert not rig.log("deferred")
    await rig.close()
