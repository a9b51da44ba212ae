"""Owns what the machine says: CPU seconds of processes and their children, octets written to the disk."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()


def tree(roots: Iterable[int]) -> list[int]:
    """The processes and all that descend from them."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents.setdefault(int(_stat(int(name))[1]), []).append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = list(roots)
    for pid in found:
        found += parents.get(pid, [])
    return found


def cpu_s(roots: Iterable[int]) -> float:
    """CPU seconds of the processes, of all that descend from them, and of those among them that have ended."""
    ticks = 0
    for pid in tree(roots):
        try:
            ticks += sum(int(value) for value in _stat(pid)[11:15])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_octets(pid: int, peak: bool = False) -> int:
    """Memory of a process, now or at its highest."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(wanted):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def process_io(pid: int) -> dict[str, int]:
    """What a process has read and written: `rchar` and `wchar` by calls, `read_bytes` and `write_bytes` of the disk."""
    lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def interpreter() -> str:
    """Which Python this is: one built with profiles (PGO, LTO; a distribution's own is) needs a tenth less CPU."""
    return f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}, {sys.executable}"


def disk_writes(path: str) -> tuple[int, int]:
    """(writes, octets) that the disk under `path` has seen since the machine started; all processes together."""
    device = os.stat(path).st_dev
    for line in Path("/proc/diskstats").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if (int(fields[0]), int(fields[1])) == (os.major(device), os.minor(device)):
            return int(fields[7]), int(fields[9]) * 512
    return 0, 0
