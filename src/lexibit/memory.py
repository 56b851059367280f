"""How much memory there is."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from lexibit.errors import LexibitError

_UNITS = ["", "K", "M", "G", "T"]
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?")


def parse(text: str, option: str) -> int:
    """Bytes, from text like ``1.5GB`` or ``512MiB``.

    Raises:
        LexibitError: it is no size, or 0; names the option.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise LexibitError(f"{option} {text!r}: write a size like 1.5GB or 512MiB")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** _UNITS.index(unit or ""))
    if size == 0:
        raise LexibitError(f"{option} {text!r}: must be more than nothing")
    return size


def available() -> int:
    """Bytes that this process may still take: what is free, or less if its control group allows less."""
    free = [_free()]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(min(free), 0)


def _free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in names else 1 << 62


def reset_peak() -> None:
    """Have :func:`peak` count from now, where the system can (Linux); elsewhere it counts from the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak() -> int:
    """The most bytes that this process had in memory; 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
