"""Owns the vocabulary of the node protocol: verbs with their numbers, who may ask them and how they travel; roles, errors.

One table: the machines obey it, the tests try every role against every line of it, and docs/peer-protocol.md prints it.
Numbers are for ever (P19): a verb that goes leaves its number unused.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, Final, NamedTuple

import msgspec

from powermail.wire import node_forms as forms


class Role(Enum):
    """What a certificate makes of its holder (docs/peer-protocol.md, section 2)."""

    FRONT = "front"
    KEEPER = "keeper"
    OPERATOR = "operator"
    NODE = "node"  # serves; may ask nothing
    AUTHORITY = "authority"  # gives certificates; may ask nodes nothing


class Way(Enum):
    """Who says it."""

    ASK = "ask"
    ANSWER = "answer"


class Lane(Enum):
    """Which of the two connections of a peer it travels on."""

    SMALL = "small"
    BULK = "bulk"
    BY_SIZE = "by size"  # bulk when the body is more than one piece


class Failure(IntEnum):
    """Classes of an ERROR; a class that is not known is TROUBLE."""

    TROUBLE = 1
    READ_ONLY = 2
    COMMIT_REFUSED = 3  # law 5: definite; only of a COMMIT, and only the node itself says it
    MARK_REFUSED = 4
    OLDER_CHECKPOINT = 5
    COPY_MISSING = 6
    COPY_DAMAGED = 7
    OPERATOR = 8  # a mistake in configuration or use
    ROLE = 9  # this certificate may not ask that
    UNSUPPORTED = 10  # a verb, a flag or a value that this version does not know
    MALFORMED = 11  # a meta or a body that is not as its verb says
    REFUSED = 12  # of a HELLO: the text says why; the connection ends
    FENCED = 13  # of a HELLO that goes by an older layout than is obeyed here; the body is the newer one; the connection ends


class Verb(NamedTuple):
    """One line of the table. `meta` is the form of an ask, `reply` that of the REPLY's meta (None: ACKS answers it)."""

    name: str
    number: int
    way: Way
    roles: frozenset[Role]
    needs_hello: bool
    lane: Lane
    meta: type[Any]
    reply: type[Any] | None


_F, _K, _O = Role.FRONT, Role.KEEPER, Role.OPERATOR
_ANY: Final = frozenset({_F, _K, _O})
_READING: Final = frozenset({_F, _K})
_STORING: Final = frozenset({_F, _K})
_KEEPING: Final = frozenset({_K})
_OPERATING: Final = frozenset({_O})
_MEMBERSHIP: Final = frozenset({_K, _O})
_ABORTING: Final = frozenset({_F})
_NOBODY: Final[frozenset[Role]] = frozenset()
_NONE: Final = forms.Nothing
_SMALL, _BULK, _BY_SIZE = Lane.SMALL, Lane.BULK, Lane.BY_SIZE


def _ask(name: str, number: int, roles: frozenset[Role], lane: Lane, meta: type[Any], reply: type[Any] | None = _NONE) -> Verb:
    return Verb(name, number, Way.ASK, roles, name != "HELLO", lane, meta, reply)


def _answer(name: str, number: int, meta: type[Any]) -> Verb:
    return Verb(name, number, Way.ANSWER, _NOBODY, name not in ("REPLY", "ERROR", "GOAWAY"), _BY_SIZE, meta, None)


TABLE: Final = (
    _ask("HELLO", 1, _ANY, _BY_SIZE, forms.Hello, forms.Welcome),
    _ask("PING", 2, _ANY, _SMALL, _NONE, forms.StampForm),
    _ask("COMMIT", 3, _STORING, _BY_SIZE, forms.Commit, None),
    _ask("APPEND", 4, _STORING, _BULK, forms.Append),
    _ask("CANCEL", 5, _STORING, _SMALL, forms.KeyForm),
    _ask("ABORT", 6, _ABORTING, _SMALL, forms.Abort, forms.EndForm),
    _ask("DELETE", 7, _KEEPING, _SMALL, forms.Delete, forms.EndForm),
    _ask("DROP", 8, _KEEPING, _SMALL, forms.Marked, forms.EndForm),
    _ask("DISCARD", 9, _KEEPING, _SMALL, forms.Discard, forms.HeldForm),
    _ask("READ_COMMIT", 10, _READING, _BULK, forms.KeyForm),
    _ask("READ_CHUNK", 11, _READING, _BULK, forms.ReadChunk, forms.ChunkForm),
    _ask("READ_SMALL", 12, _READING, _BULK, _NONE),
    _ask("HAS", 13, _READING, _SMALL, _NONE),
    _ask("VERIFY", 14, _READING, _SMALL, forms.KeyForm, forms.PositionForm),
    _ask("SCAN", 15, _KEEPING, _BULK, forms.ScanAsk, forms.ScanHead),
    _ask("REREAD", 16, _KEEPING, _BULK, forms.UnreadForm, forms.ScanHead),
    _ask("LIVE_KEYS", 17, _KEEPING, _BULK, forms.Page),
    _ask("FENCE", 18, _KEEPING, _SMALL, forms.StampForm, forms.PositionForm),
    _ask("MARK", 19, _ANY, _SMALL, forms.Marked),
    _ask("END", 20, _ANY, _SMALL, _NONE),
    _ask("PROBE", 21, _ANY, _SMALL, _NONE),
    _ask("REBIRTH", 22, _KEEPING, _SMALL, _NONE, forms.EndForm),
    _ask("LIFT_BIRTH", 23, _KEEPING, _SMALL, _NONE),
    _ask("PUT_CHECKPOINT", 24, _KEEPING, _BULK, forms.PutCheckpoint),
    _ask("CHECKPOINTS", 25, _KEEPING, _BULK, forms.CheckpointsAsk, forms.CheckpointsHead),
    _ask("COMPACTABLE", 26, _KEEPING, _SMALL, forms.Compactable, forms.CompactableHead),
    _ask("COMPACT", 27, _KEEPING, _SMALL, forms.Compact, forms.Freed),
    _ask("OPEN", 28, _ANY, _SMALL, _NONE),
    _ask("INITIALISE", 29, _OPERATING, _SMALL, _NONE),
    _ask("BLOCK", 30, _OPERATING, _SMALL, forms.Block),
    _ask("LAYOUT", 31, _ANY, _BULK, _NONE, forms.LayoutForm),
    _ask("SET_LAYOUT", 32, _MEMBERSHIP, _BULK, forms.LayoutForm, forms.LayoutForm),
    _ask("EXPEL", 33, _MEMBERSHIP, _SMALL, forms.Expel),
    _ask("FOLLOW", 34, _ANY, _SMALL, forms.Follow),
    _ask("EXPELLED", 35, _MEMBERSHIP, _BULK, _NONE),
    _answer("ACKS", 128, forms.Acks),
    _answer("REPLY", 129, _NONE),
    _answer("ERROR", 130, forms.Error),
    _answer("STAT", 131, forms.StatForm),
    _answer("GOAWAY", 132, forms.Error),
)
VERBS: Final = {verb.name: verb for verb in TABLE}
BY_NUMBER: Final = {verb.number: verb for verb in TABLE}
HELLO, PING, COMMIT = VERBS["HELLO"], VERBS["PING"], VERBS["COMMIT"]
ACKS, REPLY, ERROR, STAT, GOAWAY = (VERBS[name] for name in ("ACKS", "REPLY", "ERROR", "STAT", "GOAWAY"))

READS: Final = frozenset(
    {
        VERBS[name].number
        for name in ("READ_COMMIT", "READ_CHUNK", "READ_SMALL", "SCAN", "REREAD", "LIVE_KEYS", "CHECKPOINTS", "END", "HAS")
    }
)  # whose answers may be large: they wait while the peer does not read

MEMBERSHIP: Final = frozenset(
    {VERBS[name].number for name in ("LAYOUT", "SET_LAYOUT", "EXPEL", "FOLLOW", "EXPELLED")}
)  # of the machine, not of a node

META_DECODERS: Final = {verb.number: msgspec.msgpack.Decoder(verb.meta).decode for verb in TABLE}
REPLY_DECODERS: Final = {verb.number: msgspec.msgpack.Decoder(verb.reply).decode for verb in TABLE if verb.reply is not None}

assert len(VERBS) == len(BY_NUMBER) == len(TABLE), "no name and no number twice"
