"""Owns who may get a certificate of this cluster once (tokens), who has one, and who was expelled.

Danger: the times are the index's own (`_in_now`), never those of the machine that asks, whose clock may be any. That a token
is used once is decided by the one statement that uses it, whoever asks beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.index.sharing import Holder, Invitation, Token
from powermail.index.sql.core import Core
from powermail.index.sql.engine import Reading, Transaction, Untouched, split

_TOKEN = "id, secret, identity, roles, site, priority, address, expires_at, used_at, request, answer, failures"
_UNUSED = "used_at IS NULL AND expires_at > ? AND failures < ?"
_USE = f"UPDATE tokens SET used_at = ?, request = ?, answer = ? WHERE id = ? AND {_UNUSED}"
_HOLD = (
    "INSERT INTO identities (id, roles, ends_at, expelled_at) VALUES (?, ?, ?, 0) ON CONFLICT (id) DO UPDATE SET"
    " roles = excluded.roles, ends_at = excluded.ends_at WHERE identities.expelled_at = 0"
)


def _token(r: Sequence[Any]) -> Token:
    """A row of `tokens`, read as _TOKEN."""
    invitation = Invitation(r[0], bytes(r[1]), r[2], split(r[3]), r[4], r[5], r[6])
    return Token(invitation, r[7], r[8], bytes(r[9]), bytes(r[10]), r[11])


class IdentityPart(Core):
    """`index.contract.Identities`."""

    async def invite(self, invitation: Invitation, seconds: float) -> float:
        return await self._write(self._in_invite, invitation, seconds)

    async def _in_invite(self, db: Transaction, invitation: Invitation, seconds: float) -> float:
        if await db.one("SELECT 1 FROM identities WHERE id = ? AND expelled_at > 0", (invitation.identity,)):
            raise OperatorError(f"{invitation.identity} was expelled: names are given once, choose another")
        now = await self._in_now(db)
        over = "(expires_at < ? OR (identity = ? AND used_at IS NULL))"
        values = now - limits.TOKEN_KEPT_S, invitation.identity
        found = await db.rows(f"SELECT id FROM tokens WHERE {over}", values)
        await db.many(f"DELETE FROM tokens WHERE id = ? AND {over}", sorted((row[0], *values) for row in found))
        i = invitation
        await db.change(
            f"INSERT INTO tokens ({_TOKEN}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?, 0)",
            (i.id, i.secret, i.identity, " ".join(i.roles), i.group, i.priority, i.address, now + seconds, b"", b""),
        )
        return now + seconds

    async def find_token(self, token: str) -> Token | None:
        return await self._ask(self._find_token, token)

    async def _find_token(self, db: Reading, token: str) -> Token | None:
        row = await db.one(f"SELECT {_TOKEN} FROM tokens WHERE id = ?", (token,))
        return _token(row) if row else None

    async def count_guess(self, token: str) -> None:
        await self._write(self._in_count_guess, token)

    async def _in_count_guess(self, db: Transaction, token: str) -> Untouched[None] | None:
        counted = await db.change("UPDATE tokens SET failures = failures + 1 WHERE id = ?", (token,))
        return None if counted else Untouched(None)

    async def use_token(self, token: str, request: bytes, answer: bytes, ends_at: float) -> Token | None:
        return await self._write(self._in_use_token, token, request, answer, ends_at)

    async def _in_use_token(
        self, db: Transaction, token: str, request: bytes, answer: bytes, ends_at: float
    ) -> Token | Untouched[Token | None] | None:
        now = await self._in_now(db)
        used = await db.change(_USE, (now, request, answer, token, now, limits.TOKEN_GUESSES_MAX))
        found = await self._find_token(db, token)
        if not used or found is None:
            return Untouched(found)
        invited = found.invitation
        if not await db.change(_HOLD, (invited.identity, " ".join(invited.roles), ends_at)):
            return Untouched(None)  # expelled since it was invited
        return found

    async def note_holder(self, identity: str, roles: Sequence[str], ends_at: float) -> bool:
        return await self._write(self._in_note_holder, identity, tuple(roles), ends_at)

    async def _in_note_holder(
        self, db: Transaction, identity: str, roles: tuple[str, ...], ends_at: float
    ) -> bool | Untouched[bool]:
        return True if await db.change(_HOLD, (identity, " ".join(roles), ends_at)) else Untouched(False)

    async def expel_identity(self, identity: str) -> None:
        await self._write(self._in_expel_identity, identity)

    async def expelled_known(self) -> bool:
        return await self._ask(self._expelled_known)

    async def _expelled_known(self, db: Reading) -> bool:
        row = await db.one(
            "SELECT 1 FROM counters c JOIN counters h ON h.name = 'expelled_in' AND h.value >= c.value WHERE c.name = 'epoch'"
        )
        return row is not None

    async def take_expelled(self, identities: Sequence[str], heard_in: int = 0) -> int:
        return await self._write(self._in_take_expelled, sorted(set(identities)), heard_in)

    async def _in_take_expelled(self, db: Transaction, identities: Sequence[str], heard_in: int) -> int:
        known = {row[0] for row in await db.rows("SELECT id FROM identities WHERE expelled_at > 0")}
        fresh = [identity for identity in identities if identity not in known]
        for identity in fresh:
            await self._in_expel_identity(db, identity)
        if heard_in:
            await db.change(
                "INSERT INTO counters VALUES ('expelled_in', ?) ON CONFLICT (name) DO UPDATE SET"
                " value = greatest(counters.value, excluded.value)",
                (heard_in,),
            )
        return len(fresh)

    async def _in_expel_identity(self, db: Transaction, identity: str) -> None:
        now = await self._in_now(db)
        found = await db.rows("SELECT id FROM tokens WHERE identity = ?", (identity,))
        await db.many("DELETE FROM tokens WHERE id = ?", sorted((row[0],) for row in found))
        await db.change(
            "INSERT INTO identities (id, roles, ends_at, expelled_at) VALUES (?, '', 0, ?) ON CONFLICT (id) DO UPDATE SET"
            " expelled_at = excluded.expelled_at WHERE identities.expelled_at = 0",
            (identity, now),
        )

    async def holders(self) -> list[Holder]:
        return await self._ask(self._holders)

    async def _holders(self, db: Reading) -> list[Holder]:
        rows = await db.rows("SELECT id, roles, ends_at, expelled_at FROM identities ORDER BY id")
        return [Holder(r[0], split(r[1]), r[2], r[3]) for r in rows]

    async def tokens(self) -> list[Token]:
        return await self._ask(self._tokens)

    async def _tokens(self, db: Reading) -> list[Token]:
        return [_token(row) for row in await db.rows(f"SELECT {_TOKEN} FROM tokens ORDER BY id")]
