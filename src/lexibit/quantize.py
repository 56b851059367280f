"""The verbs: quantize a model, and back."""

from __future__ import annotations

from math import prod

from torch import nn

from lexibit.calibration.kept import Weights
from lexibit.calibration.layerwise import Calibration, calibrate
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.fitting import Quantizing, install_everywhere
from lexibit.hf import attach, detach
from lexibit.importance import Tensors
from lexibit.nn import Quantized, restore_all
from lexibit.plan import Plan, check_importances, storages


def quantize(
    model: nn.Module,
    config: LexibitConfig | None = None,
    *,
    importances: Tensors | None = None,
    calibration: Calibration | None = None,
    progress: bool = True,
) -> Plan:
    """Quantize a model in place.

    Nothing is replaced before the codes of every weight exist: a failure or Ctrl-C leaves the model as
    it was. A transformers model can then be saved with ``save_pretrained`` and loaded with
    ``from_pretrained``.

    Args:
        model: any module; its parameters must not be on the meta device.
        config: how; k-means with 4 bits if not given.
        importances: how much the errors of a weight count, by any of its names (see
            :mod:`lexibit.importance`): of weights that it does not name, and of those whose scheme does not
            weigh errors, they count alike.
        calibration: text, as inputs of the model, whose layers' outputs are to change least (see
            :mod:`lexibit.calibration`); is told what became of each weight.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        The plan that was carried out.

    Raises:
        LexibitError: from the plan, for a weight that cannot be quantized, for importances that are wrong or
            that no weight has a use for, or for importances and calibration at once.
    """
    config = config or LexibitConfig()
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise LexibitError("the model is quantized already: load the float model to quantize anew")
    plan = Plan.of(model, config)
    if any(use.module.get_parameter(use.parameter).is_meta for w in plan.weights for use in w.uses):
        raise LexibitError("the model is on the meta device and has no weights: load them first")
    if not plan.weights:
        raise LexibitError(f"nothing to quantize in {type(model).__name__}: see its plan")
    if importances is not None:
        names = [use.name for _, uses in storages(model) for use in uses]
        check_importances(importances, names, plan.weights, "importances")
        if calibration is not None:
            raise LexibitError(
                "both importances and calibration say how the errors of a weight count: give one of the two"
            )
    if calibration is not None:
        done = calibrate(model, plan, config, calibration, progress=progress)
    else:
        done = _fitted(plan, config, importances, progress)
    for planned, weight in done:
        install_everywhere(planned, weight)
    attach(model, config)
    return plan


def _fitted(plan: Plan, config: LexibitConfig, importances: Tensors | None, progress: bool) -> Weights:
    """The weights of a plan in codes, each for itself."""
    quantizing = Quantizing(config, len(plan.weights), progress, importances)
    # the largest first, while the other threads have enough to do beside it
    for planned in sorted(plan.weights, key=lambda planned: -prod(planned.spec.shape)):
        use = planned.uses[0]
        quantizing.add(planned, use.module.get_parameter(use.parameter))
    return quantizing.results()


def dequantize(model: nn.Module) -> None:
    """Turn a quantized model into a plain float one, in place: every weight as its codes say.

    Weights that were shared stay shared.
    """
    restore_all(model)
    detach(model)
