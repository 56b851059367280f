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

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_if_quantized(name)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse to put a float parameter in front of the codes."""
        self._refuse_if_quantized(name)
        super().register_parameter(name, param)

    def _refuse_if_quantized(self, name: str) -> None:
        if name + CodebookWeight.SUFFIX in self.__dict__.get("_modules", {}):
            raise AttributeError(
                f"{name!r} is quantized and cannot be assigned: dequantize the model first "
                "(lexibit.dequantize)"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # the codes stand under this module's names, where their own module does not see them
        for child_name, child in self._modules.items():
            if isinstance(child, CodebookWeight):
                name = prefix + child_name.removesuffix(CodebookWeight.SUFFIX)
                missing, errors = child.load_tensors(name, state_dict)
                missing_keys.extend(missing)
                error_msgs.extend(errors)
                mine = child.spec.keys(name).values()
                unexpected_keys[:] = [key for key in unexpected_keys if key not in mine]
