"""Joining: the token's names whatever is asked for, once, in time; nothing is sent to who is not the pinned authority."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from powermail.authority.asking import Refusal
from powermail.base import limits
from powermail.base.certificates import facts_of, has_key, make_request
from powermail.base.errors import OperatorError, Trouble
from powermail.base.tls import peer_context
from powermail.storage.layout import LayoutChange, LayoutRow, Standing
from powermail.wire import enrolment as forms
from tests.authority.support import CLUSTER, DAY_S, SOON_S, Listening, Machine, Office, office

FRONT = (f"powermail://{CLUSTER}/front/front-1", f"powermail://{CLUSTER}/keeper/front-1")


@pytest_asyncio.fixture
async def at(tmp_path: Path) -> AsyncIterator[Office]:
    """An authority that listens."""
    async with office(tmp_path) as made:
        yield made


# -- what a member gets -------------------------------------------------------------------------------------------------


async def test_a_machine_gets_the_names_of_its_token_for_ninety_days(at: Office) -> None:
    machine = at.machine()
    joined = await at.join(await at.invite(), machine)
    facts = facts_of(joined.issued.certificate)
    assert facts.uris == FRONT and has_key(joined.issued.certificate, machine.key)
    assert facts.ends_at - at.clock.now() == pytest.approx(90 * DAY_S, abs=60)
    assert (joined.issued.identity, joined.issued.roles, joined.issued.cluster) == ("front-1", ("front", "keeper"), CLUSTER)
    assert joined.issued.settings == {"cluster.copies_required": "3"} and joined.issued.files == {"srs.keys": b"k"}
    (kept,) = await at.index.tokens()
    assert b"copies_required" not in kept.answer and b"srs.keys" not in kept.answer, "secrets of front ends"
    certificate = machine.keep(joined)
    assert certificate.facts == facts
    assert [(one.identity, one.roles) for one in await at.index.holders()] == [("front-1", ("front", "keeper"))]
    (line,) = [line for line in at.log.lines if " joined " in line]
    assert "identity=front-1" in line


async def test_the_certificate_serves_between_machines_in_both_directions(at: Office, tmp_path: Path) -> None:
    """TLS of the library takes it as a server's and as a client's, and nobody else's."""
    machine, node = at.machine("front"), at.machine("node")
    front = machine.keep(await at.join(await at.invite(), machine))
    invited = await at.invite("d", "node", group="rack-d", address="127.0.0.1:2700")
    served = node.keep(await at.join(invited, node))
    heard = asyncio.get_running_loop().create_future()

    def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set_result(writer.get_extra_info("peercert")["subjectAltName"])
        writer.write(b"hello")

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=served.server())
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=front.client(), server_hostname="")
    assert await reader.readexactly(5) == b"hello"
    assert await heard == tuple(("URI", uri) for uri in FRONT)
    assert ("URI", f"powermail://{CLUSTER}/node/d") in writer.get_extra_info("peercert")["subjectAltName"]
    writer.close()
    server.close()


def foreign_request(key: bytes) -> bytes:
    """A request for all kinds of names, and for being an authority."""
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    names = [x509.UniformResourceIdentifier(f"powermail://{CLUSTER}/operator/root"), x509.DNSName("example.org")]
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


async def test_names_in_a_request_are_not_looked_at(at: Office) -> None:
    """A token of another role gives that role, whoever asks for more."""
    machine = at.machine()
    machine.request = foreign_request(machine.key)
    joined = await at.join(await at.invite("k", "keeper"), machine)
    read = x509.load_der_x509_certificate(joined.issued.certificate)
    assert facts_of(joined.issued.certificate).uris == (f"powermail://{CLUSTER}/keeper/k",)
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert not names.get_values_for_type(x509.DNSName)
    assert not read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "k"


async def test_a_node_enters_the_layout_with_what_its_token_says(at: Office) -> None:
    token = await at.invite("d", "node", group="rack-d", priority=2, address="192.0.2.4:2700")
    joined = await at.join(token, at.machine(), "198.51.100.1:1")
    assert (joined.issued.group, joined.issued.priority, joined.issued.address) == ("rack-d", 2, "192.0.2.4:2700")
    assert not joined.issued.settings and not joined.issued.files, "it asks no index"
    keeper = await at.join(await at.invite("keeper-1", "keeper"), at.machine("keeper"))
    assert keeper.issued.settings and not keeper.issued.files
    assert (await at.index.layout()).row("d") == LayoutRow("d", "rack-d", "192.0.2.4:2700", priority=2)
    other = await at.join(await at.invite("e", "node", group="rack-e"), at.machine("e"), "192.0.2.5:2700")
    assert other.issued.address == "192.0.2.5:2700"
    row = (await at.index.layout()).row("e")
    assert row is not None and row.address == "192.0.2.5:2700"


async def test_an_answer_that_is_given_again_moves_no_node_and_brings_none_back(at: Office) -> None:
    token, machine = await at.invite("d", "node", group="rack-d", address="192.0.2.4:2700"), at.machine()
    await at.join(token, machine)
    await at.index.change_layout([LayoutChange("d", "rack-x", "192.0.2.9:2700", priority=3)], (await at.index.layout()).version)
    moved = (await at.index.layout()).row("d")
    assert (await at.join(token, machine)).issued.identity == "d"
    assert (await at.index.layout()).row("d") == moved
    for state in (Standing.LEAVING, Standing.EXPELLED):
        await at.index.change_layout([LayoutChange("d", state=state)], (await at.index.layout()).version)
    assert (await at.join(token, machine)).issued.identity == "d"
    assert (await at.index.layout()).row("d") is None


async def test_a_node_without_an_address_may_ask_again_with_one(at: Office) -> None:
    token, machine = await at.invite("d", "node", group="rack-d"), at.machine()
    for address in ("", "nowhere", ":2700"):
        with pytest.raises(Refusal, match="say where"):
            await at.join(token, machine, address)
    assert (await at.join(token, machine, "192.0.2.5:2700")).issued.identity == "d"
    assert at.refused("address") == 3


async def test_a_node_says_where_it_stands_and_stays_where_it_was_put_since(at: Office) -> None:
    token, machine = await at.invite("d", "node", group="rack-d", address="192.0.2.4:2700"), at.machine()
    with pytest.raises(Refusal, match="a word"):
        await at.join(token, machine, site="two words")
    assert at.refused("site") == 1
    first = await at.join(token, machine, site="north")
    row = (await at.index.layout()).row("d")
    assert first.issued.site == "north" and row is not None and row.site == "north"
    await at.index.change_layout([LayoutChange("d", site="south")])
    assert (await at.join(token, machine, site="west")).issued.site == "north", "the same answer"
    row = (await at.index.layout()).row("d")
    assert row is not None and row.site == "south"


# -- a token is used once -----------------------------------------------------------------------------------------------


async def test_the_same_request_again_gets_the_same_answer_and_another_none(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    first = await at.join(token, machine)
    assert (await at.join(token, machine)).issued == first.issued, "an answer that was lost costs nothing"
    for other in (at.machine("other"), Machine(at.world, at.directory / "again", machine.key)):
        with pytest.raises(Refusal, match="used already") as caught:
            await at.join(token, other)
        assert caught.value.why == "used"
    assert at.refused("used") == 2


async def test_of_many_machines_at_once_one_gets_in(at: Office) -> None:
    token = await at.invite()
    machines = [at.machine(f"m{number}") for number in range(5)]
    answers = await asyncio.gather(*(at.join(token, machine) for machine in machines), return_exceptions=True)
    assert sum(not isinstance(answer, BaseException) for answer in answers) == 1
    assert all(isinstance(answer, Refusal) for answer in answers if isinstance(answer, BaseException))


async def test_an_expired_token_gets_nothing_but_an_answer_that_was_given_is_given_again(at: Office) -> None:
    machine, token = at.machine(), await at.invite()
    joined = await at.join(token, machine)
    late = await at.invite("late")
    at.clock.ahead_s += 3601.0
    with pytest.raises(Refusal, match="time is over") as caught:
        await at.join(late, at.machine("late"))
    assert caught.value.why == "ended" and at.refused("ended") == 1
    assert (await at.join(token, machine)).issued == joined.issued
    assert [one.identity for one in await at.index.holders()] == ["front-1"]


# -- secrets ------------------------------------------------------------------------------------------------------------


async def test_guesses_are_counted_bounded_and_told_nothing(at: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AUTH_FAILURES_PER_MINUTE_MAX", (1000, 1000, 1000))
    monkeypatch.setattr(limits, "TOKEN_GUESSES_MAX", 3)
    token, machine = await at.invite(), at.machine()
    told = set()
    for number in range(3):
        with pytest.raises(Refusal) as caught:
            await at.join(token._replace(secret=bytes([number]) * 16), machine)
        told.add(str(caught.value))
    with pytest.raises(Refusal) as caught:
        await at.join(token._replace(id="f" * 16), machine)
    assert told == {str(caught.value)}, "no such token, and a wrong secret, are told apart by nobody"
    assert at.refused("token") == 4
    with pytest.raises(Refusal, match="guessed at"):
        await at.join(token, machine)
    assert await at.index.holders() == []
    assert not [line for line in at.log.lines if token.secret.hex() in line]


async def test_an_address_that_guesses_too_much_is_not_heard_for_a_while(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    for number in range(limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
        with pytest.raises(Refusal):
            await at.join(token._replace(id=f"{number:016x}", secret=b"x" * 16), machine)
    with pytest.raises(Refusal, match="wait a minute"):
        await at.join(token, machine)
    assert at.refused("guessing") == 1
    assert await at.index.holders() == []


# -- who is asked ---------------------------------------------------------------------------------------------------------


def stranger(tmp_path: Path) -> Office:
    """Another authority."""
    directory = tmp_path / "stranger"
    directory.mkdir()
    return Office(directory)


async def impostor(at: Office, context: ssl.SSLContext, greeting: bytes, token: forms.Token) -> tuple[Listening, BaseException]:
    """Joins at somebody else; who that was, and what the machine said."""
    made: list[Listening] = []

    def make() -> Listening:
        made.append(Listening(greeting))
        return made[-1]

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0, ssl=context)
    at.port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises((OperatorError, Trouble)) as caught:
            await at.join(token, at.machine())
        async with asyncio.timeout(SOON_S):
            await made[0].ended.wait()
    finally:
        server.close()
    return made[0], caught.value


async def test_nothing_is_sent_to_another_authority(at: Office, tmp_path: Path) -> None:
    """Whoever answers in its place: of another authority, honest about it or not; a member that is no authority."""
    token = await at.invite()
    other = stranger(tmp_path)
    greeting, theirs = forms.frame(at.greeting), forms.frame(other.greeting)
    machine = at.machine("member")
    member = machine.write(at.issue("d", "node", "front", key=machine.key), at.certificate)
    stale = at.machine("stale")
    ended = stale.write(at.issue("first", "authority", key=stale.key, begun_days_ago=91.0), at.certificate)
    for context, said, why in (
        (other.own.joining(), theirs, "another authority answers"),
        (other.own.joining(), greeting, "not signed by the authority"),
        (member.joining(), greeting, "not its authority"),
        (ended.joining(), greeting, "is it right"),
        (at.own.joining(), forms.frame(forms.Greeting(1, 1, "other", at.authority.der)), "not its authority"),
        (at.own.joining(), forms.frame(forms.Greeting(1, 1, CLUSTER, b"rubbish")), "no certificate"),
        (at.own.joining(), forms.frame(forms.Greeting(7, 9, CLUSTER, at.authority.der)), "version 7 to 9"),
        (at.own.joining(), forms.frame(forms.Refused("no", "go away")), "cannot be read"),
        (at.own.joining(), b"220 mx.example.org ESMTP\r\n", "no authority"),
        (at.own.joining(), b"\xff" * 8, "a frame of"),
    ):
        listening, error = await impostor(at, context, said, token)
        assert why in str(error), error
        assert listening.heard == b"", why
    found = await at.index.find_token(token.id)
    assert found is not None and found.used_at is None and found.failures == 0


async def test_a_certificate_for_another_key_is_of_no_use(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    machine.key = at.machine("other").key  # what was asked for is not what is held
    with pytest.raises(OperatorError, match="for another key"):
        await at.join(token, machine)


async def test_a_clock_that_is_wrong_is_named(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    late, early = machine.world.clock, at.clock
    assert late is early
    for ahead_s in (-500 * DAY_S, 100 * DAY_S):
        at.clock.ahead_s = ahead_s
        with pytest.raises(OperatorError, match="the clock of this machine says"):
            await at.join(token, machine)
    at.clock.ahead_s = 0.0
    assert (await at.join(token, machine)).issued.identity == "front-1"


async def test_an_authority_that_is_away_or_breaks_off_is_trouble(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    await at.close()
    with pytest.raises(Trouble, match="cannot be reached"):
        await at.join(token, machine)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", at.port)
    with pytest.raises(Trouble, match="cannot be reached"):
        await at.join(token, machine)
    server.close()
    await at.open(port=at.port)
    assert (await at.join(token, machine)).issued.identity == "front-1"


async def test_trouble_of_the_index_uses_no_token_up(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    at.index.fail_next(kept=False)
    with pytest.raises(Trouble, match="not now"):
        await at.join(token, machine)
    at.index.fail_next(kept=True)
    with pytest.raises(Trouble, match="not now"):
        await at.join(token, machine)
    assert (await at.join(token, machine)).issued.identity == "front-1", "it was used by this request"


# -- what is asked --------------------------------------------------------------------------------------------------------


async def say(at: Office, *octets: bytes, pause: bool = False) -> bytes:
    """Says that to the authority over TLS, without a certificate; all that is answered behind the greeting."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with asyncio.timeout(SOON_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port, ssl=context, server_hostname="")
        greeting = await reader.readexactly(len(forms.frame(at.greeting)))
        assert greeting == forms.frame(at.greeting)
        for each in octets:
            writer.write(each)
            await writer.drain()
        answer = await reader.read()
        writer.close()
    return answer


def why(answer: bytes) -> str:
    """The word of a refusal."""
    refused = forms.unpack_answer(answer[4:])
    assert isinstance(refused, forms.Refused)
    return refused.why


async def test_what_is_no_question_is_refused_and_counted(at: Office) -> None:
    token, machine = await at.invite(), at.machine()
    join = forms.frame(forms.Join(1, token.id, token.secret, machine.request))
    rsa_key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(ValueError, match="elliptic"):
        make_request(rsa_key)
    damaged = machine.request[:-2] + bytes([machine.request[-2] ^ 1, machine.request[-1]])
    other_curve = _request(ec.generate_private_key(ec.SECP384R1()))
    for octets, word in (
        (b"\xff\xff\xff\xff", "oversized"),
        (join + join, "order"),
        (b"\x05\x00\x00\x00hello", "malformed"),
        (forms.frame(forms.Refused("x", "y")), "malformed"),
        (forms.frame(forms.Join(2, token.id, token.secret, machine.request)), "version"),
        (forms.frame(forms.Renew(1, machine.request)), "no_name"),
        (forms.frame(forms.Join(1, token.id, token.secret, b"rubbish")), "request"),
        (forms.frame(forms.Join(1, token.id, token.secret, damaged)), "request"),
        (forms.frame(forms.Join(1, token.id, token.secret, other_curve)), "request"),
    ):
        assert why(await say(at, octets)) == word
        assert at.refused(word) >= 1
    found = await at.index.find_token(token.id)
    assert found is not None and found.used_at is None
    assert (await at.join(token, machine)).issued.identity == "front-1"


def _request(key: ec.EllipticCurvePrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


async def test_who_says_nothing_or_no_tls_is_cut_off(at: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.timeout(SOON_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(b"EHLO client.example\r\n")
        said = await reader.read()
        writer.close()
        while not at.refused("tls"):
            await asyncio.sleep(0.005)
    assert b"PowerMail" not in said and forms.frame(at.greeting) not in said
    monkeypatch.setattr(limits, "ENROLMENT_TIMEOUT_S", 0.05)
    (service,) = at._services
    async with asyncio.timeout(SOON_S):
        silent = asyncio.ensure_future(say(at))
        while not at.refused("silent"):
            await service.step()
            await asyncio.sleep(0.01)
        await asyncio.gather(silent, return_exceptions=True)


async def test_one_address_has_few_connections(at: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [await asyncio.open_connection("127.0.0.1", at.port) for _ in range(limits.ENROLMENT_CONNECTIONS_PER_ADDRESS_MAX)]
    reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
    async with asyncio.timeout(SOON_S):
        assert await reader.read() == b""
    assert at.world.counters.get("enrolment.connections_refused") == 1
    for _, each in [*ends, (reader, writer)]:
        each.close()


async def test_a_certificate_of_another_authority_does_not_come_in(at: Office) -> None:
    machine = at.machine()
    theirs = stranger(at.directory).own.paths
    context = peer_context(False, theirs[0], theirs[1], at.own.paths[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", at.port, ssl=context, server_hostname="")
    writer.write(forms.frame(forms.Renew(1, machine.request)))
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    async with asyncio.timeout(SOON_S):
        while not at.refused("tls"):
            await asyncio.sleep(0.005)
