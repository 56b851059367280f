"""The objective with importances: the same with and without what is kept, and in the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lexibit
from lexibit import LexibitConfig, LexibitError
from lexibit.fidelity import Reference
from lexibit.replay import Replay
from lexibit.search import Problem, Setting, search
from lexibit.search.layers import blocks, layers
from lexibit.search.objective import Distance
from lexibit.search.space import SETS, STARTS
from lexibit.search.trials import storage

CODES = LexibitConfig("binary", 2)
TEXTS = [f"w{first} w{first + 1} w{first + 2}" for first in range(10, 50)]


@pytest.fixture
def made(tiny_model: Any, tiny_tokenizer: Any) -> Any:
    def make(name: str, *, reuse: bool = True, config: LexibitConfig = CODES) -> Problem:
        model = tiny_model(name).eval()
        reference = Reference(model, tiny_tokenizer(), TEXTS, batch_size=8)
        return Problem(model, config, Distance(reference), reuse=reuse)

    return make


def test_layers_are_in_the_order_in_which_they_run(made: Any) -> None:
    problem = made("bert")
    names = [layer.name for layer in problem.layers]
    assert names == ["embeddings", "encoder.layer.0", "encoder.layer.1", "pooler"]
    assert [problem._position[name] for name in names] == [0, 0, 1, 2]
    assert problem.float_value == 0
    everything = {weight.name for layer in problem.layers for weight in layer.weights}
    assert everything == {weight.name for weight in lexibit.Plan.of(problem.model, CODES).weights}


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama", "distilbert-mlm", "albert-mlm", "marian", "roberta-qa"]
)
def test_what_is_kept_changes_no_value(made: Any, name: str) -> None:
    fast, slow = made(name), made(name, reuse=False)
    assert bool(fast._row) == (name not in ("albert-mlm", "marian"))
    assert not slow._row
    before = {key: value.clone() for key, value in fast.model.state_dict().items()}
    chosen: dict[str, Setting] = {}
    values = []
    for layer in fast.layers:
        for one in (Setting(SETS[0]), Setting(SETS[13], bits=3)):
            tried = chosen | {layer.name: one}
            values.append(fast.value(tried, changing=layer.name))
            assert values[-1] == slow.value(tried)
        chosen[layer.name] = Setting(SETS[13], bits=3)
    # back to the first layer, with nothing of what was kept
    first = fast.layers[0].name
    assert fast.value({first: Setting(SETS[0])}, changing=first) == values[0]
    assert len(set(values)) > 2
    assert fast.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in fast.model.state_dict().items())


def test_only_what_depends_on_a_change_is_done_again(made: Any) -> None:
    problem = made("bert")
    runs: dict[str, int] = {}
    for name, module in problem.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    problem.value({})
    assert problem._codes.quantized == sum(len(layer.weights) for layer in problem.layers)
    batches = runs["encoder.layer.1"]
    assert batches == 5
    before = problem._codes.quantized
    problem.value({"encoder.layer.1": Setting(SETS[0])}, changing="encoder.layer.1")
    assert problem._codes.quantized - before == len(problem.layers[2].weights)
    runs.clear()
    problem.value({"encoder.layer.1": Setting(SETS[1])}, changing="encoder.layer.1")
    assert runs["encoder.layer.1"] == runs["pooler"] == batches
    assert not any(name.startswith("encoder.layer.0.") for name in runs)
    assert problem.value({"encoder.layer.0": Setting(SETS[0])}) == made("bert").value(
        {"encoder.layer.0": Setting(SETS[0])}
    )


def test_the_result_is_the_model_that_was_measured(made: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    problem = made("bert", config=LexibitConfig("binary", 2, rules={"*.query": {"bits": 3}}))
    where = storage(f"sqlite:///{tmp_path / 'a.db'}")
    found = search(problem, "layer-wise", 4, study="s", where=where)
    assert found.value <= min(trial.value for trial in found.stages["all layers"]) <= found.start
    assert found.start == found.stages["all layers"][0].value
    assert list(found.stages) == ["all layers", *(layer.name for layer in problem.layers)]
    assert [len(done) for done in found.stages.values()] == [len(STARTS), 4, 4, 4, 4]
    config = problem.result(found.settings)
    reference = Reference(problem.model, tiny_tokenizer(), TEXTS, batch_size=8)
    plan = lexibit.quantize(problem.model, config, progress=False)
    assert {weight.spec.bits for weight in plan.weights if ".query" in weight.name} == {3}
    assert Distance(reference)(problem.model) == found.value


@pytest.mark.parametrize("name", ["llama", "marian"])
def test_a_layer_may_have_any_name(made: Any, tmp_path: Path, name: str) -> None:
    problem = made(name)
    assert "model" in [layer.name for layer in problem.layers]
    where = storage(f"sqlite:///{tmp_path / 'a.db'}")
    found = search(problem, "layer-wise", 1, study="s", where=where)
    assert len(found.stages) == len(problem.layers) + 1


class Twice(torch.nn.Module):
    """Runs its blocks a second time, or leaves something of the first beside its output."""

    def __init__(self, inner: Any, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Any, *args: Any, **options: Any) -> Any:
        if self.kind == "twice":
            for block in self.inner:
                x = block(x)
        for number, block in enumerate(self.inner):
            x = block(x)
            if self.kind == "beside" and number == 0:
                beside = block.seen
        return x + beside if self.kind == "beside" else x


class Block(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        self.seen = super().forward(x)
        return self.seen.tanh()


@pytest.mark.parametrize("kind", ["plain", "twice", "beside"])
def test_blocks_that_do_more_than_run_in_a_row_are_not_replayed(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = Twice(torch.nn.ModuleList([Block(8, 8) for _ in range(3)]), kind)
    inputs = torch.randn(5, 8), torch.randn(5, 8)

    def objective(model: Any) -> float:
        with torch.no_grad():
            return sum(float(model(x).square().sum()) for x in inputs)

    fast, slow = (Problem(model, CODES, objective, reuse=reuse) for reuse in (True, False))
    assert bool(fast._row) == (kind == "plain")
    for layer in fast.layers:
        one = {layer.name: Setting(bits=1)}
        assert fast.value(one, changing=layer.name) == slow.value(one)


def test_rules_of_the_user_do_not_come_back(made: Any) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    config = LexibitConfig("binary", 3, rules={name: {"bits": 6}, "*layer*": {"bits": 2}})
    problem = made("bert", config=config)
    chosen = {"encoder.layer.0": Setting(SETS[0])}
    value = problem.value(chosen)
    plan = lexibit.quantize(problem.model, problem.result(chosen), progress=False)
    assert {weight.spec.bits for weight in plan.weights if "layer.0" in weight.name} == {2}
    assert problem._objective(problem.model) == value


def test_by_hand_and_for_the_whole_model(made: Any, tmp_path: Path) -> None:
    problem, where = made("bert"), storage(f"sqlite:///{tmp_path / 'a.db'}")
    by_hand = search(problem, "manual", 1, study="hand", where=where)
    assert [len(done) for done in by_hand.stages.values()] == [17]
    assert len(set(by_hand.settings.values())) == 1
    few = search(problem, "model-wise", 3, study="few", where=where)
    assert [len(done) for done in few.stages.values()] == [3]
    whole = search(problem, "model-wise", 20, study="whole", where=where)
    assert [len(done) for done in whole.stages.values()] == [20]
    assert whole.value <= by_hand.value
    again = search(made("bert"), "model-wise", 20, study="whole", where=where)
    assert again == whole
    with pytest.raises(LexibitError, match="unknown mode 'layerwise': did you mean 'layer-wise'"):
        search(problem, "layerwise", 1, study="x", where=where)
    with pytest.raises(LexibitError, match="scheme 'lq' does not use importances"):
        search(made("bert", config=LexibitConfig("lq", 2)), "manual", 1, study="x", where=where)


def test_what_cannot_be_searched_is_refused(made: Any, tiny_model: Any) -> None:
    with pytest.raises(LexibitError, match=r"has the importance 'E=1' already"):
        made("bert", config=LexibitConfig("binary", 2, importance="E=1"))
    model = tiny_model("bert")
    lexibit.quantize(model, CODES, progress=False)
    with pytest.raises(LexibitError, match="quantized already"):
        Problem(model, CODES, lambda model: 0.0)


def test_a_failing_run_leaves_the_model_as_it_was(made: Any) -> None:
    problem = made("bert")
    problem.value({}, changing="pooler")
    objective, problem._objective = problem._objective, lambda model: 1 / 0
    with pytest.raises(ZeroDivisionError):
        problem.value({}, changing="pooler")
    assert not any("forward" in module.__dict__ for module in problem.model.modules())
    assert objective(problem.model) == 0


def test_blocks_are_those_that_run_in_a_row(tiny_model: Any) -> None:
    assert [name for name, _ in blocks(tiny_model("bert"))] == ["encoder.layer.0", "encoder.layer.1"]
    assert blocks(tiny_model("albert-mlm")) == []
    assert blocks(tiny_model("marian")) == []
    lstm: PreTrainedModel = lexibit.models.AWDLSTMForCausalLM(
        lexibit.models.AWDLSTMConfig(vocab_size=9, embedding_size=6, hidden_size=8, num_hidden_layers=2)
    )
    assert [name for name, _ in blocks(lstm)] == ["layers.0", "layers.1"]
    found = [layer.name for layer in layers(lexibit.Plan.of(lstm, CODES))]
    assert found[1:] == ["layers.0", "layers.1"]
    recurrent = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4, num_layers=2)})
    found = [layer.name for layer in layers(lexibit.Plan.of(recurrent, CODES))]
    assert found == ["rnn.l0", "rnn.l1"]


def test_nothing_is_kept_without_blocks() -> None:
    replay = Replay([])
    replay.advance(3, lambda: 1 / 0)
    assert replay.first == 0
