"""Owns how many may ask for certificates in how short a time: a handshake costs milliseconds of a core that others need.

Who comes more often than his share is slowed down, and is not heard where he would have to wait too long; so are all together.
Of those who shake hands and get nowhere the oldest makes room: who is in earnest is through in no time.
"""

from __future__ import annotations

from collections import OrderedDict

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.door.clients import place
from powermail.door.connection import Connection

_ALL = ""


class Pace:
    """Turns of clients, and the handshakes under way."""

    def __init__(self, clock: Clock) -> None:
        self._monotonic = clock.monotonic
        self._turns: OrderedDict[str, float] = OrderedDict()  # when the next one of a client has its turn
        self._hands: dict[Connection, None] = {}  # the oldest first

    def wait_s(self, client: str) -> float | None:
        """How long the handshake of one more connection from there waits; None: too long, it is not heard."""
        own = place(client)
        wait_s = max(
            self._late(own, limits.ENROLMENT_ADDRESS_TURN_S, limits.ENROLMENT_ADDRESS_BURST),
            self._late(_ALL, limits.ENROLMENT_TURN_S, limits.ENROLMENT_BURST),
        )
        if wait_s > limits.ENROLMENT_WAIT_MAX_S:
            return None
        self._take(own, limits.ENROLMENT_ADDRESS_TURN_S)
        self._take(_ALL, limits.ENROLMENT_TURN_S)
        while len(self._turns) > limits.ENROLMENT_TRACKED_MAX:
            self._turns.popitem(last=False)
        return wait_s

    def _late(self, name: str, turn_s: float, burst: int) -> float:
        return max(0.0, self._turns.get(name, 0.0) - self._monotonic() - burst * turn_s)

    def _take(self, name: str, turn_s: float) -> None:
        self._turns[name] = max(self._turns.get(name, 0.0), self._monotonic()) + turn_s
        self._turns.move_to_end(name)

    def begin(self, connection: Connection) -> Connection | None:
        """A handshake begins; whose is given up for it, if there are too many."""
        oldest = next(iter(self._hands)) if len(self._hands) >= limits.ENROLMENT_HANDSHAKES_MAX else None
        if oldest is not None:
            del self._hands[oldest]
        self._hands[connection] = None
        return oldest

    def end(self, connection: Connection) -> bool:
        """A handshake is over, however it ended; False if it was given up before."""
        given_up = connection not in self._hands
        self._hands.pop(connection, None)
        return not given_up
