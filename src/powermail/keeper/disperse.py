"""Owns dispersal: messages that lie in fewer sites than they could are brought into another one.

So lies what came while sites were cut from each other, or before nodes said where they stand. It is redundant, so nothing is
urgent: a copy is made elsewhere as repair makes one, and one of those that stand together is let go of as rebalancing does (law
6). A keeper that dies between the two leaves one copy too many, and no harm.
"""

from __future__ import annotations

from collections import Counter

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Index, MessageFacts
from powermail.keeper.belief import end_of
from powermail.keeper.repair import Repairer
from powermail.storage.contract import Position, Receipt

DISPERSE = "disperse"


def wanted_sites(cluster: Cluster) -> int:
    """In how many sites a message could lie now: as many as take mail, and no more than it has copies."""
    taking = {cluster.site_of(node.id) for node in cluster.admitted() if cluster.is_writable(node)}
    return min(len(taking), cluster.copies_required)


def sites_of_copies(cluster: Cluster) -> dict[str, str]:
    """Node to site of those whose copies count: what lies on one that is away for now lies in its site."""
    return {name: cluster.site_of(name) for name in cluster.counted()}


class Disperser:
    """Goes through messages in too few sites by key; what cannot be helped is passed, and tried again in the next turn."""

    def __init__(self, world: World, cluster: Cluster, index: Index, repairer: Repairer) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._repairer = repairer
        self._after = b""

    async def step(self) -> float:
        """Disperses one batch. Raises IndexTrouble."""
        cluster, index = self._cluster, self._index
        wanted = wanted_sites(cluster)
        if not cluster.apart or wanted < 2 or index.catching_up or not index.numbering:
            self._after = b""
            return limits.MOVE_IDLE_S
        found = await index.under_copied(sites_of_copies(cluster), wanted, self._after, limits.REBALANCE_BATCH)
        if not found:
            self._after = b""
            return limits.MOVE_IDLE_S
        counted, takers = cluster.counted(), await self._repairer.takers()
        moved = 0
        for message in found:
            self._after = message.key
            groups = {counted[name] for name in message.nodes if name in counted}
            if len(groups) < cluster.copies_required:
                continue  # repair is at it
            moved += await self._disperse(message, counted, takers)
        return 0.0 if moved else limits.MOVE_LOOK_S

    async def _disperse(self, message: MessageFacts, counted: dict[str, str], takers: frozenset[str]) -> bool:
        """Makes a copy in a site that has none, and lets go of one where there are several."""
        site = self._cluster.site_of
        have = {site(name) for name in message.nodes if name in counted}
        why = await self._repairer.mend(message, counted, frozenset(name for name in takers if site(name) not in have))
        if why:
            return False
        self._world.counters.add("keeper.dispersed")
        for now in await self._index.messages([message.key]):
            await self._let_one_go(now)
        return True

    async def _let_one_go(self, message: MessageFacts) -> None:
        """Of copies beyond the required ones, one that stands with another in its site, when all were found to be good."""
        there, site = self._cluster.counted_there(), self._cluster.site_of
        good: dict[str, tuple[Receipt, Position]] = {}  # and where that log ended before (law 8)
        for name in message.nodes:
            node = self._cluster.nodes.get(name)
            if node is None or name not in there:
                continue
            try:
                before = await end_of(node)
                good[name] = Receipt(name, before.incarnation, await node.verify(message.key)), before.position
            except (CopyMissing, CopyDamaged, NodeTrouble) as error:  # scrub and repair find what is bad
                self._world.log.event(Event.TROUBLE, worker=DISPERSE, key=message.key, node=name, error=str(error))
        sites = Counter(site(name) for name in good)
        beside = [name for name in good if sites[site(name)] > 1]
        if not beside or len({there[name] for name in good}) <= self._cluster.copies_required:
            return
        fullest = max(beside, key=lambda name: self._cluster.nodes[name].stat().live_octets)
        groups = {name: there[name] for name in good}  # what is only believed keeps nothing from being needed
        copy, end = good[fullest]
        await self._index.let_go(message.key, copy, end, groups, self._cluster.copies_required)
