"""The log never holds mail up (F43) and one event is one line (X01)."""

from __future__ import annotations

import threading
import time

from powermail.base import limits
from powermail.base.log import Event, MemoryLog, StreamLog


class FullDisk:
    """A log file on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        """Never reached."""


class StuckPipe:
    """A log whose reader has stopped reading."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.lines = 0

    def write(self, text: str) -> int:
        self.free.wait()
        self.lines += text.count("\n")
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


def test_lines_that_cannot_be_written_are_counted() -> None:
    log = StreamLog(time.time, stream=FullDisk())
    for _ in range(10):
        log.event(Event.STARTED)
    log.close()
    assert log.dropped == 10


def test_a_stuck_log_holds_nobody_up() -> None:
    pipe = StuckPipe()
    log = StreamLog(time.time, stream=pipe)
    began = time.monotonic()
    for number in range(limits.LOG_LINES_WAITING_MAX + 5000):
        log.event(Event.DELIVERED, key=b"k", number=number)
    assert time.monotonic() - began < 2.0
    assert log.dropped > 0
    log.close()  # gives up after a second
    assert time.monotonic() - began < 4.0
    pipe.free.set()
    log._thread.join(timeout=10)
    assert pipe.lines + log.dropped == limits.LOG_LINES_WAITING_MAX + 5000


def test_several_recipients_get_a_line_each() -> None:
    log = MemoryLog()
    log.event(Event.DELIVERED, key=b"\x07", to=("ann@example.org", "bob@example.org"), octets=5)
    assert log.lines == [
        "INFO    delivered key=07 to=ann@example.org octets=5",
        "INFO    delivered key=07 to=bob@example.org octets=5",
    ]
