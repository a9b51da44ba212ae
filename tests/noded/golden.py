"""Makes golden dialogs: what both ends of the node protocol say, octet by octet, with every field of every form filled (P19).

A release keeps those that it makes as `golden/VERSION.json`, and no later one ever changes that file; `test_golden` replays it
against both ends as they are now:

    python -m tests.noded.golden > tests/noded/golden/VERSION.json
"""

from __future__ import annotations

import sys
from typing import Any, Final

import msgspec
from msgspec import Struct, inspect

from powermail.base import limits
from powermail.wire import node_forms as forms
from powermail.wire.node_client import NodeClient
from powermail.wire.node_frames import pieces_of
from powermail.wire.node_server import Ask, NodeServer
from powermail.wire.node_verbs import TABLE, VERBS, Failure, Role, Way

ALL: Final = frozenset(Role)
_BODY: Final = bytes(range(256)) + b"more"
_PIECE_OCTETS: Final = 64  # so that short bodies come in pieces


class Turn(Struct):
    """One operation and its answer, in hex. `meta` and `answer` are the forms by the names of their fields."""

    verb: str
    number: int
    asked: str
    meta: dict[str, Any]
    body: str
    kind: str  # of the answer, by its verb
    answered: str
    answer: Any
    answer_body: str


class Golden(Struct):
    """All that was said on one connection; `pushed` is what nobody asked for, last a GOAWAY."""

    turns: list[Turn]
    pushed: str
    stat: dict[str, Any]


def sample(kind: inspect.Type, seed: int) -> Any:
    """A value of a type, another one for each seed."""
    if isinstance(kind, inspect.StructType):
        return kind.cls(*[sample(field.type, seed + number) for number, field in enumerate(kind.fields)])
    if isinstance(kind, inspect.BoolType):
        return True
    if isinstance(kind, inspect.IntType):
        return max(kind.ge or 0, min(3 + seed, kind.le or 1 << 60))
    if isinstance(kind, inspect.FloatType):
        return seed + 0.5
    if isinstance(kind, inspect.StrType):
        return f"word-{seed}"
    if isinstance(kind, inspect.BytesType):
        return bytes([seed % 256]) * 16
    if isinstance(kind, inspect.TupleType):
        return tuple([sample(item, seed + number) for number, item in enumerate(kind.item_types)])
    if isinstance(kind, inspect.DictType):
        return {sample(kind.key_type, seed + more): sample(kind.value_type, seed + more) for more in (0, 5)}
    assert isinstance(kind, inspect.ListType | inspect.VarTupleType), kind
    return tuple([sample(kind.item_type, seed + more) for more in (0, 5)])


def named(value: Any) -> Any:
    """A form as the names and values of its fields, all the way down."""
    if isinstance(value, Struct):
        return {name: named(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [named(one) for one in value]
    if isinstance(value, dict):
        return [[named(key), named(one)] for key, one in value.items()]
    return value.hex() if isinstance(value, bytes) else value


def make() -> Golden:
    """The dialogs of this program."""
    limits.NODE_PIECE_OCTETS = _PIECE_OCTETS  # type: ignore[misc]
    client, server, turns = NodeClient(), NodeServer(ALL), list[Turn]()
    asks = [verb for verb in TABLE if verb.way is Way.ASK]
    assert asks[0] is VERBS["HELLO"]
    for seed, verb in enumerate([*asks, VERBS["PROBE"]]):
        meta = sample(inspect.type_info(verb.meta), seed)
        body = _BODY if verb.name != "HELLO" else b""
        number = client.ask(verb, forms.encode(meta), pieces_of(body))
        asked = client.to_send()
        (event,) = server.receive(asked)
        assert isinstance(event, Ask) and event.number == number and named(event.meta) == named(meta)
        answer: Any = sample(inspect.type_info(verb.reply), seed + 7) if verb.reply is not None else {"place": [seed, 8 * seed]}
        kind, answer_body = "REPLY", _BODY[:100]
        if verb.name == "HELLO":
            answer = forms.Welcome(1, "ours", "a", "inc", 0, limits.NODE_WINDOW_OCTETS, limits.NODE_WINDOW_OPERATIONS)
            answer_body = b""
            server.welcome(number, answer)
        elif verb.reply is None:
            kind, answer_body = "ACKS", b""
            server.ack(number, "inc", seed, 8 * seed)
        elif len(turns) == len(asks):
            kind, answer, answer_body = "ERROR", {"failure": int(Failure.TROUBLE), "text": "it hangs"}, b""
            server.fail(number, Failure.TROUBLE, "it hangs")
        else:
            server.reply(number, answer, answer_body)
        said = named(answer) if isinstance(answer, Struct) else answer
        answered = server.to_send(1 << 40)
        turns.append(
            Turn(verb.name, number, asked.hex(), named(meta), body.hex(), kind, answered.hex(), said, answer_body.hex())
        )
        client.receive(answered)
    stat = sample(inspect.type_info(forms.StatForm), 1)
    server.push(stat)
    server.go_away("it was enough")
    return Golden(turns, server.to_send(1 << 40).hex(), named(stat))


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(make())).decode() + "\n")
