"""Serves one node, with a disk of its own, as a process: `python -m tests.noded.machine CLUSTER NODE GROUP DIRECTORY PEM KEY
AUTHORITY` prints its port.
"""

from __future__ import annotations

import asyncio
import sys

from powermail.base.log import NullLog
from powermail.base.tasks import Tasks
from powermail.base.tls import peer_context
from powermail.base.world import system_world
from powermail.noded.service import NodeService
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.log.store import Options
from powermail.storage.node import LocalNode


def _broken(error: BaseException) -> None:
    raise error


async def serve(cluster: str, name: str, group: str, directory: str, certificate: str, key: str, authority: str) -> None:
    """Serves until the other end of its input is closed."""
    world = system_world(NullLog())
    node = LocalNode(world, cluster, name, directory, group, 1, Options(16 << 20, 0), SqliteKeyIndex)
    await node.initialise()
    await node.open()
    context = peer_context(True, certificate, key, authority)
    service = NodeService(world, cluster, {name: node}, Tasks(world.log, _broken), lambda: context, _broken)
    print(await service.listen("127.0.0.1", 0), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
