"""How near a quantized model stays to the float model: its weights, and its outputs on given text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.errors import LexibitError
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
    return [_weight_error(name, weight, original) for name, weight in packed.items()]


def _weight_error(name: str, weight: CodebookWeight, original: Mapping[str, Tensor]) -> WeightError:
    if name not in original:
        raise LexibitError(f"the original model has no weight {name}: give the right one")
    theirs = original[name].detach()
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
    if not texts:
        raise LexibitError("no text to compare on: the file is empty")
    kind, rows, cosines, agree = "", 0, [], []
    error = total = 0.0
    clock = [0.0, 0.0]
    for batch in _batches(tokenizer, texts, batch_size, max_length, original):
        outputs = []
        for which, model in enumerate((quantized, original)):
            start = time.perf_counter()
            with torch.inference_mode():
                out = model(**batch)
            clock[which] += time.perf_counter() - start
            kind, vectors = _vectors(out, batch["attention_mask"].bool())
            outputs.append(vectors.float())
        if outputs[0].shape != outputs[1].shape:
            raise LexibitError(
                f"the models' outputs differ in shape, {list(outputs[0].shape[1:])} and "
                f"{list(outputs[1].shape[1:])}: give the model that the quantized one was made from"
            )
        agree.append(outputs[0].argmax(-1) == outputs[1].argmax(-1))
        ours, theirs = (vectors.nan_to_num(neginf=0.0) for vectors in outputs)
        cosines.append(F.cosine_similarity(ours, theirs, dim=-1))
        error += (ours - theirs).double().square().sum().item()
        total += theirs.double().square().sum().item()
        rows += len(ours)
    cosine = torch.cat(cosines)
    return OutputFidelity(
        output=kind,
        texts=len(texts),
        rows=rows,
        cosine=cosine.mean().item(),
        worst_cosine=cosine.min().item(),
        relative=error / total if total else float(error > 0),
        agreement=torch.cat(agree).float().mean().item() if kind == "logits" else None,
        seconds=(clock[0], clock[1]),
    )


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    size: int,
    max_length: int,
    model: PreTrainedModel,
) -> Iterator[dict[str, Tensor]]:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None:
        # RoBERTa counts positions from behind the padding index
        offset = (model.config.pad_token_id or 0) + 1 if "roberta" in model.config.model_type else 0
        max_length = min(max_length, most - offset)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # texts of like length together: less padding
    order = sorted(texts, key=len)
    for start in range(0, len(order), size):
        batch = tokenizer(
            order[start : start + size],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
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
