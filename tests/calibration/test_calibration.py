"""Calibration of whole models: that it happens, in order, for every kind of layer, and helps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import lexibit
from lexibit import Calibration, Effort, LexibitConfig, LexibitError
from lexibit.calibration import gather, load_moments, of_task, of_texts, save_moments
from lexibit.calibration.route import find_route
from lexibit.nn import codebooks
from lexibit.plan import Plan

CONFIG = LexibitConfig(bits=2, groups="row")
MODELS = [
    "bert-mlm",
    "bert-classifier",
    "albert-mlm",
    "distilbert-classifier",
    "roberta-qa",
    "longformer",
    "gpt2",
    "marian",
    "llama",
    "llama-tied",
]


def batches(name: str, count: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Texts of several lengths, padded."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = 8 + number
        ids = torch.randint(5, 97, (4, length), generator=draw)
        mask = torch.ones_like(ids)
        for row in range(1, 4):
            ids[row, length - row :], mask[row, length - row :] = 0, 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if name == "marian":
            inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        found.append(inputs)
    return found


def outputs(model: Any, inputs: list[dict[str, Tensor]]) -> Tensor:
    """What a model gives in all places that are no padding."""
    found = []
    with torch.no_grad():
        for batch in inputs:
            out = model(**batch)
            first = next(
                getattr(out, n) for n in ("logits", "start_logits", "last_hidden_state") if hasattr(out, n)
            )
            if first.shape[:2] == batch["attention_mask"].shape:
                first = first[batch["attention_mask"].bool()]
            found.append(first.reshape(-1))
    return torch.cat(found)


def loss(model: Any, wanted: Tensor, inputs: list[dict[str, Tensor]]) -> float:
    return float((outputs(model, inputs) - wanted).double().square().sum() / wanted.double().square().sum())


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_calibrated_and_outputs_are_nearer(tiny_model: Any, name: str) -> None:
    inputs = batches(name)
    model, plain = tiny_model(name), tiny_model(name)
    wanted = outputs(model, inputs)
    lexibit.quantize(plain, CONFIG, progress=False)
    calibration = Calibration(inputs)
    plan = lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    told = {one.name: one for one in calibration.weights}
    assert set(told) == {weight.name for weight in plan.weights} == set(codebooks(model))
    for weight in plan.weights:
        one = told[weight.name]
        if weight.kind == "embedding":
            assert one.before is None
            assert "looked up" in one.why_not
            continue
        if one.why_not:
            # Longformer's projections for global attention do not run without it
            assert "global" in one.name or "pooler" in one.name
            continue
        assert one.before is not None
        assert one.after is not None
        assert one.after < one.before
        assert one.inputs > 0
    assert loss(model, wanted, inputs) < loss(plain, wanted, inputs)


def test_albert_gathers_all_uses_of_a_shared_layer(tiny_model: Any) -> None:
    inputs = batches("albert-mlm", count=2)
    model = tiny_model("albert-mlm", num_hidden_layers=3)
    calibration = Calibration(inputs)
    lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in inputs)
    found = {one.name: one.inputs for one in calibration.weights if "attention.query" in one.name}
    assert list(found.values()) == [3 * tokens]


def test_padding_does_not_count(tiny_model: Any) -> None:
    longer = []
    for batch in batches("bert-mlm"):
        pad = torch.zeros(4, 5, dtype=torch.int64)
        longer.append({name: torch.cat([value, pad], 1) for name, value in batch.items()})
    found = []
    for inputs in (batches("bert-mlm"), longer):
        calibration = Calibration(inputs)
        lexibit.quantize(tiny_model("bert-mlm"), CONFIG, calibration=calibration, progress=False)
        found.append([(one.name, one.inputs) for one in calibration.weights if "position" not in one.name])
    assert found[0] == found[1]


def test_layers_see_what_the_quantized_ones_in_front_give(tiny_model: Any) -> None:
    model = tiny_model("bert-mlm")
    inputs = batches("bert-mlm", count=3)
    names = [name for name, _ in model.named_modules() if name.endswith("layer.1.output.dense")]
    effort = Effort(correction=0.0, damping=1e-3)
    lexibit.quantize(model, CONFIG, calibration=Calibration(inputs, effort), progress=False)
    seen: list[Tensor] = []
    module = model.get_submodule(names[0])
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(model, inputs)
    hook.remove()
    x = torch.cat([one[batch["attention_mask"].bool()] for one, batch in zip(seen, inputs, strict=True)])
    moments = lexibit.refine.Moments(x.T @ x, None, len(x))
    value = tiny_model("bert-mlm").get_submodule(names[0]).weight
    again = lexibit.quantize_tensor(value, CONFIG.recipe(), moments=moments, effort=effort)
    # the codes that the final model's own inputs ask for
    same = (again.unpacked_codes() == codebooks(model)[f"{names[0]}.weight"].unpacked_codes()).float().mean()
    assert same > 0.99


def test_a_route_skips_what_was_passed(tiny_model: Any) -> None:
    model = tiny_model("bert-mlm")
    batch = batches("bert-mlm", count=1)[0]
    way = find_route(model, Plan.of(model, CONFIG).weights, [lambda: model(**batch)])
    assert [len(chain) for chain in way.chains] == [2]
    assert not way.missed
    points = [stage.point for stage in way.stages]
    assert points == sorted(points)
    assert {point[0] for point in points} == {0, 1, 2}
    together = [{w.name.split(".")[-2] for w in stage.weights} for stage in way.stages]
    assert {"query", "key", "value"} in together


def test_a_weight_that_never_runs_is_quantized_and_told_of(tiny_model: Any) -> None:
    model = tiny_model("bert")
    model.idle = nn.Linear(24, 24)
    calibration = Calibration(batches("bert"))
    plan = lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    assert "idle.weight" in {weight.name for weight in plan.weights}
    (idle,) = [one for one in calibration.weights if one.name == "idle.weight"]
    assert idle.why_not == "no text came to it"
    assert "idle.weight" in codebooks(model)


def test_weights_whose_importance_is_given_keep_to_it(tiny_model: Any) -> None:
    config = LexibitConfig(bits=2, rules={"*.query": {"importance": "E=1,C=0.9"}})
    calibration = Calibration(batches("bert"))
    model = tiny_model("bert")
    lexibit.quantize(model, config, calibration=calibration, progress=False)
    assert sum("importance" in one.why_not for one in calibration.weights) == 2
    plain = tiny_model("bert")
    lexibit.quantize(plain, config, progress=False)
    name = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(codebooks(model)[name].codes, codebooks(plain)[name].codes)


def test_recurrent_layers_know_their_states(tiny_model: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(97, 12)
            self.first = nn.LSTM(12, 16, batch_first=True)
            self.second = nn.GRU(16, 12)
            self.two = nn.LSTM(12, 12, num_layers=2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.first(self.words(input_ids))[0].transpose(0, 1)
            return self.two(self.second(hidden)[0])[0]

    torch.manual_seed(0)
    model = Recurrent().eval()
    calibration = Calibration(batches("bert"))
    lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    told = {one.name: one for one in calibration.weights}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches("bert"))
    assert told["first.weight_ih_l0"].inputs == told["second.weight_ih_l0"].inputs == tokens
    assert told["first.weight_hh_l0"].inputs == tokens - 4 * 6  # the first states are zero
    assert told["second.weight_hh_l0"].after < told["second.weight_hh_l0"].before  # type: ignore[operator]
    assert "one layer" in told["two.weight_ih_l1"].why_not


def test_rows_that_share_levels_count_by_how_often_they_are_looked_up(tiny_model: Any) -> None:
    seen = torch.arange(5, 25).repeat(4, 1)
    inputs = [{"input_ids": seen, "attention_mask": torch.ones_like(seen)}] * 50
    config = LexibitConfig(bits=2, groups="matrix", include=["*word_embeddings*"])
    errors = []
    for calibration in (None, Calibration(inputs)):
        model = tiny_model("bert")
        before = model.embeddings.word_embeddings.weight.detach().clone()
        lexibit.quantize(model, config, calibration=calibration, progress=False)
        lost = (model.embeddings.word_embeddings.weight - before).square().mean(1)
        errors.append(float(lost[5:25].mean()))
    assert errors[1] < errors[0]


def test_threads_do_not_change_a_model(tiny_model: Any) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            model = tiny_model("bert-mlm")
            lexibit.quantize(model, CONFIG, calibration=Calibration(batches("bert-mlm")), progress=False)
            assert torch.get_num_threads() == threads
            found.append([tensor for w in codebooks(model).values() for tensor in (w.codes, w.levels)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_failure_leaves_the_model_as_it_was(tiny_model: Any) -> None:
    model = tiny_model("bert-classifier")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.LayerNorm.bias[0] = torch.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    wrong = r"layer\.0\.intermediate\.dense\.weight: the moments .* NaN or infinite"
    with pytest.raises(LexibitError, match=wrong):
        lexibit.quantize(model, CONFIG, calibration=Calibration(batches("bert")), progress=False)
    assert model.training
    assert not codebooks(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_weights_that_are_no_numbers_are_told_before_anything_runs(tiny_model: Any) -> None:
    model = tiny_model("bert-mlm")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = torch.nan
    with pytest.raises(LexibitError, match=r"layer\.1\.output\.dense\.weight: 1 of its"):
        lexibit.quantize(model, CONFIG, calibration=Calibration(batches("bert-mlm")), progress=False)


def test_nothing_to_calibrate_on_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(LexibitError, match="nothing to calibrate on"):
        Calibration([])
    with pytest.raises(LexibitError, match="nothing to calibrate on"):
        of_texts(tiny_model("bert"), tiny_tokenizer(), ["", "  "])


def test_importances_and_calibration_at_once_are_refused(tiny_model: Any) -> None:
    model = tiny_model("bert")
    name = "encoder.layer.0.output.dense.weight"
    given = {name: torch.ones_like(model.get_parameter(name))}
    with pytest.raises(LexibitError, match="both importances and calibration"):
        lexibit.quantize(
            model, CONFIG, importances=given, calibration=Calibration(batches("bert")), progress=False
        )


def test_texts_become_batches_no_longer_than_the_model_takes(tiny_model: Any, tiny_tokenizer: Any) -> None:
    texts = [" ".join(f"w{5 + (k + n) % 90}" for k in range(n)) for n in (3, 60, 10)] + [""]
    found = of_texts(tiny_model("bert"), tiny_tokenizer(), texts)
    assert sum(len(batch["input_ids"]) for batch in found) == 3
    assert max(batch["input_ids"].shape[1] for batch in found) == 40
    few = of_texts(tiny_model("bert"), tiny_tokenizer(), texts, limit=2, max_length=7)
    assert sum(len(batch["input_ids"]) for batch in few) == 2
    assert max(batch["input_ids"].shape[1] for batch in few) <= 7
    assert "decoder_input_ids" in of_texts(tiny_model("marian"), tiny_tokenizer(), texts)[0]


def test_a_tasks_labels_are_not_looked_at(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "SST-2"
    folder.mkdir()
    rows = [f"w{n} w{n + 1}\t{n % 2}" for n in range(5, 25)]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    found = of_task(tiny_model("bert-classifier"), tiny_tokenizer(), "sst-2", tmp_path, limit=7)
    assert all("labels" not in batch for batch in found)
    assert sum(len(batch["input_ids"]) for batch in found) == 7


_SCRIPT = """
import sys, torch, transformers, lexibit
from lexibit import Calibration, LexibitConfig
transformers.utils.logging.disable_progress_bar()
folder, out = sys.argv[1:3]
model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
torch.manual_seed(0)
ids = [torch.randint(5, 97, (4, 12)) for _ in range(6)]
batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
calibration = Calibration(batches, folder=__import__("pathlib").Path(out + ".kept"))
lexibit.quantize(model, LexibitConfig(bits=2, groups="row"), calibration=calibration, progress=False)
model.save_pretrained(out)
"""


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("bert-mlm", num_hidden_layers=8).save_pretrained(tmp_path / "float")

    def start(out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(tmp_path / "float"), str(tmp_path / out)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    kept = tmp_path / "killed.kept"
    for wanted in (3, 9):
        run = start("killed")
        while run.poll() is None and len(list(kept.glob("*.json")) if kept.exists() else []) < wanted:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
    finished = len(list(kept.glob("*.safetensors")))
    # a half-written file of a stage without its record does not count
    (kept / "0123456789abcdef.safetensors").write_bytes(b"half")
    again, whole = start("killed"), start("whole")
    told = again.communicate()[1]
    assert again.returncode == 0, told
    assert "goes on" in told
    assert finished >= 8
    told = whole.communicate()[1]
    assert whole.returncode == 0, told
    name = "model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_calibration_begins_anew_and_says_so(tiny_model: Any, tmp_path: Path, caplog: Any) -> None:
    kept = tmp_path / "kept"
    for bits in (2, 3):
        calibration = Calibration(batches("bert"), folder=kept)
        model = tiny_model("bert")
        lexibit.quantize(model, LexibitConfig(bits=bits), calibration=calibration, progress=False)
        assert {weight.spec.bits for weight in codebooks(model).values()} == {bits}
    assert "begins anew" in caplog.text


def test_a_folder_of_something_else_is_not_touched(tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LexibitError, match="holds something else"):
        lexibit.quantize(
            tiny_model("bert"),
            CONFIG,
            calibration=Calibration(batches("bert"), folder=tmp_path),
            progress=False,
        )
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_command_calibrates_and_tells_of_each_weight(
    float_folder: Any, tmp_path: Path, run_json: Any
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{5 + (7 * n + k) % 90}" for k in range(9)) for n in range(40)))
    out = tmp_path / "out"
    done = run_json("quantize", float_folder(), out, "--bits", "2", "--calibrate", text)
    told = json.loads((out / "calibration.json").read_text())
    assert {one["name"] for one in told} == {weight["name"] for weight in done["weights"]}
    assert any(one["after"] and one["after"] < one["before"] for one in told)
    assert not list(tmp_path.glob(".out*"))


def test_moments_are_gathered_once_for_many_quantizations(
    float_folder: Any, tmp_path: Path, run: Any, run_json: Any, fails: Any
) -> None:
    folder, text, file = float_folder(), tmp_path / "text.txt", tmp_path / "moments.safetensors"
    text.write_text("\n".join(" ".join(f"w{5 + (7 * n + k) % 90}" for k in range(9)) for n in range(40)))
    assert run("moments", folder, file, "--calibrate", text)[0] == 0
    for bits in (2, 3):
        out = tmp_path / f"out{bits}"
        run_json("quantize", folder, out, "--bits", bits, "--calibrate", file)
        told = json.loads((out / "calibration.json").read_text())
        assert all(one["after"] < one["before"] for one in told if one["before"])
        assert sum(one["before"] is not None for one in told) == 13
    assert "exists already" in fails("moments", folder, file, "--calibrate", text)
    no = tmp_path / "no"
    assert "limits nothing now" in fails("quantize", folder, no, "--calibrate", file, "--length", "9")
    assert "name that with --calibrate" in fails("quantize", folder, no, "--bits", "2", "--texts", "5")
    assert not no.exists()
    assert "no file of moments" in fails(
        "quantize", folder, tmp_path / "no", "--calibrate", folder / "model.safetensors"
    )


def test_gathered_moments_are_those_of_the_float_models_inputs(tiny_model: Any, tmp_path: Path) -> None:
    model, inputs = tiny_model("bert-mlm"), batches("bert-mlm")
    seen: list[Tensor] = []
    module = model.bert.encoder.layer[1].intermediate.dense
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(model, inputs)
    hook.remove()
    x = torch.cat([one[batch["attention_mask"].bool()] for one, batch in zip(seen, inputs, strict=True)])
    found = gather(model, Plan.of(model, CONFIG), inputs, progress=False)
    save_moments(found, tmp_path / "m.safetensors")
    for gathered in (found, load_moments(tmp_path / "m.safetensors")):
        one = gathered["bert.encoder.layer.1.intermediate.dense.weight"]
        assert one.moments is not None
        assert one.count == len(x)
        torch.testing.assert_close(one.moments.second, x.T @ x, rtol=1e-4, atol=1e-3)
        words = gathered["bert.embeddings.word_embeddings.weight"].rows
        assert words is not None
        ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in inputs])
        assert torch.equal(words, torch.bincount(ids, minlength=97))


def test_moments_of_another_model_are_refused(tiny_model: Any) -> None:
    other = tiny_model("llama")
    gathered = gather(other, Plan.of(other, CONFIG), batches("llama"), progress=False)
    with pytest.raises(LexibitError, match="of another model"):
        lexibit.quantize(
            tiny_model("bert"), CONFIG, calibration=Calibration(gathered=gathered), progress=False
        )
    with pytest.raises(LexibitError, match="comes to none of the plan's weights"):
        gather(tiny_model("llama"), Plan.of(other, CONFIG), batches("llama"), progress=False)


@pytest.mark.parametrize("damage", ["record", "half", "missing", "other", "key", "part"])
def test_what_is_kept_and_damaged_is_done_anew(
    tiny_model: Any, tmp_path: Path, caplog: Any, damage: str
) -> None:
    kept = tmp_path / "kept"
    expected = tiny_model("bert")
    lexibit.quantize(expected, CONFIG, calibration=Calibration(batches("bert"), folder=kept), progress=False)
    records = sorted(path for path in kept.glob("*.json") if path.name != "key.json")
    if damage == "record":
        records[0].write_text("{}")
    elif damage == "half":
        file = records[0].with_suffix(".safetensors")
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "missing":
        records[0].with_suffix(".safetensors").unlink()
    elif damage == "other":
        records[0].write_bytes(records[1].read_bytes())
    elif damage == "key":
        (kept / "key.json").write_text('{"ke')
    else:
        (kept / ".key.json.77.part").write_text("")
    caplog.clear()
    model, calibration = tiny_model("bert"), Calibration(batches("bert"), folder=kept)
    lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    assert set(codebooks(model)) == {one.name for one in calibration.weights} == set(codebooks(expected))
    for name, weight in codebooks(model).items():
        assert torch.equal(weight.codes, codebooks(expected)[name].codes)
    assert ("anew" in caplog.text) == (damage != "part")


def test_a_folder_with_a_key_of_something_else_is_not_touched(tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text('{"api": 1}')
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LexibitError, match=r"something else than a calibration, like thesis\.txt"):
        lexibit.quantize(
            tiny_model("bert"), CONFIG, calibration=Calibration(batches("bert"), folder=tmp_path)
        )
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_decoders_padding_is_its_own(tiny_model: Any) -> None:
    ids = torch.randint(5, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    inputs["decoder_attention_mask"] = torch.ones_like(ids)
    calibration = Calibration([inputs])
    lexibit.quantize(tiny_model("marian"), CONFIG, calibration=calibration, progress=False)
    found = {one.name.removeprefix("model."): one.inputs for one in calibration.weights}
    assert found["encoder.layers.0.fc1.weight"] == found["decoder.layers.0.encoder_attn.k_proj.weight"] == 8
    assert found["decoder.layers.0.fc1.weight"] == found["decoder.layers.0.encoder_attn.q_proj.weight"] == 16


def test_moments_of_another_vocabulary_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    other = tiny_model("bert", vocab_size=31)
    ids = torch.arange(5, 25).view(2, 10)
    gathered = gather(other, Plan.of(other, CONFIG), [{"input_ids": ids}], progress=False)
    with pytest.raises(LexibitError, match=r"word_embeddings\.weight: the moments tell of 31 rows"):
        lexibit.quantize(
            tiny_model("bert"), CONFIG, calibration=Calibration(gathered=gathered), progress=False
        )


# blocks ------------------------------------------------------------------------------------------------


def block_outputs(model: nn.Module, given: list[dict[str, Tensor]]) -> list[Tensor]:
    """What the first block gives in each batch, padding left out."""
    found: list[Tensor] = []

    def seen(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    block = model.get_submodule("bert.encoder.layer.0")
    handle = block.register_forward_hook(seen)
    with torch.no_grad():
        for batch in given:
            model(**batch)
    handle.remove()
    return [x[batch["attention_mask"].bool()] for x, batch in zip(found, given, strict=True)]


def test_a_blocks_levels_are_trained_and_its_outputs_are_nearer(tiny_model: Any) -> None:
    name, given = "bert-mlm", batches("bert-mlm", 8)
    expected = block_outputs(tiny_model(name), given)
    found: dict[int, tuple[nn.Module, Calibration, float]] = {}
    for passes in (0, 8):
        model, calibration = tiny_model(name), Calibration(given, Effort(passes=passes))
        lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
        outputs = block_outputs(model, given)
        off = sum(float((a - b).square().mean()) for a, b in zip(outputs, expected, strict=True))
        found[passes] = model, calibration, off / sum(float(b.square().mean()) for b in expected)
    (plain, told_plain, before), (trained, told, after) = found[0], found[8]
    first = [one for one in told.weights if one.block == "bert.encoder.layer.0"]
    assert {one.name for one in first} == {n for n in codebooks(trained) if "encoder.layer.0." in n}
    # the levels, and nothing else
    for key, weight in codebooks(plain).items():
        if "encoder.layer.0." in key:
            assert torch.equal(weight.codes, codebooks(trained)[key].codes)
            assert not torch.equal(weight.levels, codebooks(trained)[key].levels)
    assert {one.block for one in told_plain.weights} == {""}
    # and what is told of them is true
    assert after < 0.99 * before
    for one in first:
        assert one.block_before is not None
        assert one.block_after is not None
        assert one.block_before == pytest.approx(before, rel=1e-4)
        assert one.block_after == pytest.approx(after, rel=1e-4)


def test_trained_levels_are_those_that_are_stored(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("bert-mlm")
    config = LexibitConfig(bits=2, groups="row", levels_dtype="float16")
    lexibit.quantize(model, config, calibration=Calibration(batches("bert-mlm")), progress=False)
    for weight in codebooks(model).values():
        assert torch.equal(weight.levels, weight.levels.half().float())
        assert not isinstance(weight.levels, nn.Parameter)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_levels_that_training_makes_worse_are_not_kept(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, wild = tiny_model("bert-mlm"), tiny_model("bert-mlm")
    given = batches("bert-mlm")
    lexibit.quantize(plain, CONFIG, calibration=Calibration(given, Effort(passes=0)), progress=False)
    monkeypatch.setattr("lexibit.calibration.reconstruction._RATE", 1e3)
    calibration = Calibration(given)
    lexibit.quantize(wild, CONFIG, calibration=calibration, progress=False)
    blocks = [one for one in calibration.weights if one.block]
    assert blocks
    assert all(one.block_before == one.block_after for one in blocks)
    for name, weight in codebooks(plain).items():
        assert torch.equal(weight.levels, codebooks(wild)[name].levels)


@pytest.mark.parametrize("name", ["gpt2", "marian", "llama-tied", "distilbert-classifier", "longformer"])
def test_blocks_of_every_kind_are_trained(tiny_model: Any, name: str) -> None:
    model, calibration = tiny_model(name), Calibration(batches(name))
    lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    trained = {one.block for one in calibration.weights} - {""}
    assert len(trained) == (4 if name == "marian" else 2)
    # a weight that several blocks or the head use is left alone
    assert all(one.name.startswith(f"{one.block}.") for one in calibration.weights if one.block)


def test_a_layer_that_all_blocks_share_is_not_trained(tiny_model: Any) -> None:
    calibration = Calibration(batches("albert-mlm"))
    lexibit.quantize(tiny_model("albert-mlm"), CONFIG, calibration=calibration, progress=False)
    assert {one.block for one in calibration.weights} == {""}


def test_what_is_kept_of_a_block_goes_on(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    given, kept = batches("bert-mlm"), tmp_path / "kept"
    whole = tiny_model("bert-mlm")
    lexibit.quantize(whole, CONFIG, calibration=Calibration(given, folder=kept), progress=False)

    def never(*_: Any) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr("lexibit.calibration.gathering.reconstruct", never)
    again, calibration = tiny_model("bert-mlm"), Calibration(given, folder=kept)
    lexibit.quantize(again, CONFIG, calibration=calibration, progress=False)
    assert len({one.block for one in calibration.weights} - {""}) == 2
    for name, weight in codebooks(whole).items():
        assert torch.equal(weight.levels, codebooks(again)[name].levels)
    monkeypatch.undo()
    # of other codes it is not taken
    told = {path: path.read_text() for path in kept.glob("*.json")}
    record = next(path for path in told if '"block": "bert.encoder.layer.0"' in told[path])
    stage = next(path for path in told if path != record and "layer.0.attention.self.query" in told[path])
    other = tiny_model("bert-mlm")
    with torch.no_grad():
        other.get_parameter("bert.encoder.layer.0.attention.self.query.weight").neg_()
    third = tmp_path / "third"
    lexibit.quantize(other, CONFIG, calibration=Calibration(given, folder=third), progress=False)
    theirs = (third / stage.name).with_suffix(".safetensors")
    stage.with_suffix(".safetensors").write_bytes(theirs.read_bytes())
    caplog.clear()
    last = Calibration(given, folder=kept)
    lexibit.quantize(tiny_model("bert-mlm"), CONFIG, calibration=last, progress=False)
    assert "block bert.encoder.layer.0 is of other codes: done anew" in caplog.text


def test_a_block_waits_for_what_lies_in_front_of_it(tiny_model: Any) -> None:
    # keys and values of a later layer's attention to the encoder are known before the earlier layer is done
    name, given = "marian", batches("marian")
    later = ["*decoder.layers.1.encoder_attn.k_proj*", "*decoder.layers.1.encoder_attn.v_proj*"]
    found = {}
    for include in (["*decoder.layers.0.*"], ["*decoder.layers.0.*", *later]):
        model, calibration = tiny_model(name), Calibration(given)
        config = LexibitConfig(bits=2, groups="row", include=include)
        lexibit.quantize(model, config, calibration=calibration, progress=False)
        blocks = {one.block: (one.block_before, one.block_after) for one in calibration.weights}
        found[len(include)] = codebooks(model), blocks
    (alone, first), (both, second) = found[1], found[3]
    block = next(name for name in first if name.endswith("decoder.layers.0"))
    assert second[block] == first[block]
    assert any(name.endswith("decoder.layers.1") for name in second)
    for key, weight in alone.items():
        assert torch.equal(weight.codes, both[key].codes)
        assert torch.equal(weight.levels, both[key].levels)


def test_a_batch_of_padding_teaches_nothing(tiny_model: Any) -> None:
    given = batches("bert-mlm")
    nothing = {key: value.clone() for key, value in given[0].items()}
    nothing["attention_mask"].zero_()
    found = []
    for used in (given, [*given, nothing]):
        calibration = Calibration(used, Effort(passes=8))
        lexibit.quantize(tiny_model("bert-mlm"), CONFIG, calibration=calibration, progress=False)
        found.append([(one.block, one.block_before, one.block_after) for one in calibration.weights])
    assert any(before is not None and after < before for _, before, after in found[0])
    assert [block for block, *_ in found[0]] == [block for block, *_ in found[1]]
    for one in found[1]:
        assert all(value is None or value == value for value in one[1:])


def test_blocks_in_half_precision_are_left_alone_and_that_is_said(tiny_model: Any, caplog: Any) -> None:
    model, calibration = tiny_model("bert-mlm").half(), Calibration(batches("bert-mlm"))
    lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    assert {one.block for one in calibration.weights} == {""}
    assert all(one.after is not None for one in calibration.weights if "layer" in one.name)
    assert "the levels of bert.encoder.layer.0 are not trained" in caplog.text


class Part(nn.Module):
    """A block that gives more than a tensor, and keeps a table that it makes when it runs first."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.dense, self.wrap, self.table = nn.Linear(12, 12), wrap, torch.zeros(0)

    def forward(self, given: Any) -> Any:
        x = given if isinstance(given, Tensor) else given[0]
        if self.table.shape[0] < x.shape[1]:
            self.table = torch.linspace(0.5, 1.5, x.shape[1])[:, None]
        return self.wrap(torch.tanh(self.dense(x)) * self.table[: x.shape[1]])


class Pair(NamedTuple):
    hidden: Tensor
    twice: Tensor


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, x), lambda x: Pair(x, 2 * x), lambda x: [x, x]],
    ids=["tensor", "tuple", "named", "list"],
)
def test_blocks_may_give_and_keep_what_they_like(wrap: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Part(wrap) for _ in range(3)])

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model().eval()
    given = [{"x": torch.randn(2, 4 + number, 12)} for number in range(4)]
    calibration = Calibration(given)
    lexibit.quantize(model, CONFIG, calibration=calibration, progress=False)
    assert len(codebooks(model)) == 3
    trained = {one.block for one in calibration.weights} - {""}
    assert len(trained) == (0 if isinstance(wrap(torch.zeros(1)), list) else 3)


@pytest.mark.parametrize("name", ["BartModel", "OPTModel"])
def test_the_rows_of_positions_are_those_that_are_looked_up(name: str) -> None:
    # their modules are called with something else, and work the positions out: from 2 on
    config = {"vocab_size": 97, "max_position_embeddings": 40, "d_model": 24, "pad_token_id": 0}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    if name == "OPTModel":
        config |= {"hidden_size": 24, "num_hidden_layers": 1, "ffn_dim": 40, "num_attention_heads": 2}
    else:
        config |= layers | heads
    model = getattr(transformers, name)(getattr(transformers, name.replace("Model", "Config"))(**config))
    ids = torch.arange(3, 33).view(3, 10)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    found = gather(model, Plan.of(model, LexibitConfig()), batches, progress=False)
    positions = next(one for weight, one in found.items() if "embed_positions" in weight)
    rows = positions.rows
    assert rows is not None
    assert rows[2:12].min() > 0
    assert rows.sum() == rows[2:12].sum()


def test_what_is_multiplied_may_be_a_parameter() -> None:
    config = transformers.DebertaConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    model = transformers.DebertaModel(config).eval()
    calibration = Calibration([{"input_ids": torch.randint(3, 97, (4, 9))} for _ in range(3)])
    lexibit.quantize(model, LexibitConfig.recommended(3), calibration=calibration, progress=False)
    told = {one.name: one for one in calibration.weights}
    positions = told["encoder.layer.0.attention.self.pos_proj.weight"]
    assert positions.after is not None
    assert positions.before is not None
    assert positions.after < positions.before
