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
    if argv is None:
        _open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words == ["--version"]:
            print(f"powermail {__version__}", flush=True)
            return 0
        return _main(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # standard output takes no more, not even the sentence
        sys.stderr.write(f"powermail: {error}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _open_streams() -> None:
    """Streams that can be used whoever started us: a closed one leads nowhere (the event loop aborts without), and text is
    UTF-8 whatever the language of the environment; what is no text is written escaped and not read at all.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  for as long as we live
        else:
            stream.reconfigure(encoding="utf-8", errors="strict" if mode == "r" else "backslashreplace")


def _as_text(word: str) -> str:
    """A word as it was typed, in UTF-8. Raises OperatorError."""
    if word.isascii():
        return word
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError as error:
        from powermail.base.errors import OperatorError

        raise OperatorError(f"{word!r} is not UTF-8") from error


def _main(words: Sequence[str]) -> int:
    from powermail.base.errors import PowerMailError, Trouble
    from powermail.cli.commands import COMMANDS, entries
    from powermail.cli.words import parser, take_common

    before = os.umask(0o077)  # what this program makes is nobody else's
    try:
        common, rest = take_common([_as_text(word) for word in words])
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
    from powermail.base.secrets import said

    sentence, _, usage = said(str(error)).partition("\nusage: ")
    if json:
        print(msgspec.json.encode({"error": sentence, "kind": kind_of(error)}).decode(), flush=True)
    sys.stderr.write(f"powermail: {sentence}\n" + (f"usage: {usage}\n" if usage else ""))
    return 2 if kind_of(error) == "misuse" else 1
