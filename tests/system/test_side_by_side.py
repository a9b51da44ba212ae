"""P19: the program of the commit before and this one serve one cluster side by side, while one takes the other's place."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.noded.certificates import Authority, uris
from tests.servers import Database
from tests.system import before
from tests.system.before import Before, unpack_before
from tests.system.process import START_S, command, make
from tests.system.several import Several
from tests.system.test_nodes_over_network import NODES, NodeServed

ANN = "ann@local.example"


class Cluster:
    """Nodes a, b and c, each a machine; one machine that keeps and receives, and one that receives; one PostgreSQL."""

    def __init__(self, root: Path, old: Before, database: str) -> None:
        self.old = old
        first, second = root / "first", root / "second"
        make(first, old.environment)
        cluster = msgspec.json.decode((first / "nodes/a/identity").read_bytes())["cluster"]
        authority = Authority(root)
        self.nodes = {
            name: NodeServed(name, root / f"node-{name}", first / "nodes" / name, authority, cluster) for name in NODES
        }
        head = ['hostname = "local.example"', "[cluster]", "copies_required = 2"]
        for name, node in self.nodes.items():
            head += ["[[cluster.nodes]]", f'id = "{name}"', f'address = "127.0.0.1:{node.port}"', f'group = "{NODES[name]}"']
        second.mkdir()
        for data in (first, second):
            certificate, key = authority.issue(*uris(cluster, data.name, "front", "keeper", "operator"))
            peers = [f'certificate = "{certificate}"', f'key = "{key}"', f'authority = "{authority.path}"']
            rest = ["[index]", f'database = "{database}"', "[directory]", f'path = "{first}/directory.db"']
            rest += ["[tls]", f'certificate = "{first}/tls/certificate.pem"', f'key = "{first}/tls/key.pem"']
            (data / "powermail.toml").write_text("\n".join([*head, "[peers]", *peers, *rest]) + "\n")
        self.first, self.second = Several(first, "front,keeper"), Several(second, "front")
        self.first.environment = old.environment
        for node in self.nodes.values():
            node.environment = old.environment
        self.sent: list[bytes] = []
        self.unknown: list[bytes] = []

    def migrate(self, environment: dict[str, str] | None) -> None:
        """As an operator does it, by the command of one of the two programs."""
        done = command("index", "migrate", "--data", str(self.first.data), environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr

    async def renew(self, name: str) -> None:
        """A node goes on with this program, where it was."""
        await self.nodes[name].end(signal.SIGTERM)
        self.nodes[name].environment = None
        await self.nodes[name].start()

    async def works(self, what: str, *places: Several) -> None:
        """All nodes are there; mail goes in at each place, and all that ever went in comes out of each, once."""
        for place in places:
            await place.until(f"{what}: nodes take mail", _all_take_mail, START_S)
        for place in places:
            await self._send(place, f"{what}, {place.data.name} ")
        for place in places:
            found = await _read(place, self.sent)
            assert len(found) == len(set(found)), (what, place.data.name)
            assert set(self.sent) <= set(found) <= {*self.sent, *self.unknown}, (what, place.data.name)

    async def _send(self, place: Several, text: str) -> None:
        """One message, until it is taken: just behind the start of two nodes at once there may be too few for a moment."""
        async with asyncio.timeout(START_S):
            while True:
                body = b"S: %d\r\n\r\n%s\r\n" % (len(self.sent) + len(self.unknown), text.encode() * 40)
                reply = await place.send([ANN], body.removesuffix(b"\r\n"))
                if reply.startswith("250"):
                    self.sent.append(body)
                    return
                assert not reply or reply.startswith("4"), reply
                if not reply:  # closed: nobody knows whether it was stored, and it is not sent again
                    self.unknown.append(body)
                await asyncio.sleep(0.1)

    async def end(self, *places: Several) -> None:
        """Ends front ends and keepers in good order."""
        for place in places:
            assert await place.end() == 0, place.log.read_text()
            assert not place.events("bug"), place.events("bug")


def _all_take_mail(status: dict[str, object]) -> bool:
    nodes = status["nodes"]
    assert isinstance(nodes, list)
    return len(nodes) == len(NODES) and all(node["state"] == "read-write" for node in nodes)


async def _read(place: Several, wanted: Sequence[bytes]) -> Sequence[bytes]:
    """All that ann has, when what is wanted is there."""
    async with asyncio.timeout(START_S):
        while True:
            try:
                found = await place.read(ANN)
            except (OSError, IndexError, ValueError, AssertionError, asyncio.IncompleteReadError):
                found = []  # another session has the maildrop, or readers wait
            if set(wanted) <= set(found):
                return found
            await asyncio.sleep(0.1)


@pytest.mark.timeout(300)
async def test_the_commit_before_and_this_one_serve_one_cluster_side_by_side(
    tmp_path: Path, postgresql: Database, record_property: Callable[[str, object], None]
) -> None:
    """Old nodes with a new front end, new nodes with an old one, one index whose schema is brought forward while the old
    program works with it: at each step mail goes in at both front ends, and all comes out at both.
    """
    old = await asyncio.to_thread(unpack_before, tmp_path / "before")
    record_property("said", f"P19: the program that ran beside this one was {old.words}")
    cluster = await asyncio.to_thread(Cluster, tmp_path, old, postgresql.url)
    first, second = cluster.first, cluster.second
    try:
        await asyncio.to_thread(cluster.migrate, old.environment)
        await asyncio.gather(*(node.start() for node in cluster.nodes.values()), first.start())
        await first.mailbox(ANN)
        await cluster.works("all is old", first)
        await asyncio.to_thread(cluster.migrate, None)
        await cluster.works("the schema is new", first)
        await second.start()
        await cluster.works("a new front end, old nodes", first, second)
        await cluster.renew("a")
        await cluster.works("nodes of both", first, second)
        await asyncio.gather(*(cluster.renew(name) for name in NODES if name != "a"))
        await cluster.works("an old front end, new nodes", first, second)
        await cluster.end(first)
        first.environment = None
        await first.start()
        await cluster.works("all is new", first, second)
        verified = await first.operation("verify")
        assert isinstance(verified, dict) and verified["problems"] == []
        await cluster.end(second, first)
    finally:
        for place in (first, second):
            await place.end(signal.SIGKILL) if place.begun else None
        for node in cluster.nodes.values():
            await node.end(signal.SIGKILL) if node.begun else None


def test_the_commit_before_is_found_in_whole_and_shallow_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one that differs in what is spoken or stored; where there is none, that is said."""
    whole, shallow, none = tmp_path / "whole", tmp_path / "shallow", tmp_path / "none"

    def git(*words: str) -> str:
        said = ["git", "-C", str(whole), "-c", "user.name=x", "-c", "user.email=x@x.example", *words]
        return subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip()

    (whole / "src/powermail/wire").mkdir(parents=True)
    git("init", "-q")
    for path in ("src/powermail/wire/first", "src/powermail/wire/second", "src/powermail/other"):
        (whole / path).touch()
        git("add", ".")
        git("commit", "-q", "-m", path)
    subprocess.run(["git", "clone", "-q", "--depth", "1", whole.as_uri(), str(shallow)], capture_output=True, check=True)
    none.mkdir()
    for root, commit in ((whole, git("rev-parse", "HEAD~2")), (shallow, ""), (none, "")):
        monkeypatch.setattr(before, "ROOT", root)
        assert before.commit_before() == commit
        old = before.unpack_before(tmp_path / "unpacked")
        assert old.environment["PYTHONPATH"] == str((tmp_path / "unpacked" if commit else root) / "src")
        assert ("this tree itself" in old.words) is not bool(commit)
    assert [path.name for path in (tmp_path / "unpacked/src/powermail/wire").iterdir()] == ["first"]
    (shallow / "src/powermail/wire/first").write_text("edited")
    monkeypatch.setattr(before, "ROOT", shallow)
    assert before.commit_before() == git("rev-parse", "HEAD"), "beside what is not committed yet"
