"""Codebooks as parameters: their gradients against plain autograd, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexibit import LexibitConfig, LexibitError, dequantize, quantize
from lexibit.nn import codebooks
from lexibit.tuning import parameter_groups, trained_levels
from lexibit.weight import CodebookWeight

IDS = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 5, 2, 0]])
MASK = (IDS != 0).long()

RECIPES: list[dict[str, Any]] = [
    {"scheme": "kmeans", "bits": 1},
    {"scheme": "kmeans", "bits": 3, "groups": "row"},
    {"scheme": "linear", "bits": 2, "groups": "columns:5"},
    {"scheme": "lq", "bits": 4},
    {"scheme": "lq", "bits": 5, "groups": "row", "options": {"affine": True}},
    {"scheme": "binary", "bits": 3},
    {"scheme": "ocs", "bits": 6, "options": {"ratio": 0.1}},
    {"scheme": "kmeans", "bits": 7},
    {"scheme": "mse", "bits": 8},
    {"scheme": "kmeans", "bits": 2, "importance": "P=0.1,mask"},
]


def loss_of(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """A loss that depends on every weight."""
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    out = model(**inputs)
    value = next(getattr(out, name) for name in ("logits", "last_hidden_state") if hasattr(out, name))
    weighing = torch.linspace(-1, 1, value.numel()).view(value.shape)
    return (value * weighing).sum()


def averages(weight: CodebookWeight, gradient: Tensor) -> Tensor:
    """The average of the members' gradients for every stored number, one by one."""
    spec = weight.spec
    assert not any(spec.extra)
    rows, columns = weight.shape[0], gradient.numel() // max(weight.shape[0], 1)
    codes, g = weight.unpacked_codes().view(rows, columns), gradient.view(rows, columns)
    counted = torch.ones(rows, columns, dtype=torch.bool)
    if weight.mask is not None:
        counted = weight.decode().view(rows, columns) != 0
    height, length = spec.block
    runs = -(-columns // length)
    found = torch.zeros(weight.levels.shape, dtype=torch.float64)
    for group in range(spec.groups.count):
        r, c = group // runs * height, group % runs * length
        block = slice(r, r + height), slice(c, c + length)
        inside, part, in_block = codes[block], g[block].double(), counted[block]
        if spec.form.value == "table":
            for code in range(1 << spec.bits):
                members = (inside == code) & in_block
                if members.any():
                    found[group, code] = part[members].mean()
            continue
        centred = inside.double() - (1 << (spec.bits - 1))
        factors = {
            "symmetric": [centred],
            "affine": [centred, torch.ones_like(centred)],
            "binary": [((inside.long() >> plane) & 1) * 2.0 - 1 for plane in range(spec.bits)],
        }[spec.form.value]
        for number, factor in enumerate(factors):
            found[group, number] = (part * factor)[in_block].mean()
    return found


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["bert-mlm", "albert-mlm", "gpt2", "llama-tied", "marian"])
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r["scheme"] != "ocs"], ids=str)
def test_a_level_has_the_average_of_its_members_gradients(
    tiny_model: Any, name: str, recipe: dict[str, Any]
) -> None:
    model = tiny_model(name)
    quantize(model, LexibitConfig(**recipe), progress=False)
    floats = tiny_model(name)
    quantize(floats, LexibitConfig(**recipe), progress=False)
    dequantize(floats)
    loss_of(floats).backward()
    with trained_levels(model) as levels:
        loss_of(model).backward()
        assert len(levels) == len(codebooks(model)) > 1
        for weight_name, weight in codebooks(model).items():
            gradient = floats.get_parameter(weight_name).grad
            expected = averages(weight, gradient)
            assert weight.levels.grad is not None
            scale = expected.abs().max().clamp(min=1e-6)
            assert (weight.levels.grad.double() - expected).abs().max() < 1e-3 * scale, weight_name


def test_a_split_channels_parts_are_members_each(tiny_model: Any) -> None:
    model = tiny_model("bert")
    quantize(model, LexibitConfig("ocs", 6, options={"ratio": 0.1}), progress=False)
    weight = codebooks(model)["encoder.layer.0.output.dense.weight"]
    # 40 inputs and 4 extra ones
    assert weight.spec.extra == (0, 4)
    assert weight.members().tolist() == [[24 * 44]]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("levels_dtype", ["float32", "bfloat16"])
def test_a_step_changes_levels_and_neither_codes_nor_size(
    tiny_model: Any, tmp_path: Path, recipe: dict[str, Any], levels_dtype: str
) -> None:
    model = tiny_model("bert-mlm")
    quantize(model, LexibitConfig(**recipe, levels_dtype=levels_dtype), progress=False)
    model.save_pretrained(tmp_path / "before")
    before = {name: (w.codes.clone(), w.levels.clone(), w.nbytes) for name, w in codebooks(model).items()}
    value = loss_of(model).item()
    with trained_levels(model):
        optimizer = torch.optim.Adam(parameter_groups(model, 2e-4))
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < value
    for name, weight in codebooks(model).items():
        codes, levels, nbytes = before[name]
        assert torch.equal(weight.codes, codes)
        assert not torch.equal(weight.levels, levels)
        assert weight.nbytes == nbytes
        assert not isinstance(weight.levels, nn.Parameter)
        stored = weight.levels.to(getattr(torch, levels_dtype))
        assert torch.equal(stored.to(weight.levels.dtype), weight.levels)
    model.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")]
    assert sizes[0] == sizes[1]
    loaded = type(model).from_pretrained(tmp_path / "after")
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_tied_and_shared_weights_have_one_set_of_levels_and_stay_shared(tiny_model: Any) -> None:
    model = tiny_model("albert-mlm")
    quantize(model, LexibitConfig(bits=3), progress=False)
    modules = {id(module) for module in model.modules() if isinstance(module, CodebookWeight)}
    with trained_levels(model) as levels:
        assert len(levels) == len(modules) == len({id(p) for p in levels})
        named = [name for name, p in model.named_parameters() if p.dim() == 2]
        assert len([n for n in named if n.endswith("_codebook.levels")]) == len(levels)
        loss_of(model).backward()
        torch.optim.Adam(parameter_groups(model, 1e-3), lr=1e-3).step()
    assert {id(module) for module in model.modules() if isinstance(module, CodebookWeight)} == modules
    decoder, embedding = model.predictions.decoder, model.albert.embeddings.word_embeddings
    assert decoder.weight_codebook is embedding.weight_codebook


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_tuned(cls: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cls(6, 5, num_layers=2, batch_first=True))
    quantize(model, LexibitConfig(bits=3, groups="row"), progress=False)
    plain = nn.Sequential(cls(6, 5, num_layers=2, batch_first=True))
    plain.load_state_dict({n: getattr(model[0], n.removeprefix("0.")) for n in plain.state_dict()})
    x = torch.randn(2, 4, 6)
    plain(x)[0].square().sum().backward()
    with trained_levels(model):
        model(x)[0].square().sum().backward()
        for name, weight in codebooks(model).items():
            expected = averages(weight, plain.get_parameter(name).grad)
            torch.testing.assert_close(weight.levels.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_padding_has_no_gradient_as_in_the_float_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0))
    quantize(model, LexibitConfig(bits=2, groups="row"), progress=False)
    with trained_levels(model) as (levels,):
        model(torch.tensor([[0, 2, 0]])).sum().backward()
    assert (levels.grad[0] == 0).all()
    assert (levels.grad[2] != 0).any()


def test_no_float_weight_is_kept_through_a_step(tiny_model: Any) -> None:
    model = tiny_model("distilbert-mlm")
    quantize(model, LexibitConfig(bits=3), progress=False)
    sizes = {weight.spec.shape for weight in codebooks(model).values()}
    sizes |= {shape[::-1] for shape in sizes}
    kept: list[tuple[int, ...]] = []

    def see(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with trained_levels(model), torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss_of(model)
    assert kept
    assert not sizes & set(kept)


def test_levels_learn_ten_times_as_fast_as_all_else(tiny_model: Any) -> None:
    model = tiny_model("bert-classifier")
    quantize(model, LexibitConfig(bits=3), progress=False)
    with trained_levels(model) as levels:
        rest, fast = parameter_groups(model, 5e-5)
        assert (rest["lr"], fast["lr"]) == (5e-5, pytest.approx(5e-4))
        assert {id(p) for p in fast["params"]} == {id(p) for p in levels}
        everything = {id(p) for p in model.parameters()}
        assert {id(p) for p in rest["params"]} == everything - {id(p) for p in levels}
        assert any(p is model.classifier.weight for p in rest["params"])
    (only,) = parameter_groups(tiny_model("bert-classifier"), 5e-5)
    assert only["lr"] == 5e-5


def test_transformers_takes_the_model_as_trainable_inside_only(tiny_model: Any) -> None:
    check = transformers.trainer_utils.validate_quantization_for_training
    model = tiny_model("bert-classifier")
    quantize(model, LexibitConfig(bits=3), progress=False)
    with trained_levels(model):
        check(model)
    with pytest.raises(ValueError, match="purely quantized"):
        check(model)


def test_what_an_error_leaves_is_a_quantized_model(tiny_model: Any) -> None:
    model = tiny_model("bert")
    quantize(model, LexibitConfig(bits=3), progress=False)
    with pytest.raises(RuntimeError, match="on purpose"), trained_levels(model):
        raise RuntimeError("on purpose")
    assert not any(isinstance(weight.levels, nn.Parameter) for weight in codebooks(model).values())


def test_a_float_model_has_no_levels(tiny_model: Any) -> None:
    with (
        pytest.raises(LexibitError, match="BertModel has no weight in codes"),
        trained_levels(tiny_model("bert")),
    ):
        pass


def test_levels_do_not_decay_and_a_model_may_hold_float_ones_too(tiny_model: Any) -> None:
    both = nn.ModuleList([tiny_model("bert-classifier"), tiny_model("bert")])
    quantize(both[0], LexibitConfig(bits=2), progress=False)
    with trained_levels(both):
        rest, fast = parameter_groups(both, 1e-3, factor=1)
        optimizer = torch.optim.AdamW([rest, fast], weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {id(level) for level in fast["params"]}.isdisjoint(id(p) for p in rest["params"])
