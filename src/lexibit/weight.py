"""The one stored form: packed codes that point into small tables of levels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from lexibit import ops
from lexibit.errors import LexibitError
from lexibit.groups import Groups, matrix_shape
from lexibit.levels import LevelForm
from lexibit.ops import native
from lexibit.ops.reference import Stored
from lexibit.packing import pack, pack_places, packed_bytes, unpack

# What may be stored of a weight: each part, and what its key has behind the weight's name.
PARTS = {
    "codes": "",
    "levels": "_levels",
    "origins": "_origins",
    "mask": "_mask",
    "outliers": "_outliers",
    "gaps": "_outlier_gaps",
}
COMPUTED = {"levels", "outliers"}
"""The parts that are in the dtype in which the weight is decoded, once they are loaded."""


@dataclass(frozen=True)
class WeightSpec:
    """What is recorded of a weight beside its tensors: all that decoding needs.

    Attributes:
        shape: the weight's own shape, two axes or more; the last are the columns.
        bits: width of a code, 1 to 8.
        block: rows and columns of a group (see :mod:`lexibit.groups`).
        form: how levels are stored (see :mod:`lexibit.levels`).
        levels_dtype: the dtype of the stored levels.
        dtype: the dtype of the weight before quantization.
        scheme: the name of the scheme that chose the levels; for people, decoding never asks.
        extra: how many rows and columns are stored behind the weight's own, each to be added to one of
            those, its origin; at least one of the two numbers is 0.
        mask: whether a bit a weight says which weights are exactly zero.
        outliers: to how many weights a number in float16 is added, each its own.
    """

    shape: tuple[int, ...]
    bits: int
    block: tuple[int, int]
    form: LevelForm
    levels_dtype: str
    dtype: str
    scheme: str
    extra: tuple[int, int] = (0, 0)
    mask: bool = False
    outliers: int = 0

    @property
    def groups(self) -> Groups:
        """The groups of the stored matrix: the weight seen as a matrix, and its extra rows or columns."""
        rows, columns = matrix_shape(self.shape)
        return Groups(rows + self.extra[0], columns + self.extra[1], self.block)

    @property
    def codes_shape(self) -> tuple[int]:
        """Shape of the packed codes (uint8)."""
        return (packed_bytes(self.groups.rows * self.groups.columns, self.bits),)

    @property
    def levels_shape(self) -> tuple[int, int]:
        """Shape of the levels."""
        return self.groups.count, self.form.width(self.bits)

    @property
    def levels_bytes(self) -> int:
        """Bytes of a stored level."""
        itemsize: int = getattr(torch, self.levels_dtype).itemsize
        return itemsize

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every part that is stored, in the order of :data:`PARTS`."""
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, self.codes_shape),
            "levels": (getattr(torch, self.levels_dtype), self.levels_shape),
        }
        if any(self.extra):
            parts["origins"] = (torch.int32, (sum(self.extra),))
        if self.mask:
            parts["mask"] = (torch.uint8, (packed_bytes(prod(self.shape), 1),))
        if self.outliers:
            parts["outliers"] = (torch.float16, (self.outliers,))
            parts["gaps"] = (torch.uint16, (self.outliers,))
        return parts

    def keys(self, name: str) -> dict[str, str]:
        """The key of every stored part of the weight of that name."""
        return {part: name + PARTS[part] for part in self.parts}

    @property
    def nbytes(self) -> int:
        """Bytes stored: all parts."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by weights; 0 for an empty weight."""
        return bits_per_weight([self])

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self) | {"form": self.form.value}


def bits_per_weight(specs: Iterable[WeightSpec]) -> float:
    """Stored bits of some weights, all parts, divided by their number; 0 if there are none."""
    specs = list(specs)
    return 8 * sum(spec.nbytes for spec in specs) / max(sum(prod(spec.shape) for spec in specs), 1)


class CodebookWeight(nn.Module):
    """A weight as packed codes and levels; modules that are tied share one instance.

    It is a module so that ``.to()``, ``deepcopy`` and ``state_dict`` treat its parts like any other
    state. In a state dict the codes keep the weight's own key and the other parts stand beside it: the
    child ``weight_codebook`` of a module ``m`` saves ``m.weight``, ``m.weight_levels``, ...

    Attributes:
        codes: packed codes, uint8 ``spec.codes_shape``.
        levels: ``spec.levels_shape``, in the dtype in which the weight is decoded.
        origins: for each extra row or column, the one it is added to: int32; None without any.
        mask: packed bits, 1 for a weight that is zero: uint8; None without one.
        outliers: what is added to a few weights, in the dtype of the levels; None without any.
        gaps: how many weights lie in front of each of these, behind the one before it: uint16.
        compute: what products are computed with, of :data:`lexibit.ops.COMPUTE`; it is not stored.
    """

    compute: str = "float32"
    SUFFIX = "_codebook"

    codes: Tensor
    levels: Tensor
    origins: Tensor | None
    mask: Tensor | None
    outliers: Tensor | None
    gaps: Tensor | None

    def __init__(
        self,
        spec: WeightSpec,
        codes: Tensor,
        levels: Tensor,
        origins: Tensor | None = None,
        mask: Tensor | None = None,
        outliers: Tensor | None = None,
        gaps: Tensor | None = None,
    ) -> None:
        """Hold the parts that ``spec.parts`` tells of.

        Levels and outliers may come in another dtype than the stored one: they are computed with as they are.
        """
        super().__init__()
        self.spec = spec
        # in the types that operators take, made once: a small product takes less time than making them
        self._layout = (list(spec.shape), spec.bits, list(spec.block), spec.form.value, list(spec.extra))
        # whether the float weight was trained: codes have no gradient, but a dequantized model has again
        self.requires_grad = False
        given = dict(zip(PARTS, (codes, levels, origins, mask, outliers, gaps), strict=True))
        for part, tensor in given.items():
            dtype, shape = spec.parts.get(part, (None, None))
            if (tensor is None) != (shape is None):
                fault = "are missing" if tensor is None else "have no place"
                raise LexibitError(f"{part} {fault} in {spec}")
            if tensor is not None and (
                tensor.shape != shape or (part not in COMPUTED and tensor.dtype != dtype)
            ):
                raise LexibitError(
                    f"{part} are {tensor.dtype} {list(tensor.shape)}, must be {dtype} {list(shape or ())}"
                )
            self.register_buffer(part, tensor)

    @classmethod
    def from_codes(
        cls,
        spec: WeightSpec,
        codes: Tensor,
        levels: Tensor,
        origins: Tensor | None = None,
        zero: Tensor | None = None,
        outliers: tuple[Tensor, Tensor] | None = None,
    ) -> CodebookWeight:
        """Pack plain ``codes`` (uint8, the stored matrix) and ``zero`` (bool, where the weight is zero).

        ``outliers`` are the places (int64, ascending) of some weights and what is added to them.
        """
        mask = None if zero is None else pack(zero.to(torch.uint8), 1)
        gaps = values = None
        if outliers is not None:
            gaps, values = pack_places(outliers[0]), outliers[1].to(levels.dtype)
        return cls(spec, pack(codes, spec.bits), levels, origins, mask, values, gaps)

    @property
    def shape(self) -> torch.Size:
        """The weight's own shape."""
        return torch.Size(self.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weight is decoded: the dtype of the levels in memory."""
        return self.levels.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in a file."""
        return self.spec.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by weights."""
        return self.spec.bits_per_weight

    def unpacked_codes(self) -> Tensor:
        """The codes, one a byte: uint8 of the weight's shape, or of the stored matrix if that is larger."""
        groups = self.spec.groups
        codes = unpack(self.codes, self.spec.bits, groups.rows * groups.columns)
        return codes.view(groups.rows, groups.columns) if any(self.spec.extra) else codes.view(self.shape)

    def train_levels(self) -> nn.Parameter:
        """Make the levels a parameter, in place: they get gradients, the codes stay as they are."""
        if not isinstance(self.levels, nn.Parameter):
            levels = self._buffers.pop("levels")
            assert levels is not None
            self.register_parameter("levels", nn.Parameter(levels))
        return cast(nn.Parameter, self.levels)

    def fix_levels(self) -> None:
        """Undo :meth:`train_levels`: the levels are what will be stored of them, and no parameter."""
        if isinstance(self.levels, nn.Parameter):
            levels = self._parameters.pop("levels")
            assert levels is not None
            stored = getattr(torch, self.spec.levels_dtype)
            self.register_buffer("levels", levels.detach().to(stored).to(levels.dtype))

    def members(self) -> Tensor:
        """How many weights each stored number stands for: float64, like the levels, or ``[groups, 1]``.

        In a table a level stands for the weights that have its code; a scale stands for its whole group.
        """
        counts = ops.members(*self.stored())
        return counts if self.spec.form is LevelForm.TABLE else counts.sum(1, keepdim=True)

    def table(self) -> Tensor:
        """The levels of every group, expanded: ``[groups, 2**bits]``."""
        return self.spec.form.expand(self.levels, self.spec.bits)

    def decode(self) -> Tensor:
        """The weight itself, ``shape`` in ``dtype``: a new tensor at every call."""
        return ops.decode(*self.stored())

    def linear(
        self, x: Tensor, bias: Tensor | None = None, transposed: bool = False, activation: str = "none"
    ) -> Tensor:
        """``x @ W.T + bias``, or ``x @ W + bias`` if ``transposed`` (transformers' Conv1D).

        Args:
            x: ``[..., columns]``.
            bias: ``[rows]``.
            transposed: whether the weight is ``[in, out]``.
            activation: what follows, a name of :data:`lexibit.ops.reference.ACTIVATIONS`.
        """
        if torch.is_autocast_enabled(x.device.type):
            # custom operators are no part of autocast's lists: do as it does for linear layers
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        product = self._product(x, bias, transposed)
        if product is not None:
            return product(x, bias, activation)
        if self.compute != "float32" and not transposed:
            bias = None if bias is None else bias.float()
            found = ops.linear_rounded(x.float(), bias, *self.stored(), activation, self.compute)
            return found.to(x.dtype)
        return ops.ACTIVATIONS[activation](ops.linear(x, bias, *self.stored(), transposed))

    def _product(self, x: Tensor, bias: Tensor | None, transposed: bool) -> native.Product | None:
        """What the kernels do of that, if they do it and nobody follows: kept for as long as it holds."""
        own: Any = self._buffers
        levels = own.get("levels")
        if levels is None or not ops.direct(x, bias, levels):
            return None
        compute = "float32" if transposed else self.compute
        product: native.Product | None = self.__dict__.get("_last_product")
        if (
            product is None
            or product.compute != compute
            or product.transposed != transposed
            or not product.holds([own[part] for part in PARTS])
        ):
            stored = self.stored()
            taken = native.takes(stored) if compute == "float32" else native.takes_rounded(compute, stored)
            product = self.__dict__["_last_product"] = (
                native.Product(stored, compute, transposed) if taken else None
            )
        return product if product is not None and native.computes(x, bias) else None

    def embedding(self, ids: Tensor) -> Tensor:
        """The rows ``ids`` (any shape) of the weight: ``[*ids.shape, columns]``."""
        return ops.embedding(ids, *self.stored())

    def stored(self) -> Stored:
        """What the operators take a weight as."""
        own: Any = self._buffers
        if "levels" not in own or "codes" not in own:  # trained, or in a replica whose tensors are attributes
            codes, levels, *others = (getattr(self, part) for part in PARTS)
            return Stored(codes, levels, *others, *self._layout)  # type: ignore[call-arg]
        # what __getattr__ would find, in a fraction of the time
        return Stored(
            own["codes"],
            own["levels"],
            own["origins"],
            own["mask"],
            own["outliers"],
            own["gaps"],
            *self._layout,
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors under the weight's name, in their stored dtypes."""
        parts = self.spec.parts
        return {key: getattr(self, part).to(parts[part][0]) for part, key in self.spec.keys(name).items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        name = prefix.removesuffix(".").removesuffix(self.SUFFIX)
        for part, key in self.spec.keys(name).items():
            tensor = getattr(self, part)
            destination[key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        # nothing: the module that uses the weight loads it, by load_tensors
        pass

    def load_tensors(self, name: str, state_dict: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Take all parts from a state dict, where they stand under ``name``.

        Returns:
            The keys that are missing, and what is wrong with those that are there.
        """
        missing, errors = [], []
        for part, key in self.spec.keys(name).items():
            own, given = getattr(self, part), state_dict.get(key)
            if given is None:
                missing.append(key)
            elif given.shape != own.shape or given.is_floating_point() != own.is_floating_point():
                errors.append(
                    f"{key}: {given.dtype} {list(given.shape)} given, this model stores "
                    f"{own.dtype} {list(own.shape)}: load it into a model quantized the same way"
                )
            else:
                with torch.no_grad():
                    own.copy_(given)
        return missing, errors

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        spec = self.spec
        return (
            f"{list(spec.shape)}, {spec.scheme}, {spec.bits} bits, blocks of "
            f"{spec.block[0]} x {spec.block[1]}, {spec.bits_per_weight:.3f} bits per weight"
        )
