"""Owns counts of what happened and what was refused, and how long it took: every limit and every refusal has a counter.

The lists are closed: what is counted stands here with its meaning, so that all of it is shown (`/metrics`), at 0 before it has
happened. A test finds a counter that is raised and not listed.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

# Names are `room.fact`, lower case; a fact in octets ends in `_octets`.
MEANINGS: Final = {
    "auth.failed_acts_for_another": "log-ins that failed because they asked to act for another",
    "auth.failed_address_blocked": "log-ins that failed because their address was blocked",
    "auth.failed_cancelled": "log-ins that failed because the client gave up",
    "auth.failed_disabled": "log-ins that failed because the account is disabled",
    "auth.failed_forwards_only": "log-ins that failed because the account only forwards",
    "auth.failed_malformed": "log-ins that failed because the stored password cannot be read",
    "auth.failed_needs_tls": "log-ins that failed because they were not under TLS",
    "auth.failed_no_account": "log-ins that failed because there is no such account",
    "auth.failed_no_apop": "log-ins that failed because the stored password serves no APOP",
    "auth.failed_no_password": "log-ins that failed because the account has no password",
    "auth.failed_no_scram": "log-ins that failed because the stored password serves no SCRAM",
    "auth.failed_too_costly": "log-ins that failed because the stored password is too costly to check",
    "auth.failed_undecided": "log-ins that failed because it could not be decided then",
    "auth.failed_unknown_scheme": "log-ins that failed because the scheme of the stored password is unknown",
    "auth.failed_unreadable": "log-ins that failed because what the client sent cannot be read",
    "auth.failed_wrong_password": "log-ins that failed because of a wrong password",
    "auth.failures": "log-ins with a wrong name or password",
    "auth.held_back": "log-ins that had to wait because their address had failed too often",
    "auth.logins": "log-ins that were right",
    "auth.overload": "log-ins refused for now because too many passwords waited to be checked",
    "auth.refused": "log-ins not looked at because their address was far beyond its limit of failures",
    "authority.joined": "machines that were given a certificate for a token",
    "authority.refused.address": "questions for certificates refused: a node that does not say where it is reached",
    "authority.refused.cluster": "questions for certificates refused: a certificate of another cluster",
    "authority.refused.ended": "questions for certificates refused: a token whose time is over, or that was guessed at",
    "authority.refused.expelled": "questions for certificates refused: an identity that was expelled",
    "authority.refused.guessing": "questions for certificates refused: an address from which too many wrong tokens came",
    "authority.refused.malformed": "questions for certificates refused: a question that cannot be read",
    "authority.refused.name": "questions for certificates refused: a certificate with several ids",
    "authority.refused.no_name": "questions for certificates refused: no certificate with a name of this kind",
    "authority.refused.order": "questions for certificates refused: more than one question",
    "authority.refused.oversized": "questions for certificates refused: a frame that is too large",
    "authority.refused.handshakes": "questions for certificates refused: a handshake given up, because too many got nowhere",
    "authority.refused.rate": "questions for certificates refused: too many from an address, or from all, in a short time",
    "authority.refused.request": "questions for certificates refused: a request that no certificate is given for",
    "authority.refused.roles": "questions for certificates refused: roles that a newer token took away",
    "authority.refused.site": "questions for certificates refused: the name of a site that is none",
    "authority.refused.silent": "questions for certificates refused: nothing asked in time",
    "authority.refused.tls": "questions for certificates refused: a TLS handshake that failed, or a certificate of no use",
    "authority.refused.token": "questions for certificates refused: a token that there is not, or a wrong secret",
    "authority.refused.trouble": "questions for certificates refused: the index did not answer",
    "authority.refused.used": "questions for certificates refused: a token that was used already",
    "authority.refused.version": "questions for certificates refused: no version of the protocol in common",
    "authority.renewed": "certificates that were renewed",
    "authority.slowed": "connections for certificates that waited for their turn, because too many came",
    "cluster.bad_copies": "copies found damaged or missing where one was believed, when they were read",
    "cluster.hedged": "reads for which a second copy was asked because the first node was late by its own history",
    "cluster.layouts_restored": "times that the index had lost changes of the layout, which were put back",
    "cluster.links_lost": "connections to nodes of other machines that were lost",
    "cluster.links_made": "connections to nodes of other machines that were made",
    "cluster.nonsense": "answers of nodes of other machines that cannot be",
    "cluster.overtaken": "times that a second copy came first, so that the late node is read last for a while",
    "cluster.replaced": "times that a message was given to another node because one of its first choice did not take it",
    "cluster.slow": "times that a node became slow and was used last for a while",
    "delivery.failed": "messages that did not get the required number of copies",
    "delivery.index_late": "times that an index did not answer a delivery in time; reconcile enters the message later",
    "delivery.messages": "messages that were acknowledged",
    "delivery.notices_dropped": "notices to senders (DSN) that could not be stored",
    "delivery.recipients": "recipients of messages that were acknowledged",
    "directory.stale": "look-ups answered from memory because the directory was away",
    "directory.trouble": "times that the directory did not answer when it was asked",
    "keeper.collected": "deletions that were carried out on a node",
    "keeper.compacted_octets": "room that compaction gave back",
    "keeper.dispersed": "messages that were brought into another site, of those that lay in too few",
    "keeper.dropped": "copies dropped from a node because nothing needs them there",
    "keeper.expelled_anew": "nodes that an index put back knew as members again, although the layout has them expelled",
    "keeper.expelled_heard": "expulsions that an index had forgotten and heard from nodes again",
    "keeper.expelled_strange": "identities that a node refused although nobody had expelled them",
    "keeper.forgotten": "rows of dead messages that the index has forgotten",
    "keeper.handed_on": "disks that went without a word, and whose notes and checkpoints others have now",
    "keeper.jobs_lost": "background jobs that another process took from this one",
    "keeper.jobs_taken": "background jobs that this process took among several",
    "keeper.moved": "copies that rebalancing moved to another node",
    "keeper.missing_copies": "copies that scrubbing did not find where they were believed",
    "keeper.reconciled": "messages that reconcile entered in the index",
    "keeper.removed_nodes": "nodes that were emptied and taken out of the cluster",
    "keeper.repaired": "messages that repair made redundant again",
    "keeper.salvaged": "messages that the index did not know and that were entered anew from a disk that is no member",
    "keeper.unrepairable": "attempts to repair a message that did not succeed",
    "law.2.refused": "commits that a node refused because their stamp was too old",
    "law.5.buried": "deliveries that failed and were buried on every node that was asked",
    "law.5.closed": "connections closed without an answer because the outcome of a delivery was unknown",
    "law.5.refused": "deliveries that failed before any node could hold them",
    "law.5.unconfirmed": "tombstones that were written too late to prove anything",
    "law.7.aborted": "deliveries that came to the index after they were decided against",
    "law.7.settled": "deliveries that came to the index after they were decided and forgotten",
    "law.9.rounds": "rounds of forgetting that began",
    "law.10.marks": "marks put on nodes",
    "law.10.settled": "times that the logs of enough nodes were entered to their ends after an unclean stop",
    "law.11.caught_up": "times that the index had caught up with the nodes",
    "law.11.entered": "messages that the index had lost and a walk entered again",
    "law.11.epochs": "times that the epoch was raised because the index may have lost commits",
    "law.11.far_heads": "heads of mailboxes that leapt far and were written to the nodes",
    "law.11.older_checkpoints": "checkpoints refused by a node because it has a newer one",
    "law.11.walks": "logs of nodes that were walked to their ends",
    "law.12.incarnations": "disks taken in as a new incarnation of a node",
    "law.12.lifted": "birth marks of nodes that were lifted",
    "law.12.older": "nodes that came back with an older state of their disk",
    "law.12.retired": "nodes that were refused because their disk was retired",
    "law.13.tails": "checkpoints written of what came since the last",
    "law.13.wholes": "checkpoints written whole",
    "node.chunks_refused": "chunks refused because they do not unpack to what was said of them",
    "noded.connections": "connections of peers that were taken",
    "noded.expelled": "connections ended because their identity was expelled",
    "noded.expelled_full": "times that a node was told of more expelled identities than it remembers",
    "noded.expelled_told": "identities that a node was told are expelled",
    "noded.expelled_void": "expulsions that are void, because only who was expelled himself had said so",
    "noded.fenced": "connections ended because a newer layout was fenced",
    "noded.flooded": "peers that were not read for a while, because they asked on and read too little",
    "noded.held_back": "times that reading stopped because operations held too much memory",
    "noded.refused.checksum": "connections or operations of peers refused: a frame without its checksum",
    "noded.refused.cluster": "connections or operations of peers refused: another cluster, or a certificate of one",
    "noded.refused.credits": "connections or operations of peers refused: more operations or octets open than the window holds",
    "noded.refused.draining": "connections or operations of peers refused: the node is shutting down",
    "noded.refused.expelled": "connections or operations of peers refused: an identity that was expelled",
    "noded.refused.expired": "connections or operations of peers refused: a certificate that has ended",
    "noded.refused.failed": "connections or operations of peers refused: a TLS handshake that failed",
    "noded.refused.fence": "connections or operations of peers refused: a layout that is gone by no more",
    "noded.refused.foreign": "connections or operations of peers refused: a certificate of another authority",
    "noded.refused.malformed": "connections or operations of peers refused: a form or a body that is not as its verb says",
    "noded.refused.name": "connections or operations of peers refused: a certificate with several ids",
    "noded.refused.no_certificate": "connections or operations of peers refused: no certificate",
    "noded.refused.no_hello": "connections or operations of peers refused: no HELLO in time",
    "noded.refused.no_name": "connections or operations of peers refused: a certificate without a name of this kind",
    "noded.refused.node": "connections or operations of peers refused: a node that is not served here",
    "noded.refused.not_reading": "connections or operations of peers refused: a peer that does not read",
    "noded.refused.order": "connections or operations of peers refused: something before HELLO, or a second one",
    "noded.refused.oversized": "connections or operations of peers refused: a frame or an operation that is too large",
    "noded.refused.pings": "connections or operations of peers refused: too many pings",
    "noded.refused.replayed": "connections or operations of peers refused: an operation or a session that was there before",
    "noded.refused.role": "connections or operations of peers refused: a verb that the certificate may not ask",
    "noded.refused.silent": "connections or operations of peers refused: a peer that was silent for too long",
    "noded.refused.slow_frame": "connections or operations of peers refused: a frame that took too long",
    "noded.refused.slow_operation": "connections or operations of peers refused: an operation whose rest took too long",
    "noded.refused.stale_session": "connections or operations of peers refused: a session that has ended",
    "noded.refused.unsupported": "connections or operations of peers refused: a verb, flag or value that is not known here",
    "noded.refused.version": "connections or operations of peers refused: no version of the protocol in common",
    "noded.superseded": "sessions that a later one of the same process ended",
    "noded.untold": "connections on which mail was taken although no keeper had said which layout there is",
    "outbound.bounced": "recipients elsewhere that were given up, with a notice to their sender where one is due",
    "outbound.broken_pipelining": "next hops that broke the PIPELINING they had offered",
    "outbound.bugs": "messages whose way out failed by an error of this program; they are tried again",
    "outbound.deferred": "attempts to send to a recipient that will be repeated",
    "outbound.in_clear": "connections to next hops that went on without TLS",
    "outbound.leases_lost": "recipients whose sending was ended because somebody else has, or may soon have, their queue row",
    "outbound.notices": "notices to senders (DSN) that were sent",
    "outbound.sent": "recipients elsewhere that a next hop took",
    "outbound.stale_sessions": "pooled connections that had ended when they were wanted again",
    "process.stops_cut_off": "parts of a stop that took too long and were left, as a crash would leave them",
}

DOORS: Final = ("smtpd", "submission", "lmtpd", "popd", "httpd", "enrolment")
_TAKING: Final = ("smtpd", "submission", "lmtpd")
_LINES: Final = (*_TAKING, "popd")
# Facts that doors count under their own names, as in `smtpd.connections`: the meaning, and which doors.
DOOR_MEANINGS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "connections": ("connections that were taken", DOORS),
    "connections_refused": ("connections refused because there were too many, or because of draining", DOORS),
    "deleted": ("messages that readers deleted", ("popd",)),
    "early_talkers": ("clients that spoke before the greeting", _TAKING),
    "errors": ("commands that were wrong, or not allowed where they stood", _LINES),
    "foreign_protocol": ("clients that spoke another protocol", _TAKING),
    "logins": ("sessions that logged in", ("popd",)),
    "lost": ("connections that ended in the middle", DOORS),
    "messages_refused": ("messages refused after they were sent", _TAKING),
    "not_redundant": ("messages refused for now because too few groups of nodes take mail", _TAKING),
    "proxy_errors": ("PROXY headers that could not be read", _LINES),
    "queue_full": ("recipients refused for now because too much waits for their domain", _TAKING),
    "rate_limited": ("recipients refused for now because the account sends too much", _TAKING),
    "recipients_refused": ("recipients that were refused, for now or for good", _TAKING),
    "refused": ("connections that ended because the service refused them", _TAKING),
    "requests": ("requests that were answered", ("httpd",)),
    "requests_bad": ("requests that could not be understood", ("httpd",)),
    "shutting_down": ("sessions ended because of draining", _TAKING),
    "timeout": ("sessions ended because the client was silent too long", (*_TAKING, "httpd")),
    "tls_failed": ("TLS handshakes that failed", _LINES),
    "too_large": ("messages refused because of their size", _TAKING),
    "too_many_connections": ("sessions ended because their client, named by a PROXY header, has too many", _TAKING),
    "too_many_recipients": ("recipients beyond the limit of one message", _TAKING),
    "too_slow": ("sessions ended because the client was too slow", _TAKING),
    "transactions": ("sessions ended after as many messages as one may have", _TAKING),
    "trouble": ("commands answered with a temporary error because of trouble of ours", ("popd",)),
}

TIMED: Final = {
    "delivery.reply": "from the end of a message to its outcome: copies, index and all",
    "node.write": "one gathered write of a node, made durable",
}
BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)


class Timing:
    """How often something took how long, in classes by `BOUNDS_S`; the last class is what took longer."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds


class Counters:
    """Named totals since start, and timings."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}
        self._timings: dict[tuple[str, str], Timing] = {}

    def add(self, name: str, count: int = 1) -> None:
        """Raises the total of `name`."""
        self._totals[name] = self._totals.get(name, 0) + count

    def get(self, name: str) -> int:
        """The total of `name`, 0 if it never happened."""
        return self._totals.get(name, 0)

    def snapshot(self) -> dict[str, int]:
        """All totals, sorted by name."""
        return dict(sorted(self._totals.items()))

    def timing(self, name: str, of: str = "") -> Timing:
        """The timing of `name`, one of `TIMED`, kept apart for each `of`; whoever times keeps it at hand."""
        return self._timings.setdefault((name, of), Timing())

    def timings(self) -> dict[tuple[str, str], Timing]:
        """All of them, sorted by (name, of)."""
        return dict(sorted(self._timings.items()))
