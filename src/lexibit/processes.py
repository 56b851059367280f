"""Which process did something, and whether it is still there."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def me() -> str:
    """This process, as no other on any machine is called: machine, number, and when it began."""
    return f"{socket.gethostname()} {os.getpid()} {_born(os.getpid())}"


def here(name: str) -> bool:
    """Whether a process, by its :func:`me`, was of this machine."""
    return name.split()[0] == socket.gethostname()


def ended(name: str) -> bool:
    """Whether a process of this machine, by its :func:`me`, has ended."""
    _, number, born = name.split()
    return _born(int(number)) != born


def _born(number: int) -> str:
    """When a process of this machine began, in the machine's own count; ``-`` if there is none."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(number, 0)
    except PermissionError:
        return "?"
    except OSError:
        return "-"
    return "?"
