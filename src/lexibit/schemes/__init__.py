"""The schemes: one file each, and this registry.

To add one, write its file and add its class to the list below (or call :func:`register` with it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lexibit.errors import LexibitError, unknown
from lexibit.schemes.aciq import ACIQ
from lexibit.schemes.base import Choice, Scheme
from lexibit.schemes.binary import Binary
from lexibit.schemes.kl import KL
from lexibit.schemes.kmeans import KMeans
from lexibit.schemes.linear import Linear
from lexibit.schemes.lq import LQ
from lexibit.schemes.mse import MSE
from lexibit.schemes.ocs import OCS

__all__ = ["Choice", "Scheme", "does_not_weigh", "names", "register", "scheme"]

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
    if not isinstance(options, Mapping | None):
        raise LexibitError(
            f"options of scheme {name!r} must be by name, like {{'init': 'k-means++'}}, not {options!r}"
        )
    return _SCHEMES[name].with_options(dict(options or {}))


def does_not_weigh(name: str) -> LexibitError:
    """An error for an importance that a scheme has no use for."""
    weighing = ", ".join(other for other in names() if _SCHEMES[other]().weighs)
    return LexibitError(
        f"scheme {name!r} does not use importances: leave them out, or choose one that minimises a weighted "
        f"error ({weighing}; ocs does with clip=mse)"
    )


def names() -> Iterator[str]:
    """The names of all schemes."""
    return iter(sorted(_SCHEMES))


for _scheme in (KMeans, Linear, LQ, ACIQ, MSE, KL, OCS, Binary):
    register(_scheme)
