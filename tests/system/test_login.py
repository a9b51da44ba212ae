"""Logging in: trusted networks, brakes, SCRAM, names and passwords as they are."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest
import scramp

from powermail.base import limits
from tests.system.conftest import PopClient, Running
from tests.system.submitting import plain, secured

LOOPBACK = '["127.0.0.0/8"]'


@pytest.mark.parametrize("running", [(f"auth.trusted_networks={LOOPBACK}",)], indirect=True)
async def test_from_a_trusted_network_no_tls_is_needed_and_addresses_do_not_count(running: Running) -> None:
    await running.mailbox("ann@local.example")
    authenticator = running.powermail.front.authenticator
    for number in range(limits.AUTH_FAR_OVER * limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
        authenticator._limiter.failed(authenticator._source("127.0.0.1"), f"user{number}@local.example")
    began = time.monotonic()
    client = await running.connect("submission")
    await client.ask("EHLO x")
    assert (await client.ask("AUTH PLAIN " + plain("ann@local.example"))).startswith("235")
    pop = await running.connect("pop3")
    assert isinstance(pop, PopClient)
    await pop.ask_pop("USER ann@local.example")
    assert (await pop.ask_pop("PASS secret")).startswith("+OK")
    assert time.monotonic() - began < limits.AUTH_DELAY_MAX_S


async def test_an_account_is_braked_from_a_trusted_network_too(running: Running) -> None:
    limiter = running.powermail.front.authenticator._limiter
    for _ in range(limits.AUTH_ACCOUNT_FAILURES_PER_MINUTE_MAX):
        limiter.failed("", "ann@local.example")
    assert limiter.delay_s("", "ann@local.example") == limits.AUTH_DELAY_MAX_S
    assert limiter.delay_s("", "bob@local.example") < 1.0


async def test_a_right_password_is_told_the_truth_after_failures_of_its_address(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "AUTH_DELAY_MAX_S", 0.3)
    await running.mailbox("ann@local.example")
    authenticator = running.powermail.front.authenticator
    for number in range(limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
        authenticator._limiter.failed("203.0.113.9", f"user{number}")
    began = time.monotonic()
    assert await authenticator.plain("203.0.113.9", "ann@local.example", "secret", "popd") is not None
    assert time.monotonic() - began >= 0.3
    assert await authenticator.plain("203.0.113.9", "ann@local.example", "wrong", "popd") is None


async def test_blanks_are_part_of_a_name_at_pop3(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.mailbox('"an na"@local.example')
    for name, good in ((" ann@local.example", False), ("ann@local.example", True), ('"an na"@local.example', True)):
        client = await running.connect("pop3")
        assert isinstance(client, PopClient)
        await client.start_tls_pop()
        assert (await client.ask_pop(f"USER {name}")).startswith("+OK")
        assert (await client.ask_pop("PASS secret")).startswith("+OK" if good else "-ERR [AUTH]"), name
        client.close()


@pytest.mark.parametrize("name", [" ann@local.example", "ann@local.example ", "\tann@local.example"])
async def test_blanks_are_part_of_an_identity(running: Running, name: str) -> None:
    """RFC 4616 §2: whoever compares names elsewhere would take it for another."""
    await running.mailbox("ann@local.example")
    assert await running.powermail.front.authenticator.plain("192.0.2.1", name, "secret", "popd") is None


@pytest.mark.parametrize("stored", ["{plain}gr\u00fc\u00dfe\u2126", "hash"])
@pytest.mark.parametrize("sent", ["gr\u00fc\u00dfe\u2126", "gru\u0308\u00dfe\u2126", "gr\u00fc\u00dfe\u03a9"])
async def test_a_password_is_the_same_however_its_characters_are_composed(running: Running, stored: str, sent: str) -> None:
    authenticator = running.powermail.front.authenticator
    password = await authenticator.hash("gr\u00fc\u00dfe\u03a9") if stored == "hash" else stored
    await running.mailbox("ann@local.example", password=password)
    assert await authenticator.plain("192.0.2.1", "ann@local.example", sent, "popd") is not None
    assert await authenticator.plain("192.0.2.1", "ann@local.example", "gru\u00dfe", "popd") is None


def base64_of(text: str) -> str:
    """A line of a SASL exchange."""
    return base64.b64encode(text.encode()).decode()


def text_of(line: str) -> str:
    """The text of the server's line behind its mark."""
    return base64.b64decode(line.partition(" ")[2]).decode()


@pytest.mark.parametrize("password", ["secret", "gr\u00fc\u00dfe\u2126"])
@pytest.mark.parametrize("wrong", [False, True])
async def test_scram_at_both_doors(running: Running, password: str, wrong: bool) -> None:
    """RFC 5802: neither side shows the password; RFC 4013: however its characters are composed."""
    await running.mailbox("ann@local.example", password=f"{{plain}}{password}")
    smtp = await secured(running)
    pop = await running.connect("pop3")
    assert isinstance(pop, PopClient)
    await pop.start_tls_pop()
    for ask, good, bad in ((smtp.ask, "235", "535"), (pop.ask_pop, "+OK", "-ERR [AUTH]")):
        client: Any = scramp.ScramClient(["SCRAM-SHA-256"], "ann@local.example", "other" if wrong else password)
        answer = await ask(f"AUTH SCRAM-SHA-256 {base64_of(client.get_client_first())}")
        client.set_server_first(text_of(answer))
        answer = await ask(base64_of(client.get_client_final()))
        if wrong:
            assert answer.startswith(bad)
            continue
        client.set_server_final(text_of(answer))  # raises if the server does not know the password
        assert (await ask("")).startswith(good)


@pytest.mark.parametrize("line", ["*", "!", "", "=", "A" * 20_000])
async def test_an_exchange_that_is_broken_off_leaves_the_session_in_step(running: Running, line: str) -> None:
    smtp = await secured(running)
    pop = await running.connect("pop3")
    assert isinstance(pop, PopClient)
    await pop.start_tls_pop()
    for ask, challenge, bad, good in ((smtp.ask, "334", "501", "250"), (pop.ask_pop, "+", "-ERR", "-ERR not now")):
        assert (await ask("AUTH PLAIN")).startswith(challenge)
        assert (await ask(line)).startswith(bad)
        assert (await ask("NOOP")).startswith(good)
