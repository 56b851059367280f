"""The modules that run from codes. Each is its float module in all but where the weight comes from."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lexibit.nn.base import Quantized
from lexibit.weight import CodebookWeight


class QuantizedLinear(Quantized, nn.Linear):
    """``nn.Linear`` from codes."""

    weight_codebook: CodebookWeight
    _followed_by: str = "none"  # the activation that it does too, which lexibit.optimize chooses

    def forward(self, input: Tensor) -> Tensor:
        """``input @ W.T + bias``."""
        weight = cast(CodebookWeight, self._modules["weight_codebook"])  # sooner there than by __getattr__
        return weight.linear(input, self.bias, activation=self._followed_by)


class QuantizedConv1D(Quantized, Conv1D):
    """transformers' ``Conv1D`` (a linear layer whose weight is ``[in, out]``) from codes."""

    weight_codebook: CodebookWeight

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W + bias``."""
        return self.weight_codebook.linear(x, self.bias, transposed=True)


class QuantizedEmbedding(Quantized, nn.Embedding):
    """``nn.Embedding`` from codes: only the rows asked for are decoded."""

    weight_codebook: CodebookWeight

    def forward(self, input: Tensor) -> Tensor:
        """The rows ``input`` of the weight."""
        rows = self.weight_codebook.embedding(input)
        if self.padding_idx is not None and rows.requires_grad:
            # padding has no gradient, as in the float module
            rows = torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)
        return rows


class _QuantizedRecurrent(Quantized):
    """``nn.LSTM`` and ``nn.GRU`` read their weights as a list: make it afresh at every forward pass."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        # nn.RNNBase sets the list anew when it moves; there is nothing to keep
        pass

    def flatten_parameters(self) -> None:
        """Nothing to flatten: the weights are not kept as floats."""


class QuantizedLSTM(_QuantizedRecurrent, nn.LSTM):  # type: ignore[misc]
    """``nn.LSTM`` from codes."""


class QuantizedGRU(_QuantizedRecurrent, nn.GRU):  # type: ignore[misc]
    """``nn.GRU`` from codes."""
