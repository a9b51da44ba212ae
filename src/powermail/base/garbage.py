"""Owns when Python looks for garbage in cycles (the module gc): often and little, so that no look holds up the event loop.

What is there when a process begins to serve stays, and is never looked through again. Of what comes later a look in the middle
takes those objects that were kept by the looks at the youngest: 100,000 at most, some 10 to 30 ms. A look at all is rare, and
comes only when a quarter more is there than at the last.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNGEST: Final = 20_000  # objects that were made since, and are not gone
MIDDLE: Final = 5  # looks at the youngest between two of those
ALL: Final = 1000  # looks in the middle between two at all


def settle() -> None:
    """Called once by a process that begins to serve."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNGEST, MIDDLE, ALL)
