"""Whatever a next hop does, nothing it says harms another message, and nothing it said is forgotten.

Each line of `CASES` is one behaviour of `tests/outbound/hop.py` for a message to `bad` and `good` (in this order): what becomes
of each at the first attempt. S: sent. R: refused, and the sender gets a notice of it, and of nobody else. L: later, one
attempt counted. For every line it is checked too that another message, sent right behind it on the same pool to the hop that
behaves now, arrives at its first attempt, and that what was left arrives at its second, each once.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from powermail.base.net import Network, SocketNetwork
from tests.cluster.support import virtual
from tests.outbound.hop import ScriptedHop
from tests.outbound.rig import BODY, Rig


class Case(NamedTuple):
    """One behaviour. `fates` are those of bad and good; `line_by_line` those without PIPELINING, if others."""

    name: str
    script: dict[str, str]
    fates: str
    line_by_line: str = ""
    body: bytes = BODY


LONG = BODY + b"line of a long message\r\n" * 60_000

CASES = [
    Case("takes everything", {}, "SS"),
    # -- the greeting and hello
    Case("never greets", {"CONNECT": "SILENT"}, "LL"),
    Case("greets with 421", {"CONNECT": "421 busy|CLOSE"}, "LL"),
    Case("greets with 554", {"CONNECT": "554 no service here"}, "LL"),
    Case("greets with 521 and closes", {"CONNECT": "521 no mail here|CLOSE"}, "LL"),
    Case("greets with nonsense", {"CONNECT": "hello"}, "LL"),
    Case("greets with an empty line", {"CONNECT": "RAW \\r\\n"}, "LL"),
    Case("greets with a code beyond SMTP", {"CONNECT": "999 what"}, "LL"),
    Case("greets without end", {"CONNECT": "RAW 220-" + "x" * 3000}, "LL"),
    Case("greets in many lines", {"CONNECT": "220-one|220-two|220 three"}, "SS"),
    Case("greets with bare line feeds", {"CONNECT": "RAW 220-one\\n220 two\\n"}, "SS"),
    Case("greets twice", {"CONNECT": "220 hop|220 hop"}, "LL"),
    Case("greets and answers what was not asked", {"CONNECT": "220 hop|RAW 25"}, "LL"),
    Case("closes at once", {"CONNECT": "CLOSE"}, "LL"),
    Case("does not know EHLO", {"EHLO": "502 what", "HELO": "250 hop"}, "SS"),
    Case("knows no hello", {"EHLO": "502 what", "HELO": "502 what"}, "LL"),
    Case("refuses hello for now", {"EHLO": "451 later"}, "LL"),
    Case("answers hello with 421", {"EHLO": "421 busy|CLOSE"}, "LL"),
    Case("answers hello with 354", {"EHLO": "354 go"}, "LL"),
    Case("offers odd words", {"EHLO": "RAW 250-hop\\r\\n250-?\\r\\n250-\\r\\n250  \\r\\n"}, "SS"),
    Case("greets with 250", {"CONNECT": "250 hop"}, "SS"),
    Case("greets with 354", {"CONNECT": "354 go"}, "LL"),
    Case("greets and leaves", {"CONNECT": "220 hop|421 busy|CLOSE"}, "LL"),
    Case("greets in pieces", {"CONNECT": "RAW 2|SLEEP 1|RAW 20 h|SLEEP 1|RAW op\\r|SLEEP 1|RAW \\n"}, "SS"),
    Case("answers hello twice", {"EHLO": "250 hop|250 hop"}, "LL"),
    Case("does not know EHLO and closes", {"EHLO": "500 what|CLOSE"}, "LL"),
    Case("offers words without end", {"EHLO": "RAW " + ("250-" + "x" * 70 + "\\r\\n") * 300}, "LL"),
    Case("offers PIPELINING in another case", {"EHLO": "RAW 250-hop\\r\\n250 pipelining\\r\\n"}, "SS"),
    # -- MAIL
    Case("resets at the sender", {"MAIL": "RESET"}, "LL"),
    Case("greylists the sender", {"MAIL": "450 4.7.1 later", "RCPT": "503 5.5.1 no sender"}, "LL"),
    Case("cannot verify the sender", {"MAIL": "252 fine"}, "SS"),
    Case("does not take the parameters", {"MAIL": "555 5.5.4 what", "RCPT": "503 5.5.1 no sender"}, "RR"),
    Case("hangs at the sender", {"MAIL": "SLEEP 900"}, "LL"),
    Case(
        "refuses the sender, and says so of all behind it", {"MAIL": "550 5.7.1 not you", "RCPT": "503 5.5.1 no sender"}, "RR"
    ),
    Case("refuses the sender and all behind it", {"MAIL": "550 5.7.1 no", "RCPT": "550 5.7.1 no"}, "RR"),
    Case("refuses the sender, then takes recipients", {"MAIL": "550 5.7.1 no"}, "LL", "RR"),
    Case("refuses the sender and closes", {"MAIL": "554 go away|CLOSE"}, "RR"),
    Case("refuses the sender with 521 and closes", {"MAIL": "521 go away|CLOSE"}, "RR"),
    Case("refuses the sender for now", {"MAIL": "451 4.3.0 later", "RCPT": "503 no sender"}, "LL"),
    Case("says 421 to the sender", {"MAIL": "421 4.3.2 bye|CLOSE"}, "LL"),
    Case("says nested MAIL", {"MAIL": "503 5.5.1 nested MAIL command", "RCPT": "503 5.5.1 no"}, "LL"),
    Case("wants a login", {"MAIL": "530 5.7.0 authentication required", "RCPT": "530 5.7.0 no"}, "LL"),
    Case("answers the sender with 354", {"MAIL": "354 go"}, "LL"),
    Case("answers the sender with 1yz", {"MAIL": "150 wait"}, "LL"),
    Case("answers the sender with 251", {"MAIL": "251 fine"}, "SS"),
    Case("answers the sender twice", {"MAIL": "250 one|250 two"}, "LL"),
    Case("answers the sender in two codes", {"MAIL": "RAW 250-one\\r\\n550 two\\r\\n"}, "LL"),
    Case("answers the sender with a NUL", {"MAIL": "RAW 250 \\0\\r\\n"}, "LL"),
    Case("answers the sender without a text", {"MAIL": "RAW 250\\r\\n"}, "SS"),
    Case("answers the sender in pieces", {"MAIL": "RAW 25|SLEEP 1|RAW 0-a\\r|SLEEP 1|RAW \\n250 b\\r\\n"}, "SS"),
    Case("does not end its answer", {"MAIL": "RAW 250-one\\r\\n"}, "LL"),
    Case("goes on answering for ever", {"MAIL": "RAW " + "250-more\\r\\n" * 2500}, "LL"),
    Case("says in other codes what it means", {"MAIL": "250 5.1.1 sender fine"}, "SS"),
    # -- RCPT
    Case("refuses one", {"RCPT bad": "550 5.1.1 no such"}, "RS"),
    Case("refuses one without an enhanced code", {"RCPT bad": "550 no such"}, "RS"),
    Case("refuses one and contradicts itself", {"RCPT bad": "550 4.2.0 no such"}, "RS"),
    Case("refuses one for now", {"RCPT bad": "450 4.2.0 later"}, "LS"),
    Case("refuses one for now and contradicts itself", {"RCPT bad": "450 5.1.1 no such"}, "LS"),
    Case("refuses both", {"RCPT": "550 5.1.1 no such"}, "RR"),
    Case("refuses both and closes", {"RCPT bad": "550 no", "RCPT good": "550 no|CLOSE"}, "RR"),
    Case("refuses one and closes", {"RCPT bad": "550 no|CLOSE"}, "RL"),
    Case("refuses one, takes one and closes", {"RCPT bad": "550 no", "RCPT good": "250 fine|CLOSE"}, "RL"),
    Case("refuses one, and says 421 to the other", {"RCPT bad": "550 no", "RCPT good": "421 bye|CLOSE"}, "RL"),
    Case("refuses one, and never answers for the other", {"RCPT bad": "550 no", "RCPT good": "SILENT"}, "LL", "RL"),
    Case("refuses one, and hangs at the other", {"RCPT bad": "550 no", "RCPT good": "SLEEP 900"}, "RL"),
    Case("will forward for one", {"RCPT bad": "251 will forward"}, "SS"),
    Case("cannot verify one", {"RCPT bad": "252 cannot verify"}, "SS"),
    Case("has no room for one", {"RCPT bad": "452 4.5.3 too many recipients"}, "LS"),
    Case("has no room for one and says it the old way", {"RCPT bad": "552 too many recipients"}, "LS"),
    Case("has a full mailbox", {"RCPT bad": "552 5.2.2 mailbox full"}, "RS"),
    Case("answers one with 354", {"RCPT bad": "354 go"}, "LL"),
    Case("does not know RCPT", {"RCPT": "500 what"}, "LL"),
    Case("does not take this syntax", {"RCPT bad": "501 5.1.3 bad address"}, "RS"),
    Case("refuses with 500 and says why", {"RCPT bad": "500 5.1.1 no such user"}, "RS"),
    Case("answers one twice", {"RCPT bad": "550 no|250 fine"}, "LL"),
    Case("takes one twice", {"RCPT bad": "250 fine|250 fine"}, "LL"),
    Case("refuses one behind a surplus reply", {"MAIL": "250 a|250 b", "RCPT bad": "550 no"}, "LL"),
    Case("refuses one before a surplus reply", {"RCPT bad": "550 no", "RCPT good": "250 a|250 b"}, "LL"),
    Case("refuses one in a line over 512", {"RCPT bad": "550 " + "long " * 300}, "RS"),
    Case("refuses one in a line without measure", {"RCPT bad": "550 " + "long " * 900}, "LL"),
    Case("refuses one in several lines", {"RCPT bad": "550-5.1.1 no|550 5.1.1 such"}, "RS"),
    Case("sends one elsewhere", {"RCPT bad": "551 5.1.6 not here"}, "RS"),
    Case("greylists one", {"RCPT bad": "450 4.7.1 later"}, "LS"),
    Case("wants a login for one", {"RCPT bad": "530 5.7.0 authentication required"}, "LS"),
    Case("leaves at one and stays", {"RCPT bad": "421 bye"}, "LL"),
    Case("lets one wait in 1yz and refuses", {"RCPT bad": "150 wait|550 no"}, "LL"),
    Case("refuses both and begins all the same", {"RCPT": "550 5.1.1 no", "DATA": "354 go"}, "RR"),
    Case("defers both and begins all the same", {"RCPT": "450 4.2.1 later", "DATA": "354 go"}, "LL"),
    Case("refuses both and has nothing to begin with", {"RCPT": "550 5.1.1 no", "DATA": "554 5.5.1 no valid recipients"}, "RR"),
    # -- DATA
    Case("begins in several lines", {"DATA": "354-go|354 on"}, "SS"),
    Case("begins and refuses", {"DATA": "354 go|550 5.7.1 no|CLOSE"}, "RR", body=LONG),
    Case("begins and defers", {"DATA": "354 go|451 4.3.0 later|CLOSE"}, "LL", body=LONG),
    Case("begins with 220", {"DATA": "220 go"}, "LL"),
    Case("resets at DATA", {"DATA": "RESET"}, "LL"),
    Case("hangs at DATA", {"DATA": "SLEEP 900"}, "LL"),
    Case("answers DATA after 40 s", {"DATA": "SLEEP 40|NEXT"}, "SS"),
    Case("refuses to begin", {"DATA": "554 5.7.1 no"}, "RR"),
    Case("refuses to begin for now", {"DATA": "451 4.3.0 later"}, "LL"),
    Case("does not know DATA", {"DATA": "502 5.5.1 what"}, "LL"),
    Case("is out of step at DATA", {"DATA": "503 5.5.1 out of order"}, "LL"),
    Case("takes DATA for done", {"DATA": "250 taken"}, "LL"),
    Case("answers DATA with another 3yz", {"DATA": "350 go on"}, "LL"),
    Case("says 421 to DATA", {"DATA": "421 bye|CLOSE"}, "LL"),
    Case("refuses to begin and closes", {"DATA": "554 no|CLOSE"}, "RR"),
    Case("refuses one, then to begin", {"RCPT bad": "550 no", "DATA": "554 no"}, "RR"),
    Case("refuses one, then not now", {"RCPT bad": "550 no", "DATA": "451 later"}, "RL"),
    Case("refuses one, then closes at DATA", {"RCPT bad": "550 no", "DATA": "CLOSE"}, "RL"),
    # -- the body
    Case("has enough in the middle", {"BODY": "552 5.3.4 too large|CLOSE"}, "RR", body=LONG),
    Case("has enough in the middle and keeps silent", {"BODY": "552 5.3.4 too large|SLEEP 900"}, "RR", body=LONG),
    Case("has enough for now", {"BODY": "452 4.3.1 full|CLOSE"}, "LL", body=LONG),
    Case("says 421 in the middle", {"BODY": "421 bye|CLOSE"}, "LL", body=LONG),
    Case("says 250 in the middle", {"BODY": "250 taken|CLOSE"}, "LL", body=LONG),
    Case("says two things in the middle", {"BODY": "552 too large|550 no|CLOSE"}, "LL", body=LONG),
    Case("closes in the middle", {"BODY": "CLOSE"}, "LL", body=LONG),
    Case("reads no more", {"BODY": "DEAF"}, "LL", body=LONG),
    # -- the outcome
    Case("refuses the message", {"END": "554 5.6.0 spam"}, "RR"),
    Case("refuses the message and closes", {"END": "554 5.6.0 spam|CLOSE"}, "RR"),
    Case("refuses the message for now", {"END": "451 4.3.0 later"}, "LL"),
    Case("is full", {"END": "452 4.3.1 full"}, "LL"),
    Case("ends with 354", {"END": "354 go on"}, "LL"),
    Case("ends with 1yz", {"END": "150 wait"}, "LL"),
    Case("ends with nonsense", {"END": "fine"}, "LL"),
    Case("ends with 503", {"END": "503 5.5.1 out of order"}, "LL"),
    Case("ends with 421", {"END": "421 4.3.2 bye|CLOSE"}, "LL"),
    Case("ends with half a reply", {"END": "RAW 250-tak|CLOSE"}, "LL"),
    Case("ends with nothing", {"END": "CLOSE"}, "LL"),
    Case("never ends", {"END": "SILENT"}, "LL"),
    Case("ends after 40 s", {"END": "SLEEP 40|NEXT"}, "SS"),
    Case("ends with 251", {"END": "251 taken and sent on|SILENT"}, "SS"),
    Case("ends and closes", {"END": "NEXT|CLOSE"}, "SS"),
    Case("ends and says 421", {"END": "NEXT|421 enough"}, "SS"),
    Case("ends once for each, as LMTP does", {"END": "NEXT|550 5.2.2 full"}, "SS"),
    Case("ends twice", {"END": "NEXT|250 taken"}, "SS"),
    Case("ends and mutters", {"END": "NEXT|RAW 25"}, "SS"),
    Case("ends, and mutters a while later", {"END": "NEXT|SLEEP 2|550 5.1.1 no such"}, "SS"),
    Case("refuses one, then the message", {"RCPT bad": "550 no", "END": "554 spam"}, "RR"),
    Case("refuses one, then the message for now", {"RCPT bad": "550 no", "END": "451 later"}, "RL"),
    Case("ends in several lines", {"END": "250-taken|250 indeed"}, "SS"),
    Case("refuses the message in several lines", {"END": "554-5.7.1 this|554 5.7.1 is spam"}, "RR"),
    Case("does not end the line", {"END": "RAW 250 taken|SLEEP 900"}, "LL"),
    Case("resets at the end", {"END": "RESET"}, "LL"),
    Case("wants a login at the end", {"END": "530 5.7.0 authentication required"}, "LL"),
    # -- what comes behind
    Case("does not know QUIT", {"RCPT bad": "550 no such", "QUIT": "500 what"}, "RS"),
    Case("refuses QUIT", {"RCPT bad": "550 no such", "QUIT": "550 5.1.1 no such"}, "RS"),
    Case("resets at QUIT", {"RCPT bad": "550 no such", "QUIT": "RESET"}, "RS"),
    Case("answers QUIT with 354", {"RCPT bad": "550 no such", "QUIT": "354 go"}, "LS"),
    Case("never answers RSET", {"DATA": "451 later", "RSET": "SILENT"}, "LL"),
    Case("refuses RSET", {"DATA": "451 later", "RSET": "502 what"}, "LL"),
    Case("never answers QUIT", {"RCPT bad": "550 no such", "QUIT": "SILENT"}, "RS"),
    Case("closes at QUIT", {"RCPT bad": "550 no such", "QUIT": "CLOSE"}, "RS"),
    Case("answers QUIT with 250 and closes", {"RCPT bad": "550 no such", "QUIT": "250 bye|CLOSE"}, "RS"),
    Case("answers QUIT with 250, and later with 221", {"RCPT bad": "550 no such", "QUIT": "250 fine|SLEEP 1|221 bye"}, "LS"),
    Case("answers QUIT with 250 and stays", {"RCPT bad": "550 no such", "QUIT": "RAW 250 fine\\r\\n"}, "RS"),
    Case("answers QUIT with 421", {"RCPT bad": "550 no such", "QUIT": "421 bye|CLOSE"}, "RS"),
]


async def fates(rig: Rig) -> str:
    """What became of bad and good so far."""
    rows, refused, taken = await rig.rows(), await rig.refused(), rig.hop.recipients()
    found = ""
    for name in ("bad", "good"):
        if name in rows:
            assert rows[name].attempts == 1, "one attempt is counted"
            assert name not in refused
            found += "L"
        else:
            assert (name in refused) or (name in taken), f"{name} was lost"
            found += "R" if name in refused else "S"
    return found


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "line by line"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whatever_a_hop_does(case: Case, pipelining: bool) -> None:
    run(case, pipelining)


ON_SOCKETS = (
    "takes everything",
    "greets twice",
    "refuses the sender and closes",
    "answers the sender twice",
    "refuses one",
    "refuses one, takes one and closes",
    "has enough in the middle",
    "closes in the middle",
    "refuses the message and closes",
    "ends and says 421",
    "ends and mutters",
)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ON_SOCKETS], ids=lambda case: case.name)
async def test_some_of_it_on_sockets(case: Case) -> None:
    await check(case, True, SocketNetwork())


@virtual
async def run(case: Case, pipelining: bool) -> None:
    await check(case, pipelining, None)


async def check(case: Case, pipelining: bool, net: Network | None) -> None:
    """One line of the table."""
    hop = ScriptedHop(case.script, "PIPELINING,8BITMIME" if pipelining else "8BITMIME")
    rig = await Rig.open(hop, net=net)
    await rig.queue("bad", "good", body=case.body)
    await rig.push()
    first = await fates(rig)
    assert first == (case.fates if pipelining or not case.line_by_line else case.line_by_line)

    hop.script = {}
    await rig.queue("next")
    await rig.push()
    assert "next" in hop.recipients(), "the message behind it arrives"
    assert "next" not in await rig.rows()

    await rig.hurry()
    assert await rig.rows() == {}
    left = [name for name, fate in zip(("bad", "good"), first, strict=True) if fate != "R"]
    assert sorted(hop.recipients()) == sorted([*left, "next"]), "each arrives, once"
    assert await rig.refused() == [name for name, fate in zip(("bad", "good"), first, strict=True) if fate == "R"]
    assert all(taken.body.endswith(b"text\r\n") or taken.body.endswith(case.body) for taken in hop.messages)
    await rig.close()
