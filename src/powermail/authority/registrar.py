"""Owns who gets which certificate: a token's holder once, a member again and again, who was expelled never.

What a request asks for is not looked at but for its key: names, roles and life are the token's, or those of the certificate by
which the connection was made. Issuing the same to the same request again costs nothing and harms nothing, so an answer that
was lost is given again. Whoever does not know a secret hears the same words, whatever is wrong.

Danger: a secret is compared in constant time, and never logged.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

import msgspec

from powermail.base.certificates import Authority, BadRequest, facts_of
from powermail.base.errors import OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.net import parse_host_port
from powermail.base.settings import is_site
from powermail.base.world import World
from powermail.directory.limiter import FailureLimiter
from powermail.index.contract import Index
from powermail.index.sharing import Token
from powermail.storage.layout import LayoutChange, Standing
from powermail.wire import enrolment as forms
from powermail.wire.node_identity import Name, NotOurs, peer_of, uri_of
from powermail.wire.node_verbs import Role

_ASK_INDEX = {Role.FRONT.value, Role.KEEPER.value, Role.AUTHORITY.value}
_NOBODY = hashlib.sha256(b"the secret of no token").digest()


def _is_address(text: str) -> bool:
    try:
        return bool(parse_host_port(text)[0])
    except OperatorError:
        return False


class Registrar:
    """Answers questions for certificates."""

    def __init__(
        self, world: World, index: Index, authority: Authority, settings: Mapping[str, str], files: Mapping[str, bytes]
    ) -> None:
        """What front ends and keepers are told when they join: `settings`, as TOML values by name; front ends `files` too, by
        name in the data directory. Neither is kept with the token.
        """
        self._world = world
        self._index = index
        self._authority = authority
        self._settings = dict(settings)
        self._files = dict(files)
        self._limiter = FailureLimiter(world.clock)

    async def answer(self, ask: forms.Ask, names: Sequence[Name], client: str) -> forms.Answer:
        """The answer to a question of who has shown these names (none: no certificate)."""
        try:
            if isinstance(ask, forms.Join):
                return await self._join(ask, client)
            return await self._renew(ask, names, client)
        except BadRequest as error:
            return self._refuse(client, "request", str(error))
        except (Trouble, OperatorError) as error:  # the machine asks again; what it was told nothing of is no use to it
            return self._refuse(client, "trouble", f"not now: {error}")

    def _refuse(self, client: str, why: str, text: str, identity: str = "") -> forms.Refused:
        self._world.counters.add(f"authority.refused.{why}")
        self._world.log.event(
            Event.CONNECTION_REFUSED, door="enrolment", client=client, peer=identity or None, why=why, reason=text
        )
        return forms.Refused(why, text)

    # -- tokens ----------------------------------------------------------------------------------------------------

    async def _join(self, ask: forms.Join, client: str) -> forms.Answer:
        if self._limiter.refused(client):
            return self._refuse(client, "guessing", "too many wrong tokens came from this address: wait a minute")
        token = await self._index.find_token(ask.token)
        given = hashlib.sha256(ask.secret).digest()
        right = hmac.compare_digest(token.invitation.secret if token is not None else _NOBODY, given)
        if token is None or not right:
            self._limiter.failed(client, f"token {ask.token}")
            await self._index.count_guess(ask.token)
            return self._refuse(client, "token", "there is no such token: make a new one with `node add` or `cluster admit`")
        request = hashlib.sha256(ask.request).digest()
        if token.used_at is None:
            if not is_site(ask.site):
                return self._refuse(client, "site", "the name of a site is a word", token.invitation.identity)
            if Role.NODE.value in token.invitation.roles and not _is_address(token.invitation.address or ask.address):
                text = "say where the other machines reach this node: `powermail join TOKEN --address HOST:PORT`"
                return self._refuse(client, "address", text, token.invitation.identity)
            issued, ends_at = self._issue(token, ask)
            used = await self._index.use_token(token.invitation.id, request, forms.pack(issued), ends_at)
            if used is None:
                return self._refuse(client, "expelled", f"{token.invitation.identity} was expelled", token.invitation.identity)
            token = used
        return await self._settled(token, request, client)

    def _issue(self, token: Token, ask: forms.Join) -> tuple[forms.Issued, float]:
        invited, cluster = token.invitation, self._index.cluster
        uris = [uri_of(Name(cluster, Role(role), invited.identity)) for role in invited.roles]
        certificate = self._authority.issue(ask.request, invited.identity, uris, self._world.clock.now())
        address = invited.address or ask.address
        issued = forms.Issued(
            certificate, cluster, invited.identity, invited.roles, invited.group, invited.priority, address, site=ask.site
        )
        return issued, facts_of(certificate).ends_at

    async def _settled(self, token: Token, request: bytes, client: str) -> forms.Answer:
        """A token as it stands now that this request wanted to use it."""
        invited = token.invitation
        if token.used_at is None:
            text = "it was guessed at too often" if token.expires_at > self._world.clock.now() else "its time is over"
            return self._refuse(
                client, "ended", f"this token is worth nothing any more: {text}; make a new one", invited.identity
            )
        if not hmac.compare_digest(token.request, request):
            return self._refuse(
                client, "used", "this token was used already, by another machine or another key", invited.identity
            )
        if await self._is_expelled(invited.identity):
            return self._refuse(client, "expelled", f"{invited.identity} was expelled", invited.identity)
        issued = forms.unpack_answer(token.answer)
        assert isinstance(issued, forms.Issued)
        if Role.NODE.value in invited.roles:
            await self._enter(issued)
        if _ASK_INDEX & {*invited.roles}:
            files = self._files if {Role.FRONT.value, Role.AUTHORITY.value} & {*invited.roles} else {}
            issued = msgspec.structs.replace(issued, settings=self._settings, files=files)
        self._world.counters.add("authority.joined")
        self._world.log.event(
            Event.JOINED, client=client, identity=invited.identity, roles=" ".join(invited.roles), token=invited.id
        )
        return issued

    async def _enter(self, issued: forms.Issued) -> None:
        """A new node enters the layout. One that was ever there is where it was put since, whatever an old answer says; but one
        that no other machine could reach has an address now.
        """
        known = next((row for row in (await self._index.layout()).rows if row.id == issued.identity), None)
        if known is None:
            node = LayoutChange(issued.identity, issued.group, issued.address, issued.site or None, issued.priority)
        elif known.state is Standing.EXPELLED or known.address:
            return
        else:
            node = LayoutChange(issued.identity, address=issued.address, site=issued.site or None)
        await self._index.change_layout([node])

    async def _is_expelled(self, identity: str) -> bool:
        return any(holder.identity == identity and holder.expelled_at for holder in await self._index.holders())

    async def name(self, request: bytes, names: Sequence[Name], identity: str) -> bytes:
        """The next certificate of the machine that the authority's key lies on, with these names: nobody else is asked who has
        it. Raises Trouble, OperatorError, BadRequest.
        """
        certificate = self._authority.issue(request, identity, [uri_of(name) for name in names], self._world.clock.now())
        roles = sorted({name.role.value for name in names if name.id == identity})
        if not await self._index.note_holder(identity, roles, facts_of(certificate).ends_at):
            raise OperatorError(f"{identity} was expelled")
        return certificate

    # -- renewing --------------------------------------------------------------------------------------------------

    async def _renew(self, ask: forms.Renew, names: Sequence[Name], client: str) -> forms.Answer:
        """Who shows a certificate that is good gets the next, with the same names but those of who was expelled since, and the
        roles that a newer token took away.
        """
        cluster = self._index.cluster
        try:
            peer = peer_of(names, cluster)
        except NotOurs as error:
            return self._refuse(client, error.why, str(error))
        holders = {holder.identity: holder for holder in await self._index.holders()}
        expelled = {holder.identity for holder in holders.values() if holder.expelled_at}
        if peer.id in expelled:
            return self._refuse(client, "expelled", f"{peer.id} was expelled", peer.id)
        given = holders[peer.id].roles if peer.id in holders else [role.value for role in peer.roles]
        left = [name for name in names if name.cluster == cluster and name.id not in expelled]
        left = [name for name in left if name.id != peer.id or name.role.value in given]
        roles = sorted({name.role.value for name in left if name.id == peer.id})
        if not roles:
            return self._refuse(client, "roles", f"{peer.id} is {' and '.join(given)} by now, and not that any more", peer.id)
        uris = [uri_of(name) for name in left]
        certificate = self._authority.issue(ask.request, peer.id, uris, self._world.clock.now())
        if not await self._index.note_holder(peer.id, roles, facts_of(certificate).ends_at):
            return self._refuse(client, "expelled", f"{peer.id} was expelled", peer.id)
        self._world.counters.add("authority.renewed")
        return forms.Issued(certificate, cluster, peer.id, tuple(roles))
