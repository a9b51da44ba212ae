"""What is fuzzed of the node protocol: both machines, with octets as they come, and with frames whose sums are right."""

from __future__ import annotations

from itertools import pairwise

import zstandard

from powermail.base import limits
from powermail.base.errors import CopyDamaged
from powermail.storage.contract import COMPRESSED, Chunk
from powermail.storage.frames import BadFrame, Inflater, flaw_of, frame_octets
from powermail.wire import node_forms as forms
from powermail.wire.node_client import Acks, Answer, Event, Failed, Lost, NodeClient
from powermail.wire.node_frames import FrameReader
from powermail.wire.node_identity import NotOurs, parse_names, peer_of
from powermail.wire.node_server import State
from powermail.wire.node_verbs import BY_NUMBER, VERBS, Failure, Role
from tests.noded.speaking import KEY, Session, frame, hello, said

_ROLES = frozenset({Role.FRONT, Role.KEEPER})
_ASKED = ("COMMIT", "READ_CHUNK", "HAS", "PING", "CHECKPOINTS", "APPEND", "COMMIT", "VERIFY")


def _octets(data: bytes) -> tuple[bytes, list[bytes]]:
    """Octets as they are, or framed, in one and in pieces. The first two say which and how."""
    size, framed = (data[0] % 40 + 1, data[1] % 4) if len(data) > 1 else (1, 0)
    rest = data[2:]
    if framed:
        rest = _framed(rest)
    edges = [*range(0, len(rest), size), len(rest)]
    return rest, [rest[a:b] for a, b in pairwise(edges)]


def _framed(data: bytes) -> bytes:
    """Frames with verbs, flags, numbers, metas and bodies of these octets."""
    verbs, out = list(BY_NUMBER), []
    while len(data) >= 5:
        verb, flags, number, meta, body = data[:5]
        meta, body = meta % 48, body % 80
        kind = verbs[verb % len(verbs)] if verb < 240 else verb
        out.append(frame(kind, number, data[5 : 5 + meta], data[5 + meta : 5 + meta + body], flags % 4))
        data = data[5 + meta + body :]
    return b"".join(out) + data


def node_asks(data: bytes) -> None:
    """A node answers the same for every chunking, each operation once, and holds no more than is open."""
    rest, pieces = _octets(data)
    for greeted in (False, True):
        whole, parts = _node([rest], greeted), _node(pieces, greeted)
        assert whole == parts, (whole, parts)


def _node(pieces: list[bytes], greeted: bool) -> tuple[list[object], list[object], str, list[str]]:
    session = Session(_ROLES)
    if greeted:
        session.hear(frame("HELLO", 1, hello(operations=4, octets=300)))
    for piece in pieces:
        session.hear(piece)
    machine = session.machine
    assert machine.held_octets >= 0 and (machine.state is State.OVER or machine.unanswered <= 4 or not greeted)
    assert machine.state is not State.OVER or session.end
    answers = said(session.out)
    frames = FrameReader().feed(session.out)
    numbers = [number for verb, flags, number, _, _ in frames if BY_NUMBER[verb].name in ("REPLY", "ERROR") and not flags]
    receipts: list[object] = [receipt for verb, _, _, rest in answers if verb == "ACKS" for receipt in rest]
    assert len(numbers) == len(set(numbers)), "each once"
    return [one for one in answers if one[0] != "ACKS"], receipts, session.end, machine.refused


def node_answers(data: bytes) -> None:
    """A client takes the same from a hostile node for every chunking: each answer once, of the right form, or it is lost."""
    rest, pieces = _octets(data)
    assert _client([rest]) == _client(pieces)


def _client(pieces: list[bytes]) -> tuple[list[Event], int, bool]:
    client = NodeClient()
    for name in _ASKED:
        client.ask(VERBS[name], forms.encode([KEY]))
    found: list[Event] = []
    for piece in pieces:
        found += client.receive(piece)
    done: list[int] = []
    for event in found:
        if isinstance(event, Acks):
            done += [number for number, _, _ in event.receipts]
        elif isinstance(event, Answer):
            assert isinstance(event.meta, VERBS[_ASKED[event.number - 1]].reply or ())
            done.append(event.number)
        elif isinstance(event, Lost):
            assert event is found[-1] and client.over
        elif isinstance(event, Failed):
            done.append(event.number)
            assert event.failure is not Failure.COMMIT_REFUSED or _ASKED[event.number - 1] == "COMMIT"
    assert len(done) == len(set(done)) and client.open_octets >= 0
    if not client.over:
        assert client.unanswered == len(_ASKED) - len(done)
    assert len(client.reader.room()) <= limits.NODE_PAYLOAD_OCTETS_MAX + 24
    return found, client.unanswered, client.over


_FRAME = zstandard.ZstdCompressor(level=1).compress(b"what is said again is said in fewer octets; " * 20)
_INFLATER = Inflater()


def chunk_frames(data: bytes) -> None:
    """What is taken for a frame holds what it says or does not inflate; alone and among others it is the same."""
    changed = bytearray(_FRAME)
    for place, value in zip(data[1::2], data[2::2], strict=False):
        changed[place % len(changed)] = value
    for frame_ in (data[1:], _FRAME[: data[0] % 16 if data else 0] + data[1:], bytes(changed), _FRAME + data[1:]):
        try:
            octets = frame_octets(frame_)
        except BadFrame:
            assert flaw_of(Chunk(0, COMPRESSED, frame_, len(frame_)))
            continue
        try:
            alone = _INFLATER.octets(Chunk(0, COMPRESSED, frame_, octets))
        except CopyDamaged:
            alone = None
        assert alone is None or len(alone) == octets
        if octets:
            assert _INFLATER.many([_FRAME, frame_, _FRAME])[1] == alone


def certificate_names(data: bytes) -> None:
    """Names of certificates are read or passed over; who gets in has one id of this cluster."""
    alternatives = [("URI", part) for part in data.decode("utf-8", "replace").split("\n")]
    alternatives += [("URI", "powermail://ours/" + part) for _, part in alternatives]
    names = parse_names(alternatives)
    for name in names:
        assert ("URI", f"powermail://{name.cluster}/{name.role.value}/{name.id}") in alternatives
        assert "/" not in name.id + name.cluster
    try:
        peer = peer_of(names, "ours")
    except NotOurs as error:
        assert error.why in ("no_name", "cluster", "name")
    else:
        assert peer.roles == {name.role for name in names if name.cluster == "ours"}
        assert {name.id for name in names if name.cluster == "ours"} == {peer.id}
