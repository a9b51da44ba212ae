"""Fuzzes by coverage: `make fuzz`, or `python -m tests.fuzz --seconds 600 addresses dots`.

Each target runs in a process of its own. A finding stays in `build/fuzz/TARGET-crash-…` and becomes a test.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

from tests.fuzz.targets import TARGETS

_RUN = """
import sys
import atheris
with atheris.instrument_imports(include=["powermail"]):
    from tests.fuzz.targets import TARGETS
atheris.Setup(sys.argv[1:], TARGETS[sys.argv[1]])
atheris.Fuzz()
"""


def fuzz(name: str, seconds: int) -> bool:
    """Runs one target; True if nothing was found."""
    os.makedirs("build/fuzz/corpus", exist_ok=True)
    corpus = f"build/fuzz/corpus/{name}"
    os.makedirs(corpus, exist_ok=True)
    bounds = [f"-max_total_time={seconds}", "-max_len=2048", "-timeout=5", "-rss_limit_mb=2048"]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, name, corpus, *bounds, f"-artifact_prefix=build/fuzz/{name}-", "-print_final_stats=1"],
        env={**os.environ, "PYTHONPATH": "src:."},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    print(
        f"{name:<18} {'nothing found' if not done.returncode else 'FOUND'} in {runs.group(1) if runs else '?'} runs", flush=True
    )
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-3000:])
    return not done.returncode


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("target", nargs="*", choices=[[], *TARGETS])
    chosen = parser.parse_args()
    good = [fuzz(name, chosen.seconds) for name in chosen.target or TARGETS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
