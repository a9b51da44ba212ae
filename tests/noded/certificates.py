"""Makes authorities and certificates of clusters for tests: good ones, expired ones, of other clusters and of other roles."""

from __future__ import annotations

import datetime
import ssl
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from powermail.base.tls import peer_context

_DAY = datetime.timedelta(days=1)


@lru_cache(maxsize=64)
def _key(label: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Authority:
    """One authority and what it has issued, as files in a directory."""

    def __init__(self, directory: Path, label: str = "ours") -> None:
        self._directory = directory
        self._label = label
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {label}")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(_key(label).public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * _DAY)
            .not_valid_after(now + 30 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(_key(label), hashes.SHA256())
        )
        self.path = str(directory / f"authority-{label}.pem")
        Path(self.path).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self._issued = 0

    def issue(self, *uris: str, ends_in: datetime.timedelta = _DAY) -> tuple[str, str]:
        """A certificate with these names; the paths of it and of its key."""
        self._issued += 1
        label = f"{self._label}-{self._issued}"
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)]))
            .issuer_name(self._name)
            .public_key(_key("leaf").public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 20 * _DAY)
            .not_valid_after(now + ends_in)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        paths = str(self._directory / f"{label}.pem"), str(self._directory / f"{label}.key")
        certificate = builder.sign(_key(self._label), hashes.SHA256())
        Path(paths[0]).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        Path(paths[1]).write_bytes(_pem(_key("leaf")))
        Path(paths[1]).chmod(0o600)
        return paths

    def server(self, *uris: str, ends_in: datetime.timedelta = _DAY) -> ssl.SSLContext:
        """The context of a node with these names."""
        return peer_context(True, *self.issue(*uris, ends_in=ends_in), self.path)

    def client(self, *uris: str, ends_in: datetime.timedelta = _DAY) -> ssl.SSLContext:
        """The context of a peer with these names."""
        return peer_context(False, *self.issue(*uris, ends_in=ends_in), self.path)


def uris(cluster: str, peer: str, *roles: str) -> list[str]:
    """The names of a peer."""
    return [f"powermail://{cluster}/{role}/{peer}" for role in roles]
