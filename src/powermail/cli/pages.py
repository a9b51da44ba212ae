"""Owns what is made from the table of commands: completion for shells, the manual page, the page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from powermail import __version__
from powermail.admin.table import Field
from powermail.base.errors import OperatorError
from powermail.cli.words import COMMON, GROUPS, Entry

_SHELLS = ("bash", "zsh", "fish")


def _flags(fields: Sequence[Field]) -> list[str]:
    found = [one.flag for one in fields if one.flag]
    if any(one.kind == "secret" for one in fields):
        found += ["--password", "--password-stdin"]
    return [*found, *(name for name, _, _ in COMMON), "--help"]


def _tree(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """What may follow what: the first words under "", actions under their group, options under the whole command."""
    tree: dict[str, list[str]] = {"": []}
    for entry in entries:
        group, _, name = entry.command.rpartition(" ")
        if group and group not in tree:
            tree[group] = []
            tree[""].append(group)
        tree[group].append(name)
        tree[entry.command] = _flags(entry.fields)
    return tree


def completion(shell: str, entries: Sequence[Entry]) -> str:
    """A script for a shell. Raises OperatorError for one that is not known."""
    if shell not in _SHELLS:
        raise OperatorError(f"{shell!r} is none of {', '.join(_SHELLS)}")
    tree = _tree(entries)
    if shell == "fish":
        return _fish(entries)
    cases = "\n".join(f'        "{words}") choices="{" ".join(following)}" ;;' for words, following in tree.items())
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return (
        f"{head}# Completion of powermail; read it by: source <(powermail completion {shell})\n"
        "_powermail() {\n"
        '    local word words="" choices="" current="${COMP_WORDS[COMP_CWORD]}"\n'
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do\n'
        '        case "$words $word" in\n'
        f'            {" | ".join(_case(words) for words in tree if words)}) words="${{words:+$words }}$word" ;;\n'
        "        esac\n"
        "    done\n"
        '    case "$words" in\n'
        f"{cases}\n"
        "    esac\n"
        '    COMPREPLY=($(compgen -W "$choices" -- "$current"))\n'
        "}\n"
        "complete -o default -F _powermail powermail\n"
    )


def _case(words: str) -> str:
    """A first word stands behind nothing and a blank."""
    return f'" {words}"' if " " not in words else f'"{words}"'


def _fish(entries: Sequence[Entry]) -> str:
    lines = ["# Completion of powermail; read it by: powermail completion fish | source", "complete -c powermail -f"]
    groups: dict[str, None] = {}
    for entry in entries:
        group, _, name = entry.command.rpartition(" ")
        if group and group not in groups:
            groups[group] = None
            lines.append(f"complete -c powermail -n __fish_use_subcommand -a {group} -d '{GROUPS[group]}'")
        when = f"'__fish_seen_subcommand_from {group}'" if group else "__fish_use_subcommand"
        lines.append(f"complete -c powermail -n {when} -a {name} -d '{_quoted(entry.text)}'")
        seen = f"'__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c powermail -n {seen} -l {flag[2:]}" for flag in _flags(entry.fields) if flag != "--help"]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def usage(entry: Entry) -> str:
    """`powermail node block NODE...`: words, then options."""
    words = [f"powermail {entry.command}"]
    for one in entry.fields:
        name = one.name.removesuffix("_octets").upper()
        if one.kind == "secret":
            words.append("[--password-stdin]")
        elif one.boolean:
            words.append(f"[{one.flag}]")
        elif one.flag:
            value = "yes|no" if one.choice else {"size": "SIZE", "duration": "TIME"}.get(one.kind, name)
            words.append(f"[{one.flag} {value}]" + ("..." if one.many else ""))
        else:
            words.append({"words": f"{name}...", "maybe": f"[{name}...]"}.get(one.kind, name))
    return " ".join(words)


def _roff(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")


def manual(entries: Sequence[Entry]) -> str:
    """The manual page, in the macros of man(7)."""
    lines = [
        f'.TH POWERMAIL 1 "" "PowerMail {__version__}"',
        ".SH NAME",
        "powermail \\- redundant mail: receive, store, forward, read",
        ".SH SYNOPSIS",
        ".B powermail",
        "[\\-\\-data DIR] [\\-\\-set SECTION.KEY=VALUE] [\\-\\-json] COMMAND ...",
        ".SH OPTIONS",
        "They work before and behind the command.",
    ]
    for name, metavar, text in COMMON:
        lines += [".TP", f".B {_roff(f'{name} {metavar}'.strip())}", _roff(text)]
    lines += [".TP", ".B \\-\\-version", "print the version", ".SH COMMANDS"]
    for entry in entries:
        lines += [".TP", f".B {_roff(usage(entry))}", _roff(entry.text[:1].upper() + entry.text[1:] + ".")]
        lines += [
            f".br\n{_roff(f'{one.flag or one.name.upper()}: {one.text}')}" for one in entry.fields if one.kind != "secret"
        ]
    lines += [
        ".SH EXIT STATUS",
        "0: done, and all is well. 1: degraded, stopped, nothing of that name, or it cannot be done now. 2: misuse; the "
        "sentence on standard error says what to do.",
        ".SH FILES",
        "DIR/powermail.toml: the settings. DIR/control.sock: by which a running server is asked.",
    ]
    return "\n".join(lines) + "\n"


def reference(entries: Sequence[Entry]) -> str:
    """The page of commands of the documentation, in Markdown."""
    lines = [
        "# Commands",
        "",
        "Generated from the table of operations by `powermail man --markdown`; a test keeps it true. `--data DIR`,",
        "`--set SECTION.KEY=VALUE` and `--json` work before and behind each command. Exit status: 0 done and well; 1 degraded,",
        "stopped, nothing of that name, or not possible now; 2 misuse.",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    for entry in entries:
        lines.append(f"| `{usage(entry).replace('|', chr(92) + '|')}` | {entry.text} |")
    return "\n".join(lines) + "\n"
