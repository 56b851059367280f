"""The schemes: one file each, and this registry.

To add one, write its file and add its class to the list below (or call :func:`register` with it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lexibit.errors import LexibitError, unknown
from lexibit.schemes.base import Scheme
from lexibit.schemes.kmeans import KMeans
from lexibit.schemes.linear import Linear
from lexibit.schemes.lq import LQ

__all__ = ["Scheme", "names", "register", "scheme"]

_SCHEMES: dict[str, type[Scheme]] = {}


def register(cls: type[Scheme]) -> type[Scheme]:
    """Make a scheme known by its name; usable as a decorator.

    Raises:
        LexibitError: another class has taken the name.
    """
    if _SCHEMES.setdefault(cls.name, cls) is not cls:
        raise LexibitError(f"the scheme name {cls.name!r} is taken by {_SCHEMES[cls.name]}")
    return cls


def scheme(name: str, options: Mapping[str, Any] | None = None) -> Scheme:
    """The scheme of that name, with options.

    Raises:
        LexibitError: no such scheme or option.
    """
    if name not in _SCHEMES:
        raise unknown("scheme", name, _SCHEMES)
    return _SCHEMES[name].with_options(dict(options or {}))


def names() -> Iterator[str]:
    """The names of all schemes."""
    return iter(sorted(_SCHEMES))


for _scheme in (KMeans, Linear, LQ):
    register(_scheme)
