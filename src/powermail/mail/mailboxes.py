r"""Owns address lists as they stand in header fields: From, Sender (RFC 5322 §3.4, RFC 6854 groups, RFC 6532 UTF-8).

    address = mailbox / group          mailbox = addr-spec / [ display-name ] "<" addr-spec ">"
    group   = display-name ":" [ mailbox-list ] ";"

Strict, because two readers that differ about who wrote a message are a way to forge it: what is not of this grammar is
refused. One leniency, of obs-phrase: dots in a display name (`John Q. Public <john@example.org>`).
"""

from __future__ import annotations

import re
from itertools import pairwise

from powermail.base import limits
from powermail.mail.address import Address, AddressError, has_control, parse

_TOKEN = re.compile(
    r"""[ \t]*(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<literal>\[[^\[\]\\]*\])|(?P<special>[<>:;@,.])"""
    r"""|(?P<atom>[^\s()<>\[\]:;@\\,."]+))[ \t]*"""
)


def parse_list(text: str) -> list[Address]:
    """The addresses of an unfolded field's value, those in groups too. Raises AddressError."""
    if len(text) > limits.ORIGINATOR_CHARS_MAX or has_control(text.replace("\t", " ")):
        raise AddressError("too long, or a control character")
    tokens = _tokens(_without_comments(text))
    found: list[Address] = []
    position = 0
    while True:
        position = _address(tokens, position, found)
        if position == len(tokens):
            return found
        if tokens[position] != ",":
            raise AddressError("something follows the address")
        position += 1


def _without_comments(text: str) -> str:
    """Comments, which may hold others, become a blank (RFC 5322 §3.2.2)."""
    if "(" not in text and ")" not in text:
        return text
    out: list[str] = []
    depth = position = 0
    quoted = False
    while position < len(text):
        char = text[position]
        if char == "\\" and (depth or quoted):
            out += [] if depth else text[position : position + 2]
            position += 2
            continue
        position += 1
        if char == '"' and not depth:
            quoted = not quoted
        elif not quoted and char in "()":
            depth += 1 if char == "(" else -1
            if depth < 0:
                raise AddressError("a comment ends that did not begin")
            char = " "
        if not depth:
            out.append(char)
    if depth:
        raise AddressError("a comment does not end")
    return "".join(out)


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    position = 0
    while position < len(text.rstrip(" \t")):
        match = _TOKEN.match(text, position)
        if match is None:
            raise AddressError("neither a word nor a mark of the grammar")
        found.append(match.group().strip(" \t"))
        position = match.end()
    return found


def _address(tokens: list[str], position: int, found: list[Address]) -> int:
    """Reads a mailbox or a group; the position behind it."""
    start = position
    while position < len(tokens) and (tokens[position] == "." or not _is_mark(tokens[position])):
        position += 1
    mark = tokens[position] if position < len(tokens) else ""
    if mark == "<":
        end = _until(tokens, position + 1, ">")
        found.append(_addr_spec(tokens[position + 1 : end]))
        return end + 1
    if mark == ":" and position > start:
        return _group(tokens, position + 1, found)
    if mark == "@":
        end = position + 1
        while end < len(tokens) and (tokens[end] == "." or not _is_mark(tokens[end])):
            end += 1
        found.append(_addr_spec(tokens[start:end]))
        return end
    raise AddressError("no address")


def _group(tokens: list[str], position: int, found: list[Address]) -> int:
    end = _until(tokens, position, ";")
    while position < end:
        position = _address(tokens, position, found)
        if position < end:
            if tokens[position] != ",":
                raise AddressError("something follows an address of the group")
            position += 1
    if position != end:
        raise AddressError("a group in a group")
    return end + 1


def _until(tokens: list[str], position: int, mark: str) -> int:
    try:
        return tokens.index(mark, position)
    except ValueError:
        raise AddressError(f"no {mark}") from None


def _is_mark(token: str) -> bool:
    return token in ("<", ">", ":", ";", "@", ",", ".")


def _addr_spec(tokens: list[str]) -> Address:
    """local-part "@" domain from its tokens: two words beside each other are none."""
    for before, behind in pairwise(tokens):
        if not _is_mark(before) and not _is_mark(behind):
            raise AddressError("two words where one stands")
    return parse("".join(tokens))
