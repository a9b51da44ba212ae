"""Owns running a command of the operator's for its output: secrets that another program hands out."""

from __future__ import annotations

import shlex
import subprocess

from powermail.base import limits


def output_of(command: str) -> str:
    """What a command prints, without blanks around it. Blocks: call in a lane. Raises OSError, whose text holds no output."""
    words, limit_s = shlex.split(command), limits.COMMAND_TIMEOUT_S
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{words[0]} did not end within {limit_s:.0f} s") from error
    if done.returncode:
        raise OSError(f"{words[0]} failed with exit status {done.returncode}")
    return done.stdout.decode("utf-8", "replace").strip()
