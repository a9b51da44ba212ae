"""Owns the list of explorations: where the laws hold, what breaks without each clause, and what runs longer as a campaign.

`HOLDS`: every state is visited, nothing is wrong, and there are at least so many. `BREAKS`: exactly one clause is removed, and
the kind of violation that follows. Where the laws as they are written fail, the model has them mended (`as mended` beside the
clause), and `BREAKS` has the clause as it is written, so that each such hole keeps its shortest way.

Clauses that these bounds do not show to be necessary are in `NOT_SHOWN`, each with what covers for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.model import copies_state, marks, members, numbers, rebuild
from tests.model.copies import Copies
from tests.model.explorer import Model

THREE = (0, 1, 2)  # nodes, each alone in its group
SHARED = (0, 0, 1)  # two nodes share one

SHORT = "a listing is short"
LOST = "an acknowledged message is not listed"
BACK = "a deleted message is listed"
GHOST = "451, and yet listed"
ORPHAN = "an orphan copy"
BELIEF = "belief in a copy that is not there"
FALSE_ALARM = "lost commits noticed where none were lost"
TWICE = "a UID is given twice"
UNNOTICED = "lost commits pass unnoticed"
ALARM = "a loss is noticed where none was"
AGAIN = "a loss that was dealt with is noticed again"
BEHIND = "a process goes on behind its own lost commit"
MISSING = "a message is missing after rebuild"
RETURNED = "a deleted message is back after rebuild"
THIN = "an acknowledged message lies on too few members"
HASTY = "a node leaves on which copies depend"


class Configuration(NamedTuple):
    """A model within bounds. `wrong`: what must be found there; `states`: how many there must be at least if nothing is.

    `passing`: kinds of violations that are passed by, because a worse one lies behind them.
    """

    model: Model[Any]
    states: int = 0
    wrong: str = ""
    passing: frozenset[str] = frozenset()


_Laws = dict[str, Any] | None


def _made(model: Model[Any], states: int, wrong: str, passing: str) -> Configuration:
    return Configuration(model, states, wrong, frozenset([passing] if passing else []))


def _copies(states: int = 0, wrong: str = "", passing: str = "", laws: _Laws = None, **bounds: Any) -> Configuration:
    return _made(Copies(copies_state.Laws(**laws or {}), copies_state.Bounds(**bounds)), states, wrong, passing)


def _numbers(states: int = 0, wrong: str = "", passing: str = "", laws: _Laws = None, **bounds: Any) -> Configuration:
    bounds = {"groups": 2, **bounds}
    return _made(numbers.Numbers(numbers.Laws(**laws or {}), numbers.Bounds(**bounds)), states, wrong, passing)


def _marks(states: int = 0, wrong: str = "", passing: str = "", laws: _Laws = None, **bounds: Any) -> Configuration:
    bounds = {"commits": 2, "sends": 1, "prunes": 0, **bounds}
    return _made(marks.Marks(marks.Laws(**laws or {}), marks.Bounds(**bounds)), states, wrong, passing)


def _rebuild(states: int = 0, wrong: str = "", passing: str = "", laws: _Laws = None, **bounds: Any) -> Configuration:
    bounds = {"other": False, **bounds}
    return _made(rebuild.Rebuild(rebuild.Laws(**laws or {}), rebuild.Bounds(**bounds)), states, wrong, passing)


def _members(states: int = 0, wrong: str = "", passing: str = "", laws: _Laws = None, **bounds: Any) -> Configuration:
    bounds = {"keepers": 1, "taken": 0, **bounds}
    return _made(members.Members(members.Laws(**laws or {}), members.Bounds(**bounds)), states, wrong, passing)


def _without(*clauses: str, **others: str) -> dict[str, Any]:
    return {**dict.fromkeys(clauses, False), **others}


HOLDS = {
    "copies-asked": _copies(11_000),
    "copies-closed-three": _copies(450, start="closed", groups=THREE),
    "copies-closed-scans": _copies(1_500, start="closed", keeps_scans=True),
    "copies-closed-restart": _copies(1_100, start="closed", crashes=1),
    "copies-closed-lost-disk": _copies(9_000, start="closed", lost=1, repairs=1),
    "copies-closed-older-disk": _copies(2_000, start="closed", older=1),
    "copies-closed-restore": _copies(16_000, start="closed", restores=1),
    "copies-acked-scans": _copies(3_300, start="acked", keeps_scans=True),
    "copies-acked-moves": _copies(2_400, start="acked", moves=2),
    "copies-acked-restore": _copies(33_000, start="acked", restores=1),
    "copies-acked-restore-moves": _copies(1_700, start="acked", restores=1, moves=2, deletes=False),
    "copies-acked-restore-repair": _copies(1_300, start="acked", restores=1, repairs=1, deletes=False, groups=THREE),
    "copies-acked-restore-shared": _copies(7_000, start="acked", restores=1, marks=True, deletes=False, groups=SHARED),
    "copies-refused-restore": _copies(300, start="refused", restores=1),
    "copies-aborting-restore": _copies(26_000, start="aborting", restores=1, deletes=False),
    "copies-acked-bad": _copies(28_000, start="acked", bad=1, repairs=2),
    "copies-adopted-lost-disk": _copies(11_000, start="adopted", lost=1),
    "copies-listed-expel": _copies(3_300, start="listed", expels=1, repairs=1, groups=THREE),
    "copies-replaced-restore": _copies(11_000, start="replaced", restores=1),
    "copies-rolled-back-restore": _copies(20_000, start="rolled back", restores=1),
    "numbers": _numbers(18_000, numbers=5),
    "numbers-three-losses": _numbers(10_000, losses=3, numbers=3),
    "numbers-three-groups": _numbers(15_000, groups=3, numbers=3),
    "numbers-lost-disk": _numbers(25_000, groups=3, numbers=2, disks=1),
    "numbers-made-again": _numbers(33_000, losses=1, renewals=2, numbers=3),
    "numbers-put-back": _numbers(6_000, losses=0, puts_back=2, backups=2),
    "numbers-put-back-made-again": _numbers(30_000, losses=0, puts_back=1, renewals=2, numbers=3),
    "numbers-put-back-restore": _numbers(16_000, losses=1, puts_back=1, backups=2, numbers=3),
    "numbers-rebuild": _numbers(13_000, losses=1, rebuilds=1, numbers=3),
    "numbers-rebuild-far": _numbers(80_000, losses=1, rebuilds=1, numbers=5),
    "numbers-sleeping-keeper": _numbers(22_000, losses=1, numbers=5, sleeps=True),
    "marks": _marks(17_000),
    "marks-all-slots": _marks(14_000, laws=_without(batch="all")),
    "marks-prune": _marks(18_000, commits=1, prunes=1),
    "marks-restored-twice": _marks(20_000, commits=1, restores=2, slots=4),
    "rebuild": _rebuild(7_000, changes=2, checkpoints=2),
    "rebuild-three-changes": _rebuild(21_000, changes=3, checkpoints=2),
    "rebuild-deltas": _rebuild(27_000, changes=1, checkpoints=3, deltas=True, copies=False),
    "rebuild-purge": _rebuild(1_500, changes=2, checkpoints=1, other=True),
    "rebuild-as-written-one-move": _rebuild(20_000, changes=1, checkpoints=3, copies=False, laws=_without("left_word")),
    "members": _members(3_000),
    "members-two-keepers": _members(70_000, keepers=2, changes=2),
    "members-changes": _members(50_000, taken=1, changes=3),
    "members-gone": _members(40_000, taken=1, gone=1),
    "members-restart": _members(6_000, restarts=1),
    "members-restore": _members(100_000, standing=members.DRAINING, restores=1),
    "members-restore-gone": _members(2_000, fronts=0, taken=1, restores=1, gone=1),
}

BREAKS = {
    "law-1-durable": _copies(wrong=BELIEF, laws=_without("durable"), start="acked", crashes=1),
    "law-1-tombstone-refuses": _copies(
        wrong=GHOST, laws=_without("tombstone_refuses"), start="refused", restores=1, deletes=False
    ),
    "law-2-window": _copies(wrong=BACK, laws=_without("window"), start="closed"),
    "law-2-frozen": _copies(wrong=BACK, laws=_without("frozen"), start="first"),
    "law-2-boot-in-stamp": _copies(wrong=BACK, laws=_without("boot_in_stamp"), start="closed", crashes=1),
    "law-2-barrier": _copies(wrong=BACK, laws=_without("barrier"), start="closed"),
    "law-2-9-names-stamp": _copies(wrong=BACK, laws=_without("names_stamp"), start="closed"),
    "law-4-silence": _copies(wrong=LOST, laws=_without(after_abort="silence"), start="aborting"),
    "law-4-as-written": _copies(wrong=LOST, laws=_without(after_abort="deliver"), start="aborting", restores=1, deletes=False),
    "law-5-index-first": _copies(wrong=GHOST, passing=FALSE_ALARM, laws=_without("index_first"), start="giving up"),
    "law-5-any-tombstone": _copies(wrong=GHOST, laws=_without(confirmation="any"), start="adopted"),
    "law-5-as-written": _copies(wrong=GHOST, laws=_without(confirmation="new"), start="adopted", lost=1),
    "law-5-refusal-behind-asks": _copies(wrong=GHOST, laws=_without("refusal_behind_asks")),
    "law-6-compare-and-set": _copies(wrong=BACK, laws=_without("compare_and_set"), start="acked", keeps_scans=True),
    "law-6-dead-row": _copies(wrong=ORPHAN, laws=_without("dead_row"), start="closed"),
    "law-6-origin": _copies(wrong=BACK, laws=_without("origin"), start="listed", bad=1, repairs=1),
    "law-6-orphans-dropped": _copies(
        wrong=SHORT, laws=_without("orphans_dropped"), start="acked", restores=1, repairs=1, deletes=False, groups=THREE
    ),
    "law-6-drop-as-written": _copies(
        wrong="a copy that nobody believes in", laws=_without("drop_says_live"), start="acked", bad=1, repairs=1
    ),
    "law-7-insert-first": _copies(wrong=BACK, laws=_without("insert_first"), start="acked"),
    "law-7-late-deliver": _copies(wrong=BACK, laws=_without("late_deliver"), start="acked"),
    "law-7-incarnation": _copies(wrong=BELIEF, laws=_without("late_incarnation"), start="acked", lost=1),
    "law-8-live-row": _copies(wrong=BELIEF, laws=_without("belief_needs_live", "note_names_end"), start="closed", repairs=1),
    "law-8-note-as-written": _copies(
        wrong=BELIEF, laws=_without("note_names_incarnation"), start="closed", repairs=1, lost=1, deletes=False
    ),
    "law-8-note-without-end": _copies(
        wrong=BELIEF, laws=_without("note_names_end"), start="acked", restores=1, repairs=1, deletes=False, groups=THREE
    ),
    "law-9-waits-for-orders": _copies(
        wrong=BACK, laws=_without("forget_waits_orders"), start="deleted", restores=1, marks=True
    ),
    "law-9-waits-for-scans": _copies(wrong=BACK, laws=_without("forget_waits_scan"), start="closed"),
    "law-9-retired-for-ever": _copies(wrong=BACK, laws=_without("retired_for_ever"), start="listed", expels=1),
    "law-10-batch-marks": _copies(wrong=BACK, laws=_without("batch_marks"), start="acked", restores=1),
    "law-10-compaction-marks": _copies(
        wrong=LOST, passing=SHORT, laws=_without("compaction_marks"), start="acked", moves=2, restores=1, deletes=False
    ),
    "law-10-behind-watermark": _copies(wrong=LOST, laws=_without("behind_watermark"), start="acked", moves=2),
    "law-10-no-mark-as-written": _copies(wrong=SHORT, laws=_without("restore_waits"), start="acked", restores=1),
    "law-11-walk": _copies(wrong=BACK, laws=_without("walk"), start="acked", restores=1),
    "law-11-dead-row": _copies(wrong=BACK, laws=_without("walk_dead_row"), start="acked", restores=1),
    "law-11-any-origin": _copies(
        wrong=LOST, passing=SHORT, laws=_without("walk_any_origin"), start="acked", restores=1, moves=2, deletes=False
    ),
    "law-11-quorum": _copies(wrong=SHORT, laws=_without("walk_quorum"), start="acked", restores=1, marks=True),
    "law-11-whole-groups": _copies(wrong=SHORT, laws=_without("whole_groups"), start="acked", restores=1, groups=SHARED),
    "law-12-chain": _copies(wrong=ORPHAN, laws=_without("chain"), start="listed", older=1),
    "law-12-chain-as-written": _copies(wrong=ORPHAN, laws=_without("chain_places"), start="listed", older=1),
    "law-12-birth-mark": _copies(wrong=BACK, laws=_without("birth_mark"), start="deleted", older=1),
    "law-12-birth-mark-for-ever": _copies(
        wrong=LOST, passing=SHORT, laws=_without("birth_lifted"), start="rolled back", restores=1, deletes=False
    ),
    "law-12-end-seen-as-written": _copies(wrong=ORPHAN, laws=_without("confirm_sees_end"), start="deleted", older=1),
    "law-12-newer-disk-as-written": _copies(
        wrong=LOST, passing=SHORT, laws=_without("newer_disk"), start="replaced", restores=1, deletes=False
    ),
    "law-11-difference": _numbers(wrong=TWICE, laws=_without("difference"), numbers=3),
    "law-11-heads": _numbers(wrong=TWICE, laws=_without("heads"), losses=1, numbers=5),
    "law-11-heads-as-written": _numbers(wrong=TWICE, laws=_without("write_back"), numbers=5, backed_up=True),
    "law-11-heads-rise": _numbers(wrong=TWICE, laws=_without("heads_rise"), losses=1, numbers=5, sleeps=True),
    "law-11-head-of-later-uidvalidity": _numbers(wrong=TWICE, laws=_without("other_head"), losses=1, renewals=1, numbers=5),
    "law-11-head-without-epoch": _numbers(wrong=TWICE, laws=_without("head_epoch"), losses=1, rebuilds=1, numbers=3),
    "law-11-bound-jumps": _numbers(wrong=TWICE, laws=_without("base_jumps"), losses=1, rebuilds=1, numbers=5),
    "law-11-epoch-durable": _numbers(wrong=TWICE, laws=_without("durable_epoch"), groups=3, numbers=3),
    "law-11-read-quorum": _numbers(wrong=TWICE, laws=_without("read_quorum"), groups=3, numbers=3),
    "law-11-intact": _numbers(wrong=TWICE, laws=_without("intact"), groups=3, numbers=3, disks=1, backed_up=True),
    "law-11-limit": _numbers(wrong=TWICE, laws=_without("limit"), losses=1, numbers=5),
    "law-11-uidvalidity-jumps": _numbers(wrong=TWICE, laws=_without("validity_jumps"), losses=1, renewals=2, numbers=2),
    "law-10-small-jump": _numbers(wrong=TWICE, laws=_without("small_jump"), losses=0, puts_back=1),
    "law-10-small-jump-as-written": _numbers(wrong=TWICE, laws=_without("small_difference"), losses=0, puts_back=2, backups=2),
    "law-10-jumps-add": _numbers(wrong=TWICE, laws=_without("jumps_add"), losses=1, puts_back=1, backups=2, numbers=3),
    "law-10-small-uidvalidity": _numbers(wrong=TWICE, laws=_without("small_validity"), losses=0, puts_back=1, renewals=2),
    "law-10-mark-after-numbers": _numbers(wrong=TWICE, laws=_without("mark_numbers"), losses=0, puts_back=1),
    "law-10-mark-at-start": _numbers(wrong=TWICE, laws=_without("mark_start"), losses=0, puts_back=2),
    "law-10-batch-as-written": _marks(wrong=UNNOTICED, laws=_without(batch="own")),
    "law-10-batch-without-mark": _marks(wrong=UNNOTICED, laws=_without(batch="nothing")),
    "law-10-settled-as-written": _marks(wrong=AGAIN, laws=_without(settled="never")),
    "law-10-new-slot": _marks(wrong=UNNOTICED, laws=_without("new_slot")),
    "law-10-node-refuses-older-epoch": _marks(wrong=UNNOTICED, laws=_without("node_refuses")),
    "law-10-epoch-cached": _marks(wrong=BEHIND, laws={"epoch_cached": True}, restores=2, backups=2, slots=4),
    "law-10-compares": _marks(wrong=UNNOTICED, passing=AGAIN, laws=_without("compares")),
    "law-10-tags": _marks(wrong=UNNOTICED, laws=_without("tags")),
    "law-10-counts": _marks(wrong=UNNOTICED, laws=_without("counts")),
    "law-10-sequence": _marks(wrong=UNNOTICED, laws=_without("sequence")),
    "law-10-own-row": _marks(wrong=BEHIND, laws=_without("own_row")),
    "law-10-unknown-commit": _marks(wrong=ALARM, laws=_without("unknown_commit")),
    "law-10-pruned-is-not-lost": _marks(wrong=ALARM, laws=_without("pruned_missing"), commits=1, prunes=1),
    "law-10-pruned-by-a-round": _marks(wrong=UNNOTICED, laws=_without("prune_round"), commits=1, prunes=1),
    "law-10-pruned-as-written": _marks(wrong=UNNOTICED, laws=_without("prune_fences"), commits=1, prunes=1),
    "law-13-moved-key": _rebuild(wrong=MISSING, laws=_without("left_word", "moved"), changes=1, checkpoints=2, copies=False),
    "law-13-copied-key": _rebuild(wrong=MISSING, laws=_without("left_word", "moved_copy"), changes=2, checkpoints=2),
    "law-13-as-written": _rebuild(wrong=MISSING, laws=_without("left_word"), changes=2, checkpoints=3, copies=False),
    "law-13-names-expunged": _rebuild(wrong=RETURNED, laws=_without("names_gone"), changes=1, checkpoints=2),
    "law-13-whole-names-all": _rebuild(wrong=RETURNED, laws=_without("whole_names_all"), changes=1, checkpoints=2),
    "law-13-names-dead": _rebuild(wrong=RETURNED, laws=_without("names_dead"), changes=2, checkpoints=2, other=True),
    "law-13-enters-again": _rebuild(wrong=MISSING, laws=_without("enters_again"), changes=1, checkpoints=2),
    "law-13-delta-replaces": _rebuild(
        wrong=RETURNED, laws=_without("delta_replaces"), changes=1, checkpoints=3, deltas=True, copies=False
    ),
    "law-13-newest-state": _rebuild(
        wrong=RETURNED, laws=_without("newest_state"), changes=1, checkpoints=3, deltas=True, copies=False
    ),
    "law-13-purged-first": _rebuild(
        wrong="mail of a purged account is back after rebuild",
        laws=_without("purged_first"),
        changes=1,
        checkpoints=1,
        other=True,
    ),
    "law-13-tombstone": _rebuild(wrong=RETURNED, laws=_without("tombstones"), changes=2, checkpoints=1, other=True),
    "members-fences": _members(wrong=THIN, passing=HASTY, laws=_without("fences")),
    "members-fence-lasts": _members(wrong=THIN, passing=HASTY, laws=_without("fence_lasts"), restarts=1),
    "members-retires": _members(wrong=THIN, passing=HASTY, laws=_without("retires"), restores=1),
    "members-to-the-end": _members(wrong=THIN, passing=HASTY, laws=_without("to_the_end")),
    "members-fence-first": _members(wrong=THIN, passing=HASTY, laws=_without("fence_first", "once_more")),
    "members-counts-no-more": _members(wrong=THIN, passing=HASTY, laws=_without("counts_no_more"), fronts=0, taken=1),
    "members-counts-there": _members(wrong=HASTY, laws=_without("counts_there"), fronts=0, taken=1, gone=1),
    "members-compare-and-set": _members(wrong=THIN, passing=HASTY, laws=_without("compare_and_set"), changes=2),
    "members-epochs-apart": _members(wrong=THIN, passing=HASTY, laws=_without("apart"), standing=members.DRAINING, restores=1),
}

NOT_SHOWN = {
    "numbers.per_source": "a row of a later epoch has learned every durable head of an earlier one, and leaps far enough",
    "copies_state.order_raises_round": "forgetting waits for the order anyway, and behind its tombstone nothing comes back",
    "copies_state.admission_anew": "a node that was opened anew refuses every stamp of before, so it is as good as scanned",
    "copies_state.walk_names_stamp": "rounds name stamps, and nothing is forgotten without a round",
    "members.puts_back": "a change that was lost is made again, by whoever wanted it",
    "members.puts_ahead": "the numbers of the next epoch are above all that others may know",
    "copies_state.walk_heeds_drops": "what it would enter wrongly lies before the birth mark",
}

CAMPAIGN = {
    "long-asked-clock": _copies(clock=True),
    "long-listed-bad": _copies(start="listed", bad=1, repairs=2, groups=THREE),
    "long-acked-restore-bad": _copies(start="acked", restores=1, bad=1, repairs=1),
    "long-asked-three": _copies(groups=THREE),
    "long-asked-scans": _copies(keeps_scans=True),
    "long-asked-restart": _copies(crashes=1),
    "long-asked-lost-disk": _copies(lost=1, repairs=1),
    "long-asked-older-disk": _copies(older=1),
    "long-asked-restore": _copies(restores=1),
    "long-acked-restore-scans": _copies(start="acked", restores=1, keeps_scans=True),
    "long-acked-restored-twice": _copies(start="acked", restores=2),
    "long-acked-restore-repair": _copies(start="acked", restores=1, repairs=1, groups=THREE),
    "long-acked-expel": _copies(start="acked", expels=1, repairs=1, groups=THREE),
    "long-listed-older-restore": _copies(start="listed", restores=1, older=1),
    "long-listed-shared-restore": _copies(start="listed", restores=1, repairs=1, groups=SHARED),
    "long-listed-bad-restore": _copies(start="listed", restores=1, bad=1, repairs=1, groups=THREE),
    "long-numbers-three-losses": _numbers(losses=3, numbers=5),
    "long-numbers-three-groups-disk": _numbers(groups=3, backups=2, numbers=3, disks=1),
    "long-numbers-rebuilt-twice": _numbers(losses=1, rebuilds=2),
    "long-numbers-all": _numbers(losses=1, rebuilds=1, renewals=1, puts_back=1, backups=2, numbers=3),
    "long-marks-two-backups": _marks(restores=2, backups=2, slots=4),
    "long-marks-prune": _marks(prunes=1),
    "long-marks-sends": _marks(commits=2, sends=2, prunes=1),
    "long-members": _members(fronts=2),
    "long-members-taken": _members(keepers=2, taken=1, changes=2),
    "long-members-restore": _members(restores=1, changes=2),
    "long-members-restore-gone": _members(taken=1, restores=1, gone=1, standing=members.DRAINING),
    "long-rebuild": _rebuild(changes=3, checkpoints=3, other=True),
    "long-rebuild-deltas": _rebuild(changes=2, checkpoints=4, deltas=True),
}

EVERYTHING = {**HOLDS, **BREAKS, **CAMPAIGN}
