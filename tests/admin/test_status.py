"""What makes an installation degraded is said, with what to do."""

from __future__ import annotations

import datetime

import msgspec
import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.tasks import Tasks
from powermail.base.tls import make_self_signed
from powermail.index.contract import Attempt
from powermail.index.sharing import hand_on_row
from powermail.keeper.belief import end_of
from powermail.keeper.leases import Leases, Process
from tests.system.conftest import Running


async def degraded(running: Running) -> list[str]:
    """All of it."""
    status = await running.operation("status")
    assert isinstance(status, dict)
    return list(status["degraded"])


async def forwarded(running: Running) -> None:
    """One message that waits to leave."""
    await running.operation("account_add", address="f@local.example", forward=["far@example.net"])
    assert (await running.send(["f@local.example"], b"S: x\r\n\r\nx")).startswith("250")


async def test_mail_that_waits_without_a_route_is_said_from_the_first_minute(running: Running) -> None:
    assert await degraded(running) == []
    await forwarded(running)
    (said,) = await degraded(running)
    assert said == "1 messages wait to leave and there is no route: set outbound.smarthost, or they bounce in the end"


async def test_a_directory_that_answers_again_is_said_to_be_away_no_more_though_nobody_else_asks(running: Running) -> None:
    cache = running.powermail.front.resolver.directory
    cache.trouble = "it does not answer"
    assert await degraded(running) == []
    assert cache.trouble == ""


async def test_a_process_that_never_came_up_is_said_and_so_is_one_whose_last_word_was_cleared_away(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it stands anywhere: only its parent's plan says that it ought to be there."""
    core, desk = running.powermail.core, running.powermail.operations.desk

    def made(part: str, machine: str) -> Leases:
        return Leases(core.world, core.index, Process(part, machine, 1, "0", core.world.clock.now(), f"{machine}-{part}"))

    keeper = made("keeper", "here")
    monkeypatch.setattr(desk, "leases", keeper)
    monkeypatch.setattr(desk, "parts", ("front1", "front2", "keeper"))
    for one in (keeper, made("front1", "here"), made("front2", "elsewhere")):
        await one.show()
    assert await keeper.take("repair")
    (said,) = await degraded(running)
    assert said == "process front2 of this machine is not there: the log says why"
    await made("front2", "here").show()
    assert await degraded(running) == []


def broke(error: BaseException) -> None:
    """A background job ended in a bug."""
    pytest.fail(str(error))


async def test_what_the_nodes_hold_of_the_index_on_too_few_of_them_is_said_until_it_is_written_anew(running: Running) -> None:
    """A disk that was put back, and the next one that goes: the index cannot be made anew without it before."""
    await running.operation("account_add", address="a@local.example", password="long enough 1")
    assert (await running.send(["a@local.example"], b"S: x\r\n\r\nx")).startswith("250")
    core, keeping = running.powermail.core, running.powermail.keeping
    await keeping.checkpoint_all()
    assert await degraded(running) == []
    keeping.start(Tasks(core.world.log, broke), broke, {})  # from here on nothing is done in the background
    (holder, *_) = [name for name in core.cluster.nodes if await core.index.checkpoints_lost(name)]
    await core.index.note_move(hand_on_row(holder, core.world.clock.now()))
    assert sorted(await degraded(running)) == [
        f"hand-on {holder}: what lay there is written to others",
        "the checkpoints of 1 mailboxes are written anew: too few nodes are known to hold the last ones",
    ]
    await keeping.drainer.step()
    await keeping.checkpoint_all()
    assert await degraded(running) == []


async def test_the_queue_hides_no_row_when_the_clock_went_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await forwarded(running)
    clock = running.powermail.world.clock
    before = clock.now()
    monkeypatch.setattr(type(clock), "now", lambda _: before - 3600.0)
    listed = await running.operation("queue_list")
    assert isinstance(listed, list) and len(listed) == 1
    assert await running.operation("queue_list", older_s=60) == [], "nobody can say that it waits for a minute"
    assert await running.operation("queue_hold", domain="example.net") == {"rows": 1}


@pytest.mark.parametrize("running", [("outbound.smarthost=127.0.0.1:1",)], indirect=True)
async def test_mail_that_waits_with_a_route_is_no_trouble_by_itself(running: Running) -> None:
    await forwarded(running)
    assert not any("no route" in said for said in await degraded(running))


@pytest.mark.parametrize(
    ("days", "said"),
    [(400, []), (15, []), (13, ["the certificate ends in 12 days, on "]), (0, ["the certificate ended on "])],
)
async def test_a_certificate_near_its_end_is_said(running: Running, days: int, said: list[str]) -> None:
    now = datetime.datetime.now(datetime.UTC)
    pem, key = make_self_signed("localhost", now - datetime.timedelta(days=3650 - days, minutes=1))
    (running.data / "tls" / "certificate.pem").write_bytes(pem)
    (running.data / "tls" / "key.pem").write_bytes(key)
    front = running.powermail.front
    assert front.certificates is not None and front.certificates_lane is not None
    await front.certificates_lane.run(front.certificates.reload)
    found = await degraded(running)
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True)), found


async def test_queue_commands_pick_by_destination_sender_and_age(running: Running) -> None:
    await running.operation("account_add", address="f@local.example", forward=["a@one.example", "b@two.example"])
    await running.send(["f@local.example"], b"S: x\r\n\r\nx", "ann@example.org")
    rows = await running.operation("queue_list")
    assert isinstance(rows, list) and len(rows) == 2

    async def picked(**how: object) -> list[str]:
        found = await running.operation("queue_list", **how)
        assert isinstance(found, list)
        return sorted(row["to"] for row in found)

    assert await picked(to="one.example") == ["a@one.example"]
    assert await picked(to="B@two.example") == ["b@two.example"]
    assert await picked(to="none.example") == []
    assert await picked(older_s=3600) == []
    assert await picked(sender=rows[0]["from"]) == ["a@one.example", "b@two.example"]
    assert await picked(sender="elsewhere.example") == []
    assert await running.operation("queue_hold", domain="one.example") == {"rows": 1}
    assert {row["to"]: row["held"] for row in await listed(running)} == {"a@one.example": True, "b@two.example": False}
    assert await running.operation("queue_held") == [{"domain": "one.example", "waiting": 1}]
    await running.send(["f@local.example"], b"S: y\r\n\r\nx", "ann@example.org")
    assert sum(bool(row["held"]) for row in await listed(running)) == 2, "what comes later is held too"
    assert await running.operation("queue_release", domain="ONE.example") == {"rows": 2}
    assert not any(row["held"] for row in await listed(running))
    assert await running.operation("queue_held") == []


async def test_what_was_tried_is_told_with_host_tls_and_time(running: Running) -> None:
    await forwarded(running)
    (row,) = await running.index.queue_rows(0, 9)
    now = running.powermail.world.clock.now()
    await running.index.defer([row], [now + 60], Attempt(1.5, "mx.example.net", "TLSv1.3", 0.25, "451 4.3.0 later"), "")
    story = await running.operation("queue_show", number=row.id)
    assert isinstance(story, dict)
    assert story["tried"] == [
        {
            "at": "1970-01-01T00:00:01.500000Z",
            "host": "mx.example.net",
            "tls": "TLSv1.3",
            "seconds": 0.25,
            "status": "451 4.3.0 later",
        }
    ]
    assert (story["attempts"], story["last_status"]) == (1, "451 4.3.0 later")


async def test_a_disk_that_is_low_is_said_before_it_is_full(running: Running) -> None:
    desk = running.powermail.operations.desk
    free = min(node.stat().free_octets for node in running.nodes)
    reserve = int(free / limits.NODE_LOW_FACTOR * 1.2)
    cluster = msgspec.structs.replace(desk.settings.cluster, reserve_octets=reserve)
    desk.settings = msgspec.structs.replace(desk.settings, cluster=cluster)
    found = await degraded(running)
    assert len(found) == 3
    assert found[0].endswith(f"MiB are free; it takes no mail below {reserve >> 20} MiB")


async def listed(running: Running) -> list[dict[str, object]]:
    rows = await running.operation("queue_list")
    assert isinstance(rows, list)
    return rows


async def test_verify_counts_a_message_once_whatever_is_wrong_with_it(running: Running) -> None:
    await running.mailbox("ann@local.example")
    for number in range(2):
        await running.send(["ann@local.example"], b"S: %d\r\n\r\nx" % number)
    running.problems_expected = True
    spoilt = 0
    for node in running.nodes:  # every copy of the first one
        for path in (running.data / "nodes" / node.id / "segments").iterdir():
            octets = bytearray(path.read_bytes())
            at = octets.find(b"S: 0\r\n")
            if at > 0:
                spoilt += 1
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(b"X")
    assert spoilt == 2
    found = await running.operation("verify")
    assert isinstance(found, dict)
    assert (found["messages"], found["wrong"], len(found["problems"])) == (2, 1, 3)


async def test_a_node_whose_copies_were_damaged_and_repaired_keeps_the_count_and_the_date(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.fill(3)
    (entry, _, _) = await running.entries()
    message = await running.index.message(entry.key)
    assert message is not None
    name = message.nodes[0]
    await running.index.note_bad(entry.key, name, "checksum")
    await running.index.believe([entry.key], name, await end_of(running.powermail.core.cluster.nodes[name]))
    rows = {row["id"]: row for row in (await running.status())["nodes"]}
    assert rows[name]["bad_copies"] == 1 and rows[name]["bad_copy_at"].endswith("Z")
    assert [row["bad_copies"] for other, row in rows.items() if other != name] == [0, 0]
    await running.heal()


async def test_recipients_that_cannot_be_read_are_not_called_none(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await running.mailbox("ann@local.example")
    await running.fill(1)
    (entry,) = await running.entries()

    async def where() -> object:
        found = await running.operation("where", key=entry.key.hex())
        assert isinstance(found, dict)
        return found["recipients"]

    assert await where() == ["ann@local.example"]

    async def away(key: bytes) -> None:
        raise IndexTrouble("away")

    monkeypatch.setattr(running.powermail.operations.desk.opener, "open", away)
    assert await where() is None
