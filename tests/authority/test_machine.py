"""The machines of enrolment: the same for every chunking; nothing before trust, nothing twice; tokens; later versions."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from powermail.base import limits
from powermail.base.counters import MEANINGS
from powermail.wire import enrolment as forms
from powermail.wire.enrolment import Broken, Enrolling, Registering

TOKEN = forms.Token("ab" * 32, "01" * 8, bytes(range(16)))
GREETING = forms.Greeting(1, 1, "ours", b"authority")
JOIN = forms.Join(1, TOKEN.id, TOKEN.secret, b"request", "192.0.2.1:2700")
ISSUED = forms.Issued(b"certificate", "ours", "d", ("node",), "rack-d", 2, "192.0.2.1:2700", {"cluster.policy": '"random"'})


def chunks(octets: bytes, size: int) -> list[bytes]:
    """The octets in pieces."""
    return [octets[start : start + size] for start in range(0, len(octets), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 4096])
@pytest.mark.parametrize("ask", [JOIN, forms.Renew(1, b"request")], ids=["join", "renew"])
def test_a_dialog_is_the_same_in_every_chunking(size: int, ask: forms.Ask) -> None:
    machine, office = Enrolling(), Registering()
    heard = [found for piece in chunks(forms.frame(GREETING), size) if (found := machine.feed(piece)) is not None]
    assert heard == [GREETING]
    machine.trust()
    octets = machine.join(TOKEN, b"request", "192.0.2.1:2700") if isinstance(ask, forms.Join) else machine.renew(b"request")
    assert octets == forms.frame(ask)
    asked = [question for piece in chunks(octets, size) if (question := office.feed(piece)) is not None]
    assert asked == [ask]
    answers = [found for piece in chunks(forms.frame(ISSUED), size) if (found := machine.feed(piece)) is not None]
    assert answers == [ISSUED]


def test_nothing_is_said_before_the_greeting_was_trusted_and_nothing_twice() -> None:
    machine = Enrolling()
    with pytest.raises(AssertionError):
        machine.trust()
    machine.feed(forms.frame(GREETING))
    with pytest.raises(AssertionError):
        machine.join(TOKEN, b"")
    with pytest.raises(AssertionError):
        machine.renew(b"")
    machine.trust()
    machine.renew(b"")
    with pytest.raises(AssertionError):
        machine.join(TOKEN, b"")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (forms.frame(GREETING) + forms.frame(ISSUED), "order"),
        (forms.frame(ISSUED), "malformed"),
        (forms.frame(JOIN), "malformed"),
        (forms.frame(forms.Greeting(2, 3, "ours", b"")), "version"),
        (b"\x01\x80\x00\x00", "oversized"),
        (b"\x00\x00\x00\x00", "malformed"),
    ],
)
def test_an_authority_that_breaks_the_protocol_is_left(said: bytes, why: str) -> None:
    with pytest.raises(Broken) as caught:
        Enrolling().feed(said)
    assert caught.value.why == why


def test_an_answer_that_nobody_asked_for_is_none() -> None:
    machine = Enrolling()
    machine.feed(forms.frame(GREETING))
    with pytest.raises(Broken, match="nothing that was asked"):
        machine.feed(forms.frame(ISSUED))
    machine = Enrolling()
    machine.feed(forms.frame(GREETING))
    machine.trust()
    machine.renew(b"")
    machine.feed(forms.frame(ISSUED))
    with pytest.raises(Broken, match="nothing that was asked"):
        machine.feed(forms.frame(ISSUED))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (forms.frame(JOIN) + b"\x00", "order"),
        (forms.frame(GREETING), "malformed"),
        (forms.frame(forms.Renew(0, b"")), "version"),
        (b"\xff\xff\xff\x7f", "oversized"),
        (b"\x03\x00\x00\x00\xc1\xc1\xc1", "malformed"),
        (b"\x06\x00\x00\x00" + msgspec.msgpack.encode([2, 1, "x", 5]), "malformed"),
    ],
)
def test_a_question_that_is_none_is_refused(said: bytes, why: str) -> None:
    with pytest.raises(Broken) as caught:
        Registering().feed(said)
    assert caught.value.why == why


def test_fields_of_a_later_version_are_passed_over_and_those_of_an_older_one_have_defaults() -> None:
    """P19."""
    later = msgspec.msgpack.encode([2, 1, TOKEN.id, TOKEN.secret, b"request", "", "", {"more": 1}, [2]])
    older = msgspec.msgpack.encode([4, b"certificate", "ours", "d", ["node"]])
    assert Registering().feed(len(later).to_bytes(4, "little") + later) == forms.Join(1, TOKEN.id, TOKEN.secret, b"request")
    assert forms.unpack_answer(older) == forms.Issued(b"certificate", "ours", "d", ("node",))
    machine = Enrolling()
    machine.feed(forms.frame(forms.Greeting(1, 9, "ours", b"")))
    machine.trust()
    assert machine.renew(b"r") == forms.frame(forms.Renew(forms.LAST, b"r"))


def test_a_token_is_read_as_it_was_printed() -> None:
    text = forms.format_token(TOKEN)
    assert text == f"pm1.{'ab' * 32}.{'01' * 8}.000102030405060708090a0b0c0d0e0f"
    assert forms.parse_token(f" {text}\n") == TOKEN
    for wrong in ("", "pm1", text[:-1], text + "0", text.upper(), text.replace("pm1", "pm2"), text.replace(".", "-")):
        with pytest.raises(ValueError, match="a token is"):
            forms.parse_token(wrong)


def test_the_document_has_the_forms_of_the_program() -> None:
    """docs/peer-protocol.md, section 8."""
    text = Path("docs/peer-protocol.md").read_text().split("## 8.")[1]
    lines = text.split("| form | number | who | fields |\n")[1].split("\n\n")[0].splitlines()[1:]
    found = {
        cells[0]: (int(cells[1]), cells[3].split(", "))
        for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
    }
    kinds = (forms.Greeting, forms.Join, forms.Renew, forms.Issued, forms.Refused)
    assert found == {
        kind.__name__: (
            kind.__struct_config__.tag,
            [f"{field.name}{'' if field.required else '?'}" for field in msgspec.structs.fields(kind)],
        )
        for kind in kinds
    }
    words = text.split("| why | means |\n")[1].split("\n\n")[0].splitlines()[1:]
    told = {word.strip() for line in words for word in line.split("|")[1].split(",")}
    assert told | {"tls", "silent", "rate", "handshakes"} == {
        name.removeprefix("authority.refused.") for name in MEANINGS if "authority.refused." in name
    }
    for name in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", text):
        assert hasattr(limits, name), name
