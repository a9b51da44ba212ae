"""What is fuzzed of enrolment: both machines with octets as they come and framed, and what strangers show as certificates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from powermail.base.certificates import Authority, BadRequest, Untrusted, check_pinned, make_authority, pin_of
from powermail.wire import enrolment as forms

_CERTIFICATE, _KEY = make_authority("fuzz", 1.7e9)
_AUTHORITY = Authority(_CERTIFICATE, _KEY)
_PIN = pin_of(_CERTIFICATE)


def enrolment(data: bytes) -> None:
    """Both ends say the same for every chunking, and nothing but `Broken`."""
    size, framed = (data[0] % 40 + 1, data[1] % 3) if len(data) > 1 else (1, 0)
    rest = data[2:]
    if framed:
        rest = len(rest).to_bytes(4, "little") + rest
    if framed == 2:
        rest = forms.frame(forms.Greeting(1, 1, "fuzz", b"")) + rest
    edges = [*range(0, len(rest), size), len(rest)]
    pieces = [rest[a:b] for a, b in pairwise(edges)]
    for make in (forms.Registering, forms.Enrolling):
        whole, parts = _heard(make, [rest]), _heard(make, pieces)
        assert whole == parts or "broken" in (whole[-1], parts[-1]), (whole, parts)


def _heard(make: Callable[[], forms.Registering | forms.Enrolling], pieces: list[bytes]) -> list[object]:
    machine = make()
    found: list[object] = []
    try:
        for piece in pieces:
            if (form := machine.feed(piece)) is not None:
                found.append(form)
    except forms.Broken:
        found.append("broken")
    return found


def strangers(data: bytes) -> None:
    """What anybody may send as a request, a certificate or a token is refused in our words."""
    try:
        _AUTHORITY.issue(data, "x", ["powermail://fuzz/front/x"], 1.7e9)
    except BadRequest:
        pass
    for shown in ((_AUTHORITY.der, data), (data, data)):
        try:
            check_pinned(_PIN, shown[0], shown[1], 1.7e9)
        except Untrusted:
            pass
        else:
            raise AssertionError("a stranger is trusted")
    try:
        forms.parse_token(data.decode("latin-1"))
    except ValueError:
        pass
