"""Makes authorities and certificates of clusters for tests, by the program's own code: good ones, expired ones, of other
clusters and of other roles.
"""

from __future__ import annotations

import datetime
import ssl
import time
from functools import lru_cache
from pathlib import Path

from powermail.base import certificates
from powermail.base.tls import peer_context

_DAY = datetime.timedelta(days=1)
_BEGUN = 20 * _DAY  # ago


@lru_cache(maxsize=64)
def _made(label: str) -> tuple[bytes, bytes]:
    """An authority: (certificate, key)."""
    return certificates.make_authority(label, time.time() - 2 * _BEGUN.total_seconds())


@lru_cache(maxsize=1)
def _leaf() -> tuple[bytes, bytes]:
    """A key, and a request for a certificate of it."""
    key = certificates.make_key()
    return key, certificates.make_request(key)


class Authority:
    """One authority and what it has issued, as files in a directory."""

    def __init__(self, directory: Path, label: str = "ours") -> None:
        self._directory = directory
        self._label = label
        certificate, key = _made(label)
        self._authority = certificates.Authority(certificate, key)
        self.path = str(directory / f"authority-{label}.pem")
        Path(self.path).write_bytes(certificate)
        self._issued = 0

    def issue(self, *uris: str, ends_in: datetime.timedelta = _DAY) -> tuple[str, str]:
        """A certificate with these names; the paths of it and of its key."""
        self._issued += 1
        label = f"{self._label}-{self._issued}"
        key, request = _leaf()
        begun_at, days = time.time() - _BEGUN.total_seconds(), (_BEGUN + ends_in) / _DAY
        issued = self._authority.issue(request, label, uris, begun_at, days)
        paths = str(self._directory / f"{label}.pem"), str(self._directory / f"{label}.key")
        Path(paths[0]).write_bytes(certificates.as_pem(issued))
        Path(paths[1]).write_bytes(key)
        Path(paths[1]).chmod(0o600)
        return paths

    def server(self, *uris: str, ends_in: datetime.timedelta = _DAY) -> ssl.SSLContext:
        """The context of a node with these names."""
        return peer_context(True, *self.issue(*uris, ends_in=ends_in), self.path)

    def client(self, *uris: str, ends_in: datetime.timedelta = _DAY) -> ssl.SSLContext:
        """The context of a peer with these names."""
        return peer_context(False, *self.issue(*uris, ends_in=ends_in), self.path)


def uris(cluster: str, peer: str, *roles: str) -> list[str]:
    """The names of a peer."""
    return [f"powermail://{cluster}/{role}/{peer}" for role in roles]
