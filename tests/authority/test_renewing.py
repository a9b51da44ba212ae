"""Renewing: at two thirds of the life, over mutual TLS, with the same names; restarts, an authority that is away, expulsion."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from powermail.authority.asking import Refusal, renew
from powermail.authority.renewing import Renewer, by_network, by_registrar
from powermail.base import limits
from powermail.base.certificates import facts_of, make_key, make_request
from powermail.base.errors import OperatorError, Trouble
from powermail.base.log import MemoryLog
from powermail.base.tasks import Worker
from powermail.base.tls import PeerCertificate
from powermail.wire import enrolment as forms
from powermail.wire.node_identity import parse_names
from tests.authority.support import CLUSTER, DAY_S, SOON_S, Machine, Office, office

NAMES = ("front", "keeper")


@pytest_asyncio.fixture
async def at(tmp_path: Path) -> AsyncIterator[Office]:
    """An authority that listens."""
    async with office(tmp_path) as made:
        yield made


def held(at: Office, *roles: str, days_ago: float = 0.0, identity: str = "front-1") -> tuple[Machine, PeerCertificate]:
    """A machine that got its certificate so many days ago."""
    machine = at.machine(identity)
    issued = at.issue(identity, *(roles or NAMES), key=machine.key, begun_days_ago=days_ago)
    return machine, machine.write(issued, at.certificate)


def renewer(at: Office, certificate: PeerCertificate) -> Renewer:
    """The job of a process with that certificate."""
    addresses = [f"127.0.0.1:{at.port}"]
    return Renewer(at.world, certificate, at.world.lane("t"), by_network(at.world, certificate, addresses))


async def shown(context: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """The certificate that a server with this context shows now."""

    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(nothing, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="")
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    server.close()
    assert isinstance(found, bytes)
    return found


async def test_it_is_renewed_at_two_thirds_of_its_life_and_not_before(at: Office) -> None:
    _, young = held(at, days_ago=58.0)
    before = young.facts
    assert await renewer(at, young).step() == limits.CERTIFICATE_LOOK_S
    assert young.facts == before and at.world.counters.get("authority.renewed") == 0
    machine, old = held(at, days_ago=61.0)
    before = old.facts
    assert await renewer(at, old).step() == limits.CERTIFICATE_LOOK_S
    assert old.facts.uris == before.uris == tuple(f"powermail://{CLUSTER}/{role}/front-1" for role in NAMES)
    assert old.days_left(at.clock.now()) == pytest.approx(90.0, abs=0.1)
    assert (machine.directory / "peer.key").read_bytes() == machine.key
    assert (machine.directory / "peer.pem").stat().st_mode & 0o777 == 0o600
    (holder,) = await at.index.holders()
    assert (holder.identity, holder.roles, holder.ends_at) == ("front-1", ("front", "keeper"), old.facts.ends_at)
    assert [line for line in at.log.lines if " certificate " in line and "renewed=" in line]


async def test_new_connections_show_the_new_one_without_a_restart(at: Office) -> None:
    _, certificate = held(at, "node", days_ago=61.0, identity="d")
    contexts = certificate.server(), certificate.client()
    first = await shown(certificate.server(), certificate.client())
    await renewer(at, certificate).step()
    second = await shown(certificate.server(), certificate.client())
    assert facts_of(first).ends_at < facts_of(second).ends_at
    assert await shown(*contexts) == first, "a generation never changes"


async def test_an_authority_that_is_away_leaves_the_old_one_and_status_says_so(at: Office) -> None:
    _, certificate = held(at, days_ago=61.0)
    port, before = at.port, certificate.facts
    await at.close()
    job = renewer(at, certificate)
    worker = Worker("certificate", job.step, at.clock, at.log, at.broken.append)
    running = asyncio.ensure_future(worker.run())
    async with asyncio.timeout(SOON_S):
        while not worker.trouble:
            await asyncio.sleep(0.005)
    running.cancel()
    assert "cannot be reached" in worker.trouble and "ends in 29.0 days" in worker.trouble
    assert certificate.facts == before
    await at.open(port=port)
    await job.step()
    assert certificate.facts.ends_at > before.ends_at


async def test_the_second_address_is_asked_when_the_first_is_away(at: Office) -> None:
    _, certificate = held(at, days_ago=61.0)
    ask = by_network(at.world, certificate, ["127.0.0.1:1", f"127.0.0.1:{at.port}"])
    await Renewer(at.world, certificate, at.world.lane("t"), ask).step()
    assert certificate.days_left(at.clock.now()) > 89


async def test_a_restart_in_the_middle_goes_on(at: Office) -> None:
    """Asked for and not written; written and not read; the key was never changed, so every state can be started from."""
    machine, certificate = held(at, days_ago=61.0)
    key, request = machine.key, make_request(machine.key)
    await renew(at.world, at.address, certificate.client(), certificate.authority, key, request)  # and then it died
    again = PeerCertificate(certificate.paths, at.world.disk, at.log)
    assert again.facts == certificate.facts
    await renewer(at, again).step()
    assert again.days_left(at.clock.now()) > 89
    assert certificate.reload() and certificate.facts == again.facts, "another process of the same files takes it"
    assert not certificate.reload()


async def test_files_that_are_no_pair_are_not_taken(at: Office) -> None:
    machine, certificate = held(at)
    before = certificate.facts
    other = at.issue("front-1", *NAMES, key=make_key())
    for octets in (b"rubbish", b"", other):
        (machine.directory / "peer.pem").write_bytes(octets)
        assert not certificate.reload() and certificate.facts == before
    assert isinstance(certificate.client(), ssl.SSLContext)
    assert [line for line in at.log.lines if "certificate-bad" in line]
    with pytest.raises(OperatorError, match="between machines"):
        PeerCertificate(certificate.paths, at.world.disk, MemoryLog())


async def test_one_that_has_ended_is_refused_and_says_what_to_do(at: Office) -> None:
    _, certificate = held(at, days_ago=91.0)
    with pytest.raises(Trouble, match="has ended: `powermail join`"):
        await renewer(at, certificate).step()
    _, early = held(at, days_ago=-1.0, identity="early")
    with pytest.raises((Trouble, OperatorError)):
        await renew(at.world, at.address, early.client(), early.authority, make_key(), make_request(make_key()))
    assert at.world.counters.get("authority.renewed") == 0


async def test_who_was_expelled_gets_no_more(at: Office) -> None:
    machine, certificate = held(at, days_ago=61.0)
    await at.index.expel_identity("front-1")
    with pytest.raises(Trouble, match="was expelled"):
        await renewer(at, certificate).step()
    with pytest.raises(Refusal) as caught:
        await renew(at.world, at.address, certificate.client(), certificate.authority, machine.key, machine.request)
    assert caught.value.why == "expelled" and at.refused("expelled") == 2
    assert at.world.counters.get("authority.renewed") == 0


async def test_an_answer_that_was_given_is_not_given_again_to_who_was_expelled(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    await at.join(token, machine)
    await at.index.expel_identity("front-1")
    with pytest.raises(Refusal):
        await at.join(token, machine)


async def test_names_of_nodes_that_were_expelled_are_left_out_of_the_next_one(at: Office) -> None:
    """The first machine has its nodes' names in its certificate; when one of them goes, it keeps the others."""
    machine = at.machine("first")
    uris = [f"powermail://{CLUSTER}/{name}" for name in ("front/first", "authority/first", "node/a", "node/b")]
    issued = at.authority.issue(machine.request, "first", uris, at.clock.now() - 61 * DAY_S)
    certificate = machine.write(issued, at.certificate)
    await at.index.expel_identity("a")
    await Renewer(at.world, certificate, at.world.lane("t"), by_registrar(at.registrar, certificate)).step()
    assert certificate.facts.uris == (uris[0], uris[1], uris[3])
    (holder, _) = sorted(await at.index.holders(), key=lambda one: one.expelled_at)
    assert (holder.identity, holder.roles) == ("first", ("authority", "front"))


async def test_roles_that_were_taken_away_are_not_in_the_next_one_of_an_old_certificate(at: Office) -> None:
    """Who was given fewer roles by a newer token does not get the old ones back by an older certificate and its key."""
    machine, certificate = held(at, "front", "keeper", "operator")
    await at.join(await at.invite("front-1", "front"), at.machine("again"))
    joined = await renew(at.world, at.address, certificate.client(), certificate.authority, machine.key, machine.request)
    assert facts_of(joined.issued.certificate).uris == (f"powermail://{CLUSTER}/front/front-1",)
    (holder,) = await at.index.holders()
    assert holder.roles == ("front",) == joined.issued.roles
    await at.join(await at.invite("front-1", "authority"), at.machine("third"))
    with pytest.raises(Refusal) as caught:
        await renew(at.world, at.address, certificate.client(), certificate.authority, machine.key, machine.request)
    assert caught.value.why == "roles" and at.refused("roles") == 1


async def test_only_names_of_this_cluster_are_renewed(at: Office) -> None:
    ask = forms.Renew(1, make_request(make_key()))
    for uri, why in (("powermail://theirs/front/front-1", "cluster"), ("urn:x", "no_name")):
        answer = await at.registrar.answer(ask, parse_names([("URI", uri)]), "192.0.2.1")
        assert isinstance(answer, forms.Refused) and answer.why == why
    names = parse_names([("URI", f"powermail://{CLUSTER}/front/{name}") for name in ("x", "y")])
    answer = await at.registrar.answer(ask, names, "192.0.2.1")
    assert isinstance(answer, forms.Refused) and answer.why == "name"


async def test_certificates_made_by_hand_are_taken_when_they_change_and_not_renewed(at: Office) -> None:
    machine, certificate = held(at, days_ago=80.0)
    job = Renewer(at.world, certificate, at.world.lane("t"), None)
    assert await job.step() == limits.CERTIFICATE_LOOK_S
    machine.write(at.issue("front-1", *NAMES, key=machine.key), at.certificate)
    await job.step()
    assert certificate.days_left(at.clock.now()) > 89
