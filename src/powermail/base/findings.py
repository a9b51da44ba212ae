"""Owns what `powermail config check` finds: a sentence and its cure; and what settings of a PostgreSQL server come to.

Pure: who asks a server for its settings is the room that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from powermail.base import limits

# What is asked of a server; those that it does not know are left out of its answer.
POSTGRES_SETTINGS = (
    "server_version_num",
    "server_encoding",
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "synchronous_standby_names",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "transaction_timeout",
    "idle_session_timeout",
)
_TIMEOUTS = ("transaction_timeout", "idle_session_timeout")  # the others a session of PowerMail's sets for itself


class Finding(NamedTuple):
    """Something that is wrong: with what, why it matters, and what mends it."""

    about: str
    what: str
    cure: str


def of_postgres(about: str, settings: Mapping[str, str], standbys: Mapping[str, int], oldest: int) -> list[Finding]:
    """What is wrong with a server. `standbys`: how many follow it, by `sync_state`; `oldest`: the version that is needed."""
    found: list[Finding] = []
    version = settings.get("server_version_num", "")
    if version.isdecimal() and int(version) // 10000 < oldest:
        said = f"PostgreSQL {int(version) // 10000} is older than what PowerMail needs"
        found.append(Finding(about, said, f"use PostgreSQL {oldest} or later"))
    encoding = settings.get("server_encoding", "UTF8")
    if encoding != "UTF8":
        what = f"the database stores text as {encoding}: not every address and folder can be kept"
        found.append(Finding(about, what, "make one with `CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0`"))
    for name, harm in (
        ("fsync", "what was committed is lost when the machine dies, or the database is damaged"),
        ("full_page_writes", "a page that is written in part when the machine dies is damaged"),
        ("synchronous_commit", "what was answered is lost when the server dies"),
    ):
        if settings.get(name) == "off":
            found.append(Finding(about, f"{name} is off: {harm}", f"`ALTER SYSTEM SET {name} = on`, and reload the server"))
    if settings.get("default_transaction_read_only") == "on":
        cure = "`ALTER DATABASE ... RESET default_transaction_read_only`"
        found.append(Finding(about, "transactions are read-only by default", cure))
    for name in _TIMEOUTS:
        value = settings.get(name, "0")
        if value.isdecimal() and 0 < int(value) < 1000 * limits.INDEX_COMMAND_S:
            what = f"{name} is {value} ms: the server ends what PowerMail waits {limits.INDEX_COMMAND_S:g} s for"
            cure = f"`ALTER ROLE ... SET {name} = 0`: PowerMail has limits of its own"
            found.append(Finding(about, what, cure))
    return found + _of_standbys(about, settings, standbys)


def _of_standbys(about: str, settings: Mapping[str, str], standbys: Mapping[str, int]) -> list[Finding]:
    count, names = sum(standbys.values()), settings.get("synchronous_standby_names", "")
    if not count:
        return []
    cure = "name the standbys that may be promoted in synchronous_standby_names, and reload the server"
    loss = "promoting one loses the last commits, which is noticed and costs a walk of all nodes"
    if not names:
        return [Finding(about, f"{count} standbys follow asynchronously (synchronous_standby_names is empty): {loss}", cure)]
    if settings.get("synchronous_commit") == "local":
        what = f"synchronous_commit is local: commits do not wait for the {count} standbys, and {loss}"
        return [Finding(about, what, "`ALTER SYSTEM SET synchronous_commit = on`, and reload the server")]
    if not standbys.get("sync", 0) + standbys.get("quorum", 0) and any(standbys):  # without the right to see, states are empty
        return [Finding(about, f"none of {count} standbys is synchronous: none has a name that was given", cure)]
    return []
