"""`powermail config check` on each kind of machine of a cluster: every finding is true, and none is missing."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from powermail.app.joining import Place, settings_of
from powermail.base.certificates import Authority, as_pem, make_authority, make_key, make_request
from powermail.base.log import NullLog
from powermail.base.settings_text import with_values
from powermail.base.tls import make_self_signed
from powermail.base.world import system_world
from powermail.index.sqlite import cluster_of
from powermail.storage.identity import make_store
from powermail.storage.layout import Layout, LayoutRow, format_layout
from powermail.wire import enrolment as forms
from tests.cli.support import powermail
from tests.cli.test_config_check import found, said
from tests.servers import Database

CLUSTER = "5c" * 16
DAY_S = 86_400.0
ROWS = tuple(LayoutRow(name, f"rack-{name}", f"127.0.0.1:{number}") for number, name in enumerate("abc", 2700))


class Joined:
    """A machine that has joined a cluster, as `powermail join` leaves it; its files are to be spoilt."""

    def __init__(self, root: Path, identity: str, *roles: str, index: str = "", directory: str = "") -> None:
        self.data, self.world = root / identity, system_world(NullLog())
        (self.data / "tls").mkdir(parents=True, mode=0o700)
        self.data.chmod(0o700)
        self.authority_pem, self.authority_key = make_authority(CLUSTER, time.time())
        self.key = make_key()
        self.write("tls/authority.pem", self.authority_pem)
        self.write("tls/peer.key", self.key)
        self.certify(identity, roles)
        settings = {"index.database": f'"{index}"'} if index else {}
        settings |= {"directory.backend": '"postgresql"', "directory.database": f'"{directory}"'} if directory else {}
        issued = forms.Issued(b"", CLUSTER, identity, roles, f"rack-{identity}", 1, f"127.0.0.1:{free_port()}", settings)
        self.write(
            "powermail.toml", settings_of(issued, "127.0.0.1:2701", Place(str(self.data), hostname="localhost")).encode()
        )
        if "node" in roles:
            (self.data / "nodes").mkdir()
            make_store(self.world.disk, str(self.data / "nodes" / identity), CLUSTER, identity, self.world.entropy)
            self.set("cluster.reserve_octets=0")
        else:
            self.write("srs.keys", b"00\n")
            self.write("layout", format_layout(Layout(3, ROWS), CLUSTER))
        if "front" in roles:
            for name, octets in zip(("certificate.pem", "key.pem"), self_signed(), strict=True):
                self.write(f"tls/{name}", octets)

    def write(self, name: str, octets: bytes) -> None:
        path = self.data / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(octets)
        path.chmod(0o600)

    def certify(
        self, identity: str, roles: tuple[str, ...], days: float = 90.0, cluster: str = CLUSTER, ago_s: float = 0.0
    ) -> None:
        """Gives it a certificate of its authority."""
        authority = Authority(self.authority_pem, self.authority_key)
        uris = [f"powermail://{cluster}/{role}/{identity}" for role in roles]
        self.write("tls/peer.pem", as_pem(authority.issue(make_request(self.key), identity, uris, time.time() - ago_s, days)))

    def set(self, *values: str) -> None:
        """Changes numbers of the settings."""
        path = self.data / "powermail.toml"
        for value in values:
            name, _, number = value.partition("=")
            section, _, key = name.partition(".")
            path.write_text(path.read_text().replace(f"[{section}]\n", f"[{section}]\n{key} = {number}\n"))

    def said(self, *words: str) -> str:
        return said(str(self.data), *words)


def self_signed() -> tuple[bytes, bytes]:
    """What a front end shows to clients, as `join` makes it."""
    return make_self_signed("localhost", datetime.now(UTC))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_server(text: str) -> str:
    """But what is true of the server of these tests, whoever asks it."""
    return "\n".join(line for line in text.splitlines() if "fsync is off" not in line)


# -- nodes -------------------------------------------------------------------------------------------------------------------


def test_a_machine_of_a_node_needs_no_directory_no_index_and_no_doors(tmp_path: Path) -> None:
    node = Joined(tmp_path, "d", "node")
    assert node.said() == ""
    with socket.socket() as taken:  # the doors of a front end are no matter of it
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert node.said("--set", f'smtp.listen=["127.0.0.1:{taken.getsockname()[1]}"]') == ""
        text = node.said("--set", f'peers.listen=["127.0.0.1:{taken.getsockname()[1]}"]')
        assert "peers.listen: 127.0.0.1" in text and "something else has it" in text
        with open(node.data / "lock", "w") as lock:  # as a process that serves nodes alone: no operator reaches it
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert node.said("--set", f'peers.listen=["127.0.0.1:{taken.getsockname()[1]}"]') == ""


@pytest.mark.parametrize("name", ["tls/peer.pem", "tls/peer.key", "tls/authority.pem"])
def test_what_a_member_shows_to_others_is_looked_at_on_a_machine_of_a_node(tmp_path: Path, name: str) -> None:
    node = Joined(tmp_path, "d", "node")
    path = node.data / name
    whole = path.read_bytes()
    for octets in (b"", b"no certificate", whole[: len(whole) // 2], b"\xff\xfe"):
        path.write_bytes(octets)
        assert "peers" in node.said(), octets
    path.unlink()
    assert f"{path} cannot be read" in node.said()
    path.write_bytes(whole)
    path.chmod(0o644)
    assert ("everybody may read it" in node.said()) is name.endswith(".key")
    path.chmod(0o600)
    assert node.said() == ""


def test_a_certificate_that_others_refuse(tmp_path: Path) -> None:
    node = Joined(tmp_path, "d", "node")
    node.certify("d", ("node",), days=5)
    assert "peer.pem ends in 5 days" in node.said()
    node.certify("d", ("node",), ago_s=91 * DAY_S)
    assert "is good from" in node.said()
    node.certify("e", ("node",))
    assert "does not name it: nobody speaks to it" in node.said()
    node.certify("d", ("node",), cluster="6d" * 16)
    assert "has no name in cluster" in node.said()
    node.write("tls/peer.key", make_key())
    assert "is not the key of" in node.said()


# -- front ends and keepers ----------------------------------------------------------------------------------------------------


def test_a_front_end_needs_no_nodes_of_its_own(tmp_path: Path, postgresql: Database) -> None:
    front = Joined(tmp_path, "front-2", "front", index=postgresql.url, directory=postgresql.url)
    text = front.said()
    assert "there are no nodes" not in text and "init" not in text.replace("powermail directory init", "")
    assert "no tables of the index" in text and "has no table accounts" in text, "which it does use"
    words = (
        "--set",
        "directory.backend=postgresql",
        "--set",
        f"directory.database={postgresql.url}",
        "--data",
        str(front.data),
    )
    assert powermail("directory", "init", *words).status == 0
    assert powermail("index", "migrate", "--data", str(front.data)).status == 0
    assert without_server(front.said()) == ""
    front.write("layout", format_layout(Layout(4, ROWS[:2]), CLUSTER))
    assert "2 copies in 2 groups: no mail is taken while one is away" in front.said(), "of the cluster, as its layout says"
    front.write("layout", format_layout(Layout(4, (*ROWS[:2], LayoutRow("far", "x", "nowhere.powermail.invalid:1"))), CLUSTER))
    assert "node far: the name servers do not know nowhere.powermail.invalid" in front.said()
    front.write("layout", b"damaged")
    assert "layout is damaged" in front.said()
    (front.data / "layout").unlink()
    (front.data / "srs.keys").unlink()
    assert "srs.keys is missing" in front.said()
    front.certify("front-2", ("keeper",))
    assert "there are no nodes" not in front.said()
    assert "does not name the role front" in front.said("--roles", "front")


def test_a_front_end_of_an_index_in_a_file_is_told_that_this_cannot_be(tmp_path: Path) -> None:
    front = Joined(tmp_path, "front-2", "front")
    assert "roles: --roles front: roles are processes of their own where the index is in a database" in front.said()


def test_a_keeper_has_no_doors_and_no_certificate_for_clients(tmp_path: Path, postgresql: Database) -> None:
    keeper = Joined(tmp_path, "keeper-2", "keeper", index=postgresql.url, directory=postgresql.url)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = keeper.said("--set", f'smtp.listen=["127.0.0.1:{port}"]', "--set", "hostname=nowhere.powermail.invalid")
        assert "tls" not in text and "smtp" not in text and "hostname" not in text and "no tables of the index" in text
        assert "metrics: 127.0.0.1" in keeper.said("--set", f'metrics.listen=["127.0.0.1:{port}"]')


# -- the first machine and the authority ---------------------------------------------------------------------------------------


def test_the_first_machine_of_a_cluster(data: str) -> None:
    words = ("--listen", f"127.0.0.1:{free_port()}", "--id", "head")
    assert powermail("cluster", "init", *words, "--data", data).status == 0
    assert found(data) == []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = f'peers.authority_listen=["127.0.0.1:{taken.getsockname()[1]}"]'
        assert "peers.authority_listen: 127.0.0.1" in said(data, "--set", at)
    key = Path(data, "authority/key.pem")
    whole = key.read_bytes()
    key.chmod(0o640)
    assert "it makes members of the cluster" in said(data)
    key.chmod(0o600)
    for octets in (make_key(), b"", b"\xff"):
        key.write_bytes(octets)
        assert "are of no use" in said(data), octets
    key.unlink()
    assert "certificates are given here, and" in said(data)
    key.write_bytes(whole)
    key.chmod(0o600)
    assert found(data) == []


def test_a_first_machine_without_nodes(tmp_path: Path, postgresql: Database) -> None:
    """It is told to invite nodes, not to make some; and as an authority it needs none, and no directory."""
    data = str(tmp_path / "head")
    assert powermail("init", "--without-nodes", "--data", data).status == 0
    assert "`powermail init` makes three" in str(found(data)), "it is of no cluster yet"
    assert powermail("cluster", "init", "--listen", f"127.0.0.1:{free_port()}", "--data", data).status == 0
    Path(data, "layout").write_bytes(format_layout(Layout(1, ()), cluster_of(f"{data}/index.db")))
    (one,) = found(data)
    assert "no mail is taken" in one["what"] and "node add" in one["cure"]
    assert powermail("index", "move", "--to", postgresql.url, "--data", data).status == 0
    os.unlink(f"{data}/directory.db")
    os.unlink(f"{data}/tls/certificate.pem")
    assert without_server(said(data, "--roles", "authority")) == ""
    assert "directory.db is missing" in said(data, "--roles", "keeper,authority") and "tls:" not in said(
        data, "--roles", "keeper"
    )
    assert "tls: " in said(data)


def test_several_processes_have_figures_at_ports_one_behind_the_other(data: str, postgresql: Database) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = Path(data, "powermail.toml")
        path.write_text(with_values(path.read_text(), {"metrics.listen": [f"127.0.0.1:{port - 2}"]}, "f"))
        words = ("--set", "workers=2", "--set", f"index.database={postgresql.url}")
        assert f"metrics of process 3: port {port} cannot be listened on" in said(data, *words)
        assert "metrics" not in said(data, "--set", f"index.database={postgresql.url}")


# -- damage --------------------------------------------------------------------------------------------------------------------


DAMAGED = (b"", b"{}", b"[]", b"\xff\xfe", b'{"cluster": 7}', b'{"cluster": "\xff"}', os.urandom(200))


def test_a_damaged_identity_is_one_nodes_trouble(data: str, tmp_path: Path) -> None:
    """config check names it; a backup is made all the same, and belongs to the cluster of the others."""
    for octets in DAMAGED:
        Path(data, "nodes/a/identity").write_bytes(octets)
        (one,) = found(data)
        assert one["about"] == "node a" and "is damaged" in one["what"], octets
    done = powermail("backup", str(tmp_path / "backup"), "--data", data)
    assert done.status == 0, done
    for name in "bc":
        Path(data, f"nodes/{name}/identity").write_bytes(b"\xff")
    assert len(found(data)) == 3
    refused = powermail("backup", str(tmp_path / "second"), "--data", data)
    assert refused.status == 2 and "identity" in refused.sentence() and not (tmp_path / "second").exists()


def test_logs_without_their_file_are_named(data: str) -> None:
    for name in ("index.db", "directory.db"):
        os.rename(f"{data}/{name}", f"{data}/{name}.away")
        Path(f"{data}/{name}-wal").write_bytes(b"a log")
    text = said(data)
    assert "index.db-wal was left behind" in text and "directory.db-wal was left behind" in text


def test_a_restore_that_was_broken_off_is_named(data: str) -> None:
    Path(data, "restoring").write_text("powermail restore /backup --yes")
    (one,) = found(data)
    assert "broken off" in one["what"] and "`powermail restore /backup --yes`" in one["cure"]
