"""What every quantized module shares: its parameters are readable, and kept in codes only."""

from __future__ import annotations

from typing import Any

from torch import nn

from lexibit.weight import CodebookWeight


class Quantized(nn.Module):
    """A module some of whose parameters are in codes.

    The parameter ``p`` is kept as the child ``p_codebook``; reading ``module.p`` decodes it afresh, for
    code that looks at a module's weight from outside. As no float copy is kept, writing to what was
    read changes nothing.
    """

    def __getattr__(self, name: str) -> Any:
        # called only for names that are no plain attribute: a quantized parameter is none any more
        codebook = self.__dict__["_modules"].get(name + CodebookWeight.SUFFIX)
        if codebook is not None:
            return codebook.decode()
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse to put a float parameter in front of the codes."""
        if name + CodebookWeight.SUFFIX in self.__dict__.get("_modules", {}):
            raise AttributeError(
                f"{name!r} is quantized and cannot be assigned: dequantize the model first "
                "(lexibit.dequantize)"
            )
        super().register_parameter(name, param)
