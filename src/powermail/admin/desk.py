"""Owns the desk: the parts of a process that operations work on. Their rows are in `admin.operations`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from powermail.base import limits
from powermail.base.errors import IndexTrouble, NoSuch, OperatorError, Trouble
from powermail.mail.address import AddressError, parse_canonical

if TYPE_CHECKING:
    from powermail.base.settings import Settings
    from powermail.base.tasks import Worker
    from powermail.base.tls import PeerCertificate
    from powermail.base.world import World
    from powermail.cluster.cluster import Cluster
    from powermail.directory.contract import Account, Writable
    from powermail.directory.resolve import Resolver
    from powermail.index.contract import Index
    from powermail.keeper.admission import Admission
    from powermail.keeper.expelling import Expeller
    from powermail.keeper.following import LayoutFollower
    from powermail.keeper.forget import Forgetter
    from powermail.keeper.leases import Leases
    from powermail.keeper.owners import Owners
    from powermail.keeper.purges import Purges
    from powermail.keeper.repair import Repairer
    from powermail.keeper.salvage import Salvager
    from powermail.keeper.scrub import Scrubber
    from powermail.message.opener import Opener
    from powermail.storage.contract import StorageNode

T = TypeVar("T")


@dataclass
class Desk:
    """What the operator's operations reach."""

    world: World
    settings: Settings
    data: str
    cluster: Cluster
    following: LayoutFollower
    index: Index
    directory: Writable
    owners: Owners
    purges: Purges
    resolver: Resolver
    opener: Opener
    repairer: Repairer
    scrubber: Scrubber
    forgetter: Forgetter
    admission: Admission
    workers: list[Worker]
    connections: Callable[[], dict[str, int]]
    hash_password: Callable[[str], Awaitable[str]]
    certificate_ends: Callable[[], float | None]  # UTC; None without one
    serving: bool  # doors are open: not an installation opened for one call
    unmounted: Callable[[str], Awaitable[str]]  # why a node's place looks like a mount point without its disk
    reload: Callable[[], Awaitable[tuple[list[str], list[str]]]] | None = None  # (what changed, what needs a restart)
    copy_databases: Callable[[str], Awaitable[None]] | None = None  # into a directory, one consistent set
    outbound_troubles: Callable[[], list[str]] = list  # why mail does not leave
    peer_certificate: PeerCertificate | None = None  # of this installation in its cluster
    expeller: Expeller | None = None
    salvager: Salvager | None = None
    open_disk: Callable[[str], Awaitable[StorageNode]] | None = None  # a node's directory that is no member; to be closed
    leases: Leases | None = None  # where several processes keep one index
    parts: tuple[str, ...] = ()  # those of this machine that ought to show themselves

    async def account(self, address: str) -> Account:
        """The row of an address. Raises OperatorError if it is none, NoSuch if there is no row."""
        try:
            canonical = parse_canonical(address)
        except AddressError as error:
            raise OperatorError(f"{address!r} is not an address: {error}") from error
        account = await self.directory.find(canonical)
        if account is None:
            raise NoSuch(f"no account {canonical}")
        return account

    def nodes(self, names: Sequence[str]) -> list[StorageNode]:
        """The nodes of these names. Raises NoSuch that names those there are."""
        for name in names:
            if name not in self.cluster.nodes:
                raise NoSuch(f"no node {name!r}; there are {', '.join(self.cluster.nodes)}")
        return [self.cluster.nodes[name] for name in names]

    async def owners_of_mail(self) -> list[tuple[str, int, int, str]]:
        """(account id, messages, octets, address or "") of all who have mail, in order of id."""
        found: list[tuple[str, int, int, str]] = []
        after = ""
        while page := await self.index.accounts(after, 500):
            after = page[-1][0]
            names = await self.directory.ids([row[0] for row in page])
            found += [(account, messages, octets, names.get(account, "")) for account, messages, octets in page]
        return found

    async def why_silent(self) -> str:
        """What keeps an operation waiting: each part is asked for a moment."""

        async def silent(what: str, call: Awaitable[object]) -> str:
            try:
                async with asyncio.timeout(limits.OPERATOR_LOOK_S):
                    await call
            except TimeoutError:
                return f"{what} (locked, or its disk hangs)"
            except Trouble as error:
                return str(error)
            return ""

        found = await asyncio.gather(
            silent("the index does not answer", self.index.totals()),
            silent("the index takes no changes", self.index.note_owners({})),
            silent("the directory does not answer", self.directory.ids([])),
        )
        said = [text for text in found if text]
        said += [f"node {name} is {node.state.value}: {node.stat().reason}" for name, node in self.cluster.nodes.items()
                 if node.stat().reason]  # fmt: skip
        return "; ".join(said) or "it is at work"


async def bounded(call: Awaitable[T], what: str) -> T:
    """Awaits a look for at most the time that an answer of `status` may take. Raises IndexTrouble."""
    try:
        async with asyncio.timeout(limits.OPERATOR_INDEX_S):
            return await call
    except TimeoutError as error:
        raise IndexTrouble(f"{what} did not answer within {limits.OPERATOR_INDEX_S:g} s") from error
