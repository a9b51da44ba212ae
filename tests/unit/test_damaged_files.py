"""What is damaged is said to be so, also where its octets are no text: JSON and msgpack that are not UTF-8 are another error of
the library than those that cannot be parsed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from powermail.app.places import Places
from powermail.app.setup import cluster_in
from powermail.base.disk import SystemDisk
from powermail.base.errors import OperatorError
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.storage.identity import read_identity
from powermail.wire import enrolment as forms
from powermail.wire.enrolment import Broken, Registering

HARMS = (b"", b"{}", b"7", b"[[]]", b'{"\xff": 1}', b'{"a": "\xff\xfe"}', b"\xff" * 40)
TEXTS = {"cli/tracing.py", "cli/importing.py"}  # decode what is text already


@pytest.mark.parametrize("octets", HARMS)
def test_files_whose_octets_are_no_text(octets: bytes, tmp_path: Path) -> None:
    (tmp_path / "identity").write_bytes(octets)
    (tmp_path / "places.json").write_bytes(octets)
    with pytest.raises(OperatorError, match="is damaged"):
        read_identity(SystemDisk(), str(tmp_path), "cluster", "a")
    with pytest.raises(ValueError):
        cluster_in(octets)
    places = Places(system_world(MemoryLog()), str(tmp_path), {"a": str(tmp_path)})
    places.note(["a"])  # what cannot be read is written anew
    assert not places.unmounted("a")


def test_a_stranger_whose_text_is_none_is_refused_by_the_authority() -> None:
    with pytest.raises(Broken) as caught:
        Registering().feed(b"\x08\x00\x00\x00" + b"\x95\x02\x01\xa3\xff\xfe\xfdx")
    assert caught.value.why == "malformed"
    assert forms.FIRST >= 1


def _caught(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            yield node.lineno, ast.unparse(node.type)


def test_who_expects_octets_that_cannot_be_decoded_expects_them_to_be_no_text() -> None:
    for path in sorted(Path("src/powermail").rglob("*.py")):
        for line, kinds in _caught(ast.parse(path.read_text())):
            right = "msgspec.DecodeError" not in kinds or "UnicodeDecodeError" in kinds or "ValueError" in kinds
            assert right or str(path.relative_to("src/powermail")) in TEXTS, f"{path}:{line}"
