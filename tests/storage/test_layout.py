"""The layout as it is written down: whole and of this cluster, or it is not believed."""

from __future__ import annotations

import hashlib

import pytest

from powermail.sim.disk import SimDisk
from powermail.storage.layout import (
    Layout,
    LayoutChange,
    LayoutRow,
    Standing,
    changed_layout,
    format_layout,
    keep_layout,
    layout_version,
    parse_layout,
)

LAYOUT = Layout(12, (LayoutRow("a", "north"), LayoutRow("b", "süd", "b.example:2700", "x", 3, Standing.BLOCKED, "told")))
OCTETS = format_layout(LAYOUT, "c1")


def test_what_was_written_is_read_again() -> None:
    assert parse_layout(OCTETS, "c1") == LAYOUT and layout_version(OCTETS) == 12


@pytest.mark.parametrize("at", range(0, len(OCTETS), 7))
def test_a_layout_that_is_cut_short_or_changed_is_not_believed(at: int) -> None:
    changed = bytearray(OCTETS)
    changed[at] ^= 1
    for bad in (OCTETS[:at], bytes(changed)):
        with pytest.raises(ValueError, match=r"checksum|no layout"):
            parse_layout(bad, "c1")


def test_a_layout_of_another_cluster_is_not_believed() -> None:
    with pytest.raises(ValueError, match="another cluster"):
        parse_layout(OCTETS, "c2")


def test_fields_of_a_later_version_are_passed_over_and_missing_ones_have_defaults() -> None:
    """P19."""
    body = b'[{"id":"a","group":"g","weight":7}]'
    head = b"powermail-layout 1 c1 3"
    digest = hashlib.sha256(head + body).hexdigest().encode()
    assert parse_layout(head + b" " + digest + b"\n" + body, "c1") == Layout(3, (LayoutRow("a", "g"),))


def test_an_older_layout_replaces_nothing() -> None:
    disk = SimDisk()
    disk.make_directory("/d")
    for version, kept in ((3, 3), (2, 3), (5, 5)):
        keep_layout(disk, "/d/layout", version, format_layout(Layout(version, ()), "c1"))
        assert layout_version(disk.read_file("/d/layout")) == kept
    disk.replace_file("/d/layout", b"torn")
    keep_layout(disk, "/d/layout", 1, format_layout(Layout(1, ()), "c1"))
    assert layout_version(disk.read_file("/d/layout")) == 1


def test_members_are_all_but_those_that_were_expelled() -> None:
    rows = tuple(
        LayoutRow(state.value, f"g-{state.value}", state=state) for state in sorted(Standing, key=lambda state: state.value)
    )
    layout = Layout(1, rows)
    assert [row.id for row in layout.members()] == ["active", "blocked", "draining", "leaving"]
    assert changed_layout(layout, [LayoutChange("active", priority=1)], None) is layout


@pytest.mark.parametrize(
    "there",
    [
        OCTETS[:-1],
        OCTETS.replace(b"c1 12", b"c1 99", 1),
        format_layout(Layout(99, ()), "c2"),
    ],
)
def test_a_kept_layout_that_is_damaged_or_of_another_cluster_is_replaced_whatever_version_it_names(there: bytes) -> None:
    """P14: who starts while the database is away goes by the file, so it must become whole again."""
    disk = SimDisk()
    disk.make_directory("/d")
    disk.replace_file("/d/layout", there)
    keep_layout(disk, "/d/layout", 12, OCTETS)
    assert parse_layout(disk.read_file("/d/layout"), "c1") == LAYOUT
