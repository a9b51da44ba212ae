"""Owns `powermail config check`: also settings that cannot be read, and files that are somebody else's, are findings."""

from __future__ import annotations

import os
from typing import Annotated

from msgspec import Struct

from powermail.admin.control import NotRunning, ask_any
from powermail.admin.table import Request, option, unseen
from powermail.base.errors import OperatorError, Trouble
from powermail.base.findings import Finding
from powermail.base.log import NullLog
from powermail.base.secrets import said
from powermail.base.settings import SETTINGS_NAME, Settings
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
    """True if a server of that data directory answers, or is there and does not; or holds its lock, as processes do that no
    operator asks (of nodes alone, of the authority).
    """
    try:
        await ask_any(data, "status", {}, unseen)
    except NotRunning:
        return locked(data)
    except (OperatorError, Trouble):
        return True
    return True


def roles_to_say(data: str, settings: Settings) -> str:
    """What `powermail serve` is to be told on a machine that has joined a cluster, as `join` said it; "" elsewhere."""
    from powermail.app.checking_members import duties_of

    if not settings.peers.authority_at or settings.peers.authority_listen:
        return ""
    duties = duties_of(system_world(NullLog()), settings, data, "")
    has = (("front", duties.front), ("keeper", duties.keeper), ("node", duties.node), ("authority", duties.authority))
    return f" --roles {','.join(role for role, there in has if there) or 'ROLES'}"


def locked(data: str) -> bool:
    """True if somebody holds the lock of a data directory, as the kernel says (proc(5)): it is not taken for the look, which
    would hold up whoever starts just now.
    """
    try:
        inode = str(os.stat(f"{data}/lock").st_ino)
        with open("/proc/locks", encoding="ascii", errors="replace") as lines:
            return any(" FLOCK " in line and line.split()[-3].rpartition(":")[2] == inode for line in lines)
    except OSError:
        return False


class ConfigCheck(Request):
    """What this machine is for."""

    roles: Annotated[str, option("as `serve --roles` is told; default: what settings and certificate say")] = ""


async def check(common: Common, request: ConfigCheck) -> Checked:
    """Looks at everything; changes nothing."""
    from powermail.app.checking import Checker

    try:
        settings = prepare(common)
    except OperatorError as error:
        found = [Finding(f"{common.data}/{SETTINGS_NAME}", str(error), "mend that first: nothing else was looked at")]
    else:
        found = await Checker(
            system_world(NullLog()), settings, common.data, await _serving(common.data), request.roles
        ).findings()
    return Checked([FindingFacts(one.about, said(one.what), one.cure) for one in found])


def tell(checked: Checked) -> None:
    """For people: each finding, and below it its cure."""
    for one in checked.findings:
        print(f"{show.cell(one.about)}: {show.cell(one.what)}\n    {show.cell(one.cure)}")
    print(f"{len(checked.findings)} findings" if checked.findings else "nothing is wrong")
