"""What several processes count together: each kind in windows of its own, by the index's clock."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.index.contract import Index
from tests.index.support import Rig


async def test_counts_add_up_within_a_window_and_begin_anew_in_the_next(index: Index, rig: Rig) -> None:
    rig.clock.at -= rig.clock.at % 3600
    assert await index.tally("failed", {}, 60.0) == {}
    assert await index.tally("failed", {"b": 2, "a": 1}, 60.0) == {"b": 2, "a": 1}
    assert await index.tally("sent", {"a": 7}, 3600.0) == {"a": 7}
    rig.clock.at += 59
    assert await index.tally("failed", {"a": 5}, 60.0) == {"a": 6, "b": 2}
    rig.clock.at += 1
    assert await index.tally("failed", {}, 60.0) == {}
    assert await index.tally("failed", {"b": 1}, 60.0) == {"b": 1}
    assert await index.tally("sent", {"a": 1}, 3600.0) == {"a": 8}, "another kind has windows of another length"


async def test_the_highest_counts_are_told_and_no_more_than_fit(
    index: Index, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TALLIES_SHOWN_MAX", 2)
    assert await index.tally("failed", {"a": 1, "b": 3, "c": 2}, 60.0) == {"b": 3, "c": 2}


async def test_a_look_writes_nothing(index: Index) -> None:
    """Law 10: a transaction is counted when it changes something."""
    await index.tally("failed", {"a": 1}, 60.0)
    before = index.mark()
    await index.tally("failed", {}, 60.0)
    assert index.mark() == before
