"""lexibit: pre-trained language models in one to eight bits."""

from lexibit import importance
from lexibit.checkpoint import load, save
from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import FormatError, LexibitError
from lexibit.fitting import quantize_tensor
from lexibit.hf import LexibitHfQuantizer
from lexibit.plan import Plan
from lexibit.quantize import dequantize, quantize
from lexibit.weight import CodebookWeight

__version__ = "0.1.0"

__all__ = [
    "CodebookWeight",
    "FormatError",
    "LexibitConfig",
    "LexibitError",
    "LexibitHfQuantizer",
    "Plan",
    "Recipe",
    "dequantize",
    "importance",
    "load",
    "quantize",
    "quantize_tensor",
    "save",
]
