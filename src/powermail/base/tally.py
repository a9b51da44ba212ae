"""Owns a count that this process shares with others: what it has added lately, and what all have counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

from powermail.base import limits


class Tally:
    """Counts by name in the running window of a kind. Nothing is kept before anybody shares it (`share`).

    Others see digests: what was typed as a name may be a password.
    """

    def __init__(self, kind: str, window_s: float) -> None:
        self.kind = kind
        self.window_s = window_s
        self._shared = False
        self._fresh: Counter[str] = Counter()
        self._all: Mapping[str, int] = {}

    def share(self) -> None:
        """From now on somebody takes what is added, and tells what all have counted."""
        self._shared = True

    def add(self, name: str, count: int = 1) -> None:
        """This process has counted so many more."""
        if self._shared:
            self._fresh[_digest(name)] += count

    def known(self, name: str) -> int:
        """What all have counted, as far as is known here; 0 where nothing is shared."""
        if not self._shared:
            return 0
        digest = _digest(name)
        return self._all.get(digest, 0) + self._fresh[digest]

    def take(self) -> dict[str, int]:
        """What was added since: to be told to the others."""
        taken = dict(self._fresh)
        self._fresh.clear()
        return taken

    def put_back(self, taken: Mapping[str, int]) -> None:
        """They could not be told: they will be with the next, but for those that are too many."""
        if len(self._fresh) + len(taken) <= limits.AUTH_TRACKED_MAX:
            self._fresh.update(taken)

    def learn(self, counts: Mapping[str, int]) -> None:
        """What all have counted, this process too."""
        self._all = counts


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
