"""`cluster init`, `admit`, `expel`, `node add` and `join` as commands: what they say, and what they leave alone."""

from __future__ import annotations

import asyncio
import shutil
import stat
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from powermail.admin.enrolment import wanted_roles
from powermail.app.authority import make_registrar, open_authority, shared_settings
from powermail.app.core import told_by
from powermail.app.joining import Place, join_cluster, settings_of
from powermail.app.noding import NodeProcess
from powermail.app.roles import as_client
from powermail.app.setup import cluster_of_nodes
from powermail.authority.registrar import Registrar
from powermail.authority.service import AuthorityService
from powermail.base.certificates import (
    Authority,
    as_pem,
    check_issued,
    facts_of,
    has_key,
    make_authority,
    make_key,
    make_request,
    pin_of,
)
from powermail.base.disk import SystemDisk
from powermail.base.errors import OperatorError
from powermail.base.log import MemoryLog, NullLog
from powermail.base.settings import load, load_file
from powermail.base.tasks import Tasks
from powermail.base.tls import PeerCertificate
from powermail.base.world import system_world
from powermail.index.sharing import Holder
from powermail.index.sqlite import SqliteIndex, cluster_of
from powermail.storage.identity import make_store
from powermail.wire import enrolment as forms
from tests.cli.support import powermail

TOKEN = f"pm1.{'ab' * 32}.{'01' * 8}.{'02' * 16}"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("node add d --group x --address 192.0.2.1:2700", "no cluster yet"),
        ("node add d", "needs --group"),
        ("node add a --group x", "is a member already"),
        ("node add d --group x --address :2700", "has no host"),
        ("cluster admit front-2", "powermail index move"),
        ("cluster admit front-2 --role king", "none of front, keeper"),
        ("cluster admit d --role node", "invited by `powermail node add`"),
        ("cluster expel nobody", "nobody is called"),
        ("cluster show", "is of no cluster"),
        ("cluster init --listen nowhere", "not host:port"),
        ("cluster init --id no/name", "not a name"),
        (f"join {TOKEN}", "needs --authority"),
        ("join pm1.x --authority 127.0.0.1:1", "a token is"),
        (f"join {TOKEN} --authority nowhere", "not host:port"),
        (f"join {TOKEN} --authority 127.0.0.1:1 --site {'x' * 65}", "is a word"),
        (f"node site a {'x' * 65}", "is not a word"),
        ("node site z north", "no node 'z'"),
        (f"join {TOKEN} --authority 127.0.0.1:1", "an installation of its own"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_nothing_is_made(looked_at: str, words: str, why: str) -> None:
    done = powermail(*words.split(), "--data", looked_at)
    assert done.status in (1, 2) and why in done.sentence()
    data = Path(looked_at)
    assert not (data / "authority").exists() and not (data / "tls/peer.key").exists()
    assert "peers" not in (data / "powermail.toml").read_text()


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    done = powermail("join", TOKEN, "--authority", "127.0.0.1:1", "--data", str(tmp_path))
    assert done.status == 2 and "is not empty (mine)" in done.sentence()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    done = powermail("join", TOKEN, "--authority", "127.0.0.1:1", "--data", str(tmp_path / "new"))
    assert done.status == 1 and "cannot be reached" in done.sentence()


def test_a_token_may_come_where_no_list_of_processes_shows_it() -> None:
    for given, why in ((f"{TOKEN}\n", "not host:port"), ("pm1.x\n", "a token is"), ("", "a token is")):
        assert why in powermail("join", "-", "--authority", "nowhere", given=given).sentence()


def test_no_file_is_written_through_a_link_that_the_owner_of_the_directory_laid(tmp_path: Path) -> None:
    """`join` works as root in the directory of another user, who must not gain root's files by it."""
    victim, tls = tmp_path / "shadow", tmp_path / "data/tls"
    victim.write_bytes(b"root's")
    tls.mkdir(parents=True)
    (tls / "peer.key.new").symlink_to(victim)
    done = powermail("join", TOKEN, "--authority", "127.0.0.1:1", "--data", str(tmp_path / "data"))
    assert done.status != 0 and "peer.key.new" in done.sentence()
    assert victim.read_bytes() == b"root's" and not (tls / "peer.key").exists()


def test_init_may_be_broken_off_and_run_again_and_then_no_more(data: str) -> None:
    there = Path(data)
    assert powermail("cluster", "init", "--data", data).status == 0
    pem, key, settings = (there / name for name in ("tls/authority.pem", "authority/key.pem", "powermail.toml"))
    pin = pin_of(pem.read_bytes())
    assert stat.S_IMODE(key.stat().st_mode) == stat.S_IMODE((there / "tls/peer.key").stat().st_mode) == 0o600
    assert powermail("cluster", "init", "--data", data).sentence().endswith("of a cluster already; nothing was changed")
    text = settings.read_text()
    assert 'authority_listen = ["127.0.0.1:2701"]' in text and "# PowerMail settings" in text
    without = "\n".join(line for line in text.splitlines() if not line.startswith(("[peers]", "authority_")))
    settings.write_text(without)  # it was broken off before its last step
    (there / "tls/peer.pem").unlink()
    assert powermail("cluster", "init", "--listen", "0.0.0.0:2702", "--data", data).status == 0
    assert pin_of(pem.read_bytes()) == pin, "the authority that there was"
    peers = load_file(str(settings)).peers
    assert (peers.authority_listen, peers.authority_at) == (["0.0.0.0:2702"], ["127.0.0.1:2702"])
    settings.write_text(without)
    key.unlink()
    assert "of a cluster already" in powermail("cluster", "init", "--data", data).sentence(), "one that joined is no first one"


def test_who_there_is_and_who_was_expelled(data: str) -> None:
    assert powermail("cluster", "init", "--data", data).status == 0
    assert powermail("cluster", "members", "--data", data, "--json").json() == []
    done = powermail("node", "add", "d", "--group", "rack-d", "--data", data)
    assert done.status == 0 and "the token is shown only now" in done.out
    shown = powermail("node", "add", "d", "--group", "rack-d", "--data", data, "--json").json()
    token = forms.parse_token(shown["token"])
    assert token.pin == pin_of((Path(data) / "tls/authority.pem").read_bytes())
    assert shown["join"] == f"powermail join {shown['token']} --authority 127.0.0.1:2701"
    (member,) = powermail("cluster", "members", "--data", data, "--json").json()
    assert (member["id"], member["state"], member["roles"], member["days_left"]) == ("d", "invited", ["node"], None)
    for words in ((), ("--dry-run",), ("--yes", "--dry-run")):
        done = powermail("cluster", "expel", "d", *words, "--data", data)
        assert "nothing was changed" in done.out
    assert powermail("cluster", "expel", "d", "--yes", "--data", data).status == 0
    (member,) = powermail("cluster", "members", "--data", data, "--json").json()
    assert (member["id"], member["state"]) == ("d", "expelled")
    assert "was expelled" in powermail("node", "add", "d", "--group", "x", "--data", data).sentence()


def test_who_is_needed_is_not_expelled_and_no_name_is_given_to_two(data: str) -> None:
    """What cannot be taken back: the machine that expels itself has no keeper that nodes obey, and no authority that is one."""
    assert powermail("cluster", "init", "--data", data).status == 0

    async def note() -> None:
        index = SqliteIndex(system_world(MemoryLog()), f"{data}/index.db")
        await index.open()
        await index.note_holder("first", ["authority", "front", "keeper", "operator"], 2e9)
        await index.note_holder("front-2", ["front"], 2e9)
        await index.note_holder("a", ["node"], 2e9)
        await index.close()

    asyncio.run(note())
    assert "is this machine itself" in powermail("cluster", "expel", "first", "--yes", "--data", data).sentence()
    assert "`powermail node expel a`" in powermail("cluster", "expel", "a", "--yes", "--data", data).sentence()
    members = powermail("cluster", "members", "--data", data, "--json").json()
    assert {one["id"]: one["state"] for one in members} == {"first": "member", "front-2": "member", "a": "member"}
    for name in ("first", "front-2"):
        done = powermail("node", "add", name, "--group", "rack-d", "--data", data)
        assert f"{name} is a member already, as" in done.sentence()


def test_a_member_that_is_invited_again_keeps_its_roles_unless_others_are_said() -> None:
    """What `cluster admit NAME` is for when a certificate has ended."""
    holders = [Holder("one", ("keeper", "operator"), 1.0, 0.0), Holder("gone", ("keeper",), 1.0, 2.0)]
    assert wanted_roles(holders, "new", []) == ["front"] == wanted_roles(holders, "gone", [])
    assert wanted_roles(holders, "one", []) == ["keeper", "operator"]
    assert wanted_roles(holders, "one", ["front", "front"]) == ["front"]


def test_who_has_no_certificate_of_an_authority_gives_none(data: str) -> None:
    """Nobody who joins would trust it; and of its own the index is told what it is itself, not what its nodes are."""
    assert powermail("cluster", "init", "--data", data).status == 0
    settings, paths = (
        load_file(f"{data}/powermail.toml"),
        [f"{data}/tls/{name}" for name in ("peer.pem", "peer.key", "authority.pem")],
    )
    authority = Authority(Path(paths[2]).read_bytes(), Path(f"{data}/authority/key.pem").read_bytes())

    async def opened(certificate: bytes) -> list[Holder]:
        world = system_world(MemoryLog())
        world.disk.replace_file(paths[0], as_pem(certificate))
        own = PeerCertificate((paths[0], paths[1], paths[2]), world.disk, world.log)
        async with AsyncExitStack() as stack:
            index = SqliteIndex(world, f"{data}/index.db")
            stack.push_async_callback(index.close)
            await index.open()
            await open_authority(stack, world, settings, data, index, own, lambda error: None)
            return await index.holders()

    cluster = cluster_of(f"{data}/index.db")
    request = make_request(Path(paths[1]).read_bytes())

    def issued(*names: str) -> bytes:
        return authority.issue(request, "x", [f"powermail://{cluster}/{name}" for name in names], time.time())

    for names, why in ((("front/first",), "role authority"), (("authority/x", "front/y"), "2 ids"), ((), "no name")):
        with pytest.raises(OperatorError, match=why):
            asyncio.run(opened(issued(*names)))
    (holder,) = asyncio.run(opened(issued("authority/first", "front/first", "node/a", "node/b")))
    assert (holder.identity, holder.roles) == ("first", ("authority", "front"))


def test_a_node_that_is_added_to_the_settings_of_the_first_machine_is_named_by_its_certificate(data: str) -> None:
    """Others speak to nobody as a node who is not named so. One that was expelled is not named again."""
    assert powermail("cluster", "init", "--id", "first", "--data", data).status == 0
    with Path(f"{data}/powermail.toml").open("a") as file:
        for name in ("d", "e"):
            file.write(f'\n[[cluster.nodes]]\nid = "{name}"\npath = "nodes/{name}"\ngroup = "rack-{name}"\n')
    settings = load_file(f"{data}/powermail.toml")
    paths = tuple(f"{data}/tls/{name}" for name in ("peer.pem", "peer.key", "authority.pem"))
    world = system_world(MemoryLog())
    before = facts_of(Path(paths[0]).read_bytes())

    async def opened() -> tuple[PeerCertificate, list[Holder]]:
        own = PeerCertificate((paths[0], paths[1], paths[2]), world.disk, world.log)
        async with AsyncExitStack() as stack:
            index = SqliteIndex(world, f"{data}/index.db")
            stack.push_async_callback(index.close)
            await index.open()
            await index.expel_identity("e")
            await open_authority(stack, world, settings, data, index, own, lambda error: None)
            return own, await index.holders()

    own, holders = asyncio.run(opened())
    cluster = cluster_of(f"{data}/index.db")
    after = facts_of(Path(paths[0]).read_bytes())
    assert set(after.uris) == {*before.uris, f"powermail://{cluster}/node/d"} and own.facts == after
    check_issued(Path(paths[0]).read_bytes(), Path(paths[2]).read_bytes(), time.time())
    assert has_key(Path(paths[0]).read_bytes(), Path(paths[1]).read_bytes())
    assert Path(paths[0]).stat().st_mode & 0o777 == 0o600
    (holder,) = [one for one in holders if one.identity == "first"]
    assert holder.ends_at == after.ends_at and set(holder.roles) == {"front", "keeper", "operator", "authority"}
    octets = Path(paths[0]).read_bytes()
    asyncio.run(opened())
    assert Path(paths[0]).read_bytes() == octets, "once"


async def test_a_machine_without_the_authority_says_how_another_node_of_its_joins(tmp_path: Path) -> None:
    log, cluster = MemoryLog(), "ab" * 16
    world, key = system_world(log), make_key()
    made = make_authority(cluster, time.time())
    uris = [f"powermail://{cluster}/node/d"]
    issued = as_pem(Authority(*made).issue(make_request(key), "d", uris, time.time()))
    for name, octets in (("peer.pem", issued), ("peer.key", key), ("authority.pem", made[0])):
        world.disk.replace_file(f"{tmp_path}/{name}", octets)
    text = '[peers]\nlisten = ["127.0.0.1:0"]\ncertificate = "peer.pem"\nkey = "peer.key"\nauthority = "authority.pem"\n'
    for name in ("d", "e"):
        text += f'[[cluster.nodes]]\nid = "{name}"\npath = "nodes/{name}"\ngroup = "rack-{name}"\n'
        make_store(world.disk, f"{tmp_path}/nodes/{name}", cluster, name, world.entropy)
    broken: list[BaseException] = []
    process = NodeProcess(world, load(text, {}), str(tmp_path), broken.append)
    await process.start()
    await process.stop()
    (line,) = [line for line in log.lines if "the settings name it" in line]
    assert "node=e " in line and "`powermail node add e --group GROUP`" in line and not broken


@pytest.mark.parametrize(
    "settings",
    [
        {"outbound.smarthost_token_command": '"/bin/sh -c id"'},
        {"directory.path": '"/etc/passwd"'},
        {"cluster.nodes": "[]"},
        {'directory."path"': '"/etc/passwd"'},
        {"cluster.copies_required": '2\n[outbound]\nsmarthost_token_command = "id"'},
        {"cluster.x = 1\n[outbound]\nsmarthost_token_command": '"id"'},
    ],
)
def test_an_authority_says_what_all_have_in_common_and_nothing_else(settings: dict[str, str]) -> None:
    """A machine that joins runs no command, and opens no file, that another machine names."""
    issued = forms.Issued(b"", "ours", "front-2", ("front",), settings=settings)
    with pytest.raises(OperatorError, match="the authority says"):
        settings_of(issued, "192.0.2.1:2701", Place("/data"))


def test_a_key_that_others_may_read_or_that_is_another_is_not_used(data: str) -> None:
    assert powermail("cluster", "init", "--data", data).status == 0
    key, settings = Path(data) / "authority/key.pem", load_file(f"{data}/powermail.toml")

    async def refused() -> str:
        world = system_world(MemoryLog())
        index = SqliteIndex(world, f"{data}/index.db")
        with pytest.raises(OperatorError) as caught:
            make_registrar(world, settings, data, index)
        await index.close()
        return str(caught.value)

    key.chmod(0o640)
    assert "chmod 0600" in asyncio.run(refused())
    key.chmod(0o600)
    key.write_bytes((Path(data) / "tls/peer.key").read_bytes())
    assert "the key is not that of the certificate" in asyncio.run(refused())
    key.write_bytes(b"rubbish")
    assert "of no use" in asyncio.run(refused())
    key.unlink()
    assert "cannot be read" in asyncio.run(refused())


def test_front_ends_are_told_what_the_cluster_has_in_common() -> None:
    """Settings of hosts, files and doors are each machine's own."""
    text = """
        hostname = "first.example"
        [cluster]
        copies_required = 3
        tombstone_days = 40.5
        [index]
        database = "postgresql://user@db1,db2/mail"
        wait_s = 1.0
        [directory]
        backend = "postgresql"
        database = "postgresql://user@db1/mail"
        database_password_file = "secret"
        [smtp]
        listen = ["0.0.0.0:25"]
        [outbound]
        srs_domain = "example.org"
        """
    shared = shared_settings(load(text, {}))
    assert shared == {
        "cluster.copies_required": "3",
        "cluster.tombstone_days": "40.5",
        "index.database": '"postgresql://user@db1,db2/mail"',
        "directory.backend": '"postgresql"',
        "directory.database": '"postgresql://user@db1/mail"',
        "outbound.srs_domain": '"example.org"',
    }
    issued = forms.Issued(b"", "ours", "front-2", ("front", "keeper"), settings=shared)
    made = load(settings_of(issued, "192.0.2.1:2701", Place("/data")), {})
    assert made.cluster.copies_required == 3 and made.index.database == "postgresql://user@db1,db2/mail"
    assert made.peers.authority_at == ["192.0.2.1:2701"] and made.smtp.listen != ["0.0.0.0:25"]


def test_a_machine_knows_where_it_stands_by_its_own_word() -> None:
    """Its nodes stand there too; how copies go is the same in all sites, where a machine is not."""
    shared = shared_settings(load('site = "north"\n[cluster]\nsites = "near"', {}))
    assert shared == {"cluster.sites": '"near"'}
    issued = forms.Issued(b"", "ours", "d", ("node",), "rack-d", 1, "192.0.2.4:2700", shared)
    made = load(settings_of(issued, "192.0.2.1:2701", Place("/data", site="south")), {})
    assert made.site == "south" and made.cluster.sites == "near"
    (change,) = told_by(made)
    assert change.site == "south" and told_by(as_client(made))[0].site == "south"
    far = '[[cluster.nodes]]\nid = "far"\naddress = "192.0.2.9:2700"\ngroup = "g"\n'
    other = load(f'site = "north"\n[cluster]\ncopies_required = 1\n{far}', {})
    assert told_by(other)[0].site is None, "what another machine serves stands elsewhere, if nobody says more"


@pytest.mark.parametrize("text", ['site = "two words"', '[cluster]\nsites = "away"', f'site = "{"x" * 65}"'])
def test_sites_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(OperatorError, match="site"):
        load(text, {})


class Office:
    """The authority of an installation that `cluster init` has made, in this process."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.world = system_world(MemoryLog())
        self.index = SqliteIndex(self.world, str(data / "index.db"))

    async def open(self) -> None:
        """Listens on a port of its own."""
        await self.index.open()
        pem = (self.data / "tls/authority.pem").read_bytes()
        authority = Authority(pem, (self.data / "authority/key.pem").read_bytes())
        paths = (f"{self.data}/tls/peer.pem", f"{self.data}/tls/peer.key", f"{self.data}/tls/authority.pem")
        own = PeerCertificate(paths, self.world.disk, self.world.log)
        registrar = Registrar(self.world, self.index, authority, {}, {})
        greeting = forms.Greeting(forms.FIRST, forms.LAST, self.index.cluster, authority.der)
        self.service = AuthorityService(self.world, registrar, greeting, own.joining, Tasks(self.world.log, lambda error: None))
        self.address = f"127.0.0.1:{await self.service.listen('127.0.0.1', 0)}"

    async def close(self) -> None:
        """Ends it."""
        await self.service.close()
        await self.index.rest()
        await self.index.close()


def serve(data: str, story: Callable[[Office], Coroutine[Any, Any, None]]) -> None:
    """Runs a story beside an authority that listens."""

    async def run() -> None:
        office = Office(Path(data))
        await office.open()
        try:
            await story(office)
        finally:
            await office.close()

    asyncio.run(run())


def invite(data: str, name: str) -> str:
    """A token for a node."""
    done = powermail("node", "add", name, "--group", f"rack-{name}", "--data", data, "--json")
    return str(done.json()["token"])


class Dying(SystemDisk):
    """A disk under a process that dies when it writes this file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        if path.endswith(self.name):
            raise OSError(5, "died", path)
        super().replace_file(path, octets, mode)


def files(directory: Path) -> dict[str, bytes]:
    """All that lies there."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["tls/authority.pem", "tls/peer.pem", "powermail.toml"])
def test_join_goes_on_where_it_was_broken_off(data: str, tmp_path: Path, name: str) -> None:
    """Key and request are durable before anybody is asked, so a lost answer is given again; the settings come last."""
    assert powermail("cluster", "init", "--data", data).status == 0
    token, second = invite(data, "d"), tmp_path / "second"
    place = Place(str(second), address="127.0.0.1:2799", listen="127.0.0.1:0")

    async def story(office: Office) -> None:
        dying = system_world(MemoryLog())
        dying.disk = Dying(name)
        with pytest.raises(OSError, match="died"):
            await join_cluster(dying, token, office.address, place)
        before = files(second)
        assert name not in before and "tls/peer.request" in before
        member = await join_cluster(office.world, token, office.address, place)
        assert (member.identity, member.roles, member.renewed) == ("d", ("node",), False)
        after = files(second)
        assert after["tls/peer.key"] == before["tls/peer.key"] and "tls/peer.request" not in after
        assert {path for path in after if before.get(path, after[path]) != after[path]} == set()
        settings = load_file(str(second / "powermail.toml"))
        assert settings.peers.listen == ["127.0.0.1:0"] and settings.peers.authority_at == [office.address]
        (node,) = settings.cluster.nodes
        assert (node.id, node.path, node.group, node.priority) == ("d", "nodes/d", "rack-d", 1)
        row = (await office.index.layout()).row("d")
        assert row is not None and row.address == "127.0.0.1:2799"

    serve(data, story)


def test_a_member_joins_again_for_a_new_certificate_and_for_no_other_name(data: str, tmp_path: Path) -> None:
    assert powermail("cluster", "init", "--data", data).status == 0
    second = tmp_path / "second"
    place = Place(str(second), address="127.0.0.1:2799")
    tokens = {name: invite(data, name) for name in ("d", "e")}

    async def first(office: Office) -> None:
        await join_cluster(office.world, tokens["d"], office.address, place)
        before = files(second)
        with pytest.raises(OperatorError, match=r"is d, and the token was for e.*a new token"):
            await join_cluster(office.world, tokens["e"], office.address, place)
        assert {path: octets for path, octets in files(second).items() if path != "tls/peer.request"} == before

    serve(data, first)
    done = powermail("cluster", "admit", "d", "--role", "node", "--data", data, "--json")

    async def again(office: Office) -> None:
        before = files(second)
        member = await join_cluster(office.world, done.json()["token"], office.address, place)
        assert member.renewed and member.identity == "d"
        changed = {path for path, octets in files(second).items() if before.get(path) != octets}
        assert changed == {"tls/peer.pem"}
        with pytest.raises(OperatorError, match="used already"):
            await join_cluster(office.world, done.json()["token"], office.address, place)

    serve(data, again)


def test_a_first_machine_without_nodes_founds_a_cluster_and_invites_the_nodes(tmp_path: Path) -> None:
    data = str(tmp_path / "head")
    done = powermail("init", "--without-nodes", "--node", "a=x:rack", "--data", data)
    assert done.status == 2 and "contradict each other" in done.sentence() and not Path(data).exists()
    made = powermail("init", "--without-nodes", "--data", data)
    assert made.status == 0 and "made " in made.out and "with no storage nodes and 2 copies" in made.out
    assert "powermail cluster init" in made.out and not (Path(data) / "nodes").exists()
    alone = powermail("node", "list", "--data", data)
    assert alone.status == 2 and "no [[cluster.nodes]] are configured" in alone.sentence()
    founded = powermail("cluster", "init", "--data", data, "--json").json()
    assert founded["cluster"] == cluster_of(f"{data}/index.db")
    invited = powermail("node", "add", "a", "--group", "rack-a", "--address", "127.0.0.1:9", "--data", data)
    assert invited.status == 0 and "powermail join pm1." in invited.out
    assert powermail("node", "list", "--data", data).status == 0


def test_without_nodes_an_index_that_left_its_file_no_more_says_the_cluster(tmp_path: Path) -> None:
    data = tmp_path / "head"
    assert powermail("init", "--without-nodes", "--data", str(data)).status == 0
    settings = data / "powermail.toml"
    settings.write_text(settings.read_text() + '\n[index]\ndatabase = "postgresql://nobody@127.0.0.1:1/x"\n')
    done = powermail("cluster", "init", "--data", str(data))
    assert done.status == 2 and "comes before `powermail index move`" in done.sentence()
    assert not (data / "tls/authority.pem").exists()


def test_a_machine_whose_disks_are_all_new_knows_its_cluster_by_its_certificate(data: str) -> None:
    """Else its process would not start, and `node replace` could not be asked of it."""
    assert powermail("cluster", "init", "--data", data).status == 0
    settings = load_file(f"{data}/powermail.toml")
    before = cluster_of_nodes(system_world(NullLog()), settings, data)
    for node in settings.cluster.nodes:
        shutil.rmtree(f"{data}/{node.path}")
    assert cluster_of_nodes(system_world(NullLog()), settings, data) == before
    (Path(data) / "tls/peer.pem").unlink()
    with pytest.raises(OperatorError, match="are the disks mounted"):
        cluster_of_nodes(system_world(NullLog()), settings, data)
