"""Owns the settings: one table of typed sections, read from TOML, then environment, then command line.

Unknown keys are refused with the nearest known one. `docs/settings.md` is generated from this table.
Environment: POWERMAIL_SECTION__KEY=value. Command line: --set section.key=value.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from powermail.base import limits
from powermail.base.database_url import parse_database_url
from powermail.base.errors import OperatorError
from powermail.base.net import parse_host_port


def _says(text: str) -> Meta:
    return Meta(description=text)


class NodeSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One `[[cluster.nodes]]` entry: a storage node served in this process, or by another machine."""

    id: Annotated[str, _says("name of the node, unique for ever in this cluster")]
    path: Annotated[str, _says("its directory, when it is served here; relative paths are below the data directory")] = ""
    address: Annotated[str, _says("host:port of the process that serves it, instead of a path")] = ""
    group: Annotated[str, _says("failure domain; nodes of one group are never redundant for each other")]
    priority: Annotated[int, _says("lower is used first; a higher number is a hot spare")] = 1
    site: Annotated[str, _says("where it stands; empty: where this machine does, if it is served here")] = ""


class ClusterSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """Copies and the nodes that hold them."""

    copies_required: Annotated[int, Meta(ge=1, le=8), _says("R: durable copies in different groups before 250")] = 2
    policy: Annotated[str, _says("spread-disk (by free space), spread-load (fewest waiting) or random")] = "spread-disk"
    sites: Annotated[
        str, _says("where nodes stand in several sites: the copies of a message go apart, or into the near one first")
    ] = "apart"
    segment_octets: Annotated[int, Meta(ge=limits.SEGMENT_OCTETS_MIN), _says("size of a log segment")] = (
        limits.SEGMENT_OCTETS_DEFAULT
    )
    reserve_octets: Annotated[int, Meta(ge=0), _says("free space below which a node takes no mail; deletes work")] = (
        limits.NODE_RESERVE_OCTETS_DEFAULT
    )
    repair_after_s: Annotated[float, Meta(ge=0), _says("a node away for longer counts as lost and is repaired around")] = (
        limits.REPAIR_AFTER_S_DEFAULT
    )
    compression: Annotated[bool, _says("zstd per chunk where it helps")] = True
    tombstone_days: Annotated[
        float, Meta(ge=1), _says("how long records of deletions stay: backups of the index may be so old")
    ] = limits.TOMBSTONE_DAYS_DEFAULT
    nodes: list[NodeSettings] = field(default_factory=list)


class IndexSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """The database of what each mailbox shows."""

    path: Annotated[str, _says("SQLite file, if no database is named")] = "index.db"
    database: Annotated[str, _says("postgresql://user@host[,host…]/name, for several processes or machines")] = ""
    wait_s: Annotated[float, Meta(ge=0), _says("how long a 250 waits for the index; the nodes are enough")] = (
        limits.INDEX_WAIT_S_DEFAULT
    )


class DirectorySettings(Struct, forbid_unknown_fields=True, frozen=True):
    """The database of who exists."""

    backend: Annotated[str, _says("sqlite, postgresql or mysql (MariaDB too)")] = "sqlite"
    path: Annotated[str, _says("SQLite file, for backend sqlite")] = "directory.db"
    database: Annotated[
        str,
        _says(
            "for postgresql and mysql: `postgresql://USER@HOST[:PORT][,HOST[:PORT]...]/NAME`; a host that begins with %2F is a "
            "unix socket; of several hosts one takes changes"
        ),
    ] = ""
    database_password_file: Annotated[str, _says("file with its password, mode 0600; read at the start")] = ""
    database_tls: Annotated[str, _says("none, or required (verified)")] = "none"
    database_ca: Annotated[str, _says("PEM file of authorities to trust; empty: the system's")] = ""
    connections: Annotated[int, Meta(ge=1, le=100), _says("connections of this process to the database")] = (
        limits.DIRECTORY_CONNECTIONS_DEFAULT
    )
    find: Annotated[
        str, _says("a statement of your own for tables of your own: [directory.md](directory.md); empty: our table, accounts")
    ] = ""
    serves: Annotated[str, _says("with find: any row says that a domain has addresses here")] = ""
    identify: Annotated[str, _says("with find, where an address may change: the address of an id")] = ""
    listing: Annotated[str, _says("with find: a page of accounts, for `powermail account list`")] = ""
    cache_ttl_s: Annotated[float, Meta(ge=0), _says("how long a look-up is believed")] = limits.DIRECTORY_CACHE_TTL_S
    stale_s: Annotated[float, Meta(ge=0), _says("how long it serves while the directory is away")] = limits.DIRECTORY_STALE_S
    recipient_delimiter: Annotated[str, Meta(max_length=1), _says("subaddress mark; empty turns it off")] = "+"
    quota_strict: Annotated[bool, _says("refuse each full mailbox even if the message fits another recipient")] = False
    upgrade_passwords: Annotated[bool, _says("re-hash old schemes to argon2id at login")] = True
    apop: Annotated[bool, _says("offer APOP (needs {plain} passwords)")] = False
    purge_grace_days: Annotated[float, Meta(ge=0), _says("how long `powermail purge` can be undone")] = 7.0
    postmaster: Annotated[
        str, _says("mailbox that gets mail for postmaster at served domains without one; empty: postmaster@hostname")
    ] = ""

    @property
    def in_file(self) -> bool:
        """True if it is a file of ours: made, brought on and backed up with the data directory."""
        return self.backend == "sqlite" and not self.find


class PeersSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """How the processes of a cluster know each other: [peer-protocol.md](peer-protocol.md)."""

    listen: Annotated[list[str], _says("where `powermail serve --roles node` serves its nodes")] = field(
        default_factory=lambda: ["127.0.0.1:2700"]
    )
    certificate: Annotated[str, _says("PEM file; its names say cluster, roles and id")] = "tls/peer.pem"
    key: Annotated[str, _says("PEM file with its key, mode 0600")] = "tls/peer.key"
    authority: Annotated[str, _says("PEM file with the cluster's authority")] = "tls/authority.pem"
    authority_at: Annotated[list[str], _says("host:port of who renews the certificate; empty: nobody does")] = field(
        default_factory=list
    )
    authority_listen: Annotated[list[str], _says("where this machine gives certificates; empty: it does not")] = field(
        default_factory=list
    )
    authority_key: Annotated[str, _says("PEM file with the authority's key, mode 0600, only where that is listened for")] = (
        "authority/key.pem"
    )


class SmtpSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """Receiving mail: SMTP, submission and LMTP."""

    listen: Annotated[list[str], _says("SMTP (port 25) addresses")] = field(default_factory=lambda: ["127.0.0.1:2525"])
    submission: Annotated[list[str], _says("submission (587) addresses, STARTTLS")] = field(
        default_factory=lambda: ["127.0.0.1:2587"]
    )
    submissions: Annotated[list[str], _says("submission (465) addresses, implicit TLS")] = field(
        default_factory=lambda: ["127.0.0.1:2465"]
    )
    lmtp: Annotated[list[str], _says("LMTP addresses, for trusted peers only")] = field(
        default_factory=lambda: ["127.0.0.1:2424"]
    )
    message_octets_max: Annotated[int, Meta(ge=1024, le=limits.CHUNK_OCTETS * limits.CHUNKS_MAX), _says("largest message")] = (
        50 * limits.MIB
    )
    recipients_max: Annotated[int, Meta(ge=100), _says("recipients per transaction")] = limits.SMTP_RECIPIENTS_MAX
    connections_max: Annotated[int, Meta(ge=1), _says("all connections of the SMTP doors")] = limits.CONNECTIONS_MAX_DEFAULT
    connections_per_address_max: Annotated[int, Meta(ge=1), _says("connections per client address, or /64 of IPv6")] = (
        limits.CONNECTIONS_PER_ADDRESS_MAX_DEFAULT
    )
    proxy_from: Annotated[list[str], _says("networks whose PROXY protocol header is required and believed")] = field(
        default_factory=list
    )
    submission_per_hour: Annotated[int, Meta(ge=1), _says("recipients per account and hour")] = 1000
    greeting: Annotated[str, _says("text behind the host name in the banner")] = "PowerMail"


class PopSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """Reading mail by POP3."""

    listen: Annotated[list[str], _says("POP3 (110) addresses, STLS")] = field(default_factory=lambda: ["127.0.0.1:2110"])
    listen_tls: Annotated[list[str], _says("POP3S (995) addresses")] = field(default_factory=lambda: ["127.0.0.1:2995"])
    plaintext_login: Annotated[bool, _says("allow passwords without TLS (never on a real network)")] = False
    connections_max: Annotated[int, Meta(ge=1), _says("all POP3 connections")] = limits.CONNECTIONS_MAX_DEFAULT
    connections_per_address_max: Annotated[int, Meta(ge=1), _says("connections per client address, or /64 of IPv6")] = (
        limits.CONNECTIONS_PER_ADDRESS_MAX_DEFAULT
    )
    proxy_from: Annotated[list[str], _says("networks whose PROXY protocol header is required and believed")] = field(
        default_factory=list
    )


class AuthSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """Logging in, at every door."""

    trusted_networks: Annotated[
        list[str], _says("networks of webmail and proxies of yours: logins without TLS, no delay or refusal by address")
    ] = field(default_factory=list)


class OutboundSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """Mail that leaves."""

    smarthost: Annotated[str, _says("host:port that takes all outgoing mail; empty: the queue waits")] = ""
    smarthost_tls: Annotated[str, _says("none, opportunistic, required (verified) or implicit (verified)")] = "opportunistic"
    smarthost_ca: Annotated[str, _says("PEM file of authorities to trust; empty: the system's")] = ""
    smarthost_user: Annotated[str, _says("AUTH user; empty: none")] = ""
    smarthost_password_file: Annotated[str, _says("file with its password, mode 0600")] = ""
    smarthost_token_file: Annotated[str, _says("file with a token for XOAUTH2 instead; read for each connection")] = ""
    smarthost_token_command: Annotated[str, _says("command that prints such a token; run for each connection")] = ""
    concurrency: Annotated[int, Meta(ge=1, le=1000), _says("connections to the smarthost")] = limits.QUEUE_CONCURRENCY_DEFAULT
    lifetime_s: Annotated[float, Meta(ge=60), _says("how long mail is tried before the DSN")] = limits.QUEUE_LIFETIME_S
    delay_notice_s: Annotated[
        float, Meta(ge=0), _says("after which a sender who asked for it (NOTIFY=DELAY) hears that mail waits; 0: never")
    ] = limits.QUEUE_DELAY_NOTICE_S
    eight_bit: Annotated[str, _says("8-bit bodies for a hop without 8BITMIME: send them as they are, or bounce")] = "send"
    retry_first_s: Annotated[float, Meta(gt=0), _says("pause after the first failure; doubles")] = limits.QUEUE_RETRY_FIRST_S
    srs_domain: Annotated[str, _says("domain of rewritten reverse-paths; empty: the host name")] = ""


class MetricsSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """What a monitoring system asks over HTTP: /metrics, /live, /ready. No log-in, so it stays on this machine."""

    listen: Annotated[list[str], _says('addresses, like ["127.0.0.1:2900"]; empty: off')] = field(default_factory=list)
    allow_remote: Annotated[bool, _says("also addresses beyond loopback: whoever reaches them may read all figures")] = False


class LogSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """The event log."""

    level: Annotated[str, _says("debug, info, warning or error")] = "info"
    json: Annotated[bool, _says("one JSON object per line")] = False


class TlsSettings(Struct, forbid_unknown_fields=True, frozen=True):
    """Certificates; reread when the files change, the old one kept if the new is bad."""

    certificate: Annotated[str, _says("PEM file with the chain")] = "tls/certificate.pem"
    key: Annotated[str, _says("PEM file with the key")] = "tls/key.pem"


class Settings(Struct, forbid_unknown_fields=True, frozen=True):
    """Everything an operator may turn."""

    hostname: Annotated[str, _says("this host's name in banners, trace fields and DSNs")] = "localhost"
    site: Annotated[
        str, _says("where this machine stands, a word: nodes of the same site are read first; empty: nobody says")
    ] = ""
    workers: Annotated[
        int,
        Meta(ge=0, le=limits.WORKERS_MAX),
        _says("front-end processes of this machine, which need index.database; 0: 1 up to two cores, half of more as a role"),
    ] = 0
    cluster: ClusterSettings = ClusterSettings()
    index: IndexSettings = IndexSettings()
    directory: DirectorySettings = DirectorySettings()
    peers: PeersSettings = PeersSettings()
    smtp: SmtpSettings = SmtpSettings()
    pop: PopSettings = PopSettings()
    auth: AuthSettings = AuthSettings()
    outbound: OutboundSettings = OutboundSettings()
    metrics: MetricsSettings = MetricsSettings()
    tls: TlsSettings = TlsSettings()
    log: LogSettings = LogSettings()


POLICIES = ("spread-disk", "spread-load", "random")
SITES = ("apart", "near")
DIRECTORIES = ("sqlite", "postgresql", "mysql")
INDEX_KINDS = {"postgresql": 5432, "postgres": 5432}  # what the address of its database may begin with; the usual port
TLS_MODES = ("none", "opportunistic", "required", "implicit")


def check(settings: Settings) -> None:
    """Refuses settings that contradict each other. Raises OperatorError with the reason (F29)."""
    _check_networks(settings)
    _check_addresses(settings)
    _check_metrics(settings.metrics)
    _check_directory(settings.directory)
    if settings.workers > 1 and not settings.index.database:
        raise OperatorError(
            f"workers = {settings.workers} needs an index in a database (index.database): with SQLite one process does "
            "everything"
        )
    cluster = settings.cluster
    ids = [node.id for node in cluster.nodes]
    groups = {node.group for node in cluster.nodes}
    if len(set(ids)) != len(ids):
        raise OperatorError("cluster.nodes: two nodes have the same id")
    paths = [node.path.rstrip("/") for node in cluster.nodes if node.path]
    if len(set(paths)) != len(paths):
        raise OperatorError("cluster.nodes: two nodes have the same path")
    for node in cluster.nodes:
        if bool(node.path) is bool(node.address):
            raise OperatorError(f"cluster.nodes: node {node.id} has either a path or an address")
    for node in cluster.nodes:
        if not node.id.isascii() or not node.id.replace("-", "").replace("_", "").isalnum():
            raise OperatorError(f"cluster.nodes: {node.id!r} is not a name of letters, digits, - and _")
    if cluster.nodes and cluster.copies_required > len(groups):
        raise OperatorError(
            f"cluster.copies_required = {cluster.copies_required} needs that many groups, but the nodes have only "
            f"{len(groups)}: {', '.join(sorted(groups))}"
        )
    if cluster.policy not in POLICIES:
        raise OperatorError(f"cluster.policy: {cluster.policy!r} is none of {', '.join(POLICIES)}")
    _check_sites(settings)
    if settings.outbound.smarthost_tls not in TLS_MODES:
        raise OperatorError(f"outbound.smarthost_tls: none of {', '.join(TLS_MODES)}")
    if settings.outbound.smarthost_user and settings.outbound.smarthost_tls in ("none", "opportunistic"):
        raise OperatorError("outbound.smarthost_user needs smarthost_tls = required or implicit")
    out = settings.outbound
    if out.eight_bit not in ("send", "bounce"):
        raise OperatorError(f"outbound.eight_bit: {out.eight_bit!r} is neither send nor bounce")
    if bool(out.smarthost_password_file) + bool(out.smarthost_token_file) + bool(out.smarthost_token_command) > 1:
        raise OperatorError("outbound: one of smarthost_password_file, smarthost_token_file, smarthost_token_command")
    secret = out.smarthost_password_file or out.smarthost_token_file or out.smarthost_token_command
    if out.smarthost_user and not secret:
        raise OperatorError(
            "outbound.smarthost_user needs smarthost_password_file, smarthost_token_file or smarthost_token_command"
        )
    if settings.log.level not in ("debug", "info", "warning", "error"):
        raise OperatorError("log.level: none of debug, info, warning, error")
    host = settings.hostname
    if not host.isascii() or not host.replace(".", "").replace("-", "").isalnum() or len(host) > 255:
        raise OperatorError(f"hostname: {host!r} is not a domain name")


def is_site(name: str) -> bool:
    """True if a site may be called so: a word, or "" for none."""
    return name.isprintable() and not any(character.isspace() for character in name) and len(name) <= limits.SITE_CHARS_MAX


def _check_sites(settings: Settings) -> None:
    cluster = settings.cluster
    if cluster.sites not in SITES:
        raise OperatorError(f"cluster.sites: {cluster.sites!r} is none of {', '.join(SITES)}")
    said = {"site": settings.site} | {f"cluster.nodes: site of {node.id}": node.site for node in cluster.nodes}
    for name, site in said.items():
        if not is_site(site):
            raise OperatorError(f"{name}: {site[: limits.SITE_CHARS_MAX]!r} is not a word")


def _check_directory(directory: DirectorySettings) -> None:
    if directory.backend not in DIRECTORIES:
        raise OperatorError(f"directory.backend: {directory.backend!r} is none of {', '.join(DIRECTORIES)}")
    if directory.database_tls not in ("none", "required"):
        raise OperatorError(f"directory.database_tls: {directory.database_tls!r} is neither none nor required")
    if (directory.backend == "sqlite") == bool(directory.database):
        raise OperatorError(
            "directory.database is for backend postgresql or mysql, and they need it; sqlite has directory.path"
        )
    if directory.find and not directory.serves:
        raise OperatorError(
            "directory.find needs directory.serves: unknown users of your domains get another answer than others"
        )
    if not directory.find and (directory.serves or directory.identify or directory.listing):
        raise OperatorError("directory.serves, identify and listing are for directory.find, which is empty")


def _check_addresses(settings: Settings) -> None:
    """Each is `host:port`, whether this machine uses it or not: a mistake shows when it is made."""
    smtp, pop, peers = settings.smtp, settings.pop, settings.peers
    smarthost = settings.outbound.smarthost
    addresses = {
        "smtp.listen": smtp.listen,
        "smtp.submission": smtp.submission,
        "smtp.submissions": smtp.submissions,
        "smtp.lmtp": smtp.lmtp,
        "pop.listen": pop.listen,
        "pop.listen_tls": pop.listen_tls,
        "peers.listen": peers.listen,
        "peers.authority_at": peers.authority_at,
        "peers.authority_listen": peers.authority_listen,
        "metrics.listen": settings.metrics.listen,
        "outbound.smarthost": [smarthost] if smarthost else [],
        **{f"cluster.nodes: {node.id}": [node.address] for node in settings.cluster.nodes if node.address},
    }
    for name, texts in addresses.items():
        for text in texts:
            parse_host_port(text, name)
    if settings.index.database:
        parse_database_url(settings.index.database, INDEX_KINDS, "index.database")


def _check_networks(settings: Settings) -> None:
    for name, texts in (
        ("smtp.proxy_from", settings.smtp.proxy_from),
        ("pop.proxy_from", settings.pop.proxy_from),
        ("auth.trusted_networks", settings.auth.trusted_networks),
    ):
        for text in texts:
            try:
                ipaddress.ip_network(text, strict=False)
            except ValueError as error:
                raise OperatorError(f"{name}: {text!r} is not a network: {error}") from error


def _check_metrics(metrics: MetricsSettings) -> None:
    for text in metrics.listen:
        host = parse_host_port(text)[0]
        if not metrics.allow_remote and host != "localhost" and not _is_loopback(host):
            raise OperatorError(
                f"metrics.listen: {text!r} is not an address of this machine alone, like 127.0.0.1:2900 or [::1]:2900; figures "
                "are shown without log-in, so others are for metrics.allow_remote = true"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def known_keys() -> dict[str, Any]:
    """Every `section.key` with its type annotation and default, in table order."""
    keys: dict[str, Any] = {}
    for top in msgspec.structs.fields(Settings):
        default = top.default
        if isinstance(default, Struct):
            for sub in msgspec.structs.fields(type(default)):
                keys[f"{top.name}.{sub.name}"] = sub
        else:
            keys[top.name] = top
    return keys


SETTINGS_NAME = "powermail.toml"  # in the data directory
RESTORING = "restoring"  # in the data directory, while files of a backup take the places of those that were there
DATA_VARIABLE = "POWERMAIL_DATA_DIRECTORY"  # where the settings file is: not a setting


def _parse_scalar(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _overlay(tree: dict[str, Any], dotted: str, text: str, origin: str) -> None:
    if dotted not in known_keys():
        raise OperatorError(f"{origin}: unknown setting {dotted!r}{_nearest(dotted)}")
    section, _, key = dotted.rpartition(".")
    place = tree.setdefault(section, {}) if section else tree
    if not isinstance(place, dict):
        raise OperatorError(f"{section!r} must be a table")
    known = known_keys()[dotted]
    place[key] = text if known.type is str or _plain_type(known.type) is str else _parse_scalar(text)


def _plain_type(annotation: Any) -> Any:
    return getattr(annotation, "__origin__", annotation)


def _nearest(dotted: str) -> str:
    near = difflib.get_close_matches(dotted, list(known_keys()), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown_in(tree: Mapping[str, Any]) -> None:
    known = known_keys()
    sections = {name.split(".")[0] for name in known}
    for name, value in tree.items():
        if name not in sections:
            raise OperatorError(f"unknown setting {name!r}{_nearest(name)}")
        if isinstance(value, dict):
            for key in value:
                if f"{name}.{key}" not in known:
                    raise OperatorError(f"unknown setting {name}.{key!s}{_nearest(f'{name}.{key}')}")


def load(text: str, environment: Mapping[str, str], overrides: Sequence[str] = (), origin: str = "settings") -> Settings:
    """Reads settings. Raises OperatorError naming the key and what is wrong."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OperatorError(f"{origin}: {error}") from error
    _unknown_in(tree)
    for name, value in sorted(environment.items()):
        if name.startswith("POWERMAIL_") and name != DATA_VARIABLE:
            _overlay(tree, name.removeprefix("POWERMAIL_").lower().replace("__", "."), value, name)
    for override in overrides:
        dotted, separator, value = override.partition("=")
        if not separator:
            raise OperatorError(f"--set {override!r} is not section.key=value")
        _overlay(tree, dotted.strip(), value, "--set")
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise OperatorError(f"{origin}: {error}") from error
    check(settings)
    return settings


def inside(data: str, path: str) -> str:
    """A path of the settings: relative ones are below the data directory."""
    return path if path.startswith("/") else f"{data}/{path}"


def load_file(path: str, overrides: Sequence[str] = ()) -> Settings:
    """Reads a settings file and the environment of this process. Raises OperatorError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        cure = ""
        if isinstance(error, FileNotFoundError):
            cure = f": is its disk mounted? `powermail init --data {shlex.quote(os.path.dirname(path))}` makes a new one"
            if os.path.exists(os.path.join(os.path.dirname(path), RESTORING)):
                cure = ": a backup was being put back, and that was broken off: say `powermail restore` again"
        elif isinstance(error, PermissionError):
            cure = "; run this as the owner of the data directory, or as root"
            if os.path.exists(path) and os.stat(path).st_uid == os.geteuid():
                cure = f": run `chmod u+rw {shlex.quote(path)}`"
        raise OperatorError(f"cannot read {path}: {error.strerror}{cure}") from error
    except UnicodeDecodeError as error:
        raise OperatorError(f"{path} is not UTF-8: {error.reason}") from error
    return load(text, os.environ, overrides, path)


def reference_page() -> str:
    """The settings page of the documentation, in Markdown."""
    lines = [
        "# Settings",
        "",
        "Generated from `src/powermail/base/settings.py` by `powermail config --reference`; a test keeps it true.",
        "Read in this order, the later wins: defaults, `powermail.toml` in the data directory, environment",
        "(`POWERMAIL_SECTION__KEY`), command line (`--set section.key=value`). Unknown keys are refused.",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    for name, known in known_keys().items():
        if name == "cluster.nodes":
            continue
        default = known.default_factory() if known.default is msgspec.NODEFAULT else known.default
        shown = msgspec.json.encode(default).decode()
        lines.append(f"| `{name}` | `{shown}` | {_description(known.type)} |")
    lines += ["", "Each `[[cluster.nodes]]` table:", "", "| key | default | meaning |", "|---|---|---|"]
    for entry in msgspec.structs.fields(NodeSettings):
        shown = "required" if entry.default is msgspec.NODEFAULT else f"`{entry.default}`"
        lines.append(f"| `{entry.name}` | {shown} | {_description(entry.type)} |")
    return "\n".join(lines) + "\n"


def _description(annotation: Any) -> str:
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Meta) and extra.description:
            return extra.description
    return ""
