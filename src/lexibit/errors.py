"""What lexibit says when something is wrong: one message that names the thing, the fault and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LexibitError(ValueError):
    """Bad input to lexibit: an option, a tensor, a pattern or a folder."""


class FormatError(LexibitError):
    """A file that does not follow the stored form (docs/format.md)."""


def unknown(kind: str, name: object, known: Iterable[str]) -> LexibitError:
    """An error for a name that does not exist, with the nearest names that do."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return LexibitError(f"unknown {kind} {name!r}: {hint}known: {shown}")


def no_codes(where: object) -> LexibitError:
    """An error for a folder or file that is not quantized."""
    return LexibitError(f"{where}: holds no weights in codes: lexibit quantize makes a folder that does")


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports of packages that an extra of lexibit brings.

    Raises:
        LexibitError: one of them is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise LexibitError(
            f"the package {error.name or error} is not installed: pip install 'lexibit[{extra}]'"
        ) from error
