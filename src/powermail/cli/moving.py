"""Owns the requests and answers of the commands that move an installation into a database, and back."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from powermail.admin.table import Request, option
from powermail.base.errors import OperatorError
from powermail.base.log import NullLog
from powermail.base.world import system_world
from powermail.cli import show
from powermail.cli.reach import prepare
from powermail.cli.words import Common


class IndexMove(Request):
    """Where the index goes."""

    to: Annotated[str, option("postgresql://USER@HOST[,HOST...]/NAME, an empty database; `sqlite`: back into a file")] = ""
    dry_run: Annotated[bool, option("only say what would be moved")] = False
    undo: Annotated[bool, option("let an index be served where it is, whose move out of a database was broken off")] = False


class DirectoryMove(Request):
    """Where the accounts go."""

    to: Annotated[str, option("postgresql://USER@HOST[,HOST...]/NAME, or mysql://...: a database without the table")] = ""
    password_file: Annotated[str, option("file with the password of its user, mode 0600; it goes into the settings")] = ""


class TableFacts(Struct):
    """A table of the index: its rows, and their SHA-256, which both sides have."""

    table: str
    rows: int
    sha256: str


class IndexMoved(Struct):
    """What was moved, or would be; `tables` is empty if an earlier run had moved everything but the name."""

    to: str
    set_aside: str
    moved: bool
    tables: list[TableFacts]


class IndexStays(Struct):
    """`undone`: a move was ordered, and is not any more."""

    undone: bool


class DirectoryMoved(Struct):
    """What was moved."""

    to: str
    set_aside: str
    accounts: int
    sha256: str


def _asked(to: str) -> str:
    if not to:
        raise OperatorError("move where to? --to postgresql://USER@HOST/NAME")
    if "://" not in to and to != "sqlite":  # perhaps with a password in it: not repeated
        raise OperatorError("--to is not an address like postgresql://USER@HOST/NAME; nothing was changed")
    return to


async def move_index(common: Common, request: IndexMove) -> IndexMoved | IndexStays:
    """Moves the index. Raises OperatorError, Trouble; run again it goes on."""
    from powermail.app.moving import Mover

    meter = show.Meter("index move", enabled=not common.json)
    mover = Mover(system_world(NullLog()), prepare(common), common.data, meter.progress)
    try:
        if request.undo:
            if request.to or request.dry_run:
                raise OperatorError("index move: --undo goes with neither --to nor --dry-run; nothing was changed")
            return IndexStays(await mover.undo())
        to = _asked(request.to)
        done = await (mover.look(to) if request.dry_run else mover.index(to))
    finally:
        meter.close()
    return IndexMoved(done.to, done.set_aside, not request.dry_run, [TableFacts(*each) for each in done.tables])


async def move_directory(common: Common, request: DirectoryMove) -> DirectoryMoved:
    """Moves the accounts. Raises OperatorError, Trouble; run again it goes on."""
    from powermail.app.moving import Mover

    meter = show.Meter("directory move", enabled=not common.json)
    mover = Mover(system_world(NullLog()), prepare(common), common.data, meter.progress)
    try:
        return DirectoryMoved(*await mover.directory(_asked(request.to), request.password_file))
    finally:
        meter.close()
