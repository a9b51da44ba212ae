"""Plants each bug of this directory in a copy of the tree and runs the tests that should catch it: `make planted`.

A patch begins with what the bug is and `Caught by:`, the arguments for pytest. A bug that no test catches is a hole in them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
COPIED = ("src", "tests", "docs", "requirements", "pyproject.toml", "README.md", "CHANGES.md", "CONTRIBUTING.md")


class Planted(NamedTuple):
    """One patch."""

    path: Path
    what: str
    harness: list[str]


def planted() -> list[Planted]:
    """All patches, in order."""
    found = []
    for path in sorted(HERE.glob("*.patch")):
        what, caught_by = path.read_text(encoding="utf-8").splitlines()[:2]
        found.append(Planted(path, what, _words(caught_by.removeprefix("Caught by: "))))
    return found


def _words(text: str) -> list[str]:
    arguments, _, expression = text.partition(' -k "')
    return arguments.split() + (["-k", expression.rstrip('"')] if expression else [])


def tree(target: Path) -> None:
    """A copy of what the tests need."""
    for name in COPIED:
        source = Path(name)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def plant(bug: Planted, target: Path) -> None:
    """Applies the patch. Raises CalledProcessError when it does not fit any more."""
    subprocess.run(["git", "apply", "--whitespace=nowarn", str(bug.path.resolve())], cwd=target, check=True)


def caught(bug: Planted | None, harness: list[str]) -> tuple[bool, float]:
    """True if the tests of `harness` fail with the bug in the tree; and how long that took."""
    with tempfile.TemporaryDirectory(prefix="powermail-planted-") as name:
        target = Path(name)
        tree(target)
        if bug is not None:
            plant(bug, target)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", *harness],
            cwd=target,
            env={**os.environ, "PYTHONPATH": str(target / "src"), "PM_TEST_SEED_BLOCKS": "2"},
            capture_output=True,
            text=True,
            check=False,
        )
        failed = re.search(r"^(FAILED|ERROR) tests\S+::", done.stdout, re.MULTILINE) is not None
        if done.returncode and not failed:
            sys.exit(f"pytest did not run: {harness}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return failed, time.monotonic() - began


def main() -> int:
    """Tries all, or those whose names begin with an argument; 1 if one was not caught."""
    bugs = [bug for bug in planted() if not sys.argv[1:] or bug.path.name.startswith(tuple(sys.argv[1:]))]
    files = sorted({word for bug in bugs for word in bug.harness if word.startswith("tests/")})
    if caught(None, files)[0]:
        sys.exit("the tests fail without any bug: mend that first")
    missed = 0
    for number, bug in enumerate(bugs, 1):
        good, seconds = caught(bug, bug.harness)
        missed += not good
        print(
            f"{number}/{len(bugs)} {'caught' if good else 'MISSED'} in {seconds:5.1f} s  {bug.path.stem}: {bug.what}",
            flush=True,
        )
    print(f"{len(bugs) - missed} of {len(bugs)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
