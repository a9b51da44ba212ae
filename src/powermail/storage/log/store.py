"""Owns a node's directory, opened: puts the log's rooms together and says which lane may use which.

`writer`, `compaction.compact` and what changes the store belong to the writing lane; `reader`, `scanner` and
`compaction.looking` to the reading lane. Figures (`facts`, octets, counts) may be asked from anywhere.

Before this opening's boot record is durable (law 12) nothing is written: on a disk that is full or read-only the store is
open for reading, `unready` or `full` says why, and `resume` tries again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from powermail.base import limits
from powermail.base.disk import Disk, Lock
from powermail.base.errors import NodeReadOnly, OperatorError
from powermail.storage.contract import START, NodeFacts, Position, Scan, Unread
from powermail.storage.identity import FORMAT, Identity, read_identity, write_identity
from powermail.storage.log import record as rec
from powermail.storage.log.compaction import Compaction
from powermail.storage.log.damage import Damage
from powermail.storage.log.keys import BROKEN, KeyIndex, MemoryKeyIndex
from powermail.storage.log.ledger import Ledger
from powermail.storage.log.reader import Reader
from powermail.storage.log.recovery import Recovered, Recovery, StaleKeyIndex, admit
from powermail.storage.log.scan import Again, Scanner
from powermail.storage.log.segments import OPEN_MAX_DEFAULT, Segments
from powermail.storage.log.write import FULL_ERRORS, Operation, Outcome, Writer

_READ_ONLY_ERRORS: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EBADF})


class Options(NamedTuple):
    """How a store behaves."""

    segment_octets: int = limits.SEGMENT_OCTETS_DEFAULT
    reserve_octets: int = limits.NODE_RESERVE_OCTETS_DEFAULT
    open_segments: int = OPEN_MAX_DEFAULT


class SegmentStore:
    """A node's directory, opened."""

    def __init__(
        self,
        disk: Disk,
        path: str,
        identity: Identity,
        lock: Lock,
        make_keys: Callable[[str, bytes], KeyIndex],
        options: Options,
        monotonic: Callable[[], float],
    ) -> None:
        self.identity = identity
        self.recovery = Recovered()
        self.makeshift = ""  # why the key index is kept in memory, if it had to be
        self.spoilt = False  # the key index turned out to be broken: it is made again at the next opening
        self._disk = disk
        self._path = path
        self._lock = lock
        self._make_keys = make_keys
        codec = rec.Codec(bytes.fromhex(identity.salt))
        self._segments = Segments(disk, path, codec, self._version, options.open_segments)
        self._ledger, self._recovery = self._recover()
        ledger = self._ledger
        self.writer = Writer(
            disk, path, ledger, self._segments, codec, lambda: self.identity, options.segment_octets, monotonic
        )
        self.reader = Reader(ledger, self._segments, identity.node)
        self.scanner = Scanner(ledger, self._segments, lambda: self.identity.incarnation, monotonic)
        self.compaction = Compaction(ledger, self._segments, self.writer, monotonic)
        self.opened_with = (0, 0)  # (free, total) octets then
        self._opening = ""  # the id of this opening

    @classmethod
    def open(
        cls,
        disk: Disk,
        path: str,
        cluster: str,
        node: str,
        make_keys: Callable[[str, bytes], KeyIndex],
        options: Options,
        monotonic: Callable[[], float],
        boot: bytes = bytes(8),
    ) -> SegmentStore:
        """Locks, checks and recovers a store, and writes its boot record. Raises OperatorError with the reason it is
        refused, or OSError. `boot` names this opening, 8 octets that were never used before.
        """
        identity = read_identity(disk, path, cluster, node)
        try:
            lock = disk.lock(f"{path}/lock")
        except BlockingIOError as error:
            raise OperatorError(f"node {node}: another process serves {path}") from error
        try:
            store = cls(disk, path, identity, lock, make_keys, options, monotonic)
        except BaseException:
            lock.release()
            raise
        store._opening = boot.hex()
        store._begin()
        try:
            store.opened_with = store.free_octets(), store.total_octets()
        except BaseException:
            store.close()
            raise
        return store

    def _version(self, number: int) -> int:
        return rec.SEGMENT_FORMAT if self.identity.format >= FORMAT and number >= self.identity.since else 1

    # -- opening ----------------------------------------------------------------------------------------------------

    def _recover(self) -> tuple[Ledger, Recovery]:
        """Opens the key index and reads the log; an index that is of no use is made again, in memory if it must be."""
        for attempt in range(3):
            there = self._disk.exists(f"{self._path}/keys.db")
            keys = self._open_keys(attempt)
            if keys is None:
                continue
            ledger = Ledger(keys, Damage(self._disk, self._path))
            self.recovery = Recovered(rebuilt=attempt > 0 or (keys.lasts() and not there))
            recovery = Recovery(ledger, self._segments, self.recovery)
            try:
                recovery.run()
            except (*BROKEN, StaleKeyIndex) as error:
                self.makeshift = f"{error}"
                _close(keys)
                continue
            except BaseException:
                _close(keys)
                raise
            if attempt < 2:
                self.makeshift = ""
            return ledger, recovery
        raise AssertionError("a key index in memory does not fail")

    def _open_keys(self, attempt: int) -> KeyIndex | None:
        path = f"{self._path}/keys.db"
        try:
            if attempt == 2:
                return MemoryKeyIndex()
            if attempt == 1 or not self._disk.exists(path):
                self._throw_keys_away()  # a write-ahead log without its file must not be taken for one either
            return self._make_keys(path, bytes.fromhex(self.identity.store))
        except (*BROKEN, OSError, ValueError, TypeError) as error:
            self.makeshift = f"{error}"
            return None

    def _throw_keys_away(self) -> None:
        for suffix in ("-wal", "-shm", ""):
            if self._disk.exists(f"{self._path}/keys.db{suffix}"):
                self._disk.unlink(f"{self._path}/keys.db{suffix}")

    def _begin(self) -> None:
        """Makes durable what was found, and this opening's boot record; before that no commit is taken (laws 1, 12)."""
        ledger = self._ledger
        try:
            self._recovery.make_durable(self.writer)
            if self.identity.format < FORMAT:
                since = max([0, *ledger.sizes]) + 1
                self._identify(msgspec.structs.replace(self.identity, format=FORMAT, since=since))
                self.writer.seal()
            # law 12: also where it began, so that an older disk is known however far it has grown
            boots = (*ledger.boots, rec.Boot(self._opening, ledger.durable))[-limits.BOOTS_MAX :]
            self.writer.append([rec.Record(rec.BOOT, 0, 0, rec.NO_KEY, rec.pack_boots(boots))])
        except OSError as error:
            ledger.unready = f"{error.strerror or error}"
            if error.errno in FULL_ERRORS:
                ledger.full = f"full: {ledger.unready}"
            elif error.errno in _READ_ONLY_ERRORS:
                ledger.failed = ""  # nothing was promised in this opening: it may be tried again
            else:
                ledger.failed = ledger.failed or f"failed: {ledger.unready}"
            return
        ledger.boot, ledger.unready = self._opening, ""

    def _identify(self, identity: Identity) -> None:
        write_identity(self._disk, self._path, identity)
        self.identity = identity
        self.writer.renamed()

    def resume(self) -> None:
        """The disk has room again, or can be written to: the log goes on. A failed fsync stays (P18). Raises OSError."""
        if self._ledger.failed:
            return
        if not self._ledger.boot:
            self._segments.close()  # some may be open for reading only
        self.writer.resume()
        if not self._ledger.boot:
            self._begin()

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def boot(self) -> str:
        """This opening's id; "" until its record is durable."""
        return self._ledger.boot

    @property
    def failed(self) -> str:
        """Why nothing is written any more."""
        return self._ledger.failed

    @property
    def full(self) -> str:
        """Why no new mail is written until there is room."""
        return self._ledger.full

    @property
    def unready(self) -> str:
        """Why the boot record could not be written."""
        return self._ledger.unready

    def fail(self, reason: str) -> None:
        """Nothing more is written."""
        self._ledger.failed = self._ledger.failed or reason

    def facts(self) -> NodeFacts:
        """What it knows of itself since it was opened."""
        ledger, found = self._ledger, self.recovery
        return NodeFacts(
            self.identity.incarnation,
            ledger.durable,
            tuple([boot.id for boot in ledger.boots]),
            tuple([boot.began for boot in ledger.boots]),
            self.identity.birth,
            bool(found.damaged or found.incomplete or found.rebuilt),
            ledger.mark,
        )

    def abandon(self) -> None:
        """Closes what the death of a process would close, and writes nothing."""
        self._ledger.keys.close()
        self._segments.close()

    def log_octets(self) -> int:
        """Octets of the log that hold records."""
        return self._ledger.log_octets()

    def live_octets(self) -> int:
        """Octets of records that still count."""
        return self._ledger.live_octets()

    def segment_count(self) -> int:
        """How many segments."""
        return len(self._ledger.sizes)

    def messages(self) -> int:
        """How many live messages."""
        return self._ledger.keys.count()

    def damaged(self) -> int:
        """How many stretches of the log are noted as damaged."""
        return self._ledger.damage.count()

    # -- the writing lane -------------------------------------------------------------------------------------------

    def write(self, operations: Sequence[Operation], writable: bool = True) -> list[Outcome]:
        """Makes a batch durable; see `write.Writer.write`."""
        return self.writer.write(operations, writable)

    def due(self) -> bool:
        """True if `settle` has something worth doing."""
        return self._ledger.keys.due()

    def settle(self, everything: bool = False) -> bool:
        """Lets the key index catch up a little. True if more waits. Raises OSError, or one of `BROKEN`."""
        return self.writer.settle(everything)

    def free_octets(self) -> int:
        """Room for new mail: free on the file system and in the current segment. Raises OSError."""
        return self._disk.free_octets(self._path) + max(0, self._ledger.capacity - self._ledger.end)

    def total_octets(self) -> int:
        """Size of the file system. Raises OSError."""
        return self._disk.total_octets(self._path)

    def probe(self) -> tuple[int, int]:
        """A real write and fsync beside the log; (free, total) octets. Raises OSError."""
        self.writer.present()
        file = self._disk.open(f"{self._path}/probe", create=True)
        try:
            file.write(0, [b"powermail probe\n"])
            file.sync()
        finally:
            file.close()
        self._ledger.damage.save()
        return self.free_octets(), self.total_octets()

    def rebirth(self, incarnation: str) -> Position:
        """A new incarnation and a birth mark at the end of the log (law 12). Raises NodeReadOnly or OSError."""
        if self._ledger.failed or not self._ledger.boot:
            raise NodeReadOnly(self._ledger.failed or self._ledger.unready)
        self.settle()
        birth = self._ledger.durable
        body = rec.pack_position(birth) + bytes.fromhex(incarnation)
        self.writer.append([rec.Record(rec.BIRTH, 0, 0, rec.NO_KEY, body)])
        self._identify(msgspec.structs.replace(self.identity, incarnation=incarnation, birth=birth))
        return birth

    def lift_birth(self) -> None:
        """No birth mark any more (law 12). Raises NodeReadOnly or OSError."""
        if self._ledger.failed or not self._ledger.boot:
            raise NodeReadOnly(self._ledger.failed or self._ledger.unready)
        if self.identity.birth != START:
            self._identify(msgspec.structs.replace(self.identity, birth=START))

    def admit(self, unread: Unread, again: Again) -> None:
        """Makes known what a stretch holds that could not be read before (law 6)."""
        ledger = self._ledger
        version = self._version(unread.position.segment)
        ledger.accept(admit(ledger, again.records, version))
        (segment, start), end = unread.position, unread.position.offset + unread.octets
        if start <= rec.SEGMENT_HEADER_OCTETS and unread.octets:
            start = 0  # a note of a whole segment
        ledger.damage.heal(segment, start, end - start, again.bad)
        if again.end and unread.position.segment != ledger.number:
            ledger.sizes[unread.position.segment] = again.end

    def reread(self, unread: Unread) -> Scan | None:
        """Tries a stretch again, without lanes; see the contract."""
        again = self.scanner.look_again(unread)
        if again is None:
            return None
        self.admit(unread, again)
        return self.scanner.shown_again(unread, again)

    def close(self) -> None:
        """Settles, closes and unlocks. Raises OSError when the directory is gone: nothing was lost but time."""
        ledger = self._ledger
        try:
            if not ledger.failed:
                self.settle(everything=True)
                ledger.damage.save()
        except BROKEN:
            self.spoilt = True
        finally:
            _close(ledger.keys)
            try:
                if self.spoilt:
                    self._throw_keys_away()
            finally:
                self._segments.close()
                self._lock.release()


def _close(keys: KeyIndex) -> None:
    try:
        keys.close()
    except BROKEN:
        pass  # it is of no use any more
