"""The checker of the torture catches each kind of violation, from made-up histories; an honest history has none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import pytest

from powermail.torture.checker import KINDS, Checker, Outcome

ANN, BOB = "ann", "bob"
KEY, OTHER = "aa", "bb"


def digest(number: int) -> bytes:
    """Of the message with that number."""
    return hashlib.sha256(b"%d" % number).digest()


class History:
    """Calls of clients, one a second; each step ends before the next begins."""

    def __init__(self) -> None:
        self.checker = Checker([ANN, BOB])
        self.at = 0.0

    def tick(self) -> float:
        self.at += 1.0
        return self.at

    def sent(self, number: int, key: str = "", *mailboxes: str, outcome: Outcome = Outcome.ACKED) -> None:
        self.checker.sending(number, mailboxes or (ANN,), digest(number))
        self.checker.sent(number, outcome, self.tick(), key)

    def listed(self, *keys: str, mailbox: str = ANN) -> None:
        began = self.tick()
        self.checker.listed(mailbox, began, self.tick(), keys)

    def read(self, key: str, number: int, mailbox: str = ANN, octets_of: int | None = None) -> None:
        self.checker.read(mailbox, key, number, digest(number if octets_of is None else octets_of))

    def deleted(self, key: str, confirmed: bool = True) -> None:
        self.checker.deleting(ANN, [key])
        if confirmed:
            self.checker.deleted(ANN, [key], self.tick())

    def finish(self, ann: Sequence[str] = (), bob: Sequence[str] = ()) -> dict[str, int]:
        """What was broken, by kind."""
        self.listed(*ann)
        self.listed(*bob, mailbox=BOB)
        self.checker.finish({ANN: ann, BOB: bob})
        return {kind: count for kind, count in self.checker.counts.items() if count}


def honest(history: History) -> dict[str, int]:
    """Sent, listed, read, deleted; one refused, one whose connection broke and that came, one that did not."""
    history.sent(1, KEY, ANN, BOB)
    history.listed(KEY)
    history.listed(KEY, mailbox=BOB)
    history.read(KEY, 1)
    history.sent(2, outcome=Outcome.REFUSED)
    history.sent(3, "", ANN, BOB, outcome=Outcome.UNKNOWN)
    history.sent(4, "", ANN, BOB, outcome=Outcome.UNKNOWN)
    history.listed(KEY, OTHER)
    history.read(OTHER, 3)
    history.listed(KEY, OTHER, mailbox=BOB)
    history.read(OTHER, 3, BOB)
    history.checker.numbered(ANN, [(1, KEY)])
    history.deleted(KEY)
    history.checker.numbered(ANN, [(2, OTHER)])
    return history.finish([OTHER], [KEY, OTHER])


def lost(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.listed(KEY)
    history.checker.late([KEY])
    return {**history.finish(), "short": 0}  # it is missing in the last listing as well


def never_shown(history: History) -> dict[str, int]:
    """Of two recipients one never saw it; that the index was late is no excuse at the end."""
    history.sent(1, KEY, ANN, BOB)
    history.listed(mailbox=BOB)
    history.checker.late([KEY])
    history.checker.finish({ANN: [KEY], BOB: []})
    return history.checker.counts


def damaged(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.listed(KEY)
    history.read(KEY, 1, octets_of=2)
    return history.finish([KEY])


def refused_and_shown(history: History) -> dict[str, int]:
    history.sent(1, outcome=Outcome.REFUSED)
    history.listed(KEY)
    history.read(KEY, 1)
    return history.finish([KEY])


def nobody_sent_it(history: History) -> dict[str, int]:
    history.listed(KEY)
    history.read(KEY, 7)
    return history.finish([KEY])


def to_somebody_else(history: History) -> dict[str, int]:
    history.sent(1, KEY, ANN)
    history.listed(KEY, mailbox=BOB)
    history.read(KEY, 1, BOB)
    return history.finish([KEY], [KEY])


def to_some_of_its_recipients(history: History) -> dict[str, int]:
    history.sent(1, "", ANN, BOB, outcome=Outcome.UNKNOWN)
    history.listed(KEY)
    history.read(KEY, 1)
    return history.finish([KEY])


def doubled(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.listed(KEY, OTHER)
    history.read(OTHER, 1)
    return history.finish([KEY, OTHER])


def twice_in_a_listing(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.listed(KEY, KEY)
    return history.finish([KEY])


def unknown_and_twice(history: History) -> dict[str, int]:
    history.sent(1, outcome=Outcome.UNKNOWN)
    history.listed(KEY, OTHER)
    history.read(KEY, 1)
    history.read(OTHER, 1)
    return history.finish([KEY, OTHER])


def short_after_it_was_shown(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.listed(KEY)
    history.checker.late([KEY])
    history.listed()
    return history.finish([KEY])


def short_after_it_was_acked(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.listed()
    return history.finish([KEY])


def resurrected(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.listed(KEY)
    history.deleted(KEY)
    history.listed(KEY)
    return history.finish()


def one_uid_two_messages(history: History) -> dict[str, int]:
    history.checker.numbered(ANN, [(1, KEY)])
    history.checker.numbered(ANN, [(1, OTHER), (2, KEY)])
    return history.finish()


def an_older_uid(history: History) -> dict[str, int]:
    history.checker.numbered(ANN, [(5, KEY)])
    history.checker.numbered(ANN, [(4, OTHER), (5, KEY)])
    return history.finish()


def one_unique_id_two_messages(history: History) -> dict[str, int]:
    history.sent(1, KEY)
    history.sent(2, OTHER)
    history.listed(KEY, OTHER)
    history.read(KEY, 2)
    return history.finish([KEY, OTHER])


def refused_for_good(history: History) -> dict[str, int]:
    history.sent(1, outcome=Outcome.REFUSED)
    history.checker.refused_for_good(1, "550 no")
    return history.finish()


def came_then_went(history: History) -> dict[str, int]:
    """Nobody knows whether it was taken; then it is shown, and so it is."""
    history.sent(1, outcome=Outcome.UNKNOWN)
    history.listed(KEY)
    history.read(KEY, 1)
    history.checker.finish({ANN: [], BOB: []})
    return history.checker.counts


@pytest.mark.parametrize(
    ("story", "kinds"),
    [
        (honest, set()),
        (lost, {"lost"}),
        (never_shown, {"lost"}),
        (came_then_went, {"lost"}),
        (damaged, {"damaged"}),
        (refused_and_shown, {"ghost"}),
        (nobody_sent_it, {"ghost"}),
        (to_somebody_else, {"ghost"}),
        (to_some_of_its_recipients, {"ghost"}),
        (doubled, {"doubled"}),
        (twice_in_a_listing, {"doubled"}),
        (unknown_and_twice, {"doubled"}),
        (short_after_it_was_shown, {"short"}),
        (short_after_it_was_acked, {"short"}),
        (resurrected, {"resurrected"}),
        (one_uid_two_messages, {"number"}),
        (an_older_uid, {"number"}),
        (one_unique_id_two_messages, {"number", "doubled"}),
        (refused_for_good, {"refused"}),
    ],
)
def test_each_kind_of_violation_is_caught_and_no_other(story: Callable[[History], dict[str, int]], kinds: set[str]) -> None:
    history = History()
    found = {kind for kind, count in story(history).items() if count}
    assert found == kinds, history.checker.violations
    assert all(violation.rule == KINDS[violation.kind] for violation in history.checker.violations)


def test_what_the_index_was_late_for_may_be_shown_later_and_what_was_asked_to_go_may_be_gone() -> None:
    history = History()
    history.sent(1, KEY)
    history.listed()
    assert history.checker.waited_for() == {ANN: 1}
    history.checker.late([KEY])
    history.listed(KEY)
    assert history.checker.waited_for() == {}
    history.deleted(KEY, confirmed=False)  # the connection broke at QUIT: both are right
    history.listed(KEY)
    history.listed()
    assert history.finish() == {}


def test_a_listing_that_began_before_the_250_says_nothing_of_it() -> None:
    history = History()
    history.checker.sending(1, (ANN,), digest(1))
    began = history.tick()
    history.checker.sent(1, Outcome.ACKED, history.tick(), KEY)
    history.checker.listed(ANN, began, history.tick(), [])
    assert history.finish([KEY]) == {}


def test_many_violations_of_one_kind_are_counted_and_some_are_kept() -> None:
    history = History()
    for number in range(500):
        history.sent(number, f"{number:02x}")
    history.checker.finish({ANN: [], BOB: []})
    assert history.checker.counts["lost"] == 500
    assert len(history.checker.violations) == 100
    assert history.checker.violations[3].number == 3 and "03" in history.checker.violations[3].text
