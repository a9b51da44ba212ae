"""One node: one directory on one disk. `docs/disk.md` gives the format octet by octet.

DIRECTORY/identity            cluster, node, incarnation, format, salt (JSON)
DIRECTORY/lock                held while a process serves the node
DIRECTORY/segments/N.seg      append-only log of chunk, commit, abort, tombstone and checkpoint records
DIRECTORY/keys.db             derived: which records belong to a key; may be deleted while nothing serves the node
DIRECTORY/quarantine          damage that was found, one JSON object a line
"""
