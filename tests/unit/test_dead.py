"""Nothing is kept that nobody uses: names, limits, events, statuses, settings, counters, fields, members of enumerations.

Two looks. `vulture` finds names that stand nowhere else. A name that stands elsewhere with another meaning hides from it (a
setting `path` is not read because some other class has a `path`), so what is written `room.NAME`, `Kind.MEMBER`,
`settings.section.key` or `self._own` is looked for in just that form. What only tests call is dead, outside the simulator,
whose hooks are for tests.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from vulture import Vulture

from powermail.base.settings import NodeSettings, Settings

SOURCES = {str(path): ast.parse(path.read_text()) for path in sorted(Path("src").rglob("*.py"))}
TESTS = {str(path): ast.parse(path.read_text()) for path in sorted(Path("tests").rglob("*.py"))}
SIMULATOR = "src/powermail/sim/"
SETTINGS = "src/powermail/base/settings.py"
LIMITS = "src/powermail/base/limits.py"

# Name → why it stays although nothing of ours names it.
KEPT = {
    "MemoryLog": "the second implementation of the contract `Log`, for tests",
    "fail_next": "the hook of the second implementation of the index: a transaction whose outcome nobody knows",
    "keyword": "of the contract of the index: keywords of a mailbox are in checkpoints, and a rebuild gives them back",
    "text_factory": "sqlite3 reads it of its connections",
    "finalize": "sqlite3 calls it of an aggregate",
    "_MAXLINE": "poplib reads it",
    "_check_value": "argparse calls it",
    "held_rows": "of `Rebuilt`, which `powermail rebuild` prints whole",
    "entries_lost": "of `Rebuilt`",
    "records_bad": "of `Rebuilt`",
    "sizehint": "asyncio's name for the parameter of `get_buffer`",
    "num_tickets": "ssl reads it of a context",
    "needs_hello": "of the table of verbs, which docs/peer-protocol.md prints",
    "sim/loop.py": "an event loop of asyncio's, which calls and reads what is filled in there",
}
KEPT_OF_ROOMS = {
    "MemoryLog": "as above",
    "revision": "alembic reads it of a migration",
    "down_revision": "as `revision`",
    "upgrade": "alembic calls it",
    "MemoryIndex": "the second implementation of the index, for tests",
    "__all__": "what a package shows",
}


class Room:
    """One file as others see it: what it defines at its top, and what it takes from other files."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        self.name = path.removeprefix("src/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.path = path
        self.defined: dict[str, int] = {}
        self.rooms: dict[str, str] = {}  # what it calls another file → that file
        self.taken: set[tuple[str, str]] = set()  # names of other files
        self.own: set[str] = set()
        for node in tree.body:
            self._define(node)
        for inner in ast.walk(tree):
            if isinstance(inner, ast.ImportFrom) and inner.module:
                for alias in inner.names:
                    self.rooms[alias.asname or alias.name] = f"{inner.module}.{alias.name}"
                    self.taken.add((inner.module, alias.name))
        for inner in ast.walk(tree):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                self.own.add(inner.id)
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in self.rooms:
                self.taken.add((self.rooms[inner.value.id], inner.attr))

    def _define(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self.defined[node.name] = node.lineno
        for target in (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        ):
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Name):
                    self.defined[each.id] = node.lineno


ROOMS = [Room(path, tree) for path, tree in SOURCES.items()]
OF_TESTS = {name for path, tree in TESTS.items() for name in Room(path, tree).taken}


def _class_fields(tree: ast.AST) -> Iterator[tuple[ast.ClassDef, str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    yield node, each.target.id, each.lineno


def _shown() -> set[tuple[str, int]]:
    """Where the fields stand that an operator sees: what operations and commands answer is printed whole by `--json`."""
    return {
        (path, line)
        for path, tree in SOURCES.items()
        if path.startswith(("src/powermail/admin/", "src/powermail/cli/"))
        for kind, _, line in _class_fields(tree)
        if kind.bases  # a Struct
    }


def _attributes(trees: dict[str, ast.Module]) -> set[str]:
    return {node.attr for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_nothing_is_named_and_never_used() -> None:
    finder = Vulture()
    finder.scavenge(["src"])
    shown, kept = _shown(), set()
    hooks = _attributes(TESTS) | {name for _, name in OF_TESTS}
    dead = []
    for item in finder.get_unused_code(min_confidence=60):
        path = str(item.filename.relative_to(Path.cwd()))
        why = next((name for name in KEPT if name == item.name or path.endswith(name)), None)
        if why:
            kept.add(why)
        elif (path, item.first_lineno) not in shown and not (path.startswith(SIMULATOR) and item.name in hooks):
            dead.append(f"{path}:{item.first_lineno}: {item.typ} {item.name}")
    assert not dead
    assert kept == set(KEPT), "these are used again"


def test_what_a_room_defines_is_used_by_it_or_taken_by_another() -> None:
    """Constants, statuses, functions and classes, by the room they stand in; a limit is obeyed outside the file of limits."""
    taken = {name for room in ROOMS for name in room.taken}
    dead = [
        f"{room.path}:{line}: {name}"
        for room in ROOMS
        for name, line in room.defined.items()
        if (room.name, name) not in taken
        and (name not in room.own or (room.path == LIMITS and not name.startswith("_") and name not in ("KIB", "MIB")))
        and name not in KEPT_OF_ROOMS
        and not (room.path.startswith(SIMULATOR) and (room.name, name) in OF_TESTS)
    ]
    assert not dead


def _enumerations() -> list[tuple[str, ast.ClassDef]]:
    kinds = ("Enum", "IntEnum", "StrEnum", "Flag", "IntFlag")
    return [
        (path, node)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id in kinds for base in node.bases)
    ]


@pytest.mark.parametrize(("path", "kind"), _enumerations(), ids=lambda each: getattr(each, "name", ""))
def test_every_member_of_an_enumeration_is_said_by_somebody(path: str, kind: ast.ClassDef) -> None:
    """An event that nobody writes, a state that nothing is ever in. Members that are read off the wire or a record by value
    are said by who wrote them."""
    members = [
        target.id
        for each in kind.body
        if isinstance(each, ast.Assign)
        for target in each.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    ]
    said = {
        node.attr
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and _last(node.value) == kind.name
    }
    assert not [name for name in members if name not in said]


def _last(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


SECTIONS = {
    field.name: type(field.default).__name__
    for field in msgspec.structs.fields(Settings)
    if isinstance(field.default, msgspec.Struct)
}


def _annotated(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that are annotated as a section, and which."""
    kinds = {kind: section for section, kind in SECTIONS.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None and _last(node.annotation) in kinds:
            yield node.arg if isinstance(node, ast.arg) else _last(node.target), kinds[_last(node.annotation)]


def _settings_read(tree: ast.Module, annotated: dict[str, set[str]]) -> set[str]:
    """`section.key` as a file reads them: of `….section`, of a name that was given it, or of one annotated so in the room."""
    called: dict[str, set[str]] = {name: set(sections) for name, sections in annotated.items()}
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for name, value in pairs:
                    called.setdefault(_last(name), set()).update(called.get(_last(value), ()))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Attribute):
            found |= {node.attr, *(f"{section}.{node.attr}" for section in called.get(_last(node.value), ()))}
    return found


def test_every_setting_is_read() -> None:
    rooms: dict[str, dict[str, set[str]]] = {}
    for path, tree in SOURCES.items():
        names = rooms.setdefault(path.rpartition("/")[0], {section: {section} for section in SECTIONS})
        if path != SETTINGS:
            for name, section in _annotated(tree):
                names.setdefault(name, set()).add(section)
    read = {
        name
        for path, tree in SOURCES.items()
        if path != SETTINGS
        for name in _settings_read(tree, rooms[path.rpartition("/")[0]])
    }
    known = [
        f"{section}.{field.name}"
        for section in SECTIONS
        for field in msgspec.structs.fields(type(getattr(Settings(), section)))
    ]
    known += [field.name for field in msgspec.structs.fields(NodeSettings)]
    known += [field.name for field in msgspec.structs.fields(Settings)]
    assert not [name for name in known if name not in read]


def _names_given(trees: dict[str, ast.Module], methods: tuple[str, ...]) -> Iterator[tuple[str, ast.expr]]:
    """The first argument of each call of a method of `counters`, and where."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in methods
                and _last(node.func.value) == "counters"
                and node.args
            ):
                yield f"{path}:{node.lineno}", node.args[0]


def _patterns(name: ast.expr) -> list[str]:
    if isinstance(name, ast.Constant):
        return [re.escape(str(name.value))]
    if isinstance(name, ast.IfExp):
        return _patterns(name.body) + _patterns(name.orelse)
    assert isinstance(name, ast.JoinedStr), ast.dump(name)
    return ["".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else "[a-z0-9_-]+" for part in name.values)]


def test_every_counter_that_is_read_is_raised_somewhere() -> None:
    """A misspelt one is 0 for ever, and a test that it is 0 passes for ever."""
    raised = {pattern for _, name in _names_given(SOURCES, ("add",)) for pattern in _patterns(name)}
    assert len(raised) > 50
    wrong = [
        f"{where}: {ast.unparse(name)}"
        for where, name in _names_given({**SOURCES, **TESTS}, ("get",))
        if isinstance(name, ast.Constant) and not any(re.fullmatch(pattern, str(name.value)) for pattern in raised)
    ]
    assert not wrong


def _own(path: str, kind: type[ast.expr_context]) -> Iterator[ast.Attribute]:
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, kind) and node.attr.startswith("_"):
            yield node


def _room(path: str) -> str:
    """The room a file stands in: what is below one folder of the package implements what stands in it."""
    return "/".join(path.split("/")[:3])


def test_what_an_object_keeps_for_itself_it_reads() -> None:
    """`self._own` is set and never looked at, or a method `_own` is never called: by its file, or by one of its room."""
    read = {path: {node.attr for node in _own(path, ast.Load)} for path in SOURCES}
    beside: dict[str, set[str]] = {}
    for path, names in read.items():
        beside.setdefault(_room(path), set()).update(names)
    unread = []
    for path, tree in SOURCES.items():
        kept = {(node.attr, node.lineno) for node in _own(path, ast.Store) if _last(node.value) == "self"}
        kept |= {
            (each.name, each.lineno)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for each in node.body
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and re.match("_[^_]", each.name)
        }
        if not any(path.endswith(name) for name in KEPT):
            unread += [
                f"{path}:{line}: {name}" for name, line in sorted(kept) if name not in beside[_room(path)] and name not in KEPT
            ]
    assert not unread
