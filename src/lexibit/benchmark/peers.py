"""What other tools make of the same float weights: PyTorch, ONNX Runtime and OpenVINO.

Each in the form that its own documentation recommends for CPUs, by default settings; what needs data for
calibration is left out.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexibit.benchmark.contestant import Contestant, inputs, nbytes
from lexibit.errors import needs_extra
from lexibit.quiet import quiet

EXTRA = "peers"


class Peers:
    """All of them, made of one float model.

    Args:
        model: the float model.
        folder: a folder for their files.

    Raises:
        LexibitError: one of their packages is not installed.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        with needs_extra(EXTRA):
            import nncf
            import onnx as _onnx  # noqa: F401  (torch.onnx needs it)
            import openvino
            from onnxruntime import quantization
        self._model, self._folder = model, folder
        with quiet():
            self._names = _export(model, folder / "float32.onnx")
            quantization.quantize_dynamic(
                folder / "float32.onnx", folder / "int8.onnx", weight_type=quantization.QuantType.QInt8
            )
            core = openvino.Core()
            modes = {
                "int8": nncf.CompressWeightsMode.INT8_ASYM,
                "int4": nncf.CompressWeightsMode.INT4_SYM,
            }
            for name, mode in modes.items():
                read = core.read_model(folder / "float32.onnx")
                # a narrow matrix has no groups as long as by default
                fallback = nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
                )
                packed = nncf.compress_weights(read, mode=mode, advanced_parameters=fallback)
                openvino.save_model(packed, folder / f"{name}.xml", False)
        self._torch = _torch_peers(model)

    def contestants(self, threads: int) -> list[Contestant]:
        """Each of them, computing with so many threads."""
        made = list(self._torch)
        made.append(self._onnx_runtime("ONNX Runtime, int8", "int8.onnx", threads))
        for bits in ("int8", "int4"):
            made.append(self._openvino(f"OpenVINO, {bits} weights", f"{bits}.xml", threads))
        return made

    def _inputs(self, ids: Tensor) -> dict[str, Any]:
        return {name: part.numpy() for name, part in inputs(self._model, ids).items() if name in self._names}

    def _onnx_runtime(self, name: str, file: str, threads: int) -> Contestant:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # a thread that spins would take a core from the next contestant
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self._folder / file
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(ids: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, self._inputs(ids))[0])

        return Contestant(name, path.stat().st_size, run)

    def _openvino(self, name: str, file: str, threads: int) -> Contestant:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        path = self._folder / file
        compiled = openvino.Core().compile_model(path, "CPU", options)

        def run(ids: Tensor) -> Tensor:
            return torch.from_numpy(compiled(self._inputs(ids))[0])

        return Contestant(name, path.with_suffix(".bin").stat().st_size, run)


def _torch_peers(model: PreTrainedModel) -> list[Contestant]:
    packed = copy.deepcopy(model)
    packed.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    size = nbytes(packed)
    for parent in list(packed.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    with quiet():
        quantize: Any = torch.ao.quantization.quantize_dynamic
        whole = quantize(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    return [
        Contestant("torch, bf16, packed", size, Contestant.of("", packed).run),
        Contestant("torch, int8 dynamic", nbytes(model) - 3 * linear, Contestant.of("", whole).run),
    ]


class PackedLinear(nn.Module):
    """A linear layer whose weight stands in oneDNN's own order, and is not brought there at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


class _Exported(nn.Module):
    """A model that takes its inputs by place."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self._model, self._names = model, names

    def forward(self, *parts: Tensor) -> Tensor:
        """The first output."""
        output: Tensor = self._model(**dict(zip(self._names, parts, strict=True)))[0]
        return output


def _export(model: PreTrainedModel, file: Path) -> list[str]:
    """Write a model as ONNX; returns the names of its inputs."""
    example = inputs(model, torch.full((2, 8), 7))
    names = list(example)
    with torch.inference_mode():
        torch.onnx.export(
            _Exported(model, names).eval(),
            tuple(example.values()),
            file,
            input_names=names,
            output_names=["output"],
            dynamic_axes={name: {0: "texts", 1: "tokens"} for name in names},
            # the newer exporter's files are not read by all of the tools
            dynamo=False,
        )
    return names
