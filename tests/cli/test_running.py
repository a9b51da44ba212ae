"""The command line beside a running server: its socket, its signals, its silence."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from powermail.admin.control import Silent, ask_raw
from powermail.admin.table import unseen
from tests.cli.support import Done
from tests.system.process import Served
from tests.system.process import make as make_installation


async def powermail(*words: str, data: Path, given: bytes = b"") -> Done:
    """A command in a process of its own, while the server serves."""
    import sys

    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "powermail", *words, "--data", str(data)],
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate(given)
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """A data directory; made outside of an event loop, which must not wait for a process."""
    make_installation(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
async def served(installation: Path) -> AsyncIterator[Served]:
    """`powermail serve`."""
    made = Served(installation)
    await made.start()
    yield made
    await made.stop()


def events(served: Served, name: str) -> list[dict[str, object]]:
    """Lines of its log."""
    import json

    text = served.data.with_name(f"{served.data.name}.log").read_text()
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [event for event in found if event["event"] == name]


async def until(holds: object, within_s: float = 20.0) -> None:
    """Waits for a fact."""
    assert callable(holds)
    ends_at = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.02)


def pid(served: Served) -> int:
    assert served._process is not None
    return served._process.pid


async def test_signals_hang_up_reloads_and_those_that_mean_nothing_are_ignored(served: Served) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO):
        os.kill(pid(served), number)
    settings = served.data / "powermail.toml"
    settings.write_text(settings.read_text() + '\n[log]\nlevel = "debug"\n\n[smtp]\nrecipients_max = 500\n')
    os.kill(pid(served), signal.SIGHUP)
    await until(lambda: events(served, "reloaded"))
    (event,) = events(served, "reloaded")
    assert event["changed"] == "log.level" and event["needs_restart"] == "smtp.recipients_max"
    settings.write_text(settings.read_text() + "nonsense")
    os.kill(pid(served), signal.SIGHUP)
    await until(lambda: any(event.get("worker") == "reload" for event in events(served, "trouble")))
    done = await powermail("reload", data=served.data)
    assert done.status == 2 and "powermail.toml" in done.sentence()
    settings.write_text(settings.read_text().removesuffix("nonsense"))
    done = await powermail("reload", "--json", data=served.data)
    assert done.json() == {"changed": [], "restart": ["smtp.recipients_max"]}
    os.kill(pid(served), signal.SIGTERM)
    await until(lambda: events(served, "stopped"))
    assert events(served, "draining")


async def test_the_welcome_can_be_pasted(served: Served) -> None:
    text = served.data.with_name(f"{served.data.name}.log").read_text()
    assert f"smtp://127.0.0.1:{served.port('smtp')} " in text and f"pop3s://127.0.0.1:{served.port('pop3s')}/1" in text
    (line,) = [line for line in text.splitlines() if " list postmaster@" in line]
    assert line.strip().endswith(f"powermail list postmaster@localhost --data {served.data.absolute()}")
    process = await asyncio.create_subprocess_shell(line, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0 and b"0 messages" in out


async def test_a_server_that_does_not_answer_is_said_within_five_seconds(served: Served) -> None:
    os.kill(pid(served), signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Silent):
            await ask_raw(str(served.data / "control.sock"), "account_list", {}, unseen)
        assert time.monotonic() - began < 6
        words = (["status"], ["account", "list"], ["node", "list"], ["queue", "list"], ["where", "00" * 16])
        for done in await asyncio.gather(*(powermail(*one, data=served.data) for one in words)):
            assert done.status == 1
            assert f"the server (process {pid(served)}) does not answer within 5 s" in done.sentence()
    finally:
        os.kill(pid(served), signal.SIGCONT)


async def test_a_locked_index_is_said_within_five_seconds(served: Served) -> None:
    with closing(sqlite3.connect(f"{served.data}/index.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        done = await powermail("node", "block", "a", data=served.data)
        db.execute("ROLLBACK")
    assert done.status == 1
    assert done.sentence() == "node block did not end in time: the index takes no changes (locked, or its disk hangs)"


async def test_changes_are_logged_with_who_and_what_and_without_secrets(served: Served) -> None:
    await powermail("account", "add", "ann@example.org", "--password-stdin", data=served.data, given=b"tell-nobody\n")
    await powermail("account", "set", "ann@example.org", "--quota", "1M", data=served.data)
    await powermail("account", "list", data=served.data)
    await until(lambda: len(events(served, "operator")) >= 2)
    first, second = events(served, "operator")
    assert (first["who"], first["what"], first["address"]) == ("root", "account_add", "ann@example.org")
    assert (second["what"], second["quota_octets"]) == ("account_set", str(2**20))
    assert "tell-nobody" not in served.data.with_name(f"{served.data.name}.log").read_text()


async def test_a_backup_while_serving_is_consistent(served: Served, tmp_path: Path) -> None:
    await served.mailbox("ann@local.example")
    stop = asyncio.Event()

    async def sending() -> int:
        count = 0
        while not stop.is_set():
            assert (await served.send(["ann@local.example"], b"S: %d\r\n\r\nx" % count)).startswith("250")
            count += 1
        return count

    task = asyncio.create_task(sending())
    done = await powermail("backup", str(tmp_path / "backup"), "--json", data=served.data)
    stop.set()
    sent = await task
    assert done.status == 0, done
    await served.stop()
    restored = await powermail("restore", str(tmp_path / "backup"), "--yes", data=served.data)
    assert restored.status == 0, restored
    await served.start()
    await served.until("what came since is entered again", lambda status: not status["degraded"])
    assert len(await served.read("ann@local.example")) == sent


async def test_one_bad_row_is_a_451_for_its_recipient_and_nothing_for_others(served: Served) -> None:
    with closing(sqlite3.connect(f"{served.data}/directory.db")) as db:
        db.executescript(
            "DROP TABLE accounts; CREATE TABLE accounts (id, address, password, quota_octets, forward, keep_copy, enabled,"
            " send_per_hour); INSERT INTO accounts (id, address, quota_octets) VALUES (1, 'bad@local.example', '50M'),"
            " (2, 'good@local.example', 0); INSERT INTO accounts (id, address, enabled) VALUES (3, 'no@local.example', 'no');"
        )
    client = await served.connect("smtp")
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<s@example.org>")
    for address in ("bad", "no"):
        assert (await client.ask(f"RCPT TO:<{address}@local.example>")).startswith("451")
    assert (await client.ask("RCPT TO:<good@local.example>")).startswith("250")
    assert (await client.ask("RCPT TO:<none@local.example>")).startswith("550")
    done = await powermail("account", "list", data=served.data)
    assert done.status == 0 and "good@local.example" in done.out


async def test_mail_for_an_id_of_somebody_else_is_refused_and_shown(served: Served) -> None:
    """A directory restored from a backup, or an INSERT by hand, gives ann's id to bob."""
    await served.mailbox("ann@local.example")
    await served.send(["ann@local.example"], b"S: for ann\r\n\r\nx")
    account = (await powermail("account", "show", "ann@local.example", "--json", data=served.data)).json()["id"]

    def noted() -> bool:
        with closing(sqlite3.connect(f"file:{served.data}/index.db?mode=ro", uri=True)) as db:
            return bool(db.execute("SELECT 1 FROM owners WHERE account = ?", (account,)).fetchone())

    await until(noted)
    with closing(sqlite3.connect(f"{served.data}/directory.db")) as db:
        db.execute("UPDATE accounts SET address = 'bob@local.example' WHERE id = ?", (int(account),))
        db.commit()
    client = await served.connect("smtp")
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<s@example.org>")
    assert (await client.ask("RCPT TO:<bob@local.example>")).startswith("451")
    done = await powermail("status", data=served.data)
    assert f"bob@local.example has the id {account} of ann@local.example" in done.out
    done = await powermail("directory", "check", data=served.data)
    assert done.status == 1 and f"powermail account adopt bob@local.example {account} --yes" in done.out
    done = await powermail("account", "adopt", "bob@local.example", account, data=served.data)
    assert "was       ann@local.example" in done.out and "nothing was changed" in done.out
    assert (await powermail("account", "adopt", "bob@local.example", account, "--yes", data=served.data)).status == 0
    assert (await client.ask("RCPT TO:<bob@local.example>")).startswith("250")
    assert len(await served.read("bob@local.example")) == 1


async def test_an_orphans_mail_is_adopted(served: Served) -> None:
    await served.mailbox("ann@local.example")
    await served.mailbox("bob@local.example")
    for number in range(3):
        await served.send(["ann@local.example"], b"S: %d\r\n\r\nx" % number)
    await powermail("account", "delete", "ann@local.example", data=served.data)
    (orphan,) = (await powermail("orphans", "--json", data=served.data)).json()
    assert (orphan["messages"], orphan["address"]) == (3, None)
    words = ("account", "adopt", "bob@local.example", orphan["account"], "--json")
    assert (await powermail(*words, data=served.data)).json()["adopted"] is False
    assert (await powermail(*words, "--yes", data=served.data)).json()["messages"] == 3
    assert len(await served.read("bob@local.example")) == 3
    assert (await powermail("orphans", data=served.data)).out == "none\n"


async def test_a_node_that_left_the_settings_with_sole_copies_is_refused_with_their_number(served: Served) -> None:
    await served.mailbox("ann@local.example")
    await served.send(["ann@local.example"], b"S: x\r\n\r\nx")
    settings = served.data / "powermail.toml"
    before = settings.read_text()
    await served.stop()
    (message,) = await holders(served)
    kept = [name for name in "abc" if name not in message]
    assert len(kept) == 1
    blocks = before.split("\n[[cluster.nodes]]")
    mine = [block for block in blocks[1:] if f'id = "{kept[0]}"' in block]
    settings.write_text(blocks[0].replace("copies_required = 2", "copies_required = 1") + "\n[[cluster.nodes]]" + mine[0])
    done = await powermail("serve", "--set", 'smtp.listen=["127.0.0.1:0"]', data=served.data)
    assert done.status == 2
    assert f"no longer name node {', '.join(message)}, which holds the only copy of 1 messages" in done.sentence()
    settings.write_text(before)
    await served.start()


async def holders(served: Served) -> list[list[str]]:
    """The nodes of each message of ann."""
    done = await powermail("list", "ann@local.example", "--json", data=served.data)
    return [message["nodes"] for message in done.json()["messages"]]


async def test_progress_and_life_are_shown_and_a_socket_that_is_left_over_is_no_server(served: Served) -> None:
    await served.kill()
    assert (served.data / "control.sock").exists()
    done = await powermail("status", data=served.data)
    assert done.status == 1 and "no server runs on" in done.out
    await served.start()
    done = await powermail("status", "--json", data=served.data)
    assert done.json()["running"] is True
    done = await powermail("verify", data=served.data)
    assert done.out.endswith("0 messages checked, 0 with problems, 0 findings\n")
