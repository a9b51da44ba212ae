"""Owns the project's own sample messages: plain, awkward and large, made here so that they belong to nobody else."""

from __future__ import annotations

import os
import zipfile

from powermail.base.errors import OperatorError

_HEAD = b"From: Ann <ann@example.org>\r\nTo: bob@example.net\r\nSubject: %s\r\nMessage-ID: <%d@example.org>\r\n\r\n"


def own_samples() -> list[tuple[str, bytes]]:
    """(name, octets) of each sample."""
    bodies = {
        "plain": b"Hello,\r\n\r\nthis is a plain message.\r\n",
        "empty-body": b"",
        "dots": b".\r\n..\r\n...\r\n.leading\r\nmiddle.dot\r\n.\r\n",
        "no-final-newline": b"the last line has no end",
        "eight-bit": "Grüße, žluťoučký kůň, 你好\r\n".encode(),
        "latin-1": b"caf\xe9 cr\xe8me\r\n",
        "nul-and-bare-cr": b"before\0after\r\na bare\rcarriage return\r\n",
        "long-line": b"x" * 200_000 + b"\r\n",
        "multipart": (
            b"--b\r\nContent-Type: text/plain\r\n\r\nfirst\r\n--b\r\nContent-Type: text/html\r\n\r\n<p>second</p>\r\n--b--\r\n"
        ),
        "looks-like-a-record": b"PMr1\x02\0\0\0" * 64 + b"\r\n",
        "large": bytes(range(32, 127)) * 20_000 + b"\r\n",
    }
    samples = [(name, _HEAD % (name.encode(), number) + body) for number, (name, body) in enumerate(bodies.items())]
    samples.append(("no-header", b"just a line without any header field\r\n"))
    samples.append(("only-a-dot", b".\r\n"))
    return samples


def corpus(path: str) -> list[tuple[str, bytes]]:
    """Messages of a directory: `*.eml`, or those inside a `messages.zip`. Raises OperatorError."""
    archive = os.path.join(path, "messages.zip")
    found: list[tuple[str, bytes]] = []
    try:
        if os.path.exists(archive):
            with zipfile.ZipFile(archive) as file:
                found = [(name, file.read(name)) for name in sorted(file.namelist()) if name.endswith(".eml")]
        else:
            for name in sorted(os.listdir(path)):
                if name.endswith(".eml"):
                    with open(os.path.join(path, name), "rb") as message:
                        found.append((name, message.read()))
    except (OSError, zipfile.BadZipFile) as error:
        raise OperatorError(f"cannot read messages from {path}: {error}") from error
    if not found:
        raise OperatorError(f"no *.eml and no messages.zip in {path}")
    return found
