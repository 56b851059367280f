"""The folder of a study: rows as they were written, or none."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexibit import LexibitError
from lexibit.study import Store, about, is_study, results
from lexibit.study.store import SCHEMA

ROW = {"cell": "c", "model": "m", "bits": 3, "score": 1.5, "low": math.nan, "tuned": True}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s")
    store.begin({"name": "s", "cells": ["c"]})
    store.write_rows("c", [ROW, ROW | {"score": math.inf, "model": "ä\n|"}])
    return store


def test_rows_come_back_as_they_were(store):
    first, second = store.read_rows("c")
    assert set(first) == set(SCHEMA.names)
    assert {name: first[name] for name in ("cell", "model", "bits", "score", "tuned")} == {
        name: value for name, value in ROW.items() if name != "low"
    }
    assert math.isnan(first["low"])
    assert second["score"] == math.inf
    assert second["model"] == "ä\n|"
    assert first["error"] is None


def test_the_results_are_in_the_order_of_the_study(store):
    for cell in ("a", "b"):
        store.write_rows(cell, [ROW | {"cell": cell}])
    store.begin({"cells": ["b", "c", "a"]})
    assert list(results(store.folder)["cell"]) == ["b", "c", "c", "a"]


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_is_seen(tmp_path_factory, place, bit, cut):
    store = Store(tmp_path_factory.mktemp("s") / "s")
    store.begin({"cells": ["c"]})
    store.write_rows("c", [ROW])
    expected = store.read_rows("c")
    file = store.results / "c.parquet"
    whole = bytearray(file.read_bytes())
    place %= len(whole)
    if cut:
        whole = whole[:place]
    else:
        whole[place] ^= 1 << bit
    file.write_bytes(whole)
    found = store.read_rows("c")
    # a bit that says nothing of the rows, like the writer's name, may differ
    assert found is None or repr(found) == repr(expected)


def test_rows_of_another_make_are_none(store):
    table = pq.read_table(store.results / "c.parquet").drop_columns(["score"])
    pq.write_table(table, store.results / "c.parquet")
    assert store.read_rows("c") is None
    assert store.read_rows("not there") is None


def test_many_may_begin_at_once_and_after_a_kill(tmp_path):
    folder = tmp_path / "s"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: Store(folder).begin({"cells": []}), range(64)))
    assert is_study(folder)
    # killed before the first file was whole
    (folder / "study.json").rename(folder / ".study.json.7.part")
    Store(folder).begin({"cells": []})
    assert is_study(folder)


def test_what_is_said_of_a_study(store, tmp_path):
    assert is_study(store.folder)
    assert about(store.folder)["name"] == "s"
    assert not is_study(tmp_path)
    with pytest.raises(LexibitError, match="is no study's folder: 'lexibit study run FILE' makes one"):
        about(tmp_path)
    for text in ("[", "3", '{"cells": null}'):
        (store.folder / "study.json").write_text(text)
        with pytest.raises(LexibitError, match="run the study again"):
            about(store.folder)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LexibitError, match="cannot be written"):
        Store(tmp_path / "file" / "s").begin({})
    assert Path(tmp_path / "file").read_text() == "x"
