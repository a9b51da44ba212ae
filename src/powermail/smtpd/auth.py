"""Owns the AUTH command (RFC 4954): PLAIN, LOGIN, SCRAM-SHA-256."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powermail.base.errors import Trouble
from powermail.directory.authenticate import Authenticator, AuthRefused
from powermail.directory.contract import Account
from powermail.mail import status as st
from powermail.mail.status import Status
from powermail.wire import sasl

MECHANISMS = ("SCRAM-SHA-256", "PLAIN", "LOGIN")

Ask = Callable[[str], Awaitable[str]]


async def authenticate(
    authenticator: Authenticator, client: str, door: str, argument: str, ask: Ask
) -> tuple[Account | None, Status]:
    """Runs one exchange; `ask` sends a 334 challenge (already base64) and returns the client's line."""
    mechanism, _, initial = argument.partition(" ")
    mechanism = mechanism.upper()
    if mechanism not in MECHANISMS:
        return None, st.AUTH_UNKNOWN
    try:
        if mechanism == "SCRAM-SHA-256":
            account = await _scram(authenticator, client, door, initial, ask)
        else:
            name, password = await _plain_or_login(mechanism, initial, ask)
            account = await authenticator.plain(client, name, password, door)
    except sasl.SaslError as error:
        return None, st.AUTH_CANCELLED if str(error) == "cancelled" else st.AUTH_SYNTAX
    except AuthRefused:
        return None, st.AUTH_LIMITED
    except Trouble as error:
        return None, st.AUTH_TROUBLE.because(error)
    return account, st.LOGGED_IN if account is not None else st.AUTH_FAILED


async def _answer(ask: Ask, challenge: str) -> bytes:
    line = await ask(challenge)
    if line == "*":  # RFC 4954 §4
        raise sasl.SaslError("cancelled")
    return sasl.decode(line)


async def _plain_or_login(mechanism: str, initial: str, ask: Ask) -> tuple[str, str]:
    first = sasl.decode(initial) if initial else None
    if mechanism == "PLAIN":
        authzid, name, password = sasl.parse_plain(first if first is not None else await _answer(ask, ""))
        if authzid and authzid.lower() != name.lower():
            # RFC 4616 §2: acting for somebody else needs a right that nobody has; fails like a wrong password (U11).
            return name, "\0"
        return name, password
    user = first if first is not None else await _answer(ask, sasl.encode(b"Username:"))
    secret = await _answer(ask, sasl.encode(b"Password:"))
    return sasl.credential(user), sasl.credential(secret)


async def _scram(authenticator: Authenticator, client: str, door: str, initial: str, ask: Ask) -> Account | None:
    first = sasl.decode(initial) if initial else await _answer(ask, "")
    exchange = await authenticator.scram(client, sasl.credential(first))
    final = sasl.credential(await _answer(ask, sasl.encode(exchange.server_first.encode())))
    account, message = await exchange.finish(final, door)
    if account is not None:
        await ask(sasl.encode(message.encode()))  # the client acknowledges the server's proof with an empty line
    return account
