"""Owns the link to one node: two connections of one session, made and kept, lost and made again; stamps by pings (law 2).

The small connection is made first: its HELLO ends the older session on the node. If either is lost both are, and what was
asked on them has an unknown outcome. Nothing counts before HELLO is answered: in TLS 1.3 a client hears that its certificate
was refused only when it first reads.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from powermail.base import limits
from powermail.base.errors import NodeTrouble, OperatorError, PowerMailError
from powermail.base.world import World
from powermail.cluster import node_values as values
from powermail.cluster.node_connection import NO_META, Disconnected, NodeConnection
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

    def __init__(self, cluster: str, host: str, port: int, context: Callable[[], ssl.SSLContext], fence: int = 0) -> None:
        self.cluster = cluster
        self.host = host
        self.port = port
        self.context = context
        self.fence = fence  # version of the layout that this process goes by


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
        self._session = 0
        self._small: NodeConnection | None = None
        self._bulk: NodeConnection | None = None
        self._up = False
        self._refusal = ""  # why the connection that is being made is none
        self._beating: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """True while operations are taken."""
        return self._up

    # -- making and ending -----------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Makes both connections. Raises OperatorError when the far end is not what it should be, NodeTrouble."""
        self._session += 1
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
            kind = OperatorError if isinstance(error, OperatorError) else Disconnected
            raise kind(f"node {self._node} at {self._where.host}:{self._where.port}: {text}") from error
        except asyncio.CancelledError:
            self._drop("given up")
            raise
        if self._small.closed or self._bulk.closed:
            self._drop(self._refusal)
            raise Disconnected(f"node {self._node}: {self._refusal or 'the connection was lost'}")
        self._up = True
        self._beating = asyncio.get_running_loop().create_task(self._beat(), name=f"pings to {self._node}")

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
            self._session,
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
        self._up = False
        small, self._small = self._small, None
        bulk, self._bulk = self._bulk, None
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        for connection in (small, bulk):
            if connection is not None:
                connection.close(why)

    # -- what connections tell -------------------------------------------------------------------------------------

    def pushed(self, stat: forms.StatForm) -> None:
        self.incarnation = stat.incarnation or self.incarnation
        self._on_stat(stat)

    def leaving(self, connection: NodeConnection) -> None:
        """What was asked is still answered there; both connections end when they have nothing open."""
        if self._up:
            self._up = False
            for each in (self._small, self._bulk):
                if each is not None:
                    each.going = True
                    if not each.open_operations:
                        each.close("it asked for no more")

    def lost(self, connection: NodeConnection, why: str) -> None:
        self._refusal = self._refusal or why
        was_up = connection in (self._small, self._bulk) and (self._up or self._beating is not None)
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
        """Asks on the connection that the verb and its size call for; the Answer, or the Receipt of a COMMIT."""
        lane = verb.lane
        bulk = lane is Lane.BULK or (lane is Lane.BY_SIZE and len(pieces) > 1)
        connection = self._bulk if bulk else self._small
        if connection is None or not self._up:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(Disconnected(f"node {self._node} is not connected"))
            return future
        return connection.ask(verb, meta, pieces, octets, within_s)

    # -- stamps ----------------------------------------------------------------------------------------------------

    async def hear(self) -> None:
        """Asks for the stamp and the figures now. Raises NodeTrouble."""
        asked_at = self._monotonic()
        answer: Answer = await self.ask(verbs.PING, within_s=limits.NODE_PING_TIMEOUT_S)
        if asked_at >= self.stamp_at:
            self.stamp, self.stamp_at = values.stamp_of(answer.meta), asked_at

    async def _beat(self) -> None:
        """Pings both connections; who does not answer in time is lost (P20)."""
        while True:
            for connection, ping in ((self._small, self.hear), (self._bulk, self._ping_bulk)):
                try:
                    async with asyncio.timeout(limits.NODE_PING_TIMEOUT_S):
                        await ping()
                except (NodeTrouble, TimeoutError):
                    if connection is not None and self._up:
                        connection.abort("no answer to a ping")
                    return
            await asyncio.sleep(limits.NODE_PING_INTERVAL_S)

    async def _ping_bulk(self) -> None:
        if self._bulk is not None:
            await self._bulk.ask(verbs.PING, within_s=limits.NODE_PING_TIMEOUT_S)
