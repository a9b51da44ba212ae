"""What holds forgetting back by itself, whatever else would (law 9)."""

from __future__ import annotations

from powermail.index.contract import Index
from powermail.storage.contract import Origin
from tests.index.support import end_of, key, place, reconcile, scan_all
from tests.index.test_copies import END, dead


async def test_an_order_that_was_not_confirmed_holds_forgetting_back_through_any_round(index: Index) -> None:
    """A node that was scanned for the round may still hold the copy that its order is about."""
    await dead(index)
    await reconcile(index, "c", END, [(1, place(1), Origin.DELIVERY)])
    await scan_all(index)
    await scan_all(index)
    assert await index.orders("c", 9) == [key(1)]
    assert await index.forget(9) == 1, "the other one"
    await scan_all(index)
    assert await index.forget(9) == 0
    await index.confirm_orders("c", [key(1)], end_of("c"))
    assert await index.forget(9) == 1
