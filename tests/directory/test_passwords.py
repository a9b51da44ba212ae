"""Stored passwords of other systems work as they are; what cannot work says why, at no cost."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import time

import pytest

from powermail.base import limits
from powermail.directory import password as pw
from powermail.directory import schemes
from powermail.directory.reasons import Reason, Unusable

# The password is "secret", but where it stands behind the value. Made by `doveadm pw` 2.3, `htpasswd` 2.4, `openssl passwd` 3;
# phpass, bsdi and PostgreSQL's as their own tests or documents have them.
STORED = {
    "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=": "",
    "{SHA1}5en6G6MezRroT3XKqkdPOmY/BfQ=": "",
    "{SHA.B64}5en6G6MezRroT3XKqkdPOmY/BfQ=": "",
    "{SHA256}K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=": "",
    "{SHA256.HEX}2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b": "",
    "{SHA256}2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b": "",
    "{SHA512}vSsar3708Jvp9Szi2NWZZ02Bqp1qRCFpbcTZPdBhnWgs5WtNZKnvCXdhztmeD2cmW192CF5bDufKRpayrW/isg==": "",
    "{SSHA}hT9quEvEuAQrlGEg5zBw4LkIMuXEe0C2": "",
    "{SSHA.HEX}232535055cf9f881a9cbf549c2fb440751c960a5d2b2f9b8": "",
    "{SSHA256}8xC7wg37RZP07s+GUFvUJReHO1K8F3k8pW+qR5G7Lv9WW8yE": "",
    "{SSHA256.B64}5zVhqI5qEjncG11UE1GSIBosf5rtopP7EqLcERktsermb8wM": "",
    "{SSHA512}xybgUfGh9VWMlqw819MbZAhDvaSQ37MF2tLb981rFn//1DI9RDlMevyBYoU3678V91TgzjI3dcYVGf4dczTgHek2zWY=": "",
    "{SSHA512.HEX}81d0647d88f8850e013798fddf781cf023ef6b0d839fcd6a1b74bc4be2f79b9f"
    "b8d88e40e9b4c170fb11dcfdba6449d3d45e08a4a111c853f129fac143183ef416661739": "",
    "{SMD5}F4rh2dYo1a5ZsIb2BS0UPOrfQb4=": "",
    "{PLAIN-MD5}5ebe2294ecd0e0f08eab7690d2a6ee69": "",
    "{LDAP-MD5}Xr4ilOzQ4PCOq3aQ0qbuaQ==": "",
    "{PLAIN-MD4}67d3dafef63ff00603aeef3769cfbf0d": "",
    "{MD5}5EBE2294ECD0E0F08EAB7690D2A6EE69": "",
    "{MD5}Xr4ilOzQ4PCOq3aQ0qbuaQ==": "",
    "{MD5}$1$q1.wZcXo$z3ty9f.coKrPvdftNeczA1": "",
    "{MD5-CRYPT}$1$YuAKy3jB$Av6mb3njjE4OO.A6f7Nky0": "",
    "$1$abcdefgh$cHJi5PXp/ki/ktXzqlk6I1": "",
    "{SHA256-CRYPT}$5$rounds=1000$rDUK0QejIPJF0l3o$vGcEZsVuZtIU8q86xagdG/6qwOPwbDeZN.NqNL5C7p5": "",
    "{SHA512-CRYPT}$6$rounds=1000$3QwXirH/Ay8IVQgj$id7Y40WWgiiG6WG2jmdpikZPEyeC8hbhOeJW7q/6dGfSEViySoLjbl2eikDNutzqrDfpzMOYa"
    "BqGJlRCZUdsG0": "",
    "{SHA512-CRYPT.B64}JDYkVGhsdk9yZlZoaVhBV2FFciRwbzE2T3p0Q01yYkV1ZWN1TlZlVk1lYWN5UERmOXhQVHh5djhrQU9UN3RSVjlnNXJZVW1odkd4OFI3"
    "QW9mZEhVZTVwb3FRNW5KOC9wdksveTZTUXVqLg==": "",
    "$6$fulPW9LymRLlam3g$94g99HvN1zhxxBFlqFAmib8L5xbDNddswTBRcpMiKdGcYOrte29VD.T/pMCCrxW/8GkQWEQBUUU.bouRgbcX10": "",
    "{BLF-CRYPT}$2y$05$8hJBRYBAZMTKxiLl6uiLo.GrpfE7BrGQ3TBY8k/SDJkaaeFwnB3ia": "",
    "{CRYPT}$2y$05$3GKa0My9DrGf3T7u7R8WjuRQNyduuul9hd9o15dKqnJRVTm/WP166": "",
    "$2y$05$KqeQ4FadyqKGZVNci9pMr.8aCH68B3gN5fIZLmz9TbQjKe.QzKKyG": "",
    "{DES-CRYPT}X0QTFUu0zvxQA": "",
    "{CRYPT}pfD8pZEaPCNx6": "",
    "{CRYPT}_7C/.bYLXHEdRIB9QWNg": "",
    "{APR1}$apr1$l3HpAV.Z$F4vYPAASHiSprWNG19E8.0": "",
    "$apr1$abcdefgh$h9FWgUz3n9YxylKLlR5SQ/": "",
    "{CRYPT}$apr1$abcdefgh$h9FWgUz3n9YxylKLlR5SQ/": "",
    "{PHPASS}$P$9IQRaTwmfeRo7ud9Fh4E2PdI0S3r.L0": "test12345",
    "{CRYPT}$H$9IQRaTwmfeRo7ud9Fh4E2PdI0S3r.L0": "test12345",
    "$P$9IQRaTwmfeRo7ud9Fh4E2PdI0S3r.L0": "test12345",
    "{PBKDF2}$1$n4TFIdQr9hhGMPyU$1000$60fc25d853af829e192b4b64457c4f6d8b30a8e4": "",
    "{SCRAM-SHA-1}4096,vjfqDtpihHQpG/gEA6tx+Q==,P6xsHUxnpwL6LQh+x7jghiwJjvQ=,jn7VNKxYoVrD5Rsvcq9MK4c6Jzc=": "",
    "{SCRAM-SHA-256}4096,zsRJ7WN/FWQFZ9cIpVi9cw==,SKuLaM5ZQQkYNuWfJljnV9L4C9ncNyPOsunFqvo6sSU=,j5+o22UFOtwMMGRYkErdFLnMEGLSuV"
    "Ts4ShcWoCgVlI=": "",
    "{ARGON2I}$argon2i$v=19$m=32768,t=4,p=1$NUy+CVzYvUjFAvdG1AArFg$dEklNPNlBDFE4HQtpzC1CJts8XmC+EUBjCz3Pfv33tI": "",
    "{yescrypt}$y$j9T$saltsaltsalt$kWIqxcWfXjuZr31QB0vcBe5BBK9FByx0O2mMdKkHFM/": "Hello world!",
    "{CLEARTEXT}secret": "",
    "{PLAIN.B64}c2VjcmV0": "",
    "{PLAIN.HEX}736563726574": "",
}
CLEAR = ("plain", "cleartext", "clear")


def cased(stored: str, change: str) -> str:
    """A value with the scheme's name in another case."""
    scheme, brace, rest = stored.partition("}")
    return f"{getattr(scheme, change)()}{brace}{rest}" if brace else stored


def matches(stored: str, password: str) -> bool:
    """True if this password is the stored one."""
    return pw.judge(stored, password) is None


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("change", ["upper", "lower", "title"])
def test_schemes_of_other_systems_admit_the_right_password_only(stored: str, change: str) -> None:
    right, stored = STORED[stored] or "secret", cased(stored, change)
    assert pw.complaint(stored) == "" and pw.has_scheme(stored) and pw.scheme_of(stored) in pw.SCHEMES
    assert matches(stored, right)
    wrongs = [right[:-1], right.swapcase(), f"{right} ", "sécret", "x" * limits.PASSWORD_OCTETS_MAX]
    for wrong in wrongs if change == "upper" else wrongs[:1]:
        assert pw.judge(stored, wrong) is Reason.WRONG_PASSWORD, wrong


@pytest.mark.parametrize("mark", ["{PLAIN}", "{PBKDF2}", "{SCRAM-SHA-256}", "{DES", "{SHA}", "$1$", "{APR1}"])
def test_a_nul_is_in_no_password(mark: str) -> None:
    """HMAC fills its key with NULs, crypt(3) ends at one."""
    stored = "{PLAIN}secret" if mark == "{PLAIN}" else next(each for each in STORED if each.startswith(mark))
    assert pw.judge(stored, "secret\0") is Reason.WRONG_PASSWORD
    assert pw.judge(stored, "secret\0x") is Reason.WRONG_PASSWORD


@pytest.mark.parametrize("name", ["sha1", "sha256", "sha512"])
def test_pbkdf2_as_openldap_and_passlib_write_it(name: str) -> None:
    def adapted(octets: bytes) -> str:
        return base64.b64encode(octets).decode().rstrip("=").replace("+", ".")

    salt = bytes(range(240, 256))
    digest = hashlib.pbkdf2_hmac(name, b"secret", salt, 1000)
    rest = f"1000${adapted(salt)}${adapted(digest)}"
    kind = "" if name == "sha1" else f"-{name}"
    for stored in (
        f"{{PBKDF2{kind}}}{rest}",
        f"{{pbkdf2-{name}}}{rest}",
        f"$pbkdf2{kind}${rest}",
        f"{{CRYPT}}$pbkdf2{kind}${rest}",
    ):
        assert matches(stored, "secret") and not matches(stored, "secreT"), stored
    assert pw.judge(f"{{PBKDF2{kind}}}{rest[:-4]}", "secret") is Reason.MALFORMED


@pytest.mark.parametrize("octets", [4, 8, 16, 17, 64])
@pytest.mark.parametrize(("scheme", "name"), [("SMD5", "md5"), ("SSHA", "sha1"), ("SSHA256", "sha256"), ("SSHA512", "sha512")])
def test_a_salt_may_be_as_long_as_others_make_it(scheme: str, name: str, octets: int) -> None:
    salt = bytes(range(octets))
    kept = hashlib.new(name, b"secret" + salt).digest() + salt
    for stored in (f"{{{scheme}}}{base64.b64encode(kept).decode()}", f"{{{scheme}.hex}}{kept.hex()}"):
        assert matches(stored, "secret") and not matches(stored, "Secret")


def test_scram_keys_are_the_same_however_they_are_written() -> None:
    """Ours in hex, Dovecot's with commas, RFC 5803's (PostgreSQL) with dollars."""
    ours = pw.hash_scram("secret", b"salt" * 4)
    keys = pw.stored_scram_keys(ours)
    b64 = [base64.b64encode(part).decode() for part in keys[:3]]
    for text in (f"4096,{b64[0]},{b64[1]},{b64[2]}", f"SCRAM-SHA-256$4096:{b64[0]}${b64[1]}:{b64[2]}"):
        assert pw.stored_scram_keys("{SCRAM-SHA-256}" + text) == keys
        assert matches("{scram-sha-256}" + text, "secret")
    with pytest.raises(Unusable):
        pw.stored_scram_keys("{scram-sha-256}" + ours.partition("}")[2].replace("4096", "0"))


@pytest.mark.parametrize("scheme", sorted(pw.SCHEMES - set(CLEAR)))
def test_nonsense_admits_nobody_and_is_called_so(scheme: str) -> None:
    for rest in (
        "!",
        "*",
        "====",
        "AAAA",
        "$apr1$",
        "$apr1$$",
        "$1$$",
        "00" * 4,
        "é",
        "$2y$99$" + "x" * 53,
        "$$$",
        "$y$j",
        "a" * 5000,
    ):
        for suffix in ("", ".hex", ".b64", ".HEX"):
            stored = f"{{{scheme}{suffix}}}{rest}"
            assert pw.judge(stored, "secret") in (Reason.MALFORMED, Reason.TOO_COSTLY), stored
            assert "secret" not in pw.complaint(stored) != ""


@pytest.mark.parametrize("password", ["secret", "wrong", ""])
@pytest.mark.parametrize("stored", ["{plain}secret", "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "{SHA}5en6", "{x}secret", ""])
def test_a_wrong_password_costs_a_new_hash_whatever_is_stored(
    stored: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U07."""
    hashed: list[str] = []
    argon = pw._argon

    def counted(text: str) -> schemes.Check:
        hashed.append(text)
        return argon(text)

    monkeypatch.setattr(pw, "_argon", counted)
    assert (
        (pw.check(stored, password) is None)
        is (not hashed)
        is (stored in ("{plain}secret", "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=") and password == "secret")
    )


@pytest.mark.parametrize("stored", ["", "{ssha}", "{plain}", "{plain.b64}", "{argon2id}", "{crypt.hex}"])
def test_an_empty_value_is_no_password(stored: str) -> None:
    assert pw.judge(stored, "") is Reason.NO_PASSWORD
    assert pw.judge(stored, "secret") is Reason.NO_PASSWORD


@pytest.mark.parametrize(
    "stored", ["{rot13}frperg", "{CRAM-MD5}cd3ba7", "{}secret", "{ssha.rot13}x", "{ ssha}x", "{OTP}sha1 1024 x"]
)
def test_an_unknown_scheme_is_called_so(stored: str) -> None:
    assert pw.judge(stored, "secret") is Reason.UNKNOWN_SCHEME
    assert "is not known" in pw.complaint(stored)


@pytest.mark.parametrize(
    "stored",
    [
        "{SHA512-CRYPT}$6$rounds=999999999$abcdefgh$" + "x" * 86,
        "{CRYPT}$5$rounds=999999999999$abcdefgh$" + "x" * 43,
        "{BLF-CRYPT}$2b$31$" + "x" * 53,
        "{BLF-CRYPT}$2b$17$" + "x" * 53,
        "$P$Z" + "x" * 30,
        "{PHPASS}$H$H" + "x" * 30,
        "{PBKDF2}4294967295$AAAA$AAAA",
        "{PBKDF2}$1$salt$4294967295$" + "0" * 40,
        "$pbkdf2-sha512$99999999$AAAA$AAAA",
        "{yescrypt}$y$jZZ$saltsalt$" + "x" * 43,
        "{CRYPT}$7$zzzzzzzzzzz$" + "x" * 43,
        "{CRYPT}$sha1$4000000000$salt$" + "x" * 28,
        "{ARGON2ID}$argon2id$v=19$m=1048576,t=40,p=1$7hW2h2VRAp1NmeJ7qnShLw$V6v+J6dejJiL5pqoDH1RNLqK8zWwIFhuoSNaVFubTh8",
        "{ARGON2ID}$argon2id$v=19$m=4194304,t=1,p=1$7hW2h2VRAp1NmeJ7qnShLw$V6v+J6dejJiL5pqoDH1RNLqK8zWwIFhuoSNaVFubTh8",
        "{SCRAM-SHA-256}99999999,zsRJ7WN/FWQFZ9cIpVi9cw==,SKuLaM5ZQQkYNuWfJljnV9L4C9ncNyPOsunFqvo6sSU=,j5+o22UFOtwMMGRYkErdFLnMEGLS"
        "uVTs4ShcWoCgVlI=",
    ],
)
def test_absurd_rounds_cost_a_failed_login_and_no_time(stored: str) -> None:
    began = time.process_time()
    assert pw.judge(stored, "secret") is Reason.TOO_COSTLY
    assert time.process_time() - began < 0.1
    assert "too costly" in pw.complaint(stored)


def test_what_other_systems_take_by_themselves_is_within_the_bounds() -> None:
    for stored in (
        "{ARGON2ID}$argon2id$v=19$m=1048576,t=4,p=1$7hW2h2VRAp1NmeJ7qnShLw$V6v+J6dejJiL5pqoDH1RNLqK8zWwIFhuoSNaVFubTh8",
        "{CRYPT}$6$rounds=656000$abcdefgh$" + "x" * 86,
        "{BCRYPT}$2b$14$" + "x" * 53,
        "$P$B" + "x" * 30,
        "{yescrypt}$y$jBT$saltsalt$" + "x" * 43,
        "{PBKDF2-SHA512}210000$AAAA$" + "x" * 86,
    ):
        assert pw.complaint(stored) == "", stored


def test_a_digest_with_a_salt_is_none_without_and_the_other_way() -> None:
    """Else the salt of a cut value could be anything."""
    salted, bare = "hT9quEvEuAQrlGEg5zBw4LkIMuXEe0C2", "5en6G6MezRroT3XKqkdPOmY/BfQ="
    assert pw.judge("{SSHA}" + bare, "secret") is Reason.MALFORMED
    assert pw.judge("{SHA}" + salted, "secret") is Reason.MALFORMED


@pytest.mark.parametrize(
    "stored", [each for each in STORED if "$1$" in each or "$5$" in each or "$6$" in each or "X0QT" in each]
)
def test_without_libcrypt_libpass_does_it(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_LIBCRYPT", None)
    assert matches(stored, STORED[stored] or "secret") and not matches(stored, "Secret")


def test_what_neither_library_knows_is_called_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_LIBCRYPT", None)
    for stored in ("{BLF-CRYPT}$2y$05$8hJBRYBAZMTKxiLl6uiLo.GrpfE7BrGQ3TBY8k/SDJkaaeFwnB3ia", "$y$j9T$saltsalt$" + "x" * 43):
        assert pw.judge(stored, "secret") is Reason.UNKNOWN_SCHEME


def test_libpass_costs_nobody_who_has_no_such_password() -> None:
    """A tenth of a second at every start, else."""
    code = (
        "import sys; from powermail.directory import password as pw, authenticate\n"
        "assert pw.judge('{plain}secret', 'secret') is None and pw.complaint('{SSHA}hT9quEvEuAQrlGEg5zBw4LkIMuXEe0C2') == ''\n"
        "assert pw.judge('$6$x$y', 'secret') is not None and 'passlib' not in sys.modules\n"
        "assert pw.judge('{SSHA}hT9quEvEuAQrlGEg5zBw4LkIMuXEe0C2', 'secret') is None and 'passlib' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_dummy_costs_what_a_new_hash_costs() -> None:
    """U07: an unknown user takes as long."""
    assert pw.DUMMY.rsplit("$", 2)[0] == pw.hash_password("x").rsplit("$", 2)[0]
