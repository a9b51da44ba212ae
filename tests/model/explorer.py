"""Owns the breadth-first exploration: every state a model can reach, and the shortest way to a bad one.

A model is a set of states and what may happen next in each. The explorer knows nothing of mail: it visits each state once,
asks the model whether something is wrong there, and ends at the first wrong state. Breadth first, so the way to it is a
shortest one. When nothing is wrong it asks one more question: can each state still come to rest? A label that begins with
`!` is a fault, or somebody's free choice; nothing may need it to come to rest.

States that differ only in the names of interchangeable parts are one: `canonical` picks the one that is kept. A way is played
again with the parts' own names, so it reads as one story.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

STUCK = "stuck: no way to rest from here"

S = TypeVar("S", bound=Hashable)
T = TypeVar("T", bound=tuple[Any, ...])
_PLACES: dict[type, dict[str, int]] = {}


def change(record: T, **changes: Any) -> T:
    """A named tuple with some fields changed: `_replace` in half the time. Exploring does little else."""
    kind = type(record)
    places = _PLACES.get(kind)
    if places is None:
        places = _PLACES[kind] = {name: i for i, name in enumerate(kind._fields)}  # type: ignore[attr-defined]
    values = list(record)
    for name in changes:
        values[places[name]] = changes[name]
    return tuple.__new__(kind, values)


class Model(Protocol[S]):
    """What can be explored. All methods are pure."""

    def start(self) -> S:
        """The first state."""

    def steps(self, state: S) -> Iterator[tuple[str, S]]:
        """What may happen next: a label, and the state after it. A step that changes nothing is ignored."""

    def wrong(self, state: S) -> str:
        """What is wrong here; "" if nothing."""

    def canonical(self, state: S) -> S:
        """The one of all states that mean the same."""

    def rests(self, state: S) -> bool:
        """True where all work is done: from each state such a one must be reachable without faults."""


class Found(NamedTuple):
    """Outcome of an exploration. `exhausted`: every state was visited. `way`: the steps to the wrong state."""

    states: int
    exhausted: bool
    wrong: str
    way: tuple[str, ...]
    seconds: float

    def story(self) -> str:
        """For people."""
        head = f"{self.states} states, {self.seconds:.1f} s, " + ("all of them" if self.exhausted else "not all")
        return head + (f": {self.wrong}\n  " + "\n  ".join(self.way) if self.wrong else ": nothing is wrong")


class _Graph(NamedTuple):
    """The states in the order in which they were found, from where each was reached first, and steps that are no faults."""

    states: list[Hashable]
    parents: array[int]
    ends: array[int]  # steps of state n are edges[ends[n]:ends[n + 1]]
    edges: array[int]


def explore(model: Model[S], limit: int = 2_000_000, passing: frozenset[str] = frozenset()) -> Found:
    """Visits every state, or at most about `limit`; stops at the first that is wrong, but for the kinds in `passing`."""
    began = time.process_time()
    enabled = gc.isenabled()
    gc.disable()  # nothing here makes cycles, and walking millions of tuples costs more than the exploration
    try:
        graph = _Graph([], array("l"), array("l", [0]), array("l"))
        wrong, at = _visit(model, graph, limit, passing)
        exhausted = not wrong and len(graph.ends) > len(graph.states)
        if exhausted:
            at = _stuck(model, graph)
            wrong = STUCK if at >= 0 else ""
        way = _way(model, graph, at) if wrong else ()
        return Found(len(graph.states), exhausted, wrong, way, time.process_time() - began)
    finally:
        if enabled:
            gc.enable()


def _visit(model: Model[S], graph: _Graph, limit: int, passing: frozenset[str]) -> tuple[str, int]:
    """Fills the graph; (what is wrong, in which state)."""
    states: list[S] = graph.states  # type: ignore[assignment]
    first = model.canonical(model.start())
    number = {first: 0}
    states.append(first)
    graph.parents.append(-1)
    at = 0
    while at < len(states) < limit:
        for label, after in model.steps(states[at]):
            after = model.canonical(after)
            known = number.get(after)
            if known is None:
                known = number[after] = len(states)
                states.append(after)
                graph.parents.append(at)
                wrong = model.wrong(after)
                if wrong and wrong not in passing:
                    return wrong, known
            if label[0] != "!" and known != at:
                graph.edges.append(known)
        graph.ends.append(len(graph.edges))
        at += 1
    return "", -1


def _stuck(model: Model[S], graph: _Graph) -> int:
    """The first state from which none that rests can be reached without faults; -1 if there is none."""
    states: list[S] = graph.states  # type: ignore[assignment]
    ends, edges = graph.ends, graph.edges
    reaches = bytearray(len(states))
    for at, state in enumerate(states):
        reaches[at] = model.rests(state)
    changed = True
    while changed:
        changed = False
        for at in range(len(states) - 1, -1, -1):
            if not reaches[at] and any(reaches[edges[step]] for step in range(ends[at], ends[at + 1])):
                reaches[at] = changed = True
    return reaches.find(0)


def _way(model: Model[S], graph: _Graph, at: int) -> tuple[str, ...]:
    """The labels from the start to a state, all with one set of names."""
    states: list[S] = graph.states  # type: ignore[assignment]
    path = []
    while at > 0:
        path.append(at)
        at = graph.parents[at]
    state = model.start()
    labels = []
    for target in reversed(path):
        label, state = _step_to(model.steps(state), model, states[target])
        labels.append(label)
    return tuple(labels)


def _step_to(steps: Iterable[tuple[str, S]], model: Model[S], target: S) -> tuple[str, S]:
    for label, after in steps:
        if model.canonical(after) == target:
            return label, after
    raise AssertionError("a step depends on the names of interchangeable parts")
