"""Owns the table of everything an operator can ask and order, and how a row is called by name with plain values.

The command line and the control socket call by name; programs in the same process may call the functions of the nouns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from powermail.admin import accounts, enrolment, forwards, members, messages, nodes, owners, queue, system
from powermail.admin.desk import Desk
from powermail.admin.table import Operation, Progress, Q, R, Request, unseen
from powermail.base import limits
from powermail.base.errors import OperatorError, PowerMailError, Trouble
from powermail.base.log import Event

ROWS = (
    *system.OPERATIONS,
    *messages.OPERATIONS,
    *accounts.OPERATIONS,
    *owners.OPERATIONS,
    *forwards.OPERATIONS,
    *nodes.OPERATIONS,
    *members.OPERATIONS,
    *enrolment.OPERATIONS,
    *queue.OPERATIONS,
)
TABLE: dict[str, Operation[Request, object]] = {row.name: row for row in ROWS}  # type: ignore[misc]


class Operations:
    """The table on a desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def call(self, name: str, arguments: Mapping[str, object], progress: Progress = unseen, who: str = "") -> object:
        """Runs one operation on plain values and returns plain values. Raises OperatorError, Trouble."""
        row = TABLE.get(name)
        if row is None:
            raise OperatorError(f"unknown operation {name!r}")
        try:
            request = msgspec.convert(dict(arguments), row.request)
        except msgspec.ValidationError as error:
            raise OperatorError(f"{name}: {error}") from error
        _refuse_huge(request)
        return msgspec.to_builtins(await self.run(row, request, progress, who))

    async def run(self, row: Operation[Q, R], request: Q, progress: Progress = unseen, who: str = "") -> R:
        """Runs a row. One that is not long answers in time, or says what keeps it. Raises OperatorError, Trouble.

        A change is logged with who wanted it and what came of it.
        """
        if not row.changes:
            return await self._in_time(row, request, progress)
        why: str | None = "it did not come to its end"
        try:
            result = await self._in_time(row, request, progress)
            why = None
            return result
        except PowerMailError as error:
            why = str(error)
            raise
        finally:
            self.desk.world.log.event(Event.OPERATOR, who=who or None, what=row.name, **_said(request), failed=why)

    async def _in_time(self, row: Operation[Q, R], request: Q, progress: Progress) -> R:
        if row.long:
            return await row.run(self.desk, request, progress)
        try:
            async with asyncio.timeout(limits.OPERATOR_ANSWER_S - 1.0):
                return await row.run(self.desk, request, progress)
        except TimeoutError as error:
            why = await self.desk.why_silent()
            raise Trouble(f"{row.command or row.name} did not end in time: {why}") from error


def _refuse_huge(request: Request) -> None:
    """Raises OperatorError for a number that no database holds."""
    for name, value in msgspec.structs.asdict(request).items():
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, int) and abs(each) > limits.NUMBER_MAX:
                raise OperatorError(f"{name}: a number of {len(str(abs(each)))} digits is beyond all bounds")


_UNSAID = ("password", "rows", "lines")  # secrets, and what would fill the log


def _said(request: Request) -> dict[str, str]:
    """The fields of a request as the log shows them."""
    values = msgspec.to_builtins(request)
    return {name: str(value) for name, value in values.items() if name not in _UNSAID and value not in (None, "", [])}
