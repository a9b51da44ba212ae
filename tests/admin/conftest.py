"""Owns what tests of the desk stand on: a running PowerMail in this process."""

from __future__ import annotations

from tests.system.conftest import running

__all__ = ["running"]
