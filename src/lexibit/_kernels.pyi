"""The C++ kernels (kernels/module.cpp): addresses and sizes in, results into memory that the caller made."""

from typing import Any

def available() -> list[str]: ...
def assume(name: str, /) -> None: ...
def supports(name: str, /) -> dict[str, bool]: ...
def parallel() -> bool: ...
def unchanged(
    dicts: tuple[dict[str, Any], ...], names: tuple[str, ...], values: tuple[object, ...], /
) -> bool: ...
def decode(name: str, threads: int, weight: tuple[int, ...], out: int, /) -> None: ...
def embedding(
    name: str, threads: int, weight: tuple[int, ...], ids: int, count: int, out: int, /
) -> None: ...
def linear(
    name: str,
    threads: int,
    weight: tuple[int, ...],
    x: int,
    tokens: int,
    bias: int,
    out: int,
    transposed: bool,
    /,
) -> None: ...
def linear_rounded(
    name: str,
    compute: str,
    threads: int,
    weight: tuple[int, ...],
    x: int,
    tokens: int,
    bias: int,
    activation: int,
    out: int,
    /,
) -> None: ...
def assign(
    threads: int,
    levels: int,
    limits: int,
    names: int,
    count: int,
    of_row: int,
    of_column: int,
    rows: int,
    columns: int,
    coupling: int,
    values: int,
    target: int,
    codes: int,
    change: int,
    /,
) -> None: ...
def embed(
    name: str,
    threads: int,
    embeddings: tuple[tuple[tuple[int, ...], int], ...],
    tokens: int,
    norm: tuple[int, int, float],
    out: int,
    /,
) -> None: ...
def encoder(
    name: str,
    threads: int,
    layers: tuple[tuple[Any, ...], ...],
    x: int,
    texts: int,
    length: int,
    mask: int,
    mask_rows: int,
    out: int,
    /,
) -> None: ...
