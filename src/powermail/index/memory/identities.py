"""Owns tokens, who has a certificate, and who was expelled, in memory."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.index.memory.transaction import Transactions, Undo
from powermail.index.sharing import Holder, Invitation, Token


class IdentityPart(Transactions):
    """`index.contract.Identities` in memory."""

    async def invite(self, invitation: Invitation, seconds: float) -> float:
        def inviting() -> float:
            s, now, identity = self.state, self.now(), invitation.identity
            if identity in s.holders and s.holders[identity].expelled_at:
                raise OperatorError(f"{identity} was expelled: names are given once, choose another")
            for name, token in list(s.tokens.items()):
                unused = token.invitation.identity == identity and token.used_at is None
                if unused or token.expires_at < now - limits.TOKEN_KEPT_S:
                    del s.tokens[name]
            s.tokens[invitation.id] = Token(invitation, now + seconds)
            return now + seconds

        return self.transact(inviting)

    async def find_token(self, token: str) -> Token | None:
        return self.state.tokens.get(token)

    async def count_guess(self, token: str) -> None:
        def counting() -> None:
            found = self.state.tokens.get(token)
            if found is None:
                raise Undo(None)
            self.state.tokens[token] = found._replace(failures=found.failures + 1)

        self.transact(counting)

    async def use_token(self, token: str, request: bytes, answer: bytes, ends_at: float) -> Token | None:
        def using() -> Token | None:
            found, now = self.state.tokens.get(token), self.now()
            if found is None or found.used_at is not None or found.expires_at <= now:
                raise Undo(found)
            if found.failures >= limits.TOKEN_GUESSES_MAX:
                raise Undo(found)
            if not self._hold(found.invitation.identity, found.invitation.roles, ends_at):
                raise Undo(None)
            used = self.state.tokens[token] = found._replace(used_at=now, request=request, answer=answer)
            return used

        return self.transact(using)

    def _hold(self, identity: str, roles: Sequence[str], ends_at: float) -> bool:
        known = self.state.holders.get(identity)
        if known is not None and known.expelled_at:
            return False
        self.state.holders[identity] = Holder(identity, tuple(roles), ends_at)
        return True

    async def note_holder(self, identity: str, roles: Sequence[str], ends_at: float) -> bool:
        def noting() -> bool:
            if not self._hold(identity, roles, ends_at):
                raise Undo(False)
            return True

        return self.transact(noting)

    async def expel_identity(self, identity: str) -> None:
        self.transact(lambda: self._expel(identity))

    def _expel(self, identity: str) -> None:
        s = self.state
        for name in [name for name, token in s.tokens.items() if token.invitation.identity == identity]:
            del s.tokens[name]
        known = s.holders.get(identity, Holder(identity, (), 0.0))
        s.holders[identity] = known._replace(expelled_at=known.expelled_at or self.now())

    async def expelled_known(self) -> bool:
        return self.state.expelled_in >= self.state.epoch

    async def take_expelled(self, identities: Sequence[str], heard_in: int = 0) -> int:
        def taking() -> int:
            s = self.state
            fresh = [name for name in sorted(set(identities)) if name not in s.holders or not s.holders[name].expelled_at]
            for identity in fresh:
                self._expel(identity)
            s.expelled_in = max(s.expelled_in, heard_in)
            return len(fresh)

        return self.transact(taking)

    async def holders(self) -> list[Holder]:
        return [holder for _, holder in sorted(self.state.holders.items())]

    async def tokens(self) -> list[Token]:
        return [token for _, token in sorted(self.state.tokens.items())]
