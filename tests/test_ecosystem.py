"""Quantized folders in other tools: pipelines, device maps, torch.compile, torch.export."""

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from lexibit import LexibitConfig, LexibitError, checkpoint
from lexibit.nn import codebooks

CONFIG = LexibitConfig(scheme="linear", bits=3, groups="rows:7", levels_dtype="float16")
TEXTS = ["w5 w6 w7", "w8 w9"]


@pytest.fixture
def folders(float_folder, tmp_path):
    """A function that makes a quantized folder, and the same weights as plain float."""

    def make(name, **changes):
        checkpoint.quantize_to(float_folder(name, **changes), tmp_path / "packed", CONFIG, progress=False)
        checkpoint.dequantize_to(tmp_path / "packed", tmp_path / "plain")
        return tmp_path / "packed", tmp_path / "plain"

    return make


# pipelines -------------------------------------------------------------------------------------------


def near(ours, theirs):
    """The same answers, numbers but for the last digits."""
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(near, ours, theirs))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(near(ours[key], theirs[key]) for key in ours)
    return ours == (pytest.approx(theirs, rel=1e-3, abs=1e-5) if isinstance(ours, float) else theirs)


@pytest.mark.parametrize(
    ("task", "name", "text", "settings"),
    [
        ("text-classification", "bert-classifier", TEXTS, {}),
        ("fill-mask", "roberta-mlm", "w5 [MASK] w7", {}),
        ("feature-extraction", "distilbert-mlm", TEXTS, {}),
        ("text-generation", "llama-tied", TEXTS, {"max_new_tokens": 5, "do_sample": False}),
        ("text-generation", "gpt2", TEXTS, {"max_new_tokens": 5, "do_sample": False}),
    ],
)
def test_a_pipeline_runs_on_a_quantized_folder(folders, task, name, text, settings):
    packed, plain = (pipeline(task, model=str(folder), device="cpu") for folder in folders(name))
    assert codebooks(packed.model)
    assert not codebooks(plain.model)
    assert near(packed(text, **settings), plain(text, **settings))


# accelerate ------------------------------------------------------------------------------------------

PARTS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)
ON_CPU = dict.fromkeys(PARTS, "cpu")


def test_device_maps_on_which_everything_is_in_memory_work(folders):
    packed, _ = folders("llama")
    ids = torch.arange(5, 15)[None]
    expected = AutoModelForCausalLM.from_pretrained(packed)
    for device_map in ("auto", "cpu", {"": "cpu"}, ON_CPU):
        model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
        assert len(codebooks(model)) == len(codebooks(expected))
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"device_map": ON_CPU | {"model.layers.1": "disk"}}, r"model\.layers\.1 on 'disk'"),
        ({"device_map": ON_CPU | {"lm_head": "meta"}}, "lm_head on 'meta'"),
        ({"device_map": {"": "disk"}}, "the whole model on 'disk'"),
        ({"device_map": "auto", "max_memory": {"cpu": 3000}}, "on 'disk'"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_not_left_on_a_disk(folders, tmp_path, settings, named, tied):
    settings = settings | {"offload_folder": tmp_path / "offload"}
    packed, plain = folders("llama-tied" if tied else "llama")
    with pytest.raises(LexibitError, match=f"device_map puts .*{named}: weights in codes must be in memory"):
        AutoModelForCausalLM.from_pretrained(packed, **settings)
    with pytest.raises(LexibitError, match=named):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=CONFIG, **settings)


# torch.compile and torch.export ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bert-mlm", {"num_hidden_layers": 1}),
        ("llama-tied", {"num_hidden_layers": 1}),
        ("gpt2", {"n_layer": 1}),
    ],
)
def test_a_compiled_model_gives_what_it_gives_otherwise(folders, name, layers):
    packed, _ = folders(name, **layers)
    model = checkpoint.load_quantized(packed)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in (torch.arange(5, 12)[None], torch.randint(5, 97, (3, 9))):
        with torch.inference_mode():
            expected = model(ids)
            found = compiled(ids, use_cache=False) if model.can_generate() else compiled(ids)
        torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-tied", "gpt2"])
def test_an_exported_program_gives_the_same_for_any_shape_also_when_it_is_loaded(folders, tmp_path, name):
    packed, _ = folders(name)
    model = checkpoint.load_quantized(packed)

    def inputs(texts, tokens):
        ids = torch.randint(5, 97, (texts, tokens))
        mask = torch.ones_like(ids)
        mask[-1, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    cache = {"use_cache": False} if model.can_generate() else {}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            inputs(2, 6) | cache,
            dynamic_shapes={"input_ids": free, "attention_mask": free} | dict.fromkeys(cache),
            strict=False,
        )
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    # codes, and not what they decode to
    assert not codebooks(model).keys() & loaded.state_dict.keys()
    for texts, tokens in ((1, 3), (4, 11)):
        given = inputs(texts, tokens)
        with torch.inference_mode():
            expected = model(**given).logits
            for one in (program, loaded):
                torch.testing.assert_close(one.module()(**given, **cache).logits, expected)
