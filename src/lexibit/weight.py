"""The one stored form: packed codes that point into small tables of levels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lexibit import ops
from lexibit.errors import LexibitError
from lexibit.groups import Groups, matrix_shape
from lexibit.levels import LevelForm
from lexibit.packing import pack, packed_bytes, unpack


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
    """

    shape: tuple[int, ...]
    bits: int
    block: tuple[int, int]
    form: LevelForm
    levels_dtype: str
    dtype: str
    scheme: str

    @property
    def groups(self) -> Groups:
        """The groups of the weight, seen as a matrix."""
        return Groups(*matrix_shape(self.shape), self.block)

    @property
    def codes_shape(self) -> tuple[int]:
        """Shape of the packed codes (uint8)."""
        return (packed_bytes(prod(self.shape), self.bits),)

    @property
    def levels_shape(self) -> tuple[int, int]:
        """Shape of the levels."""
        return self.groups.count, self.form.width(self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and levels."""
        itemsize: int = getattr(torch, self.levels_dtype).itemsize
        return self.codes_shape[0] + prod(self.levels_shape) * itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by weights; 0 for an empty weight."""
        return bits_per_weight([self])

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self) | {"form": self.form.value}


def bits_per_weight(specs: Iterable[WeightSpec]) -> float:
    """Stored bits of some weights, codes and levels, divided by their number; 0 if there are none."""
    specs = list(specs)
    return 8 * sum(spec.nbytes for spec in specs) / max(sum(prod(spec.shape) for spec in specs), 1)


class CodebookWeight(nn.Module):
    """A weight as packed codes and levels; modules that are tied share one instance.

    It is a module so that ``.to()``, ``deepcopy`` and ``state_dict`` treat codes and levels like
    any other state. In a state dict the codes keep the weight's own key and the levels stand beside
    it: the child ``weight_codebook`` of a module ``m`` saves ``m.weight`` and ``m.weight_levels``.
    """

    SUFFIX = "_codebook"
    LEVELS = "_levels"

    codes: Tensor
    levels: Tensor

    def __init__(self, spec: WeightSpec, codes: Tensor, levels: Tensor) -> None:
        """Hold packed ``codes`` (uint8 ``spec.codes_shape``) and ``levels`` (``spec.levels_shape``).

        The levels may come in another dtype than the stored one: they are computed with as they are.
        """
        super().__init__()
        if codes.shape != spec.codes_shape or codes.dtype != torch.uint8:
            raise LexibitError(
                f"codes are {codes.dtype} {list(codes.shape)}, must be uint8 {list(spec.codes_shape)}"
            )
        if levels.shape != spec.levels_shape:
            raise LexibitError(f"levels are {list(levels.shape)}, must be {list(spec.levels_shape)}")
        self.spec = spec
        # whether the float weight was trained: codes have no gradient, but a dequantized model has again
        self.requires_grad = False
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)

    @classmethod
    def from_codes(cls, spec: WeightSpec, codes: Tensor, levels: Tensor) -> CodebookWeight:
        """Pack plain ``codes`` (uint8, ``spec.shape``)."""
        return cls(spec, pack(codes, spec.bits), levels)

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
        """The codes, one a byte: uint8 of the weight's shape."""
        return unpack(self.codes, self.spec.bits, prod(self.spec.shape)).view(self.spec.shape)

    def table(self) -> Tensor:
        """The levels of every group, expanded: ``[groups, 2**bits]``."""
        return self.spec.form.expand(self.levels, self.spec.bits)

    def decode(self) -> Tensor:
        """The weight itself, ``shape`` in ``dtype``: a new tensor at every call."""
        return ops.decode(self.codes, self.levels, *self._layout())

    def linear(self, x: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
        """``x @ W.T + bias``, or ``x @ W + bias`` if ``transposed`` (transformers' Conv1D)."""
        if torch.is_autocast_enabled(x.device.type):
            # custom operators are no part of autocast's lists: do as it does for linear layers
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        return ops.linear(x, bias, self.codes, self.levels, *self._layout(), transposed)

    def embedding(self, ids: Tensor) -> Tensor:
        """The rows ``ids`` (any shape) of the weight: ``[*ids.shape, columns]``."""
        return ops.embedding(ids, self.codes, self.levels, *self._layout())

    def _layout(self) -> tuple[list[int], int, list[int], str]:
        spec = self.spec
        return list(spec.shape), spec.bits, list(spec.block), spec.form.value

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors under the weight's name, levels in their stored dtype."""
        stored = self.levels.to(getattr(torch, self.spec.levels_dtype))
        return {name: self.codes, name + self.LEVELS: stored}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        name = prefix.removesuffix(".").removesuffix(self.SUFFIX)
        for key, tensor in ((name, self.codes), (name + self.LEVELS, self.levels)):
            destination[key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        # nothing: the module that uses the weight loads it, by load_tensors
        pass

    def load_tensors(self, name: str, state_dict: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Take codes and levels from a state dict, where they stand under ``name``.

        Returns:
            The keys that are missing, and what is wrong with those that are there.
        """
        missing, errors = [], []
        for key, own in ((name, self.codes), (name + self.LEVELS, self.levels)):
            given = state_dict.get(key)
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
