"""The house keeps its rules: sizes, words, documents, the rescue script."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from powermail.base.disk import SystemDisk
from powermail.base.entropy import SystemEntropy
from powermail.cli.commands import entries
from powermail.cli.words import parser
from powermail.storage.contract import Chunk, Position
from powermail.storage.identity import make_store
from powermail.storage.log import record as rec
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.log.write import Operation
from tests.model import copies_state, marks, members, numbers, rebuild
from tests.planted.__main__ import Planted, plant, planted, tree

SOURCES = sorted(Path("src").rglob("*.py"))
DOCUMENTS = [*sorted(Path("docs").rglob("*.md")), *(Path(name) for name in ("README.md", "CHANGES.md", "CONTRIBUTING.md"))]

MODELS = {
    "copies": copies_state.Laws,
    "marks": marks.Laws,
    "members": members.Laws,
    "numbers": numbers.Laws,
    "rebuild": rebuild.Laws,
}
CLAUSES = {f"{model}.{clause.name}" for model, laws in MODELS.items() for clause in dataclasses.fields(laws)}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_are_tidy(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= 800, "a room is missing"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            limit = 170 if node.name == "parser" else 75
            assert length <= limit, f"{node.name} has {length} lines"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), "X13"
    for word in ("pickle", "yaml.load", "shell=True", "os.system", "TODO", "FIXME"):
        assert word not in text, word
    assert path.stem not in ("utils", "helpers", "common", "misc", "manager", "handler")


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_links_of_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_commands_named_in_documents_exist() -> None:
    top = parser(entries())
    known = top.format_help()
    for path in DOCUMENTS:
        if path.name == "CHANGES.md":
            continue
        for command in re.findall(r"`powermail ([a-z]+)", path.read_text()):
            assert re.search(rf"^    {command}\b", known, re.MULTILINE), f"{path}: powermail {command}"


def test_requirements_are_pinned_with_hashes_and_name_no_host() -> None:
    for path in Path("requirements").glob("*.txt"):
        text = path.read_text()
        assert "://" not in text
        assert all("==" in line for line in text.splitlines() if line and not line.startswith((" ", "#")))
        assert text.count("--hash=sha256:") > text.count("==")


def test_what_the_program_imports_is_asked_for_and_what_is_asked_for_is_imported() -> None:
    """By the package and by the lock file alike: who installs either has all."""
    of = packages_distributions()
    imported = set()
    for path in Path("src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    used = {_plain(of[name][0]) for name in imported - set(sys.stdlib_module_names) - {"powermail"}}
    asked = {_plain(line) for line in tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]}
    assert used == asked
    assert asked == {_plain(line) for line in Path("requirements/core.in").read_text().split()}


def _plain(requirement: str) -> str:
    """The name of a distribution (PEP 503), without extras, versions and markers."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_rescue_script_turns_segments_into_maildir(tmp_path: Path) -> None:
    disk = SystemDisk()
    made = []
    for name in ("a", "b"):
        path = str(tmp_path / name)
        make_store(disk, path, "00" * 16, name, SystemEntropy())
        made.append(SegmentStore.open(disk, path, "00" * 16, name, SqliteKeyIndex, Options(65536, 0), lambda: 0.0))
    import hashlib

    import zstandard

    octets = b"Subject: rescue\r\n\r\n" + b"text " * 500
    packed = zstandard.ZstdCompressor().compress(octets)
    commit = b'{"octets":%d,"sha256":"%s","sizes":[%d],"received_at":1.5,"reverse_path":"","targets":[{"account":"7"}]}' % (
        len(octets),
        hashlib.sha256(octets).hexdigest().encode(),
        len(octets),
    )
    for store in made:
        for number in (1, 2):
            key = bytes([number]) * 16
            outcomes = store.write([Operation(rec.COMMIT, key, [Chunk(0, 1, packed, len(octets))], commit, 1)])
            assert isinstance(outcomes[0], Position)
    assert isinstance(made[1].write([Operation(rec.TOMBSTONE, b"\x02" * 16)])[0], Position)
    for store in made:
        store.close()
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "docs/rescue.py", str(output), str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (message,) = (output / "7" / "new").iterdir()
    assert message.read_bytes() == octets


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, in which nothing is planted but tried."""
    target = tmp_path_factory.mktemp("fields")
    tree(target)
    return target


@pytest.mark.parametrize("bug", planted(), ids=lambda bug: bug.path.stem)
def test_planted_bugs_can_still_be_planted(bug: Planted, fields: Path) -> None:
    """`make planted` tries whether they are caught; that takes long."""
    plant(bug, fields, "--check")
    assert all(Path(word).exists() for word in bug.harness if word.startswith("tests/"))
    assert not bug.clause or bug.clause in CLAUSES, "no such clause of a model"


async def test_a_blocked_event_loop_would_be_noticed() -> None:
    """The watch of `tests/conftest.py` is on."""
    handle = asyncio.Handle
    assert handle._run.__name__ == "timed"
    assert handle._run.__module__ == "tests.conftest"
