"""What reports say of weights, against numpy and the functions that measure."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lexibit import LexibitConfig, LexibitError, checkpoint
from lexibit.description import BINS, describe, histogram, spread_of_levels
from lexibit.fidelity import weight_error


@pytest.fixture
def quantized(float_folder, tmp_path):
    """A function that quantizes a tiny model: folders of the quantized and of the float one."""

    def make(name="bert-classifier", **settings):
        source, out = float_folder(name), tmp_path / "packed"
        config = LexibitConfig(**({"scheme": "linear", "bits": 3} | settings))
        checkpoint.quantize_to(source, out, config, progress=False)
        return out, source

    return make


def test_a_histogram_is_that_of_numpy():
    weights = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    found = histogram(weights)
    values = weights.numpy().ravel()
    counts, _ = np.histogram(values, bins=BINS, range=(found["low"], found["high"]))
    assert found["counts"] == counts.tolist()
    assert found["below"] == (values < found["low"]).sum() < 30
    assert found["above"] == (values > found["high"]).sum() < 30
    assert sum(found["counts"]) + found["below"] + found["above"] == values.size


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_weights_that_are_all_alike_have_one_bar(value):
    found = histogram(torch.full((3, 4), value))
    assert found["low"] < value < found["high"]
    assert sum(found["counts"]) == max(found["counts"]) == 12


def test_what_is_no_number_is_counted_apart():
    weights = torch.tensor([[1.0, 2.0], [torch.nan, -torch.inf]])
    found = histogram(weights)
    assert (sum(found["counts"]), found["not_finite"]) == (2, 2)
    assert histogram(torch.full((2, 2), torch.nan)) is None
    assert histogram(torch.zeros(0, 4)) is None


def test_levels_of_many_groups_are_told_by_place():
    table = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    found = spread_of_levels(table)
    ordered = np.sort(table.numpy(), axis=1)
    for place, level in enumerate(found):
        column = ordered[:, place]
        assert level["median"] == pytest.approx(np.median(column), rel=1e-5)
        assert level["low"] == pytest.approx(np.quantile(column, 0.05), rel=1e-5)
        assert level["high"] == pytest.approx(np.quantile(column, 0.95), rel=1e-5)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("linear", 1), ("linear", 8), ("kmeans", 3), ("binary", 2), ("lq", 4), ("ocs", 3), ("kmeans", 8)],
)
def test_a_folder_is_described(quantized, scheme, bits):
    folder, source = quantized(scheme=scheme, bits=bits)
    found = describe(folder, source)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    packed, floats = checkpoint.beside_floats(folder, source)
    assert {one["name"] for one in found} == packed.keys()
    for one in found:
        weight, original = packed[one["name"]], floats[one["name"]]
        error = weight_error(one["name"], weight, original)
        assert one["relative_error"] == pytest.approx(error.relative, rel=1e-5)
        assert one["largest_error"] == pytest.approx(error.largest, rel=1e-5)
        assert (one["scheme"], one["bits"], one["shape"]) == (scheme, bits, list(weight.shape))
        assert one["stored_bits"] == pytest.approx(weight.bits_per_weight, abs=1e-4)
        assert one["groups"] == weight.spec.groups.count
        assert len(one["levels"]) == 2**bits
        if one["groups"] == 1 and not any(weight.spec.extra):
            levels = [level["median"] for level in one["levels"]]
            assert all(level["low"] == level["median"] == level["high"] for level in one["levels"])
            used = weight.decode().unique()
            nearest = (used[:, None] - torch.tensor(levels)).abs().min(1).values
            assert nearest.max() <= 1e-5 * used.abs().max()


def test_many_groups_take_no_more_than_one(quantized):
    folder, source = quantized(scheme="kmeans", groups="row")
    found = describe(folder, source)
    assert max(one["groups"] for one in found) == 97
    assert all(len(one["levels"]) == 8 for one in found)
    assert any(level["low"] < level["median"] < level["high"] for level in found[0]["levels"])


def test_without_the_float_model_there_is_no_error_and_no_histogram(quantized):
    folder, source = quantized()
    alone, beside = describe(folder), describe(folder, source)
    unknown = {"relative_error": None, "largest_error": None, "histogram": None}
    assert alone == [one | unknown for one in beside]
    assert all(one["histogram"] for one in beside)


def test_tied_weights_stand_once(quantized):
    folder, source = quantized("bert-mlm")
    names = [one["name"] for one in describe(folder, source)]
    assert names[:3] == sorted(names[:3])
    assert "bert.embeddings.word_embeddings.weight" in names
    assert "cls.predictions.decoder.weight" not in names
    assert names == [one["name"] for one in describe(folder)]


def test_a_file_is_described(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {"layer.0.query.weight": torch.randn(20, 30, generator=generator)}
    save_file(weights, tmp_path / "float.safetensors")
    checkpoint.quantize_to(
        tmp_path / "float.safetensors", tmp_path / "q.safetensors", LexibitConfig(bits=2), progress=False
    )
    (one,) = describe(tmp_path / "q.safetensors", tmp_path / "float.safetensors")
    assert (one["bits"], one["importance"], one["histogram"]["not_finite"]) == (2, None, 0)
    assert 0 < one["relative_error"] < 0.2


def test_importances_are_those_of_the_rules(quantized):
    rules = {"*.query": {"importance": "E=0.5,P=0.1"}, "*.key": {"scheme": "aciq"}}
    folder, _ = quantized(scheme="kmeans", importance="E=1,C=0.999", rules=rules)
    found = {one["kind"]: one["importance"] for one in describe(folder)}
    assert found["query"] == {"E": 0.5, "C": 1.0, "P": 0.1}
    assert found["value"] == {"E": 1.0, "C": 0.999, "P": 0.0}
    assert found["key"] is None


def test_another_float_model_is_refused(quantized, float_folder):
    folder, _ = quantized()
    with pytest.raises(LexibitError, match="has no weight"):
        describe(folder, float_folder("distilbert-classifier", folder="other"))
    with pytest.raises(LexibitError, match="no weights in codes"):
        describe(float_folder(folder="other"))


def test_float_weights_that_are_no_numbers_break_nothing(quantized):
    folder, source = quantized()
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "query.weight" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    one = next(one for one in describe(folder, source) if one["name"] == name)
    assert one["relative_error"] is None
    assert one["histogram"]["not_finite"] == 1
