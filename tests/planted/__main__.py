"""Plants each bug of this directory in a copy of the tree and runs what should catch it: `make planted`.

A patch begins with what the bug is, then `Caught by:` and either arguments for pytest, or `sim: SECONDS SEEDS [FAULT,FAULT…]`:
seeds of the simulator until one reports a problem; with `cluster` behind it, of the simulated cluster. A third line, `Model:
MODEL.CLAUSE`, says by removing which clause of the laws the exhaustive model shows the same mistake (`tests/model`). What
nothing catches is a hole in the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
COPIED = ("src", "tests", "docs", "requirements", "pyproject.toml", "README.md", "CHANGES.md", "CONTRIBUTING.md")
SIMULATOR = "sim:"
_SETTINGS = {"PYTHONHASHSEED": "0", "PM_TEST_SEED_BLOCKS": "2", "COLUMNS": "400"}  # a line has room for what failed and why


class Planted(NamedTuple):
    """One patch. `harness` is SIMULATOR and its arguments, or arguments for pytest."""

    path: Path
    what: str
    harness: list[str]
    clause: str  # of a model; "" if none shows it

    @property
    def simulated(self) -> bool:
        """True if the simulator should catch it."""
        return self.harness[0] == SIMULATOR


class Verdict(NamedTuple):
    """What a harness came to: "" if it found nothing, else what it found."""

    found: str
    seconds: float


def planted() -> list[Planted]:
    """All patches, in order."""
    found = []
    for path in sorted(HERE.glob("*.patch")):
        what, caught_by, model = path.read_text(encoding="utf-8").splitlines()[:3]
        harness = _words(caught_by.removeprefix("Caught by: "))
        found.append(Planted(path, what, harness, model.removeprefix("Model: ")))
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


def plant(bug: Planted, target: Path, *options: str) -> None:
    """Applies the patch; with `--check` it only tries. Raises CalledProcessError when it does not fit any more."""
    subprocess.run(["git", "apply", "--whitespace=nowarn", *options, str(bug.path.resolve())], cwd=target, check=True)


def run(bug: Planted | None, harness: Sequence[str]) -> Verdict:
    """Runs a harness with the bug in the tree."""
    with tempfile.TemporaryDirectory(prefix="powermail-planted-") as name:
        target = Path(name)
        tree(target)
        if bug is not None:
            plant(bug, target)
        began = time.monotonic()
        found = _simulated(target, harness[1:]) if harness[0] == SIMULATOR else _tested(target, harness)
        return Verdict(found, time.monotonic() - began)


def _python(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=target,
        env={**os.environ, **_SETTINGS, "PYTHONPATH": str(target / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


def _tested(target: Path, arguments: Sequence[str]) -> str:
    done = _python(target, "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *arguments)
    failed = re.search(r"^(?:FAILED|ERROR) (tests\S+::.+)", done.stdout, re.MULTILINE)
    if done.returncode and failed is None:
        sys.exit(f"pytest did not run: {arguments}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1] if failed is not None else ""


def _simulated(target: Path, arguments: Sequence[str]) -> str:
    done = _python(target, "tests.planted.seeds", *arguments)
    if done.returncode > 1 or (done.returncode and not done.stdout.startswith("seed ")):
        sys.exit(f"the simulator did not run: {arguments}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout.strip()


def control(bugs: Sequence[Planted]) -> None:
    """Without any bug nothing may be found; ends the program if something is."""
    seeds: dict[tuple[str, ...], int] = {}
    for _, seconds, count, *kinds in [bug.harness for bug in bugs if bug.simulated]:
        seeds[seconds, *kinds] = max(seeds.get((seconds, *kinds), 0), int(count))
    harnesses = [[SIMULATOR, seconds, str(count), *kinds] for (seconds, *kinds), count in sorted(seeds.items())]
    files = sorted({word for bug in bugs if not bug.simulated for word in bug.harness if word.startswith("tests/")})
    if files:
        harnesses.insert(0, files)
    for harness in harnesses:
        verdict = run(None, harness)
        print(f"without a bug: {verdict.found or 'nothing found'} in {verdict.seconds:.0f} s  {' '.join(harness)}", flush=True)
        if verdict.found:
            sys.exit("mend that first")


def main() -> int:
    """Tries all, or those whose names begin with an argument; 1 if one was not caught."""
    bugs = [bug for bug in planted() if not sys.argv[1:] or bug.path.name.startswith(tuple(sys.argv[1:]))]
    control(bugs)
    caught = {"simulator": 0, "tests": 0}
    by_laws = 0
    for number, bug in enumerate(bugs, 1):
        verdict = run(bug, bug.harness)
        by = "simulator" if bug.simulated else "tests"
        caught[by] += bool(verdict.found)
        by_laws += bool(bug.clause or (bug.simulated and verdict.found))
        print(
            f"{number}/{len(bugs)} {'caught' if verdict.found else 'MISSED'} in {verdict.seconds:5.1f} s"
            f"  {bug.path.stem}: {bug.what}\n"
            f"      by the {by}: {verdict.found or 'nothing'}{f'; model: {bug.clause}' if bug.clause else ''}",
            flush=True,
        )
    total = sum(caught.values())
    print(
        f"{total} of {len(bugs)} planted bugs caught: {caught['simulator']} by the simulator, {caught['tests']} by named tests;"
        f" the simulator or a clause of the model shows {by_laws}"
    )
    return 0 if total == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main())
