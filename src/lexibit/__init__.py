"""lexibit: pre-trained language models in one to eight bits."""

from lexibit import evaluation, hub, importance, models, tuning
from lexibit.benchmark import bench
from lexibit.calibration import Calibration, Effort
from lexibit.checkpoint import load, save
from lexibit.comparison import compare_schemes
from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import FormatError, LexibitError
from lexibit.fidelity import Reference
from lexibit.fitting import quantize_tensor
from lexibit.hf import LexibitHfQuantizer
from lexibit.onnx import Exported, export_onnx
from lexibit.optimize import optimize
from lexibit.plan import Plan
from lexibit.quantize import dequantize, quantize
from lexibit.sensitivity import sensitivity
from lexibit.weight import CodebookWeight

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CodebookWeight",
    "Effort",
    "Exported",
    "FormatError",
    "LexibitConfig",
    "LexibitError",
    "LexibitHfQuantizer",
    "Plan",
    "Recipe",
    "Reference",
    "bench",
    "compare_schemes",
    "dequantize",
    "evaluation",
    "export_onnx",
    "hub",
    "importance",
    "load",
    "models",
    "optimize",
    "quantize",
    "quantize_tensor",
    "save",
    "sensitivity",
    "tuning",
]
