"""The fuzz targets with random inputs; `make fuzz` drives them by coverage for longer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.fuzz.targets import TARGETS

_tokens = some.sampled_from(
    [
        b"\r\n",
        b"\n",
        b"\r",
        b".",
        b"\0",
        b"\xff",
        b"@",
        b"<",
        b">",
        b'"',
        b" ",
        b"=",
        b"+",
        b"a",
        b"b.c",
        b"FROM:",
        b"TO:",
        b"SIZE=",
        b"250-",
        b"250 ",
    ]
)
_inputs = some.one_of(some.binary(max_size=300), some.lists(_tokens, max_size=40).map(b"".join))


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    @settings(max_examples=300, deadline=None)
    @given(_inputs)
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()
