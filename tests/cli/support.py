"""Owns running the command line in this process: quick, and with what it prints kept apart."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from powermail.base import limits
from powermail.cli.main import main


class Done(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which must be one JSON value."""
        return json.loads(self.out)

    def sentence(self) -> str:
        """The one line on standard error, without a usage."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("powermail: ")]
        assert "Traceback" not in self.err
        return line.removeprefix("powermail: ")


def powermail(*words: str, given: str = "") -> Done:
    """Runs a command; it is not at a terminal."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(given)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(words))
    finally:
        sys.stdin = before
    return Done(status, out.getvalue(), err.getvalue())


def make(data: Path, *words: str) -> None:
    """A new installation; its segments are small, so that no command looks through much unused room."""
    done = powermail("init", "--data", str(data), *words)
    assert done.status == 0, done
    settings = data / "powermail.toml"
    settings.write_text(
        settings.read_text().replace("[cluster]\n", f"[cluster]\nsegment_octets = {limits.MIB}\nreserve_octets = 0\n")
    )
