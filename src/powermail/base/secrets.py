"""Owns how secrets are kept out of what people read: settings that are printed, and sentences that are said.

Files with secrets (keys, passwords, `srs.keys`) are named and never read for anybody; what stands in a setting itself is hidden
here, by the name of the setting, and what gets into a sentence from elsewhere by its form.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from powermail.base.database_url import shown_url
from powermail.base.settings import Settings

HIDDEN = "***"
_WITH_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://)([^\s:@/?#]*):\S*@")
_PARAMETER = re.compile(r"([?&](?:[a-z_]*password|passwd|passphrase|secret|token)=)[^&\s\"'`]*", re.IGNORECASE)


def _command(text: str) -> str:
    """The program of a command: what it is given may be a secret."""
    program, space, _ = text.strip().partition(" ")
    return f"{program} {HIDDEN}" if space else program


SECRET = {  # settings that may hold one, each with what is shown instead
    "index.database": shown_url,
    "directory.database": shown_url,
    "outbound.smarthost_token_command": _command,
}


def shown(name: str, value: Any) -> Any:
    """The value of `section.key` as people may see it."""
    return SECRET[name](value) if name in SECRET and isinstance(value, str) and value else value


def shown_settings(settings: Settings) -> dict[str, Any]:
    """All settings as people may see them."""
    tree: dict[str, Any] = msgspec.to_builtins(settings)
    for name in SECRET:
        section, _, key = name.partition(".")
        tree[section][key] = shown(name, tree[section][key])
    return tree


def said(sentence: str) -> str:
    """A sentence without the passwords of addresses in it, wherever they came from."""
    return _PARAMETER.sub(rf"\1{HIDDEN}", _WITH_PASSWORD.sub(rf"\1\2:{HIDDEN}@", sentence))
