"""Translation: how near do a model's translations come to people's?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from lexibit import checkpoint
from lexibit.batches import batches, longest
from lexibit.errors import LexibitError, needs_extra, unknown
from lexibit.nn.modes import evaluating
from lexibit.tasks import tables
from lexibit.tasks.base import Examples, Features, Trainable
from lexibit.tasks.metrics import BLEU, Outcomes

BEAMS = 4  # that the search for a translation keeps
TOKENS = 128  # of a translation at most


class Example(NamedTuple):
    """A sentence, and its translation."""

    source: str
    target: str


class Translation(Trainable):
    """Translation of sentences from one language to another, by an encoder-decoder model.

    The metric is the BLEU (Papineni et al. 2002) of the whole corpus as sacreBLEU defines it (Post 2018), on
    text that is not tokenized: :attr:`signature` says how.

    Translations come from a beam search, which is deterministic: 4 beams, as in Vaswani et al. 2017. We leave
    the length penalty as the model has it, and chose at most 128 tokens. A model whose configuration names a
    prefix for this pair of languages, as T5's does, gets it in front of every sentence.

    Attributes:
        folder: the sub-folder that the official data has.
        source, target: the two languages, which are also the endings of the files.
        files: by split, what its two files may be called (shell patterns), without the endings.
        hub: the data set on the hub, whose columns are called as the languages.
        hub_splits: by split, what it is called on the hub.
    """

    metrics = (BLEU,)
    from_nothing: ClassVar[tuple[str, ...]] = ("transformer",)
    folder: ClassVar[str] = ""
    source: ClassVar[str]
    target: ClassVar[str]
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train",),
        "dev": ("val", "dev", "valid"),
        "test": ("test", "test*"),
    }
    hub: ClassVar[str]
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "dev": "validation", "test": "test"}

    @property
    def signature(self) -> str:
        """How sacreBLEU counts: its signature, which belongs to every BLEU that is reported."""
        with needs_extra("tasks"):
            import sacrebleu
        counted = sacrebleu.BLEU()
        counted.corpus_score(["one"], [["one"]])  # a signature says how many references there were
        return str(counted.get_signature())

    def read(self, data: Path | None, split: str) -> Examples:
        """Pairs of sentences; see :meth:`Task.read`."""
        if split not in self.files:
            raise unknown("split", split, self.files)
        if data is None:
            rows = tables.from_hub(self.hub, None, self.hub_splits[split])
            return [Example(row[self.source], row[self.target]) for row in rows]
        endings = (f".{self.source}", f".{self.source}.gz")
        names = [name + ending for name in self.files[split] for ending in endings]
        first = tables.find(data, names, [self.folder])
        if first is None:
            raise LexibitError(
                f"{data}: no {self.files[split][0]}{endings[0]} (or .gz) in it, nor in its folder "
                f"{self.folder}: {self.name} needs it as its {split} split"
            )
        stem = first.name.removesuffix(".gz").removesuffix(f".{self.source}")
        second = tables.find(first.parent, [f"{stem}.{self.target}", f"{stem}.{self.target}.gz"])
        if second is None:
            raise LexibitError(f"{first}: no {stem}.{self.target} (or .gz) beside it: add the translations")
        sources, targets = tables.lines(first), tables.lines(second)
        if len(sources) != len(targets):
            raise LexibitError(
                f"{second}: has {len(targets)} lines, and {first.name} has {len(sources)}: they must be "
                "translations line by line"
            )
        for number, pair in enumerate(zip(sources, targets, strict=True), 1):
            if not all(line.strip() for line in pair):
                file = first if pair[1].strip() else second
                raise LexibitError(f"{file}: line {number} is empty: take it out of both files")
        return list(map(Example, sources, targets))

    def texts(self, examples: Examples) -> list[str]:
        """All sentences, of both languages: what a tokenizer for them is made of."""
        return [text for pair in examples for text in pair]

    def model(self, folder: Path, examples: Examples) -> PreTrainedModel:
        """The encoder-decoder model; see :meth:`Trainable.model`."""
        return checkpoint.load_with_head(folder, "AutoModelForSeq2SeqLM")

    def features(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> Sequence[Features]:
        """Tokens of both sentences; see :meth:`Trainable.features`."""
        tokens = tokenizer(
            self._sources(model, examples),
            text_target=[example.target for example in examples],
            truncation=True,
            max_length=longest(model, tokenizer),
        )
        names = ("input_ids", "attention_mask", "labels")
        return [{name: tokens[name][index] for name in names} for index in range(len(examples))]

    def collate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[Features]], Mapping[str, Tensor]]:
        """Padding to the longest, which the loss leaves out; see :meth:`Trainable.collate`."""
        return DataCollatorForSeq2Seq(tokenizer, model=model)

    def outcomes(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Outcomes:
        """What BLEU counts in every translation; see :meth:`Task.outcomes`.

        A row has the length of the translation and of the reference in words, how many of the translation's
        n-grams are in the reference, and how many there are, for n from 1 to 4.
        """
        with needs_extra("tasks"):
            import sacrebleu
        counted = sacrebleu.BLEU()
        found = self.translations(model, tokenizer, examples, batch_size=batch_size, progress=progress)
        rows = []
        for translation, example in zip(found, examples, strict=True):
            one = counted.corpus_score([translation], [[example.target]])
            rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
        return np.array(rows, dtype=np.float64)

    def translations(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> list[str]:
        """A model's translation of each sentence.

        Args:
            model: float or quantized.
            tokenizer: its own.
            examples: of :meth:`load`.
            batch_size: sentences at a time.
            progress: whether to draw a progress bar on the terminal.

        Raises:
            LexibitError: the model is no encoder-decoder that generates text.
        """
        if not (model.config.is_encoder_decoder and model.can_generate()):
            raise LexibitError(
                f"{type(model).__name__} is no encoder-decoder that generates text, which {self.name} needs: "
                "give one, such as a MarianMTModel"
            )
        most = min(TOKENS, longest(model, tokenizer) or TOKENS)
        found = [""] * len(examples)
        sources = self._sources(model, examples)
        generate: Any = model.generate
        with evaluating(model), torch.inference_mode():
            for chosen, inputs in batches(model, tokenizer, sources, size=batch_size, progress=progress):
                generated = generate(
                    **inputs, num_beams=BEAMS, do_sample=False, max_new_tokens=most, max_length=None
                )
                texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
                for index, text in zip(chosen, texts, strict=True):
                    found[index] = text.strip()
        return found

    def _sources(self, model: PreTrainedModel, examples: Examples) -> list[str]:
        """What the model reads of each example."""
        params = getattr(model.config, "task_specific_params", None) or {}
        prefix = params.get(f"translation_{self.source}_to_{self.target}", {}).get("prefix", "")
        return [prefix + example.source for example in examples]
