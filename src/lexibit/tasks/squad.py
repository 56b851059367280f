"""SQuAD v1.1: where in a text is the answer to a question?"""

from __future__ import annotations

import gzip
import inspect
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit import checkpoint
from lexibit.batches import give_padding, longest
from lexibit.errors import LexibitError, needs_extra, unknown
from lexibit.nn.modes import evaluating
from lexibit.progress import progress_bar
from lexibit.tasks import tables
from lexibit.tasks.base import Examples, Features, Trainable
from lexibit.tasks.metrics import ANSWER_F1, EXACT_MATCH, Outcomes

LENGTH = 384  # tokens of a window, and
OVERLAP = 128  # how many of them the next window has again
QUESTION = 64  # tokens of a question
ANSWER = 30  # tokens of an answer
_SHORTEST = 32  # of a window that has room for all of these, in proportion
_AT_ONCE = 256  # questions whose windows are made at once
_ANSWER = ("text", "answer_start")


class Answer(NamedTuple):
    """A part of a text, and the character that it starts at."""

    text: str
    start: int


class Question(NamedTuple):
    """A question on a text, and the answers that people gave."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


class _Window(NamedTuple):
    """A question and a part of its text.

    Attributes:
        number: of the question.
        inputs: what the model takes of every token.
        spans: first character and end of each token that is of the text, ``[tokens, 2]``.
        first: which token is the first of these.
    """

    number: int
    inputs: Features
    spans: NDArray[np.int64]
    first: int


class SQuAD(Trainable):
    """The Stanford Question Answering Dataset, v1.1 (Rajpurkar et al. 2016).

    The metrics are the official ones: the overlap of words with the nearest answer (F1), and whether it is
    one of the answers (exact match), both without case, punctuation and articles.

    A text that is too long is read in windows that overlap, after Devlin et al. 2019, whose lengths we take:
    384 tokens, 64 for the question and 30 for an answer. We chose an overlap of 128 tokens, as the examples
    of transformers do; with a model that takes fewer tokens, question and overlap shrink. The answer is the
    span of at most 30 tokens, in any window, whose logits of start and end have the largest sum: we chose to
    try every span, not only those of the 20 best starts and ends. In training, a window without the whole
    answer, or whose answer is empty, has it at the token [CLS] (at the first, if there is none).
    """

    name: ClassVar[str] = "squad"
    metrics = (ANSWER_F1, EXACT_MATCH)
    hub: ClassVar[str] = "rajpurkar/squad"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "dev": "validation"}

    def read(self, data: Path | None, split: str) -> Examples:
        """Questions; see :meth:`Task.read`."""
        if split not in self.hub_splits:
            raise unknown("split", split, self.hub_splits)
        if data is None:
            return [
                _question(self.hub, row, row["context"], zip(*map(row["answers"].get, _ANSWER), strict=True))
                for row in tables.from_hub(self.hub, None, self.hub_splits[split])
            ]
        exact = [f"{split}-v1.1.json", f"{split}-v1.1.json.gz"]
        file = tables.find(data, [*exact, f"{split}*.json", f"{split}*.json.gz"], ["SQuAD"])
        if file is None:
            raise LexibitError(
                f"{data}: no {exact[0]} (or .json.gz) in it, nor in its folder SQuAD: squad needs it as its "
                f"{split} split"
            )
        return list(_questions(file))

    def model(self, folder: Path, examples: Examples) -> PreTrainedModel:
        """The model with logits of start and end; see :meth:`Trainable.model`."""
        # a classifier's folder may name any number of classes: start and end are two
        names = {0: "LABEL_0", 1: "LABEL_1"}
        return checkpoint.load_with_head(
            folder,
            "AutoModelForQuestionAnswering",
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )

    def features(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> Sequence[Features]:
        """Windows, with the first and last token of the first answer; see :meth:`Trainable.features`.

        These are ``start_positions`` and ``end_positions``, in place of ``labels``.
        """
        found = []
        for window in _windows(model, tokenizer, examples, range(len(examples))):
            text, start = examples[window.number].answers[0]
            end = start + len(text)
            starts, ends = window.spans.T
            if text and len(starts) and starts[0] <= start and end <= ends[-1]:
                # of several tokens with one span, the bytes of a character, the first and the last
                begin = starts[np.searchsorted(starts, start, side="right") - 1]
                finish = ends[np.searchsorted(ends, end, side="left")]
                first = window.first + int(np.searchsorted(starts, begin, side="left"))
                last = window.first + int(np.searchsorted(ends, finish, side="right")) - 1
            else:
                ids = window.inputs["input_ids"].tolist()
                first = last = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            found.append(window.inputs | {"start_positions": first, "end_positions": last})
        return found

    def collate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[Features]], Mapping[str, Tensor]]:
        """Padding to the longest window; see :meth:`Trainable.collate`."""

        def batch(features: list[Features]) -> Mapping[str, Tensor]:
            positions = ("start_positions", "end_positions")
            inputs = [
                {name: value for name, value in one.items() if name not in positions} for one in features
            ]
            labels = {name: torch.tensor([one[name] for one in features]) for name in positions}
            return _pad(tokenizer, inputs) | labels

        return batch

    def outcomes(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Outcomes:
        """Exact match and F1 of every question, each from 0 to 1; see :meth:`Task.outcomes`."""
        with needs_extra("tasks"):
            from torchmetrics.functional.text import squad
        answers = self.answers(model, tokenizer, examples, batch_size=batch_size, progress=progress)
        found = np.empty((len(examples), 2))
        for row, answer, question in zip(found, answers, examples, strict=True):
            known = {"text": [text for text, _ in question.answers]}
            score = squad({"id": "", "prediction_text": answer}, {"id": "", "answers": known})
            row[:] = float(score["exact_match"]) / 100, float(score["f1"]) / 100
        return found

    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> list[str]:
        """What a model answers to each question: a part of its text, empty if its logits are NaN.

        Args:
            model: float or quantized.
            tokenizer: its own.
            examples: of :meth:`load`.
            batch_size: windows at a time.
            progress: whether to draw a progress bar on the terminal.

        Raises:
            LexibitError: the model answers no questions, or its tokenizer does not tell where tokens lie.
        """
        best = np.full(len(examples), -np.inf)
        found = [""] * len(examples)
        # texts of like length together, some of them at a time
        order = sorted(range(len(examples)), key=lambda number: sum(map(len, examples[number][1:3])))
        size = max(_AT_ONCE, batch_size)
        with progress_bar(progress) as bar, evaluating(model), torch.inference_mode():
            for place in bar.track(range(0, len(order), size), description="questions"):
                windows = list(_windows(model, tokenizer, examples, order[place : place + size]))
                windows.sort(key=lambda window: len(window.inputs["input_ids"]))
                for part in range(0, len(windows), batch_size):
                    some = windows[part : part + batch_size]
                    for window, score, (start, end) in _spans(model, tokenizer, some):
                        if score > best[window.number]:
                            best[window.number] = score
                            found[window.number] = examples[window.number].context[start:end].strip()
        return found


def _windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    numbers: Sequence[int],
) -> Iterator[_Window]:
    """The windows of some questions, in order."""
    if not tokenizer.is_fast:
        raise LexibitError(
            f"{type(tokenizer).__name__} does not tell which characters a token is, which squad needs: "
            "save the model with a fast tokenizer (a tokenizer.json)"
        )
    length = min(LENGTH, longest(model, tokenizer) or LENGTH)
    if length < _SHORTEST:
        raise LexibitError(
            f"{type(model).__name__} and its tokenizer take {length} tokens, squad needs {_SHORTEST}: "
            "give a model that takes longer texts"
        )
    taken = inspect.signature(model.forward).parameters
    for start in range(0, len(numbers), _AT_ONCE):
        some = numbers[start : start + _AT_ONCE]
        tokens = tokenizer(
            [_cut(tokenizer, examples[number].question, length) for number in some],
            [examples[number].context for number in some],
            truncation="only_second",
            max_length=length,
            stride=min(OVERLAP, length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for part, of in enumerate(tokens["overflow_to_sample_mapping"]):
            texts = np.array([-1 if text is None else text for text in tokens.sequence_ids(part)])
            inputs = {name: np.array(tokens[name][part]) for name in tokens if name in taken}
            if "global_attention_mask" in taken:
                # Longformer: all up to the question's end attends to everything, and everything to it
                question = np.maximum.accumulate(texts[::-1] == 0)[::-1]
                inputs["global_attention_mask"] = question.astype(np.int64)
            (context,) = np.nonzero(texts == 1)
            spans = np.array(tokens["offset_mapping"][part])[context]
            yield _Window(some[of], inputs, spans, int(context[0]) if len(context) else 0)


def _cut(tokenizer: PreTrainedTokenizerBase, question: str, length: int) -> str:
    """A question without what makes it too long."""
    tokens = tokenizer(
        question,
        add_special_tokens=False,
        truncation=True,
        max_length=min(QUESTION, length // 2),
        return_offsets_mapping=True,
    )
    spans = tokens["offset_mapping"]
    return question[spans[0][0] : spans[-1][1]] if spans else question


def _pad(tokenizer: PreTrainedTokenizerBase, inputs: list[Features]) -> dict[str, Tensor]:
    """The inputs of some windows as tensors, ``[windows, tokens]``, padded behind."""
    give_padding(tokenizer)
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {
        name: pad_sequence(
            [torch.as_tensor(one[name]) for one in inputs],
            batch_first=True,
            padding_value=padding.get(name, 0),
        )
        for name in inputs[0]
    }


def _spans(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: list[_Window]
) -> Iterator[tuple[_Window, float, tuple[int, int]]]:
    """The best answer in each window that has one: its sum of logits, and its characters in the text."""
    inputs = _pad(tokenizer, [window.inputs for window in windows])
    output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    start, end = getattr(output, "start_logits", None), getattr(output, "end_logits", None)
    shape = inputs["input_ids"].shape
    if not isinstance(start, Tensor) or not isinstance(end, Tensor) or not start.shape == end.shape == shape:
        raise LexibitError(
            f"{type(model).__name__} gives no logits of an answer's start and end, which squad needs: train "
            "one with lexibit finetune"
        )
    outside = torch.ones(shape, dtype=torch.bool)
    for row, window in zip(outside, windows, strict=True):
        row[window.first : window.first + len(window.spans)] = False
    start, end = (
        one.float().cpu().nan_to_num(nan=-torch.inf).masked_fill(outside, -torch.inf) for one in (start, end)
    )
    # [windows, tokens, ANSWER]: of every start, every end from itself on
    ends = F.pad(end, (0, ANSWER - 1), value=-torch.inf).unfold(1, ANSWER, 1)
    best, places = (start[:, :, None] + ends).flatten(1).max(1)
    for window, score, place in zip(windows, best.tolist(), places.tolist(), strict=True):
        if score > -torch.inf:
            first, further = divmod(place, ANSWER)
            first -= window.first
            yield window, score, (int(window.spans[first, 0]), int(window.spans[first + further, 1]))


def _questions(file: Path) -> Iterator[Question]:
    """The questions of an official file."""
    try:
        stored = file.read_bytes()
        articles = json.loads(gzip.decompress(stored) if file.suffix == ".gz" else stored)["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    answers = [[answer[name] for name in _ANSWER] for answer in row["answers"]]
                    yield _question(str(file), row, paragraph["context"], answers)
    except LexibitError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise LexibitError(f"{file}: cannot be read as JSON in UTF-8: {error}") from error
    except (KeyError, TypeError) as error:
        raise LexibitError(
            f"{file}: has not the form of SQuAD v1.1 (data, paragraphs, qas, answers): take the official file"
        ) from error


def _question(where: str, row: Mapping[str, Any], context: str, answers: Iterable[Iterable[Any]]) -> Question:
    """A question, if its answers are where they are said to be."""
    known = tuple(Answer(*answer) for answer in answers)
    if not known:
        raise LexibitError(f"{where}: question {row['id']!r} has no answer: squad takes SQuAD v1.1, not v2.0")
    for text, start in known:
        if start < 0 or not context.startswith(text, start):
            raise LexibitError(
                f"{where}: the text of question {row['id']!r} does not have its answer {text!r} at character "
                f"{start}: take the official file"
            )
    return Question(row["id"], row["question"], context, known)
