"""Owns the settings of simulated processes: production's, with small stores, short times, doors in the simulated net."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.settings import (
    ClusterSettings,
    DirectorySettings,
    IndexSettings,
    NodeSettings,
    OutboundSettings,
    PopSettings,
    Settings,
    SmtpSettings,
)
from powermail.sim import fleet as fl

DIRECTORY = "directory.db"
COPIES = 2  # so many groups must hold a message (R)
_TOMBSTONE_S = (10.0, 43.0)  # how long tombstones stay at least; a short time lets older disks outlive them
_SEGMENTS = (1, 4)  # size of a segment in smallest ones; small ones are compacted soon
_RESERVE_OCTETS = 100_000


class Kept(NamedTuple):
    """How a seed's nodes keep what they have."""

    tombstone_days: float
    segment_octets: int

    @classmethod
    def drawn(cls, kind: random.Random) -> Kept:
        """Those of a seed."""
        return cls(kind.choice(_TOMBSTONE_S) / 86_400.0, kind.choice(_SEGMENTS) * limits.SEGMENT_OCTETS_MIN)


def of_node(kept: Kept, node: NodeSettings) -> ClusterSettings:
    """What a machine that serves only a node is told of the cluster."""
    return ClusterSettings(segment_octets=kept.segment_octets, reserve_octets=_RESERVE_OCTETS, nodes=[node])


def of_server(real: str, kept: Kept, nodes: Sequence[NodeSettings], index: IndexSettings, host: str, door: int = 0) -> Settings:
    """Those of a process that serves mail or keeps it.

    Args:
        real: The directory of what lies on the real disk.
        host: Where its doors are, `door` behind the first ones.
    """
    many = 1000  # all clients come from one address
    return Settings(
        hostname="mx.sim.example",
        cluster=ClusterSettings(
            copies_required=COPIES,
            segment_octets=kept.segment_octets,
            reserve_octets=_RESERVE_OCTETS,
            repair_after_s=5.0,
            tombstone_days=kept.tombstone_days,
            nodes=list(nodes),
        ),
        index=index,
        directory=DirectorySettings(path=f"{real}/{DIRECTORY}", upgrade_passwords=False),
        smtp=SmtpSettings(
            listen=[f"{host}:{fl.SMTP_PORT + door}"],
            submission=[],
            submissions=[],
            lmtp=[f"{host}:{fl.LMTP_PORT + door}"],
            connections_per_address_max=many,
        ),
        pop=PopSettings(
            listen=[f"{host}:{fl.POP_PORT + door}"], listen_tls=[], plaintext_login=True, connections_per_address_max=many
        ),
        outbound=OutboundSettings(smarthost=f"peer:{fl.PEER_PORT}", smarthost_tls="none", retry_first_s=1.0),
    )
