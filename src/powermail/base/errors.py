"""Owns the error classes that cross rooms; each says whose fault it is and whether waiting helps.

Trouble is ours and temporary (node down, SQL away, disk full): a 4xx, never a wrong 5xx (P12).
"""

from __future__ import annotations


class PowerMailError(Exception):
    """Any error this project raises on purpose."""


class OperatorError(PowerMailError):
    """A mistake in configuration or use; the text says what to do next and is shown without a traceback."""


class NoSuch(OperatorError):
    """What was named is not there: nothing was changed (exit status 1, where a misuse is 2)."""


class Trouble(PowerMailError):
    """Ours and temporary: the peer should try again later."""


class NodeTrouble(Trouble):
    """A storage node did not do what was asked: down, full, blocked, too slow or failing."""


class NodeReadOnly(NodeTrouble):
    """The node serves reads and deletes but takes no new mail (full, blocked or failed)."""


class CommitRefused(NodeReadOnly):
    """A node refused a commit for good: the key is not here, has no tombstone, and nothing was written (law 5)."""


class NeverAsked(NodeTrouble):
    """What should have been asked of a node was never sent to it whole: nothing of it can be there (law 5)."""


class OlderCheckpoint(NodeTrouble):
    """What was to be kept under a name is older than what the node has there: nothing was replaced (law 11)."""


class LayoutOutdated(NodeTrouble):
    """A node obeys a newer layout than this process goes by: nothing was done. It says which, and gives it as it is written
    down: whoever takes it and asks again is heard (P14).
    """

    version = 0
    layout = b""


class MarkRefused(NodeTrouble):
    """What was asked comes of an index that this node knows to have lost commits since, or of a pruned writer slot (law 10)."""


class NotRedundant(Trouble):
    """Fewer than `copies_required` writable groups (P6)."""


class IndexTrouble(Trouble):
    """The index did not answer or could not commit."""


class IndexLost(IndexTrouble):
    """The index turned out to have lost commits: nothing is numbered or listed until that was dealt with (laws 10, 11)."""


class DirectoryTrouble(Trouble):
    """The directory did not answer and no cached answer is fresh enough (P14)."""


class OutcomeUnknown(Trouble):
    """A delivery can be neither confirmed nor durably aborted: the connection closes without an answer (P4)."""


class CopyMissing(PowerMailError):
    """This node does not hold that message (it may never have, or have lost it)."""


class CopyDamaged(PowerMailError):
    """This node's copy fails its checksum; never served, another copy is."""


class MessageUnreadable(Trouble):
    """No good copy of a message can be reached now (P3, P7: an error, never a short listing)."""


class InvariantBroken(PowerMailError):
    """A storage invariant does not hold: this process must stop before it makes things worse."""
