"""Owns `powermail config check`: also settings that cannot be read, and files that are somebody else's, are findings."""

from __future__ import annotations

from msgspec import Struct

from powermail.admin.control import NAME as CONTROL_NAME
from powermail.admin.control import NotRunning, ask_raw
from powermail.admin.table import unseen
from powermail.base.errors import OperatorError, Trouble
from powermail.base.findings import Finding
from powermail.base.log import NullLog
from powermail.base.settings import SETTINGS_NAME
from powermail.base.world import system_world
from powermail.cli import show
from powermail.cli.reach import prepare
from powermail.cli.words import Common


class FindingFacts(Struct):
    """What is wrong, with what, and what mends it."""

    about: str
    what: str
    cure: str


class Checked(Struct):
    """What `config check` found; an empty list is good news."""

    findings: list[FindingFacts]


async def _serving(data: str) -> bool:
    """True if a server of that data directory answers, or is there and does not."""
    try:
        await ask_raw(f"{data}/{CONTROL_NAME}", "status", {}, unseen)
    except NotRunning:
        return False
    except (OperatorError, Trouble):
        return True
    return True


async def check(common: Common) -> Checked:
    """Looks at everything; changes nothing."""
    from powermail.app.checking import Checker

    try:
        settings = prepare(common)
    except OperatorError as error:
        found = [Finding(f"{common.data}/{SETTINGS_NAME}", str(error), "mend that first: nothing else was looked at")]
    else:
        found = await Checker(system_world(NullLog()), settings, common.data, await _serving(common.data)).findings()
    return Checked([FindingFacts(*one) for one in found])


def tell(checked: Checked) -> None:
    """For people: each finding, and below it its cure."""
    for one in checked.findings:
        print(f"{show.cell(one.about)}: {show.cell(one.what)}\n    {show.cell(one.cure)}")
    print(f"{len(checked.findings)} findings" if checked.findings else "nothing is wrong")
