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
_sentences = some.sampled_from(
    [
        b"EHLO x\r\n",
        b"LHLO x\r\n",
        b"MAIL FROM:<a@b.cc>\r\n",
        b"MAIL FROM:<a@b.cc> BODY=BINARYMIME\r\n",
        b"RCPT TO:<a@b.cc>\r\n",
        b"RCPT TO:<no@b.cc>\r\n",
        b"DATA\r\n",
        b"text\r\n",
        b".\r\n",
        b"BDAT 3\r\nabc",
        b"BDAT 4 LAST\r\na\nb\r",
        b"BDAT 0\r\n",
        b"BDAT 20\r\nMAIL FROM:<x@y.zz>\r\n",
        b"RSET\r\n",
        b"AUTH PLAIN\r\n",
        b"STARTTLS\r\n",
        b"\x16\x03",
        b"z" * 5000,
        b"From: a@b.cc\r\n",
        b"from : g: <c@d.ee>;\r\n",
        b"Sender:\r\n (",
        b"Bcc: x\r\n",
        b"\r\n",
        b"\n",
        b"\r",
    ]
)
_BEGUN = b"\3EHLO x\r\nMAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\n"
_inputs = some.one_of(
    some.binary(max_size=300),
    some.lists(_tokens, max_size=40).map(b"".join),
    some.lists(_sentences, max_size=12).map(b"".join),
    some.lists(_sentences, max_size=12).map(lambda found: _BEGUN + b"".join(found)),
)


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    @settings(max_examples=300, deadline=None)
    @given(_inputs)
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()
