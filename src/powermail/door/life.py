"""Owns how far a process is: whether its doors are open, whether it drains, what broke. For who asks from outside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Life:
    """From the start to the end of one process."""

    open: bool = False  # the doors are
    draining: bool = False
    broken: str = ""  # the storage invariant that broke
