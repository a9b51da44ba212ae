"""Owns the entry of the command line: from words to a command, and from what came of it to an exit status.

0: done, and all is well. 1: degraded, stopped, nothing of that name, or it cannot be done now. 2: misuse. The sentence stands
on standard error; with `--json` standard output is an object with `error` and `kind`, so that it is JSON whatever happens.

Nothing is imported here before it is needed: a version costs the start of the interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from powermail import __version__

if TYPE_CHECKING:
    from powermail.base.errors import PowerMailError


def run(work: Coroutine[Any, Any, int]) -> int:
    """Runs on uvloop where there is one."""
    import asyncio

    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"powermail {__version__}")
        return 0
    try:
        return _main(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(words: Sequence[str]) -> int:
    from powermail.base.errors import PowerMailError, Trouble
    from powermail.cli.commands import COMMANDS, entries
    from powermail.cli.words import parser, take_common

    before = os.umask(0o077)  # what this program makes is nobody else's
    try:
        common, rest = take_common(words)
        top = parser(entries())
        found = vars(top.parse_args(rest))
        if found["version"]:
            print(f"powermail {__version__}")
            return 0
        if "full" not in found:
            top.print_help()
            return 2
        status = run(COMMANDS[found["full"]].parsed(common, found))
        sys.stdout.flush()
        return status
    except PowerMailError as error:
        return _failed(error, "--json" in words)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _failed(Trouble(what), "--json" in words)
    finally:
        os.umask(before)


def _failed(error: PowerMailError, json: bool) -> int:
    import msgspec

    from powermail.admin.control import kind_of

    sentence, _, usage = str(error).partition("\nusage: ")
    if json:
        print(msgspec.json.encode({"error": sentence, "kind": kind_of(error)}).decode(), flush=True)
    sys.stderr.write(f"powermail: {sentence}\n" + (f"usage: {usage}\n" if usage else ""))
    return 2 if kind_of(error) == "misuse" else 1
