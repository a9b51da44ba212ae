"""Owns what became of recipients until the index knows it: nothing that a hop has said is forgotten while the process lives.

Every call here may fail and is repeated: the index does the same thing once, however often it is asked. Rows that are settled
within a moment are finished in one transaction. Only a crash between a hop's 250 and the index's commit sends once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import Trouble
from powermail.base.log import Event
from powermail.base.settings import OutboundSettings
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.index.contract import Attempt, Index, QueueRow
from powermail.mail.dsn import Action, Report, asks
from powermail.outbound.bounce import Bouncer
from powermail.outbound.verdict import Ruling, Verdict

Judged = tuple[QueueRow, Verdict]
_TELL_TRIES = 4  # notices that cannot be stored are tried so often before the row waits for its next turn


class Settler:
    """Writes down what became of rows."""

    def __init__(
        self, world: World, index: Index, owner: str, bouncer: Bouncer, settings: OutboundSettings, tasks: Tasks
    ) -> None:
        """`owner` has leased the rows: of those that somebody else has by now, nothing is written."""
        self._world = world
        self._index = index
        self._owner = owner
        self._bouncer = bouncer
        self._settings = settings
        self._tasks = tasks
        self._finished: list[tuple[list[QueueRow], asyncio.Future[None]]] = []
        self._finishing = False
        self.under_way: dict[asyncio.Task[object] | None, None] = {}  # tasks whose rows' outcome is known here only
        self.trouble = ""  # why the index does not take it, while it does not

    async def settle(
        self,
        rows: Sequence[QueueRow],
        verdicts: Sequence[Verdict],
        attempt: Attempt,
        notices: bool,
        wait_s: float | None = None,
    ) -> None:
        """Every row gets its outcome. `attempt` is who was spoken to, and when; `notices`: that hop tells senders of success
        itself, where they asked; `wait_s`: until the next attempt, if not the usual pause.
        """
        task = asyncio.current_task()
        self.under_way[task] = None
        try:
            await self._settle(rows, verdicts, attempt, notices, wait_s)
        finally:
            self.under_way.pop(task, None)

    async def _settle(
        self,
        rows: Sequence[QueueRow],
        verdicts: Sequence[Verdict],
        attempt: Attempt,
        notices: bool,
        wait_s: float | None,
    ) -> None:
        found: dict[Ruling, list[Judged]] = {ruling: [] for ruling in Ruling}
        for row, verdict in zip(rows, verdicts, strict=True):
            found[verdict.ruling].append((row, verdict))
        if found[Ruling.SENT]:
            await self._sent(found[Ruling.SENT], attempt, notices)
        if found[Ruling.LATER]:
            await self._later(found[Ruling.LATER], attempt, wait_s)
        if found[Ruling.REFUSED]:
            await self._refused(found[Ruling.REFUSED], attempt)

    # -- sent -----------------------------------------------------------------------------------------------------

    async def _sent(self, found: list[Judged], attempt: Attempt, notices: bool) -> None:
        world = self._world
        world.counters.add("outbound.sent", len(found))
        for row, verdict in found:
            self._log(Event.SENT, row, attempt, verdict.text)
        await self.finish([row for row, _ in found])
        wanted = [pair for pair in found if not notices and asks(pair[0].notify, Action.RELAYED)]
        if wanted:  # RFC 3461 §5.2.2: the hop will not say it
            await self._tell(wanted, Action.RELAYED, attempt)

    async def finish(self, rows: list[QueueRow]) -> None:
        """Takes rows out of the queue, however long that takes; those that come together go together."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._finished.append((rows, done))
        if not self._finishing:
            self._finishing = True
            self._tasks.start(self._finish_all(), "finish")
        await done

    async def _finish_all(self) -> None:
        batch: list[tuple[list[QueueRow], asyncio.Future[None]]] = []
        try:
            while self._finished:
                await asyncio.sleep(limits.QUEUE_GATHER_S)  # a transaction costs the same for one row and for many
                batch, self._finished = self._finished, []
                together = [row for rows, _ in batch for row in rows]
                await self._until(lambda: self._index.finish(together, self._owner))  # noqa: B023  called before it changes
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)
        finally:
            self._finishing = False
            for _, done in batch:
                done.cancel()  # who was served is not touched by it

    async def _until(self, work: Callable[[], Awaitable[None]]) -> None:
        """Repeats what the index did not take, more and more slowly."""
        pause_s = 0.5
        while True:
            try:
                await work()
                self.trouble = ""
                return
            except Trouble as error:
                text = f"{type(error).__name__}: {error}"
                if text != self.trouble:
                    self._world.log.event(Event.TROUBLE, worker="outbound", error=text)
                self.trouble = text
            pause_s = min(limits.WORKER_PAUSE_MAX_S, pause_s * 2)
            await asyncio.sleep(pause_s)

    # -- later ----------------------------------------------------------------------------------------------------

    async def _later(self, found: list[Judged], attempt: Attempt, wait_s: float | None) -> None:
        """Another time, or never if that is over."""
        over: list[Judged] = []
        alive: list[Judged] = []
        for pair in found:
            (over if attempt.at - pair[0].created_at >= self._settings.lifetime_s else alive).append(pair)
        by_text: dict[str, list[QueueRow]] = {}
        for row, verdict in alive:
            self._world.counters.add("outbound.deferred")
            self._log(Event.DEFERRED, row, attempt, verdict.text)
            by_text.setdefault(verdict.text, []).append(row)
        await self._tell_delay(alive, attempt)
        for text, rows in by_text.items():
            await self.defer(rows, attempt._replace(status=text), wait_s)
        if over:
            await self._refused([(row, _expired(verdict)) for row, verdict in over], attempt, expired=True)

    async def defer(self, rows: list[QueueRow], attempt: Attempt, wait_s: float | None = None) -> None:
        """The next attempt, after a pause that doubles, or `wait_s`; the last when the lifetime is over."""
        uniform = self._world.entropy.uniform
        due = []
        for row in rows:
            pause_s = self._settings.retry_first_s * 2 ** min(row.attempts, 20) if wait_s is None else wait_s
            at = attempt.at + min(limits.QUEUE_RETRY_MAX_S, pause_s) * uniform(0.8, 1.2)
            end = row.created_at + self._settings.lifetime_s
            due.append(min(at, end) if end > attempt.at else at)
        await self._until(lambda: self._index.defer(rows, due, attempt, self._owner))

    async def give_back(self, rows: list[QueueRow], wait_s: float) -> None:
        """Another time; this was no attempt."""
        due = self._world.clock.now() + wait_s * self._world.entropy.uniform(0.8, 1.2)
        await self._until(lambda: self._index.give_back(rows, due, self._owner))

    async def _tell_delay(self, found: list[Judged], attempt: Attempt) -> None:
        """Who asked for it hears once that the message waits. A notice that cannot be stored is tried at the next attempt."""
        after_s = self._settings.delay_notice_s
        if not after_s:
            return
        wanted = [
            pair
            for pair in found
            if not pair[0].delay_told and attempt.at - pair[0].created_at >= after_s and asks(pair[0].notify, Action.DELAYED)
        ]
        if wanted and await self._tell(wanted, Action.DELAYED, attempt, tries=1):
            for row, _ in wanted:
                row.delay_told = True

    # -- refused --------------------------------------------------------------------------------------------------

    async def _refused(self, found: list[Judged], attempt: Attempt, expired: bool = False) -> None:
        """The rows go when the notice is safe. If it cannot be stored for a while, they wait, and the hop is asked again."""
        wanted = [pair for pair in found if asks(pair[0].notify, Action.FAILED)]
        if wanted and not await self._tell(wanted, Action.FAILED, attempt, expired=expired):
            for row, verdict in found:
                text = f"the notice could not be stored: {verdict.text}"
                self._log(Event.DEFERRED, row, attempt, text)
                await self.defer([row], attempt._replace(status=text))
            return
        self._world.counters.add("outbound.bounced", len(found))
        for row, verdict in found:
            self._log(Event.BOUNCED, row, attempt, verdict.text)
        await self.finish([row for row, _ in found])

    async def _tell(
        self,
        found: list[Judged],
        action: Action,
        attempt: Attempt,
        tries: int = _TELL_TRIES,
        expired: bool = False,
    ) -> bool:
        """One notice for all of one sender; True if it is safe, or if there is nobody to tell."""
        row = found[0][0]
        if not row.envelope.reverse_path:
            return True
        reports = [self._report(row, verdict, action, attempt, expired) for row, verdict in found]
        for number in range(tries):
            if number:
                await asyncio.sleep(2.0**number)
            try:
                if await self._bouncer.tell(row.key, row.envelope, row.created_at, reports):
                    return True
            except Trouble as error:
                self._world.log.event(Event.TROUBLE, worker="outbound", key=row.key, error=str(error))
        return False

    def _report(self, row: QueueRow, verdict: Verdict, action: Action, attempt: Attempt, expired: bool) -> Report:
        kind = "smtp" if verdict.reply and not expired else "X-PowerMail"
        unsaid = {Action.FAILED: "5.0.0", Action.DELAYED: "4.4.1"}.get(action)
        enhanced = "2.0.0" if unsaid is None else verdict.enhanced or unsaid
        until = utc(row.created_at + self._settings.lifetime_s) if action is Action.DELAYED else None
        remote = attempt.host.rpartition(":")[0]
        return Report(row.recipient, row.orcpt, action, enhanced, f"{kind}; {verdict.text}", remote, until)

    def _log(self, event: Event, row: QueueRow, attempt: Attempt, text: str) -> None:
        self._world.log.event(
            event,
            key=row.key,
            recipient=row.destination,
            sender=f"<{row.envelope.reverse_path}>",
            host=attempt.host or None,
            tls=attempt.tls or None,
            reply=text,
            took=attempt.seconds,
            delay=attempt.at - row.created_at,
            attempt=row.attempts + 1,
        )


def _expired(verdict: Verdict) -> Verdict:
    return verdict._replace(enhanced="4.4.7", text=f"not delivered in time: {verdict.text}")
