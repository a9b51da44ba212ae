"""Owns how tests submit mail: a session behind TLS and login, and messages as they are."""

from __future__ import annotations

import base64

from tests.system.conftest import Client, Running


def plain(name: str, password: str = "secret") -> str:
    """The argument of AUTH PLAIN."""
    return base64.b64encode(f"\0{name}\0{password}".encode()).decode()


async def secured(running: Running) -> Client:
    """A submission session behind TLS."""
    client = await running.connect("submission")
    await client.ask("EHLO x")
    await client.ask("STARTTLS")
    await client.start_tls()
    await client.ask("EHLO x")
    return client


async def submitter(running: Running, name: str) -> Client:
    """The same, and logged in."""
    client = await secured(running)
    assert (await client.ask("AUTH PLAIN " + plain(name))).startswith("235")
    return client


async def submit(client: Client, sender: str, recipient: str, octets: bytes, chunked: bool = False) -> str:
    """One message of that session; the final reply. `octets` go as they are, in one chunk or behind DATA."""
    assert (await client.ask(f"MAIL FROM:<{sender}>")).startswith("250")
    assert (await client.ask(f"RCPT TO:<{recipient}>")).startswith("250")
    if chunked:
        return await client.ask(b"BDAT %d LAST\r\n" % len(octets) + octets)
    await client.ask("DATA")
    return await client.ask(octets + b"\r\n.\r\n")
