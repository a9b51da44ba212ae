"""What the torture does to disks does what it says, and its other small parts: gaps, and what counts as well."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from powermail.torture import damage
from powermail.torture.conductor import why_unwell
from powermail.torture.fleet import Gap


def make(store: Path) -> dict[str, bytes]:
    """A log of two segments with room at their ends."""
    made = {"1": b"\xaa" * 3000 + bytes(1000), "2": b"\x55" * 500 + bytes(3500)}
    (store / "segments").mkdir(parents=True)
    for name, octets in made.items():
        (store / "segments" / name).write_bytes(octets)
    (store / "identity").write_text("a")
    return made


def test_so_many_bits_of_what_was_written_are_flipped(tmp_path: Path) -> None:
    before = make(tmp_path)
    assert damage.flip(tmp_path, 40, random.Random(1)) == 40
    after = {path.name: path.read_bytes() for path in (tmp_path / "segments").iterdir()}
    changed = sum((a ^ b).bit_count() for name in before for a, b in zip(before[name], after[name], strict=True))
    assert 30 <= changed <= 40, "one that is hit twice is as it was"
    assert after["1"][3000:] == bytes(1000) and after["2"][500:] == bytes(3500)
    assert {name for name in before if before[name] != after[name]} == {"1", "2"}


def test_an_empty_log_has_nothing_to_flip(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "1").write_bytes(bytes(4096))
    assert damage.flip(tmp_path, 40, random.Random(1)) == 0


def test_an_older_state_is_put_back_whole_and_nothing_newer_stays(tmp_path: Path) -> None:
    store, aside = tmp_path / "store", tmp_path / "aside"
    before = make(store)
    damage.keep(store, aside)
    (store / "segments" / "1").write_bytes(b"newer")
    (store / "segments" / "3").write_bytes(b"newer")
    damage.put_back(aside, store)
    assert {path.name: path.read_bytes() for path in (store / "segments").iterdir()} == before
    assert (store / "identity").read_text() == "a" and not aside.exists()


def test_an_emptied_disk_is_a_directory_with_nothing_in_it(tmp_path: Path) -> None:
    make(tmp_path / "store")
    damage.empty(tmp_path / "store")
    assert not list((tmp_path / "store").iterdir())


def test_a_large_file_system_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "_FILLED_OCTETS_MAX", 0)
    with pytest.raises(OSError, match="that is not filled"):
        damage.fill(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_longest_gap_counts_from_the_first_fault_to_the_last() -> None:
    gap = Gap()
    gap.acked(1.0)
    gap.begin(10.0)
    for at in (11.0, 14.5, 15.0):
        gap.acked(at)
    assert (gap.longest_s, gap.at) == (3.5, 11.0)
    gap.end(20.0)
    gap.acked(100.0)
    assert (gap.longest_s, gap.at) == (5.0, 15.0)


WELL = {
    "nodes": [{"id": name, "state": "read-write"} for name in "abc"],
    "members": [{"id": name, "compared": True, "owes_walk": False} for name in "abc"],
    "degraded": ["mail waits to leave: there is no route"],
    "not_redundant": {"messages": 0},
}


def test_all_is_well_only_when_every_disk_was_compared_and_every_message_has_its_copies() -> None:
    assert why_unwell(WELL) == []
    unwell = [
        {},
        {**WELL, "nodes": [*WELL["nodes"][:2], {"id": "c", "state": "missing"}]},  # type: ignore[index]
        {**WELL, "members": [*WELL["members"][:2], {"id": "c", "compared": False, "owes_walk": False}]},  # type: ignore[index]
        {**WELL, "members": [*WELL["members"][:2], {"id": "c", "compared": True, "owes_walk": True}]},  # type: ignore[index]
        {**WELL, "members": WELL["members"][:2]},  # type: ignore[index]
        {**WELL, "not_redundant": {"messages": 3}},
        {**WELL, "degraded": ["index: no answer within 2 s"]},
        {**WELL, "degraded": ["the index is catching up with the nodes"]},
    ]
    assert all(len(why_unwell(status)) == 1 for status in unwell)
