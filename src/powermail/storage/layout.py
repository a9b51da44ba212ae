"""Owns the layout: which nodes the cluster has, in which groups, and which of them take mail; how it is written down.

The truth is the table in the index, whose version rises with every change. Where a message lies is recorded with the message
and never computed from a layout: whoever goes by an old one may choose poor nodes, and hides nothing.

Written down (the file `layout` of a data directory, and what machines of nodes obey) it is one line `powermail-layout 1 CLUSTER
VERSION SHA256`, the SHA-256 in hex of the words before it and of what follows: a JSON array with an object for each node, its
fields named as in `LayoutRow`. Fields are only ever added; one that is missing has its default (P19).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import msgspec
from msgspec import Struct

from powermail.base import limits
from powermail.base.disk import Disk
from powermail.base.errors import OperatorError

LAYOUT_NAME = "layout"
_KIND = "powermail-layout"
_FORM = "1"


class Standing(Enum):
    """What a node is for the cluster; the value is the word in `powermail node list`."""

    ACTIVE = "active"
    BLOCKED = "blocked"  # by the operator: no new mail; what lies there counts
    DRAINING = "draining"  # no new mail; what lies there is copied elsewhere, and counts no more
    LEAVING = "leaving"  # it was drained; it ends with the next step
    EXPELLED = "expelled"  # no member any more: the row stays, so that settings that still name it do not bring it back


COUNTS = (Standing.ACTIVE, Standing.BLOCKED)  # whose copies count for redundancy


class LayoutRow(Struct, frozen=True):
    """One node of the layout."""

    id: str
    group: str  # failure domain
    address: str = ""  # host:port; "": only the process that has its path in its settings reaches it
    site: str = ""  # where it stands: near copies are read first, and those of a message go apart; "": nobody said
    priority: int = 1  # lower is used first; a higher number is a hot spare
    state: Standing = Standing.ACTIVE
    told: str = ""  # what the settings of its machine said last: only what changes there is taken from there again


class LayoutChange(NamedTuple):
    """What changes of one node: what is None stays as it is. A node that has no row, or was expelled, is new with its group."""

    id: str
    group: str | None = None
    address: str | None = None
    site: str | None = None
    priority: int | None = None
    state: Standing | None = None
    told: str | None = None


class Layout(NamedTuple):
    """All rows, by id, as they are at a version. Version 0: nothing was ever entered."""

    version: int
    rows: tuple[LayoutRow, ...]

    def members(self) -> tuple[LayoutRow, ...]:
        """Rows of nodes that are members."""
        return tuple(row for row in self.rows if row.state is not Standing.EXPELLED)

    def row(self, node: str) -> LayoutRow | None:
        """The row of a node, if it is a member."""
        return next((row for row in self.members() if row.id == node), None)


NO_LAYOUT = Layout(0, ())
_REVERSIBLE = (Standing.ACTIVE, Standing.BLOCKED, Standing.DRAINING)


def is_destructive(row: LayoutRow | None, change: LayoutChange) -> bool:
    """True if a change by a stale view may cost redundancy, so that it must name the version that it was decided by: another
    group, or the last steps of leaving. What is new, takes no more mail, or takes it again, may come from any view.
    """
    state = change.state
    if row is None or row.state is Standing.EXPELLED:
        return state in (Standing.LEAVING, Standing.EXPELLED)
    if row.state is Standing.LEAVING and state is not Standing.LEAVING:
        return state is not None
    return (change.group is not None and change.group != row.group) or (state is not None and state not in _REVERSIBLE)


def costs(before: Layout, after: Layout) -> bool:
    """True if whoever still goes by `before` may take what is not redundant any more for redundant: a node is of another group,
    is about to go or went; or changes that nobody knows lie between them.
    """
    if after.version != before.version + 1:
        return True
    for row in before.members():
        now = after.row(row.id)
        if now is None or now.group != row.group or (now.state is Standing.LEAVING and now.state is not row.state):
            return True
    return False


def changed(row: LayoutRow | None, change: LayoutChange) -> LayoutRow:
    """A row after a change. Raises OperatorError for a new node without a group."""
    values = {name: value for name, value in change._asdict().items() if value is not None}
    if row is not None and row.state is not Standing.EXPELLED:
        return msgspec.structs.replace(row, **values)
    if "group" not in values:
        raise OperatorError(f"no node {change.id!r} is in the layout")
    return LayoutRow(**values)


def changed_layout(layout: Layout, changes: Sequence[LayoutChange], version: int | None) -> Layout | None:
    """The layout after these changes: the same one if nothing differs; None if `version` is another than it has.

    Raises OperatorError for a change that must name a version and does not, or of a node that is not there.
    """
    if version is not None and version != layout.version:
        return None
    rows = {row.id: row for row in layout.rows}
    for change in changes:
        if version is None and is_destructive(rows.get(change.id), change):
            raise OperatorError(f"this change of node {change.id} must name the version of the layout that it was decided by")
        rows[change.id] = changed(rows.get(change.id), change)
    found = tuple(rows[node] for node in sorted(rows))
    return layout if found == layout.rows else Layout(layout.version + 1, found)


def in_epoch(layout: Layout, epoch: int) -> Layout:
    """A layout as it is known in an epoch: its version is above all that were given before, in a history that may be lost too.
    So no two layouts have one number, nobody takes what others lost for the present one, and no compare-and-set (or fence) that
    was decided before goes through (laws 9, 11).
    """
    return layout._replace(version=max(layout.version, _floor(epoch)))


def _floor(epoch: int) -> int:
    return (epoch - 1) * limits.LAYOUT_EPOCH


def may_be_lost(known: Layout, layout: Layout) -> bool:
    """True if the index, which shows `layout`, may have lost that one: it shows an earlier one, or the epoch is another."""
    if known.version > layout.version:
        return True
    return known.version > 0 and known.version // limits.LAYOUT_EPOCH < layout.version // limits.LAYOUT_EPOCH


def restored(layout: Layout, known: Layout, epoch: int) -> Layout | None:
    """What takes the place of the layout of an index that was put back, as it was written, when a later one is known; None if
    none is, or the layout was changed in this epoch. Its version is far behind: who knows of changes that were lost between the
    two notices it all the same.
    """
    if layout.version >= known.version:
        return None
    return Layout(max(known.version + limits.LAYOUT_JUMP, _floor(epoch) + 1), known.rows)


def format_layout(layout: Layout, cluster: str) -> bytes:
    """A layout as it is written down."""
    body = msgspec.json.encode(layout.rows)
    head = f"{_KIND} {_FORM} {cluster} {layout.version}"
    return f"{head} {_digest(head, body)}\n".encode() + body


def _digest(head: str, body: bytes) -> str:
    return hashlib.sha256(head.encode() + body).hexdigest()


def parse_layout(octets: bytes, cluster: str) -> Layout:
    """What `format_layout` wrote, of this version of the program or a later one. Raises ValueError with what is wrong."""
    version, owner = _checked(octets)
    if owner != cluster:
        raise ValueError(f"it is of another cluster ({owner})")
    try:
        return Layout(version, msgspec.json.decode(octets.partition(b"\n")[2], type=tuple[LayoutRow, ...]))
    except ValueError as error:
        raise ValueError(f"it cannot be read: {error}") from error


def _checked(octets: bytes) -> tuple[int, str]:
    """The version and the cluster of a layout whose checksum is right. Raises ValueError."""
    version = layout_version(octets)
    head, _, body = octets.partition(b"\n")
    words, _, digest = head.decode("ascii", "replace").rpartition(" ")
    if _digest(words, body) != digest:
        raise ValueError("its checksum is wrong")
    return version, words.split(" ")[2]


def layout_version(octets: bytes) -> int:
    """The version that stands in the first line. Raises ValueError."""
    words = octets.partition(b"\n")[0].decode("ascii", "replace").split(" ")
    if len(words) != 5 or words[:2] != [_KIND, _FORM] or not words[3].isdecimal():
        raise ValueError("it is no layout that can be read here")
    return int(words[3])


def keep_layout(disk: Disk, path: str, version: int, octets: bytes) -> None:
    """Puts a layout in a file, durably, unless a later one of its cluster is there. Blocks on the disk. Raises OSError."""
    there = 0
    if disk.exists(path):
        with contextlib.suppress(ValueError):  # what is torn or damaged says nothing, its version least of all
            known, owner = _checked(disk.read_file(path))
            there = known if owner == _checked(octets)[1] else 0
    if version > there:
        disk.replace_file(path, octets)
