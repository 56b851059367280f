"""Codebooks as parameters: a quantized model is trained with its codes fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lexibit.errors import LexibitError
from lexibit.nn import codebooks

FACTOR = 10.0
"""How much faster levels learn than all else (Zhao et al. 2020, 4.2)."""


@contextmanager
def trained_levels(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The levels of a quantized model as parameters inside; as they will be stored, and fixed, afterwards.

    The paper says (Zhao et al. 2020, section 3.1): codes stay fixed; a forward pass rebuilds each weight from
    its codes and centroids; a centroid's gradient is the average, not the sum, of its members' gradients.

    We chose: a scale of a uniform grid or of binary codes has the average over its group; weights that a mask
    makes zero are nobody's members, and a split channel's parts are members each. Adam divides such constants
    out, but clipping by the norm of all gradients does not. Tied and shared weights are one weight in codes,
    and so have one set of levels and the sum of all uses' gradients.

    Args:
        model: quantized, by lexibit.

    Raises:
        LexibitError: it has no weight in codes.
    """
    weights = codebooks(model)
    if not weights:
        raise LexibitError(
            f"{type(model).__name__} has no weight in codes: quantize it before its levels are tuned"
        )
    quantizers: list[Any] = [
        part.hf_quantizer
        for part in model.modules()
        # a model may hold float ones as well
        if isinstance(part, PreTrainedModel) and hasattr(part, "hf_quantizer")
    ]
    with ExitStack() as undo:
        parameters = []
        for weight in weights.values():
            levels = weight.train_levels()
            undo.callback(weight.fix_levels)
            hook = levels.register_hook(_averaged(weight.members()))  # type: ignore[no-untyped-call]
            undo.callback(hook.remove)
            parameters.append(levels)
        for quantizer in quantizers:
            quantizer.tunes = True
            undo.callback(setattr, quantizer, "tunes", False)
        yield parameters


def _averaged(members: Tensor) -> Callable[[Tensor], Tensor]:
    # a level without members has no gradient to average
    share = members.clamp(min=1).reciprocal()
    return lambda gradient: gradient * share.to(gradient)


def parameter_groups(
    model: nn.Module, learning_rate: float, *, factor: float = FACTOR
) -> list[dict[str, Any]]:
    """Parameters for an optimizer: the levels learn ``factor`` times as fast as all else, and do not decay.

    Args:
        model: inside :func:`trained_levels`, or a float model, which has no levels.
        learning_rate: of all else.
        factor: ten in the paper.
    """
    levels = {id(weight.levels) for weight in codebooks(model).values()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in levels], "lr": learning_rate},
        {
            "params": [p for p in trained if id(p) in levels],
            "lr": learning_rate * factor,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
