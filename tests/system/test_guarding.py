"""Who gets in: the limits on wrong passwords, and the operator's socket."""

from __future__ import annotations

import stat

import msgspec
import pytest

from powermail.admin.control import ControlServer, NotRunning, ask_raw
from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.directory.authenticate import Authenticator, AuthRefused
from powermail.directory.limiter import FailureLimiter, ranges
from powermail.directory.reasons import Reason
from powermail.wire.proxy import plain_address
from tests.system.conftest import Running


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.at = 0.0

    def monotonic(self) -> float:
        return self.at

    def now(self) -> float:
        return self.at


def test_guessing_is_refused_by_range_and_the_owner_elsewhere_is_not() -> None:
    """U05: no lock-out weapon; an hour later the minute's count is over, the day's is not."""
    clock = Hand()
    limiter = FailureLimiter(clock)
    for _ in range(limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
        assert not limiter.refused("192.0.2.1")
        limiter.failed("192.0.2.1", "ann@local.example")
    assert limiter.refused("192.0.2.1")
    assert not limiter.refused("192.0.2.2")
    assert not limiter.refused("198.51.100.1")
    clock.at += 3600
    assert not limiter.refused("192.0.2.1")
    for minute in range(10):
        clock.at += 61
        for _ in range(9):
            limiter.failed("192.0.2.1", f"user{minute}")
    clock.at += 61
    assert limiter.refused("192.0.2.1")


def test_neighbours_share_a_wider_limit() -> None:
    clock = Hand()
    limiter = FailureLimiter(clock)
    for host in range(1, 31):
        limiter.failed(f"192.0.2.{host}", "x")
    assert limiter.refused("192.0.2.40")
    assert not limiter.refused("192.0.2.200")
    assert ranges("2001:db8::1") == ("2001:db8::/64", "2001:db8::/48", "2001:db8::/32")


async def test_wrong_passwords_count_across_doors(running: Running) -> None:
    await running.mailbox("ann@local.example")
    authenticator = running.powermail.front.authenticator
    assert authenticator is not None
    for _ in range(limits.AUTH_FAR_OVER * limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
        authenticator._limiter.failed("203.0.113.9", "ann@local.example")
    with pytest.raises(AuthRefused):
        await authenticator.plain("203.0.113.9", "ann@local.example", "secret", "submission")
    account = await authenticator.plain("198.51.100.7", "ann@local.example", "secret", "popd")
    assert account is not None
    assert account.address == "ann@local.example"


async def test_original_defect_10_only_the_owner_reaches_the_control_socket(running: Running) -> None:
    path = str(running.data / "control.sock")
    server = ControlServer(path, running.powermail.operations)

    async def quiet(done: int, total: int) -> None:
        pass

    with pytest.raises(NotRunning):
        await ask_raw(path, "status", {}, quiet)
    await server.start()
    try:
        assert stat.S_IMODE((running.data / "control.sock").stat().st_mode) == 0o600
        status = msgspec.json.decode(await ask_raw(path, "status", {}, quiet))
        assert status["degraded"] == []
        for call in ("call", "__init__", "_account", "shutdown"):
            with pytest.raises(OperatorError, match="unknown operation"):
                await ask_raw(path, call, {}, quiet)
        with pytest.raises(OperatorError):
            await ask_raw(path, "list_messages", {"address": "../../etc/passwd"}, quiet)
    finally:
        await server.stop()


async def test_no_secret_is_logged_or_shown(running: Running) -> None:
    """A18: neither hash nor password leaves by log, status or account listing."""
    await running.mailbox("ann@local.example", password="{plain}tell-nobody")
    client = await running.connect("submission")
    await client.ask("EHLO x")
    await client.ask("AUTH PLAIN AGFubgB0ZWxsLW5vYm9keQ==")
    shown = [await running.operation(name) for name in ("status", "dir", "orphans")]
    shown.append(await running.operation("account_list", after="", limit=10))
    text = msgspec.json.encode(shown).decode() + "".join(running.powermail.world.log.lines)  # type: ignore[attr-defined]
    assert "tell-nobody" not in text
    assert "AGFubgB0" not in text
    assert "$argon2" not in text


def test_an_account_guessed_at_from_many_addresses_answers_slowly() -> None:
    """U05: the wrong answers of one account are delayed wherever they come from; nobody is locked out."""
    limiter = FailureLimiter(Hand())
    assert limiter.delay_s("203.0.113.1", "ann@local.example") < 1.0
    for host in range(limits.AUTH_ACCOUNT_FAILURES_PER_MINUTE_MAX):
        limiter.failed(f"198.18.{host * 8}.1", "ann@local.example")
    assert limiter.delay_s("203.0.113.1", "ann@local.example") == limits.AUTH_DELAY_MAX_S
    assert limiter.delay_s("203.0.113.1", "bob@local.example") < 1.0
    assert not limiter.refused("203.0.113.1")


@pytest.mark.parametrize("stored", ["{plain}right", "{argon2id}", "{md5}7ac66c0f148de9519b8bd264312c4d64", ""])
async def test_a_wrong_password_waits_once_for_its_turn_whatever_the_scheme(
    running: Running, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U07: twelve at once of a {plain} account took 231 ms, where unknown names took 151."""
    authenticator = running.powermail.front.authenticator
    password = await authenticator.hash("right") if stored == "{argon2id}" else stored
    if stored:
        await running.mailbox("ann@local.example", password=password)
    turns: list[object] = []
    check = type(authenticator)._check

    async def counted(self: Authenticator, *words: str) -> Reason | None:
        turns.append(words)
        return await check(self, *words)

    monkeypatch.setattr(type(authenticator), "_check", counted)
    assert await authenticator.plain("192.0.2.1", "ann@local.example", "wrong", "popd") is None
    assert len(turns) == 1


def test_mapped_clients_do_not_share_a_range() -> None:
    """One IPv4 guesser, seen through an IPv6 socket, locked out everybody."""
    limiter = FailureLimiter(Hand())
    for _ in range(limits.AUTH_FAR_OVER * limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
        limiter.failed(plain_address("::ffff:192.0.2.1"), "x")
    assert limiter.refused(plain_address("::ffff:192.0.2.1"), limits.AUTH_FAR_OVER)
    assert not limiter.refused(plain_address("::ffff:198.51.100.1"))


def test_a_trusted_client_counts_by_account_only() -> None:
    limiter = FailureLimiter(Hand())
    for number in range(1000):
        limiter.failed("", f"user{number}")
    assert not limiter.refused("")
    assert limiter.delay_s("", "ann@local.example") < 1.0
