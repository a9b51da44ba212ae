"""What every storage node promises, sentence by sentence, on disks, in memory and over a network: its copies."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.base.errors import CommitRefused, CopyDamaged, CopyMissing, NodeReadOnly, NodeTrouble
from powermail.storage.contract import START, Held, Mark, NodeState, Origin, Position, Stamp, StorageNode
from tests.storage.asks import NAME, NO_MARK, chunk, compact_all, fresh, heard, held, put, refused, text, unknown
from tests.storage.rigs import Rig, then_reopened, walk
from tests.storage.support import key

# -- what it is ---------------------------------------------------------------------------------------------------


async def test_it_says_who_it_is(node: StorageNode) -> None:
    assert (node.id, node.group, node.priority, node.state) == ("a", "rack-a", 3, NodeState.READ_WRITE)
    assert node.incarnation
    assert node.stat().state == "read-write"
    await node.open()  # fine if open
    await node.probe()
    facts = await node.facts()
    assert (facts.incarnation, facts.birth, facts.damaged, facts.mark) == (node.incarnation, START, False, NO_MARK)
    assert facts.boots == ((await fresh(node)).boot,)


async def test_a_closed_node_says_so(node: StorageNode) -> None:
    await put(node, 1)
    await node.close()
    assert (node.state, node.incarnation, node.stamp()) == (NodeState.CLOSED, "", None)
    with pytest.raises(NodeTrouble):
        await node.read_commit(key(1))
    with pytest.raises(NodeTrouble):
        await node.has([key(1)])
    await unknown(node, 2)
    await node.close()  # fine if closed


async def test_each_opening_adds_a_boot_to_the_chain(rig: Rig) -> None:
    """Law 12: the chain tells an older disk from this one."""
    chains = [(await rig.node.facts()).boots]
    for _ in range(3):
        node = await rig.reopen()
        chains.append((await node.facts()).boots)
        assert (await fresh(node)).boot == chains[-1][-1]
    assert [len(chain) for chain in chains] == [1, 2, 3, 4]
    assert all(chains[3][: len(chain)] == chain for chain in chains)
    assert len(set(chains[3])) == 4


async def test_the_chain_of_boots_says_where_each_began(rig: Rig) -> None:
    """Law 12: an older disk forked off before what the index has seen, however far it has grown since."""
    assert (await rig.node.facts()).began == (START,)
    ends = []
    for number in (1, 2):
        await put(rig.node, number)
        ends.append((await rig.node.facts()).end)
        await rig.reopen(lose_index=number == 2)
    facts = await rig.node.facts()
    assert facts.began == (START, *ends)
    assert len(facts.boots) == 3 and facts.end > ends[-1]


async def test_a_long_chain_of_boots_forgets_its_beginning(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BOOTS_MAX", 3)
    for _ in range(4):
        await rig.reopen()
    before = (await rig.node.facts()).boots
    after = (await (await rig.reopen()).facts()).boots
    assert len(before) == len(after) == 3 and after[:2] == before[1:]
    facts = await rig.node.facts()
    assert len(facts.began) == 3 and sorted(facts.began) == list(facts.began)


# -- receipts -----------------------------------------------------------------------------------------------------


async def test_a_committed_message_is_read_octet_for_octet(node: StorageNode) -> None:
    octets = bytes(range(256)) * 20
    await node.commit(key(1), [chunk(0, octets, compressed=True)], b"the record", 1, None, Origin.DELIVERY)
    assert await node.read_commit(key(1)) == b"the record"
    assert await node.read_chunk(key(1), 0) == chunk(0, octets, compressed=True)
    assert await held(node, 1, 2) == ["live", "absent"]
    assert (await heard(node)).stat().messages == 1


async def test_a_receipt_names_node_incarnation_and_position(node: StorageNode) -> None:
    """Law 1; the position is the same wherever it is told."""
    receipt = await put(node, 1)
    later = await put(node, 2)
    assert (receipt.node, receipt.incarnation) == ("a", node.incarnation)
    assert START < receipt.position < later.position < (await node.facts()).end
    assert await node.verify(key(1)) == receipt.position
    scan = await node.scan(START, 10, 0.0)
    assert [(item.key, item.position) for item in scan.items] == [(key(1), receipt.position), (key(2), later.position)]
    assert [(item.key, item.position) for item in await node.inventory(b"", 10)] == [
        (key(1), receipt.position),
        (key(2), later.position),
    ]


async def test_a_commit_of_a_live_key_answers_the_position_it_has(rig: Rig) -> None:
    """Law 1, R08: other octets under a key that is there never take its place."""
    first = await put(rig.node, 1, b"the first")
    assert await put(rig.node, 1, b"another") == first
    assert await put(rig.node, 1, b"another", origin=Origin.REPAIR) == first
    node = await rig.reopen()
    assert await put(node, 1, b"another") == first
    assert (await node.read_chunk(key(1), 0)).stored == b"the first"
    assert await walk(node) == [(key(1), Origin.DELIVERY)]


async def test_two_commits_of_a_key_at_once_are_one(node: StorageNode) -> None:
    first, second = await asyncio.gather(put(node, 1), put(node, 1))
    assert first == second and (await heard(node)).stat().messages == 1


async def test_a_stream_counts_from_its_commit_on(node: StorageNode) -> None:
    await node.append(key(1), [chunk(0, b"first")])
    assert (await node.read_chunk(key(1), 0)).stored == b"first"
    assert await held(node, 1) == ["absent"]
    assert await walk(node) == [] and await node.inventory(b"", 10) == []
    with pytest.raises(CopyMissing):
        await node.read_commit(key(1))
    await node.append(key(1), [chunk(1, b"second")])
    await node.commit(key(1), [chunk(2, b"third")], b"{}", 3, await fresh(node), Origin.DELIVERY)
    assert [(await node.read_chunk(key(1), n)).stored for n in range(3)] == [b"first", b"second", b"third"]
    with pytest.raises(CopyMissing):
        await node.read_chunk(key(1), 3)


async def test_small_messages_are_read_many_at_once(node: StorageNode) -> None:
    for number in (1, 2, 3):
        await put(node, number)
    await node.append(key(5), [chunk(0, b"open")])
    found = await node.read_small([key(3), key(9), key(1), key(5)])
    assert found[1] is None and found[3] is None
    assert found[0] is not None and found[0].commit == b'{"commit":3}'
    assert found[2] is not None and found[2].parts == [text(1)]


async def test_small_messages_come_uncompressed_however_they_are_stored(node: StorageNode) -> None:
    long = b"one line, over and over\r\n" * 40
    await node.commit(key(1), [chunk(0, long, compressed=True), chunk(1, b"the end")], b"{1}", 2, None, Origin.REPAIR)
    await put(node, 2)
    await node.commit(key(3), [chunk(0, long[:500], compressed=True)], b"{3}", 1, None, Origin.REPAIR)
    found = await node.read_small([key(3), key(2), key(1), key(3)])
    assert [whole and whole.parts for whole in found] == [[long[:500]], [text(2)], [long, b"the end"], [long[:500]]]


# -- the window (laws 2, 5) ---------------------------------------------------------------------------------------


async def test_stamps_are_a_boot_and_the_nodes_own_clock(rig: Rig) -> None:
    before = await fresh(rig.node)
    rig.ticks.now += 5.0
    after = await fresh(rig.node)
    assert after.boot == before.boot and after.at == pytest.approx(before.at + 5.0)


async def test_a_fresh_stamp_was_made_after_it_was_asked_for(rig: Rig) -> None:
    """Laws 9, 11: what is known without asking may be of before, and its age says how much."""
    node, known = rig.node, await fresh(rig.node)
    assert 0.0 <= node.stamp_age_s() < limits.STAMP_AGE_MAX_S
    rig.ticks.now += 5.0
    asked = await node.fresh_stamp()
    assert asked is not None and asked.boot == known.boot and asked.at > known.at + 4.9
    await node.fence(asked)
    await refused(node, 1, known)


async def test_a_commit_within_the_window_is_taken(rig: Rig) -> None:
    stamp = await fresh(rig.node)
    rig.ticks.now += limits.COMMIT_WINDOW_S - 0.1
    await put(rig.node, 1, stamp=stamp)
    await put(rig.node, 2, stamp=None, origin=Origin.REPAIR)


async def test_a_stamp_that_is_too_old_is_refused(rig: Rig) -> None:
    stamp = await fresh(rig.node)
    rig.ticks.now += limits.COMMIT_WINDOW_S + 0.1
    await refused(rig.node, 1, stamp)
    await put(rig.node, 1, stamp=await fresh(rig.node))


async def test_a_stamp_of_another_boot_is_refused(rig: Rig) -> None:
    """A front end slept while the node was started anew."""
    stamp = await fresh(rig.node)
    node = await rig.reopen()
    await refused(node, 1, stamp)
    await refused(node, 1, Stamp("00" * 8, (await fresh(node)).at))


async def test_a_stamp_that_is_not_newer_than_one_that_was_named_is_refused(rig: Rig) -> None:
    """Laws 2, 9, 11: without this a pause between check and append brings a forgotten message back."""
    node = rig.node
    old = await fresh(node)
    rig.ticks.now += 1.0
    named = await fresh(node)
    await node.fence(named)
    await refused(node, 1, old)
    await refused(node, 2, named)  # what was taken with it came before; what is taken with it now would come after
    await put(node, 2, stamp=await fresh(node))  # also while the clock stands still
    rig.ticks.now += 1.0
    await put(node, 3, stamp=await fresh(node))
    await node.fence(old)  # an older one lifts nothing
    await refused(node, 4, old)


async def test_a_fence_is_not_taken_back_by_a_stamp_of_another_boot(rig: Rig) -> None:
    node = rig.node
    foreign = await fresh(node)
    node = await rig.reopen()
    old = await fresh(node)
    rig.ticks.now += 1.0
    await node.fence(await fresh(node))
    await node.fence(foreign)
    await refused(node, 1, old)


async def test_a_fence_waits_for_every_append_that_passed_the_check(rig: Rig) -> None:
    """Law 2: check, pause, scan, delete, forget, append: the message would be back."""
    node = rig.node
    await put(node, 1)
    rig.steady()
    rig.hold()
    under_way = asyncio.ensure_future(put(node, 2, stamp=await fresh(node)))
    await asyncio.sleep(0.01)
    rig.ticks.now += 1.0
    fence = asyncio.ensure_future(node.fence(await fresh(node)))
    done, _ = await asyncio.wait([fence], timeout=0.05)
    assert not done, "it answered before the append was durable"
    rig.release()
    end = await fence
    receipt = await under_way
    assert receipt.position < end <= (await node.facts()).end
    assert (key(2), Origin.DELIVERY) in await walk(node)


async def test_late_but_here_and_late_but_dead_are_no_definite_refusals(rig: Rig) -> None:
    """Law 5: "refused, but here" is no receipt and no refusal."""
    stamp = await fresh(rig.node)
    await put(rig.node, 1)
    await rig.node.delete([key(2)], NO_MARK, 0.0)
    rig.ticks.now += limits.COMMIT_WINDOW_S + 1.0
    await unknown(rig.node, 1, stamp)
    await unknown(rig.node, 2, stamp)
    assert await held(rig.node, 1, 2) == ["live", "dead"]


async def test_a_refusal_is_decided_behind_all_earlier_asks_for_the_key(rig: Rig) -> None:
    """Law 5: an earlier ask that is still being written must not be overtaken by "not here"."""
    old = await fresh(rig.node)
    rig.ticks.now += limits.COMMIT_WINDOW_S + 1.0
    rig.hold()
    first = asyncio.ensure_future(put(rig.node, 1, stamp=await fresh(rig.node)))
    await asyncio.sleep(0.01)
    second = asyncio.ensure_future(put(rig.node, 1, stamp=old))
    await asyncio.sleep(0.01)
    rig.release()
    await first
    with pytest.raises(NodeTrouble) as info:
        await second
    assert not isinstance(info.value, CommitRefused)
    assert await held(rig.node, 1) == ["live"]


async def test_a_commit_whose_chunks_are_missing_is_refused(node: StorageNode) -> None:
    await node.append(key(1), [chunk(0, b"first")])
    with pytest.raises(CommitRefused):
        await node.commit(key(1), [chunk(2, b"third")], b"{}", 3, await fresh(node), Origin.DELIVERY)
    with pytest.raises(CommitRefused):
        await node.commit(key(2), [], b"{}", 1, None, Origin.DELIVERY)
    assert await held(node, 1, 2) == ["absent", "absent"]


async def test_a_stream_that_is_let_go_leaves_nothing(rig: Rig) -> None:
    """Law 5: CANCEL writes nothing."""
    node = rig.node
    await put(node, 1)
    await node.append(key(2), [chunk(0, b"first")])
    end = await node.fence(await fresh(node))
    await node.cancel(key(2))
    await node.cancel(key(1))  # it was committed: it stays
    await node.cancel(key(3))
    assert (await node.facts()).end == end
    assert await held(node, 1, 2) == ["live", "absent"]
    with pytest.raises(CopyMissing):
        await node.read_chunk(key(2), 0)
    with pytest.raises(CommitRefused):
        await node.commit(key(2), [chunk(1, b"second")], b"{}", 2, await fresh(node), Origin.DELIVERY)
    await put(node, 2, b"as a whole")
    node = await rig.reopen()
    assert (await node.read_chunk(key(2), 0)).stored == b"as a whole"


# -- tombstones, drops (law 1) ------------------------------------------------------------------------------------


async def test_a_tombstone_is_final_also_for_keys_it_never_had(rig: Rig) -> None:
    """R08, R10, P8: also when the message comes later, and after a restart."""
    await put(rig.node, 1)
    await rig.node.append(key(3), [chunk(0, b"open")])
    await rig.node.delete([key(1), key(2), key(3)], NO_MARK, 100.0)
    async for node in then_reopened(rig):
        for number in (1, 2, 3):
            await unknown(node, number, await fresh(node))
            with pytest.raises(NodeTrouble):
                await node.append(key(number), [chunk(0, b"x")])
            with pytest.raises(CopyMissing):
                await node.read_commit(key(number))
        assert await held(node, 1, 2, 3, 4) == ["dead", "dead", "dead", "absent"]
        assert {item.held for item in await node.inventory(b"", 10)} == {Held.DEAD}
        await node.delete([key(1)], NO_MARK, 200.0)
        assert await held(node, 1) == ["dead"]


async def test_a_drop_removes_one_copy_and_says_nothing_about_the_key(rig: Rig) -> None:
    first = await put(rig.node, 1)
    await put(rig.node, 2)
    await rig.node.drop([(key(1), first.position), (key(9), first.position)], NO_MARK)
    assert await held(rig.node, 1, 2, 9) == ["absent", "live", "absent"]
    with pytest.raises(CopyMissing):
        await rig.node.verify(key(1))
    node = await rig.reopen(lose_index=True)
    assert await held(node, 1, 2) == ["absent", "live"]
    second = await put(node, 1, b"again", origin=Origin.REPAIR)
    assert second.position > first.position
    await node.drop([(key(1), first.position)], NO_MARK)  # of the copy that is gone already
    assert await held(node, 1) == ["live"]
    node = await rig.reopen(lose_index=True)
    assert (await node.read_chunk(key(1), 0)).stored == b"again"
    assert await node.verify(key(1)) == second.position


async def test_who_confirms_says_where_the_log_ends(rig: Rig) -> None:
    """Law 12: a disk that lacks a confirmed tombstone or drop is an older one, whoever compares it."""
    node = rig.node
    first = await put(node, 1)
    before = (await node.facts()).end
    done = await node.drop([(key(1), first.position)], NO_MARK)
    assert done.end == (node.incarnation, (await node.facts()).end) and done.end.position > before
    end = await node.delete([key(1), key(2)], NO_MARK, 0.0)
    assert end == (node.incarnation, (await node.facts()).end) and end.position > done.end.position
    assert await node.delete([key(1)], NO_MARK, 0.0) == end, "it was there already"
    facts = await (await rig.reopen(lose_index=True)).facts()
    assert facts.began[-1] == end.position


async def test_a_drop_says_which_keys_are_live_all_the_same(rig: Rig) -> None:
    """Law 6: what the index believes follows from that."""
    first, other = await put(rig.node, 1), await put(rig.node, 2)
    assert (await rig.node.drop([(key(1), first.position), (key(9), first.position)], NO_MARK)).live == ()
    await put(rig.node, 1, b"again", origin=Origin.REPAIR)
    gone = [(key(1), first.position), (key(2), other.position)]
    assert (await rig.node.drop(gone, NO_MARK)).live == (key(1),)
    node = await rig.reopen(lose_index=True)
    assert (await node.drop(gone, NO_MARK)).live == (key(1),)
    await node.delete([key(1)], NO_MARK, 0.0)
    assert (await node.drop(gone, NO_MARK)).live == ()


async def test_an_abort_is_confirmed_only_with_a_stamp_that_is_still_good(rig: Rig) -> None:
    """Law 5: with the stamp of its delivery. Else the key may have been listed, deleted and forgotten meanwhile."""
    node, stamp = rig.node, await fresh(rig.node)
    assert (await node.delete([key(1)], NO_MARK, 0.0, stamp)).incarnation == node.incarnation
    await node.delete([key(1)], NO_MARK, 0.0, stamp)  # said twice is fine
    await node.fence(await fresh(node))
    for number in (1, 2):
        with pytest.raises(NodeTrouble):
            await node.delete([key(number)], NO_MARK, 0.0, stamp)
    assert await held(node, 1, 2) == ["dead", "dead"], "written all the same"
    stamp = await fresh(node)
    rig.ticks.now += limits.COMMIT_WINDOW_S + 1.0
    with pytest.raises(NodeTrouble):
        await node.delete([key(3)], NO_MARK, 0.0, stamp)
    stamp = await fresh(node)
    node = await rig.reopen()
    with pytest.raises(NodeTrouble):
        await node.delete([key(4)], NO_MARK, 0.0, stamp)
    assert await held(node, 3, 4) == ["dead", "dead"]


async def test_a_drop_of_another_position_removes_nothing(node: StorageNode) -> None:
    first, second = await put(node, 1), await put(node, 2)
    await node.drop([(key(1), second.position), (key(2), Position(0, 0))], NO_MARK)
    assert await held(node, 1, 2) == ["live", "live"]
    assert await node.verify(key(1)) == first.position


async def test_a_drop_names_where_the_copy_was_first_written_also_after_it_moved(rig: Rig) -> None:
    """Law 1: the index knows the receipt's position, whatever compaction did since."""
    receipts = {number: await put(rig.node, number, text(number, 400)) for number in range(1, 41)}
    moved = [number for number in receipts if not number % 5]
    await rig.node.delete([key(number) for number in receipts if number % 5], NO_MARK, 0.0)
    assert await compact_all(rig.node) > 0
    origins = dict(await walk(rig.node))
    assert [number for number in moved if origins[key(number)] is Origin.MOVED], "some were moved"
    for number in moved:
        assert await rig.node.verify(key(number)) == receipts[number].position
        assert await put(rig.node, number) == receipts[number]
    node = await rig.reopen(lose_index=True)
    assert {item.key: item.position for item in await node.inventory(b"", 100) if item.held is Held.LIVE} == {
        key(number): receipts[number].position for number in moved
    }
    await node.drop([(key(number), receipts[number].position) for number in moved[:4]], NO_MARK)
    async for each in then_reopened(rig, True):
        assert await held(each, *moved) == ["absent"] * 4 + ["live"] * (len(moved) - 4)


async def test_a_good_copy_is_never_discarded(node: StorageNode) -> None:
    await put(node, 1)
    await node.delete([key(3)], NO_MARK, 0.0)
    assert [await node.discard(key(number), NO_MARK) for number in (1, 2, 3)] == [Held.LIVE, Held.ABSENT, Held.DEAD]
    assert await held(node, 1) == ["live"]


async def test_a_bad_copy_is_told_dropped_and_replaced(rig: Rig) -> None:
    first = await put(rig.node, 1)
    await put(rig.node, 2)
    await rig.damage(1)
    with pytest.raises(CopyDamaged):
        await rig.node.verify(key(1))
    assert await rig.node.read_small([key(1)]) == [None]
    assert await rig.node.discard(key(1), NO_MARK) is Held.ABSENT
    with pytest.raises(CopyMissing):
        await rig.node.verify(key(1))
    second = await put(rig.node, 1, origin=Origin.REPAIR)
    assert second.position > first.position
    node = await rig.reopen()
    assert await node.verify(key(1)) == second.position
    assert await held(node, 2) == ["live"]


async def test_what_damage_may_have_hidden_is_unknown(rig: Rig) -> None:
    """Absence is never inferred."""
    for number in (1, 2, 3):
        await put(rig.node, number)
    await rig.node.delete([key(3)], NO_MARK, 0.0)
    await rig.lose(1)
    assert await held(rig.node, 1, 2, 3, 9) == ["unknown", "live", "dead", "unknown"]
    assert (await rig.node.facts()).damaged


# -- blocked ------------------------------------------------------------------------------------------------------


async def test_a_blocked_node_reads_deletes_and_drops(node: StorageNode) -> None:
    receipts = [await put(node, number) for number in (1, 2, 3)]
    node.block(True)
    assert node.state.value == "blocked"
    await refused(node, 4, await fresh(node))
    with pytest.raises(NodeReadOnly):
        await node.append(key(4), [chunk(0, b"x")])
    with pytest.raises(NodeReadOnly):
        await node.put_checkpoint(NAME, 0, b"x", NO_MARK)
    assert await put(node, 3) == receipts[2], "it is here, and that is all it says"
    assert (await node.read_chunk(key(1), 0)).stored == text(1)
    await node.delete([key(1)], Mark(epoch=3), 0.0)
    await node.drop([(key(2), receipts[1].position)], Mark(epoch=3))
    await node.put_mark(Mark(epoch=4))
    assert (await node.facts()).mark.epoch == 4
    assert await held(node, 1, 2, 3) == ["dead", "absent", "live"]
    node.block(False)
    assert node.state.value == "read-write"
    await put(node, 4)
