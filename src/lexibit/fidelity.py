"""How near a quantized model stays to the float model: its weights, and its outputs on given text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.batches import batches
from lexibit.errors import LexibitError
from lexibit.nn.modes import evaluating
from lexibit.weight import CodebookWeight


@dataclass(frozen=True)
class WeightError:
    """The error of one weight against the weight it was made from.

    Attributes:
        name: the weight.
        relative: ``|W - W^|^2 / |W|^2``, 0 for equal weights.
        largest: ``max |W - W^|``.
    """

    name: str
    relative: float
    largest: float


def weight_errors(packed: Mapping[str, CodebookWeight], original: Mapping[str, Tensor]) -> list[WeightError]:
    """The error of every weight in codes against the float weight of its name.

    Raises:
        LexibitError: the original has no such weight, or one of another shape.
    """
    for name in packed:
        if name not in original:
            raise LexibitError(f"the original model has no weight {name}: give the right one")
    return [weight_error(name, weight, original[name]) for name, weight in packed.items()]


def weight_error(name: str, weight: CodebookWeight, original: Tensor) -> WeightError:
    """The error of a weight in codes against the float weight.

    Raises:
        LexibitError: they differ in shape.
    """
    theirs = original.detach()
    if theirs.shape != weight.shape:
        raise LexibitError(
            f"{name} is {list(weight.shape)}, in the original model {list(theirs.shape)}: give the "
            "model that it was quantized from"
        )
    error = weight.decode().double() - theirs.double()
    total = theirs.double().square().sum().item()
    squared = error.square().sum().item()
    relative = squared / total if total else float(squared > 0)
    return WeightError(name, relative, error.abs().max().item() if error.numel() else 0.0)


@dataclass(frozen=True)
class OutputFidelity:
    """How two models' outputs agree on the same text.

    Attributes:
        output: what was compared: ``logits`` or ``last_hidden_state``.
        texts: how many texts.
        rows: how many output vectors: one a token, or one a text for classifiers.
        cosine: mean cosine between the vectors of the two models.
        worst_cosine: the smallest of them.
        relative: ``|A - B|^2 / |A|^2`` over all, A the original.
        agreement: share of vectors whose largest entry is the same; None for hidden states.
        seconds: seconds that each model took for all the text: (quantized, original).
    """

    output: str
    texts: int
    rows: int
    cosine: float
    worst_cosine: float
    relative: float
    agreement: float | None
    seconds: tuple[float, float]


def output_fidelity(
    quantized: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int = 128,
) -> OutputFidelity:
    """Run both models on the same batches, in turn, and compare what comes out.

    Args:
        quantized: the model under test.
        original: the float model.
        tokenizer: of both.
        texts: at least one; cut to ``max_length`` tokens.
        batch_size: texts at a time.
        max_length: tokens of a text at most.

    Raises:
        LexibitError: no text, or a model with no output to compare.
    """
    tally = _Tally()
    for batch in _inputs(original, tokenizer, texts, batch_size, max_length):
        tally.add(_run(quantized, batch), _run(original, batch))
    return tally.fidelity(len(texts))


class Reference:
    """A float model's outputs on given text, kept to hold those of quantized ones against.

    Takes the memory of all outputs in float32: for models with a large vocabulary, give few texts.

    Args:
        model: the float model, as it is now.
        tokenizer: its own.
        texts: at least one; cut to ``max_length`` tokens.
        batch_size: texts at a time.
        max_length: tokens of a text at most.

    Raises:
        LexibitError: no text, or a model with no output to compare.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        batch_size: int = 16,
        max_length: int = 128,
    ) -> None:
        self._texts = len(texts)
        inputs = _inputs(model, tokenizer, texts, batch_size, max_length)
        self._outputs = [(batch, _run(model, batch)) for batch in inputs]

    def fidelity(self, model: PreTrainedModel) -> OutputFidelity:
        """How a model's outputs agree with those kept."""
        tally = _Tally()
        for batch, output in self._outputs:
            tally.add(_run(model, batch), output)
        return tally.fidelity(self._texts)


@dataclass(frozen=True)
class _Output:
    """What a model gave for a batch: vectors ``[n, d]`` of one kind, and the seconds it took."""

    kind: str
    vectors: Tensor
    seconds: float


def _run(model: PreTrainedModel, batch: dict[str, Tensor]) -> _Output:
    start = time.perf_counter()
    with evaluating(model), torch.inference_mode():
        out = model(**batch)
    seconds = time.perf_counter() - start
    kind, vectors = _vectors(out, batch["attention_mask"].bool())
    return _Output(kind, vectors.float(), seconds)


class _Tally:
    """Adds up how two models' outputs agree, batch by batch."""

    def __init__(self) -> None:
        self.kind, self.rows, self.error, self.total = "", 0, 0.0, 0.0
        self.cosines: list[Tensor] = []
        self.agree: list[Tensor] = []
        self.seconds = [0.0, 0.0]

    def add(self, ours: _Output, theirs: _Output) -> None:
        """Take both models' outputs of the same batch."""
        if ours.vectors.shape != theirs.vectors.shape:
            raise LexibitError(
                f"the models' outputs differ in shape, {list(ours.vectors.shape[1:])} and "
                f"{list(theirs.vectors.shape[1:])}: give the model that the quantized one was made from"
            )
        self.kind = ours.kind
        for model, output in enumerate((ours, theirs)):
            self.seconds[model] += output.seconds
        self.agree.append(ours.vectors.argmax(-1) == theirs.vectors.argmax(-1))
        a, b = (output.vectors.nan_to_num(neginf=0.0) for output in (ours, theirs))
        self.cosines.append(F.cosine_similarity(a, b, dim=-1))
        self.error += (a - b).double().square().sum().item()
        self.total += b.double().square().sum().item()
        self.rows += len(a)

    def fidelity(self, texts: int) -> OutputFidelity:
        """The sum of it."""
        cosine = torch.cat(self.cosines)
        return OutputFidelity(
            output=self.kind,
            texts=texts,
            rows=self.rows,
            cosine=cosine.mean().item(),
            worst_cosine=cosine.min().item(),
            relative=self.error / self.total if self.total else float(self.error > 0),
            agreement=torch.cat(self.agree).float().mean().item() if self.kind == "logits" else None,
            seconds=(self.seconds[0], self.seconds[1]),
        )


def _inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    size: int,
    max_length: int,
) -> Iterator[dict[str, Tensor]]:
    if not texts:
        raise LexibitError("no text to compare on: the file is empty")
    for _, inputs in batches(model, tokenizer, texts, size=size, max_length=max_length):
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        yield inputs


def _vectors(outputs: object, mask: Tensor) -> tuple[str, Tensor]:
    """What a model gave, as vectors to compare ``[n, d]``, those of padding left out.

    One vector a token, or one a text for classifiers; for question answering, two a text (start and end of
    the answer) over its tokens, ``-inf`` at the padding.
    """
    start, end = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        both = torch.stack([start, end], 1).masked_fill(~mask[:, None], -torch.inf)
        return "logits", both.flatten(0, 1)
    for kind in ("logits", "last_hidden_state"):
        value = getattr(outputs, kind, None)
        if isinstance(value, Tensor):
            if value.dim() == 3 and value.shape[:2] == mask.shape:
                return kind, value[mask]
            return kind, value.reshape(-1, value.shape[-1])
    raise LexibitError(f"{type(outputs).__name__} holds no logits or hidden states to compare")


def neighbour_overlap(ours: Tensor, theirs: Tensor, count: int = 10) -> float:
    """How much of each row's nearest neighbours by cosine two sets of embeddings have in common.

    Args:
        ours: ``[n, d]``, row i embeds the same text as row i of ``theirs``.
        theirs: ``[n, d']``.
        count: how many neighbours of each row; itself does not count.

    Returns:
        The mean share of common neighbours, 0 to 1.
    """
    near = []
    for embeddings in (ours, theirs):
        unit = F.normalize(embeddings.float(), dim=-1)
        likeness = unit @ unit.T
        likeness.fill_diagonal_(-2.0)
        near.append(likeness.topk(count, dim=-1).indices)
    common = (near[0][:, :, None] == near[1][:, None, :]).any(-1)
    return common.float().mean().item()
