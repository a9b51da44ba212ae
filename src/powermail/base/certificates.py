"""Owns certificates of a cluster as values: its authority, keys and requests for them, issuing, and checking one against a pin.

X.509 is the library's (`cryptography`); here is what a cluster's certificates have: P-256 keys, SHA-256, one authority that
issues them itself, names as URIs in the subject's alternative names. What a request asks for is not looked at but for its key.
Times are seconds since 1970 UTC and come from the caller.

Danger: whoever has the authority's key can make any member of the cluster. It lies in one file, mode 0600, on one machine.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from powermail.base import limits
from powermail.base.clock import utc

_DAY_S = 86_400.0
_CURVE = ec.SECP256R1


class BadRequest(Exception):
    """A request for a certificate that none is given for."""


class Untrusted(Exception):
    """A certificate that proves nothing here; `why` is a word, the text says it to people."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


class Facts(NamedTuple):
    """What a certificate says: its URIs, and from when until when it is good (UTC)."""

    uris: tuple[str, ...]
    begins_at: float
    ends_at: float

    @property
    def renew_at(self) -> float:
        """When it is time for the next one."""
        return self.begins_at + (self.ends_at - self.begins_at) * limits.CERTIFICATE_RENEW_SHARE


# -- keys and requests ------------------------------------------------------------------------------------------------


def make_key() -> bytes:
    """A new key as PEM, not encrypted: its file protects it."""
    return _key_pem(ec.generate_private_key(_CURVE()))


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Raises ValueError."""
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("it is no key of an elliptic curve")
    return key


def make_request(key: bytes) -> bytes:
    """Asks for a certificate for this key (PKCS #10, RFC 2986), without any name: DER. Raises ValueError."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(_read_key(key), hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def _requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a request whose sender has it. Raises BadRequest."""
    if len(request) > limits.ENROLMENT_REQUEST_OCTETS_MAX:
        raise BadRequest(f"a request has at most {limits.ENROLMENT_REQUEST_OCTETS_MAX} octets")
    try:
        asked = x509.load_der_x509_csr(request)
        key = asked.public_key()
        signed = asked.is_signature_valid
    except Exception as error:
        raise BadRequest("it is no request for a certificate") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVE):
        raise BadRequest("its key is not of the curve P-256")
    if not signed:
        raise BadRequest("it is not signed by the key that it names")
    return key


# -- issuing ----------------------------------------------------------------------------------------------------------


def _begun(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begins: float, ends: float, authority: bool
           ) -> x509.CertificateBuilder:  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc(begins).replace(microsecond=0))
        .not_valid_after(utc(ends).replace(microsecond=0))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=authority,
                crl_sign=authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )


def make_authority(cluster: str, now: float) -> tuple[bytes, bytes]:
    """The authority of a cluster: (certificate, key) as PEM."""
    key = ec.generate_private_key(_CURVE())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"PowerMail {cluster}"[:64])])
    begins, ends = now - limits.CERTIFICATE_BACKDATED_S, now + limits.AUTHORITY_DAYS * _DAY_S
    certificate = _begun(name, name, key.public_key(), begins, ends, True).sign(key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


class Authority:
    """A cluster's authority with its key: who has it makes members."""

    def __init__(self, certificate: bytes, key: bytes) -> None:
        """Of PEM. Raises ValueError when they are damaged or do not belong together."""
        self._certificate = x509.load_pem_x509_certificate(certificate)
        self._key = _read_key(key)
        if _public_octets(self._key.public_key()) != _public_octets(self._certificate.public_key()):
            raise ValueError("the key is not that of the certificate")
        self.der = self._certificate.public_bytes(serialization.Encoding.DER)

    @property
    def ends_at(self) -> float:
        """When it can issue no more, UTC."""
        return self._certificate.not_valid_after_utc.timestamp()

    def issue(self, request: bytes, name: str, uris: Sequence[str], now: float, days: float = limits.CERTIFICATE_DAYS) -> bytes:
        """A certificate for the key of a request, with these names and no other: DER. Raises BadRequest."""
        key = _requested_key(request)
        if now >= self.ends_at:
            raise BadRequest("the authority itself has ended: the cluster needs another one")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        begins, ends = now - limits.CERTIFICATE_BACKDATED_S, min(now + days * _DAY_S, self.ends_at)
        alternatives = [x509.UniformResourceIdentifier(uri) for uri in uris]
        used_for = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        builder = (
            _begun(subject, self._certificate.subject, key, begins, ends, False)
            .add_extension(x509.ExtendedKeyUsage(used_for), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if alternatives:  # a certificate without names is nobody's
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


# -- reading and checking ---------------------------------------------------------------------------------------------


def _public_octets(key: object) -> bytes:
    assert hasattr(key, "public_bytes")
    octets: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return octets


def _read(certificate: bytes) -> x509.Certificate:
    """PEM (the first of a chain) or DER. Raises ValueError."""
    if certificate.lstrip().startswith(b"-----"):
        return x509.load_pem_x509_certificate(certificate)
    return x509.load_der_x509_certificate(certificate)


def pin_of(certificate: bytes) -> str:
    """The SHA-256 of a certificate's public key, in hex: what a token names the authority by. Raises ValueError."""
    return hashlib.sha256(_public_octets(_read(certificate).public_key())).hexdigest()


def as_pem(certificate: bytes) -> bytes:
    """The same certificate as PEM. Raises ValueError."""
    return _read(certificate).public_bytes(serialization.Encoding.PEM)


def facts_of(certificate: bytes) -> Facts:
    """What it says. Raises ValueError."""
    read = _read(certificate)
    try:
        alternatives = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = tuple(alternatives.get_values_for_type(x509.UniformResourceIdentifier))
    except x509.ExtensionNotFound:
        uris = ()
    return Facts(uris, read.not_valid_before_utc.timestamp(), read.not_valid_after_utc.timestamp())


def check_issued(certificate: bytes, authority: bytes, now: float) -> Facts:
    """What a certificate says that this authority issued and that is good now; its octets may come from anybody.

    Raises Untrusted.
    """
    try:
        read, issuer = _read(certificate), _read(authority)
        read.verify_directly_issued_by(issuer)
        basic = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        facts = facts_of(certificate)
    except InvalidSignature as error:
        raise Untrusted("foreign", "the certificate is not signed by the authority") from error
    except Exception as error:
        raise Untrusted("foreign", f"the certificate is not of the authority: {error}") from error
    if not basic.ca:
        raise Untrusted("foreign", "what signed the certificate is no authority")
    for one, what in ((facts_of(authority), "the authority"), (facts, "the certificate")):
        if not one.begins_at <= now <= one.ends_at:
            raise Untrusted("date", f"{what} is good from {_day(one.begins_at)} to {_day(one.ends_at)}, and the clock of this "
                            f"machine says {_day(now)}: is it right?")  # fmt: skip
    return facts


def _day(at: float) -> str:
    return utc(at).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def check_pinned(pin: str, authority: bytes, certificate: bytes, now: float) -> Facts:
    """What the certificate that a peer has shown says, when the authority that it names is the pinned one and issued it.

    Raises Untrusted.
    """
    try:
        found = pin_of(authority)
    except Exception as error:
        raise Untrusted("foreign", "what is shown as the authority is no certificate") from error
    if found != pin:
        raise Untrusted("pin", f"another authority answers there ({found[:16]}…, and the token names {pin[:16]}…)")
    return check_issued(certificate, authority, now)


def has_key(certificate: bytes, key: bytes) -> bool:
    """True if a certificate is for this key (PEM). Raises ValueError."""
    return _public_octets(_read(certificate).public_key()) == _public_octets(_read_key(key).public_key())
