"""The laws hold within small bounds, in every order of events; and without each clause something breaks.

`python -m tests.model NAME` prints the shortest way to what breaks; `configurations` says what is explored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType

import pytest

from tests.model import copies_state, marks, members, numbers, rebuild
from tests.model.configurations import BREAKS, CAMPAIGN, HOLDS, NOT_SHOWN
from tests.model.explorer import STUCK, explore
from tests.planted.__main__ import planted

_LIMIT = 200_000  # a mistake in a model must not eat the memory


@pytest.mark.parametrize("name", HOLDS)
def test_the_laws_hold(name: str) -> None:
    configuration = HOLDS[name]
    found = explore(configuration.model, _LIMIT)
    assert not found.wrong, found.story()
    assert found.exhausted, found.story()
    assert found.states >= configuration.states, "this model explores less than it did"


@pytest.mark.parametrize("name", BREAKS)
def test_without_this_clause_it_breaks(name: str) -> None:
    configuration = BREAKS[name]
    found = explore(configuration.model, _LIMIT, configuration.passing)
    print(found.story())
    assert found.wrong == configuration.wrong, found.story()
    assert found.way


_MODELS = {"copies": copies_state, "numbers": numbers, "marks": marks, "members": members, "rebuild": rebuild}


def _removed(model: ModuleType) -> set[str]:
    """The clauses of a model that `test_without_this_clause_it_breaks` removes."""
    kept = model.Laws()
    removed = set()
    for configuration in BREAKS.values():
        laws = configuration.model.laws  # type: ignore[attr-defined]
        if isinstance(laws, model.Laws):
            removed |= {field.name for field in fields(laws) if getattr(laws, field.name) != getattr(kept, field.name)}
    return removed


@pytest.mark.parametrize("model", _MODELS.values(), ids=_MODELS)
def test_every_clause_is_removed_somewhere(model: ModuleType) -> None:
    """Or the list says what covers for it."""
    removed = _removed(model)
    name = model.__name__.split(".")[-1]
    not_shown = {clause.split(".")[1] for clause in NOT_SHOWN if clause.startswith(f"{name}.")}
    assert not removed & not_shown
    assert removed | not_shown == {field.name for field in fields(model.Laws)}


def test_every_clause_that_a_planted_bug_names_is_removed_here() -> None:
    """What `make planted` says that the model shows, the model shows."""
    named = {bug.clause for bug in planted() if bug.clause}
    assert len(named) >= 35
    assert named <= {f"{name}.{clause}" for name, model in _MODELS.items() for clause in _removed(model)}


def test_the_campaign_begins_where_the_suite_ends() -> None:
    for name, configuration in CAMPAIGN.items():
        found = explore(configuration.model, 300)
        assert not found.wrong, f"{name}: {found.story()}"


class _Jugs:
    """Two jugs of three and five litres; four litres are what must not be."""

    def start(self) -> tuple[int, int]:
        return 0, 0

    def canonical(self, state: tuple[int, int]) -> tuple[int, int]:
        return state

    def steps(self, state: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int]]]:
        small, large = state
        yield "fill 3", (3, large)
        yield "fill 5", (small, 5)
        yield "!empty 3", (0, large)
        yield "!empty 5", (small, 0)
        poured = min(small, 5 - large)
        yield "pour 3 into 5", (small - poured, large + poured)
        poured = min(large, 3 - small)
        yield "pour 5 into 3", (small + poured, large - poured)

    def wrong(self, state: tuple[int, int]) -> str:
        return "four litres" if state[1] == 4 else ""

    def rests(self, state: tuple[int, int]) -> bool:
        return state == (0, 0)


def test_the_explorer_finds_a_shortest_way() -> None:
    found = explore(_Jugs())
    assert found.wrong == "four litres"
    assert found.way == ("fill 5", "pour 5 into 3", "!empty 3", "pour 5 into 3", "fill 5", "pour 5 into 3")


def test_the_explorer_visits_everything_and_finds_what_is_stuck() -> None:
    """Without emptying, which nothing may need, full jugs never come to rest."""
    found = explore(_Jugs(), passing=frozenset(["four litres"]))
    assert (found.states, found.exhausted, found.wrong) == (16, True, STUCK)
    assert found.way == ("fill 3",)


def test_the_explorer_says_when_it_did_not_see_all() -> None:
    found = explore(_Jugs(), limit=5, passing=frozenset(["four litres"]))
    assert not found.exhausted
    assert "not all" in found.story()
