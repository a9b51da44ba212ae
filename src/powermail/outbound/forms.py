"""Owns how an envelope is spelt for a hop, by what the hop offers: MAIL and RCPT with their parameters, or why it cannot be.

RFC 1870 SIZE; RFC 6152 8BITMIME; RFC 3461 §5.2.1 DSN; RFC 6531 §3.2: an address beyond ASCII goes to a hop with SMTPUTF8
only, unless its A-label form says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from powermail.index.contract import QueueRow
from powermail.mail.address import canonical_domain, spellings
from powermail.mail.dsn import orcpt_parameter
from powermail.outbound.client import Lines
from powermail.outbound.verdict import Ruling, Verdict


class Spelt(NamedTuple):
    """What is said, and for which rows (by their place); the others are refused without asking."""

    lines: Lines
    places: list[int]
    refused: dict[int, Verdict]


def spell(rows: Sequence[QueueRow], extensions: Mapping[str, str]) -> Spelt:
    """The envelope of one message for some recipients."""
    utf8 = "SMTPUTF8" in extensions
    sender = spelling(rows[0].envelope.reverse_path, utf8)
    recipients: list[str] = []
    places: list[int] = []
    refused: dict[int, Verdict] = {}
    international = rows[0].envelope.smtputf8 or not rows[0].envelope.reverse_path.isascii()
    for place, row in enumerate(rows):
        to = spelling(row.destination, utf8)
        if to is None or sender is None:
            refused[place] = _needs(row.destination if to is None else row.envelope.reverse_path)
            continue
        international = international or not to.isascii()
        recipients.append(f"TO:<{to}>{_recipient_parameters(row, extensions, utf8)}")
        places.append(place)
    return Spelt(Lines(_mail(rows[0], sender or "", extensions, utf8 and international), recipients), places, refused)


def _needs(address: str) -> Verdict:
    text = (
        f"{address.encode('ascii', 'backslashreplace').decode()}: the next hop does not take addresses beyond ASCII (SMTPUTF8)"
    )
    return Verdict(Ruling.REFUSED, "5.6.7", text, reply=False)


def _mail(row: QueueRow, sender: str, extensions: Mapping[str, str], smtputf8: bool) -> str:
    envelope = row.envelope
    line = f"FROM:<{sender}>"
    if "SIZE" in extensions:
        line += f" SIZE={row.octets}"
    if "8BITMIME" in extensions:
        line += " BODY=8BITMIME"
    if smtputf8:
        line += " SMTPUTF8"
    if "DSN" in extensions:
        line += f" RET={envelope.ret}" if envelope.ret else ""
        line += f" ENVID={envelope.envid}" if envelope.envid else ""
    return line


def _recipient_parameters(row: QueueRow, extensions: Mapping[str, str], utf8: bool) -> str:
    if "DSN" not in extensions:
        return ""
    notify = f" NOTIFY={row.notify}" if row.notify else ""
    return notify + (f" ORCPT={orcpt_parameter(row.orcpt, utf8)}" if row.orcpt else "")


@lru_cache(maxsize=1024)
def spelling(address: str, utf8: bool) -> str | None:
    """An address for a hop with or without SMTPUTF8; None if it cannot be said without."""
    if utf8 or address.isascii():
        return address
    local, _, domain = address.rpartition("@")
    if not local.isascii():
        return None
    forms = spellings(canonical_domain(domain))
    return f"{local}@{forms[-1]}" if forms[-1].isascii() else None
