"""Levels and codes for what the layers of a model are given: from text, without labels or training.

A scheme looks at the weights alone. Here the model runs on some text, and each weight is quantized so that
the *outputs* of its layer change least (:mod:`lexibit.refine`), one layer after the other, each on what the
quantized layers in front of it give.
"""

from lexibit.calibration.gathering import Gathered, gather, load_moments, save_moments
from lexibit.calibration.layerwise import Calibration, calibrate
from lexibit.calibration.report import Calibrated
from lexibit.calibration.texts import of_task, of_texts
from lexibit.refine import GPTQ, Effort

__all__ = [
    "GPTQ",
    "Calibrated",
    "Calibration",
    "Effort",
    "Gathered",
    "calibrate",
    "gather",
    "load_moments",
    "of_task",
    "of_texts",
    "save_moments",
]
