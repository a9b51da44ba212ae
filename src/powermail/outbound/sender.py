"""Owns the queue's way out: lease, send to the route, then finish, defer or bounce each recipient.

The seam for direct MX delivery is `route`: today the smarthost takes all. Retries back off with jitter; mail that was not
taken within its lifetime is bounced once, to a non-null reverse-path only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.log import Event
from powermail.base.settings import OutboundSettings
from powermail.base.world import World
from powermail.index.contract import Index, QueueRow
from powermail.mail.dsn import Failure, printable
from powermail.message.opener import Opener
from powermail.outbound.bounce import Bouncer
from powermail.outbound.client import HopTrouble, Route, SmtpClient
from powermail.wire.smtp_client import Reply

_RECIPIENTS_PER_TRANSACTION = 100


class Outbound:
    """Sends what is due."""

    def __init__(
        self,
        world: World,
        index: Index,
        opener: Opener,
        bouncer: Bouncer,
        settings: OutboundSettings,
        hostname: str,
        route: Route | None,
    ) -> None:
        self._world = world
        self._index = index
        self._opener = opener
        self._bouncer = bouncer
        self._settings = settings
        self._hostname = hostname
        self._route = route
        self._owner = world.entropy.octets(8).hex()
        self._idle: list[tuple[float, SmtpClient]] = []

    async def step(self) -> float:
        """Leases due rows and sends them, `concurrency` messages at a time."""
        await self._close_idle()
        if self._route is None:
            return 30.0
        now = self._world.clock.now()
        rows = await self._index.lease_due(self._owner, now, limits.QUEUE_LEASE_S, self._settings.concurrency * 10)
        if not rows:
            return 1.0
        groups: dict[tuple[bytes, str], list[QueueRow]] = {}
        for row in rows:
            groups.setdefault((row.key, row.reverse_path), []).append(row)
        limit = asyncio.Semaphore(self._settings.concurrency)

        async def one(group: list[QueueRow]) -> None:
            async with limit:
                try:
                    await self._send_group(group)
                except Trouble as error:  # the lease ends, and it is tried again; the others are not held up by it
                    self._world.log.event(Event.TROUBLE, worker="outbound", key=group[0].key, error=str(error))

        parts = [
            group[start : start + _RECIPIENTS_PER_TRANSACTION]
            for group in groups.values()
            for start in range(0, len(group), _RECIPIENTS_PER_TRANSACTION)
        ]
        async with asyncio.TaskGroup() as tasks:
            for part in parts:
                tasks.create_task(one(part))
        return 0.0

    async def stop(self) -> None:
        """Gives leases back and closes connections."""
        for _, client in self._idle:
            client.abort()
        self._idle.clear()
        try:
            await self._index.release_leases(self._owner)
        except Trouble as error:
            self._world.log.event(Event.TROUBLE, error=str(error))

    async def _close_idle(self) -> None:
        now = self._world.clock.monotonic()
        old = [client for since, client in self._idle if now - since > limits.SMTP_CLIENT_IDLE_S]
        self._idle = [(since, client) for since, client in self._idle if now - since <= limits.SMTP_CLIENT_IDLE_S]
        for client in old:
            await client.quit()

    async def _client(self) -> SmtpClient:
        if self._idle:
            return self._idle.pop()[1]
        assert self._route is not None
        client = SmtpClient(self._world, self._route, self._hostname)
        await client.connect()
        return client

    async def _send_group(self, rows: list[QueueRow]) -> None:
        """One message to some recipients; every row gets an outcome."""
        try:
            client = await self._client()
            try:
                replies, final = await client.send(
                    self._mail_line(rows[0], client), [self._rcpt_line(r, client) for r in rows], self._body(rows[0])
                )
            except Trouble:
                client.abort()
                raise
            self._idle.append((self._world.clock.monotonic(), client))
        except HopTrouble as error:
            await self._defer_or_expire(rows, printable(str(error)))
            return
        except Trouble as error:
            await self._defer_or_expire(rows, f"storage: {printable(str(error))}")
            return
        await self._settle(rows, replies, final)

    def _mail_line(self, row: QueueRow, client: SmtpClient) -> str:
        line = f"MAIL FROM:<{row.reverse_path}>"
        if "SIZE" in client.extensions:
            line += f" SIZE={row.octets}"
        if "8BITMIME" in client.extensions:
            line += " BODY=8BITMIME"
        if row.smtputf8 and "SMTPUTF8" in client.extensions:
            line += " SMTPUTF8"
        if "DSN" in client.extensions:
            line += f" RET={row.ret}" if row.ret else ""
            line += f" ENVID={row.envid}" if row.envid else ""
        return line

    def _rcpt_line(self, row: QueueRow, client: SmtpClient) -> str:
        line = f"RCPT TO:<{row.destination}>"
        if "DSN" in client.extensions:
            line += f" NOTIFY={row.notify}" if row.notify else ""
            line += f" ORCPT={row.orcpt}" if row.orcpt else ""
        return line

    async def _body(self, row: QueueRow) -> AsyncIterator[bytes]:
        """The octets without our Return-Path field, which is for final delivery only (RFC 5321 §4.4)."""
        first = True
        async for part in self._opener.read(row.key):
            if first and part.startswith(b"Return-Path:"):
                part = part[part.index(b"\r\n") + 2 :]
            first = False
            yield part

    async def _settle(self, rows: list[QueueRow], replies: list[Reply], final: Reply | None) -> None:
        sent: list[QueueRow] = []
        later: dict[str, list[QueueRow]] = {}
        failed: list[tuple[QueueRow, Failure]] = []
        for row, answer in zip(rows, replies, strict=True):
            reply = final if answer.positive and final is not None else answer
            text = printable(f"{reply.code} {reply.text}")
            if reply.positive:
                sent.append(row)
                self._world.counters.add("outbound.sent")
                self._world.log.event(Event.SENT, key=row.key, recipient=row.destination, reply=text)
            elif reply.code < 500:
                later.setdefault(text, []).append(row)
            else:
                enhanced = reply.enhanced if reply.enhanced.startswith("5") else "5.0.0"
                failed.append((row, self._failure(row, enhanced, f"smtp; {text}")))
        if sent:
            await self._index.finish(sent)
        for text, deferred in later.items():
            await self._defer_or_expire(deferred, text)
        await self._bounce(failed)

    def _failure(self, row: QueueRow, enhanced: str, diagnostic: str) -> Failure:
        host = self._route.host if self._route is not None else ""
        return Failure(row.destination, row.recipient, row.orcpt, enhanced, diagnostic, host)

    async def _bounce(self, failed: list[tuple[QueueRow, Failure]]) -> None:
        """One DSN for all that failed together; the rows go when the DSN is safe."""
        if not failed:
            return
        rows = [row for row, _ in failed]
        told = [(row, failure) for row, failure in failed if row.notify != "NEVER"]  # RFC 3461 §4.1
        if told and rows[0].reverse_path:
            if not await self._bouncer.bounce(told[0][0], [failure for _, failure in told]):
                await self._index.defer(rows, self._due(rows), "the bounce could not be stored")
                return
        for row, failure in failed:
            self._world.counters.add("outbound.bounced")
            self._world.log.event(Event.BOUNCED, key=row.key, recipient=row.destination, reason=failure.diagnostic)
        await self._index.finish(rows)

    def _due(self, rows: list[QueueRow]) -> list[float]:
        now = self._world.clock.now()
        first = self._settings.retry_first_s
        return [
            now + min(limits.QUEUE_RETRY_MAX_S, first * 2 ** min(row.attempts, 20)) * self._world.entropy.uniform(0.8, 1.2)
            for row in rows
        ]

    async def _defer_or_expire(self, rows: list[QueueRow], text: str) -> None:
        now = self._world.clock.now()
        expired = [row for row in rows if now - row.created_at >= self._settings.lifetime_s]
        alive = [row for row in rows if now - row.created_at < self._settings.lifetime_s]
        if alive:
            self._world.counters.add("outbound.deferred", len(alive))
            for row in alive:
                self._world.log.event(Event.DEFERRED, key=row.key, recipient=row.destination, reason=text)
            await self._index.defer(alive, self._due(alive), text)
        await self._bounce([(row, self._failure(row, "4.4.7", f"X-PowerMail; expired: {text}")) for row in expired])
