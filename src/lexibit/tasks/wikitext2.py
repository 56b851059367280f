"""WikiText-2: articles of Wikipedia (Merity et al. 2016), split into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.causal import CausalLM


class WikiText2(CausalLM):
    """Word-level perplexity on WikiText-2.

    The units are the words of the files, ``<unk>`` among them, and the end of every line: 2 088 628 in the
    official training split, 217 646 in ``dev``, 245 569 in ``test``, which published numbers are of.
    """

    name: ClassVar[str] = "wikitext-2"
    words: ClassVar[bool] = True
    folders: ClassVar[tuple[str, ...]] = ("WikiText-2", "wikitext-2")
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("wiki.train.tokens", "wiki.train.shuffled_articles.tokens"),
        "dev": ("wiki.valid.tokens",),
        "test": ("wiki.test.tokens",),
    }
    hub: ClassVar[tuple[str, str] | None] = ("Salesforce/wikitext", "wikitext-2-v1")
