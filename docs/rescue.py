#!/usr/bin/env python3
"""Turns the segments of PowerMail storage nodes into Maildir, without PowerMail.

    python3 rescue.py OUTPUT NODE-DIRECTORY [NODE-DIRECTORY ...]

Needs the Python standard library, and the package zstandard if chunks are compressed. Give all node directories at once:
a message is written if any of them has a good copy. Each account gets OUTPUT/ACCOUNT-ID/, each forward that was not sent
OUTPUT/queue/. The format is described in disk.md; this script shares no code with the program.
"""

import hashlib
import itertools
import json
import os
import struct
import sys

HEAD = struct.Struct("<4sBBHII16s")
PLACE = struct.Struct("<QQ")
CHUNK, COMMIT, ABORT, TOMBSTONE, DROP = 1, 2, 3, 4, 6
COMPRESSED, MOVED = 1, 2
TRIES_MAX = 1000


def decompress(octets):
    """One zstd frame."""
    import zstandard

    return zstandard.ZstdDecompressor().decompress(octets, max_output_size=1 << 27)


def records(path):
    """Yields (type, flags, number, key, body, place) of every valid record of a segment.

    `place` is where the record was first written: compaction moves commits and notes it in their body (format 2).
    """
    with open(path, "rb") as file:
        data = file.read()
    if len(data) < 128:
        print(f"{path}: too short for a segment, left out", file=sys.stderr)
        return
    magic, version, _, segment, _, _, salt = struct.unpack_from("<8sIIQ16s16s32s", data)
    if magic != b"PMSEGv1\n" or version not in (1, 2):
        print(f"{path}: not a segment of format 1 or 2, left out", file=sys.stderr)
        return
    position = 128
    while True:
        position = data.find(b"PMr1", position)
        if position < 0 or position + 48 > len(data):
            return
        head = data[position : position + 32]
        _, kind, flags, _, length, number, key = HEAD.unpack(head)
        body = data[position + 48 : position + 48 + length]
        place = (segment, position)
        checksum = hashlib.sha256(salt + PLACE.pack(*place) + head + body).digest()[:16]
        if position % 8 == 0 and checksum == data[position + 32 : position + 48]:
            if version == 2 and kind == COMMIT and flags & MOVED:
                place, body = PLACE.unpack_from(body), body[16:]
            yield kind, flags, number, key, body, place
            position += (48 + length + 7) & -8
        else:
            position += 1


def read_nodes(nodes):
    """(chunks, commits, dead) of all nodes: chunks in every form that was found, commits of copies that were not dropped."""
    chunks, commits, dead = {}, {}, set()
    for node in nodes:
        folder = os.path.join(node, "segments")
        copies, drops = {}, set()
        for name in sorted(os.listdir(folder)):
            if not name.endswith(".seg"):
                continue
            for kind, flags, number, key, body, place in records(os.path.join(folder, name)):
                if kind == CHUNK:
                    forms = chunks.setdefault((key, number), [])
                    if (flags & COMPRESSED, body) not in forms:
                        forms.append((flags & COMPRESSED, body))
                elif kind == COMMIT:
                    copies[key, place] = body
                elif kind in (ABORT, TOMBSTONE):
                    dead.add(key)
                elif kind == DROP:
                    drops.add((key, PLACE.unpack_from(body)))
        commits.update({key: body for (key, place), body in sorted(copies.items()) if (key, place) not in drops})
    return chunks, commits, dead


def octets_of(key, commit, chunks):
    """The message, or None when no forms of its chunks fit its SHA-256."""
    forms = [chunks.get((key, number), []) for number in range(len(commit["sizes"]))]
    for parts in itertools.islice(itertools.product(*forms), TRIES_MAX):
        octets = b"".join(decompress(data) if compressed else data for compressed, data in parts)
        if hashlib.sha256(octets).hexdigest() == commit["sha256"]:
            return octets
    return None


def main(output, nodes):
    """Reads all nodes, writes all messages."""
    chunks, commits, dead = read_nodes(nodes)
    written = damaged = 0
    for key, body in sorted(commits.items()):
        if key in dead:
            continue
        commit = json.loads(body)
        octets = octets_of(key, commit, chunks)
        if octets is None:
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
