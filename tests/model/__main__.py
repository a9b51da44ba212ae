"""Explores longer, or shows a way: `python -m tests.model NAME --limit N`; without a name, all of the campaign.

The names are those of `configurations`; `--list` prints them. One exploration holds all its states in memory: about a kilobyte
each.
"""

from __future__ import annotations

import argparse
import sys

from tests.model.configurations import BREAKS, CAMPAIGN, EVERYTHING
from tests.model.explorer import explore


def main() -> int:
    """The command; 1 if something else was found than should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description="Explores the laws of copies and numbers.")
    parser.add_argument("name", nargs="*", help="of a configuration, or the beginning of one")
    parser.add_argument("--limit", type=int, default=2_000_000, help="states of one exploration")
    parser.add_argument("--list", action="store_true", help="prints the names")
    chosen = parser.parse_args()
    names = [name for name in EVERYTHING if name.startswith(tuple(chosen.name))] if chosen.name else list(CAMPAIGN)
    if chosen.list:
        print("\n".join(EVERYTHING))
        return 0
    if not names:
        parser.error("no configuration is named so")
    good = True
    for name in names:
        configuration = EVERYTHING[name]
        found = explore(configuration.model, chosen.limit, configuration.passing)
        print(f"{name}: {found.story()}", flush=True)
        good = good and found.wrong == (configuration.wrong if name in BREAKS else "")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
