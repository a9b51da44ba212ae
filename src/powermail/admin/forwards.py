"""Owns what an operator does with forwards: rows of the directory with destinations. A mailbox is never lost by it unsaid."""

from __future__ import annotations

from typing import Annotated

from powermail.admin import accounts
from powermail.admin.accounts import AccountAdd, AccountFacts, AccountSet, Addresses, facts
from powermail.admin.desk import Desk
from powermail.admin.table import Operation, Progress, Request, option, several, word, words
from powermail.base.errors import OperatorError


class ForwardAdd(Request):
    """A new forward."""

    address: Annotated[str, word("whose mail goes on")]
    destination: Annotated[list[str], words("where to")]
    keep_copy: Annotated[bool, option("keep the mail here too")] = False


async def add(desk: Desk, request: ForwardAdd, progress: Progress) -> AccountFacts:
    """Makes a forward."""
    return await accounts.add(desk, AccountAdd(request.address, forward=request.destination, keep_copy=request.keep_copy))


class ForwardSet(Request):
    """Other destinations."""

    address: Annotated[str, word("whose mail goes on")]
    destination: Annotated[list[str], words("where to, from now on")]
    keep_copy: Annotated[bool, option("keep the mail here too")] = False
    yes: Annotated[bool, option("also if a mailbox becomes a forward by it")] = False


async def change(desk: Desk, request: ForwardSet, progress: Progress) -> AccountFacts:
    """Changes the destinations; that a mailbox stops keeping mail is said, and needs a yes."""
    account = await desk.account(request.address)
    if account.hosted and not request.keep_copy and not request.yes:
        octets = await desk.index.usage(account.id)
        raise OperatorError(
            f"{account.address} is a mailbox with {octets} octets of mail: without --keep-copy it would keep no new mail, and "
            "who logs in there would see nothing; add --keep-copy, or --yes to make it a mere forward. Nothing was changed"
        )
    return await accounts.change(desk, AccountSet(account.address, forward=request.destination, keep_copy=request.keep_copy))


async def delete(desk: Desk, request: Addresses, progress: Progress) -> list[AccountFacts]:
    """Ends forwards: a mere forward's row goes, a mailbox keeps its mail and only stops sending it on. All or none."""
    rows = [await desk.account(address) for address in several(request.address)]
    for row in rows:
        if not row.forward:
            raise OperatorError(
                f"{row.address} is a mailbox, not a forward; `powermail account delete {row.address}` removes a mailbox. "
                "Nothing was changed"
            )
    for row in rows:
        if row.hosted:
            await accounts.change(desk, AccountSet(row.address, forward=[], keep_copy=False))
        else:
            await accounts.delete(desk, Addresses(row.address))
    return [facts(row) for row in rows]


OPERATIONS = (
    Operation("forward_add", "forward add", ForwardAdd, AccountFacts, add, "make a forward", changes=True),
    Operation("forward_set", "forward set", ForwardSet, AccountFacts, change, "change a forward", changes=True),
    Operation("forward_delete", "forward delete", Addresses, list[AccountFacts], delete, "end forwards", changes=True),
)
