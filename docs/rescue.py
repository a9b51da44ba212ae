#!/usr/bin/env python3
"""Turns the segments of PowerMail storage nodes into Maildir, without PowerMail.

    python3 rescue.py OUTPUT NODE-DIRECTORY [NODE-DIRECTORY ...]

Needs the Python standard library, and the package zstandard if chunks are compressed. Give all node directories at once:
a message is written if any of them has a good copy. Each account gets OUTPUT/ACCOUNT-ID/, each forward that was not sent
OUTPUT/queue/. The format is described in disk.md; this script shares no code with the program.
"""

import hashlib
import json
import os
import struct
import sys

HEAD = struct.Struct("<4sBBHII16s")
CHUNK, COMMIT, ABORT, TOMBSTONE = 1, 2, 3, 4


def decompress(octets):
    """One zstd frame."""
    import zstandard

    return zstandard.ZstdDecompressor().decompress(octets, max_output_size=1 << 27)


def records(path):
    """Yields (type, flags, number, key, body) of every valid record of a segment."""
    with open(path, "rb") as file:
        data = file.read()
    magic, version, _, segment, _, _, salt = struct.unpack_from("<8sIIQ16s16s32s", data)
    if magic != b"PMSEGv1\n" or version != 1:
        print(f"{path}: not a segment of format 1, left out", file=sys.stderr)
        return
    position = 128
    while True:
        position = data.find(b"PMr1", position)
        if position < 0 or position + 48 > len(data):
            return
        head = data[position : position + 32]
        _, kind, flags, _, length, number, key = HEAD.unpack(head)
        body = data[position + 48 : position + 48 + length]
        place = struct.pack("<QQ", segment, position)
        if (
            position % 8 == 0
            and hashlib.sha256(salt + place + head + body).digest()[:16] == data[position + 32 : position + 48]
        ):
            yield kind, flags, number, key, body
            position += (48 + length + 7) & -8
        else:
            position += 1


def main(output, nodes):
    """Reads all nodes, writes all messages."""
    chunks, commits, dead = {}, {}, set()
    for node in nodes:
        folder = os.path.join(node, "segments")
        for name in sorted(os.listdir(folder)):
            if not name.endswith(".seg"):
                continue
            for kind, flags, number, key, body in records(os.path.join(folder, name)):
                if kind == CHUNK:
                    chunks[key, number] = (flags, body)
                elif kind == COMMIT:
                    commits[key] = body
                elif kind in (ABORT, TOMBSTONE):
                    dead.add(key)
    written = damaged = 0
    for key, body in sorted(commits.items()):
        if key in dead:
            continue
        commit = json.loads(body)
        try:
            parts = [chunks[key, number] for number in range(len(commit["sizes"]))]
            octets = b"".join(decompress(data) if flags & 1 else data for flags, data in parts)
        except KeyError:
            octets = b""
        if hashlib.sha256(octets).hexdigest() != commit["sha256"]:
            damaged += 1
            print(f"{key.hex()}: no whole copy", file=sys.stderr)
            continue
        for target in commit["targets"]:
            owner = target.get("account") or "queue"
            folder = os.path.join(output, owner if owner.isalnum() else owner.encode().hex())
            for name in ("cur", "new", "tmp"):
                os.makedirs(os.path.join(folder, name), exist_ok=True)
            with open(os.path.join(folder, "new", f"{int(commit['received_at'])}.{key.hex()}.rescued"), "wb") as file:
                file.write(octets)
        written += 1
    print(f"{written} messages written, {damaged} without a whole copy")
    return 1 if damaged else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
