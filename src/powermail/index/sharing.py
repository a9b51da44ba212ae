"""Owns the contracts of the index about those who share it: which process does what, what they count together, which nodes
there are, and who may be a member of the cluster. They are parts of `index.contract.Index`, which has the rules for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from powermail.storage.layout import Layout, LayoutChange

# -- jobs -----------------------------------------------------------------------------------------------------------------


class JobLease(NamedTuple):
    """Who does a job, and until when, by the one clock of all who share the index (UTC); 0 if that ran ahead: it is over."""

    job: str
    owner: str
    until: float


class Leases(Protocol):
    """Which process does which background job. One has a job at a time as long as it renews in time; a process that was held up
    may go on for a moment after its lease is over. So a lease saves work: what two must never do both is decided by
    compare-and-set in the transaction that does it (laws 6, 9, 10).
    """

    async def lease(self, job: str, owner: str, seconds: float) -> bool:
        """Takes the job, or renews what `owner` has of it: its own for so many seconds from now. False if another has it.

        `owner` is new for each start of a process, so that nobody takes himself for his predecessor. `seconds` is at most
        `LEASE_S_MAX`: a lease that ends later than that was dated by a clock that ran ahead, and is over. May be repeated when
        its outcome is unknown.
        """

    async def release(self, job: str, owner: str) -> None:
        """Nobody has the job any more, if `owner` had it."""

    async def leases(self) -> list[JobLease]:
        """All that were taken and not released, by job, also those that are over: their owners stopped without a word."""


# -- tallies ---------------------------------------------------------------------------------------------------------------


class Tallies(Protocol):
    """What several processes count together, for limits that are the cluster's: each kind in windows of its own length."""

    async def tally(self, kind: str, added: Mapping[str, int], window_s: float) -> dict[str, int]:
        """Adds to the counts of the window that runs now, by the one clock of all who share the index; the highest counts that
        it has then, at most `TALLIES_SHOWN_MAX`. Windows that are over are cleared away. Without `added`, it only looks.
        """


# -- membership -----------------------------------------------------------------------------------------------------------


class MoveRow(NamedTuple):
    """A long move of copies that a keeper does, `drain NODE` or `rebalance`: what is left if its process ends.

    `total` messages were to be moved when it began (UTC), `done` of them are; `after` is the key it has come to, `phase` and
    `note` say in words where it is.
    """

    name: str
    phase: str
    total: int
    done: int
    began_at: float
    after: bytes = b""
    note: str = ""


HAND_ON = "hand-on"  # NODE: what lay there, and was told by marks and notes alone, is handed on by those that stay


def hand_on_row(node: str, now: float) -> MoveRow:
    """What is begun in the transaction that ends the membership of a disk (laws 11, 13)."""
    return MoveRow(f"{HAND_ON} {node}", "handing on", 1, 0, now)  # 0 % until it is done


class Membership(Protocol):
    """Which nodes there are and what each is for: the layout. It says nothing of what lies on them, nor how they are."""

    async def layout_version(self) -> int:
        """Its version: one cheap query, for who asks every second."""

    async def layout(self) -> Layout:
        """All of it, in one snapshot."""

    async def layout_fence(self) -> int:
        """Its version when it last changed in what may cost redundancy (another group, leaving, expelled, put back): nobody may
        go by an older one. 0 if it never did.
        """

    async def change_layout(self, changes: Sequence[LayoutChange], version: int | None = None) -> Layout | None:
        """Makes these changes, all or none; the layout then. The version rises by one, or stays if nothing differs.
        With the epoch it rises as well, above all that were given before (law 11).

        With `version` it is a compare-and-set: None, and nothing changed, if the layout has another by now. Without, only what
        any stale view may ask for (`layout.is_destructive`). Raises OperatorError for other changes, and for a node that is not
        there. May be repeated when its outcome is unknown.
        """

    async def restore_layout(self, layout: Layout) -> Layout:
        """The index has lost changes of the layout: an older backup was put back, or it was made anew. What is known of a later
        one takes its place, as a version far behind that; the layout then, which is the index's own if that is no older,
        or was changed in this epoch.
        """

    async def moves(self) -> list[MoveRow]:
        """Moves that were begun and not ended, by name."""

    async def note_move(self, move: MoveRow) -> None:
        """Begins a move, or remembers how far it is."""

    async def end_move(self, name: str, began_at: float | None = None) -> None:
        """It is done, or given up; with `began_at` only if it is the one that began then."""


# -- identities -------------------------------------------------------------------------------------------------------------


class Invitation(NamedTuple):
    """Who may join, as what: a token, of whose secret only the SHA-256 is known. Group, priority and address are a node's."""

    id: str
    secret: bytes
    identity: str
    roles: tuple[str, ...]
    group: str = ""
    priority: int = 1
    address: str = ""


class Token(NamedTuple):
    """An invitation as it stands. `request` is the SHA-256 of what it was used with, `answer` what was given for it. UTC."""

    invitation: Invitation
    expires_at: float
    used_at: float | None = None
    request: bytes = b""
    answer: bytes = b""
    failures: int = 0  # wrong secrets


class Holder(NamedTuple):
    """Who was given a certificate, and when the last one ends; `expelled_at` 0: is a member. UTC."""

    identity: str
    roles: tuple[str, ...]
    ends_at: float
    expelled_at: float = 0.0


class Identities(Protocol):
    """Who may join the cluster, who has a certificate, and who was expelled. All times are by the index's one clock."""

    async def invite(self, invitation: Invitation, seconds: float) -> float:
        """Keeps a token for so many seconds instead of the unused ones of that identity; when it ends. Those that ended more
        than `TOKEN_KEPT_S` ago go. Raises OperatorError for an identity that was expelled.
        """

    async def find_token(self, token: str) -> Token | None:
        """A token, whatever became of it."""

    async def count_guess(self, token: str) -> None:
        """A wrong secret was given; after `TOKEN_GUESSES_MAX` the token is worth nothing."""

    async def use_token(self, token: str, request: bytes, answer: bytes, ends_at: float) -> Token | None:
        """Uses it, if it was not used, has not ended and was not guessed at: once, by compare-and-set; its identity holds a
        certificate until `ends_at` then. The token as it stands afterwards, with this request and answer if this call used it;
        None if there is none, or its identity was expelled.
        """

    async def note_holder(self, identity: str, roles: Sequence[str], ends_at: float) -> bool:
        """It holds a certificate until then; False, and nothing is changed, if it was expelled."""

    async def expel_identity(self, identity: str) -> None:
        """Gets no certificate any more, and its tokens go. For ever, whether it was known or not."""

    async def expelled_known(self) -> bool:
        """False while nodes may know of expulsions that this index does not: since it was made, made anew or put back nobody
        has heard them all.
        """

    async def take_expelled(self, identities: Sequence[str], heard_in: int = 0) -> int:
        """Expels all of these that nodes know to be expelled; how many were not. With `heard_in`, the epoch from before they
        were asked, every node was heard: `expelled_known`, until a later one begins.
        """

    async def holders(self) -> list[Holder]:
        """All who ever held one or were expelled, by identity."""

    async def tokens(self) -> list[Token]:
        """All that are kept, by id."""
