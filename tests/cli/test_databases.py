"""A pair of databases of which none leads, or another than before: what the torture and the demo of a cluster go by."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from powermail.base.errors import OperatorError
from powermail.cli import databases
from powermail.cli.databases import Pair

AT = {"postgresql-1": "10.0.0.11", "postgresql-2": "10.0.0.12", "": "10.0.0.1"}


class Answers:
    """What each host answers to a question: whether it leads, and whether a synchronous standby follows it."""

    def __init__(self) -> None:
        self.leads: str | None = None
        self.whole = False
        self.questions = 0

    async def asked(self, host: str, question: str, database: str = "powermail") -> bool:
        """True of the one that leads; of the other, and of one that is dead, False."""
        self.questions += 1
        return host == self.leads and (self.whole or "pg_stat_replication" not in question)


class Started:
    """Servers that were started, and say nothing of themselves but a log."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.served: dict[str, Any] = {}
        self.commands: list[str] = []

    async def start(self, name: str, *_: object, **__: object) -> None:
        """Notes that it runs."""
        self.served[name] = SimpleNamespace(process=SimpleNamespace(returncode=None))

    async def command(self, shown: str, *_: str) -> None:
        """Notes what was asked for."""
        self.commands.append(shown)

    def log_of(self, name: str) -> str:
        """The end of its log."""
        return f"the log of {name}"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Both hosts answer by these."""
    made = Answers()
    monkeypatch.setattr(databases, "_asked", made.asked)
    return made


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, answers: Answers) -> Pair:
    """Two machines in namespaces of their own, as far as anybody asks."""
    monkeypatch.setattr("powermail.cli.databases.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(databases, "system_user", lambda: "")
    monkeypatch.setattr(databases, "postgres_programs", lambda: "/usr/lib/postgresql/15/bin")
    return Pair(SimpleNamespace(at=AT.__getitem__))  # type: ignore[arg-type]


@pytest.mark.parametrize(("leads", "name"), [("10.0.0.11", "postgresql-1"), ("10.0.0.12", "postgresql-2"), (None, "")])
async def test_who_is_written_to_leads_and_nobody_if_none_is(
    pair: Pair, answers: Answers, leads: str | None, name: str
) -> None:
    answers.leads = leads
    assert await pair.leader() == name
    assert not await pair.is_whole(), "no standby follows it yet"
    answers.whole = True
    assert await pair.is_whole() == bool(name)


async def test_a_failover_is_over_when_another_leads(pair: Pair, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    following = asyncio.ensure_future(pair.follow("postgresql-1"))
    for leads in ("10.0.0.11", None):  # its own connections still answer; then nobody's do
        answers.leads = leads
        before = answers.questions
        while answers.questions < before + 2 * len(pair.machines):  # it looks once more at both, and once more
            await asyncio.sleep(0.001)
        assert not following.done()
    answers.leads = "10.0.0.12"
    await following
    answers.leads = None
    monkeypatch.setattr(databases, "_START_S", 0.2)
    with pytest.raises(TimeoutError):
        await pair.follow("postgresql-2")


@pytest.mark.parametrize("still", [True, False])
async def test_a_pair_whose_leader_went_while_it_was_made_is_an_error_with_its_log(
    pair: Pair, answers: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, still: bool
) -> None:
    """It was whole a moment ago: a database that is made at a standby would be refused without a word of why."""
    servers: Any = Started(tmp_path)
    answers.leads, answers.whole = "10.0.0.12", True

    async def whole(holds: Any, _: Any, names: Sequence[str]) -> None:
        assert await holds() and tuple(names) == ("etcd", *pair.machines)
        if not still:
            answers.leads = None

    monkeypatch.setattr(databases, "_until", whole)
    if still:
        assert await pair.make(servers) == "postgresql://powermail@10.0.0.11,10.0.0.12/powermail"
        assert len(servers.commands) == 1 and "10.0.0.12" in servers.commands[0], "where it is written to"
    else:
        with pytest.raises(OperatorError, match=r"none of postgresql-1, postgresql-2 leads any more:\nthe log of postgresql-1"):
            await pair.make(servers)
        assert servers.commands == []
    assert list(servers.served) == ["etcd", *pair.machines]


async def test_a_pair_that_is_never_whole_says_what_its_servers_said(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    servers: Any = Started(tmp_path)
    monkeypatch.setattr(databases, "_START_S", 0.2)
    with pytest.raises(OperatorError, match=r"not ready after 0 s:\netcd: the log of etcd\npostgresql-1: the log of"):
        await pair.make(servers)
    servers.served["postgresql-2"].process.returncode = 1
    with pytest.raises(OperatorError, match=r"postgresql-2 ended:\nthe log of postgresql-2"):
        await databases._until(pair.is_whole, servers, pair.machines)
