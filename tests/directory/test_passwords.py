"""Stored passwords of other systems work as they are."""

from __future__ import annotations

import base64
import hashlib

import pytest

from powermail.directory import password as pw


def encoded(*parts: bytes) -> str:
    return base64.b64encode(b"".join(parts)).decode()


SALT = b"\x01salt"
STORED = {
    "{SHA}": encoded(hashlib.sha1(b"secret").digest()),
    "{SSHA}": encoded(hashlib.sha1(b"secret" + SALT).digest(), SALT),
    "{SHA256}": encoded(hashlib.sha256(b"secret").digest()),
    "{SSHA256}": encoded(hashlib.sha256(b"secret" + SALT).digest(), SALT),
    "{SHA512}": encoded(hashlib.sha512(b"secret").digest()),
    "{SSHA512}": encoded(hashlib.sha512(b"secret" + SALT).digest(), SALT),
    "{SMD5}": encoded(hashlib.md5(b"secret" + SALT).digest(), SALT),
    "{LDAP-MD5}": encoded(hashlib.md5(b"secret").digest()),
    "{PLAIN-MD5}": hashlib.md5(b"secret").hexdigest(),
    "{APR1}": "$apr1$abcdefgh$h9FWgUz3n9YxylKLlR5SQ/",  # openssl passwd -apr1
    "": "$apr1$abcdefgh$h9FWgUz3n9YxylKLlR5SQ/",
    "{CLEARTEXT}": "secret",
}


@pytest.mark.parametrize("scheme", STORED)
def test_schemes_of_other_systems_admit_the_right_password_only(scheme: str) -> None:
    stored = scheme + STORED[scheme]
    assert pw.matches(stored, "secret")
    assert pw.has_scheme(stored) and pw.split_scheme(stored)[0] in pw.SCHEMES
    for wrong in ("Secret", "secre", "secret ", "", "sécret"):
        assert not pw.matches(stored, wrong)


@pytest.mark.parametrize("scheme", sorted(pw.SCHEMES))
def test_nonsense_admits_nobody(scheme: str) -> None:
    for rest in ("", "!", "*", "====", "AAAA", "$apr1$", "$apr1$$", "00" * 4, "é"):
        if scheme in ("plain", "cleartext", "clear"):
            continue
        assert not pw.matches(f"{{{scheme}}}{rest}", "secret"), rest


def test_a_digest_with_a_salt_is_none_without_and_the_other_way() -> None:
    """Else the salt of a cut value could be anything."""
    assert not pw.matches("{SSHA}" + STORED["{SHA}"], "secret")
    assert not pw.matches("{SHA}" + STORED["{SSHA}"], "secret")


def test_the_dummy_costs_what_a_new_hash_costs() -> None:
    """U07: an unknown user takes as long."""
    assert pw.DUMMY.rsplit("$", 2)[0] == pw.hash_password("x").rsplit("$", 2)[0]
