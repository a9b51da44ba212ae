"""Reads the dialogs of the node protocol, and makes frames that no client of ours would send."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from powermail.wire import node_forms as forms
from powermail.wire.node_frames import HEADER, FrameReader, add_frames, checksum_of, pieces_of
from powermail.wire.node_server import ACK, Ask, NodeServer, Stop
from powermail.wire.node_verbs import BY_NUMBER, VERBS, Failure, Role

KEY = b"k" * 16


def frame(verb: int | str, number: int, meta: Any = None, body: bytes = b"", flags: int = 0) -> bytes:
    """One frame, whatever it says; `meta` is octets, or a list that is packed."""
    octets = meta if isinstance(meta, bytes) else b"" if meta is None else msgspec.msgpack.encode(meta)
    if isinstance(verb, str):
        verb = VERBS[verb].number
    total = (checksum_of(octets) + checksum_of(body)) % (1 << 64)
    return HEADER.pack(len(octets) + len(body), verb, flags, len(octets), number, total) + octets + body


def hello(session: int = 1, lane: int = 0, **other: Any) -> list[Any]:
    """The meta of a HELLO."""
    fields = {
        "first": 1, "last": 1, "cluster": "ours", "node": "a", "incarnation": "", "instance": b"i" * 16, "session": session,
        "lane": lane, "fence": 0, "octets": 4 << 20, "operations": 1024, "features": [],
    }  # fmt: skip
    return list({**fields, **other}.values())


def operation(verb: str, number: int, meta: Any, body: bytes) -> bytes:
    """An operation as our client sends it, in pieces."""
    out: list[bytes | memoryview] = []
    add_frames(out, VERBS[verb].number, number, forms.encode(meta), pieces_of(body))
    return b"".join(out)


class Line(NamedTuple):
    """One line of a dialog."""

    verb: str
    number: int
    flags: int
    meta: Any  # None for none; "*" for any
    body: bytes


_LINE = re.compile(r"(\S+) (\d+)(?: flags=(\d+))?(?: (\[.*\]|\"[^\"]*\"|\*))?(?: ([^\[\]\"]+))?")


def parse_line(text: str) -> Line:
    """Reads what stands behind `C:` or `S:`."""
    match = _LINE.fullmatch(text)
    assert match, text
    verb, number, flags, meta, body = match.groups()
    value = meta
    if meta and meta != "*":
        value = ast.literal_eval(meta.replace("*]", '"*"]'))
    return Line(verb, int(number), int(flags or 0), value, (body or "").encode())


def octets_of(line: Line) -> bytes:
    """What a client says."""
    verb = int(line.verb[1:]) if line.verb.startswith("#") else line.verb
    return frame(verb, line.number, line.meta, line.body, line.flags)


class Session:
    """A machine, and a session that answers simple things at once."""

    def __init__(self, roles: frozenset[Role]) -> None:
        self.machine = NodeServer(roles)
        self.end = ""
        self.out = b""

    def hear(self, octets: bytes) -> None:
        """Octets of the client."""
        for event in self.machine.receive(octets):
            if isinstance(event, Stop):
                self.end = event.why
            else:
                self._answer(event)
                if self.machine.large_octets:  # so that the order of answers is that of asks for every chunking
                    self.out += self.machine.to_send(1 << 40)
        self.out += self.machine.to_send(1 << 40)

    def _answer(self, ask: Ask) -> None:
        machine, name = self.machine, BY_NUMBER[ask.verb].name
        if name == "HELLO":
            if ask.meta.cluster != "ours":
                machine.refuse(ask.number, "this is cluster ours")
                self.end = "refused"
                return
            windows = min(ask.meta.octets, 4 << 20), min(ask.meta.operations, 1024)
            machine.welcome(ask.number, forms.Welcome(1, "ours", ask.meta.node, "inc", 0, *windows))
        elif name == "PING":
            machine.reply(ask.number, forms.StampForm("boot", 1.5))
        elif name == "COMMIT":
            if ask.meta.key.startswith(b"no"):
                machine.fail(ask.number, Failure.COMMIT_REFUSED, "no")
            else:
                machine.ack(ask.number, "inc", 1, 8 * ask.number)
        elif name == "READ_COMMIT":
            machine.reply(ask.number, forms.NOTHING, ask.meta.key * 5_000)
        else:
            machine.reply(ask.number)


def said(octets: bytes) -> list[tuple[str, int, Any, Any]]:
    """What a node said: verb, number, meta, and the body or the receipts."""
    reader = FrameReader()
    found = []
    for verb, _, number, meta, body in reader.feed(octets):
        name = BY_NUMBER[verb].name
        rest: Any = [*ACK.iter_unpack(body)] if name == "ACKS" else body
        found.append((name, number, msgspec.msgpack.decode(meta) if meta else None, rest))
    assert reader.fault == ("", "") and not reader.begun
    return found


class Dialog(NamedTuple):
    """One file."""

    roles: frozenset[Role]
    client: list[bytes]
    node: list[Line]
    end: str


def load(path: Path) -> Dialog:
    """Reads a dialog."""
    roles: frozenset[Role] = frozenset()
    client, node, end = list[bytes](), list[Line](), ""
    for text in path.read_text().splitlines():
        if text.startswith("roles "):
            roles = frozenset(Role(word) for word in text.split()[1:])
        elif text.startswith("C: "):
            client.append(octets_of(parse_line(text[3:])))
        elif text.startswith("S: end "):
            end = text[7:]
        elif text.startswith("S: "):
            node.append(parse_line(text[3:]))
        else:
            assert text.startswith("#"), text
    return Dialog(roles, client, node, end)


def check(node: list[Line], found: list[tuple[str, int, Any, Any]]) -> None:
    """What was said is what should be. Receipts are gathered, and come when they come."""
    receipts = [tuple(int(word) for word in line.body.split()) for line in node if line.verb == "ACKS"]
    assert receipts == [receipt for verb, _, _, rest in found if verb == "ACKS" for receipt in rest]
    wanted, rest = [line for line in node if line.verb != "ACKS"], [one for one in found if one[0] != "ACKS"]
    assert [(line.verb, line.number) for line in wanted] == [(verb, number) for verb, number, _, _ in rest]
    for line, (_, _, meta, _) in zip(wanted, rest, strict=True):
        if line.meta == "*" or line.meta is None:
            continue
        if line.meta[-1:] == ["*"]:
            assert meta[: len(line.meta) - 1] == line.meta[:-1] and len(meta) >= len(line.meta)
        else:
            assert meta == line.meta
