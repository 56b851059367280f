"""GLUE's tasks: the official files, what is refused, and outcomes against a plain loop."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification

from lexibit import LexibitConfig, LexibitError, quantize, tasks
from lexibit.tasks import tables
from lexibit.tasks.sentences import Example

DATA = Path(os.environ.get("LEXIBIT_TEST_DATA", Path(__file__).parents[3] / "shared")) / "data"

# the head of each official file (train, and dev where it is another), and what its first row says
FORMS = {
    "cola": ("CoLA", "gj04\t1\t\tOur \"friends\" won't.\n", ('Our "friends" won\'t.',), "acceptable"),
    "sst-2": ("SST-2", "sentence\tlabel\nit 's \"charming\t1\n", ("it 's \"charming",), "positive"),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n0\tA \"b.\tC.\tnot_entailment\n",
        ('A "b.', "C."),
        "not_entailment",
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n0\tWho?\t\"He.\tentailment\n",
        ("Who?", '"He.'),
        "entailment",
    ),
    "mnli": (
        "MNLI",
        "index\tpromptID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\tfiction\tA.\tB.\tneutral\tcontradiction\n",
        ("A.", "B."),
        "contradiction",
    ),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said \"a.\t\"B.\n",
        ('He said "a.', '"B.'),
        "equivalent",
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tHow?\tWhy?\t0\n",
        ("How?", "Why?"),
        "not_duplicate",
    ),
    "sts-b": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tf\t2012\t1\ts\tt\tA man.\tA \"plane.\t3.800\n",
        ("A man.", 'A "plane.'),
        3.8,
    ),
}  # fmt: skip
FORMS["mnli-mm"] = FORMS["mnli"]
DEV = {"mnli": "dev_matched.tsv", "mnli-mm": "dev_mismatched.tsv"}

# by task: examples in train and dev of the data at hand, and how many of the dev set are of the first class
REAL = {
    "cola": (8551, 1043, 322),
    "sst-2": (67349, 872, 428),
    "rte": (2490, 277, 146),
    "mrpc": (3668, 408, 129),
    "sts-b": (5749, 1500, None),
    "qnli": (None, 5463, None),
    "mnli": (None, 1000, None),
    "mnli-mm": (None, 1000, None),
}


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread: several that wait for each other in a tiny model take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """The tiny tokenizer, which takes pairs."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def classifier(tiny_model, labels, name="bert-classifier", **changes):
    names = dict(enumerate(labels)) or {0: "LABEL_0"}
    return tiny_model(name, id2label=names, label2id={n: i for i, n in names.items()}, **changes)


def centred(model, tokenizer, data):
    """The model with a bias in its head that makes it predict each class now and then."""
    logits = [model.eval()(**tokenizer(*example.texts, return_tensors="pt")).logits[0] for example in data]
    with torch.no_grad():
        model.classifier.bias -= torch.stack(logits).mean(0)
    return model


def examples(task, count, seed=0):
    """Random texts of words that the tiny tokenizer knows, with random labels."""
    rng = np.random.default_rng(seed)

    def text():
        return " ".join(f"w{word}" for word in rng.integers(5, 97, rng.integers(1, 12)))

    texts = [tuple(text() for _ in task.columns[:-1]) for _ in range(count)]
    labels = [
        str(rng.choice(task.labels)) if task.labels else round(float(rng.uniform(0, 5)), 2)
        for _ in range(count)
    ]
    return list(map(Example, texts, labels))


# data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("name", FORMS)
def test_the_official_form_is_read_from_the_folder_or_its_own(tmp_path, name, split):
    folder, text, texts, label = FORMS[name]
    task = tasks.task(name)
    file = "train.tsv" if split == "train" else DEV.get(name, "dev.tsv")
    text += text.splitlines()[-1] + "\n"
    write(tmp_path / "a" / file, text)
    write(tmp_path / "b" / folder / file, text)
    assert task.read(tmp_path / "a", split) == task.read(tmp_path / "b", split) == [Example(texts, label)] * 2


def test_the_two_dev_sets_of_mnli_are_not_confused(tmp_path):
    head = FORMS["mnli"][1].splitlines()[0]
    for name, label in (("dev_matched_sample.tsv", "neutral"), ("dev_mismatched_sample.tsv", "entailment")):
        write(tmp_path / name, f"{head}\n0\t1\tg\tA.\tB.\t-\t{label}\n")
    assert tasks.task("mnli").read(tmp_path, "dev")[0].label == "neutral"
    assert tasks.task("mnli-mm").read(tmp_path, "dev")[0].label == "entailment"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "rte",
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n",
            "row 1: its label 'maybe' is none of rte's",
        ),
        ("cola", "gj04\t2\t\ta\n", "row 1: its label '2' is none of cola's: unacceptable, acceptable, 0, 1"),
        ("sts-b", "sentence1\tsentence2\tscore\na\tb\thigh\n", "row 1: its label 'high' is no number"),
        ("sts-b", "sentence1\tsentence2\tscore\na\tb\tnan\n", "row 1: its label 'nan' is no number"),
        ("sst-2", "text\tlabel\na\t1\n", "row 1 has no 'sentence': its columns are text, label"),
        ("mrpc", "Quality\t#1 String\n1\ta\n", "row 1 has no '#2 String'"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\n", "row 2 has 2 columns, not 3"),
        ("rte", "", "is empty: its first line must name the columns"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, name, text, said):
    write(tmp_path / "dev.tsv", text)
    with pytest.raises(LexibitError, match=rf"dev\.tsv: {said}"):
        tasks.task(name).load(tmp_path)


def test_a_missing_or_empty_split_is_refused(tmp_path):
    task = tasks.task("mnli")
    with pytest.raises(
        LexibitError,
        match=r"no dev_matched\.tsv or dev_matched\*\.tsv in it, nor in its folder MNLI: mnli needs it",
    ):
        task.load(tmp_path)
    with pytest.raises(LexibitError, match=r"no train\.tsv in it"):
        task.load(tmp_path, "train")
    with pytest.raises(LexibitError, match="unknown split 'test': known: dev, train"):
        task.load(tmp_path, "test")
    write(tmp_path / "dev_matched.tsv", FORMS["mnli"][1].splitlines()[0])
    with pytest.raises(LexibitError, match="0 dev examples are too few for mnli: give 1 or more"):
        task.load(tmp_path)


@pytest.mark.parametrize("name", ["mrpc", "sts-b", "mnli"])
def test_rows_of_the_hub_have_its_names_and_numbers(monkeypatch, name):
    task, asked = tasks.task(name), []
    columns = {"mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
    first, second = columns.get(name, ("sentence1", "sentence2"))

    def from_hub(*where):
        asked.append(where)
        return [{first: "a", second: "b", "label": 4.5 if name == "sts-b" else 1, "idx": 0}]

    monkeypatch.setattr(tables, "from_hub", from_hub)
    label = {"mrpc": "equivalent", "sts-b": 4.5, "mnli": "neutral"}[name]
    assert task.read(None, "dev") == [Example(("a", "b"), label)]
    split = "validation_matched" if name == "mnli" else "validation"
    assert asked == [("nyu-mll/glue", name.replace("-", ""), split)]


def test_a_hidden_label_of_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "from_hub", lambda *where: [{"sentence": "a", "label": -1}])
    with pytest.raises(LexibitError, match="nyu-mll/glue: row 1: its label -1 is none of sst-2's"):
        tasks.task("sst-2").read(None, "dev")


@pytest.mark.parametrize("name", REAL)
def test_the_real_data_has_its_known_size(name):
    task = tasks.task(name)
    if not (DATA / task.folder).is_dir():
        pytest.skip(
            f"no {task.folder} here: LEXIBIT_TEST_DATA names the folder that holds data/{task.folder}"
        )
    train, dev, of_first = REAL[name]
    found = task.load(DATA)
    assert len(found) == dev
    assert train is None or len(task.load(DATA, "train")) == train
    if of_first is not None:
        assert sum(example.label == task.labels[0] for example in found) == of_first
    assert all(len(example.texts) == len(task.columns) - 1 for example in found)


# outcomes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("cola", "bert-classifier"),
        ("mnli", "bert-classifier"),
        ("mrpc", "distilbert-classifier"),
        ("sts-b", "bert-classifier"),
    ],
)
def test_outcomes_are_those_of_a_plain_loop_over_single_examples(name, model, tiny_model, tokenizer):
    task = tasks.task(name)
    data = examples(task, 30)
    taken = {"input_ids", "attention_mask"} | ({"token_type_ids"} if model.startswith("bert") else set())
    tokenizer.model_input_names = sorted(taken)
    model = centred(classifier(tiny_model, task.labels, model), tokenizer, data).train()
    found = task.outcomes(model, tokenizer, data, batch_size=4)
    assert model.training
    model.eval()
    for (predicted, label), example in zip(found, data, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(*example.texts, return_tensors="pt")).logits[0]
        if task.labels:
            assert task.labels[int(predicted)] == model.config.id2label[int(logits.argmax())]
            assert task.labels[int(label)] == example.label
        else:
            assert predicted == pytest.approx(float(logits[0]), abs=1e-4)
            assert label == example.label
    if task.labels:
        assert set(found[:, 0]) == set(range(len(task.labels)))
    expected = {
        "accuracy x 100": lambda p, y: accuracy_score(y, p),
        "F1 x 100": lambda p, y: f1_score(y, p),
        "Matthews x 100": lambda p, y: matthews_corrcoef(y, p),
        "Pearson x 100": lambda p, y: np.corrcoef(p, y)[0, 1],
        "Spearman x 100": lambda p, y: np.corrcoef(rankdata(p), rankdata(y))[0, 1],
    }
    for metric in task.metrics:
        assert metric.of(found) == pytest.approx(100 * expected[metric.name](*found.T))


def test_a_models_own_order_of_classes_is_known_by_their_names(tiny_model, tokenizer):
    task = tasks.task("mnli")
    order, data = [2, 0, 1], examples(task, 20)
    ours = centred(classifier(tiny_model, task.labels), tokenizer, data)
    theirs = classifier(tiny_model, [task.labels[place].upper() for place in order])
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.classifier.weight[order])
        theirs.classifier.bias.copy_(ours.classifier.bias[order])
    found = task.outcomes(ours, tokenizer, data)
    np.testing.assert_array_equal(found, task.outcomes(theirs, tokenizer, data))
    assert len(set(found[:, 0])) == 3
    for one, other in zip(
        task.features(ours, tokenizer, data), task.features(theirs, tokenizer, data), strict=True
    ):
        assert order[other["labels"]] == one["labels"]


def test_classes_without_names_are_in_the_order_of_glue(tiny_model, tokenizer):
    task = tasks.task("mnli")
    data = examples(task, 20)
    ours = centred(classifier(tiny_model, task.labels), tokenizer, data)
    nameless = classifier(tiny_model, ["LABEL_0", "LABEL_1", "LABEL_2"])
    nameless.load_state_dict(ours.state_dict())
    np.testing.assert_array_equal(
        task.outcomes(ours, tokenizer, data), task.outcomes(nameless, tokenizer, data)
    )


def test_a_prediction_of_nan_is_of_no_class(tiny_model, tokenizer):
    for name in ("mrpc", "cola", "sts-b"):
        task = tasks.task(name)
        model = classifier(tiny_model, task.labels)
        with torch.no_grad():
            model.classifier.bias[-1] = math.nan
        found = task.outcomes(model, tokenizer, examples(task, 10))
        values = [metric.of(found) for metric in task.metrics]
        if task.labels:
            assert (found[:, 0] == -1).all()
            assert values == [0] * len(values)
        else:
            assert np.isnan(values).all()


def test_a_quantized_model_has_outcomes(tiny_model, tokenizer):
    task = tasks.task("rte")
    data = examples(task, 20)
    model = centred(classifier(tiny_model, task.labels), tokenizer, data)
    before = task.outcomes(model, tokenizer, data)
    quantize(model, LexibitConfig("kmeans", 8), progress=False)
    assert (task.outcomes(model, tokenizer, data) == before).mean() > 0.9


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        ("mnli", ["a", "b"], "BertForSequenceClassification has 2 classes, mnli has 3: train a model for it"),
        (
            "rte",
            ["yes", "no"],
            "has the classes yes, no, rte has entailment, not_entailment: train a model .* set id2label",
        ),
        ("sts-b", ["a", "b"], "has 2 classes, sts-b has 1"),
    ],
)
def test_a_model_with_other_classes_is_refused(task, labels, said, tiny_model, tokenizer):
    task = tasks.task(task)
    with pytest.raises(LexibitError, match=said):
        task.outcomes(classifier(tiny_model, labels), tokenizer, examples(task, 3))
    with pytest.raises(LexibitError, match=said):
        task.features(classifier(tiny_model, labels), tokenizer, examples(task, 3))


def test_a_model_without_a_head_is_refused(tiny_model, tokenizer):
    task = tasks.task("rte")
    for name in ("bert", "bert-mlm"):
        with pytest.raises(
            LexibitError, match="gives no logits of 2 classes a text, which rte needs: train one"
        ):
            task.outcomes(tiny_model(name), tokenizer, examples(task, 3))


# training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("mnli", "bert-mlm"), ("sts-b", "albert-mlm"), ("rte", "distilbert-mlm")]
)
def test_a_model_gets_a_head_for_the_task_and_learns_its_labels(name, kind, float_folder, tokenizer):
    task, folder = tasks.task(name), float_folder(kind)
    data = examples(task, 12)
    model = task.model(folder, data)
    assert list(model.config.id2label.values()) == list(task.labels or ["LABEL_0"])
    features = task.features(model, tokenizer, data)
    assert features[0]["input_ids"] == tokenizer(*data[0].texts)["input_ids"]
    batch = task.collate(model, tokenizer)(list(features))
    assert (
        batch["input_ids"].shape
        == batch["attention_mask"].shape
        == (12, batch["attention_mask"].sum(1).max())
    )
    model.eval()
    output = model(**batch)
    if task.labels:
        labels = torch.tensor([task.labels.index(example.label) for example in data])
        expected = torch.nn.functional.cross_entropy(output.logits, labels)
    else:
        labels = torch.tensor([example.label for example in data])
        expected = ((output.logits[:, 0] - labels) ** 2).mean()
    torch.testing.assert_close(output.loss, expected)


def test_a_head_of_another_task_is_replaced(tiny_model, tmp_path):
    classifier(tiny_model, ["a", "b", "c"]).save_pretrained(tmp_path)
    for name in ("rte", "sts-b"):
        model = tasks.task(name).model(tmp_path, [])
        assert (
            model.classifier.weight.shape[0]
            == model.config.num_labels
            == max(len(tasks.task(name).labels), 1)
        )
    body = AutoModelForSequenceClassification.from_pretrained(tmp_path).bert.state_dict()
    for key, value in model.bert.state_dict().items():
        torch.testing.assert_close(value, body[key])


def test_long_texts_are_cut_to_what_the_model_takes(tiny_model, tokenizer):
    task = tasks.task("rte")
    model = classifier(tiny_model, task.labels)
    long = [Example(("w5 " * 100, "w6 " * 100), "entailment")]
    assert len(task.features(model, tokenizer, long)[0]["input_ids"]) == 40
    assert np.isfinite(task.outcomes(model, tokenizer, long)).all()
