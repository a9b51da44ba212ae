"""Owns what a row of the directory must be: how one is read, whoever wrote it, and when one may be written.

One bad row hurts itself only: it is RowTrouble for its address, and named by `doubt`; nothing else fails because of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.directory import password as pw
from powermail.directory.contract import Account, RowTrouble
from powermail.mail.address import AddressError, parse, parse_canonical

COLUMNS = ("id", "address", "password", "quota_octets", "forward", "keep_copy", "enabled", "send_per_hour", "send_as")
Value = str | int | float | bytes | None
ID_MAX = 2**63 - 1


def _text(name: str, value: Value) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value or (not value.isascii() and _broken(value)):
        raise RowTrouble(f"{name} is not text")
    return value


def _broken(text: str) -> bool:
    """True if the octets of it are not UTF-8."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def _count(name: str, value: Value) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RowTrouble(f"{name} is {value!r}, not a whole number from 0")
    return value


def _flag(name: str, value: Value, default: bool) -> bool:
    if value is None:
        return default
    if value not in (0, 1) or not isinstance(value, int):
        raise RowTrouble(f"{name} is {value!r}, neither 0 nor 1")
    return bool(value)


def read(row: Sequence[Value]) -> Account:
    """The account that a row of `COLUMNS` is. NULL is the default. Raises RowTrouble that names the address and the column."""
    try:
        number = row[0]
        if not isinstance(number, int | str) or isinstance(number, bool) or number == "" or _broken(str(number)):
            raise RowTrouble(f"id is {number!r}, not a number")
        return Account(
            str(number),
            _text("address", row[1]),
            _text("password", row[2]),
            _count("quota_octets", row[3]),
            tuple(_text("forward", row[4]).split()),
            _flag("keep_copy", row[5], False),
            _flag("enabled", row[6], True),
            _count("send_per_hour", row[7]),
            tuple(_text("send_as", row[8]).split()),
        )
    except RowTrouble as error:
        raise RowTrouble(f"directory, row {shown(row[1])}: {error}") from error


def shown(address: Value) -> str:
    """An address as it stands in a row, fit for a line."""
    return address.encode("utf-8", "replace").decode() if isinstance(address, str) else repr(address)


def _address(what: str, text: str) -> str:
    try:
        return parse_canonical(text)
    except AddressError as error:
        raise OperatorError(f"{what}{text!r} is not an address: {error}") from error


def _destination(text: str) -> str:
    try:
        if text.startswith("-"):
            raise AddressError("begins with a dash")
        return parse(text).text
    except AddressError as error:
        raise OperatorError(f"destination {text!r} is not an address: {error}") from error


def check(account: Account) -> Account:
    """The row as it may be stored. Raises OperatorError for an address or destination that is none (F01)."""
    address = _address("", account.address)
    forward = [_destination(destination) for destination in account.forward]
    send_as = tuple(_address("sender ", sender) for sender in account.send_as)
    if len(forward) > limits.FORWARD_DESTINATIONS_MAX:
        raise OperatorError(f"more than {limits.FORWARD_DESTINATIONS_MAX} destinations")
    if len(send_as) > limits.FORWARD_DESTINATIONS_MAX:
        raise OperatorError(f"more than {limits.FORWARD_DESTINATIONS_MAX} senders")
    if any(" " in each for each in (*forward, *send_as)):
        raise OperatorError("a destination or sender with a blank cannot be kept in the table")
    if address in (destination.lower() for destination in forward):
        raise OperatorError(f"{address} cannot forward to itself; use keep_copy to keep the mail")
    if not 0 <= account.quota_octets <= ID_MAX or not 0 <= account.send_per_hour <= ID_MAX:
        raise OperatorError("a quota and a rate are whole numbers from 0 to 2^63 - 1")
    return account._replace(address=address, forward=tuple(forward), send_as=send_as)


def doubt(row: Sequence[Value]) -> str:
    """What is wrong with a row, "" if nothing: also what `read` passes and use cannot."""
    try:
        account = read(row)
    except RowTrouble as error:
        return str(error.__cause__ or error)
    try:
        parse_canonical(account.address)
    except AddressError as error:
        return f"address is not one: {error}"
    for destination in account.forward:
        try:
            parse(destination)
        except AddressError as error:
            return f"destination {shown(destination)} is not an address: {error}"
    for sender in account.send_as:
        try:
            parse_canonical(sender)
        except AddressError as error:
            return f"send_as names {shown(sender)}, which is not an address: {error}"
    why = pw.complaint(account.password) if account.password else ""
    return f"{why}: nobody can log in" if why else ""
