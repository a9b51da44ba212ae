"""Owns the faults of a simulated cluster: of each process and machine, of the network between them, of the database server.

Those of disks are the same as on one machine. What takes data away for good happens to one node at a time and only while all is
redundant; a standby that lags behind, or an older backup of the database, takes away commits and no copies.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from powermail.base import limits
from powermail.sim import server as database
from powermail.sim.faults import JUMP_S, DiskFaults, Kind
from powermail.sim.machines import host_of
from powermail.sim.settings import COPIES

if TYPE_CHECKING:
    from powermail.sim.cluster import ClusterSimulation

Deed = Callable[[], Awaitable[bool]]
_CHANGE_S = 120.0  # how long a change of membership may take; then the operator thinks better of it
_HEAL_S = 240.0
_MARKED_S = limits.MARK_INTERVAL_S + 5.0  # by then nodes, and all processes, have heard of the work that was done


class ClusterFaults(DiskFaults[Any]):
    """Draws faults of a cluster."""

    _site: ClusterSimulation

    def __init__(self, site: ClusterSimulation, chance: random.Random, only: Sequence[str] = ()) -> None:
        super().__init__(site, chance, only)
        self._database = asyncio.Lock()  # one death of the database server at a time
        self._changes = asyncio.Lock()  # one change of membership at a time
        self._net = site.machine.net

    def _all(self) -> dict[str, Kind]:
        return super()._all() | {
            "front-killed": self._front_killed,
            "keeper-killed": self._keeper_killed,
            "node-killed": self._node_killed,
            "all-killed": self._all_killed,
            "power-cut": self._power_cut,
            "paused": self._paused,
            "cut": self._cut,
            "cut-one-way": self._cut_one_way,
            "isolated": self._isolated,
            "flapping": self._flapping,
            "resets": self._resets,
            "stall": self._stall,
            "clock-jump": self._clock_jump,
            "database-restarted": self._database_restarted,
            "database-failover": self._database_failover,
            "database-stale": self._database_stale,
            "database-put-back": self._database_put_back,
            "database-conflicts": self._database_conflicts,
            "database-slow": self._database_slow,
            "commits-lost": self._commits_lost,
            "node-joins": self._node_joins,
            "node-leaves": self._node_leaves,
            "node-expelled": self._node_expelled,
            "node-moves": self._node_moves,
        }

    # -- processes -----------------------------------------------------------------------------------------------------

    async def _restarted(self, nodes: Sequence[str]) -> None:
        await asyncio.gather(*(self._site.nodes[name].restart(self._chance.uniform(0.1, 2.0)) for name in nodes))

    async def _front_killed(self) -> None:
        await self._site.roles[self._chance.choice(self._site.plan.fronts)].restart(self._chance.uniform(0.1, 5.0))

    async def _keeper_killed(self) -> None:
        keepers = self._chance.sample(self._site.plan.keepers, self._chance.choice([1, 1, len(self._site.plan.keepers)]))
        pause_s = self._chance.choice([self._chance.uniform(0.1, 3.0), self._chance.uniform(10.0, 25.0)])
        await asyncio.gather(*(self._site.roles[host].restart(pause_s) for host in keepers))

    async def _node_killed(self) -> None:
        pause_s = self._chance.choice([self._chance.uniform(0.1, 3.0), self._chance.uniform(3.0, 25.0)])
        await self._site.nodes[self._node()].restart(pause_s)

    async def _all_killed(self) -> None:
        """Every process of the cluster ends at one instant; the database too, now and then; disks lose what was not synced."""
        cut = self._chance.random() < 0.5
        restarts = [served.restart(self._chance.uniform(0.1, 5.0), cut) for served in self._site.all() if served.lives]
        if self._chance.random() < 0.3:
            restarts.append(self._database_restarted())
        await asyncio.gather(*restarts)

    async def _power_cut(self) -> None:
        names = self._chance.sample(self._site.node_names, self._chance.choice([1, 1, 2, len(self._site.node_names)]))
        await asyncio.gather(*(self._site.nodes[name].restart(self._chance.uniform(0.5, 8.0), True) for name in names))

    async def _paused(self) -> None:
        """A process stops between two instructions and goes on much later, with what it knew before (F24)."""
        host = self._chance.choice([served.host for served in self._site.all() if served.lives] or [host_of(self._node())])
        machine = self._site.machine
        machine.pause(host)
        await asyncio.sleep(self._chance.choice([self._chance.uniform(0.5, 5.0), self._chance.uniform(5.0, 45.0)]))
        machine.go_on(host)

    # -- network and clocks --------------------------------------------------------------------------------------------

    def _hosts(self) -> list[str]:
        nodes = [host_of(name) for name in self._site.node_names]
        return [*nodes, *self._site.roles, database.HOST]

    def _length_s(self) -> float:
        return self._chance.choice([self._chance.uniform(0.5, 5.0), self._chance.uniform(5.0, 40.0)])

    def _cut_from_now(self, pairs: Sequence[tuple[str, str]], length_s: float) -> None:
        until = asyncio.get_running_loop().time() + length_s
        for pair in pairs:
            self._net.cut_until[pair] = max(until, self._net.cut_until.get(pair, 0.0))

    async def _cut(self) -> None:
        """Nothing passes between two machines."""
        one, other = self._chance.sample(self._hosts(), 2)
        length_s = self._length_s()
        self._cut_from_now([(one, other), (other, one)], length_s)
        await asyncio.sleep(length_s)

    async def _cut_one_way(self) -> None:
        """What one sends to another does not arrive; what comes back does (F18)."""
        one, other = self._chance.sample(self._hosts(), 2)
        length_s = self._length_s()
        self._cut_from_now([(one, other)], length_s)
        await asyncio.sleep(length_s)

    async def _isolated(self) -> None:
        """Some machines see each other and nobody else."""
        hosts = self._hosts()
        inside = self._chance.sample(hosts, self._chance.choice([1, 1, 2, len(hosts) // 2]))
        pairs = [pair for a in inside for b in hosts if b not in inside for pair in ((a, b), (b, a))]
        length_s = self._length_s()
        self._cut_from_now(pairs, length_s)
        await asyncio.sleep(length_s)

    async def _flapping(self) -> None:
        """The line between two machines comes and goes (F19)."""
        one, other = self._chance.sample(self._hosts(), 2)
        for _ in range(self._chance.randint(3, 12)):
            length_s = self._chance.uniform(0.05, 1.5)
            self._cut_from_now([(one, other), (other, one)], length_s)
            await asyncio.sleep(length_s + self._chance.uniform(0.05, 1.0))

    async def _resets(self) -> None:
        self._net.break_some(self._chance.choice(self._hosts()), self._chance.uniform(0.2, 1.0))

    async def _stall(self) -> None:
        until = asyncio.get_running_loop().time() + self._chance.uniform(0.5, 8.0)
        self._net.stalled_until[self._chance.choice([*self._hosts(), "fleet", "peer"])] = until

    async def _clock_jump(self) -> None:
        clock = self._site.machine.clock_of(self._chance.choice(self._hosts()))
        clock.skew_s += self._chance.uniform(-JUMP_S, JUMP_S)

    # -- the database server -------------------------------------------------------------------------------------------

    def _away_s(self) -> float:
        return self._chance.choice([self._chance.uniform(0.1, 3.0), self._chance.uniform(3.0, 25.0), 60.0])

    async def _away(self, meanwhile: Callable[[], None]) -> None:
        server = self._site.database
        server.die()
        meanwhile()
        await asyncio.sleep(self._away_s())
        await server.start()

    async def _database_restarted(self) -> None:
        """It dies, and comes back with all that was committed (F25)."""
        async with self._database:
            await self._away(lambda: None)

    async def _database_failover(self) -> None:
        """A synchronous standby takes its place: nothing is lost, the timeline is another."""
        async with self._database:
            await self._away(self._site.database.promote)

    async def _database_stale(self) -> None:
        """A standby that lagged behind takes its place: the last commits are lost (F26)."""
        await self._gone_back(self._site.database.promote)

    async def _database_put_back(self) -> None:
        """The rows are what they were at a backup; nothing but they says so (F28)."""
        await self._gone_back(self._site.database.restore, _MARKED_S)

    async def _gone_back(self, to: Callable[[str], None], unknown_s: float = 0.0) -> None:
        """`unknown_s`: a younger copy leaves no sign, or none but to who did the work that is lost (law 10)."""
        async with self._database:
            server = self._site.database
            server.copy("older")
            copied_at = asyncio.get_running_loop().time()
            after_s = self._chance.choice([self._chance.uniform(0.05, 2.0), self._chance.uniform(2.0, 30.0)])
            await asyncio.sleep(after_s + unknown_s)

            def lose() -> None:
                self._site.forget_deletions(copied_at)
                to("older")

            anew: list[Awaitable[None]] = []
            if self._chance.random() < 0.4:  # nobody is left who remembers: the nodes do
                anew = [role.restart(self._chance.uniform(0.1, 5.0)) for role in self._site.roles.values()]
            async with self._damage:  # no index that is older than a lost disk knows what it and another that is away had
                await asyncio.gather(self._away(lose), *anew)
            self._site.forgiven_until_now()

    async def _database_conflicts(self) -> None:
        """Transactions are told to run again."""
        await self._so("refuses", self._chance.uniform(0.02, 0.3), 0.0)

    async def _database_slow(self) -> None:
        """Slow, but within what a 250 waits for."""
        await self._so("slow_s", self._chance.uniform(0.005, 0.05), 0.0)

    async def _so(self, what: str, value: float, otherwise: float) -> None:
        setattr(self._site.database, what, value)
        await asyncio.sleep(self._chance.uniform(1.0, 15.0))
        setattr(self._site.database, what, otherwise)

    async def _commits_lost(self) -> None:
        """The connection breaks in COMMIT, which was done or was not."""
        for _ in range(self._chance.randint(1, 6)):
            self._site.database.loses += 1
            await asyncio.sleep(self._chance.uniform(0.0, 3.0))
        self._site.database.loses = 0

    # -- membership ----------------------------------------------------------------------------------------------------

    async def _among_cuts(self, deed: Deed) -> None:
        """A change of membership, often while some of those whom it concerns cannot hear of it (F45)."""
        async with self._damage, self._changes:
            cut = self._chance.choice([self._isolated, self._cut_one_way, self._cut, None])
            beside = asyncio.ensure_future(cut()) if cut is not None else None
            await asyncio.sleep(self._chance.uniform(0.0, 2.0))
            await deed()
            if beside is not None:
                await beside

    async def _until(self, done: Deed, within_s: float) -> bool:
        """Asks again until it has worked."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while loop.time() < until:
            if await done():
                return True
            await asyncio.sleep(1.0)
        return False

    async def _is_member(self, node: str) -> bool | None:
        found = await self._site.operation("node_list")
        return any(each["id"] == node for each in found) if isinstance(found, list) else None

    async def _node_joins(self) -> None:
        """A machine more: the spare one, or one that left before, with an empty disk."""
        site = self._site
        candidates = [name for name in site.plan.nodes if name not in site.node_names]
        if candidates:
            node = self._chance.choice(candidates)
            await self._among_cuts(lambda: self._join(node))

    async def _join(self, node: str) -> bool:
        site = self._site
        served = site.nodes[node]
        if not served.lives:
            await served.start()
        plan = site.plan

        async def said() -> bool:
            asked = await site.operation("node_address", node=node, address=plan.address(node), group=plan.nodes[node])
            return asked is not None or bool(await self._is_member(node))

        if await self._until(said, _CHANGE_S):
            site.node_names.append(node)
            await asyncio.sleep(5.0)
            await self.obey(node)  # its disk was a member before: it is emptied
        return True

    def _spares(self) -> list[str]:
        """Nodes without which there are still more groups than copies are required."""
        site = self._site
        groups = {node: {site.plan.nodes[name] for name in site.node_names if name != node} for node in site.node_names}
        return [node for node, left in groups.items() if len(left) > COPIES]

    async def _node_leaves(self) -> None:
        """A node is emptied and taken out; once in a while the operator thinks better of it."""
        if self._spares() and await self._site.healed(_HEAL_S) and (found := self._spares()):
            node = self._chance.choice(found)
            await self._among_cuts(lambda: self._leave(node))

    async def _leave(self, node: str) -> bool:
        site = self._site
        for _ in range(30):
            if await site.operation("node_remove", node=node, confirm=True) is not None:
                break
            await asyncio.sleep(1.0)
        if self._chance.random() < 0.2:
            await asyncio.sleep(self._chance.uniform(0.0, 5.0))
            await site.operation("node_unblock", node=[node])

        async def out() -> bool:
            return await self._is_member(node) is False

        if await self._until(out, _CHANGE_S):
            await self._gone(node)
        else:
            await site.operation("node_unblock", node=[node])
            if not await self._is_member(node):
                await self._gone(node)
        return True

    async def _gone(self, node: str) -> None:
        """It is no member any more; its machine goes on for a while, and now and then somebody starts it again."""
        site = self._site
        if node in site.node_names:
            site.node_names.remove(node)
        await asyncio.sleep(self._chance.uniform(0.0, 10.0))
        if site.nodes[node].lives:
            site.nodes[node].kill()
        if self._chance.random() < 0.5:
            await site.nodes[node].start()

    async def _node_expelled(self) -> None:
        """A machine is lost for good, and the operator says so."""
        if self._spares() and await self._site.healed(_HEAL_S) and (found := self._spares()):
            node = self._chance.choice(found)
            await self._among_cuts(lambda: self._expel(node))

    async def _expel(self, node: str) -> bool:
        site = self._site
        async with site.nodes[node].turn:
            site.nodes[node].kill()

            async def said() -> bool:
                found = await site.operation("node_expel", node=node, confirm=True)
                return await self._is_member(node) is False if found is None else bool(found["expelled"])

            done = await self._until(said, _CHANGE_S)
        if done:
            await self._gone(node)
        else:
            await site.nodes[node].start()
        await site.healed(_HEAL_S)
        return True

    async def _node_moves(self) -> None:
        """A node is of another group from now on."""
        site = self._site
        if not await site.healed(_HEAL_S):
            return
        node = self._node()
        groups = sorted({group for name, group in site.plan.nodes.items() if name != node})
        await self._among_cuts(lambda: self._move(node, self._chance.choice(groups)))

    async def _move(self, node: str, group: str) -> bool:
        site = self._site
        site.moving[node] = None
        for _ in range(20):
            if await site.operation("node_move", node=node, group=group, confirm=True) is not None:
                break
            await asyncio.sleep(1.0)
        await site.healed(_HEAL_S)
        now = next((each["group"] for each in await self._nodes() if each["id"] == node), "")
        site.plan.nodes[node] = now or site.plan.nodes[node]
        return True
