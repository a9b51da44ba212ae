"""Owns what an operator can ask and order: each operation is a method that takes and returns plain JSON values.

The command line calls them on a running server through the control socket, or on an installation that is not running.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

from powermail.base import limits
from powermail.base.errors import IndexTrouble, MessageUnreadable, NodeTrouble, OperatorError
from powermail.base.tasks import Worker
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.directory import password as pw
from powermail.directory.contract import Account, Writable
from powermail.directory.resolve import Resolver
from powermail.index.contract import EntryFacts, Index
from powermail.keeper.admission import Admission
from powermail.keeper.checkpoint import write_purged
from powermail.keeper.forget import Forgetter
from powermail.keeper.repair import Repairer
from powermail.keeper.scrub import Scrubber
from powermail.mail.address import AddressError, parse_canonical
from powermail.message.opener import Opener
from powermail.storage.contract import Held, NodeState

Progress = Callable[[int, int], Awaitable[None]]
_PAGE = 1000


async def _unseen(done: int, total: int) -> None:
    """Nobody looks."""


class Operations:
    """The operator's verbs. Names are `noun_verb`; the control socket lets through exactly those in `NAMES`."""

    NAMES = (
        "status", "list_messages", "usage", "dir", "orphans", "purge", "where", "whatif", "verify",
        "account_add", "account_import", "account_set", "account_delete", "account_list", "account_show",
        "node_list", "node_block", "node_scrub", "node_replace", "node_confirm", "node_expel",
        "queue_list", "queue_show", "queue_set", "queue_delete",
    )  # fmt: skip

    def __init__(
        self,
        world: World,
        cluster: Cluster,
        index: Index,
        directory: Writable,
        resolver: Resolver,
        opener: Opener,
        repairer: Repairer,
        scrubber: Scrubber,
        forgetter: Forgetter,
        admission: Admission,
        workers: list[Worker],
        connections: Callable[[], dict[str, int]],
        hash_password: Callable[[str], Awaitable[str]],
    ) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._directory = directory
        self._resolver = resolver
        self._opener = opener
        self._repairer = repairer
        self._scrubber = scrubber
        self._forgetter = forgetter
        self._admission = admission
        self._workers = workers
        self._connections = connections
        self._hash = hash_password
        self._progress: Progress = _unseen

    async def call(self, name: str, arguments: dict[str, Any], progress: Progress) -> Any:
        """Runs one operation. Raises OperatorError, Trouble."""
        if name not in self.NAMES:
            raise OperatorError(f"unknown operation {name!r}")
        mine = copy.copy(self)  # several may run at once, each with its own meter
        mine._progress = progress
        try:
            return await getattr(mine, name)(**arguments)
        except TypeError as error:
            raise OperatorError(f"{name}: {error}") from error

    # -- what is there --------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """Nodes, redundancy, queue, workers, counters."""
        counted = self._repairer.counted_groups()
        thin = await self._index.under_copied_total(counted, self._cluster.copies_required)
        nodes = await self.node_list()
        totals = await self._index.totals()
        degraded = []
        if not self._cluster.takes_mail():
            degraded.append("mail is not accepted: too few groups are writable")
        degraded += [f"node {node['id']} is {node['state']}" for node in nodes if node["state"] != "read-write"]
        troubles = {name: self._cluster.trouble(name) for name in self._cluster.nodes}
        degraded += [
            f"node {node['id']}: {troubles[node['id']]}"
            for node in nodes
            if node["state"] == "read-write" and troubles[node["id"]]
        ]
        if thin[0]:
            degraded.append(f"{thin[0]} messages are not redundant")
        if self._index.catching_up:
            degraded.append("the index is catching up with the nodes")
        degraded += [f"node {n}: {c} copies wait to be dropped: `node confirm {n}`" for n, c in self._admission.held.items()]
        degraded += self._forgetter.alarms
        degraded += [f"worker {worker.name}: {worker.trouble}" for worker in self._workers if worker.trouble]
        eta = round(self._repairer.left / self._repairer.rate, 1) if self._repairer.rate else None
        return {
            "degraded": degraded,
            "copies_required": self._cluster.copies_required,
            "takes_mail": self._cluster.takes_mail(),
            "not_redundant": {"messages": thin[0], "octets": thin[1], "seconds_left": eta},
            "nodes": nodes,
            "totals": totals,
            "epoch": self._index.epoch,
            "connections": self._connections(),
            "workers": [worker.describe() for worker in self._workers],
            "counters": self._world.counters.snapshot(),
        }

    async def node_list(self) -> list[dict[str, Any]]:
        """Every node with its figures."""
        rows = []
        for node in self._cluster.nodes.values():
            stat = node.stat()
            rows.append(
                {
                    "id": node.id,
                    "group": node.group,
                    "priority": node.priority,
                    "state": stat.state,
                    "slow": self._cluster.is_slow(node.id),
                    "reason": stat.reason or self._cluster.trouble(node.id),
                    "messages": stat.messages,
                    "log_octets": stat.log_octets,
                    "live_octets": stat.live_octets,
                    "segments": stat.segments,
                    "free_octets": stat.free_octets,
                    "total_octets": stat.total_octets,
                    "damaged": stat.damaged,
                    "probe_ms": round(stat.probe_s * 1000, 2),
                    "owed": sum(await self._index.orders_total(node.id)),
                }
            )
        return rows

    async def _account(self, address: str) -> Account:
        try:
            canonical = parse_canonical(address)
        except AddressError as error:
            raise OperatorError(f"{address!r} is not an address: {error}") from error
        account = await self._directory.find(canonical)
        if account is None:
            raise OperatorError(f"no account {canonical}")
        return account

    async def _entries(self, account: str) -> list[EntryFacts]:
        facts = await self._index.find_mailbox(account, "INBOX")
        if facts is None:
            return []
        found: list[EntryFacts] = []
        after = 0
        while page := await self._index.entries(facts.id, after, facts.uid_next, limits.INDEX_PAGE_ROWS):
            found += page
            after = page[-1].uid
        return found

    async def list_messages(self, address: str) -> dict[str, Any]:
        """Each message of an address with its nodes and groups, and whether it is redundant."""
        account = await self._account(address)
        groups = self._cluster.groups()
        readable = {node.id for node in self._cluster.readable()}
        messages = []
        entries = await self._entries(account.id)
        for start in range(0, len(entries), 500):
            part = entries[start : start + 500]
            known = {m.key: m for m in await self._index.messages([entry.key for entry in part])}
            for entry in part:
                nodes = known[entry.key].nodes if entry.key in known else ()
                distinct = {groups[name] for name in nodes if name in groups}
                messages.append(
                    {
                        "uid": entry.uid,
                        "key": entry.key.hex(),
                        "octets": entry.octets,
                        "received_at": entry.received_at,
                        "nodes": list(nodes),
                        "groups": sorted(distinct),
                        "redundant": len(distinct) >= self._cluster.copies_required,
                        "readable": any(name in readable for name in nodes),
                    }
                )
        thin = sum(not message["redundant"] for message in messages)
        return {"address": account.address, "messages": messages, "not_redundant": thin}

    async def usage(self, address: str) -> dict[str, Any]:
        """Octets used and allowed."""
        account = await self._account(address)
        return {
            "address": account.address,
            "octets": await self._index.usage(account.id),
            "quota_octets": account.quota_octets,
        }

    async def _all_owners(self) -> list[tuple[str, int, int, str]]:
        found: list[tuple[str, int, int, str]] = []
        after = ""
        while page := await self._index.accounts(after, 500):
            after = page[-1][0]
            names = await self._directory.ids([row[0] for row in page])
            found += [(account, messages, octets, names.get(account, "")) for account, messages, octets in page]
        return found

    async def dir(self) -> list[dict[str, Any]]:
        """Every account that has mail."""
        return [
            {"account": a, "address": name or None, "messages": m, "octets": o} for a, m, o, name in await self._all_owners()
        ]

    async def orphans(self) -> list[dict[str, Any]]:
        """Mail of accounts that the directory no longer knows. Nothing is deleted because of that (P9)."""
        return [row for row in await self.dir() if row["address"] is None]

    async def purge(self, account: str, confirm: bool) -> dict[str, Any]:
        """Deletes all mail of an address or of an orphaned account id. Without `confirm` only says what it would do."""
        owner = account
        if "@" in account:
            owner = (await self._account(account)).id
        rows = [row for row in await self._all_owners() if row[0] == owner]
        if not rows:
            return {"account": owner, "messages": 0, "purged": False}
        if not confirm:
            return {"account": owner, "messages": rows[0][1], "octets": rows[0][2], "purged": False}
        if rows[0][3]:  # it goes on receiving: its mail is expunged like any
            return {"account": owner, "messages": await self._expunge_all(owner), "purged": True}
        await write_purged(self._world, self._cluster, self._index, owner)  # law 13: durable before a row goes
        await self._index.note_purged(owner)
        done = await self._index.purge(owner)
        return {"account": owner, "messages": done.removed, "purged": True}

    async def _expunge_all(self, account: str) -> int:
        """Expunges all mail of an account that goes on."""
        removed, after = 0, 0
        while page := await self._index.mailboxes(after, _PAGE):
            after = page[-1].id
            for facts in page:
                while facts.account == account and (
                    entries := await self._index.entries(facts.id, 0, facts.uid_next, limits.INDEX_PAGE_ROWS)
                ):
                    removed += (await self._index.expunge(facts.id, [entry.uid for entry in entries])).removed
        return removed

    async def where(self, key: str) -> dict[str, Any]:
        """Everything about one message: copies, recipients, checks."""
        try:
            octets = bytes.fromhex(key)
        except ValueError:
            octets = b""
        if len(octets) != 16:
            raise OperatorError(f"{key!r} is not a message key (32 hex digits)")
        known = await self._index.message(octets)
        copies = {}
        for node in self._cluster.readable():
            if (await node.has([octets]))[0] is Held.LIVE:
                try:
                    await node.verify(octets)
                    copies[node.id] = "good"
                except Exception as error:  # noqa: BLE001  each copy's trouble is the answer
                    copies[node.id] = f"bad: {error}"
        recipients = []
        try:
            message = await self._opener.open(octets)
            recipients = [target.recipient or target.account for target in message.commit.targets]
        except (MessageUnreadable, IndexTrouble):
            pass
        return {
            "key": key,
            "known": known is not None,
            "octets": known.octets if known else None,
            "sha256": known.sha256.hex() if known else None,
            "references": known.references if known else 0,
            "believed": list(known.nodes) if known else [],
            "copies": copies,
            "recipients": recipients,
        }

    async def whatif(self, nodes: list[str]) -> dict[str, Any]:
        """What is unreadable, or not redundant, if these nodes are lost now."""
        for name in nodes:
            self._cluster.node(name)
        left = {name: group for name, group in self._cluster.groups().items() if name not in nodes}
        away = {node.id for node in self._cluster.nodes.values()} - {node.id for node in self._cluster.readable()}
        left = {name: group for name, group in left.items() if name not in away}
        lost = await self._index.under_copied_total(left, 1)
        thin = await self._index.under_copied_total(left, self._cluster.copies_required)
        return {
            "nodes": nodes,
            "already_away": sorted(away),
            "unreadable": {"messages": lost[0], "octets": lost[1]},
            "not_redundant": {"messages": thin[0], "octets": thin[1]},
            "takes_mail": len(set(left.values())) >= self._cluster.copies_required,
        }

    async def verify(self) -> dict[str, Any]:
        """The consistency check: recounts the index, reads and checks every copy, compares belief with the nodes."""
        problems = await self._index.audit()
        totals = await self._index.totals()
        groups = self._cluster.groups()
        checked, after = 0, b""
        silent: dict[str, None] = {}  # nodes that did not answer: their copies are not asked for one by one
        everything = {name: f"{group}/{name}" for name, group in groups.items()}
        while page := await self._index.under_copied(everything, 1 << 20, after, _PAGE):
            after = page[-1].key
            for message in page:
                good = set()
                for name in message.nodes:
                    node = self._cluster.nodes.get(name)
                    if node is None or name in silent or node.state in (NodeState.MISSING, NodeState.OPENING):
                        continue
                    try:
                        await node.verify(message.key)
                        good.add(groups[name])
                    except NodeTrouble as error:
                        silent[name] = None
                        problems.append(f"node {name} does not answer, its copies were not checked: {error}")
                    except Exception as error:  # noqa: BLE001  each is a finding
                        problems.append(f"message {message.key.hex()} on node {name}: {error}")
                if len(good) < self._cluster.copies_required:
                    problems.append(f"message {message.key.hex()}: {len(good)} good copies in different groups")
            checked += len(page)
            await self._progress(checked, totals["messages"])
        return {"messages": checked, "problems": problems}

    # -- accounts ---------------------------------------------------------------------------------------------------

    async def account_add(
        self, address: str, password: str, quota_octets: int, forward: list[str], keep_copy: bool
    ) -> dict[str, Any]:
        """Makes a mailbox or a forward."""
        stored = await self._hash(password) if password and not password.startswith("{") else password
        await self._directory.add([Account("", address, stored, quota_octets, tuple(forward), keep_copy)])
        self._resolver.directory.clear()
        return await self.account_show(address)

    async def account_import(self, rows: list[dict[str, Any]]) -> int:
        """Adds many rows in one transaction; passwords are stored as given."""
        accounts = [
            Account(
                "",
                row["address"],
                row.get("password", ""),
                row.get("quota_octets", 0),
                tuple(row.get("forward", ())),
                row.get("keep_copy", False),
            )
            for row in rows
        ]
        count = await self._directory.add(accounts)
        self._resolver.directory.clear()
        return count

    async def account_set(self, address: str, **changes: Any) -> dict[str, Any]:
        """Changes some columns: password, quota_octets, forward, keep_copy, enabled, send_per_hour."""
        account = await self._account(address)
        allowed = {"password", "quota_octets", "forward", "keep_copy", "enabled", "send_per_hour"}
        unknown = set(changes) - allowed
        if unknown:
            raise OperatorError(f"unknown column {sorted(unknown)[0]!r}")
        password = changes.get("password", "")
        if password and not password.startswith("{"):
            changes["password"] = await self._hash(password)
        if "forward" in changes:
            changes["forward"] = tuple(changes["forward"])
        await self._directory.update(account._replace(**changes))
        self._resolver.directory.clear()
        return await self.account_show(address)

    async def account_delete(self, address: str) -> dict[str, Any]:
        """Removes the row; the mail stays as an orphan until it is purged."""
        account = await self._account(address)
        await self._directory.remove(account.address)
        self._resolver.directory.clear()
        octets = await self._index.usage(account.id)
        return {"address": account.address, "account": account.id, "octets_left": octets}

    async def account_list(self, after: str, limit: int) -> list[dict[str, Any]]:
        """Rows in order of address."""
        return [_show(account) for account in await self._directory.all(after, min(limit, 10_000))]

    async def account_show(self, address: str) -> dict[str, Any]:
        """One row, without its password."""
        return _show(await self._account(address))

    # -- nodes ------------------------------------------------------------------------------------------------------

    async def node_block(self, node: str, blocked: bool) -> dict[str, Any]:
        """Stops or allows new mail on a node; it is remembered over restarts."""
        target = self._cluster.node(node)
        await self._index.set_node_flags(node, blocked, None)
        target.block(blocked)
        return {"id": node, "state": target.state.value}

    async def node_scrub(self, node: str) -> dict[str, Any]:
        """Reads and checks every copy of a node now."""
        target = self._cluster.node(node)
        total = target.stat().messages
        after, checked, bad = b"", 0, 0
        while True:
            before = self._scrubber.checked
            after, found = await self._scrubber.check(target, after, 200)
            bad += found
            checked += self._scrubber.checked - before
            await self._progress(checked, total)
            if not after:
                return {"id": node, "checked": checked, "bad": bad}

    async def node_replace(self, node: str) -> dict[str, Any]:
        """Makes an empty directory (a new disk) this node's store; repair fills it."""
        target = self._cluster.node(node)
        if target.state not in (NodeState.MISSING, NodeState.OPENING):
            raise OperatorError(f"node {node} is {target.state.value}: only a node whose disk is gone can be replaced")
        await target.initialise()
        await self._cluster.watch(target)
        return {"id": node, "state": target.state.value}

    async def node_confirm(self, node: str) -> dict[str, Any]:
        """Confirms a held mass deletion on a node (P9)."""
        self._cluster.node(node)
        return {"id": node, "confirmed": self._admission.confirm(node)}

    async def node_expel(self, node: str, confirm: bool) -> dict[str, Any]:
        """Ends the membership of a node that will not come back: what it owes is forgotten, its disk never rejoins (law 9)."""
        rows = {row.id: row for row in await self._index.node_rows()}
        if node not in rows:
            raise OperatorError(f"no node {node!r} is a member")
        if node in self._cluster.nodes and self._cluster.nodes[node].state not in (NodeState.MISSING, NodeState.OPENING):
            raise OperatorError(f"node {node} is here; only a node whose disk is gone, or that left the settings, is expelled")
        left = {name: group for name, group in self._cluster.groups().items() if name != node}
        lost = await self._index.under_copied_total(left, 1)
        thin = await self._index.under_copied_total(left, self._cluster.copies_required)
        risk = {"id": node, "unreadable": lost[0], "not_redundant": thin[0], "missing_since": rows[node].missing_since}
        if not confirm:
            return {**risk, "expelled": False}
        await self._index.expel(node)
        return {**risk, "expelled": True}

    # -- queue ------------------------------------------------------------------------------------------------------

    async def queue_list(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Rows of the queue."""
        return [_show_row(row) for row in await self._index.queue_rows(after, min(limit, 10_000))]

    async def queue_show(self, number: int) -> dict[str, Any]:
        """One row."""
        row = await self._index.queue_row(number)
        if row is None:
            raise OperatorError(f"no queue row {number}")
        return _show_row(row)

    async def queue_set(self, numbers: list[int], held: bool | None, due: bool) -> dict[str, int]:
        """Holds, releases or retries rows; an empty list means all."""
        due_at = self._world.clock.now() if due else None
        if held is None and due_at is None:
            raise OperatorError("nothing to change")
        return {"rows": await self._index.queue_set(numbers, held, due_at)}

    async def queue_delete(self, numbers: list[int]) -> dict[str, int]:
        """Deletes rows without a bounce."""
        rows = [row for number in numbers if (row := await self._index.queue_row(number)) is not None]
        await self._index.finish(rows)
        return {"rows": len(rows)}


def _show(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "address": account.address,
        "kind": "forward" if account.forward and not account.keep_copy else "mailbox",
        "forward": list(account.forward),
        "keep_copy": account.keep_copy,
        "quota_octets": account.quota_octets,
        "enabled": account.enabled,
        "send_per_hour": account.send_per_hour,
        "password": pw.split_scheme(account.password)[0] if account.password else "none",
    }


def _show_row(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "key": row.key.hex(),
        "to": row.destination,
        "from": row.reverse_path,
        "octets": row.octets,
        "created_at": row.created_at,
        "due_at": row.due_at,
        "attempts": row.attempts,
        "held": row.held,
        "last_status": row.last_status,
    }
