"""Addresses as operators write them: right ones are read, wrong ones are one sentence, and no password is shown of any."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest

from powermail.base.database_url import Host, parse_database_url, shown_url
from powermail.base.errors import OperatorError
from powermail.base.net import parse_host_port
from powermail.base.secrets import SECRET, said, shown_settings
from powermail.base.settings import INDEX_KINDS, Settings, known_keys, load
from powermail.base.settings_text import with_values
from powermail.directory.database import parse
from powermail.index.postgres.addresses import addresses
from powermail.index.postgres.swapping import beside

SECRETS = ("plain", "sl/ash", "ha#sh", "a@t", "qu?est", "p:ort", "p@x/y#z?q=1", "4321", "[fe80::9]", "ü ß", "a%b", "x@h:1,y@h2")
NAMED = "index.database"


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("rest", ["@db1,db2:5433/mail", "@db/mail?sslmode=require", "@[::1]:5432/mail", "@db"])
def test_no_sentence_shows_a_password_however_it_is_written(secret: str, rest: str) -> None:
    """As it is, where that is a mistake; and as it should be."""
    for written in (secret, quote(secret, safe="")):
        url = f"postgresql://ann:{written}{rest}"
        texts = [shown_url(url), said(f"what: {url}: why") if " " not in written else ""]
        for setting in ("index.database", "directory.database"):
            try:
                load("", {f"POWERMAIL_{setting.upper().replace('.', '__')}": url, "POWERMAIL_DIRECTORY__BACKEND": "sqlite"})
            except OperatorError as error:
                texts.append(str(error))
        try:
            parse("postgresql", url)
        except OperatorError as error:
            texts.append(str(error))
        for text in texts:
            assert written not in text.replace("postgresql", "").replace("5432", "").replace("HOST[:PORT]", ""), text
            assert not any(len(piece) > 3 and piece in text for piece in re.split("[/#@?:]", written)), text
    shown = shown_settings(load("", {"POWERMAIL_INDEX__DATABASE": f"postgresql://ann:{quote(secret, safe='')}{rest}"}))
    assert shown["index"]["database"].startswith("postgresql://ann@") and ":" not in shown["index"]["database"][13:17]


def test_a_password_in_a_parameter_is_not_shown() -> None:
    url = "postgresql://db/mail?user=ann&password=sesame&sslmode=require"
    assert shown_url(url) == "postgresql://db/mail"
    assert said(f"no: {url}") == "no: postgresql://db/mail?user=ann&password=***&sslmode=require"
    assert "sesame" not in str(shown_settings(load("", {"POWERMAIL_INDEX__DATABASE": url})))


def test_what_a_command_is_given_is_not_shown() -> None:
    settings = load("[outbound]\nsmarthost_token_command = '/bin/token --secret sesame'\n", {})
    assert shown_settings(settings)["outbound"]["smarthost_token_command"] == "/bin/token ***"


def test_every_setting_that_may_hold_a_secret_is_known() -> None:
    """A setting that is added with such a name stands in `SECRET`, or says that it is a file."""
    word = re.compile("password|secret|token|database$|key$|url|dsn")
    harmless = {"directory.upgrade_passwords"}  # a yes or no
    found = {
        name
        for name, known in known_keys().items()
        if word.search(name) and not name.endswith("_file") and "PEM file" not in str(known.type) and name not in harmless
    }
    assert found == set(SECRET)


def test_a_settings_file_that_is_not_changed_by_program_says_no_password() -> None:
    with pytest.raises(OperatorError, match=r'database = "postgresql://ann@db/mail" \(whole, as it was given') as caught:
        with_values("index.path = 'p'\n", {NAMED: "postgresql://ann:sesame@db/mail"}, "f")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "hosts", "name"),
    [
        ("postgresql://ann@db/mail", [Host("db", 5432)], "mail"),
        ("postgres://ann:x@db1,db2:5433/mail?sslmode=require", [Host("db1", 5432), Host("db2", 5433)], "mail"),
        ("postgresql://ann@[::1],[2001:db8::1]:77/mail", [Host("::1", 5432), Host("2001:db8::1", 77)], "mail"),
        ("postgresql://ann@%2Frun%2Fpg/mail", [Host("/run/pg", 5432)], "mail"),
        ("postgresql:///mail?host=/run/pg", [Host("", 5432)], "mail"),
        ("postgresql://an%40n:%2F%23@db/m%C3%BCller", [Host("db", 5432)], "müller"),
    ],
)
def test_addresses_that_are_right(url: str, hosts: list[Host], name: str) -> None:
    found = parse_database_url(url, INDEX_KINDS, NAMED)
    assert (list(found.hosts), found.name) == (hosts, name)
    each = addresses(url)
    assert len(each) == len(hosts)
    for one, host in zip(each, hosts, strict=True):
        assert parse_database_url(one, INDEX_KINDS, NAMED).hosts == (host,)
        assert parse_database_url(beside(one), INDEX_KINDS, NAMED).hosts == (host,)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann@db:port/mail", "postgresql://ann@db:0/mail", "postgresql://ann@db:65536/mail",
        "postgresql://ann@db:" + "9" * 5000 + "/mail", "postgresql://ann@db1,db2:x/mail", "postgresql://ann@a..b/mail",
        f"postgresql://ann@{'x' * 64}/mail", "postgresql://ann@db/mail?port=five", "postgresql://ann@db/m%ff",
        "postgresql://ann@db/m%00", "postgresql://ann@[::1/mail", "postgresql://ann@db /mail", "mysql://ann@db/mail",
        "db/mail", "postgresql:ann@db/mail", "postgresql://ann@db/mail\n", "postgresql://ann@db/mail#x", "", "://", "\0",
    ],
)  # fmt: skip
def test_addresses_that_are_wrong_are_one_sentence(url: str) -> None:
    with pytest.raises(OperatorError, match="^" + re.escape(NAMED)) as caught:
        parse_database_url(url, INDEX_KINDS, NAMED)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    with pytest.raises(OperatorError):
        addresses(url)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:25", ("127.0.0.1", 25)), ("[::1]:25", ("::1", 25)), ("::1:25", ("::1", 25)), (":25", ("", 25)),
        ("mail.example.org:0", ("mail.example.org", 0)),
    ],
)  # fmt: skip
def test_a_host_and_a_port(text: str, found: tuple[str, int]) -> None:
    assert parse_host_port(text) == found


WRONG = ("25", "host", "host:", "host:x", "host:-1", "host:65536", "host:" + "1" * 5000, "a..b:25", "x" * 64 + ":25", "a b:25",
         "ann:sesame@host:25", "http://host:25", "a:b:25", "host:٢٥", "h\0st:25")  # fmt: skip
LISTS = ("smtp.listen", "smtp.submission", "smtp.submissions", "smtp.lmtp", "pop.listen", "pop.listen_tls", "peers.listen",
         "peers.authority_at", "peers.authority_listen", "metrics.listen")  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_host_and_port_is_named_with_its_setting_when_settings_are_read(text: str) -> None:
    with pytest.raises(OperatorError) as caught:
        parse_host_port(text)
    assert "sesame" not in str(caught.value)
    for name in LISTS:
        section, _, key = name.partition(".")
        with pytest.raises(OperatorError, match="^" + re.escape(name)):
            load(with_values("", {name: [text]}, "f"), {})
        assert getattr(getattr(Settings(), section), key) is not None
    with pytest.raises(OperatorError, match=r"^outbound\.smarthost"):
        load(with_values("", {"outbound.smarthost": text}, "f"), {})
