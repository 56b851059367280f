"""The operators by the C++ kernels, on a CPU that has the instructions, for what these support."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexibit.errors import unknown
from lexibit.groups import Groups, matrix_shape
from lexibit.levels import LevelForm
from lexibit.ops import reference
from lexibit.ops.reference import Stored, checked_rows
from lexibit.packing import MAX_BITS, MIN_BITS, packed_bytes

_kernels: Any
try:
    from lexibit import _kernels
except ImportError as _error:  # built without a compiler, or on another system
    _kernels, _MISSING = None, str(_error)

VARIABLE = "LEXIBIT_KERNELS"
"""The environment variable that chooses the kernels, by name; it is read once."""

REFERENCE = "reference"
DTYPES = (torch.float32,)
"""What the kernels compute with: levels and inputs of another dtype take the reference."""

# of a weight's parts
_DTYPES = ((torch.uint8,), DTYPES, (torch.int32,), (torch.uint8,), DTYPES, (torch.uint16,))
_FORMS = {form.value: number for number, form in enumerate(LevelForm)}
_ACTIVATIONS = {name: number for number, name in enumerate(reference.ACTIVATIONS)}
_INT8_LONGEST = 1 << 16  # columns whose sums of products fit 32 bits
_INT8_RUN = 64  # columns with the same levels, that the int8 kernels multiply in one go
# multiplications, or numbers, for which a second thread is not worth its start; in int8 they take less time
_SMALL = 1 << 15
_SMALL_INT8 = 1 << 21

_logger = logging.getLogger("lexibit")
_state = threading.local()


class Choice(NamedTuple):
    """Which kernels are used, and why."""

    name: str
    why: str


def available() -> list[str]:
    """The names of what can be chosen here, the best first; the reference is always there."""
    return [*([] if _kernels is None else _kernels.available()), REFERENCE]


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Use the kernels of this name in this thread.

    Raises:
        LexibitError: there are none here.
    """
    _check(name, "kernels")
    before = getattr(_state, "choice", None)
    _state.choice = Choice(name, "by lexibit.ops.kernels")
    try:
        yield
    finally:
        _state.choice = before


def chosen() -> Choice:
    """Which kernels are used: those of :func:`kernels`, of ``LEXIBIT_KERNELS``, or the best there are.

    Raises:
        LexibitError: the environment variable names some that are not here.
    """
    forced: Choice | None = getattr(_state, "choice", None)
    return forced or _chosen()


@cache
def _chosen() -> Choice:
    if wanted := os.environ.get(VARIABLE):
        _check(wanted, f"kernels in {VARIABLE}")
        return Choice(wanted, f"{VARIABLE}={wanted}")
    best = available()[0]
    if _kernels is None:
        why = f"the C++ kernels were not built ({_MISSING}); install again with a C++ compiler to have them"
        _logger.warning("%s: weights in codes are decoded by PyTorch, which is slower", why)
        return Choice(best, why)
    if best == REFERENCE:
        return Choice(best, "there are no kernels for this CPU")
    return Choice(best, "the best that this CPU has and the system permits")


def _check(name: str, kind: str) -> None:
    if name not in available():
        raise unknown(kind, name, available())


def parallel() -> bool:
    """Whether the kernels share PyTorch's threads; else they run in the thread that calls them."""
    return _kernels is not None and bool(_kernels.parallel())


def takes(weight: Stored, *inputs: Tensor | None) -> bool:
    """Whether the kernels compute with this weight and these inputs; else it is for the reference to do."""
    return chosen().name != REFERENCE and computes(weight.levels, weight.outliers, *inputs)


def computes(*numbers: Tensor | None) -> bool:
    """Whether these are of a dtype, and where, the kernels compute."""
    return all(one is None or (one.dtype in DTYPES and one.is_cpu) for one in numbers)


def takes_rounded(compute: str, weight: Stored, *inputs: Tensor | None) -> bool:
    """Whether the kernels compute with this weight and these inputs in int8 or bfloat16."""
    if not (takes(weight, *inputs) and supports(compute)):
        return False
    columns = matrix_shape(tuple(weight.shape))[1]
    return not why_not_rounded(columns, weight.block[1], tuple(weight.extra), weight.mask is not None)


def supports(what: str, name: str | None = None) -> bool:
    """Whether some kernels compute products so, or whole layers.

    Args:
        what: ``float32``, ``bfloat16`` or ``int8``; or ``encoder``.
        name: of the kernels; those that are chosen if not given.
    """
    return _supported(name or chosen().name).get(what, False)


@cache
def _supported(name: str) -> dict[str, bool]:
    return {} if name == REFERENCE else dict(_kernels.supports(name))


@lru_cache(maxsize=4096)
def why_not_rounded(columns: int, run: int, extra: tuple[int, ...], masked: bool) -> str:
    """Why no kernel rounds a weight of so many columns and columns a group to compute with; or nothing."""
    if any(extra):
        return "it has extra rows or columns"
    if masked:
        return "a mask says which of its weights are zero"
    if run < columns and run % _INT8_RUN:
        return f"its groups are runs of {run} columns, no multiple of {_INT8_RUN}"
    if _INT8_LONGEST < run < columns and run % _INT8_LONGEST:
        return f"its groups are runs of {run} columns, more than {_INT8_LONGEST} and no multiple of that"
    return ""


def decode(weight: Stored) -> Tensor:
    """As :func:`lexibit.ops.reference.decode`, to the last bit."""
    out = weight.levels.new_empty(weight.shape)
    if not out.numel():
        return out  # the kernel would go through its rows, of which a file can claim any number
    name, arguments, _parts = _weight(weight)
    _kernels.decode(name, _threads(out.numel()), arguments, out.data_ptr())
    return reference.add_outliers(out, weight)


def embedding(ids: Tensor, weight: Stored) -> Tensor:
    """As :func:`lexibit.ops.reference.embedding`, to the last bit."""
    rows, columns = matrix_shape(tuple(weight.shape))
    wanted = checked_rows(ids, rows).clone()  # what was checked, whoever writes to ids meanwhile
    out = weight.levels.new_empty(*ids.shape, columns)
    name, arguments, _parts = _weight(weight)
    threads = _threads(out.numel())
    _kernels.embedding(name, threads, arguments, wanted.data_ptr(), wanted.numel(), out.data_ptr())
    reference.add_outliers_of_rows(out.view(wanted.numel(), columns), wanted, weight)
    return out


def assign(
    target: Tensor,
    ladders: tuple[Tensor, Tensor, Tensor],
    groups: tuple[Tensor, Tensor],
    coupling: Tensor,
    values: Tensor | None,
    codes: Tensor,
    change: Tensor,
) -> None:
    """As :func:`lexibit.ops.assign.assign`, into ``codes`` and ``change``; all are contiguous."""
    rows, columns = target.shape
    _kernels.assign(
        _threads(rows * columns * columns),
        *(part.data_ptr() for part in ladders),
        ladders[0].shape[1],
        *(part.data_ptr() for part in groups),
        rows,
        columns,
        coupling.data_ptr(),
        0 if values is None else values.data_ptr(),
        target.data_ptr(),
        codes.data_ptr(),
        change.data_ptr(),
    )


def linear(x: Tensor, weight: Stored, bias: Tensor | None, transposed: bool) -> Tensor:
    """As :func:`lexibit.ops.reference.linear` with the weight decoded, but for the order of additions."""
    return Product(weight, "float32", transposed)(x, bias)


def linear_rounded(x: Tensor, weight: Stored, bias: Tensor | None, activation: str, compute: str) -> Tensor:
    """As :func:`lexibit.ops.reference.linear_rounded`, but for the order of additions."""
    return Product(weight, compute)(x, bias, activation)


class Product:
    """What a weight, which the kernels take, is multiplied by: one call, or many.

    Holds the addresses of the weight's tensors. To look through these takes as long as a small product: who
    keeps a product asks :meth:`holds` before each use.

    Args:
        weight: what the kernels compute with (see :func:`takes` and :func:`takes_rounded`).
        compute: of :data:`lexibit.ops.COMPUTE`.
        transposed: whether it is ``x @ W`` and not ``x @ W.T``; in float32.
    """

    def __init__(self, weight: Stored, compute: str, transposed: bool = False) -> None:
        self.compute, self.transposed = compute, transposed
        self._choice = chosen()
        self._weight = weight
        self._places = [_place(part) for part in weight.parts]
        self._name, self._arguments, self._parts = _weight(weight)
        self._shape = rows, columns = matrix_shape(tuple(weight.shape))
        self._inside, self._outside = (rows, columns) if transposed else (columns, rows)
        self._small = _SMALL if compute == "float32" else _SMALL_INT8

    def holds(self, parts: Iterable[Tensor | None]) -> bool:
        """Whether it is still right: for these parts of a weight, which is otherwise the same."""
        for own, place, part in zip(self._weight.parts, self._places, parts, strict=True):
            if part is not own or _place(part) != place:
                return False
            if part is not None and not part.is_contiguous():
                return False  # a copy of it was taken
        return chosen() == self._choice

    def __call__(self, x: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
        """``activation(x @ W.T + bias)``: ``x`` and the bias are float32 on a CPU."""
        shape = x.shape
        if shape[-1:] != (self._inside,) or (bias is not None and bias.shape != (self._outside,)):
            # what torch broadcasts, or refuses in its own words
            return self._by_reference(x, bias, activation)
        size = self._inside * self._outside
        if not size:
            return self._by_reference(x, bias, activation)
        x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
        tokens = x.numel() // self._inside
        out = x.new_empty(*shape[:-1], self._outside)
        threads = _threads(tokens * size, self._small)
        pointers = x.data_ptr(), tokens, 0 if bias is None else bias.data_ptr()
        if self.compute == "float32":
            at_once = "none"
            _kernels.linear(self._name, threads, self._arguments, *pointers, out.data_ptr(), self.transposed)
        else:
            at_once = activation if self._weight.outliers is None else "none"
            rounded = _ACTIVATIONS[at_once]
            _kernels.linear_rounded(
                self._name, self.compute, threads, self._arguments, *pointers, rounded, out.data_ptr()
            )
        if self._weight.outliers is not None:
            self._add_outliers(x, tokens, out)
        return out if at_once == activation else reference.ACTIVATIONS[activation](out)

    def _add_outliers(self, x: Tensor, tokens: int, out: Tensor) -> None:
        *_, values, gaps = self._parts
        assert values is not None
        assert gaps is not None
        _kernels.add_outliers(
            _threads(tokens * values.numel()),
            values.data_ptr(),
            gaps.data_ptr(),
            values.numel(),
            *self._shape,
            x.data_ptr(),
            tokens,
            out.data_ptr(),
            self.transposed,
        )

    def _by_reference(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        if self.compute == "float32":
            found = reference.linear(x, decode(self._weight), bias, self.transposed)
            return reference.ACTIVATIONS[activation](found)
        return reference.linear_rounded(x, self._weight, bias, activation, self.compute)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing is kept of it in copies and pickles: there other tensors stand elsewhere."""
        return type(None), ()


def unchanged(dicts: tuple[dict[str, Any], ...], names: tuple[str, ...], values: tuple[Any, ...]) -> bool:
    """Whether each dict still has this very value under its name; None stands for none too."""
    return bool(_kernels.unchanged(dicts, names, values))


class Embeddings:
    """The rows of some embeddings, added up one after the other, and LayerNorm of that.

    Holds the addresses of its tensors, which must be contiguous and stay where they are.

    Args:
        weights: two or three, as wide as each other, without outliers.
        norm: LayerNorm's weight, bias and epsilon.
    """

    def __init__(self, weights: Sequence[Stored], norm: tuple[Tensor, Tensor, float]) -> None:
        self._kept = weights, norm
        self._columns = matrix_shape(tuple(weights[0].shape))[1]
        self._arguments = [_weight(weight)[1] for weight in weights]
        self._norm = norm[0].data_ptr(), norm[1].data_ptr(), norm[2]

    def __call__(self, ids: Sequence[Tensor]) -> Tensor:
        """``[*shape, columns]``, float32.

        Args:
            ids: which rows of each, int64 of the same shape, contiguous.

        Raises:
            IndexError: some are not there.
        """
        out = torch.empty((*ids[0].shape, self._columns), dtype=torch.float32)
        tokens = ids[0].numel()
        _kernels.embed(
            chosen().name,
            _threads(out.numel()),
            tuple((weight, of.data_ptr()) for weight, of in zip(self._arguments, ids, strict=True)),
            tokens,
            self._norm,
            out.data_ptr(),
        )
        return out


class EncoderLayer:
    """A layer of an encoder that norms after it adds, its products as :func:`linear_rounded` in int8.

    Holds the addresses of its tensors, which must be contiguous and stay where they are.

    Args:
        linears: weights and biases of query, key, value, output, and the feed-forward part's two.
        norms: weights, biases and epsilons of the LayerNorms behind the attention and at the end.
        heads: how many, each 16, 32, 48 or 64 wide.
        scaling: what scores are multiplied with.
        activation: between the feed-forward part's two.
    """

    def __init__(
        self,
        linears: Sequence[tuple[Stored, Tensor | None]],
        norms: Sequence[tuple[Tensor, Tensor, float]],
        heads: int,
        scaling: float,
        activation: str,
    ) -> None:
        self._kept = linears, norms
        self.arguments = (
            tuple(
                (
                    _weight(weight)[1],
                    _address(bias),
                    _address(weight.outliers),
                    _address(weight.gaps),
                    0 if weight.gaps is None else weight.gaps.numel(),
                )
                for weight, bias in linears
            ),
            tuple((_address(weight), _address(bias), epsilon) for weight, bias, epsilon in norms),
            heads,
            scaling,
            _ACTIVATIONS[activation],
        )
        self.work = prod(matrix_shape(tuple(linears[-1][0].shape)))


def encode(layers: Sequence[EncoderLayer], x: Tensor, mask: Tensor | None) -> Tensor:
    """What layers give, one behind the other: like ``x``.

    Args:
        layers: of the same width.
        x: ``[texts, tokens, columns]``.
        mask: what is added to the scores, ``[texts, 1 or tokens, tokens]``; or None.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    texts, tokens, _ = x.shape
    _kernels.encoder(
        chosen().name,
        _threads(texts * tokens * layers[0].work, _SMALL_INT8),
        tuple(layer.arguments for layer in layers),
        x.data_ptr(),
        texts,
        tokens,
        _address(mask),
        1 if mask is None else mask.shape[1],
        out.data_ptr(),
    )
    return out


def _place(tensor: Tensor | None) -> tuple[int, int, torch.dtype] | None:
    """Where a tensor is, as far as its contents may be read there."""
    return None if tensor is None else (tensor.data_ptr(), tensor.numel(), tensor.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(work: int, small: int = _SMALL) -> int:
    """One, or as many as torch uses: for every change of their number its pool ends and starts threads."""
    return 1 if work < small else torch.get_num_threads()


def _weight(weight: Stored) -> tuple[str, tuple[int, ...], list[Tensor | None]]:
    """What the kernels take a weight as: addresses, and the tensors to be kept while they are used."""
    masked = weight.mask is not None
    layout = _layout(
        tuple(weight.shape), weight.bits, tuple(weight.block), weight.form, tuple(weight.extra), masked
    )
    parts = [None if part is None else part.contiguous() for part in weight.parts]
    given = [0 if part is None else part.numel() for part in parts]
    # an operator may be called by hand: nothing is read behind the end
    for part, dtype in zip(parts, _DTYPES, strict=True):
        if part is not None and (not part.is_cpu or part.dtype not in dtype):
            raise TypeError(f"a part of a weight is {part.dtype} on {part.device}, not {dtype[0]} on a CPU")
    if given != [*layout.sizes, *2 * [given[-1]]]:
        raise ValueError(f"a weight's parts have {given} elements, its layout asks for {layout.sizes}")
    pointers = [0 if part is None else part.data_ptr() for part in parts]
    numbers = (pointers[0], given[0], pointers[1], *layout.numbers, pointers[2], *weight.extra, pointers[3])
    return chosen().name, numbers, parts


class _Layout(NamedTuple):
    sizes: list[int]
    numbers: tuple[int, ...]


@lru_cache(maxsize=4096)
def _layout(shape: Any, bits: int, block: Any, form: str, extra: Any, masked: bool) -> _Layout:
    """Elements of codes, levels, origins and mask, and what the kernels are told of the matrix."""
    rows, columns = matrix_shape(shape)
    if not MIN_BITS <= bits <= MAX_BITS or min(block) < 1 or min(extra) < 0 or all(extra):
        raise ValueError(f"no layout of a weight: {bits} bits, blocks of {block}, {extra} extra")
    groups = Groups(rows + extra[0], columns + extra[1], block)
    codes = packed_bytes(groups.rows * groups.columns, bits)
    levels = groups.count * LevelForm(form).width(bits)
    numbers = (_FORMS[form], bits, groups.rows, groups.columns, *block)
    return _Layout([codes, levels, sum(extra), packed_bytes(rows * columns, 1) if masked else 0], numbers)
