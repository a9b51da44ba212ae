"""Owns SASL at every door (RFC 4422): PLAIN, LOGIN, SCRAM-SHA-256. How lines travel is the protocol's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powermail.base.errors import Trouble
from powermail.directory.authenticate import Authenticator
from powermail.directory.contract import Account
from powermail.directory.reasons import Reason
from powermail.wire import sasl

MECHANISMS = ("SCRAM-SHA-256", "PLAIN", "LOGIN")

Ask = Callable[[str], Awaitable[str]]


class Cancelled(sasl.SaslError):
    """The client has given up with `*`."""


async def log_in(
    authenticator: Authenticator, client: str, door: str, mechanism: str, initial: str | None, ask: Ask
) -> Account | None:
    """Runs one exchange; None if the credentials are wrong. `initial` is the client's first response, if it came already.

    `ask` sends a challenge and returns the client's line; both are base64. Raises SaslError for what cannot be read,
    Cancelled, AuthRefused, Trouble.
    """
    return await decided(authenticator, client, door, _exchange(authenticator, client, door, mechanism, initial, ask))


async def decided(
    authenticator: Authenticator, client: str, door: str, check: Awaitable[Account | None], name: str | None = None
) -> Account | None:
    """The outcome of a check; one that came to no decision is logged and counted too. Raises as `check`."""
    try:
        return await check
    except Cancelled:
        authenticator.note(client, door, Reason.CANCELLED, name)
        raise
    except sasl.SaslError as error:
        authenticator.note(client, door, Reason.UNREADABLE, name, error)
        raise
    except Trouble as error:
        authenticator.note(client, door, Reason.UNDECIDED, name, error)
        raise


async def _exchange(
    authenticator: Authenticator, client: str, door: str, mechanism: str, initial: str | None, ask: Ask
) -> Account | None:
    async def answer(challenge: bytes) -> bytes:
        line = await ask(sasl.encode(challenge))
        if line == "*":
            raise Cancelled("cancelled")
        return sasl.decode(line)

    first = sasl.decode(initial) if initial else None
    if mechanism == "LOGIN":
        name = sasl.credential(first if first is not None else await answer(b"Username:"))
        return await authenticator.plain(client, name, sasl.credential(await answer(b"Password:")), door)
    if first is None:
        first = await answer(b"")
    if mechanism == "PLAIN":
        acts_for, name, password = sasl.parse_plain(first)
        return await authenticator.plain(client, name, password, door, acts_for)
    exchange = await authenticator.scram(client, sasl.credential(first), door)
    final = sasl.credential(await answer(exchange.server_first.encode()))
    account, message = await exchange.finish(final)
    if account is not None:
        await answer(message.encode())  # the client acknowledges the server's proof with an empty line
    return account
