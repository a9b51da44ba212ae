"""What is printed of a torture: its figures, and by name what did not hold."""

from __future__ import annotations

from powermail.torture.checker import KINDS, Violation
from powermail.torture.report import Report, facts


def report(*violations: Violation) -> dict[str, object]:
    """The lines of a short one."""
    counts = dict.fromkeys(KINDS, 0)
    for violation in violations:
        counts[violation.kind] += 1
    made = Report(
        held=not violations,
        seed=7,
        seconds=60.0,
        built_s=20.0,
        took_s=95.0,
        ground="on the loopback",
        faults={"kill": 9, "rot": 1, "cut": 0},
        flipped_bits=40,
        not_tried=["cut: no namespaces"],
        acked=100,
        refused=3,
        unknown=2,
        unsent=1,
        listings=10,
        retrieved=20,
        deleted=5,
        looks=4,
        longest_gap_s=1.25,
        gap_at=3.0,
        gap_of={"front-1": 4.0},
        stalled_s=0.5,
        empty_disk_s=12.0,
        empty_disk_messages=1000,
        counts=counts,
        violations=list(violations),
        kept="/tmp/somewhere" if violations else "",
    )
    return dict(facts(made))


def test_one_that_held_says_so_with_its_figures() -> None:
    said = report()
    assert said["all held"] == "yes"
    assert said["faults"] == "kill 9, rot 1 in 60 s, on the loopback"
    assert said["took"] == "95 s: 20 s to build, 15 s until all was well and read"
    assert said["not tried"] == "cut: no namespaces"
    assert said["empty disk"] == "1000 messages redundant again after 12.0 s"
    assert [said[name] for name in ("acknowledged and lost", "resurrected", "short listings", "UID violations")] == [0] * 4


def test_one_that_failed_names_the_messages_and_where_the_logs_are() -> None:
    said = report(Violation("lost", "P1", "ann: message 5, abc, acked at 3.00, is lost", 5, "abc"))
    assert "all held" not in said and said["FAILED"]
    assert said["acknowledged and lost"] == 1
    assert said["P1 broken"] == "ann: message 5, abc, acked at 3.00, is lost"
    assert "/tmp/somewhere" in str(said["kept"])
