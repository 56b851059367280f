"""Folders and files: where models come from, where their quantized form goes, and what is in it."""

from lexibit.checkpoint.contents import Contents, beside_floats, compare, errors_against, inspect, read_texts
from lexibit.checkpoint.dequantized import dequantize_to
from lexibit.checkpoint.modules import load, save
from lexibit.checkpoint.source import (
    find,
    has_tokenizer,
    load_float,
    load_model,
    load_quantized,
    load_tensors,
    load_tokenizer,
    load_with_head,
    plan,
)
from lexibit.checkpoint.target import CALIBRATION, quantize_to
from lexibit.checkpoint.verification import Verified, verify

__all__ = [
    "CALIBRATION",
    "Contents",
    "Verified",
    "beside_floats",
    "compare",
    "dequantize_to",
    "errors_against",
    "find",
    "has_tokenizer",
    "inspect",
    "load",
    "load_float",
    "load_model",
    "load_quantized",
    "load_tensors",
    "load_tokenizer",
    "load_with_head",
    "plan",
    "quantize_to",
    "read_texts",
    "save",
    "verify",
]
