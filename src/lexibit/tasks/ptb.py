"""Penn Treebank: news, split into words, with Mikolov's vocabulary of 10 000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.causal import CausalLM


class PTB(CausalLM):
    """Word-level perplexity on the Penn Treebank (Marcus et al. 1993), as Mikolov et al. 2010 prepared it.

    The units are the words of the files, ``<unk>`` and ``N`` among them, and the end of every line.
    """

    name: ClassVar[str] = "ptb"
    words: ClassVar[bool] = True
    folders: ClassVar[tuple[str, ...]] = ("PTB", "ptb", "penn", "data", "simple-examples/data")
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("ptb.train.txt",),
        "dev": ("ptb.valid.txt",),
        "test": ("ptb.test.txt",),
    }
