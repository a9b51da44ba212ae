"""Values: addresses, trace fields, DSNs, rewritten senders, keys, placement, settings."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as some

from powermail.base.entropy import KeySource, SystemEntropy
from powermail.base.errors import IndexTrouble, OperatorError
from powermail.base.log import Event, escape, format_text
from powermail.base.settings import Settings, load, reference_page
from powermail.cli.words import octets
from powermail.cluster.placement import Candidate, place
from powermail.delivery.srs import Rewriter, SrsError
from powermail.directory import password as pw
from powermail.mail import header
from powermail.mail.address import Address, AddressError, parse, parse_canonical
from powermail.mail.dsn import Action, Notice, Report, format_notice
from powermail.mail.envelope import Peer

text = some.text(max_size=80)


@given(text)
def test_an_address_that_parses_survives_formatting(value: str) -> None:
    try:
        address = parse(value)
    except AddressError:
        return
    assert parse(address.text) == address
    assert not any(ord(c) < 32 for c in address.text)


@given(text, text, text)
def test_no_client_text_breaks_a_received_field(hello: str, client: str, recipient: str) -> None:
    field = header.received_field(Peer("[192.0.2.1]", hello, "ESMTP"), "host", bytes(16), "date", "a@b")
    lines = field.split(b"\r\n")
    assert lines[-1] == b""
    assert all(line.startswith((b"Received:", b"\t")) for line in lines[:-1])
    assert b"\n" not in field.replace(b"\r\n", b"")


def test_hops_are_counted_in_the_header_only() -> None:
    message = b"Received: a\r\nreceived: b\r\n\tfolded\r\nX: Received: no\r\n\r\nReceived: body\r\n"
    assert header.count_received(message) == 2


@given(text, text, text)
def test_a_dsn_holds_no_injected_line(diagnostic: str, recipient: str, envid: str) -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    report = Report(recipient, "rfc822;" + envid, Action.FAILED, "5.1.1", diagnostic, "remote")
    octets = format_notice(Notice("host", "s@x", bytes(16), "b0", at, at, envid, [report], b"Subject: x\nY: \0z\r"))
    assert octets.count(b"\r") == octets.count(b"\n") == octets.count(b"\r\n")
    assert octets.count(b"--b0--") == 1
    assert b"\0" not in octets


def test_srs_there_and_back() -> None:
    rewriter = Rewriter("ours.example", [b"new", b"old"])
    rewritten = rewriter.forward("ann@sender.example", 1e9).reverse_path
    assert rewritten.endswith("@ours.example")
    assert rewriter.reverse(parse(rewritten), 1e9 + 86_400) == "ann@sender.example"
    old = Rewriter("ours.example", [b"old"]).forward("ann@sender.example", 1e9).reverse_path
    assert rewriter.reverse(parse(old), 1e9) == "ann@sender.example"
    assert rewriter.forward("", 1e9).reverse_path == ""
    again = Rewriter("third.example", [b"k"])
    twice = again.forward(rewritten, 1e9).reverse_path
    assert twice.startswith("SRS1=")
    assert again.reverse(parse(twice), 1e9).lower() == rewritten.lower()


@pytest.mark.parametrize("change", ["forge", "cut", "expire", "beyond ASCII"])
def test_bad_srs_addresses_are_refused(change: str) -> None:
    rewriter = Rewriter("ours.example", [b"key"])
    address = parse(rewriter.forward("ann@sender.example", 1e9).reverse_path)
    now = 1e9
    if change == "forge":
        address = Address(address.local.replace("ann", "eve"), address.domain)
    elif change == "cut":
        address = Address(address.local[:16], address.domain)
    elif change == "beyond ASCII":  # found by the fuzzer: comparing such text raised TypeError
        address = Address("SRS0=\u067f\u067f=" + address.local[14:], address.domain)
    else:
        now += 30 * 86_400
    with pytest.raises(SrsError):
        rewriter.reverse(address, now)


@pytest.mark.parametrize("sender", ["SRS1=@x.example", "SRS1=ab@x.example", "srs0=@x.example", "SRS0=a@x.example"])
def test_a_sender_that_only_looks_rewritten_is_rewritten_like_any(sender: str) -> None:
    """Found by the fuzzer: `SRS1=` without the rest raised IndexError in the middle of a delivery."""
    rewriter = Rewriter("ours.example", [b"key"])
    rewritten = parse(rewriter.forward(sender, 1e9).reverse_path)
    assert rewriter.is_ours(rewritten)
    assert rewriter.reverse(rewritten, 1e9).lower() == sender.lower()


@pytest.mark.parametrize(
    "sender",
    [
        "a" * 60 + "@sender.example",
        "a" * 64 + "@sender.example",
        "bounce+" + "x" * 90 + "@sender.example",
        "ann@" + "label." * 12 + "example",
        "SRS0=HHHH=TT=" + "d" * 40 + ".example=local@other.example",
        "j\u00f6rg" * 9 + "@sender.example",
    ],
)
async def test_a_sender_that_would_grow_past_64_octets_becomes_a_token(sender: str) -> None:
    rows: dict[str, str] = {}

    async def find(address: str, now: float) -> str | None:
        return rows.get(address.lower())

    rewriter = Rewriter("ours.example", [b"key"], find)
    path, original = rewriter.forward(sender, 1e9)
    assert original == sender
    address = parse(path)
    assert rewriter.is_ours(address)
    assert len(address.local) <= 64
    assert rewriter.forward(sender, 1e9) == (path, original), "mail in bulk takes one row"
    with pytest.raises(IndexTrouble):  # its row has not come yet: trouble of ours, no refusal
        await rewriter.origin(address, 1e9)
    rows[path.lower()] = sender
    assert (await rewriter.origin(parse(path.upper()), 1e9 + 86_400)).text == parse(sender).text
    with pytest.raises(SrsError):
        await rewriter.origin(address, 1e9 + 30 * 86_400)
    forged = Address(address.local[:-1] + ("a" if address.local[-1] != "a" else "b"), address.domain)
    with pytest.raises(SrsError):
        await rewriter.origin(forged, 1e9)


def test_srs_survives_a_case_change() -> None:
    rewriter = Rewriter("ours.example", [b"key"])
    address = parse(rewriter.forward("ann@sender.example", 1e9).reverse_path.lower())
    assert rewriter.reverse(address, 1e9) == "ann@sender.example"


def test_keys_rise_though_the_clock_stands_or_goes_back() -> None:
    times = iter([5.0] * 5000 + [1.0] * 10 + [6.0])
    keys = KeySource(lambda: next(times), SystemEntropy())
    made = [keys.next() for _ in range(5011)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    assert int.from_bytes(made[-1][:6], "big") >= 5000, "they begin with milliseconds"


candidates = some.lists(
    some.builds(
        Candidate,
        some.uuids().map(str),
        some.sampled_from("abcd"),
        some.integers(1, 3),
        some.integers(0, 2**40),
        some.integers(0, 2**20),
    ),
    max_size=12,
)


@given(candidates, some.integers(1, 4), some.sampled_from(["spread-disk", "spread-load", "random"]), some.randoms())
def test_placement_law(nodes: list[Candidate], required: int, policy: str, random) -> None:  # type: ignore[no-untyped-def]
    order = place(nodes, required, policy, [random.random() for _ in nodes])
    groups = {node.group for node in nodes}
    if len(groups) < required:
        assert order == []
        return
    by_id = {node.id: node for node in nodes}
    assert sorted(order) == sorted(by_id)
    first = [by_id[name] for name in order[:required]]
    assert len({node.group for node in first}) == required


def test_original_defect_5_a_spare_takes_nothing_while_regular_nodes_suffice() -> None:
    nodes = [Candidate("a", "1", 1, 1, 0), Candidate("b", "2", 1, 1, 0), Candidate("spare", "3", 9, 2**50, 0)]
    for draw in range(50):
        order = place(nodes, 2, "spread-disk", [(draw * 7 % 50) / 50, draw / 50, 0.999])
        assert order[2] == "spare"


def test_original_defect_9_a_quota_of_250k_is_not_unlimited() -> None:
    assert octets("250k") == 250 * 1024
    assert octets("1G") == 2**30
    for bad in ("", "k", "1x", "-1", "1.5M", "²k"):
        with pytest.raises(OperatorError):
            octets(bad)


def admits(stored: str, password: str) -> bool:
    """Whether it is the right password."""
    return pw.judge(stored, password) is None


def test_passwords_by_scheme() -> None:
    assert admits(pw.hash_password("right"), "right")
    assert not admits(pw.hash_password("right"), "wrong")
    assert admits("{plain}right", "right")
    assert admits("right", "right")
    assert admits("{md5}" + "7ac66c0f148de9519b8bd264312c4d64", "abcdefg")
    assert admits(pw.hash_scram("right", b"salt" * 4), "right")
    assert admits(
        "{crypt}$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1",
        "Hello world!",
    )
    assert not admits(
        "{crypt}$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1",
        "hello world!",
    )
    assert admits("{yescrypt}$y$j9T$saltsaltsalt$kWIqxcWfXjuZr31QB0vcBe5BBK9FByx0O2mMdKkHFM/", "Hello world!")
    assert not admits("{yescrypt}$y$j9T$saltsaltsalt$kWIqxcWfXjuZr31QB0vcBe5BBK9FByx0O2mMdKkHFM/", "hello world!")
    assert admits("{bcrypt}$2b$05$abcdefghijklmnopqrstuu7nFISH/8YdwlXD3lw69A4iBUf6fvWAW", "Hello world!")
    assert not admits("{bcrypt}$2b$05$abcdefghijklmnopqrstuu7nFISH/8YdwlXD3lw69A4iBUf6fvWAW", "hello world!")
    for stored in ("", "{plain}", "{unknown}x", "{argon2id}garbage", "{crypt}x"):
        assert not admits(stored, "")
        assert not admits(stored, "x" if stored != "{crypt}x" else "y")


def test_settings_refuse_what_contradicts() -> None:
    node = '[[cluster.nodes]]\nid = "{0}"\npath = "{0}"\ngroup = "{1}"\n'
    assert load(node.format("a", "1") + node.format("b", "2"), {}).cluster.copies_required == 2
    for bad, why in (
        (node.format("a", "1") + node.format("b", "1"), "needs that many groups"),
        ("hostnam = 'x'", "did you mean 'hostname'"),
        ("[smtp]\nlisten = 5", "Expected `array`"),
        ("[cluster]\npolicy = 'fastest'", "none of"),
        ("x = [", "settings"),
    ):
        with pytest.raises(OperatorError, match=why.replace("[", r"\[")):
            load(bad, {})


def test_settings_overlays() -> None:
    settings = load("hostname = 'a'", {"POWERMAIL_POP__PLAINTEXT_LOGIN": "true", "POWERMAIL_HOSTNAME": "b"}, ["hostname=c"])
    assert (settings.hostname, settings.pop.plaintext_login) == ("c", True)
    with pytest.raises(OperatorError, match="did you mean"):
        load("", {"POWERMAIL_SMTP__LISTN": "x"})


def test_the_settings_page_is_what_the_program_says() -> None:
    with open("docs/settings.md", encoding="utf-8") as page:
        assert page.read() == reference_page()
    assert isinstance(load("", {}), Settings)


@given(text)
def test_one_event_is_one_line(value: str) -> None:
    line = format_text("t", Event.DELIVERED, {"field": value})
    assert len(line.splitlines()) == 1
    assert escape(value).isprintable()


def test_catch_all_addresses() -> None:
    assert parse_canonical("*@Example.ORG") == "*@example.org"
    with pytest.raises(AddressError):
        parse_canonical("*@")


def test_the_variable_that_names_the_data_directory_is_not_a_setting() -> None:
    assert load("", {"POWERMAIL_DATA_DIRECTORY": "/var/lib/powermail"}).hostname == "localhost"
    with pytest.raises(OperatorError, match="unknown setting"):
        load("", {"POWERMAIL_DATA_DIRECTORI": "x"})


def test_a_stored_password_beyond_ascii_admits_nobody_and_raises_nothing() -> None:
    for scheme in ("md5", "plain", "bcrypt", "crypt", "argon2id", "scram-sha-256", ""):
        assert not admits(f"{{{scheme}}}ж\u067f", "secret"), scheme
