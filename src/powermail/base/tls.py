"""Owns certificates: immutable contexts per generation, swapped when the files change, old kept if the new is bad.

RFC 8996: nothing below TLS 1.2. RFC 9325 for the rest, by the library's defaults.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from powermail.base.certificates import facts_of
from powermail.base.disk import Disk
from powermail.base.errors import OperatorError
from powermail.base.log import Event, Log


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """A server context from two PEM files. Raises OSError or ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context


def client_context(verify: bool, authorities: str = "") -> ssl.SSLContext:
    """A client context; without `verify` it only protects from listeners (opportunistic TLS, RFC 7435)."""
    context = ssl.create_default_context(cafile=authorities or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def peer_context(server_side: bool, certificate: str, key: str, authority: str, others: bool = False) -> ssl.SSLContext:
    """A context of one end between machines of a cluster: TLS 1.3, both ends show a certificate of the cluster's authority.

    Who the other end is stands in its certificate and is the caller's to judge; host names say nothing. Nothing is resumed: a
    certificate is looked at anew on each connection. With `others` a client may come without one: who joins has none yet; one
    that is shown is looked at all the same. Raises OSError or ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_OPTIONAL if others else ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=authority)
    context.load_cert_chain(certificate, key)
    if server_side:
        context.num_tickets = 0
    return context


def _ends_at(pem: bytes) -> float | None:
    """When the first certificate of a chain ends, in UTC; None if that cannot be read."""
    try:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    except ValueError:
        return None


class Certificates:
    """The current server context; `front` is what listeners hold, its handshakes use the newest generation."""

    def __init__(self, certificate: str, key: str, disk: Disk, log: Log) -> None:
        """Raises OperatorError when the files cannot be used at the start."""
        self._certificate = certificate
        self._key = key
        self._disk = disk
        self._log = log
        try:
            self.front = server_context(certificate, key)
            self._seen = self._marks()
        except (OSError, ssl.SSLError) as error:
            raise OperatorError(f"cannot use the certificate {certificate} with {key}: {error}") from error
        self._current = self.front
        self.ends_at = _ends_at(self._seen[0])
        self.front.sni_callback = self._select

    def _select(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _marks(self) -> tuple[bytes, bytes]:
        return self._disk.read_file(self._certificate), self._disk.read_file(self._key)

    def reload(self) -> bool:
        """Takes new files if they changed and are good. Blocks on the disk: call in a lane."""
        try:
            marks = self._marks()
            if marks == self._seen:
                return False
            fresh = server_context(self._certificate, self._key)
        except (OSError, ssl.SSLError) as error:
            self._log.event(Event.CERTIFICATE_BAD, error=str(error), kept="the old one")
            return False
        self._current = fresh
        self._seen = marks
        self.ends_at = _ends_at(marks[0])
        self._log.event(Event.CERTIFICATE, reloaded=self._certificate)
        return True


class PeerCertificate:
    """What a process shows to others of its cluster: contexts that never change, made anew when the files do.

    A connection keeps the generation that it began with; who makes one asks here for the newest.
    """

    def __init__(self, paths: tuple[str, str, str], disk: Disk, log: Log) -> None:
        """`paths` of certificate, key and authority. Raises OperatorError when they cannot be used at the start."""
        self.paths = paths
        self._disk = disk
        self._log = log
        try:
            self._take(self._read())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise OperatorError(f"cannot use {', '.join(self.paths)} between machines: {error}") from error

    def _read(self) -> tuple[bytes, ...]:
        return tuple(self._disk.read_file(path) for path in self.paths)

    def _take(self, octets: tuple[bytes, ...]) -> None:
        """Raises OSError, ValueError; then nothing has changed."""
        facts = facts_of(octets[0])
        server, client = peer_context(True, *self.paths), peer_context(False, *self.paths)
        joining = peer_context(True, *self.paths, others=True)
        self._server, self._client, self._joining = server, client, joining
        self._seen, self.facts = octets, facts

    def server(self) -> ssl.SSLContext:
        """For a connection that comes in."""
        return self._server

    def client(self) -> ssl.SSLContext:
        """For a connection that goes out."""
        return self._client

    def joining(self) -> ssl.SSLContext:
        """For one that comes in to the authority."""
        return self._joining

    @property
    def authority(self) -> bytes:
        """The cluster's authority, as PEM."""
        return self._seen[2]

    def days_left(self, now: float) -> float:
        """Until it ends."""
        return (self.facts.ends_at - now) / 86_400.0

    def reload(self) -> bool:
        """Takes new files if they changed and are good. Blocks on the disk: call in a lane."""
        try:
            octets = self._read()
            if octets == self._seen:
                return False
            self._take(octets)
        except (OSError, ValueError) as error:
            self._log.event(Event.CERTIFICATE_BAD, error=str(error), kept="the old one")
            return False
        self._log.event(Event.CERTIFICATE, reloaded=self.paths[0])
        return True


def make_self_signed(hostname: str, now: datetime.datetime) -> tuple[bytes, bytes]:
    """A key and a self-signed certificate for ten years, as PEM (certificate, key)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:64])])
    names: list[x509.GeneralName] = [x509.DNSName(hostname)]
    if hostname == "localhost":
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM), private
