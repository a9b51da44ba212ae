"""Owns what is remembered of where nodes lie: whether on a disk of their own; and which files hold secrets.

Danger: when the disk of a node is not mounted, its place is an empty directory of another disk. A node made anew there would
fill the wrong disk, and be gone with the next mount.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from powermail.base.settings import Settings, inside
from powermail.base.world import World

_NAME = "places.json"


def secret_files(settings: Settings, data: str, peers: bool, tls: bool = True) -> list[str]:
    """Files that only who serves may read (X07); `peers`: it speaks to other machines."""
    out, directory = settings.outbound, settings.directory
    names = ["srs.keys", out.smarthost_password_file, out.smarthost_token_file, directory.database_password_file]
    names += [settings.tls.key] if tls else []
    names += [settings.peers.key] if peers else []
    return [inside(data, name) for name in names if name]


class Places:
    """Where the nodes of the settings lie. Blocks on the disk: call in a lane."""

    def __init__(self, world: World, data: str, paths: dict[str, str]) -> None:
        self._disk = world.disk
        self._data = data
        self._paths = paths

    def _apart(self, path: str) -> bool:
        """True if a place is on another disk than the data directory."""
        return self._disk.mark(path)[0] != self._disk.mark(self._data)[0]

    def _noted(self) -> dict[str, bool]:
        try:
            return msgspec.json.decode(self._disk.read_file(f"{self._data}/{_NAME}"), type=dict[str, bool])
        except (OSError, ValueError):
            return {}

    def note(self, nodes: Sequence[str]) -> None:
        """Remembers where these nodes lie, which are here. Raises OSError."""
        noted = self._noted()
        now = dict(noted)
        for node in nodes:
            now[node] = self._apart(self._paths[node])
        if now != noted:
            self._disk.replace_file(f"{self._data}/{_NAME}", msgspec.json.encode(now))

    def unmounted(self, node: str) -> str:
        """Why the place of a node looks like a mount point without its disk; "" if it does not. Raises OSError."""
        path = self._paths.get(node, "")
        if not path:
            return ""  # another machine's
        outside = not path.startswith(f"{self._data}/")
        if not self._disk.exists(path) or self._apart(path):
            return ""
        if self._noted().get(node, outside):
            return f"{path} is not on a disk of its own now: it lies on that of {self._data}"
        return ""
