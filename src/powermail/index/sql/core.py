"""Owns what the parts of the index stand on, whatever the engine: how a body is run, and what a process knows of the whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.base.world import World
from powermail.index.sql.engine import Reading, Slot, Transaction, Untouched
from powermail.mail.envelope import Commit
from powermail.storage.contract import Mark

T = TypeVar("T")
Change = Callable[..., Coroutine[Any, Any, "T | Untouched[T]"]]  # of a Transaction and arguments
Look = Callable[..., Coroutine[Any, Any, T]]  # of a Reading and arguments
STARTS_BEHIND = limits.EPOCH_JUMP // limits.UNCLEAN_JUMP // 2  # unclean starts that use up half of a mailbox's numbers
LEFT_OUT = 2  # `stopped` of a slot that is in no mark any more
NO_NODES = 0  # the placement of what nobody is believed to hold


class Core(ABC):
    """What all parts stand on. Methods whose names begin with `_in_` run inside a transaction."""

    alone: bool  # nobody else writes, nor ever did but by starting anew

    def __init__(self, world: World) -> None:
        self._world = world
        self._why_lost = ""  # this process met the proof itself: until a new epoch, nothing is numbered or listed
        self._forgot: tuple[int, bytes] = (0, b"")  # (round, key) up to which this pass of forgetting has looked
        self.numbered = 0  # by this process, of all mailboxes
        self.unsettled = False
        self.catching_up = False
        self.numbering = True
        self.cluster = ""

    # -- running -------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def _write(self, call: Change[T], *args: Any) -> T:
        """Runs `call(transaction, *args)` in one transaction. Raises IndexTrouble."""

    @abstractmethod
    async def _ask(self, call: Look[T], *args: Any) -> T:
        """Runs `call(reading, *args)`, which reads by one statement. Raises IndexTrouble."""

    @abstractmethod
    async def _read(self, call: Look[T], *args: Any) -> T:
        """Runs `call(reading, *args)` in one snapshot. Raises IndexTrouble."""

    @abstractmethod
    async def _show(self, call: Look[T], *args: Any) -> T:
        """The same for what readers see. Raises IndexTrouble while it might be short (P7)."""

    @abstractmethod
    async def _show_one(self, call: Look[T], *args: Any) -> T:
        """The same by one statement."""

    @abstractmethod
    async def _in_now(self, db: Reading) -> float:
        """UTC by the one clock of all who share the index: leases are taken, kept and lost by it."""

    @abstractmethod
    async def _aside(self, call: Callable[..., T], *args: Any) -> T:
        """Runs what only computes, and long, off the event loop."""

    @abstractmethod
    async def _in_enter_found(self, db: Transaction, node: str, found: Sequence[tuple[bytes, Commit]]) -> int:
        """Enters messages whose keys were claimed, believed to lie on `node`; how many are live."""

    async def _in_claim(self, db: Transaction, keys: Sequence[bytes]) -> set[bytes]:
        """Law 3: rows of these are inserted as live; those that nobody had decided before. Where nobody else writes, nothing
        is: what has no row stays without one until it is entered.
        """
        return set()

    @abstractmethod
    async def _in_hold_boxes(self, db: Transaction, entering: Sequence[tuple[bytes, Commit]], dying: Sequence[bytes]) -> None:
        """Where others write too: the mailboxes that messages are entered in, and those that show what dies, are locked in one
        order, and queue rows of the dying behind them. The keys are locked.
        """

    @abstractmethod
    async def _in_find_by_key(self, db: Transaction) -> None:
        """From now on the entries of a key are found without a look at all of them; until `_in_find_by_key_no_more`."""

    @abstractmethod
    async def _in_find_by_key_no_more(self, db: Transaction) -> None:
        """Only walks ask by key, and no node owes one any more."""

    @abstractmethod
    async def _in_stop_silent(self, db: Transaction) -> None:
        """Writer slots that were not used for so long that their processes have died are noted as stopped."""

    @abstractmethod
    async def _in_epoch_raised(self, db: Transaction) -> None:
        """A new epoch begins in this transaction: what proved the loss, if the database itself did, is as it should be now."""

    # -- what a process knows --------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def connection(self) -> int:
        """As the contract says."""

    @abstractmethod
    def _mine(self) -> tuple[int, tuple[Slot, ...]]:
        """The epoch and this process's writer slots, as its last transactions left them."""

    @abstractmethod
    def mark(self) -> Mark:
        """As the contract says."""

    @abstractmethod
    async def merge(self, mailbox: int) -> bool:
        """As the contract says."""

    def _lose(self, why: str, epoch: int) -> None:
        """This process met the proof itself, in that epoch (law 10)."""
        self._why_lost = why

    def settled(self) -> None:
        """Listings are complete again."""
        self.unsettled = False

    def _complete(self) -> None:
        """Raises IndexTrouble while a listing might be short (P7)."""
        self._check_found()
        if self.catching_up or self.unsettled:
            raise IndexTrouble("the index is catching up with the storage nodes")

    def _check_found(self) -> None:
        """Raises IndexLost if this process itself met the proof of a loss: what it did before may be lost."""
        if self._why_lost:
            raise IndexLost(self._why_lost)

    async def _in_may_number(self, db: Transaction) -> None:
        """Raises IndexTrouble while no number may be given (law 11)."""
        self._check_found()
        if await db.counter("waiting"):
            raise IndexTrouble("commits were lost: no numbers before the new epoch has begun")

    async def _in_set(self, db: Transaction, name: str, value: int) -> None:
        """Sets a counter; copies in memory follow at the commit."""
        await db.change("UPDATE counters SET value = ? WHERE name = ?", (value, name))
        db.stale = True
