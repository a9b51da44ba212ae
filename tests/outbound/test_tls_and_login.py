"""TLS and logging in to a next hop, on real sockets: `opportunistic` goes on in clear and says so, `required` never does."""

from __future__ import annotations

import base64
import datetime
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import scramp

from powermail.base.command import output_of
from powermail.base.errors import OperatorError
from powermail.base.net import SocketNetwork
from powermail.base.settings import load
from powermail.base.tls import client_context, make_self_signed, server_context
from powermail.outbound.routing import Login, Route
from tests.outbound.hop import ScriptedHop, Session, encoded
from tests.outbound.rig import Rig, Routes


class Certificate:
    """A self-signed one in files."""

    def __init__(self, path: Path, hostname: str = "localhost") -> None:
        certificate, key = make_self_signed(hostname, datetime.datetime.now(datetime.UTC))
        self.path, key_path = path / f"{hostname}.pem", path / f"{hostname}.key"
        self.path.write_bytes(certificate)
        key_path.write_bytes(key)
        self.context = server_context(str(self.path), str(key_path))


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """One for localhost and 127.0.0.1."""
    return Certificate(tmp_path)


async def make(hop: ScriptedHop, mode: str, certificate: Certificate, login: Login | None = None, trust: bool = True) -> Rig:
    """A rig whose hop offers STARTTLS."""
    hop.context = hop.context or certificate.context
    if "STARTTLS" not in hop.offers and mode != "implicit":
        hop.offers.append("STARTTLS")
    rig = await Rig.open(hop, net=SocketNetwork())
    context = client_context(mode != "opportunistic", str(certificate.path) if trust else "")
    rig.route = Route("127.0.0.1", hop.port, mode, context, login)
    rig.outbound.router = Routes({"": rig.route})
    return rig


@pytest.fixture
async def done() -> AsyncIterator[list[Rig]]:
    """Rigs to be closed at the end."""
    rigs: list[Rig] = []
    yield rigs
    for rig in rigs:
        await rig.close()


@pytest.mark.parametrize("mode", ["opportunistic", "required"])
async def test_mail_goes_under_tls(mode: str, certificate: Certificate, done: list[Rig]) -> None:
    rig = await make(ScriptedHop(), mode, certificate)
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    (taken,) = rig.hop.messages
    assert taken.tls
    assert "tls=" in rig.log("sent")[0]
    assert [line for line in rig.hop.lines if line.startswith("EHLO")] == ["EHLO here.example"] * 2


FAILURES: dict[str, dict[str, str]] = {
    "454": {"STARTTLS": "454 4.7.0 not now"},
    "502": {"STARTTLS": "502 5.5.1 what"},
    "421": {"STARTTLS": "421 4.3.2 bye|CLOSE"},
    "closes at once": {"STARTTLS": "CLOSE"},
    "closes within its reply": {"STARTTLS": "RAW 220-go\\r\\n|CLOSE"},
    "closes behind 220": {"STARTTLS": "220 go|CLOSE"},
    "resets behind 220": {"STARTTLS": "220 go|RESET"},
    "closes in the handshake": {"STARTTLS": "RAW 220 go\\r\\n|SLEEP 0.05|CLOSE"},
    "no TLS behind 220": {"STARTTLS": "RAW 220 go\\r\\n|SLEEP 0.05|RAW garbage that is no handshake at all|CLOSE"},
    "closes behind the handshake": {"STARTTLS": "NEXT|CLOSE"},
    "does not offer it": {"EHLO": "250 hop"},
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_opportunistic_goes_on_in_clear_and_says_so(failure: str, certificate: Certificate, done: list[Rig]) -> None:
    rig = await make(ScriptedHop(FAILURES[failure]), "opportunistic", certificate)
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert rig.hop.recipients() == ["one"]
    assert not rig.hop.messages[0].tls
    assert "tls=" not in rig.log("sent")[0]
    assert len(rig.log("in-clear")) == (0 if failure == "does not offer it" else 1)


@pytest.mark.parametrize("failure", FAILURES)
async def test_required_never_goes_in_clear(failure: str, certificate: Certificate, done: list[Rig]) -> None:
    """T06."""
    rig = await make(ScriptedHop(FAILURES[failure]), "required", certificate)
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert rig.hop.messages == []
    assert not any(line.startswith("MAIL") for line in rig.hop.lines)
    assert (await rig.rows())["one"].attempts == 1
    assert rig.outbound.troubles(), "the status says so"


@pytest.mark.parametrize("trouble", ["another name", "not trusted", "expired"])
async def test_required_believes_no_wrong_certificate(
    trouble: str, certificate: Certificate, tmp_path: Path, done: list[Rig]
) -> None:
    shown = certificate
    if trouble == "another name":
        shown = Certificate(tmp_path, "other.example")
    if trouble == "expired":
        old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=4000)
        octets, key = make_self_signed("localhost", old)
        (tmp_path / "old.pem").write_bytes(octets)
        (tmp_path / "old.key").write_bytes(key)
        shown.context, shown.path = server_context(str(tmp_path / "old.pem"), str(tmp_path / "old.key")), tmp_path / "old.pem"
    rig = await make(ScriptedHop(), "required", shown, trust=trouble != "not trusted")
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert rig.hop.messages == []
    assert (await rig.rows())["one"].attempts == 1


async def test_opportunistic_protects_although_the_certificate_is_nobodys(certificate: Certificate, done: list[Rig]) -> None:
    rig = await make(ScriptedHop(), "opportunistic", certificate, trust=False)
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert rig.hop.messages[0].tls


INJECTIONS = {
    "a line": "RAW 220 go\\r\\n250 injected\\r\\n",
    "a continuation line": "RAW 220 go\\r\\n250-injected\\r\\n",
    "a part of a line": "RAW 220 go\\r\\n25",
    "one octet": "RAW 220 go\\r\\n\\n",
    "a goodbye": "RAW 220 go\\r\\n421 bye\\r\\n",
}


@pytest.mark.parametrize("mode", ["opportunistic", "required"])
@pytest.mark.parametrize("injected", INJECTIONS)
async def test_octets_in_clear_behind_220_end_the_session(
    injected: str, mode: str, certificate: Certificate, done: list[Rig]
) -> None:
    """RFC 3207 §4.2: an attack; nothing goes, in clear neither."""
    rig = await make(ScriptedHop({"STARTTLS": INJECTIONS[injected]}), mode, certificate)
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert rig.hop.messages == []
    assert not any(line.startswith("MAIL") for line in rig.hop.lines)
    assert "in clear behind" in (await rig.rows())["one"].last_status


@pytest.mark.parametrize("mode", ["opportunistic", "required"])
@pytest.mark.parametrize("reply", ["250 fine", "354 go", "150 wait", "what"])
async def test_an_odd_reply_to_starttls_defers(reply: str, mode: str, certificate: Certificate, done: list[Rig]) -> None:
    rig = await make(ScriptedHop({"STARTTLS": reply}), mode, certificate)
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert not any(line.startswith("MAIL") for line in rig.hop.lines)
    assert (await rig.rows())["one"].attempts == 1


async def test_what_was_offered_in_clear_is_forgotten_under_tls(certificate: Certificate, done: list[Rig]) -> None:
    hop = ScriptedHop(offers="PIPELINING,SIZE 99,DSN")
    hop.tls_offers = []
    rig = await make(hop, "required", certificate)
    done.append(rig)
    await rig.queue("one", notify="FAILURE")
    await rig.push()
    assert rig.hop.messages[0].sender == "FROM:<to@here.example>"


# -- logging in ---------------------------------------------------------------------------------------------------------


class Guard:
    """Answers AUTH for user and password."""

    def __init__(self, user: str = "me", password: str = "secret") -> None:
        self.user, self.password = user, password
        self.used: list[str] = []
        self._answers: dict[int, list[str]] = {}
        self._scram: dict[int, scramp.ScramServer] = {}

    def __call__(self, session: Session, line: str) -> str:
        if not session.in_auth:
            mechanism, _, initial = line[5:].partition(" ")
            self.used.append(mechanism)
            self._answers[session.number] = [mechanism]
            return self._next(session, initial)
        return self._next(session, line) if line != "*" else "501 given up"

    def _next(self, session: Session, text: str) -> str:
        said = self._answers[session.number]
        mechanism = said[0]
        given = base64.b64decode(text).decode() if text and text != "=" else ""
        said.append(given)
        if mechanism == "PLAIN":
            return "235 in" if given == f"\0{self.user}\0{self.password}" else "535 5.7.8 no"
        if mechanism == "LOGIN":
            if len(said) < 4:
                return f"334 {encoded('Username:' if len(said) == 2 else 'Password:')}"
            return "235 in" if said[2:] == [self.user, self.password] else "535 5.7.8 no"
        if mechanism == "XOAUTH2":
            if len(said) == 3:
                return "535 5.7.8 expired"
            good = given == f"user={self.user}\x01auth=Bearer {self.password}\x01\x01"
            return "235 in" if good else f"334 {encoded('{}')}"
        return self._scram_step(session, given, len(said) - 1)

    def _scram_step(self, session: Session, given: str, turn: int) -> str:
        made = scramp.ScramMechanism("SCRAM-SHA-256")
        if turn == 1:
            info = made.make_auth_info(self.password, iteration_count=4096)
            server = self._scram[session.number] = made.make_server(lambda user: info)
            server.set_client_first(given)
            return f"334 {encoded(server.get_server_first())}"
        server = self._scram[session.number]
        if turn == 2:
            try:
                server.set_client_final(given)
            except scramp.ScramException:
                return "535 5.7.8 no"
            return f"334 {encoded(server.get_server_final())}"
        return "235 in"


def secret(text: str, token: bool = False) -> Login:
    """How we log in."""
    return Login("me", lambda: text, token)


OFFERS = {
    "AUTH PLAIN LOGIN": "PLAIN",
    "AUTH LOGIN PLAIN": "PLAIN",
    "AUTH LOGIN": "LOGIN",
    "AUTH=LOGIN": "LOGIN",
    "AUTH PLAIN": "PLAIN",
    "AUTH SCRAM-SHA-256 PLAIN": "SCRAM-SHA-256",
    "AUTH CRAM-MD5 LOGIN NTLM": "LOGIN",
}


@pytest.mark.parametrize("offer", OFFERS)
async def test_login_goes_by_what_the_hop_offers(offer: str, certificate: Certificate, done: list[Rig]) -> None:
    hop, guard = ScriptedHop(), Guard()
    hop.tls_offers, hop.login = [offer], guard
    rig = await make(hop, "required", certificate, secret("secret"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert rig.hop.recipients() == ["one"]
    assert guard.used == [OFFERS[offer]]


@pytest.mark.parametrize("offer", ["AUTH PLAIN", "AUTH LOGIN", "AUTH SCRAM-SHA-256"])
async def test_a_wrong_password_defers_and_is_said(offer: str, certificate: Certificate, done: list[Rig]) -> None:
    hop, guard = ScriptedHop(), Guard()
    hop.tls_offers, hop.login = [offer], guard
    rig = await make(hop, "required", certificate, secret("wrong"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert (await rig.rows())["one"].attempts == 1
    assert "535" in rig.outbound.troubles()[0]
    assert len(guard.used) == 1, "a wrong password is not tried in other ways"
    assert not any("wrong" in line for line in rig.office.world.log.lines)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "reply", ["454 4.7.0 later", "535 5.7.8 no", "534 5.7.9 too weak", "421 bye", "500 what", "354 go", "250 in"]
)
async def test_whatever_is_said_to_auth_nothing_bounces(reply: str, certificate: Certificate, done: list[Rig]) -> None:
    hop = ScriptedHop()
    hop.tls_offers, hop.login = ["AUTH PLAIN"], lambda session, line: reply
    rig = await make(hop, "required", certificate, secret("secret"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert (await rig.rows())["one"].attempts == 1
    assert await rig.notices() == []


async def test_a_mechanism_that_does_not_serve_gives_way_to_the_next(certificate: Certificate, done: list[Rig]) -> None:
    hop, guard = ScriptedHop(), Guard()
    hop.tls_offers = ["AUTH SCRAM-SHA-256 PLAIN LOGIN"]
    hop.login = lambda session, line: "504 5.5.4 not this" if "SCRAM" in line or "PLAIN" in line else guard(session, line)
    rig = await make(hop, "required", certificate, secret("secret"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert guard.used == ["LOGIN"]
    assert rig.hop.recipients() == ["one"]


@pytest.mark.parametrize("offer", ["AUTH GSSAPI", "SIZE 5", "AUTH", "AUTH XOAUTH2"])
async def test_a_hop_without_a_login_that_serves_gets_no_mail(offer: str, certificate: Certificate, done: list[Rig]) -> None:
    hop = ScriptedHop()
    hop.tls_offers = [offer]
    rig = await make(hop, "required", certificate, secret("secret"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert "offers no login that serves" in (await rig.rows())["one"].last_status


@pytest.mark.parametrize("good", [True, False])
async def test_xoauth2_takes_a_token_and_answers_its_refusal(good: bool, certificate: Certificate, done: list[Rig]) -> None:
    hop, guard = ScriptedHop(), Guard(password="token-1")
    hop.tls_offers, hop.login = ["AUTH PLAIN LOGIN XOAUTH2"], guard
    rig = await make(hop, "required", certificate, secret("token-1" if good else "old", token=True))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert guard.used == ["XOAUTH2"]
    assert rig.hop.recipients() == (["one"] if good else [])
    if not good:
        assert "535" in (await rig.rows())["one"].last_status


@pytest.mark.parametrize("server_first", ["r=x,s=QQ==,i=999999999", "r=x,s=QQ==,i=-1", "r=x,s=QQ==", "", "i=²"])
async def test_a_hostile_scram_server_costs_nothing(server_first: str, certificate: Certificate, done: list[Rig]) -> None:
    hop = ScriptedHop()
    hop.tls_offers = ["AUTH SCRAM-SHA-256"]
    hop.login = lambda session, line: "501 given up" if line == "*" else f"334 {encoded(server_first)}"
    rig = await make(hop, "required", certificate, secret("secret"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert (await rig.rows())["one"].attempts == 1


async def test_a_scram_server_that_does_not_know_the_password_is_not_trusted(certificate: Certificate, done: list[Rig]) -> None:
    hop = ScriptedHop()
    hop.tls_offers, hop.login = ["AUTH SCRAM-SHA-256"], lambda session, line: "235 in"
    rig = await make(hop, "required", certificate, secret("secret"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert "did not show" in (await rig.rows())["one"].last_status


@pytest.mark.parametrize("offer", ["AUTH PLAIN", "AUTH LOGIN", "AUTH XOAUTH2"])
async def test_a_server_that_asks_for_ever_is_left(offer: str, certificate: Certificate, done: list[Rig]) -> None:
    hop = ScriptedHop()
    hop.tls_offers, hop.login = [offer], lambda session, line: "501 given up" if line == "*" else "334 "
    rig = await make(hop, "required", certificate, secret("secret", token="XOAUTH2" in offer))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert (await rig.rows())["one"].attempts == 1


async def test_a_secret_that_cannot_be_read_defers_and_is_said(certificate: Certificate, done: list[Rig]) -> None:
    def missing() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    hop = ScriptedHop()
    hop.tls_offers = ["AUTH PLAIN"]
    rig = await make(hop, "required", certificate, Login("me", missing))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert "No such file" in rig.outbound.troubles()[0]


async def test_a_password_that_sasl_forbids_goes_by_plain(certificate: Certificate, done: list[Rig]) -> None:
    hop, guard = ScriptedHop(), Guard(password="a\x07b")
    hop.tls_offers, hop.login = ["AUTH SCRAM-SHA-256 PLAIN"], guard
    rig = await make(hop, "required", certificate, secret("a\x07b"))
    done.append(rig)
    await rig.queue("one")
    await rig.push()
    assert guard.used == ["PLAIN"]
    assert rig.hop.recipients() == ["one"]


@pytest.mark.parametrize(
    "words",
    [
        ["smarthost_user=me", "smarthost_tls=required"],
        ["smarthost_user=me", "smarthost_tls=opportunistic", "smarthost_password_file=x"],
        ["smarthost_password_file=x", "smarthost_token_file=y"],
        ["eight_bit=maybe"],
    ],
)
def test_settings_that_cannot_be_meant_are_refused(words: list[str]) -> None:
    with pytest.raises(OperatorError, match="outbound"):
        load("", {}, [f"outbound.{word}" for word in words])


def test_a_token_comes_from_a_command(tmp_path: Path) -> None:
    assert output_of("printf ' token-7\\n'") == "token-7"
    with pytest.raises(OSError, match="exit status 3"):
        output_of("sh -c 'echo secret; exit 3'")
    with pytest.raises(OSError):
        output_of(str(tmp_path / "not there"))
