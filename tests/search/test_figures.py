"""Figures of a search: there, whole, of the search, and the same every time."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

from lexibit.importance import Magnitude
from lexibit.search import Found, Setting, draw
from lexibit.search.space import STARTS, parameters
from lexibit.search.trials import Trial


def made(*, bits: int | None = None, flat: bool = False) -> Found:
    first = [
        Trial(place, parameters(one), 1.0 if flat else 1 + one.E - one.P, 0.1)
        for place, one in enumerate(STARTS)
    ]
    second = [
        Trial(0, parameters(STARTS[1]), 0.5, 0.1),
        Trial(1, parameters(STARTS[2]), math.nan, 0.1, "no"),
    ]
    settings = {
        "encoder.layer.0": Setting(Magnitude(0.5, 0.999, 0.1), bits),
        "encoder.layer.1": Setting(bits=bits),
    }
    alone = [Trial(0, {"layer": 0, "bits": 2}, 9.0, 0.1)]
    stages = {"each layer alone": alone, "all layers": first, "encoder.layer.0": second}
    return Found(settings, settings, 1.0, 0.5, stages)


def texts(file: Path) -> str:
    return " ".join("".join(node.itertext()) for node in ET.parse(file).iter() if node.tag.endswith("text"))


def test_every_figure_is_drawn_and_names_what_it_shows(tmp_path: Path) -> None:
    files = draw(made(bits=3), "loss", tmp_path / "figures")
    assert [file.name for file in files] == ["history.svg", "importance.svg", "layers.svg"]
    assert "least so far" in texts(files[0])
    assert "encoder.layer.0" in texts(files[0])
    assert "alone" not in texts(files[0])
    assert all(name in texts(files[1]) for name in ("E", "1-C", "P", "variance of the loss"))
    assert "bits" in texts(files[2])
    assert "encoder.layer.1" in texts(files[2])


def test_the_same_search_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (
        [file.read_bytes() for file in draw(made(), "loss", tmp_path / name)] for name in ("a", "b")
    )
    assert one == other


def test_what_there_is_nothing_of_is_not_drawn(tmp_path: Path) -> None:
    assert [file.name for file in draw(made(flat=True), "loss", tmp_path)] == ["history.svg", "layers.svg"]
    alone = Found({"a": Setting(bits=2)}, {"a": Setting(bits=2)}, 1.0, 0.5)
    assert [file.name for file in draw(alone, "loss", tmp_path)] == ["layers.svg"]
