"""The transformers plug-in, on tiny models of eight architectures with random weights."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import lexibit
from lexibit import FormatError, LexibitConfig, LexibitError
from lexibit.nn import Quantized, codebooks

SOURCE = Path(lexibit.__file__).parents[1]

# name of the tiny model: the Auto class that loads it
ARCHITECTURES = {
    "bert-mlm": "AutoModelForMaskedLM",
    "bert-classifier": "AutoModelForSequenceClassification",
    "albert-mlm": "AutoModelForMaskedLM",
    "distilbert-classifier": "AutoModelForSequenceClassification",
    "distilbert-mlm": "AutoModelForMaskedLM",
    "roberta-mlm": "AutoModelForMaskedLM",
    "roberta-qa": "AutoModelForQuestionAnswering",
    "longformer": "AutoModel",
    "gpt2": "AutoModelForCausalLM",
    "gpt2-classifier": "AutoModelForSequenceClassification",
    "marian": "AutoModelForSeq2SeqLM",
    "llama": "AutoModelForCausalLM",
    "llama-tied": "AutoModelForCausalLM",
}
# 3 bits a code, several groups, levels in half precision, and other settings for some weights
CONFIG = {
    "scheme": "linear",
    "bits": 3,
    "groups": "rows:7",
    "levels_dtype": "float16",
    "rules": {"*emb*": {"scheme": "lq", "bits": 5, "groups": "columns:5"}},
}
GPT2_RULES = {"*wte*": {"scheme": "lq", "bits": 5, "groups": "columns:5"}}


def config_of(name, **changes):
    rules = GPT2_RULES if name.startswith("gpt2") else CONFIG["rules"]
    return LexibitConfig(**CONFIG | {"rules": rules} | changes)


def inputs_of(model):
    ids = torch.randint(5, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    return given


def outputs_of(model):
    """All tensors that a model gives for the same input."""
    with torch.inference_mode():
        out = (
            model(**inputs_of(model), use_cache=False) if model.can_generate() else model(**inputs_of(model))
        )
    return [value for value in out.values() if isinstance(value, torch.Tensor)]


def assert_equal_outputs(ours, theirs):
    ours, theirs = outputs_of(ours), outputs_of(theirs)
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


def stored(folder):
    """Every tensor of a folder's files."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def index_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= json.loads(file.metadata()["lexibit"])["weights"]
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_weights(ours, theirs):
    """Two quantized models hold the same codes and levels, shared in the same places."""
    ours, theirs = codebooks(ours), codebooks(theirs)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, weight in ours.items():
        assert weight.spec == theirs[name].spec
        assert torch.equal(weight.codes, theirs[name].codes)
        assert torch.equal(weight.levels, theirs[name].levels)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trip(request, tiny_model, tmp_path_factory):
    """A model on its way: float, quantized, saved and loaded. Tests must not change it."""
    folder = tmp_path_factory.mktemp(request.param)
    name = request.param
    model = tiny_model(name)
    model.save_pretrained(folder / "float")
    before = copy.deepcopy(model)
    plan = lexibit.quantize(model, config_of(name), progress=False)
    model.save_pretrained(folder / "packed")
    auto = getattr(transformers, ARCHITECTURES[name])
    loaded, report = auto.from_pretrained(folder / "packed", output_loading_info=True)
    return {
        "name": name,
        "auto": auto,
        "float": before,
        "plan": plan,
        "quantized": model,
        "folder": folder,
        "loaded": loaded,
        "report": report,
    }


# the round trip of every architecture ----------------------------------------------------------------


def test_every_matrix_and_embedding_is_in_codes_and_only_heads_and_sinusoids_are_not(trip):
    model = trip["quantized"]
    left = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert all(
        name.split(".")[0] in ("classifier", "score", "qa_outputs", "pre_classifier")
        or "embed_positions" in name
        for name in left
    ), left
    assert len(codebooks(model)) == len(trip["plan"].weights) >= 10
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(isinstance(module, Quantized) for module in linear) >= len(linear) - 2


def test_the_folder_holds_packed_codes_of_the_models_own_weights(trip):
    tensors, index = stored(trip["folder"] / "packed"), index_of(trip["folder"] / "packed")
    state = trip["float"].state_dict()
    assert set(index) == {weight.name for weight in trip["plan"].weights}
    weights = codebooks(trip["quantized"])
    names = {use.name: planned.name for planned in trip["plan"].weights for use in planned.uses}
    for name, weight in weights.items():
        name = names[name]
        count, bits = state[name].numel(), index[name]["bits"]
        assert tensors[name].dtype == torch.uint8
        assert tensors[name].shape == (-(-count * bits // 8),)
        assert torch.equal(tensors[name], weight.codes)
        assert tensors[name + "_levels"].dtype == torch.float16
        assert torch.equal(tensors[name + "_levels"].float(), weight.levels)
    for name in set(tensors) - set(index) - {name + "_levels" for name in index}:
        assert torch.equal(tensors[name], state[name])


def test_a_loaded_model_is_the_saved_one_bit_for_bit_and_of_its_class(trip):
    assert type(trip["loaded"]) is type(trip["float"])
    assert not any(trip["report"].values())
    assert_same_weights(trip["loaded"], trip["quantized"])
    assert_equal_outputs(trip["loaded"], trip["quantized"])


@pytest.mark.usefixtures("exact")
def test_a_loaded_model_gives_what_its_dequantized_weights_give(trip):
    model = copy.deepcopy(trip["loaded"])
    lexibit.dequantize(model)
    assert not codebooks(model)
    assert_equal_outputs(model, trip["loaded"])
    # a float model of plain torch with those weights, made by nobody here
    plain = copy.deepcopy(trip["float"])
    plain.load_state_dict(model.state_dict())
    assert_equal_outputs(plain, trip["loaded"])


def test_weights_come_back_near_the_float_weights(trip):
    originals = dict(trip["float"].named_parameters())
    for name, weight in codebooks(trip["loaded"]).items():
        original = originals[name].detach()
        error = (weight.decode() - original).square().sum() / original.square().sum()
        assert 0 < error < 0.12, name


def test_weights_that_are_shared_stay_one_object(trip):
    shared = [planned for planned in trip["plan"].weights if len(planned.uses) > 1]
    tied = {"bert-mlm", "albert-mlm", "distilbert-mlm", "roberta-mlm", "gpt2", "marian", "llama-tied"}
    assert bool(shared) == (trip["name"] in tied)
    for model in (trip["quantized"], trip["loaded"]):
        for planned in shared:
            found = {id(model.get_submodule(use.name + "_codebook")) for use in planned.uses}
            assert len(found) == 1, planned.name


def test_a_loaded_model_saves_the_same_bytes_again(trip):
    again = trip["folder"] / "again"
    trip["loaded"].save_pretrained(again)
    assert contents(again) == contents(trip["folder"] / "packed")


def test_quantizing_while_loading_saves_the_same_bytes_as_quantizing_and_saving(trip):
    on_arrival = trip["auto"].from_pretrained(
        trip["folder"] / "float", quantization_config=config_of(trip["name"])
    )
    assert_same_weights(on_arrival, trip["quantized"])
    assert_equal_outputs(on_arrival, trip["quantized"])
    on_arrival.save_pretrained(trip["folder"] / "on-arrival")
    assert contents(trip["folder"] / "on-arrival") == contents(trip["folder"] / "packed")


def test_the_configuration_is_kept_in_config_json(trip):
    written = json.loads((trip["folder"] / "packed" / "config.json").read_text())
    assert written["architectures"] == [type(trip["float"]).__name__]
    mine = written["quantization_config"]
    assert mine["quant_method"] == "lexibit"
    assert LexibitConfig(**mine).to_dict() == config_of(trip["name"]).to_dict()
    assert trip["loaded"].config.quantization_config.to_dict() == config_of(trip["name"]).to_dict()


def test_shards_load_as_the_one_file_does(trip):
    trip["quantized"].save_pretrained(trip["folder"] / "shards", max_shard_size="3KB")
    assert len(list((trip["folder"] / "shards").glob("*.safetensors"))) > 2
    loaded = trip["auto"].from_pretrained(trip["folder"] / "shards")
    assert_same_weights(loaded, trip["quantized"])
    assert_equal_outputs(loaded, trip["quantized"])


def test_float_shards_are_quantized_while_loading_as_the_one_file_is(trip):
    trip["float"].save_pretrained(trip["folder"] / "float-shards", max_shard_size="9KB")
    assert len(list((trip["folder"] / "float-shards").glob("*.safetensors"))) > 2
    loaded = trip["auto"].from_pretrained(
        trip["folder"] / "float-shards", quantization_config=config_of(trip["name"])
    )
    assert_same_weights(loaded, trip["quantized"])


def test_a_model_loads_in_bfloat16(trip):
    loaded = trip["auto"].from_pretrained(trip["folder"] / "packed", dtype=torch.bfloat16)
    ours, theirs = codebooks(loaded), codebooks(trip["quantized"])
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.codes, theirs[name].codes)
        assert weight.decode().dtype == torch.bfloat16
        assert torch.equal(weight.levels, theirs[name].levels.bfloat16())
    plain = copy.deepcopy(loaded)
    lexibit.dequantize(plain)
    assert_equal_outputs(loaded, plain)


@pytest.mark.usefixtures("exact")
def test_a_loaded_model_dequantizes_itself_into_a_model_that_saves_as_float(trip):
    model = copy.deepcopy(trip["loaded"])
    assert codebooks(model)
    model.save_pretrained(trip["folder"] / "saved-before")  # which may change the model's config
    model.dequantize()
    assert not codebooks(model)
    assert_equal_outputs(model, trip["loaded"])
    model.save_pretrained(trip["folder"] / "dequantized")
    config = json.loads((trip["folder"] / "dequantized" / "config.json").read_text())
    assert "quantization_config" not in config
    again = trip["auto"].from_pretrained(trip["folder"] / "dequantized")
    assert not codebooks(again)
    assert_equal_outputs(again, trip["loaded"])


# what single architectures have of their own -----------------------------------------------------------


def quantized_folder(model, folder, **changes):
    plan = lexibit.quantize(model, LexibitConfig(**{"scheme": "linear", "bits": 4} | changes), progress=False)
    model.save_pretrained(folder)
    return plan


def test_alberts_shared_layers_are_stored_once(tiny_model, tmp_path):
    sizes = []
    for layers in (2, 8):
        model = tiny_model("albert-mlm", num_hidden_layers=layers)
        floats = sum(parameter.numel() for parameter in model.parameters())
        matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
        quantized_folder(model, tmp_path / str(layers))
        sizes.append((tmp_path / str(layers) / "model.safetensors").stat().st_size)
        header = 1000 + 300 * len(stored(tmp_path / str(layers)))
        assert sizes[-1] <= matrices / 2 + 64 * len(codebooks(model)) + 4 * (floats - matrices) + header
    assert sizes[0] == sizes[1]


@pytest.mark.usefixtures("exact")
def test_longformers_global_attention_is_quantized_and_runs(tiny_model, tmp_path):
    model = tiny_model("longformer")
    quantized_folder(model, tmp_path / "packed")
    loaded = AutoModel.from_pretrained(tmp_path / "packed")
    attention = loaded.encoder.layer[0].attention.self
    for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
        assert isinstance(getattr(attention, name), Quantized), name
    given = inputs_of(loaded)
    given["global_attention_mask"] = torch.zeros_like(given["input_ids"])
    given["global_attention_mask"][:, 0] = 1
    with torch.inference_mode():
        ours = loaded(**given).last_hidden_state
        assert not torch.equal(ours, loaded(**inputs_of(loaded)).last_hidden_state)
        assert torch.equal(ours, model(**given).last_hidden_state)
        lexibit.dequantize(loaded)
        assert torch.equal(ours, loaded(**given).last_hidden_state)


def test_marians_sinusoidal_positions_stay_as_they_are(tiny_model, tmp_path):
    model = tiny_model("marian")
    positions = model.model.encoder.embed_positions.weight.detach().clone()
    position, feature = np.meshgrid(np.arange(len(positions)), np.arange(12), indexing="ij")
    angles = position / 10000 ** (2 * feature / 24)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(positions.numpy(), expected, atol=1e-6)
    quantized_folder(model, tmp_path / "packed")
    loaded = transformers.MarianMTModel.from_pretrained(tmp_path / "packed")
    assert codebooks(loaded)
    for side in (loaded.model.encoder, loaded.model.decoder):
        assert isinstance(side.embed_positions.weight, torch.nn.Parameter)
        assert torch.equal(side.embed_positions.weight, positions)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "marian"])
def test_generation_runs_from_codes_and_gives_what_the_dequantized_model_gives(tiny_model, tmp_path, name):
    model = tiny_model(name)
    quantized_folder(model, tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed")
    assert codebooks(loaded)
    ids = torch.randint(5, 97, (2, 6), generator=torch.Generator().manual_seed(2))
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    how["attention_mask"] = torch.ones_like(ids)
    ours = loaded.generate(ids, **how)
    assert ours.shape[1] >= 8
    lexibit.dequantize(loaded)
    assert torch.equal(ours, loaded.generate(ids, **how))


# other ways to load --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-mlm", "albert-mlm", "roberta-mlm", "distilbert-mlm", "gpt2"])
def test_a_model_with_a_head_loads_as_its_base_class(tiny_model, tmp_path, name):
    model = tiny_model(name)
    quantized_folder(model, tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert type(base) is type(model.base_model)
    inside = codebooks(model.base_model)
    ours = codebooks(base)
    assert len(ours) >= 10
    for weight_name, weight in ours.items():
        assert torch.equal(weight.codes, inside[weight_name].codes)
    given = {key: value for key, value in inputs_of(base).items() if key != "decoder_input_ids"}
    with torch.inference_mode():
        expected = model.base_model(**given).last_hidden_state
        assert torch.equal(base(**given).last_hidden_state, expected)


def test_a_base_model_loads_under_a_fresh_head_and_ties_it(tiny_model, tmp_path):
    model = tiny_model("bert")
    quantized_folder(model, tmp_path / "packed")
    loaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert any("predictions.transform" in key for key in report["missing_keys"])
    words = loaded.bert.embeddings.word_embeddings
    assert isinstance(words, Quantized)
    assert loaded.cls.predictions.decoder.weight_codebook is words.weight_codebook
    with torch.inference_mode():
        hidden = loaded.bert(**inputs_of(loaded)).last_hidden_state
        assert torch.equal(hidden, model(**inputs_of(model)).last_hidden_state)
        assert loaded(**inputs_of(loaded)).logits.shape == (2, 11, 97)


def test_heads_that_the_float_checkpoint_lacks_are_made_and_quantized(tiny_model, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "float")
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "float",
        quantization_config=LexibitConfig(scheme="linear", heads=True),
        output_loading_info=True,
    )
    assert "classifier.weight" in report["missing_keys"]
    head = loaded.classifier
    assert isinstance(head, Quantized)
    decoded = head.weight
    assert decoded.isfinite().all()
    assert 0 < decoded.abs().max() < 0.2  # BERT initialises with a deviation of 0.02
    assert all(isinstance(m, Quantized) for m in loaded.modules() if isinstance(m, torch.nn.Linear))
    loaded.save_pretrained(tmp_path / "packed")
    again = type(loaded).from_pretrained(tmp_path / "packed")
    assert_same_weights(again, loaded)
    assert_equal_outputs(again, loaded)


def test_a_tied_weight_that_the_checkpoint_gives_twice_with_other_values_is_refused(tiny_model, tmp_path):
    # saved untied, loaded by a config that ties
    tiny_model("llama").save_pretrained(tmp_path / "float")
    config = tmp_path / "float" / "config.json"
    values = json.loads(config.read_text())
    assert values["tie_word_embeddings"] is False
    config.write_text(json.dumps(values | {"tie_word_embeddings": True}))
    with pytest.raises(LexibitError) as caught:
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=LexibitConfig(scheme="linear")
        )
    for said in ("lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings=False"):
        assert said in str(caught.value)
    # and the remedy that it names works
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config=LexibitConfig(scheme="linear"),
        tie_word_embeddings=False,
    )
    assert loaded.lm_head.weight_codebook is not loaded.model.embed_tokens.weight_codebook


def test_a_tied_weight_that_the_checkpoint_gives_twice_alike_is_one_weight(tiny_model, tmp_path):
    model = tiny_model("llama-tied")
    model.save_pretrained(tmp_path / "float")
    tensors = load_file(tmp_path / "float" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=LexibitConfig(scheme="linear")
    )
    assert loaded.lm_head.weight_codebook is loaded.model.embed_tokens.weight_codebook
    lexibit.quantize(model, LexibitConfig(scheme="linear"), progress=False)
    assert_same_weights(loaded, model)


def test_a_float_checkpoint_with_weights_that_are_not_finite_is_refused_by_name(tiny_model, tmp_path):
    model = tiny_model("bert")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(LexibitError, match=r"encoder\.layer\.1\.output\.dense\.weight.*row 3, column 4"):
        AutoModel.from_pretrained(tmp_path / "float", quantization_config=LexibitConfig(scheme="linear"))


def test_a_pattern_that_matches_nothing_is_refused_while_loading(tiny_model, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "float")
    with pytest.raises(LexibitError, match=r"exclude.*\*\.qery.*weight"):
        AutoModel.from_pretrained(tmp_path / "float", quantization_config=LexibitConfig(exclude=["*.qery"]))


# damaged folders ---------------------------------------------------------------------------------------


@pytest.fixture
def packed(tiny_model, tmp_path):
    """A folder of several shards."""
    quantized_folder(tiny_model("bert-mlm"), tmp_path / "one")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "packed", max_shard_size="3KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    return tmp_path / "packed"


def change(folder, name, how):
    """Change one tensor of a folder."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = how(tensors[name])
            save_file(tensors, path, metadata=metadata)
            return
    raise AssertionError(name)


WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_shard_is_refused(packed, which, share):
    shard = sorted(packed.glob("*.safetensors"))[which]
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError, match=shard.name) as caught:
        AutoModelForMaskedLM.from_pretrained(packed)
    assert "copy or download" in str(caught.value)


def test_levels_that_are_not_finite_are_refused(packed):
    change(packed, WORDS + "_levels", lambda levels: levels.fill_(float("nan")))
    with pytest.raises(FormatError, match=WORDS):
        AutoModelForMaskedLM.from_pretrained(packed)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (WORDS, lambda codes: codes[:-1].clone()),
        (WORDS, lambda codes: codes.to(torch.int8)),
        (WORDS + "_levels", lambda levels: levels[:, :-1].clone()),
        (WORDS + "_levels", lambda levels: levels.double()),
    ],
)
def test_codes_and_levels_that_are_not_what_the_index_says_are_refused(packed, name, how):
    change(packed, name, how)
    with pytest.raises(FormatError, match=name):
        AutoModelForMaskedLM.from_pretrained(packed)


def test_a_folder_whose_shape_is_not_that_of_its_config_is_refused(packed):
    config = packed / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 96}))
    with pytest.raises(FormatError, match=r"word_embeddings.*\[97, 24\].*\[96, 24\]"):
        AutoModelForMaskedLM.from_pretrained(packed)


def test_a_float_folder_that_claims_to_be_quantized_is_refused(tiny_model, packed, tmp_path):
    tiny_model("bert-mlm").save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text((packed / "config.json").read_text())
    with pytest.raises(FormatError, match="holds no weights in codes"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "float")


def test_a_quantized_folder_whose_config_does_not_say_so_does_not_load(packed):
    config = packed / "config.json"
    values = json.loads(config.read_text())
    del values["quantization_config"]
    config.write_text(json.dumps(values))
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        AutoModelForMaskedLM.from_pretrained(packed)


def test_a_config_with_an_option_that_does_not_exist_is_refused(packed):
    config = packed / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"]["bitts"] = 3
    config.write_text(json.dumps(values))
    with pytest.raises(LexibitError, match=r"bitts.*bits"):
        AutoModelForMaskedLM.from_pretrained(packed)


# in processes of their own ---------------------------------------------------------------------------


def python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_without_lexibit_a_quantized_folder_fails_to_load(tiny_model, tmp_path):
    names = ["bert-mlm", "gpt2", "llama-tied"]
    for name in names:
        quantized_folder(tiny_model(name), tmp_path / name)
    done = python(
        """
        import sys
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
        assert "lexibit" not in sys.modules
        for folder in sys.argv[1:]:
            head = AutoModelForMaskedLM if "bert" in folder else AutoModelForCausalLM
            for auto in (AutoModel, head):
                try:
                    auto.from_pretrained(folder)
                except Exception as error:
                    print("refused", type(error).__name__)
                else:
                    print("LOADED", folder, auto)
        """,
        *(tmp_path / name for name in names),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["refused"] * (2 * len(names)), done.stdout


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_less_than_half_of_the_float_models_memory(tiny_model, tmp_path):
    model = tiny_model("bert", vocab_size=70_000, hidden_size=256)
    model.save_pretrained(tmp_path / "float")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert 60e6 < size < 100e6
    quantized_folder(model, tmp_path / "packed")
    quantized_folder(tiny_model("bert"), tmp_path / "small")
    done = python(
        """
        import json, re, sys
        import lexibit
        from lexibit.nn import codebooks
        from transformers import AutoModel

        def memory(field):
            return 1024 * int(re.search(field + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

        def rise(folder):
            open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
            before = memory("VmRSS")
            model = AutoModel.from_pretrained(folder)
            # what was only mapped from the file so far
            touched = max(float(tensor.max()) for tensor in model.state_dict().values())
            return memory("VmHWM") - before, len(codebooks(model))

        small, packed, floats = sys.argv[1:]
        rise(small)  # what the first model loads of libraries
        print(json.dumps([rise(packed), rise(floats)]))
        """,
        tmp_path / "small",
        tmp_path / "packed",
        tmp_path / "float",
    )
    assert done.returncode == 0, done.stderr
    (packed, weights), (floats, none) = json.loads(done.stdout)
    assert weights >= 10
    assert none == 0
    assert floats > 0.75 * size  # the measurement sees a model that is loaded in full
    assert packed < size / 2


# sentence-transformers -------------------------------------------------------------------------------


def test_sentence_transformers_loads_and_saves_a_quantized_folder(float_folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    inner = Transformer(str(float_folder("bert")))
    pooling = Pooling(24, pooling_mode="mean")
    sentence_transformers.SentenceTransformer(modules=[inner, pooling], device="cpu").save(
        str(tmp_path / "st")
    )
    lexibit.checkpoint.quantize_to(
        tmp_path / "st", tmp_path / "packed", LexibitConfig(scheme="linear"), progress=False
    )
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert codebooks(loaded)
    texts = ["w5 w6 w7", "w8", "w9 w10 w11 w12"]
    ours = loaded.encode(texts)
    model = AutoModel.from_pretrained(tmp_path / "packed")
    batch = loaded.tokenize(texts)
    with torch.inference_mode():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    mask = batch["attention_mask"][..., None]
    np.testing.assert_allclose(ours, ((hidden * mask).sum(1) / mask.sum(1)).numpy(), rtol=1e-5, atol=1e-6)
    loaded.save(str(tmp_path / "again"))
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "packed").keys()
    for name, tensor in stored(tmp_path / "packed").items():
        assert torch.equal(stored(tmp_path / "again")[name], tensor)
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert codebooks(again)
    np.testing.assert_array_equal(again.encode(texts), ours)


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "llama-tied", "marian", "distilbert-mlm", "albert-mlm"])
def test_tying_again_leaves_a_quantized_model_as_it_is(tiny_model, name):
    model = tiny_model(name)
    lexibit.quantize(model, LexibitConfig(bits=4), progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.tie_weights()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_embeddings_of_a_quantized_model_are_not_resized_in_silence(tiny_model, tmp_path):
    model = tiny_model("bert-mlm")
    rows = model.config.vocab_size
    lexibit.quantize(model, LexibitConfig(bits=4), progress=False)
    model.save_pretrained(tmp_path)
    for quantized in (model, type(model).from_pretrained(tmp_path)):
        with pytest.raises(LexibitError, match="dequantize"):
            quantized.resize_token_embeddings(rows + 3)
    lexibit.dequantize(model)
    model.resize_token_embeddings(rows + 3)
    assert model.get_input_embeddings().weight.shape[0] == rows + 3


def test_a_checkpoint_of_other_shapes_is_not_quantized_in_silence(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(LexibitError, match=r"word_embeddings\.weight is \[\d+, \d+\] in the checkpoint"):
        type(model).from_pretrained(
            tmp_path, vocab_size=model.config.vocab_size - 7, quantization_config=LexibitConfig(bits=4)
        )


def test_levels_never_overwrite_a_parameter_of_the_same_name():
    class Clash(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.weight_levels = torch.nn.Parameter(torch.ones(3))

    model = torch.nn.Sequential(Clash())
    with pytest.raises(LexibitError, match="weight_levels"):
        lexibit.quantize(model, LexibitConfig(bits=2), progress=False)


# corrections ------------------------------------------------------------------------------------------

CORRECTED = {
    "bert-mlm": LexibitConfig("ocs", 4, options={"ratio": 0.1}),
    "albert-mlm": LexibitConfig("ocs", 3, "row", {"ratio": 0.2, "clip": "mse"}),
    "gpt2": LexibitConfig("ocs", 4, options={"ratio": 0.1}),
    "llama-tied": LexibitConfig("binary", 3, importance="E=1,P=0.1,mask"),
    "distilbert-classifier": LexibitConfig("kmeans", 2, importance="E=0.5,C=0.99,P=0.2,mask"),
}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", CORRECTED)
def test_split_channels_and_masks_survive_saving_and_loading(tiny_model, tmp_path, name, shards):
    model = tiny_model(name)
    lexibit.quantize(model, CORRECTED[name], progress=False)
    model.save_pretrained(tmp_path, max_shard_size="2KB" if shards else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(loaded, model)
    parts = {part for weight in codebooks(loaded).values() for part in weight.spec.parts}
    corrections = parts - {"codes", "levels"}
    assert corrections == ({"origins"} if CORRECTED[name].scheme == "ocs" else {"mask"})
    for part in corrections:
        for key, weight in codebooks(loaded).items():
            assert torch.equal(getattr(weight, part), getattr(codebooks(model)[key], part))
    assert_equal_outputs(loaded, model)
    before, index = stored(tmp_path), index_of(tmp_path)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="2KB" if shards else "5GB")
    after = stored(tmp_path / "again")
    assert index_of(tmp_path / "again") == index
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    lexibit.dequantize(loaded)
    assert_equal_outputs(loaded, model)


def test_gpt2s_conv1d_has_extra_rows_and_its_embeddings_extra_columns(tiny_model):
    model = tiny_model("gpt2")
    lexibit.quantize(model, CORRECTED["gpt2"], progress=False)
    extra = {name: weight.spec.extra for name, weight in codebooks(model).items()}
    assert extra["transformer.h.0.mlp.c_fc.weight"] == (3, 0)
    assert extra["transformer.wte.weight"] == (0, 3)


def test_importance_is_saved_with_the_configuration_and_works_while_loading(tiny_model, tmp_path):
    model, config = tiny_model("bert-mlm"), LexibitConfig("binary", 3, importance="E=1,C=0.9")
    model.save_pretrained(tmp_path / "float")
    lexibit.quantize(model, config, progress=False)
    model.save_pretrained(tmp_path / "packed")
    record = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (record["scheme"], record["importance"]) == ("binary", "E=1,C=0.9")
    loading = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    assert_same_weights(loading, model)
    plain = tiny_model("bert-mlm")
    lexibit.quantize(plain, LexibitConfig("binary", 3), progress=False)
    some = next(iter(codebooks(model)))
    assert not torch.equal(codebooks(plain)[some].levels, codebooks(model)[some].levels)


def test_a_loaded_weight_that_was_trained_is_so_again_when_dequantized(tiny_model, tmp_path):
    model = tiny_model("bert")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    quantized_folder(model, tmp_path / "packed")
    loaded = AutoModel.from_pretrained(tmp_path / "packed")
    with torch.inference_mode():
        lexibit.dequantize(loaded)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    loaded(**inputs_of(loaded))[0].square().sum().backward()
    assert loaded.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
