"""Owns the limits on wrong passwords: by address range (refuse) and by account (delay), shared by all doors (U05)."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.base.tally import Tally


def ranges(client: str) -> tuple[str, ...]:
    """The three ranges a client address counts in: /32, /26, /21, or /64, /48, /32 for IPv6; none for a trusted one ("")."""
    if not client:
        return ()
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return (client,) * 3
    sizes = (32, 26, 21) if address.version == 4 else (64, 48, 32)
    return tuple(str(ipaddress.ip_network((address, size), strict=False)) for size in sizes)


class FailureLimiter:
    """Counts failures in the running minute and day, of all processes where they share it (TALLY_S late). Success of the owner
    is never locked out by others' failures.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.minute, self.day = Tally("failed-minute", 60.0), Tally("failed-day", 86_400.0)
        self._counts: OrderedDict[str, tuple[float, int, float, int]] = OrderedDict()

    def _get(self, name: str) -> tuple[float, int, float, int]:
        minute_at, in_minute, day_at, in_day = self._own(name)
        return minute_at, max(in_minute, self.minute.known(name)), day_at, max(in_day, self.day.known(name))

    def _own(self, name: str) -> tuple[float, int, float, int]:
        now = self._clock.monotonic()
        minute_at, in_minute, day_at, in_day = self._counts.get(name, (now, 0, now, 0))
        if now - minute_at >= 60.0:
            minute_at, in_minute = now, 0
        if now - day_at >= 86_400.0:
            day_at, in_day = now, 0
        return minute_at, in_minute, day_at, in_day

    def refused(self, client: str, factor: int = 1) -> bool:
        """True if this client's range has failed too often, or `factor` times too often."""
        for number, name in enumerate(ranges(client)):
            _, in_minute, _, in_day = self._get(name)
            if in_minute >= factor * limits.AUTH_FAILURES_PER_MINUTE_MAX[number]:
                return True
            if in_day >= factor * limits.AUTH_FAILURES_PER_DAY_MAX[number]:
                return True
        return False

    def failed(self, client: str, account: str) -> None:
        """Counts one wrong password."""
        for name in dict.fromkeys((*ranges(client), f"account {account[:255]}")):
            minute_at, in_minute, day_at, in_day = self._own(name)
            self._counts[name] = (minute_at, in_minute + 1, day_at, in_day + 1)
            self.minute.add(name)
            self.day.add(name)
            self._counts.move_to_end(name)
        while len(self._counts) > limits.AUTH_TRACKED_MAX:
            self._counts.popitem(last=False)

    def delay_s(self, client: str, account: str) -> float:
        """How long the answer to a wrong password waits; grows with the failures of this client."""
        in_minute = max((self._get(name)[1] for name in ranges(client)[:1]), default=0)
        if self._get(f"account {account[:255]}")[1] >= limits.AUTH_ACCOUNT_FAILURES_PER_MINUTE_MAX:
            return limits.AUTH_DELAY_MAX_S  # guessed at from many addresses; who knows the password does not wait
        return min(limits.AUTH_DELAY_MAX_S, 0.25 * 2 ** min(in_minute, 6)) if in_minute else 0.25
