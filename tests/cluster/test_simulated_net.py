"""The simulated network gives what TCP gives: octets in order, whatever becomes of the process that hears them."""

from __future__ import annotations

import asyncio
import contextvars
import random
from typing import Any

import pytest

from powermail.sim.loop import PROGRAM, Program, SimLoop, run
from powermail.sim.net import SimNetwork

_PORT = 25


class Hearing(asyncio.Protocol):
    """What came, and whether it came to an end."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False

    def data_received(self, data: bytes) -> None:
        assert not self.ended
        self.data += data

    def eof_received(self) -> bool:
        self.ended = True
        return False


class Sending(asyncio.Protocol):
    """The other end."""

    transport: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport


@pytest.mark.parametrize("seed", range(8))
def test_what_came_while_a_process_stood_still_is_heard_in_order_when_it_goes_on(seed: int) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        net, program, heard = SimNetwork(random.Random(seed)), Program(), Hearing()
        context = contextvars.copy_context()
        context.run(PROGRAM.set, program)
        await asyncio.create_task(net.named("server").listen("", _PORT, lambda: heard), context=context)
        sending = Sending()
        await net.named("client").connect("server", _PORT, lambda: sending)
        await asyncio.sleep(1)
        program.pause()
        said = b""
        for number in range(40):
            said += b"%d " % number
            sending.transport.write(b"%d " % number)
            await asyncio.sleep(0.01)
        sending.transport.close()
        await asyncio.sleep(10)
        assert not heard.data
        program.go_on(loop)
        await asyncio.sleep(1)
        assert bytes(heard.data) == said and heard.ended

    complaints: list[str] = []
    run(work(), seed, complaints.append)
    assert complaints == []
