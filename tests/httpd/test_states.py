"""What the listener says of a server in each state, what it costs, and that its own trouble is never mail's."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from powermail.admin.control import ControlServer
from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.errors import InvariantBroken
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from powermail.cli import serving
from powermail.cli.words import Common
from powermail.index.contract import Damage
from tests.httpd.conftest import Near, value, values
from tests.system.conftest import DOORS


async def ask(near: Near, path: str, method: str = "GET") -> tuple[int, str]:
    """One request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", near.watch_port, limit=1 << 22)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(20):
        octets = await reader.read()
    writer.close()
    head, _, body = octets.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


async def until(holds: Callable[[], bool]) -> None:
    """Waits for a fact."""
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def block(near: Near, blocked: bool) -> None:
    await near.operation("node_block", node=["a", "b"], blocked=blocked)


async def degraded(near: Near) -> list[str]:
    status = await near.operation("status")
    assert isinstance(status, dict)
    return [str(text) for text in status["degraded"]]


# -- ready and live ---------------------------------------------------------------------------------------------------


async def test_a_server_that_takes_no_mail_is_alive_and_not_ready_and_says_why(near: Near) -> None:
    await near.start()
    assert await ask(near, "/ready") == (200, "ready\n")
    await block(near, True)
    assert await ask(near, "/ready") == (503, "mail is not accepted: fewer than 2 groups of nodes are writable\n")
    assert await ask(near, "/live") == (200, "alive\n")
    text = (await ask(near, "/metrics"))[1]
    assert value(text, "powermail_ready") == value(text, "powermail_takes_mail") == 0.0
    assert value(text, "powermail_node_state", node="a", group="rack-a", state="blocked") == 1.0
    await block(near, False)
    assert await ask(near, "/ready") == (200, "ready\n")


async def test_a_server_whose_index_catches_up_is_not_ready(near: Near) -> None:
    await near.start()
    near.powermail.core.index.catching_up = True
    assert await ask(near, "/ready") == (503, "the index is catching up with the nodes\n")
    assert (await ask(near, "/live"))[0] == 200


async def test_a_server_whose_doors_are_not_open_yet_is_not_ready(near: Near) -> None:
    await near.start()
    near.powermail.life.open = False
    assert await ask(near, "/ready") == (503, "starting: the doors are not open yet\n")


async def test_a_broken_invariant_is_neither_alive_nor_ready(near: Near) -> None:
    await near.start()

    async def breaks() -> float:
        raise InvariantBroken("two messages under one key")

    near.powermail._promises.start(breaks(), "delivery")
    await until(lambda: bool(near.broken))
    assert await ask(near, "/live") == await ask(near, "/ready") == (503, "a storage invariant broke\n")


async def test_draining_is_said_at_once_and_until_the_end(near: Near) -> None:
    await near.start()
    near.powermail.refuse()
    assert await ask(near, "/ready") == (503, "draining: the server is stopping\n")
    assert await ask(near, "/live") == (200, "alive\n")
    assert value((await ask(near, "/metrics"))[1], "powermail_ready") == 0.0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", near.port("smtp"))
    port = near.watch_port
    await near.powermail.stop(0.5)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is older than a tenth of a second."""
    monkeypatch.setattr(limits, "METRICS_LOOK_S", 0.0)
    monkeypatch.setattr(limits, "METRICS_LOOK_SHARE", 0)
    monkeypatch.setattr(limits, "METRICS_FRESH_S", 0.0)


async def scrape(near: Near) -> Callable[..., float]:
    """The figures of now, by name and labels; what is not shown, because it is not known yet, is no number."""
    found = values((await ask(near, "/metrics"))[1])
    return lambda figure, **labels: found.get((f"powermail_{figure}", tuple(sorted(labels.items()))), math.nan)


async def shows(near: Near, wanted: float, figure: str, **labels: str) -> None:
    """Waits until a figure that the index knows has that value."""
    async with asyncio.timeout(20):
        while (await scrape(near))(figure, **labels) != wanted:
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("at_once")
async def test_the_queue_is_counted_and_its_age_is_that_of_what_may_leave(near: Near) -> None:
    await near.start()
    await near.mailbox("out@local.example", password="", forward=["far@elsewhere.example", "b@other.example"])
    assert (await near.send(["out@local.example"], b"Subject: x\r\n\r\nx")).startswith("250")
    await shows(near, 2.0, "queue_recipients")
    figures = await scrape(near)
    assert figures("outbound_route") == 0.0 and 0.0 < figures("queue_oldest_seconds") < 60.0
    assert 0.0 <= figures("index_figures_age_seconds") < 20.0
    await near.operation("queue_hold", all=True)
    await shows(near, 0.0, "queue_oldest_seconds")
    assert (await scrape(near))("queue_recipients") == 2.0


@pytest.mark.usefixtures("at_once")
async def test_what_the_index_knows_of_nodes_is_shown(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    await near.start()
    index = near.powermail.core.index

    async def owed(node: str) -> tuple[int, int]:
        return {"a": (1, 2), "b": (0, 0), "c": (0, 5)}[node]

    async def damages() -> dict[str, Damage]:
        return {"b": Damage(4, 1.0), "gone": Damage(9, 1.0)}

    monkeypatch.setattr(index, "orders_total", owed)
    monkeypatch.setattr(index, "damages", damages)
    for node, owing, bad in (("a", 3.0, 0.0), ("b", 0.0, 4.0), ("c", 5.0, 0.0)):
        await shows(near, owing, "node_deletions_owed", node=node)
        assert (await scrape(near))("node_bad_copies_total", node=node) == bad


@pytest.mark.usefixtures("at_once")
async def test_checkpoints_on_too_few_nodes_are_counted(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    await near.start()

    async def thin() -> int:
        return 7

    await shows(near, 0.0, "thin_checkpoints")
    monkeypatch.setattr(near.powermail.core.index, "thin_checkpoints", thin)
    await shows(near, 7.0, "thin_checkpoints")


@pytest.mark.usefixtures("at_once")
async def test_each_figure_of_a_node_is_its_own(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    await near.start()
    cluster = near.powermail.core.cluster
    names = {
        "free_octets": "free_bytes", "total_octets": "size_bytes", "log_octets": "log_bytes", "live_octets": "live_bytes",
        "waiting_octets": "waiting_bytes", "segments": "segments", "messages": "messages", "damaged": "damaged_stretches",
        "probe_s": "probe_seconds",
    }  # fmt: skip
    wanted: dict[tuple[str, str], int] = {}
    for place, (name, node) in enumerate(cluster.nodes.items()):
        mine = {field: 100 * place + number for number, field in enumerate(names)}
        stat = msgspec.structs.replace(node.stat(), **mine)
        monkeypatch.setattr(node, "stat", lambda stat=stat: stat)
        wanted |= {(name, names[field]): number for field, number in mine.items()}
    monkeypatch.setattr(cluster, "is_slow", lambda name: name == "b")
    near.powermail.core.admission.held["c"] = 12
    monkeypatch.setattr(cluster, "trouble", lambda name: "another disk" if name == "a" else "")
    figures = await scrape(near)
    assert {(node, name): figures(f"node_{name}", node=node) for node, name in wanted} == wanted
    for figure, each in (("slow", [0, 1, 0]), ("drops_held", [0, 0, 12]), ("refused", [1, 0, 0])):
        assert [figures(f"node_{figure}", node=node) for node in "abc"] == each


async def test_copies_workers_and_the_rest_are_what_the_rooms_say(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    await near.start()
    powermail, desk = near.powermail, near.powermail.operations.desk
    repairer = desk.repairer
    (repair,) = [worker for worker in desk.workers if worker.name == "repair"]
    while not repair.units:  # its first turn finds nothing, and says so
        await asyncio.sleep(0.01)
    repairer.left, repairer.rate, repairer.unrepairable_total = 30, 2.0, 4
    (worker,) = [worker for worker in desk.workers if worker.name == "purges"]
    worker.units, worker.errors, worker.trouble = 11, 5, "waiting after OSError"
    monkeypatch.setattr(worker, "step_s", lambda: 77.0)
    powermail.front.resolver.directory.trouble = "away"
    powermail.core.index.catching_up = True
    monkeypatch.setattr(desk, "certificate_ends", lambda: 2e9)
    monkeypatch.setattr(desk, "outbound_troubles", lambda: ["no TLS", "no login"])
    near.log.dropped = 8
    figures = await scrape(near)
    names = ("under_redundant_messages", "unrepairable_messages", "full_redundancy_seconds")
    assert [figures(name) for name in names] == [30, 4, 15]
    shown = ("worker_steps_total", "worker_errors_total", "worker_trouble", "worker_step_seconds")
    assert [figures(name, worker="purges") for name in shown] == [11, 5, 1, 77]
    assert figures("worker_trouble", worker="deadlines") == 0
    others = ("directory_away", "index_catching_up", "ready", "certificate_end_timestamp_seconds", "outbound_troubles")
    assert [figures(name) for name in others] == [1, 1, 0, 2e9, 2]
    assert figures("log_lines_dropped_total") == 8 and figures("index_epoch") == powermail.core.index.epoch
    repairer.rate = 0.0
    await asyncio.sleep(limits.METRICS_FRESH_S)
    text = (await ask(near, "/metrics"))[1]
    assert "\npowermail_full_redundancy_seconds" not in text, "nobody knows how long"


# -- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begin", [b"", b"GET /live HTTP/1.1\r\n", b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"]
)
async def test_a_client_that_takes_its_time_is_ended(near: Near, monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    monkeypatch.setattr(limits, "HTTP_CONNECTION_S", 0.3)
    await near.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", near.watch_port)
    writer.write(begin)
    async with asyncio.timeout(20):
        while not near.powermail.world.counters.get("httpd.timeout"):
            if begin:
                writer.write(b"X: y\r\n")
            await asyncio.sleep(0.02)
        try:
            await reader.read()
        except ConnectionError:
            pass
    await until(lambda: near.powermail.front.connections()["httpd"] == 0)
    writer.close()


async def test_a_client_that_does_not_read_is_ended(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HTTP_CONNECTION_S", 0.3)
    await near.start()
    (door,) = near.powermail.front.watched_by
    _, writer = await asyncio.open_connection("127.0.0.1", near.watch_port, limit=64)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    # What the system holds for a client is more than one answer: this one is far longer.
    monkeypatch.setattr("powermail.httpd.service.generate_latest", lambda piece: b"# nothing\n" * 50_000)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: door.connections == 1)
    await until(lambda: door.connections == 0)
    assert near.powermail.world.counters.get("httpd.timeout") == 1
    writer.close()


async def test_clients_over_the_cap_are_told_and_mail_goes_on(near: Near) -> None:
    await near.start()
    idle = [await asyncio.open_connection("127.0.0.1", near.watch_port) for _ in range(limits.HTTP_CONNECTIONS_MAX)]
    await until(lambda: near.powermail.front.connections()["httpd"] == limits.HTTP_CONNECTIONS_MAX)
    assert await ask(near, "/live") == (503, "too many connections\n")
    assert near.powermail.world.counters.get("httpd.connections_refused") == 1
    reader, writer = await asyncio.open_connection("127.0.0.1", near.port("smtp"))
    assert (await reader.readline()).startswith(b"220 ")
    writer.close()
    for _, each in idle:
        each.transport.abort()
    await until(lambda: near.powermail.front.connections()["httpd"] == 0)
    assert await ask(near, "/live") == (200, "alive\n")


async def test_where_others_may_ask_nobody_takes_all_connections(near: Near) -> None:
    await near.start("metrics.allow_remote=true")
    idle = [await asyncio.open_connection("127.0.0.1", near.watch_port) for _ in range(limits.HTTP_CONNECTIONS_PER_ADDRESS_MAX)]
    await until(lambda: near.powermail.front.connections()["httpd"] == len(idle))
    assert await ask(near, "/live") == (503, "too many connections\n")
    for _, each in idle:
        each.transport.abort()


# -- trouble of its own -----------------------------------------------------------------------------------------------


async def test_an_address_that_is_taken_costs_mail_nothing_and_is_tried_again(near: Near) -> None:
    other = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    await near.start(f'metrics.listen=["127.0.0.1:0", "127.0.0.1:{port}"]')
    assert await ask(near, "/ready") == (200, "ready\n")
    (worker,) = [worker for worker in near.powermail.keeping.workers if worker.name == "metrics"]
    await until(lambda: bool(worker.trouble))
    assert f"cannot listen on 127.0.0.1:{port}" in worker.trouble
    assert any(f"cannot listen on 127.0.0.1:{port}" in text for text in await degraded(near))
    other.close()
    await other.wait_closed()
    await until(lambda: not worker.trouble)
    assert near.watch_port == port and await ask(near, "/ready") == (200, "ready\n")


async def test_a_bug_in_a_figure_is_a_500_and_a_line_in_the_log(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    await near.start()

    def broken() -> float | None:
        raise KeyError("a figure")

    monkeypatch.setattr(near.powermail.operations.desk, "certificate_ends", broken)
    status, body = await ask(near, "/metrics")
    assert status == 500 and "figure" not in body
    assert [line for line in near.log.lines if " bug " in line and "httpd" in line and "a figure" in line]
    assert (await ask(near, "/ready"))[0] == 200


# -- cost -------------------------------------------------------------------------------------------------------------


async def test_a_scrape_waits_for_no_database(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OPERATOR_INDEX_S", 0.1)
    monkeypatch.setattr(limits, "METRICS_LOOK_S", 0.0)
    await near.start()
    (worker,) = [worker for worker in near.powermail.keeping.workers if worker.name == "metrics"]
    await until(lambda: worker.units > 0)
    monkeypatch.setattr(limits, "METRICS_LOOK_S", 60.0)
    free = threading.Event()
    for name in ("index-read", "index-write", "directory", "a-read", "a-write"):
        near.powermail.world.lanes[name].run(free.wait)
    try:
        assert await ask(near, "/ready") == (200, "ready\n")
        assert value((await ask(near, "/metrics"))[1], "powermail_copies_required") == 2.0
        await until(lambda: worker.errors >= 2)
        assert "IndexTrouble" in worker.trouble, "it stays in trouble while the index is silent"
        monkeypatch.setattr(limits, "METRICS_FRESH_S", 0.0)
        text = (await ask(near, "/metrics"))[1]
        assert (
            value(text, "powermail_index_up") == 0.0 and value(text, "powermail_lane_waiting_calls", lane="index-read") >= 0.0
        )
        assert value(text, "powermail_queue_recipients") == 0.0, "what was known stays"
    finally:
        free.set()


async def test_a_scrape_costs_milliseconds_in_small_steps_and_one_serves_all_who_ask_together(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    await near.start()
    steps: list[float] = []
    costs: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        steps.append(time.thread_time() - began)

    for _ in range(5):
        await asyncio.sleep(limits.METRICS_FRESH_S)
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.Handle, "_run", timed)
            texts = await asyncio.gather(*(ask(near, "/metrics") for _ in range(8)))
        assert len({text for _, text in texts}) == 1, "made once"
        costs.append(max(steps))
    assert min(costs) < 0.005, costs


async def test_a_stopping_server_says_so_before_it_stops_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    await initialise(system_world(MemoryLog()), str(data), "localhost")
    words = [f'{name}=["127.0.0.1:0"]' for name in DOORS] + [f"cluster.segment_octets={limits.MIB}"]
    server = serving.Server(Common(str(data), words))
    draining: list[bool] = []
    stop = ControlServer.stop

    async def stop_control(control: ControlServer) -> None:
        draining.append(server._powermail.life.draining)
        await stop(control)

    monkeypatch.setattr(ControlServer, "stop", stop_control)
    monkeypatch.setattr(server, "_listen_to_signals", lambda: None)  # they are this test run's
    work = asyncio.create_task(server.run(None, load_file(str(data / "powermail.toml"), words)))
    await until(lambda: work.done() or (data / "control.sock").exists())
    server._stop.set()
    await work
    assert draining == [True]
