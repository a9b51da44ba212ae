"""Owns what `/metrics` shows: every counter, and the state of nodes, workers, lanes, doors, queue and copies.

Nothing is counted for it a second time: each scrape reads what the rooms know, in memory. Names: `powermail_` and the room;
sizes end in `_bytes` (one octet is one byte), times in `_seconds`, moments in `_timestamp_seconds`, counters in `_total`, as is
the custom of Prometheus. No address of a person and no client's address is a label.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from powermail import __version__
from powermail.admin.desk import Desk
from powermail.base import limits
from powermail.base.counters import BOUNDS_S, DOOR_MEANINGS, DOORS, MEANINGS, TIMED, Timing
from powermail.httpd.figures import Looker

PREFIX = "powermail_"
UNLISTED = "powermail_unlisted_total"  # a counter that was added to no list; a test finds it before anybody else does
Rows = Iterable[tuple[tuple[str, ...], float]]


def metric_name(counter: str) -> str:
    """The name under which a counter stands in `/metrics`, without `_total`; those of doors share one."""
    room, _, fact = counter.partition(".")
    words = f"door_{fact}" if room in DOORS else counter.replace(".", "_")
    return PREFIX + (f"{words.removesuffix('_octets')}_bytes" if words.endswith("_octets") else words)


def gauge(name: str, meaning: str, labels: str, rows: Rows) -> Metric:
    """A family of values that go up and down; `labels` are words."""
    family = GaugeMetricFamily(PREFIX + name, meaning, labels=labels.split())
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counter(name: str, meaning: str, labels: str, rows: Rows) -> Metric:
    """A family of totals since the start, or since a node's disk was new."""
    family = CounterMetricFamily(PREFIX + name, meaning, labels=labels.split())
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _one(value: float) -> Rows:
    return [((), value)]


class Piece(Collector):
    """Some families."""

    def __init__(self) -> None:
        self.families: list[Metric] = []
        self.samples = 0

    def collect(self) -> list[Metric]:
        return self.families


class Exposition(Collector):
    """All families, read from the desk; `ready` and `looker` know what the desk does not."""

    def __init__(self, desk: Desk, looker: Looker, ready: Callable[[], bool]) -> None:
        self._desk = desk
        self._looker = looker
        self._ready = ready

    def pieces(self) -> Iterator[Piece]:
        """The families, some at a time."""
        piece = Piece()
        for family in self.collect():
            piece.families.append(family)
            piece.samples += len(family.samples)
            if piece.samples >= limits.METRICS_PIECE_SAMPLES:
                yield piece
                piece = Piece()
        yield piece

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            PREFIX + "build", "What runs.", value={"version": __version__, "python": platform.python_version()}
        )
        yield gauge("ready", "1 while mail is taken: what /ready says.", "", _one(self._ready()))
        yield from self._nodes()
        yield from self._copies()
        yield from self._index()
        yield from self._workers()
        yield from self._rest()
        yield from counted(self._desk.world.counters.snapshot())
        yield from timed(self._desk.world.counters.timings())

    def _nodes(self) -> Iterator[Metric]:
        cluster, looker = self._desk.cluster, self._looker
        nodes = cluster.nodes
        stats = [node.stat() for node in nodes.values()]

        def each(values: Iterable[float]) -> Rows:
            return [((name,), value) for name, value in zip(nodes, values, strict=True)]

        words = cluster.states()
        states = [
            ((name, node.group, word), cluster.shown_state(node) == word) for name, node in nodes.items() for word in words
        ]
        yield gauge("node_state", "1 for the state a node is in.", "node group state", states)
        refused = each(bool(cluster.trouble(name)) for name in nodes)
        yield gauge("node_refused", "1 while a node takes no part: not to be opened, probed or admitted.", "node", refused)
        slow = each(cluster.is_slow(name) for name in nodes)
        yield gauge("node_slow", "1 while a node is used last because it is slow.", "node", slow)
        yield gauge("node_free_bytes", "Room left on the disk of a node.", "node", each(stat.free_octets for stat in stats))
        yield gauge("node_size_bytes", "Size of the disk of a node.", "node", each(stat.total_octets for stat in stats))
        yield gauge("node_log_bytes", "Records in the log of a node.", "node", each(stat.log_octets for stat in stats))
        yield gauge("node_live_bytes", "Those of them that still count.", "node", each(stat.live_octets for stat in stats))
        yield gauge("node_waiting_bytes", "Appends that wait for a node.", "node", each(stat.waiting_octets for stat in stats))
        yield gauge("node_segments", "Segments of the log of a node.", "node", each(stat.segments for stat in stats))
        yield gauge("node_messages", "Live messages on a node.", "node", each(stat.messages for stat in stats))
        yield gauge("node_damaged_stretches", "Damaged stretches of a log.", "node", each(stat.damaged for stat in stats))
        yield gauge("node_probe_seconds", "What the last probe of a node took.", "node", each(stat.probe_s for stat in stats))
        held = [((name,), float(self._desk.admission.held.get(name, 0))) for name in nodes]
        yield gauge("node_drops_held", "Copies whose drop waits for the operator (`node confirm`).", "node", held)
        owed = [((name,), float(count)) for name, count in looker.figures.owed.items()]
        yield gauge("node_deletions_owed", "Deletions that a node has not confirmed.", "node", owed)
        damages = looker.figures.damages if looker.figures.looked_at is not None else None
        bad = each(damages[name].copies if name in damages else 0 for name in nodes) if damages is not None else ()
        yield counter("node_bad_copies", "Copies that failed a check since the disk was new.", "node", bad)

    def _copies(self) -> Iterator[Metric]:
        desk = self._desk
        repairer = desk.repairer
        yield gauge("copies_required", "R: copies in different groups before a 250.", "", _one(desk.cluster.copies_required))
        yield gauge("takes_mail", "1 while enough groups of nodes are writable.", "", _one(desk.cluster.takes_mail()))
        yield gauge("under_redundant_messages", "Messages with fewer than R copies.", "", _one(repairer.left))
        yield gauge(
            "unrepairable_messages", "Those that the last turn of repair could not help.", "", _one(repairer.unrepairable_total)
        )
        left = repairer.seconds_left() if repairer.left else 0.0
        rows = _one(left) if left is not None else ()
        yield gauge("full_redundancy_seconds", "Time to full redundancy, while it can be told.", "", rows)

    def _index(self) -> Iterator[Metric]:
        desk, looker = self._desk, self._looker
        figures, clock = looker.figures, desk.world.clock
        yield gauge("index_up", "1 while the index answers.", "", _one(looker.answers))
        yield gauge("index_catching_up", "1 while it is compared with the nodes.", "", _one(desk.index.catching_up))
        yield gauge("index_epoch", "Rises when the index may have lost commits.", "", _one(desk.index.epoch))
        age = _one(clock.monotonic() - figures.looked_at) if figures.looked_at is not None else ()
        yield gauge("index_figures_age_seconds", "How old figures of the queue and of deletions are.", "", age)
        known = figures.looked_at is not None
        yield gauge("queue_recipients", "Recipients elsewhere that mail waits for.", "", _one(figures.waiting) if known else ())
        thin = _one(figures.thin_checkpoints) if known else ()
        yield gauge("thin_checkpoints", "Mailboxes whose last checkpoint lies on too few nodes, as far as is known.", "", thin)
        oldest = max(0.0, clock.now() - figures.oldest_at) if figures.oldest_at is not None else 0.0
        yield gauge("queue_oldest_seconds", "Age of what waits longest, held mail apart.", "", _one(oldest) if known else ())
        yield gauge("outbound_route", "1 if a way out is configured.", "", _one(bool(desk.settings.outbound.smarthost)))
        yield gauge("outbound_troubles", "Reasons why mail does not leave now.", "", _one(len(desk.outbound_troubles())))

    def _workers(self) -> Iterator[Metric]:
        workers = self._desk.workers
        yield gauge(
            "worker_trouble",
            "1 while a background job waits after an error, or is broken.",
            "worker",
            [((worker.name,), float(bool(worker.trouble))) for worker in workers],
        )
        yield gauge(
            "worker_step_seconds",
            "How long the step under way has taken; 0 at rest.",
            "worker",
            [((worker.name,), worker.step_s()) for worker in workers],
        )
        yield counter(
            "worker_steps", "Steps that succeeded.", "worker", [((worker.name,), float(worker.units)) for worker in workers]
        )
        yield counter(
            "worker_errors", "Steps that failed.", "worker", [((worker.name,), float(worker.errors)) for worker in workers]
        )

    def _rest(self) -> Iterator[Metric]:
        desk = self._desk
        lanes = sorted(desk.world.lanes.items())
        waits = [((name,), float(lane.waiting())) for name, lane in lanes]
        yield gauge("lane_waiting_calls", "Calls that wait for a thread.", "lane", waits)
        sessions = [((door,), float(count)) for door, count in desk.connections().items()]
        yield gauge("door_sessions", "Open connections.", "door", sessions)
        yield gauge(
            "directory_away", "1 while look-ups are answered from memory.", "", _one(bool(desk.resolver.directory.trouble))
        )
        ends = desk.certificate_ends()
        yield gauge(
            "certificate_end_timestamp_seconds", "When the certificate ends.", "", _one(ends) if ends is not None else ()
        )
        yield counter("log_lines_dropped", "Lines that the log could not take.", "", _one(desk.world.log.dropped))


def counted(totals: Mapping[str, int]) -> Iterator[Metric]:
    """Every counter: those of doors with the door as label, the others by their own names, and what stands in no list."""
    for name, meaning in MEANINGS.items():
        words = metric_name(name).removeprefix(PREFIX)
        yield counter(words, _sentence(meaning), "", _one(totals.get(name, 0)))
    for fact, (meaning, doors) in DOOR_MEANINGS.items():
        rows = [((door,), float(totals.get(f"{door}.{fact}", 0))) for door in doors]
        yield counter(f"door_{fact}", _sentence(meaning), "door", rows)
    listed = {*MEANINGS, *(f"{door}.{fact}" for fact, (_, doors) in DOOR_MEANINGS.items() for door in doors)}
    rest = [((name,), float(count)) for name, count in totals.items() if name not in listed]
    if rest:
        yield counter(UNLISTED.removeprefix(PREFIX).removesuffix("_total"), "Counters of no list.", "name", rest)


def timed(timings: Mapping[tuple[str, str], Timing]) -> Iterator[Metric]:
    """Every timing as a histogram; those of one thing of several have its name as label."""
    for name, meaning in TIMED.items():
        room = name.partition(".")[0]
        found = {of: timing for (mine, of), timing in timings.items() if mine == name}
        labels = [room] if any(found) else []
        family = HistogramMetricFamily(f"{PREFIX}{name.replace('.', '_')}_seconds", _sentence(meaning), labels=labels)
        for of, timing in found.items():
            family.add_metric([of] if labels else [], *_buckets(timing))
        yield family


def _sentence(meaning: str) -> str:
    return f"{meaning[0].upper()}{meaning[1:]}."


def _buckets(timing: Timing) -> tuple[list[tuple[str, float]], float]:
    """Counts up to each bound, as Prometheus wants them, and the sum."""
    total, found = 0, []
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), timing.counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found, timing.total_s
