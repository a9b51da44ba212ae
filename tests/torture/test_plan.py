"""The plan of a torture is drawn from its seed, and stays within the fault budget whatever comes of it."""

from __future__ import annotations

import itertools

import pytest

from powermail.torture import plan as pl
from powermail.torture.plan import DATABASE, FRONTS, HEAD, MACHINES, NODES, Beat, Kind, Scene

ALL = tuple(Kind)
UP = dict.fromkeys(MACHINES, True)


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    assert pl.draw(3, 90.0, ALL) == pl.draw(3, 90.0, ALL)
    assert pl.draw(3, 90.0, ALL) != pl.draw(4, 90.0, ALL)


@pytest.mark.parametrize("seed", range(5))
def test_about_every_second_a_machine_is_killed(seed: int) -> None:
    beats = pl.draw(seed, 600.0, ALL).beats
    gaps = [after.at_s - before.at_s for before, after in itertools.pairwise(beats)]
    assert min(gaps) > 0.5 and max(gaps) < 1.5 and 500 < len(beats) < 700
    assert all(sorted(beat.order) == sorted(MACHINES) for beat in beats)
    assert {beat.order[1] for beat in beats} == {*MACHINES} - {DATABASE}
    assert 0 < sum(not beat.whole for beat in beats) < len(beats) / 2


def test_the_database_is_killed_at_most_once_a_minute_and_as_soon_as_it_may_be() -> None:
    beat = pl.draw(1, 60.0, ALL).beats[0]
    assert pl.choose(beat, UP, None, 60.0) == DATABASE
    assert pl.choose(beat, UP, None, 59.9) == beat.order[1]
    assert pl.choose(beat, UP, Scene(Kind.CUT_DATABASE, "front-1", DATABASE), 1e9) not in (DATABASE, *FRONTS)


def test_while_the_database_is_away_no_front_end_is_killed() -> None:
    """P14: a failover takes 20 s, in which who starts anew knows no recipients."""
    away = {**UP, DATABASE: False}
    assert pl.choose(Beat(1.0, (DATABASE, *FRONTS)), away, None, 1e9) == ""
    assert pl.choose(Beat(1.0, (DATABASE, *FRONTS, "node-b", HEAD)), away, None, 1e9) == "node-b"


@pytest.mark.parametrize("seconds", [20.0, 90.0, 600.0])
def test_every_kind_comes_before_one_comes_again_and_there_are_more_than_there_is_time_for(seconds: float) -> None:
    plan = pl.draw(1, seconds, ALL)
    first = plan.scenes[: len(pl.SCENES)]
    assert {scene.kind for scene in first} == set(pl.SCENES)
    assert sum(scene.lasts_s + scene.rest_s for scene in plan.scenes) >= seconds


def test_a_long_one_pauses_machines_for_half_a_minute_and_flips_a_thousand_bits_in_two_scenes() -> None:
    scenes = pl.draw(1, 600.0, ALL).scenes
    assert {scene.lasts_s for scene in scenes if scene.kind is Kind.PAUSE} == {30.0}
    assert [scene.flips for scene in scenes if scene.kind is Kind.ROT][:2] == [500, 500]


def test_only_what_is_wanted_is_planned() -> None:
    plan = pl.draw(1, 60.0, [Kind.ROT])
    assert not plan.beats and {scene.kind for scene in plan.scenes} == {Kind.ROT}
    assert not pl.draw(1, 60.0, [Kind.KILL]).scenes
    beats = pl.draw(1, 600.0, [Kind.KILL_DATABASE]).beats
    assert {beat.order for beat in beats} == {(DATABASE,)}


def test_the_next_machine_of_a_kind_is_killed_only_when_the_last_one_is_back() -> None:
    beat = Beat(1.0, ("node-a", "node-b", "front-1", "head"))
    assert pl.choose(beat, UP, None, 0.0) == "node-a"
    assert pl.choose(beat, {**UP, "node-c": False}, None, 0.0) == "front-1"
    assert pl.choose(beat, {**UP, "node-c": False, "front-2": False}, None, 0.0) == "head"
    assert pl.choose(beat, dict.fromkeys(MACHINES, False), None, 0.0) == ""


@pytest.mark.parametrize("kind", pl.SCENES)
def test_while_a_scene_lasts_one_front_end_goes_on_with_two_groups(kind: Kind) -> None:
    everybody = Beat(1.0, MACHINES)
    scene = Scene(kind, "front-1" if kind is Kind.CUT_DATABASE else "node-b", "front-1")
    down = dict(UP)
    killed = []
    while name := pl.choose(everybody, down, scene, 1e9):
        killed.append(name)
        down[name] = False
    if kind is Kind.CUT_DATABASE:
        assert not {*killed} & {*FRONTS, DATABASE}, "who is started while the database is away knows no recipients"
    elif kind in (Kind.CUT, Kind.ONE_WAY):
        assert "front-2" not in killed and len({*killed} & {*NODES}) == 1, "it has two groups, and recipients"
    else:
        assert not {*killed} & {*NODES}
        assert len({*killed} & {*FRONTS}) == 1
        assert (HEAD in killed) != (kind in pl.LOSING)
    assert pl.may_begin(scene, UP) and not pl.may_begin(scene, {**UP, sorted(pl.spared(scene))[0]: False})
