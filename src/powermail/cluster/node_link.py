"""Owns the link to one node: two connections of one session, made and kept, lost and made again; stamps by pings (law 2).

The small connection is made first: its HELLO ends the older session on the node. If either is lost both are, and what was
asked on them has an unknown outcome. Nothing counts before HELLO is answered: in TLS 1.3 a client hears that its certificate
was refused only when it first reads.

Slow is not dead (P20): a link is given up when a ping has no answer and no octet moves either way, not when time passes. A
bulk connection that is not read while the small one answers is held back, and is waited for longer.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

from powermail.base import limits
from powermail.base.errors import LayoutOutdated, NodeTrouble, OperatorError, PowerMailError
from powermail.base.world import World
from powermail.cluster import node_values as values
from powermail.cluster.node_connection import NO_META, Disconnected, NodeConnection, NotConnected
from powermail.storage.contract import Stamp
from powermail.wire import node_forms as forms
from powermail.wire import node_verbs as verbs
from powermail.wire.node_client import Answer
from powermail.wire.node_frames import NO_BODY, Pieces
from powermail.wire.node_identity import is_node, parse_names
from powermail.wire.node_verbs import Lane, Verb

_SMALL, _BULK = 0, 1


class Where:
    """Where a node is, and as whom it is spoken to. The context is asked for anew each time: certificates are renewed."""

    def __init__(
        self,
        cluster: str,
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext],
        fence: int = 0,
        told: Callable[[int, bytes], None] | None = None,
    ) -> None:
        """`told` hears of a newer layout, its version and its octets, when the node refuses this one: who takes it raises
        `fence`, and the link is made with that (P14).
        """
        self.cluster = cluster
        self.host = host
        self.port = port
        self.context = context
        self.fence = fence  # version of the layout that this process goes by
        self.told = told


class NodeLink:
    """Both connections to a node. `on_stat` and `on_lost` tell its owner what nobody asked for."""

    def __init__(
        self,
        world: World,
        node: str,
        where: Where,
        on_stat: Callable[[forms.StatForm], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.incarnation = ""  # as last known, told in HELLO
        self.stamp: Stamp | None = None  # as last heard
        self.stamp_at = float("-inf")  # our clock when it was asked for: it is no older
        self._world = world
        self._monotonic = world.clock.monotonic
        self._node = node
        self._where = where
        self._on_stat = on_stat
        self._on_lost = on_lost
        self._instance = world.entropy.octets(16)
        self.session = 0  # a number for each connecting
        self._small: NodeConnection | None = None
        self._bulk: NodeConnection | None = None
        self.up = False  # operations are taken while it is True
        self._refusal = ""  # why the connection that is being made is none
        self._beating: list[asyncio.Task[None]] = []
        self._pinging: asyncio.Future[Any] | None = None  # a ping on its way on the small connection
        self._pinged_at = 0.0  # our clock when it was asked

    # -- making and ending -----------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Makes both connections. Raises OperatorError when the far end is not what it should be, NodeTrouble."""
        self.session += 1
        self._refusal = ""
        try:
            async with asyncio.timeout(limits.NODE_CONNECT_TIMEOUT_S):
                self._small = await self._dial(_SMALL)
                self._bulk = await self._dial(_BULK)
        except TimeoutError as error:
            self._drop("no answer in time")
            raise Disconnected(f"node {self._node} at {self._where.host}:{self._where.port}: no answer in time") from error
        except (OSError, PowerMailError) as error:
            text = self._refusal or str(error) or type(error).__name__
            self._drop(text)
            if isinstance(error, LayoutOutdated) and self._where.told is not None:
                self._where.told(error.version, error.layout)
            kind = OperatorError if isinstance(error, OperatorError) else Disconnected
            raise kind(f"node {self._node} at {self._where.host}:{self._where.port}: {text}") from error
        except asyncio.CancelledError:
            self._drop("given up")
            raise
        if self._small.closed or self._bulk.closed:
            self._drop(self._refusal)
            raise Disconnected(f"node {self._node}: {self._refusal or 'the connection was lost'}")
        self.up = True
        create = asyncio.get_running_loop().create_task
        for connection, patience_s, ping in (
            (self._small, limits.NODE_PING_TIMEOUT_S, self._ping),
            (self._bulk, max(limits.NODE_PING_TIMEOUT_S, limits.NODE_BULK_TIMEOUT_S), self._bulk.ping),
        ):
            self._beating.append(create(self._beat(connection, patience_s, ping), name=f"pings to {self._node}"))

    async def _dial(self, lane: int) -> NodeConnection:
        where = self._where
        connection = NodeConnection(self._node, self)
        if lane == _SMALL:
            self._small = connection
        else:
            self._bulk = connection
        await self._world.net.connect(where.host, where.port, lambda: connection, where.context(), "")
        assert connection.transport is not None
        certificate = connection.transport.get_extra_info("peercert") or {}
        if not is_node(parse_names(certificate.get("subjectAltName", ())), where.cluster, self._node):
            raise OperatorError(f"the certificate there is not that of node {self._node} of cluster {where.cluster}")
        hello = forms.Hello(
            forms.PROTOCOL_FIRST,
            forms.PROTOCOL_LAST,
            where.cluster,
            self._node,
            self.incarnation,
            self._instance,
            self.session,
            lane,
            where.fence,
        )
        answer = await connection.ask(verbs.HELLO, forms.encode(hello), within_s=limits.NODE_CONNECT_TIMEOUT_S)
        connection.welcomed(answer.meta)
        return connection

    def end(self, why: str) -> None:
        """Closes both connections in good order."""
        self._drop(why)

    def cut(self, why: str) -> None:
        """Cuts both connections, as a pulled cable does."""
        for connection in (self._small, self._bulk):
            if connection is not None:
                connection.abort(why)

    def _drop(self, why: str) -> None:
        self.up = False
        self.stamp, self.stamp_at = None, float("-inf")  # what the next link leads to may be another opening
        small, self._small = self._small, None
        bulk, self._bulk = self._bulk, None
        for beating in self._beating:
            beating.cancel()
        self._beating, self._pinging = [], None
        for connection in (small, bulk):
            if connection is not None:
                connection.close(why)

    # -- what connections tell -------------------------------------------------------------------------------------

    def pushed(self, stat: forms.StatForm) -> None:
        self.incarnation = stat.incarnation or self.incarnation
        self._on_stat(stat)

    def leaving(self) -> None:
        """What was asked is still answered there; both connections end when they have nothing open."""
        self.up = False
        for each in (self._small, self._bulk):
            if each is not None and not each.going:
                each.leave()

    def lost(self, connection: NodeConnection, why: str) -> None:
        self._refusal = self._refusal or why
        was_up = connection in (self._small, self._bulk) and (self.up or bool(self._beating))
        if was_up:
            other = self._bulk if connection is self._small else self._small
            if connection.going and other is not None and not other.closed:
                return  # in good order: the other one may still have answers to come
            self._drop(why)
            self._on_lost(why)

    # -- operations ------------------------------------------------------------------------------------------------

    def ask(
        self,
        verb: Verb,
        meta: bytes = NO_META,
        pieces: Pieces = NO_BODY,
        octets: int = 0,
        within_s: float = limits.NODE_CALL_TIMEOUT_S,
    ) -> asyncio.Future[Any]:
        """Asks on the connection that the verb and its size call for; the Answer, or the Receipt of a COMMIT.

        The future raises what the node answers, NeverAsked, or NodeTrouble.
        """
        lane = verb.lane
        bulk = lane is Lane.BULK or (lane is Lane.BY_SIZE and len(pieces) > 1)
        connection = self._bulk if bulk else self._small
        if connection is None or not self.up:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(NotConnected(f"node {self._node} is not connected"))
            return future
        return connection.ask(verb, meta, pieces, octets, within_s)

    def commit(self, meta: bytes, pieces: Pieces, octets: int) -> asyncio.Future[Any]:
        """Asks to COMMIT; the Receipt. The future raises as that of `ask`."""
        connection = self._small if len(pieces) == 1 else self._bulk
        if connection is None or not self.up:
            return self.ask(verbs.COMMIT)
        return connection.ask(verbs.COMMIT, meta, pieces, octets)

    # -- stamps ----------------------------------------------------------------------------------------------------

    async def hear(self) -> Stamp | None:
        """Asks for the stamp and the figures now; the stamp, which the node made after this was called. Raises NodeTrouble."""
        try:
            async with asyncio.timeout(limits.NODE_PING_TIMEOUT_S):
                if self._pinging is not None:  # that was asked before: the next one is for all who come meanwhile
                    await asyncio.wait([self._pinging])
                answer: Answer = await asyncio.shield(self._pinging or self._ping())
        except TimeoutError as error:
            raise NodeTrouble(f"node {self._node}: PING takes too long") from error
        return values.stamp_of(answer.meta)

    def write_s(self) -> float:
        """As this end sees it: how long the node has not answered what it answers at once while it is well, or the longest that
        it took to answer a COMMIT since `probed`.
        """
        small = self._small
        if small is None:
            return 0.0
        write_s = max(small.owes_s(), small.slowest_s)
        return write_s if self._pinging is None else max(write_s, self._monotonic() - self._pinged_at)

    def probed(self) -> None:
        """A probe has ended: what took long before it is forgotten."""
        if self._small is not None:
            self._small.slowest_s = 0.0

    def _ping(self) -> asyncio.Future[Any]:
        if self._small is None or not self.up:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(NotConnected(f"node {self._node} is not connected"))
            return future
        self._pinged_at = self._monotonic()
        self._pinging = self._small.ping()
        self._pinging.add_done_callback(partial(self._heard, self._pinged_at))
        return self._pinging

    def _heard(self, asked_at: float, pinging: asyncio.Future[Any]) -> None:
        if self._pinging is pinging:
            self._pinging = None
        if pinging.cancelled() or pinging.exception() is not None or not self.up:
            return
        if asked_at >= self.stamp_at:
            self.stamp, self.stamp_at = values.stamp_of(pinging.result().meta), asked_at

    async def _beat(self, connection: NodeConnection, patience_s: float, ping: Callable[[], asyncio.Future[Any]]) -> None:
        """Pings a connection; who neither answers nor makes progress is lost. Nothing new is asked of one who leaves."""
        while not connection.closed:
            if connection.going:
                leaves_s = limits.NODE_CLOSE_WAIT_S + limits.NODE_CALL_GRACE_S
                if await _is_silent(connection, leaves_s, asyncio.get_running_loop().create_future()):
                    connection.abort("it asked for no more, and is silent")
            elif await _is_silent(connection, patience_s, ping()):
                connection.abort("no answer to a ping")
            await asyncio.sleep(limits.NODE_PING_INTERVAL_S)


async def _is_silent(connection: NodeConnection, patience_s: float, asked: asyncio.Future[Any]) -> bool:
    """Waits for an answer; True if there is none, and no octet moved for so long. Time in which we stood still ourselves
    does not count: what came meanwhile is read first.
    """
    time, look_s = asyncio.get_running_loop().time, patience_s / 16
    quiet_s, looked_at = 0.0, time()
    connection.moved()
    while not connection.closed:
        await asyncio.wait([asked], timeout=look_s)
        if asked.done():
            if not asked.cancelled():
                asked.exception()
            return False
        now = time()
        quiet_s = 0.0 if connection.moved() else quiet_s + min(now - looked_at, 2 * look_s)
        looked_at = now
        if quiet_s >= patience_s:
            return True
    return False
