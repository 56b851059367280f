"""ONNX: a quantized model as a graph that looks its weights up, for ONNX Runtime and others.

The file holds the packed codes and the levels as they are stored. The operators of :mod:`lexibit.ops` become
standard ONNX operators that unpack the codes, and look them up (``Gather``) in the levels.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexibit import checkpoint
from lexibit.errors import LexibitError, needs_extra, unknown
from lexibit.files import sync
from lexibit.nn import codebooks
from lexibit.optimize import optimize
from lexibit.quantize import dequantize
from lexibit.quiet import quiet
from lexibit.weight import COMPUTED, CodebookWeight

WEIGHTS = ("codes", "float")
"""The forms that weights may have in a graph."""

# texts and tokens of what an exported graph is checked with; some tokens of the last text are padding
_CHECKED = ((1, 1), (1, 7), (3, 5), (2, 16))
# how much of the largest output another order of additions may change
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Exported:
    """A graph that was written.

    Attributes:
        nbytes: of the file, and of the weights beside it where it is too large for one.
        inputs: their names.
        outputs: their names.
        difference: the largest absolute difference of its outputs in ONNX Runtime to the model's, over
            several numbers of texts and tokens.
    """

    nbytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float


def export_onnx(model: PreTrainedModel | str | Path, out: str | Path, *, weights: str = "codes") -> Exported:
    """Write a quantized model as an ONNX graph, and check it in ONNX Runtime.

    Numbers of texts and tokens are free. There is no cache: a decoder reads its whole text each time. The
    graph computes in float32.

    Args:
        model: a quantized model, which is left as it is, or its folder or hub name.
        out: the new file; weights of more than 2 GB go to ``OUT.data`` beside it.
        weights: ``codes`` for packed codes and levels that the graph looks up, ``float`` for what they say.

    Raises:
        LexibitError: the model is not quantized, takes something else than tokens, or cannot be traced;
            ``out`` exists or cannot be written; ONNX Runtime cannot run the graph, or gives something
            else; or a package is missing.
    """
    out = Path(out)
    if weights not in WEIGHTS:
        raise unknown("weights", weights, WEIGHTS)
    for file in (out, out.with_name(f"{out.name}.data")):
        if file.exists():
            raise LexibitError(f"{file}: exists already: choose another file, or remove it first")
    with needs_extra("onnx"):
        import onnx as _onnx  # noqa: F401  (torch.onnx needs it)
        import onnxruntime as _onnxruntime  # noqa: F401
        import onnxscript as _onnxscript  # noqa: F401
    if not isinstance(model, PreTrainedModel):
        folder = checkpoint.find(model)
        if not folder.is_dir():
            raise LexibitError(f"{folder}: only a model can be exported: give its folder, with config.json")
        checkpoint.verify(folder)
        model = checkpoint.load_quantized(folder)
    elif not codebooks(model):
        raise LexibitError(f"{type(model).__name__} has no weights in codes: quantize it first")
    ours = copy.deepcopy(model)
    # there are few runtimes for bfloat16
    ours.eval().to(torch.float32)  # type: ignore[no-untyped-call]
    optimize(ours, "float32")
    exported = ours
    if weights == "float":
        dequantize(exported := copy.deepcopy(ours))
    program, outputs = _trace(exported)
    with _appearing(out) as staged:
        program.save(staged)
        nbytes = sum(file.stat().st_size for file in staged.parent.iterdir())
        difference = _check(staged, ours, outputs)
    return Exported(nbytes, tuple(_inputs(ours, 1, 1)), outputs, difference)


def _trace(model: PreTrainedModel) -> tuple[Any, tuple[str, ...]]:
    """The ONNX program of a model, and the names of its outputs."""
    from lexibit.onnx.operators import OPSET, translations

    example = _inputs(model, 2, 6)
    outputs = tuple(_outputs(model, example))
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    traced = _Traced(model, outputs)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                traced,
                kwargs={"given": example},
                dynamic_shapes={"given": free},
                input_names=list(example),
                output_names=list(outputs),
                custom_translation_table=translations(),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                # it would decode small weights
                optimize=False,
            )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise LexibitError(
            f"{type(model).__name__} cannot be exported: torch.onnx does not follow it ({reason[0]}): see "
            "which models torch.export supports"
        ) from error
    assert program is not None
    _store_levels(program, traced)
    _name_axes(program)
    # where in Python each node comes from: megabytes
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    return program, outputs


class _Traced(nn.Module):
    """A model that gives its outputs as a tuple, without a cache."""

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._outputs = model, outputs

    def forward(self, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs, in order."""
        found = _run(self.model, given)
        return tuple(found[name] for name in self._outputs)


def _run(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Mapping[str, Any]:
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    found: Mapping[str, Any] = model(**given, **cache, return_dict=True)
    return found


def _inputs(model: PreTrainedModel, texts: int, tokens: int) -> dict[str, Tensor]:
    """Some tokens, the second half of the last text padding, under the names that the model has for them.

    Raises:
        LexibitError: it takes something else.
    """
    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in taken:
        raise LexibitError(
            f"{type(model).__name__} takes {', '.join(taken)}, no input_ids: only models of text are exported"
        )
    generator = torch.Generator().manual_seed(0)
    words = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids = torch.randint(0, words, (texts, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, (tokens + 1) // 2 :] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 1) > 1:
        given["token_type_ids"] = torch.zeros_like(ids)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.cat([ids, ids[:, :1]], dim=1)
    return {name: value for name, value in given.items() if name in taken}


def _outputs(model: PreTrainedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a model gives, by name."""
    with torch.no_grad():
        found = _run(model, given)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _check(file: Path, model: PreTrainedModel, names: Sequence[str]) -> float:
    """The largest difference of a graph's outputs in ONNX Runtime to the model's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    gaps, sizes = [], []
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for texts, tokens in _CHECKED:
            given = _inputs(model, texts, tokens)
            theirs = session.run(list(names), {name: value.numpy() for name, value in given.items()})
            for mine, other in zip(_outputs(model, given).values(), theirs, strict=True):
                gaps.append((mine - torch.from_numpy(other)).abs().max())
                sizes.append(mine.abs().max())
    except Exception as error:  # onnxruntime's errors have no class of their own
        raise LexibitError(f"ONNX Runtime cannot run the exported graph: {error}") from error
    difference, size = (float(torch.stack(found).max()) for found in (gaps, sizes))
    if not difference <= _TOLERANCE * size:
        raise LexibitError(
            f"the exported graph's outputs in ONNX Runtime differ by {difference:.3g} from those of "
            f"{type(model).__name__}, which are up to {size:.3g}: nothing was written"
        )
    return difference


def _name_axes(program: Any) -> None:
    """Call the free axes of a graph's inputs what they are, not by the exporter's numbers."""
    import onnx_ir as ir

    for value in program.model.graph.inputs:
        decoder = value.name.startswith("decoder_")
        value.shape = ir.Shape(["batch", "decoder_sequence" if decoder else "sequence"])


def _store_levels(program: Any, traced: nn.Module) -> None:
    """Let a graph hold levels and outliers in the dtype in which they are stored; it converts them."""
    import onnx_ir as ir

    graph = program.model.graph
    for value in list(graph.initializers.values()):
        path, _, part = value.name.rpartition(".")
        if part not in COMPUTED or not isinstance(weight := traced.get_submodule(path), CodebookWeight):
            continue
        dtype = weight.spec.parts[part][0]
        if dtype == getattr(weight, part).dtype:
            continue
        kept = ir.tensor(getattr(weight, part).to(dtype), name=f"{value.name}.stored")
        stored = ir.Value(name=kept.name, shape=value.shape, type=ir.TensorType(kept.dtype), const_value=kept)
        cast = ir.node("Cast", [stored], {"to": value.dtype})
        cast.outputs[0].name = f"{value.name}.converted"
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers.pop(value.name)
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A path to write to; what was written there, and beside it, appears at ``out`` when all went well."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder) / out.name
            # the graph last: it is whole with its weights only
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == out.name):
                sync(file)
                os.replace(file, out.parent / file.name)
    except OSError as error:
        raise LexibitError(f"{out}: cannot be written ({error})") from error
