"""Holds the program of the commit before: its source as the history has it, to run beside this one (P19)."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SPOKEN = tuple([f"src/powermail/{room}" for room in ("wire", "noded", "cluster", "index", "directory")])


class Before(NamedTuple):
    """A program, by the environment in which the same interpreter runs it, and in words what it is."""

    environment: dict[str, str]
    words: str


def _git(*words: str) -> str:
    """What git answers, "" if it cannot or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit_before() -> str:
    """The last commit whose program is not that of this tree in what goes over wires and into databases; "" if the clone does
    not reach back to it.
    """
    if _git("rev-parse", "--show-toplevel") != str(ROOT):
        return ""
    if _git("status", "--porcelain", "--", *SPOKEN):
        return _git("rev-parse", "HEAD")
    changed = _git("log", "-1", "--format=%H", "--", *SPOKEN)
    return _git("rev-parse", "--verify", "--quiet", f"{changed}^") if changed else ""


def unpack_before(to: Path) -> Before:
    """Puts that program into a directory. Where there is no history to take it from (a shallow clone, an archive), it is this
    tree's own: two processes of one release are side by side then, and what the release before said is told by the
    golden dialogs alone.
    """
    commit = commit_before()
    if not commit:
        return Before(_environment(ROOT / "src"), "this tree itself, because its history is not in this clone")
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", "--format=tar", commit, "src"], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none
        archive.extractall(to)
    return Before(_environment(to / "src"), f"commit {_git('log', '-1', '--format=%h of %cs (%s)', commit)}")


def _environment(source: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(source)}
