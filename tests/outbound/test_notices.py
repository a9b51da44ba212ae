"""What senders hear (RFC 3461, 3464, 6533), and how addresses and bodies are spelt for a hop (RFC 6531, 6152)."""

from __future__ import annotations

import asyncio
import email
import email.policy

import pytest

from powermail.base import limits
from powermail.base.settings import OutboundSettings
from powermail.mail.dsn import Action, asks, encode_utf8_address
from powermail.outbound.forms import spelling
from tests.cluster.support import virtual
from tests.outbound.hop import ScriptedHop
from tests.outbound.rig import BODY, Rig

REFUSES = {"RCPT": "550 5.1.1 no such"}


@pytest.mark.parametrize(
    ("notify", "told"),
    [
        ("", True),
        ("FAILURE", True),
        ("failure,delay", True),
        ("SUCCESS,FAILURE", True),
        ("DELAY", False),
        ("SUCCESS", False),
        ("SUCCESS,DELAY", False),
        ("NEVER", False),
    ],
)
@virtual
async def test_a_failure_is_told_to_who_wants_to_hear_it(notify: str, told: bool) -> None:
    rig = await Rig.open(ScriptedHop(REFUSES))
    await rig.queue("one", notify=notify)
    await rig.push()
    assert await rig.rows() == {}
    assert len(await rig.notices()) == told
    assert rig.counted("outbound.bounced") == 1
    await rig.close()


@pytest.mark.parametrize("notify", ["", "FAILURE", "SUCCESS", "SUCCESS,FAILURE", "NEVER"])
@pytest.mark.parametrize("dsn", [True, False])
@virtual
async def test_success_is_told_where_the_hop_will_not(notify: str, dsn: bool) -> None:
    rig = await Rig.open(ScriptedHop(offers="PIPELINING,DSN" if dsn else "PIPELINING"))
    await rig.queue("one", notify=notify, orcpt="rfc822;first+2Bone@far.example")
    await rig.push()
    notices = await rig.notices()
    assert len(notices) == ("SUCCESS" in notify and not dsn)
    (taken,) = rig.hop.messages
    assert ("NOTIFY=" in taken.recipients[0]) == (dsn and bool(notify))
    assert ("ORCPT=rfc822;first+2Bone" in taken.recipients[0]) == dsn
    for notice in notices:
        assert b"Action: relayed\r\n" in notice
        assert b"Status: 2.0.0\r\n" in notice
        assert b"Original-Recipient: rfc822; first+one@far.example\r\n" in notice
        assert b"Original-Envelope-Id: envelope-1\r\n" in notice
        assert b"Subject: it" in notice
        assert b"text\r\n" not in notice.partition(b"Subject: it")[2], "the header only"
    await rig.close()


@pytest.mark.parametrize("notify", ["", "FAILURE", "DELAY", "SUCCESS,DELAY", "NEVER"])
@virtual
async def test_a_delay_is_told_once_after_the_stated_time(notify: str) -> None:
    rig = await Rig.open(ScriptedHop({"RCPT": "451 4.2.1 later"}), OutboundSettings(delay_notice_s=3600.0))
    await rig.queue("one", notify=notify)
    await rig.push()
    assert await rig.notices() == []
    for _ in range(3):
        await asyncio.sleep(3600)
        await rig.hurry()
    notices = await rig.notices()
    assert len(notices) == ("DELAY" in notify)
    for notice in notices:
        assert b"Action: delayed\r\n" in notice
        assert b"Status: 4.2.1\r\n" in notice
        assert b"Will-Retry-Until: " in notice
        assert b"Subject: Delayed Mail" in notice
    rig.hop.script = {}
    await rig.hurry()
    assert rig.hop.recipients() == ["one"]
    await rig.close()


@pytest.mark.parametrize(("ret", "whole"), [("FULL", True), ("HDRS", False), ("", False)])
@virtual
async def test_ret_says_how_much_goes_back(ret: str, whole: bool) -> None:
    rig = await Rig.open(ScriptedHop(REFUSES))
    body = BODY + b"\x00line\nof all \xff kinds\r" * 20_000
    await rig.queue("one", ret=ret, body=body)
    await rig.push()
    (notice,) = await rig.notices()
    assert (b"of all \xff kinds" in notice) == whole
    assert (b"Content-Type: message/rfc822\r\n" in notice) == whole
    assert (b"Content-Type: text/rfc822-headers\r\n" in notice) != whole
    assert notice.count(b"\r") == notice.count(b"\n") == notice.count(b"\r\n")
    assert len(email.message_from_bytes(notice, policy=email.policy.SMTP).get_payload()) == 3
    await rig.close()


@virtual
async def test_a_message_too_large_to_go_back_whole_gives_its_header() -> None:
    rig = await Rig.open(ScriptedHop(REFUSES))
    await rig.queue("one", ret="FULL", body=BODY + b"line\r\n" * (limits.DSN_FULL_OCTETS_MAX // 6 + 1))
    await rig.push()
    (notice,) = await rig.notices()
    assert len(notice) < 10_000
    assert b"Subject: it" in notice
    await rig.close()


@pytest.mark.parametrize(
    "address",
    ["jörg@far.example", "用户@far.example", '"a b"@far.example', '"<x>;\\\\"@far.example', "x" * 150 + "@far.example"],
)
@virtual
async def test_the_final_recipient_is_the_address(address: str) -> None:
    rig = await Rig.open(ScriptedHop(REFUSES, offers="PIPELINING,SMTPUTF8"))
    await rig.queue(address, smtputf8=True)
    await rig.push()
    (notice,) = await rig.notices()
    if address.isascii():
        assert f"Final-Recipient: rfc822; {address}\r\n".encode() in notice
    else:
        assert f"Final-Recipient: utf-8; {encode_utf8_address(address)}\r\n".encode() in notice
        assert f"<{address}>: smtp; 550".encode() in notice
    await rig.close()


@virtual
async def test_a_sender_beyond_ascii_gets_a_notice_of_rfc_6533() -> None:
    rig = await Rig.open(ScriptedHop(REFUSES, offers="PIPELINING,SMTPUTF8"))
    submitted: list[tuple[str, bytes]] = []

    async def submit(to: str, octets: bytes, work: str) -> bool:
        submitted.append((to, octets))
        return True

    rig.outbound._settler._bouncer._submit = submit
    await rig.queue("müller@far.example", sender="jörg@here.example", smtputf8=True, orcpt="utf-8;m\\x{FC}ller@far.example")
    await rig.push()
    ((to, notice),) = submitted
    assert to == "jörg@here.example"
    assert b"Content-Type: message/global-delivery-status\r\n" in notice
    assert "Final-Recipient: utf-8; müller@far.example\r\n".encode() in notice
    assert "Original-Recipient: utf-8; müller@far.example\r\n".encode() in notice
    assert "To: <jörg@here.example>\r\n".encode() in notice
    await rig.close()


@virtual
async def test_one_notice_names_all_who_failed_and_nobody_else() -> None:
    rig = await Rig.open(ScriptedHop({"RCPT bad": "550 5.1.1 no", "RCPT late": "450 later"}))
    await rig.queue("bad1", "good", "bad2", "late")
    await rig.push()
    (notice,) = await rig.notices()
    assert notice.count(b"Final-Recipient") == 2
    assert await rig.refused() == ["bad1", "bad2"]
    assert notice.count(b"Remote-MTA: dns; 127.0.0.1\r\n") == 2
    await rig.close()


@virtual
async def test_a_notice_that_cannot_be_stored_is_not_forgotten() -> None:
    rig = await Rig.open(ScriptedHop(REFUSES))
    real = rig.outbound._settler._bouncer._submit

    async def submit(to: str, octets: bytes, work: str) -> bool:
        return False

    rig.outbound._settler._bouncer._submit = submit
    await rig.queue("one")
    await rig.push()
    assert "notice could not be stored" in (await rig.rows())["one"].last_status
    rig.outbound._settler._bouncer._submit = real
    await rig.hurry()
    assert await rig.refused() == ["one"]
    assert await rig.rows() == {}
    await rig.close()


@virtual
async def test_what_a_hop_says_injects_nothing() -> None:
    rig = await Rig.open(ScriptedHop({"RCPT": "RAW 550-no\\rTo: <x@y>\\r\\n550 \\x1b[2J\\xff\\r\\n"}))
    await rig.queue("one")
    await rig.push()
    (notice,) = await rig.notices()
    assert b"\r\nTo: <x@y>" not in notice
    assert b"\x1b" not in notice
    assert not any("\x1b" in line for line in rig.log("bounced"))
    await rig.close()


# -- spelling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offers", ["PIPELINING", "PIPELINING,SMTPUTF8"])
@pytest.mark.parametrize("smtputf8", [True, False])
@virtual
async def test_an_address_beyond_ascii_needs_smtputf8_unless_only_its_domain_is(offers: str, smtputf8: bool) -> None:
    """RFC 6531 §3.2: 5.6.7 for that recipient, and for nobody else."""
    rig = await Rig.open(ScriptedHop(offers=offers))
    await rig.queue("jörg@far.example", "ann@bücher.example", "bob@far.example", smtputf8=smtputf8)
    await rig.push()
    able = "SMTPUTF8" in offers
    assert await rig.rows() == {}
    (taken,) = rig.hop.messages
    assert taken.recipients == (
        ("TO:<jörg@far.example>", "TO:<ann@bücher.example>", "TO:<bob@far.example>")
        if able
        else ("TO:<ann@xn--bcher-kva.example>", "TO:<bob@far.example>")
    )
    assert ("SMTPUTF8" in taken.sender) == able
    notices = await rig.notices()
    assert len(notices) == (not able)
    for notice in notices:
        assert b"Status: 5.6.7\r\n" in notice
        assert notice.count(b"Final-Recipient") == 1
        assert b"Final-Recipient: utf-8; j\\x{F6}rg@far.example\r\n" in notice
    await rig.close()


@virtual
async def test_a_sender_beyond_ascii_needs_it_too() -> None:
    rig = await Rig.open(ScriptedHop())
    await rig.queue("one", sender="jörg@sender.example", smtputf8=True)
    await rig.push()
    assert rig.hop.messages == []
    assert not any(line.startswith("MAIL") for line in rig.hop.lines)
    assert "one" not in await rig.rows()
    assert rig.counted("outbound.bounced") == 2, "and the notice cannot go there either"
    rig.hop.close()


@virtual
async def test_the_session_stays_good_when_an_address_cannot_be_said() -> None:
    rig = await Rig.open()
    await rig.queue("jörg@far.example", smtputf8=True)
    await rig.push()
    await rig.queue("next")
    await rig.push()
    assert rig.hop.recipients() == ["next"]
    assert len(rig.hop.sessions) == 1
    await rig.close()


@pytest.mark.parametrize(
    ("address", "utf8", "spelt"),
    [
        ("ann@far.example", False, "ann@far.example"),
        ("ann@bücher.example", False, "ann@xn--bcher-kva.example"),
        ("ann@BÜCHER.example", False, "ann@xn--bcher-kva.example"),
        ("ann@bücher.example", True, "ann@bücher.example"),
        ("jörg@far.example", False, None),
        ("ann@\u2066.example", False, None),
        ("", False, ""),
    ],
)
def test_how_an_address_is_spelt(address: str, utf8: bool, spelt: str | None) -> None:
    assert spelling(address, utf8) == spelt


@pytest.mark.parametrize("setting", ["send", "bounce"])
@pytest.mark.parametrize("offers", ["PIPELINING", "PIPELINING,8BITMIME"])
@pytest.mark.parametrize("body", [b"Subject: x\r\n\r\nascii\r\n", b"Subject: x\r\n\r\n\xe4\xf6\r\n"])
@virtual
async def test_8_bit_bodies_for_a_hop_without_8bitmime_go_by_the_setting(setting: str, offers: str, body: bytes) -> None:
    rig = await Rig.open(ScriptedHop(offers=offers), OutboundSettings(eight_bit=setting))
    await rig.queue("one", body=body)
    await rig.push()
    refused = setting == "bounce" and "8BITMIME" not in offers and not body.isascii()
    assert rig.hop.recipients() == ([] if refused else ["one"])
    notices = await rig.notices()
    assert len(notices) == refused
    assert all(b"Status: 5.6.3\r\n" in notice for notice in notices)
    if not refused:
        assert rig.hop.messages[0].body.endswith(body)
        assert ("BODY=8BITMIME" in rig.hop.messages[0].sender) == ("8BITMIME" in offers)
    await rig.close()


def test_notify_is_read_as_rfc_3461_says() -> None:
    assert asks("", Action.FAILED)
    assert not asks("", Action.DELAYED)
    assert not asks("NEVER", Action.FAILED)
    assert asks("success", Action.RELAYED)
