"""Owns the plan of a torture: which fault comes when, and to whom, drawn from a seed. Pure data; nothing here waits or acts.

Two streams run at the same time. *Beats*: about every second one machine is killed. *Scenes*, one after the other: a link is
cut, a machine is stopped for a while, a disk is full, emptied, older or rotten. What would leave the fault budget of the
promises waits: at most one group loses data before repair has finished, the next machine of a kind is killed only when the last
one takes mail again, the database at most once a minute.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

FRONTS = ("front-1", "front-2")
NODES = ("node-a", "node-b", "node-c")
HEAD = "head"  # the machine of keeper and authority
DATABASE = "postgresql"
MACHINES = (*FRONTS, *NODES, HEAD, DATABASE)

BEAT_S = 1.0  # about: between two kills
DATABASE_EVERY_S = 60.0
LONG_S = 300.0  # a torture that is longer has the long scenes
_FLIPS, _FLIPS_SHORT = 500, 40  # of one scene: a thousand in two
_PAUSE_S, _PAUSE_SHORT_S = 30.0, 5.0
_LASTS_S, _LASTS_SHORT_S = 10.0, 3.0
_REST_S, _REST_SHORT_S = 8.0, 1.0  # behind a scene, in which there are kills alone
_WHOLE = 0.75  # of the kills are of whole machines; the others leave a parent that starts its processes again


class Kind(Enum):
    """What may be done to the cluster; the value is its name on the command line."""

    KILL = "kill"
    KILL_DATABASE = "kill-database"
    CUT = "cut"
    ONE_WAY = "one-way"
    CUT_DATABASE = "cut-database"
    PAUSE = "pause"
    FULL = "full"
    EMPTIED = "emptied"
    OLD_DISK = "old-disk"
    ROT = "rot"


SAID = {
    Kind.KILL: "kill -9 of a front end, a node machine, or the machine of keeper and authority",
    Kind.KILL_DATABASE: "kill -9 of the database",
    Kind.CUT: "a front end and a node machine do not reach each other",
    Kind.ONE_WAY: "what a node machine sends to a front end is lost",
    Kind.CUT_DATABASE: "a front end does not reach the database",
    Kind.PAUSE: "SIGSTOP of a machine",
    Kind.FULL: "the disk of a node is full",
    Kind.EMPTIED: "a node machine comes back with an empty disk",
    Kind.OLD_DISK: "a node machine comes back with an older state of its disk",
    Kind.ROT: "bits of a node's log are flipped",
}
BEATS = (Kind.KILL, Kind.KILL_DATABASE)
SCENES = tuple(kind for kind in Kind if kind not in BEATS)
LOSING = (Kind.EMPTIED, Kind.OLD_DISK, Kind.ROT)  # copies are gone by it: all heals before the next


@dataclass(frozen=True)
class Beat:
    """A kill of the first of `order` that may be killed then: of the whole machine, or of all but its first process."""

    at_s: float
    order: tuple[str, ...]
    whole: bool = True


@dataclass(frozen=True)
class Scene:
    """One fault that lasts. `other` is the far end of a link; `flips` counts bits."""

    kind: Kind
    machine: str
    other: str = ""
    lasts_s: float = 0.0
    flips: int = 0
    rest_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """All of it. There are more scenes than there is time for: how long one takes to heal is not known before."""

    seed: int
    seconds: float
    beats: tuple[Beat, ...]
    scenes: tuple[Scene, ...]


def draw(seed: int, seconds: float, kinds: Sequence[Kind]) -> Plan:
    """The plan of a seed: the same for the same words."""
    chance = random.Random(seed)
    wanted = [kind for kind in Kind if kind in kinds]
    return Plan(seed, seconds, _beats(chance, seconds, wanted), _scenes(chance, seconds, wanted))


def _beats(chance: random.Random, seconds: float, kinds: Sequence[Kind]) -> tuple[Beat, ...]:
    found: list[Beat] = []
    at_s = BEAT_S
    while at_s < seconds:
        order = [*FRONTS, *NODES, HEAD] if Kind.KILL in kinds else []
        chance.shuffle(order)
        if Kind.KILL_DATABASE in kinds:
            order.insert(0, DATABASE)  # whenever it may be
        if order:
            found.append(Beat(at_s, tuple(order), chance.random() < _WHOLE))
        at_s += BEAT_S * chance.uniform(0.7, 1.3)
    return tuple(found)


def _scenes(chance: random.Random, seconds: float, kinds: Sequence[Kind]) -> tuple[Scene, ...]:
    wanted = [kind for kind in SCENES if kind in kinds]
    found: list[Scene] = []
    long = seconds >= LONG_S
    took_s = 0.0
    while wanted and took_s < 2 * seconds:
        chance.shuffle(wanted)
        for kind in wanted:
            scene = _scene(chance, kind, long)
            found.append(scene)
            took_s += scene.lasts_s + scene.rest_s
    return tuple(found)


def _scene(chance: random.Random, kind: Kind, long: bool) -> Scene:
    lasts_s, rest_s = (_LASTS_S, _REST_S) if long else (_LASTS_SHORT_S, _REST_SHORT_S)
    front, node = chance.choice(FRONTS), chance.choice(NODES)
    if kind in (Kind.CUT, Kind.ONE_WAY):
        return Scene(kind, node, front, lasts_s, rest_s=rest_s)
    if kind is Kind.CUT_DATABASE:
        return Scene(kind, front, DATABASE, lasts_s, rest_s=rest_s)
    if kind is Kind.PAUSE:
        return Scene(kind, chance.choice(MACHINES), "", _PAUSE_S if long else _PAUSE_SHORT_S, rest_s=rest_s)
    if kind is Kind.ROT:
        return Scene(kind, node, flips=_FLIPS if long else _FLIPS_SHORT, rest_s=rest_s)
    return Scene(kind, node, "", lasts_s, rest_s=rest_s)


def alike(machine: str) -> tuple[str, ...]:
    """The machines of its kind, itself too."""
    return next((kind for kind in (FRONTS, NODES) if machine in kind), (machine,))


def has_parent(machine: str) -> bool:
    """True if its processes have a parent that starts them again: those of a node machine and of the database have none."""
    return machine not in (*NODES, DATABASE)


def spared(scene: Scene | None) -> frozenset[str]:
    """Who is not killed while a scene lasts or heals: one front end knows the recipients and has two writable groups."""
    if scene is None:
        return frozenset()
    if scene.kind in (Kind.CUT, Kind.ONE_WAY):
        return frozenset(FRONTS) - {scene.other}  # whom it does not touch: nodes are killed one at a time
    found = {*alike(scene.machine)}
    if scene.kind is Kind.CUT_DATABASE or DATABASE in found:
        found |= {*FRONTS, DATABASE}
    if scene.kind in LOSING:
        found |= {HEAD, DATABASE}  # repair is measured
    return frozenset(found)


def choose(beat: Beat, up: Mapping[str, bool], scene: Scene | None, database_s: float) -> str:
    """Whom a beat kills; "" for nobody: all that it might are down, beside one that is, or spared by the scene. `database_s`:
    how long ago the database was killed. While it is away no front end is: who starts then knows no recipients.
    """
    keep = spared(scene) | (frozenset() if database_s >= DATABASE_EVERY_S else {DATABASE})
    if not up[DATABASE]:
        keep |= {*FRONTS}
    return next((name for name in beat.order if name not in keep and all(up[each] for each in alike(name))), "")


def may_begin(scene: Scene, up: Mapping[str, bool]) -> bool:
    """True if the machines that the scene spares are all there."""
    return all(up[name] for name in sorted(spared(scene)))
