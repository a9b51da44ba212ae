"""Owns the listening side of the node protocol: who comes in, sessions and their order, bounds for all connections together.

TLS 1.3 with certificates of the cluster's authority on both sides, always, on local sockets too. A client is who its
certificate says, and its HELLO must name this cluster and a node that is served here. The session number of an instance only
rises: a higher one first ends the connections of the older, so that no octet of a dead connection lands behind an abort.

What a keeper or an operator tells of the cluster's membership (`noded.obeyed`) counts at once: who was expelled, or goes by an
older layout than the fence, is cut off and stays out; who is connected has a moment to say that he goes by the newer one. It is
confirmed when it is durable here, and when what was asked before by those who were cut off has been written or never will be.
Who connects when no keeper is there that has told of the layout is given no stamp for a while, and no commit of his is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from powermail.base import limits
from powermail.base.errors import InvariantBroken, OperatorError
from powermail.base.log import Event
from powermail.base.net import Listener
from powermail.base.tasks import Tasks, Worker, report_bug
from powermail.base.world import World
from powermail.cluster.node_values import Malformed
from powermail.noded.answers import Answers, NotAllowed
from powermail.noded.connection import Connection
from powermail.noded.obeyed import Obeyed
from powermail.storage.contract import NodeState, Stamp, StorageNode
from powermail.wire import node_forms as forms
from powermail.wire.node_identity import NotOurs, Peer, parse_names, peer_of
from powermail.wire.node_server import Ask
from powermail.wire.node_verbs import VERBS

FEATURES: tuple[str, ...] = ()  # of this version, beyond its number


class Refusal(NamedTuple):
    """Why a HELLO is refused; with the layout that is obeyed here if that is why."""

    text: str
    version: int = 0
    layout: bytes = b""


class _Session:
    """The highest session number of an instance, and its connections."""

    def __init__(self) -> None:
        self.number = -1
        self.lanes: dict[int, None] = {}  # that were ever taken in it
        self.connections: list[Connection] = []


class Greeter(asyncio.Protocol):
    """A connection before its TLS handshake."""

    def __init__(self, service: NodeService) -> None:
        self._service = service
        self.first = b""
        self.lost = False
        self.task: asyncio.Task[Any] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.task = self._service.accept(self, transport)

    def data_received(self, data: bytes) -> None:
        self.first += data  # of the handshake, in the moment before TLS takes over

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


class NodeService:
    """The nodes of this machine, as others see them."""

    def __init__(
        self,
        world: World,
        cluster: str,
        nodes: Mapping[str, StorageNode],
        tasks: Tasks,
        context: Callable[[], ssl.SSLContext],
        broken: Callable[[BaseException], None],
        obeyed: Obeyed | None = None,
    ) -> None:
        """`context` gives what asks for certificates of the cluster's authority, for each connection anew; `obeyed` is what
        this machine was told of the membership. `broken` is called when a storage invariant broke: the process must stop.
        """
        self.log = world.log
        self.counters = world.counters
        self.now = world.clock.now
        self.obeyed = obeyed or Obeyed(world)
        self._world = world
        self._cluster = cluster
        self._answers = {name: Answers(world, node) for name, node in nodes.items()}
        self._tasks = tasks
        self._context = context
        self._broken = broken
        self._handshakes: dict[asyncio.Transport, None] = {}  # of those who have not said who they are, the oldest first
        self._connections: dict[Connection, None] = {}
        self._sessions: OrderedDict[tuple[str, str, bytes], _Session] = OrderedDict()
        self._held_octets = 0
        self._paused = False
        self._draining = False
        self._listeners: list[Listener] = []
        self.worker = Worker("noded", self._step, world.clock, world.log, broken)
        self._looked_at = float("-inf")
        self._pushing: asyncio.Task[Any] | None = None
        self._tellers: dict[Connection, None] = {}  # by whom a keeper has said what layout there is, and that are still there
        self._followed = asyncio.Event()  # somebody said that he goes by a layout, or went

    # -- life ------------------------------------------------------------------------------------------------------

    async def listen(self, host: str, port: int) -> int:
        """Takes connections; the port. Raises OperatorError."""
        for answers in self._answers.values():
            await answers.look()
        listener = await self._world.net.listen(host, port, lambda: Greeter(self))
        self._listeners.append(listener)
        if self._pushing is None:
            self._pushing = self._tasks.start(self.worker.run(), "worker noded")
        self._world.log.event(Event.LISTENING, door="node", address=f"{host}:{listener.port}")
        return listener.port

    async def close(self, drain_s: float = limits.NODE_CLOSE_WAIT_S) -> None:
        """Asks for no more, answers what was asked, and closes; who takes too long is cut off."""
        self._draining = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.go_away("this node is shutting down")
        time = asyncio.get_running_loop().time
        deadline = time() + drain_s
        while self._connections and time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.abort()
        if self._pushing is not None:
            self._pushing.cancel()

    def abort(self) -> None:
        """Cuts all connections, as the end of the process does."""
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.abort()
        if self._pushing is not None:
            self._pushing.cancel()

    def cut(self) -> None:
        """Cuts all connections and goes on listening."""
        for connection in list(self._connections):
            connection.abort()

    def describe(self) -> dict[str, Any]:
        """For `powermail status`."""
        return {
            "connections": len(self._connections),
            "held_octets": self._held_octets,
            "sessions": len(self._sessions),
            "layout": self.obeyed.version,
            "fence": self.obeyed.fence,
            "expelled": len(self.obeyed.expelled),
        }

    async def _step(self) -> float:
        """Pushes figures that have changed, and looks at deadlines once a second; the pause to the next step."""
        for connection in list(self._connections):
            connection.push()
        now = asyncio.get_running_loop().time()
        if now - self._looked_at >= 1.0:
            self._looked_at = now
            await self.sweep(now)
        return limits.NODE_STAT_INTERVAL_S

    async def sweep(self, now: float) -> None:
        """Deadlines of all connections; claims grow old."""
        for connection in list(self._connections):
            connection.sweep(now)
        for answers in self._answers.values():
            await answers.look()

    # -- coming in -------------------------------------------------------------------------------------------------

    def accept(self, greeter: Greeter, transport: asyncio.BaseTransport) -> asyncio.Task[Any] | None:
        """A connection: its handshake begins, or there are too many; of those without a name the oldest makes room."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        if self._draining or len(self._connections) >= limits.NODE_CONNECTIONS_MAX:
            self._turn_off(transport, "too many, or stopping")  # type: ignore[arg-type]
            return None
        while len(self._handshakes) >= limits.NODE_HANDSHAKES_MAX:  # who is of the cluster is through in no time
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            self._turn_off(oldest, "too many who have not said who they are")
        self._handshakes[transport] = None  # type: ignore[index]
        return self._tasks.start(self._secure(greeter, transport), "noded-handshake")  # type: ignore[arg-type]

    def _turn_off(self, transport: asyncio.Transport, text: str) -> None:
        self._refused(str((transport.get_extra_info("peername") or ("local",))[0]), "connections", text)
        transport.abort()

    async def _secure(self, greeter: Greeter, plain: asyncio.Transport) -> None:
        client = str((plain.get_extra_info("peername") or ("local",))[0])
        connection = Connection(self)
        connection.client = client
        try:
            if greeter.lost:
                return
            context = self._context()
            transport = await self._world.net.start_tls(plain, connection, context, server_side=True, first=greeter.first)
        except (OSError, TimeoutError) as error:
            self._refused(client, f"tls.{_tls_word(error)}", str(error) or "the handshake took too long")
            plain.abort()
            return
        finally:
            self._handshakes.pop(plain, None)
        if connection.closed:
            return
        certificate = transport.get_extra_info("peercert") or {}
        try:
            peer = self._peer(certificate)
        except NotOurs as error:
            self._refused(client, error.why, str(error))
            connection.turn_away(transport, error.why, str(error))
            return
        if "notAfter" in certificate:
            connection.ends_at = float(ssl.cert_time_to_seconds(certificate["notAfter"]))
        self._connections[connection] = None
        self.counters.add("noded.connections")
        connection.begin(transport, peer, plain)

    def _peer(self, certificate: Mapping[str, Any]) -> Peer:
        peer = peer_of(parse_names(certificate.get("subjectAltName", ())), self._cluster)
        if peer.id in self.obeyed.expelled:
            raise NotOurs("expelled", f"{peer.id} was expelled from this cluster")
        return peer

    def hello(self, connection: Connection, hello: forms.Hello) -> forms.Welcome | Refusal:
        """The answer to a HELLO, or why it is refused."""
        why, text = self._hello_refusal(connection, hello)
        if why:
            self.counters.add(f"noded.refused.{why}")
            return Refusal(text, self.obeyed.version, self.obeyed.layout) if why == "fence" else Refusal(text)
        assert connection.peer is not None
        instance = (connection.peer.id, hello.node, hello.instance)
        session = self._sessions.setdefault(instance, _Session())
        self._sessions.move_to_end(instance)
        if hello.session > session.number:
            for older in list(session.connections):  # before anything of the new one is heard
                older.supersede()
            session.number, session.lanes, session.connections = hello.session, {}, []
        session.lanes[hello.lane] = None
        session.connections.append(connection)
        connection.instance, connection.session = instance, hello.session
        connection.fence, connection.bulk = hello.fence, bool(hello.lane)
        connection.answers = self._answers[hello.node]
        connection.untold = bool(self.obeyed.version) and not self._tellers
        connection.untold_until = asyncio.get_running_loop().time() + limits.NODE_UNTOLD_S
        self._prune()
        return forms.Welcome(
            min(hello.last, forms.PROTOCOL_LAST),
            self._cluster,
            hello.node,
            connection.answers.node.incarnation,
            self.obeyed.fence,
            max(1, min(hello.octets, limits.NODE_WINDOW_OCTETS)),
            max(1, min(hello.operations, limits.NODE_WINDOW_OPERATIONS)),
            tuple(sorted({*hello.features} & {*FEATURES})),
        )

    def _hello_refusal(self, connection: Connection, hello: forms.Hello) -> tuple[str, str]:
        assert connection.peer is not None
        if self._draining:
            return "draining", "this node is shutting down"
        if hello.first > forms.PROTOCOL_LAST or hello.last < forms.PROTOCOL_FIRST:
            mine = f"{forms.PROTOCOL_FIRST} to {forms.PROTOCOL_LAST}"
            return "version", f"protocol {hello.first} to {hello.last} is spoken there, and {mine} here"
        if hello.cluster != self._cluster:
            return "cluster", f"cluster {hello.cluster} was asked for, and this is {self._cluster}"
        if hello.node not in self._answers:
            return "node", f"node {hello.node} was asked for, and {', '.join(self._answers)} is served here"
        if hello.fence < self.obeyed.fence:
            return "fence", f"layout {hello.fence} is gone by there, and {self.obeyed.fence} or later is to be"
        session = self._sessions.get((connection.peer.id, hello.node, hello.instance))
        if session is not None and hello.session < session.number:
            return "stale_session", f"session {hello.session} has ended: session {session.number} has begun"
        if session is not None and hello.session == session.number and hello.lane in session.lanes:
            return "replayed", f"session {hello.session} has had this connection"
        return "", ""

    def _prune(self) -> None:
        """Instances without connections are forgotten, the longest silent first."""
        if len(self._sessions) <= limits.NODE_SESSIONS_MAX:
            return
        for instance, session in self._sessions.items():
            if not session.connections:
                del self._sessions[instance]
                return

    def ended(self, connection: Connection) -> None:
        """A connection is no more."""
        self._connections.pop(connection, None)
        self._tellers.pop(connection, None)
        self._followed.set()
        session = self._sessions.get(connection.instance)
        if session is not None and connection in session.connections:
            session.connections.remove(connection)

    # -- membership ------------------------------------------------------------------------------------------------

    def is_untold(self, connection: Connection) -> bool:
        """True while no mail is taken on a connection: this node may have missed a fence while it was away, and a keeper is to
        say so first. Not for long, as keepers may be away (P14).
        """
        if connection.untold:
            late = asyncio.get_running_loop().time() >= connection.untold_until
            connection.untold = not (late or self._tellers)
            if late and not self._tellers:
                self.counters.add("noded.untold")
        return connection.untold

    async def membership(self, connection: Connection, ask: Ask) -> tuple[Any, bytes]:
        """The answer to one of MEMBERSHIP. Raises Malformed, NotAllowed, OperatorError, NodeTrouble."""
        obeyed, told = self.obeyed, -1
        if ask.verb == _FOLLOW:
            self._goes_by(connection, ask.meta.version)
            return forms.NOTHING, b""
        if ask.verb == _EXPELLED:
            return forms.NOTHING, forms.encode([forms.ExpelledForm(*each) for each in obeyed.expelled.items()])
        if ask.verb == _EXPEL:
            await self._expel(connection, ask.meta.ids, ask.meta.more)
            return forms.NOTHING, b""
        if ask.verb == _SET_LAYOUT:
            told = ask.meta.version
            await self._set_layout(connection, ask.meta, ask.body)
        return forms.LayoutForm(obeyed.version, obeyed.fence), obeyed.layout if told < obeyed.version else b""

    async def _set_layout(self, connection: Connection, told: forms.LayoutForm, layout: bytes) -> None:
        if len(layout) > limits.NODE_LAYOUT_OCTETS_MAX or not layout or told.fence > told.version or not told.version:
            raise Malformed(f"layout {told.version} of {len(layout)} octets, with fence {told.fence}")
        self.obeyed.take(told.version, told.fence, layout)
        fence = self.obeyed.fence
        if told.version >= fence:
            self._goes_by(connection, told.version)  # who tells of a layout goes by it
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.NODE_FOLLOW_WAIT_S):
                while self._behind(fence):
                    self._followed.clear()
                    await self._followed.wait()
        for each in self._behind(fence):
            self.counters.add("noded.fenced")
            each.abort()
        await self._settled()
        if not connection.closed and told.version >= fence:
            self._tellers[connection] = None

    def _behind(self, fence: int) -> list[Connection]:
        """Who is let in, and goes by an older layout than is to be."""
        return [each for each in self._connections if each.answers is not None and each.fence < fence]

    def _goes_by(self, connection: Connection, version: int) -> None:
        for each in self._connections:
            if each.instance == connection.instance:
                each.fence = max(each.fence, version)
        self._followed.set()

    async def _expel(self, connection: Connection, ids: Sequence[str], more: bool) -> None:
        assert connection.peer is not None
        if connection.peer.id in ids:
            raise NotAllowed("self", "nobody expels itself")
        try:
            told, void = self.obeyed.expel(ids, connection.peer.id, more)
        except OperatorError:
            self.counters.add("noded.expelled_full")
            raise
        if told or void:
            self.counters.add("noded.expelled_told", told)
            self.counters.add("noded.expelled_void", void)
            self.log.event(Event.EXPELLED, by=connection.peer.id, ids=" ".join(ids)[:200], told=told, void=void)
        for each in list(self._connections):
            if each.peer is not None and each.peer.id in self.obeyed.expelled:
                self.counters.add("noded.expelled")
                each.abort()
        await self._settled()

    async def _settled(self) -> None:
        """Durable, and nothing that was asked by those who were cut off is still to be written. Raises NodeTrouble."""
        await self.obeyed.keep()
        for answers in self._answers.values():
            if answers.node.state not in _NOT_OPEN:
                await answers.node.fence(_NO_STAMP)  # waits for all appends that were asked before

    # -- for all connections ---------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """True while all connections together hold too much: of a bulk one that is not read nothing more is kept then."""
        return self._paused

    def hold(self, connection: Connection, octets: int) -> None:
        """A connection holds so many octets more: of operations that are not answered, or of answers that wait to go out."""
        self._held_octets += octets
        over = self._held_octets > limits.NODE_HELD_OCTETS_MAX
        if over is not self._paused and (over or self._held_octets < limits.NODE_HELD_OCTETS_MAX // 2):
            self._paused = over
            if over:
                self.counters.add("noded.held_back")
            for each in list(self._connections):
                if each.bulk:
                    each.pause(over)

    def broke(self, error: BaseException) -> None:
        """Something that should not happen."""
        report_bug(self.log, error, "noded")
        if isinstance(error, InvariantBroken):
            self._broken(error)

    def log_refusal(self, connection: Connection, reason: str) -> None:
        """A line for the operator."""
        peer = connection.peer.id if connection.peer is not None else None
        self.log.event(Event.CONNECTION_REFUSED, door="node", client=connection.client, peer=peer, reason=reason)

    def _refused(self, client: str, why: str, text: str) -> None:
        self.counters.add(f"noded.refused.{why}")
        self.log.event(Event.CONNECTION_REFUSED, door="node", client=client, reason=text)


_SET_LAYOUT: Final = VERBS["SET_LAYOUT"].number
_EXPEL: Final = VERBS["EXPEL"].number
_FOLLOW: Final = VERBS["FOLLOW"].number
_EXPELLED: Final = VERBS["EXPELLED"].number
_NO_STAMP: Final = Stamp("", 0.0)  # of no opening: no commit is refused for it
_NOT_OPEN: Final = (NodeState.OPENING, NodeState.MISSING, NodeState.CLOSED)  # what they were asked they refused


def _tls_word(error: BaseException) -> str:
    """Why a handshake failed, as a word for counting."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "expired" if "expired" in error.verify_message else "foreign"
    reason = getattr(error, "reason", None) or ""
    if "PEER_DID_NOT_RETURN" in reason:
        return "no_certificate"
    return "failed"
