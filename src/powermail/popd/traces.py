"""Owns what the log says of a session's messages: a line for each that was retrieved or deleted, with its key.

Readers who pipeline take thousands a second: those of a second are gathered, so that they share the cost of an event. The
lines carry the session's `cid`, whoever's task they are written from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powermail.base import limits
from powermail.base.log import CID, Event, Log


class Traces:
    """Of one session, from its login on. `close` it: nothing is forgotten then."""

    def __init__(self, log: Log, account: str) -> None:
        self.retrieved = 0
        self._log = log
        self._account = account
        self._cid = CID.get()
        self._keys: list[bytes] = []
        self._later: asyncio.TimerHandle | None = None

    def retrieve(self, key: bytes) -> None:
        """A message was sent whole."""
        self.retrieved += 1
        keys = self._keys
        keys.append(key)
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(limits.POP3_LOG_GATHER_S, self.close)
        elif len(keys) >= limits.POP3_LOG_KEYS_MAX:
            self._tell(Event.RETRIEVED, keys)
            keys.clear()

    def delete(self, keys: Sequence[bytes]) -> None:
        """Messages are gone from the maildrop."""
        self.close()
        self._tell(Event.DELETED, keys)

    def close(self) -> None:
        """Says what was not said yet."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._tell(Event.RETRIEVED, self._keys)
        self._keys.clear()

    def _tell(self, event: Event, keys: Sequence[bytes]) -> None:
        for begin in range(0, len(keys), limits.POP3_LOG_KEYS_MAX):
            some = tuple(keys[begin : begin + limits.POP3_LOG_KEYS_MAX])
            self._log.event(event, cid=self._cid or None, key=some, account=self._account)
