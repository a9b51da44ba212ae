"""Owns what all sessions of the mail-taking doors share: services, settings, the rate of each account."""

from __future__ import annotations

import ssl
from collections import OrderedDict
from dataclasses import dataclass, field

from powermail.base import limits
from powermail.base.settings import SmtpSettings
from powermail.base.tally import Tally
from powermail.base.world import World
from powermail.delivery.srs import Rewriter
from powermail.delivery.transaction import DeliveryService
from powermail.directory.authenticate import Authenticator
from powermail.directory.contract import Account
from powermail.directory.resolve import Resolver
from powermail.door.clients import Networks
from powermail.door.login import MECHANISMS
from powermail.wire.smtp_table import Kind, Offer


class SendRate:
    """Recipients per account and hour (U17), of all processes where they share it (TALLY_S late)."""

    def __init__(self, world: World, per_hour: int) -> None:
        self._world = world
        self._per_hour = per_hour
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self.hour = Tally("sent-hour", 3600.0)

    def allow(self, account: Account, count: int = 1) -> bool:
        """Counts `count` recipients; False when the account's hour is used up."""
        now = self._world.clock.monotonic()
        since, sent = self._counts.get(account.id, (now, 0))
        if now - since >= 3600.0:
            since, sent = now, 0
        allowed = max(sent, self.hour.known(account.id)) + count <= (account.send_per_hour or self._per_hour)
        if allowed:
            self.hour.add(account.id, count)
        self._counts[account.id] = (since, sent + count if allowed else sent)
        self._counts.move_to_end(account.id)
        while len(self._counts) > limits.AUTH_TRACKED_MAX:
            self._counts.popitem(last=False)
        return allowed


@dataclass
class SmtpService:
    """Everything a session needs."""

    world: World
    settings: SmtpSettings
    hostname: str
    delivery: DeliveryService
    resolver: Resolver
    authenticator: Authenticator
    rewriter: Rewriter
    tls: ssl.SSLContext | None
    remote_route: bool
    trusted: Networks  # who may log in without TLS
    rate: SendRate = field(init=False)
    proxies: Networks = field(init=False)
    _offers: dict[Kind, Offer] = field(init=False)

    def __post_init__(self) -> None:
        self.rate = SendRate(self.world, self.settings.submission_per_hour)
        self.proxies = Networks(self.settings.proxy_from)
        settings, tls = self.settings, self.tls is not None
        plain = Offer(self.hostname, settings.message_octets_max, settings.recipients_max, tls)
        self._offers = dict.fromkeys(Kind, plain)
        self._offers[Kind.SUBMISSION] = plain._replace(mechanisms=MECHANISMS)

    def offer(self, kind: Kind) -> Offer:
        """What a door offers."""
        return self._offers[kind]
