"""The client machine: the same for every chunking, and never fooled about what a reply is to."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some

from powermail.wire.smtp_client import ClientError, Fault, Reply, SmtpClient, State, Verb

FRAGMENTS = [
    b"250 ok\r\n",
    b"250-a\r\n",
    b"354 go\r\n",
    b"421 bye\r\n",
    b"550 no\r\n",
    b"25",
    b"\r\n",
    b"\n",
    b"\0",
    b"2500 x\r\n",
]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` cut at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def ready(offers: str = "PIPELINING") -> SmtpClient:
    """A session that has said hello."""
    machine = SmtpClient()
    machine.receive(b"220 hop\r\n")
    machine.ask(Verb.EHLO, "here")
    machine.receive(f"250-hop\r\n250 {offers}\r\n".encode())
    assert machine.state is State.READY
    return machine


def opened() -> SmtpClient:
    """A session with a transaction that waits for DATA."""
    machine = ready()
    machine.ask(Verb.MAIL, "FROM:<a@b>")
    machine.ask(Verb.RCPT, "TO:<c@d>")
    machine.receive(b"250 ok\r\n250 ok\r\n")
    return machine


@given(some.lists(some.sampled_from(FRAGMENTS), max_size=12).map(b"".join), some.lists(some.integers(0, 200), max_size=6))
def test_a_session_is_the_same_for_every_chunking(stream: bytes, places: list[int]) -> None:
    whole, pieces, octets = ready(), ready(), ready()
    for machine in (whole, pieces, octets):
        machine.ask(Verb.MAIL, "FROM:<a@b>")
        machine.ask(Verb.RCPT, "TO:<c@d>")
    expected = whole.receive(stream)
    assert [answer for piece in cut(stream, places) for answer in pieces.receive(piece)] == expected
    assert [answer for at in range(len(stream)) for answer in octets.receive(stream[at : at + 1])] == expected
    assert whole.end == pieces.end == octets.end
    assert whole.state is pieces.state is octets.state
    assert whole.clean == pieces.clean == octets.clean


def test_only_a_clean_session_is_used_again() -> None:
    machine = ready()
    clean = [machine.clean]
    machine.receive(b"25")
    assert [*clean, machine.clean] == [True, False], "octets are unread"
    assert machine.ask(Verb.MAIL, "FROM:<a@b>") == b""
    assert machine.end is not None
    assert machine.end.fault is Fault.OUT_OF_STEP


def test_a_session_is_clean_again_when_its_transaction_is_forgotten() -> None:
    steps = [opened().clean]
    machine = opened()
    machine.ask(Verb.RSET)
    steps.append(machine.clean)
    machine.receive(b"250 ok\r\n")
    assert [*steps, machine.clean] == [False, False, True]


@pytest.mark.parametrize("octets", [b"421 bye\r\n", b"421-a\r\n421 b\r\n", b"421\r\n"])
def test_a_hop_that_said_421_while_idle_has_left(octets: bytes) -> None:
    machine = ready()
    assert machine.receive(octets) == []
    assert machine.end is not None
    assert machine.end.fault is Fault.LEFT


@pytest.mark.parametrize(
    ("octets", "fault"),
    [
        (b"220 go\r\n250 injected\r\n", Fault.INJECTED),
        (b"220 go\r\n250-injected\r\n", Fault.INJECTED),
        (b"220 go\r\n2", Fault.INJECTED),
        (b"220 go\r\n\n", Fault.INJECTED),
        (b"220 go\r\n421 bye\r\n", Fault.INJECTED),
        (b"220-go\r\n220 on\r\n\x16\x03", Fault.INJECTED),
        (b"250 go\r\n", Fault.OUT_OF_STEP),
    ],
)
def test_octets_in_clear_behind_starttls_end_the_session(octets: bytes, fault: Fault) -> None:
    for size in (1, len(octets)):
        machine = ready("STARTTLS")
        machine.ask(Verb.STARTTLS)
        for start in range(0, len(octets), size):
            machine.receive(octets[start : start + size])
        assert machine.end is not None
        assert machine.end.fault is fault


def test_tls_forgets_what_was_offered_before() -> None:
    machine = ready("AUTH LOGIN")
    machine.ask(Verb.STARTTLS)
    machine.receive(b"220 go\r\n")
    machine.secured()
    assert machine.state is State.GREETED
    assert machine.mechanisms() == ()


@pytest.mark.parametrize(
    "word", ["AUTH LOGIN PLAIN", "AUTH=LOGIN PLAIN", "auth  login plain", "AUTH LOGIN\r\n250 AUTH=PLAIN LOGIN"]
)
def test_mechanisms_are_read_in_all_their_spellings(word: str) -> None:
    machine = SmtpClient()
    machine.receive(b"220 hop\r\n")
    machine.ask(Verb.EHLO, "here")
    lines = ["hop", *word.split("\r\n250 ")]
    machine.receive("".join(f"250{'-' if n < len(lines) - 1 else ' '}{line}\r\n" for n, line in enumerate(lines)).encode())
    assert machine.mechanisms() == ("LOGIN", "PLAIN")


def test_354_with_more_behind_it_is_out_of_step() -> None:
    machine = opened()
    machine.ask(Verb.DATA)
    (answer,) = machine.receive(b"354 go\r\n250 taken\r\n")
    assert answer.reply.code == 354
    assert machine.end is not None
    assert machine.end.fault is Fault.OUT_OF_STEP


def test_a_transaction_may_begin_behind_the_octets_of_the_one_before() -> None:
    """RFC 2920 §3.1."""
    machine = opened()
    machine.ask(Verb.DATA)
    machine.receive(b"354 go\r\n")
    machine.ended_body()
    machine.ask(Verb.MAIL, "FROM:<e@f>")
    machine.ask(Verb.RCPT, "TO:<g@h>")
    machine.ask(Verb.DATA)
    answers = machine.receive(b"550 no\r\n250 ok\r\n250 ok\r\n354 go\r\n")
    assert [answer.verb for answer in answers] == [Verb.END, Verb.MAIL, Verb.RCPT, Verb.DATA]
    assert machine.state is State.BODY
    assert machine.end is None


def test_a_surplus_reply_to_a_message_never_makes_the_next_one_go() -> None:
    machine = opened()
    machine.ask(Verb.DATA)
    machine.receive(b"354 go\r\n")
    machine.ended_body()
    machine.ask(Verb.MAIL, "FROM:<e@f>")
    machine.ask(Verb.RCPT, "TO:<g@h>")
    machine.ask(Verb.DATA)
    machine.receive(b"250 taken\r\n250 taken\r\n250 ok\r\n250 ok\r\n354 go\r\n")
    assert machine.state is not State.BODY
    assert machine.end is not None
    assert machine.end.fault is Fault.OUT_OF_STEP


def test_a_refusal_in_the_middle_of_the_body_is_the_messages() -> None:
    machine = opened()
    machine.ask(Verb.DATA)
    machine.receive(b"354 go\r\n")
    (answer,) = machine.receive(b"552 too large\r\n")
    assert answer.verb is Verb.END
    assert machine.receive(b"550 and more\r\n") == []
    assert machine.end is not None
    assert machine.end.fault is Fault.OUT_OF_STEP


@pytest.mark.parametrize("argument", ["FROM:<a@b>\r\nRCPT TO:<x@y>", "FROM:<a\n@b>", "FROM:<a\0@b>"])
def test_no_address_becomes_a_second_command(argument: str) -> None:
    """F01."""
    with pytest.raises(ClientError):
        ready().ask(Verb.MAIL, argument)


def test_what_the_state_does_not_allow_is_a_mistake_of_ours() -> None:
    with pytest.raises(ClientError):
        ready().ask(Verb.DATA)
    machine = ready()
    machine.ask(Verb.MAIL, "FROM:<a@b>")
    with pytest.raises(ClientError):
        machine.ask(Verb.QUIT)
    machine.ask(Verb.DATA)
    with pytest.raises(ClientError):
        machine.ask(Verb.RCPT, "TO:<c@d>")  # nothing goes behind DATA before its reply (RFC 2920 §3.1)
    with pytest.raises(ClientError):
        machine.ended_body()
    with pytest.raises(ClientError):
        machine.secured()


@pytest.mark.parametrize(
    ("line", "code"), [(b"250\r\n", 250), (b"250 \r\n", 250), (b"250\n", 250), (b"150 x\r\n", 150), (b"599 x\r\n", 599)]
)
def test_a_reply_may_be_short(line: bytes, code: int) -> None:
    machine = ready()
    machine.ask(Verb.MAIL, "FROM:<a@b>")
    (answer,) = machine.receive(line)
    assert isinstance(answer.reply, Reply)
    assert answer.reply.code == code


@pytest.mark.parametrize("line", [b"2500 x\r\n", b"25\r\n", b"x\r\n", b"\r\n", b"650 x\r\n", b"050 x\r\n", b"250+x\r\n"])
def test_nonsense_ends_the_session(line: bytes) -> None:
    machine = ready()
    machine.ask(Verb.MAIL, "FROM:<a@b>")
    assert machine.receive(line) == []
    assert machine.end is not None
    assert machine.end.fault is Fault.NONSENSE
