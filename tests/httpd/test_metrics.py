"""What `/metrics` shows: valid, complete, true; and the example rules fit it."""

from __future__ import annotations

import ast
import re
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from powermail.base.counters import BOUNDS_S, DOOR_MEANINGS, DOORS, MEANINGS, TIMED, Counters
from powermail.directory.reasons import Reason
from powermail.httpd.metrics import UNLISTED, Piece, counted, metric_name, timed
from powermail.index.contract import Outcome
from tests.httpd.conftest import Watched, value, values

SOURCES = {path: ast.parse(path.read_text()) for path in sorted(Path("src").rglob("*.py"))}
LISTED = {*MEANINGS, *(f"{door}.{fact}" for fact, (_, doors) in DOOR_MEANINGS.items() for door in doors)}
RULES = yaml.safe_load(Path("packaging/alerts.yml").read_text())
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def written(*families: object) -> str:
    piece = Piece()
    piece.families.extend(families)  # type: ignore[arg-type]
    return generate_latest(piece).decode()


# -- every counter ----------------------------------------------------------------------------------------------------


def patterns(call: ast.Call) -> list[str]:
    """The names that a call may raise, as regular expressions; what is put in may be any word."""
    said = call.args[0]
    branches = [said.body, said.orelse] if isinstance(said, ast.IfExp) else [said]
    found = []
    for branch in branches:
        parts = branch.values if isinstance(branch, ast.JoinedStr) else [branch]
        assert isinstance(parts[0], ast.Constant | ast.FormattedValue), (
            f"line {call.lineno}: a counter whose name cannot be seen"
        )
        found.append("".join([re.escape(str(each.value)) if isinstance(each, ast.Constant) else r"[a-z_]+" for each in parts]))
    return found


def calls(tree: ast.AST, method: str, on: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            if re.search(rf"\b_?{on}$", ast.unparse(node.func.value)):
                yield node


def test_every_counter_that_is_raised_is_listed_and_every_listed_one_is_raised() -> None:
    raised = [each for tree in SOURCES.values() for call in calls(tree, "add", "counters") for each in patterns(call)]
    assert len(raised) > 60
    unlisted = [each for each in raised if not any(re.fullmatch(each, name) for name in LISTED)]
    assert unlisted == [], "add them, with their meaning, to powermail.base.counters"
    assert [name for name in LISTED if not any(re.fullmatch(each, name) for each in raised)] == [], "never raised"


def test_what_is_counted_by_a_member_of_an_enumeration_is_listed() -> None:
    assert {f"auth.failed_{reason.name.lower()}" for reason in Reason} == {
        name for name in MEANINGS if name.startswith("auth.failed_")
    }
    assert {f"law.7.{each.value}" for each in (Outcome.ABORTED, Outcome.SETTLED)} == {
        name for name in MEANINGS if name.startswith("law.7.")
    }


def test_what_an_smtp_session_counts_by_a_word_is_listed() -> None:
    """Its counters are named by what ended the session, or by a word beside the refusal."""
    words = set()
    for name, tree in SOURCES.items():
        if str(name) in ("src/powermail/smtpd/session.py", "src/powermail/wire/smtp_server.py"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    if node.func.attr in ("_count", "_answer", "close", "_end"):
                        words |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    words |= {why.replace(" ", "_") for why in ("shutting down", "timeout", "too many connections")}
    words.discard("quit")
    assert len(words) > 15
    assert [word for word in sorted(words) if f"smtpd.{word}" not in LISTED] == []


def test_every_timing_is_listed_and_used() -> None:
    used = {call.args[0].value for tree in SOURCES.values() for call in calls(tree, "timing", "counters")}  # type: ignore[attr-defined]
    assert used == set(TIMED)


def test_every_counter_is_shown_with_its_value_and_before_it_has_happened() -> None:
    totals = {name: 7 + number for number, name in enumerate(sorted(LISTED))}
    shown, before = values(written(*counted(totals))), values(written(*counted({})))
    assert len(shown) == len(before) == len(LISTED)
    for name, count in totals.items():
        door = name.partition(".")[0]
        at = f"{metric_name(name)}_total", (("door", door),) if door in DOORS else ()
        assert (shown[at], before[at]) == (count, 0.0), name


def test_a_counter_of_no_list_is_shown_all_the_same() -> None:
    assert value(written(*counted({"new.fact": 3, "popd.early_talkers": 2})), UNLISTED, name="new.fact") == 3.0


def test_a_timing_is_a_histogram() -> None:
    counters = Counters()
    timing = counters.timing("node.write", "a")
    assert counters.timing("node.write", "a") is timing
    for seconds in (0.0005, BOUNDS_S[1], 0.2, 100.0):
        timing.observe(seconds)
    text = written(*timed(counters.timings()))
    name = "powermail_node_write_seconds"
    found = {le: value(text, f"{name}_bucket", node="a", le=le) for le in ("0.001", "0.0025", "0.1", "0.25", "20.0", "+Inf")}
    assert found == {"0.001": 1, "0.0025": 2, "0.1": 2, "0.25": 3, "20.0": 3, "+Inf": 4}
    assert value(text, f"{name}_count", node="a") == 4
    assert value(text, f"{name}_sum", node="a") == pytest.approx(100.203)


# -- a scrape of a real server ----------------------------------------------------------------------------------------


def test_a_scrape_is_valid_and_says_what_each_figure_means(watched: Watched) -> None:
    answer = watched.ask("/metrics", Accept="application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(answer.body))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) > 100
    for family in families:
        assert re.fullmatch(r"powermail_[a-z0-9_]+", family.name) and "octets" not in family.name
        assert family.documentation.endswith("."), family.name
        assert family.type in SUFFIXES, family.name
        assert {sample.name.removeprefix(family.name) for sample in family.samples} <= set(SUFFIXES[family.type])
        kept = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(kept) == len(set(kept))
    assert "@" not in answer.body, "no address of anybody"


def test_mail_is_counted_and_timed(watched: Watched) -> None:
    messages, replies = "powermail_delivery_messages_total", "powermail_delivery_reply_seconds_count"
    assert watched.figure(messages) == watched.figure(replies) == 0.0
    with smtplib.SMTP("127.0.0.1", watched.ports["smtp"]) as client:
        client.sendmail("", ["postmaster@localhost"], b"Subject: x\r\n\r\nx\r\n")
        assert watched.becomes(1.0, "powermail_door_sessions", door="smtpd")
        assert watched.becomes(1.0, messages) and watched.becomes(1.0, replies)
    text = watched.ask("/metrics").body
    assert sum(value(text, "powermail_node_messages", node=node) for node in "abc") >= 2
    assert sum(value(text, "powermail_node_write_seconds_count", node=node) for node in "abc") >= 2
    assert value(text, "powermail_node_state", node="a", group="rack-a", state="read-write") == 1.0
    assert value(text, "powermail_index_up") == value(text, "powermail_ready") == value(text, "powermail_takes_mail") == 1.0
    assert value(text, "powermail_worker_trouble", worker="metrics") == 0.0
    assert value(text, "powermail_lane_waiting_calls", lane="index-write") >= 0.0
    assert value(text, "powermail_certificate_end_timestamp_seconds") > 1.7e9
    assert UNLISTED not in text


def test_whoever_does_not_ask_loads_none_of_it() -> None:
    program = (
        "import sys, powermail.app.compose, powermail.cli.serving, powermail.cli.commands, powermail.sim.run\n"
        "print([name for name in ('aiohttp', 'prometheus_client', 'yarl', 'powermail.httpd') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the example rules ------------------------------------------------------------------------------------------------
# Debian's promtool is 96 MB with what it comes in; a parser of its language is 1 MB. The fields of rules are checked here.


@pytest.fixture(scope="module")
def samples(watched: Watched) -> list[Sample]:
    """One scrape."""
    return [each for family in text_string_to_metric_families(watched.ask("/metrics").body) for each in family.samples]


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def selectors(expression: object) -> Iterator[promql_parser.VectorSelector]:
    """Every choice of series in an expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    elif isinstance(expression, promql_parser.MatrixSelector):
        yield expression.vector_selector
    elif isinstance(expression, promql_parser.BinaryExpr):
        yield from selectors(expression.lhs)
        yield from selectors(expression.rhs)
    elif isinstance(expression, promql_parser.Call):
        for each in expression.args:
            yield from selectors(each)
    elif isinstance(expression, promql_parser.AggregateExpr | promql_parser.ParenExpr):
        yield from selectors(expression.expr)
    else:
        assert isinstance(expression, promql_parser.NumberLiteral), f"{type(expression)} is not looked into"


def test_the_rules_have_the_form_that_prometheus_wants() -> None:
    assert set(RULES) == {"groups"} and [set(group) for group in RULES["groups"]] == [{"name", "rules"}]
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 20
    for rule in rules():
        assert {"alert", "expr", "labels", "annotations"} <= set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[1-9][0-9]*[smhd]", rule.get("for", "1m"))
        assert rule["labels"] in ({"severity": "warning"}, {"severity": "critical"})
        assert set(rule["annotations"]) == {"summary"}
        promql_parser.parse(rule["expr"])


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_every_metric_and_label_of_a_rule_is_in_a_real_scrape(samples: list[Sample], rule: dict[str, Any]) -> None:
    told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) - {"instance"}
    for selector in selectors(promql_parser.parse(rule["expr"])):
        if selector.name == "up":  # Prometheus's own
            continue
        wanted = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        found = [s for s in samples if s.name == selector.name and wanted.items() <= s.labels.items()]
        assert found, f"{selector.name} {wanted}"
        assert told <= set(found[0].labels)


def test_no_rule_that_compares_one_figure_fires_on_a_server_that_is_well(samples: list[Sample]) -> None:
    judged = 0
    for rule in rules():
        match = re.fullmatch(r"(powermail_\w+)(\{.*\})? (==|>) ([0-9.]+)", rule["expr"])
        if match is None:
            continue
        judged += 1
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
        for sample in samples:
            if sample.name == match[1] and wanted.items() <= sample.labels.items():
                bound = float(match[4])
                assert not (sample.value == bound if match[3] == "==" else sample.value > bound), (rule["alert"], sample)
    assert judged >= 10
