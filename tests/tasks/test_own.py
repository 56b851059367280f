"""A user's own data: files, columns and classes, and what is refused."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from tokenizers.processors import TemplateProcessing

from lexibit import LexibitError, tasks
from lexibit.tasks.sentences import Example

CLASSES, VALUES = tasks.task("classification"), tasks.task("regression")
TABLE = "text,label\nw5 w6,red\nw7,green\nw8 w9,red\n"


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


# files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dev.csv", 'text,label\n"a, ""b""",1\nc,0\n'),
        ("validation.tsv", 'text\tlabel\na, "b"\t1\nc\t0\n'),
        ("valid.json", json.dumps([{"text": 'a, "b"', "label": 1}, {"text": "c", "label": 0}])),
        ("test.jsonl", '{"text": "a, \\"b\\"", "label": 1}\n{"text": "c", "label": "0"}\n'),
    ],
)
def test_every_form_is_read_from_a_folder_or_as_one_file(tmp_path, name, text):
    file = write(tmp_path / name, text)
    expected = [Example(('a, "b"',), "1"), Example(("c",), "0")]
    assert CLASSES.load(tmp_path) == CLASSES.load(file) == expected


def test_the_first_name_of_a_split_counts(tmp_path):
    for number, name in enumerate(("dev", "validation", "valid", "test", "train")):
        write(tmp_path / f"{name}.csv", f"text,label\n{name},{number}\n")
    for name in ("dev", "validation", "valid", "test"):
        assert CLASSES.load(tmp_path)[0].texts == (name,)
        assert CLASSES.load(tmp_path, "test")[0].texts == ("test",)
        assert CLASSES.load(tmp_path, "train")[0].texts == ("train",)
        (tmp_path / f"{name}.csv").unlink()
    with pytest.raises(
        LexibitError, match=r"no dev\.\* or validation\.\* or valid\.\* or test\.\* in it, as its"
    ):
        CLASSES.load(tmp_path)
    with pytest.raises(
        LexibitError, match=r"no test\.\* in it, as its test split: add one that ends in \.tsv"
    ):
        CLASSES.load(tmp_path, "test")


def test_one_file_does_not_train(tmp_path):
    file = write(tmp_path / "data.csv", TABLE)
    with pytest.raises(
        LexibitError, match=r"data\.csv: one file cannot be training and evaluation data at once: gi"
    ):
        CLASSES.load(file, "train")
    with pytest.raises(LexibitError, match=r"no train\.\* in it"):
        CLASSES.load(tmp_path, "train")


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(
        LexibitError, match="classification is on your own data: name its folder, or file, with --d"
    ):
        CLASSES.load(None)
    with pytest.raises(LexibitError, match=r"away: no such folder or file"):
        CLASSES.load(tmp_path / "away")
    with pytest.raises(
        LexibitError, match=r"data\.xlsx: give a file that ends in \.tsv, \.csv, \.json, \.jsonl"
    ):
        CLASSES.load(write(tmp_path / "data.xlsx", ""))
    with pytest.raises(LexibitError, match="unknown split 'eval'"):
        CLASSES.load(tmp_path, "eval")
    write(tmp_path / "dev.csv", TABLE)
    write(tmp_path / "dev.tsv", "")
    with pytest.raises(LexibitError, match=r"has dev\.tsv and dev\.csv: leave the one that is meant"):
        CLASSES.load(tmp_path)


# columns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["label", "labels", "score", "target"])
@pytest.mark.parametrize(
    "texts",
    [
        ("text",),
        ("sentence",),
        ("text1", "text2"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("premise", "hypothesis"),
    ],
)
def test_columns_go_by_their_usual_names_in_any_order(tmp_path, texts, label):
    header = ",".join(["id", *reversed(texts), label])
    values = [f"the {name}" for name in texts]
    file = write(tmp_path / "dev.csv", f"{header}\n7,{','.join(reversed(values))},0.5\n")
    assert CLASSES.load(file) == [Example(tuple(values), "0.5")]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            "text,class",
            "text, class: rename them so that one alone is called label or labels or score or target",
        ),
        ("text,label,score", "text, label, score: rename them so that one alone is called label"),
        (
            "review,label",
            "review, label: rename them so that the texts are called text, or sentence, or text1 and",
        ),
        ("text,sentence,label", "text, sentence, label: rename them so that the texts are called"),
        ("sentence1,label", "sentence1, label: rename them so that the texts are called"),
        ("premise,hypothesis,text,label", "premise, hypothesis, text, label: rename them so that the texts"),
    ],
)
def test_columns_that_are_not_clear_are_refused_by_name(tmp_path, header, said):
    file = write(tmp_path / "dev.csv", f"{header}\n{','.join('1' * len(header.split(',')))}\n")
    with pytest.raises(LexibitError, match=rf"dev\.csv: its columns are {said}"):
        CLASSES.load(file)


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        (CLASSES, "text,label\n", "0 dev examples are too few for classification"),
        (VALUES, "text,label\na,1\nb,2\n", "2 dev examples are too few for regression: give 3 or more"),
        (
            CLASSES,
            "text,label\na,1\nb, \n",
            "row 2: its label ' ' is no class: give a text or a whole number",
        ),
        (VALUES, "text,label\na,1\nb,high\n", "row 2: its label 'high' is no number, which regression needs"),
        (VALUES, "text,label\na,1\nb,inf\n", "row 2: its label 'inf' is no number, which regression needs"),
    ],
)
def test_rows_that_are_no_examples_are_refused(tmp_path, task, text, said):
    with pytest.raises(LexibitError, match=said):
        task.load(write(tmp_path / "dev.csv", text))


def test_rows_of_json_that_are_no_examples_are_refused(tmp_path):
    file = tmp_path / "dev.json"
    write(file, json.dumps([{"text": "a", "label": 0.5}]))
    with pytest.raises(
        LexibitError, match=r"label 0\.5 is no class: .* \(the task regression takes any number\)"
    ):
        CLASSES.load(file)
    assert VALUES._label("here", 0.5) == 0.5
    write(file, json.dumps([{"text": "a", "label": "x"}, {"label": "y"}]))
    with pytest.raises(LexibitError, match=r"dev\.json: row 2 has no 'text': its columns are label"):
        CLASSES.load(file)


# training and outcomes -------------------------------------------------------------------------------


def test_the_classes_are_those_of_the_training_data_and_stay_with_the_model(
    tmp_path, float_folder, tokenizer
):
    write(tmp_path / "data" / "train.csv", TABLE)
    train = CLASSES.load(tmp_path / "data", "train")
    model = CLASSES.model(float_folder("bert-mlm"), train)
    assert model.config.id2label == {0: "green", 1: "red"}
    assert [feature["labels"] for feature in CLASSES.features(model, tokenizer, train)] == [1, 0, 1]

    model.save_pretrained(tmp_path / "tuned")
    again = type(model).from_pretrained(tmp_path / "tuned")
    found = CLASSES.outcomes(again, tokenizer, train)
    assert found[:, 1].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(found, CLASSES.outcomes(model, tokenizer, train))


def test_a_model_without_the_class_is_refused(float_folder, tokenizer):
    train = [Example(("w5",), "red"), Example(("w6",), "green")]
    model = CLASSES.model(float_folder(), train)
    for use in (CLASSES.outcomes, CLASSES.features):
        with pytest.raises(
            LexibitError,
            match="no class 'blue', which the data has; its classes are green, red: train it on data",
        ):
            use(model, tokenizer, [*train, Example(("w7",), "blue")])


def test_one_class_is_none(float_folder):
    with pytest.raises(
        LexibitError, match="all 2 labels to train on are 'red': classification needs two classes"
    ):
        CLASSES.model(float_folder(), [Example(("w5",), "red")] * 2)


def test_a_model_without_names_has_classes_by_number(tiny_model, tokenizer):
    model = tiny_model("bert-classifier", num_labels=3)
    data = [Example((f"w{number}",), str(number % 3)) for number in range(5, 14)]
    assert CLASSES.outcomes(model, tokenizer, data)[:, 1].tolist() == [number % 3 for number in range(5, 14)]
    with pytest.raises(
        LexibitError, match="no class 'red', which the data has; its classes are 0, 1, 2: train"
    ):
        CLASSES.outcomes(model, tokenizer, [Example(("w5",), "red")])
    for names in ({0: "LABEL_0"}, {0: "a", 1: "a"}):
        with pytest.raises(LexibitError, match="has 1 classes by name, classification needs two or more"):
            CLASSES.outcomes(tiny_model("bert-classifier", id2label=names), tokenizer, data)


def test_outcomes_and_metrics_of_classes_are_those_of_a_plain_loop(tiny_model, tokenizer):
    names = {0: "red", 1: "green", 2: "blue"}
    model = tiny_model("bert-classifier", id2label=names)
    rng = np.random.default_rng(0)
    data = [Example((f"w{a}", f"w{b} w{a}"), names[a % 3]) for a, b in rng.integers(5, 97, (40, 2))]

    def logits(example):
        with torch.inference_mode():
            return model(**tokenizer(*example.texts, return_tensors="pt")).logits[0]

    with torch.no_grad():
        model.classifier.bias -= torch.stack([logits(example) for example in data]).mean(0)
    predicted = [names[int(logits(example).argmax())] for example in data]
    labels = [example.label for example in data]
    assert set(predicted) == set(names.values())
    outcomes = CLASSES.outcomes(model, tokenizer, data, batch_size=3)
    accuracy, macro = (metric.of(outcomes) for metric in CLASSES.metrics)
    assert accuracy == pytest.approx(100 * accuracy_score(labels, predicted))
    assert macro == pytest.approx(100 * f1_score(labels, predicted, average="macro"))


def test_outcomes_and_metrics_of_values_are_those_of_a_plain_loop(float_folder, tokenizer):
    rng = np.random.default_rng(0)
    data = [Example((f"w{a} w{b}",), float(a)) for a, b in rng.integers(5, 97, (30, 2))]
    model = VALUES.model(float_folder("bert-mlm"), data).eval()
    assert [feature["labels"] for feature in VALUES.features(model, tokenizer, data)] == [
        example.label for example in data
    ]
    with torch.inference_mode():
        predicted = [float(model(**tokenizer(*one.texts, return_tensors="pt")).logits) for one in data]
    outcomes = VALUES.outcomes(model, tokenizer, data, batch_size=4)
    np.testing.assert_allclose(outcomes[:, 0], predicted, atol=1e-5)
    pearson, spearman = (metric.of(outcomes) for metric in VALUES.metrics)
    labels = [example.label for example in data]
    assert pearson == pytest.approx(100 * pearsonr(predicted, labels).statistic, abs=0.01)
    assert spearman == pytest.approx(100 * spearmanr(predicted, labels).statistic, abs=1)
