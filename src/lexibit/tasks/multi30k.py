"""Multi30k: captions of pictures, from English to German."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.translation import Translation


class Multi30k(Translation):
    """Multi30k (Elliott et al. 2016), with the test set of 2016."""

    name: ClassVar[str] = "multi30k"
    folder: ClassVar[str] = "Multi30k"
    source: ClassVar[str] = "en"
    target: ClassVar[str] = "de"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train",),
        "dev": ("val",),
        "test": ("test_2016_flickr",),
    }
    hub: ClassVar[str] = "bentrevett/multi30k"
