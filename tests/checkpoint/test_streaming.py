"""Files to files: the bytes are those of quantizing the loaded model, whatever happens in between."""

import json
import logging
import resource

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lexibit
from lexibit import LexibitConfig, LexibitError, checkpoint, format
from lexibit.checkpoint import streaming
from lexibit.checkpoint.source import load_float

LINEAR = LexibitConfig(scheme="linear", bits=3)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def by_way_of_the_model(source, out, config, **options):
    model = load_float(source)
    lexibit.quantize(model, config, progress=False)
    model.save_pretrained(out, **options)
    for file in source.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return contents(out)


def streamed(source, out, config=LINEAR, **options):
    checkpoint.quantize_to(source, out, config, progress=False, **options)
    return contents(out)


@pytest.fixture
def plain(caplog):
    """A test in which no model may be loaded as a whole."""
    with caplog.at_level(logging.WARNING, "lexibit"):
        yield
    assert not caplog.records


NAMES = [
    "bert",
    "bert-mlm",
    "bert-classifier",
    "albert-mlm",
    "distilbert-mlm",
    "roberta-mlm",
    "roberta-qa",
    "longformer",
    "gpt2",
    "gpt2-classifier",
    "marian",
    "llama",
    "llama-tied",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_the_loaded_model(float_folder, tmp_path, plain, name):
    source = float_folder(name)
    expected = by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    found = streamed(source, tmp_path / "packed")
    assert found.keys() == expected.keys()
    assert [file for file in found if found[file] != expected[file]] == []
    assert format.read_index([tmp_path / "packed" / "model.safetensors"])
    checkpoint.verify(tmp_path / "packed")


CONFIGS = {
    "recommended": LexibitConfig.recommended(3),
    "rows": LexibitConfig(scheme="kmeans", bits=2, groups="row", levels_dtype="float16", heads=True),
    "drawn": LexibitConfig(scheme="kmeans", bits=3, options={"init": "k-means++"}, seed=7),
    "lq": LexibitConfig(scheme="lq", bits=4, groups="columns:7"),
    "ocs": LexibitConfig(scheme="ocs", bits=4, options={"ratio": 0.1}),
    "binary": LexibitConfig(scheme="binary", bits=2),
    "pruned": LexibitConfig(scheme="kmeans", bits=2, importance="E=1,C=0.9,P=0.2"),
    "outliers": LexibitConfig(scheme="kmeans", bits=2, outliers=0.01),
    "embeddings kept": LexibitConfig(scheme="linear", bits=3, embeddings=False),
    "few": LexibitConfig(scheme="linear", bits=3, include=["*.0.*"]),
    "mixed": LexibitConfig(bits=3, rules={"*embed*": {"bits": 8, "scheme": "linear"}}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", ["bert-mlm", "llama-tied"])
def test_whatever_the_configuration(float_folder, tmp_path, plain, name, config):
    source = float_folder(name)
    expected = by_way_of_the_model(source, tmp_path / "expected", config)
    assert streamed(source, tmp_path / "packed", config) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
def test_in_the_dtype_that_transformers_would_load(tmp_path, tiny_model, plain, dtype, named):
    source = tmp_path / "float"
    tiny_model("llama").to(getattr(torch, dtype)).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    assert config.pop("dtype") == dtype
    if not named:
        (source / "config.json").write_text(json.dumps(config))
    expected = by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    assert streamed(source, tmp_path / "packed") == expected
    found = checkpoint.inspect(tmp_path / "packed")
    assert {spec.dtype for spec in found.weights.values()} == {dtype}


def test_weights_are_read_in_the_dtype_of_the_configuration(tmp_path, tiny_model, plain):
    source = tmp_path / "float"
    tiny_model("bert").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    expected = by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    assert streamed(source, tmp_path / "packed") == expected


def test_shards_to_shards(tmp_path, tiny_model, plain):
    source = tmp_path / "float"
    tiny_model("llama-tied").save_pretrained(source, max_shard_size="10KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    expected = by_way_of_the_model(source, tmp_path / "expected", LINEAR, max_shard_size=1500)
    found = streamed(source, tmp_path / "packed", shard_size=1500)
    assert len([file for file in found if file.endswith(".safetensors")]) > 2
    assert "model.safetensors.index.json" in found
    assert found == expected
    checkpoint.verify(tmp_path / "packed")
    single = streamed(source, tmp_path / "single")
    assert "model.safetensors" in single


def test_a_bare_file_in_shards(tmp_path, plain):
    tensors = {f"layer.{index}.weight": torch.randn(20, 30) for index in range(5)}
    save_file(tensors | {"bias": torch.ones(3)}, tmp_path / "float.safetensors")
    found = streamed(tmp_path / "float.safetensors", tmp_path / "packed", shard_size=500)
    assert len(found) > 3
    back = format.read(sorted((tmp_path / "packed").glob("*.safetensors")))
    assert back.keys() == {*tensors, "bias"}
    for name, tensor in tensors.items():
        expected = lexibit.quantize_tensor(tensor, LINEAR.recipe())
        assert torch.equal(back[name].decode(), expected.decode())


def test_a_checkpoint_with_older_names_keeps_them(float_folder, tmp_path, plain):
    # as that of bert-base-uncased has them
    source = float_folder("bert-mlm")
    tensors = load_file(source / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    assert len(old.keys() - tensors.keys()) == 12
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    found = streamed(source, tmp_path / "packed")
    assert found == by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    assert checkpoint.verify(tmp_path / "packed").checksums
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert "bert.embeddings.LayerNorm.gamma" in stored
    model = checkpoint.load_quantized(tmp_path / "packed")
    kept = model.bert.encoder.layer[1].output.LayerNorm.weight
    assert torch.equal(kept, tensors["bert.encoder.layer.1.output.LayerNorm.weight"])


def test_a_model_with_its_head_gives_its_names_to_weights_of_the_model_alone(tmp_path, tiny_model, plain):
    # the weights have no "bert." in front of their names, the class has
    source = tmp_path / "float"
    model = tiny_model("bert-mlm")
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix("bert."): value for name, value in tensors.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = streamed(source, tmp_path / "packed")
    assert found == by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    checkpoint.verify(tmp_path / "packed")
    back = checkpoint.load_quantized(tmp_path / "packed")
    assert torch.equal(back.bert.embeddings.LayerNorm.weight, model.bert.embeddings.LayerNorm.weight)


GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [2, 7], "max_length": 33}


@pytest.mark.parametrize("name", ["llama", "gpt2", "marian"])
@pytest.mark.parametrize("given", ["file", "config", "nothing"])
def test_how_text_is_generated_is_what_the_folder_says(float_folder, tmp_path, plain, name, given):
    source = float_folder(name)
    (source / "generation_config.json").unlink()
    if given == "file":
        (source / "generation_config.json").write_text(json.dumps(GENERATION))
    elif given == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"num_beams": 3, "no_repeat_ngram_size": 2}))
    expected = by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    found = streamed(source, tmp_path / "packed")
    assert found == expected
    if given == "file":
        assert json.loads(found["generation_config.json"])["eos_token_id"] == [2, 7]


def test_a_dtype_that_only_the_index_names(tmp_path, tiny_model, plain):
    source = tmp_path / "float"
    tiny_model("llama").save_pretrained(source, max_shard_size="10KB")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["metadata"]["dtype"] = "bfloat16"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    assert streamed(source, tmp_path / "packed") == expected
    assert json.loads(expected["config.json"])["dtype"] == "bfloat16"


def test_tensors_without_axes_and_of_other_dtypes_are_kept(tmp_path, plain):
    tensors = {
        "a.weight": torch.randn(6, 5),
        "count": torch.tensor(3),
        "scale": torch.tensor(0.5),
        "small.weight": torch.randn(6, 5).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "float.safetensors")
    assert [w.name for w in checkpoint.plan(tmp_path / "float.safetensors", LINEAR).weights] == ["a.weight"]
    streamed(tmp_path / "float.safetensors", tmp_path / "packed")
    checkpoint.verify(tmp_path / "packed")
    back = load_file(tmp_path / "packed" / "model.safetensors")
    for name in ("count", "scale", "flags"):
        assert torch.equal(back[name], tensors[name])
    assert back["small.weight"].dtype == torch.float8_e4m3fn


def test_more_shards_than_a_process_may_open_files(tmp_path, plain):
    tensors = {f"layer.{index}.weight": torch.randn(20, 30) for index in range(120)}
    save_file(tensors, tmp_path / "float.safetensors")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        found = streamed(tmp_path / "float.safetensors", tmp_path / "packed", shard_size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(found) > 110


# what is not plain ------------------------------------------------------------------------------------------


def untied(source):
    tensors = load_file(source / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = torch.randn(97, 24)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return "should be the same"


def without_a_head(source):
    tensors = load_file(source / "model.safetensors")
    del tensors["cls.predictions.transform.dense.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return "is not in it"


def pytorch_form(source):
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    return "other files"


@pytest.mark.parametrize("change", [untied, without_a_head, pytorch_form])
def test_a_checkpoint_that_is_more_than_its_tensors_is_loaded_and_that_is_said(
    float_folder, tmp_path, caplog, change
):
    source = float_folder("bert-mlm")
    why = change(source)
    with caplog.at_level(logging.WARNING, "lexibit"):
        torch.manual_seed(0)
        found = streamed(source, tmp_path / "packed")
    assert any("the whole model is loaded" in message and why in message for message in caplog.messages)
    torch.manual_seed(0)
    assert found == by_way_of_the_model(source, tmp_path / "expected", LINEAR)
    with pytest.raises(LexibitError, match=f"whole model must be loaded.*{why}"):
        streamed(source, tmp_path / "again", workers=streaming.Local(10**9))


def test_experts_that_are_merged_as_they_load_are_stored_and_noted_apart(tmp_path, caplog):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_local_experts": 2}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    source = tmp_path / "float"
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **layers)).save_pretrained(source)
    with caplog.at_level(logging.WARNING, "lexibit"):
        streamed(source, tmp_path / "packed")
    assert "becomes something else as it is loaded" in caplog.text
    assert checkpoint.verify(tmp_path / "packed").checksums
    names = load_file(tmp_path / "packed" / "model.safetensors")
    assert any("experts.1." in name for name in names)
    expected = load_float(source)
    lexibit.quantize(expected, LINEAR, progress=False)
    ids = torch.arange(3, 13)[None]
    with torch.inference_mode():
        found = checkpoint.load_quantized(tmp_path / "packed")(ids).logits
        assert torch.equal(found, expected(ids).logits)


def test_a_copy_of_a_tied_weight_is_no_reason_to_load_the_model(float_folder, tmp_path, plain):
    source = float_folder("bert-mlm")
    tensors = load_file(source / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert streamed(source, tmp_path / "packed") == by_way_of_the_model(source, tmp_path / "expected", LINEAR)


def test_a_damaged_or_missing_shard_is_named(tmp_path, tiny_model):
    source = tmp_path / "float"
    tiny_model("llama").save_pretrained(source, max_shard_size="10KB")
    second = sorted(source.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    with pytest.raises(LexibitError, match=second.name):
        streamed(source, tmp_path / "packed")
    second.unlink()
    with pytest.raises(LexibitError, match=f"lists {second.name}, which is not there"):
        streamed(source, tmp_path / "packed")
    assert {path.name for path in tmp_path.iterdir()} == {"float"}


# memory -----------------------------------------------------------------------------------------------------


def test_a_weight_that_takes_more_than_is_allowed_is_named_before_any_work(float_folder, tmp_path):
    source = float_folder("bert")
    with pytest.raises(LexibitError, match=r"word_embeddings\.weight takes up to .* --memory allows"):
        streamed(source, tmp_path / "packed", workers=streaming.Local(100_000_000))
    assert {path.name for path in tmp_path.iterdir()} == {"float"}


def test_one_weight_after_the_other_gives_the_same_bytes(float_folder, tmp_path, plain):
    source = float_folder("bert")
    assert streamed(source, tmp_path / "one", workers=streaming.Local(101_000_000)) == streamed(
        source, tmp_path / "many", workers=streaming.Local(10**12)
    )
