"""Rows of files: the official data sets' forms, and what is refused."""

import json

import pytest

from lexibit import LexibitError
from lexibit.tasks import tables


def write(file, text, encoding="utf-8"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(encoding))
    return file


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.tsv", ["text\tlabel", "caf\u00e9, \u201cyes\u201d\t1", "b\t0"]),
        ("a.csv", ["text,label", '"caf\u00e9, \u201cyes\u201d",1', "b,0"]),
        (
            "a.jsonl",
            ['{"text": "caf\u00e9, \u201cyes\u201d", "label": "1"}', "", '{"text": "b", "label": "0"}'],
        ),
        (
            "a.json",
            ['[{"text": "caf\u00e9, \u201cyes\u201d", "label": "1"},', '{"text": "b", "label": "0"}]'],
        ),
    ],
)
def test_rows_are_read_from_every_form_with_or_without_a_byte_order_mark(
    tmp_path, name, lines, end, encoding
):
    file = write(tmp_path / name, end.join(lines) + end, encoding)
    assert tables.read(file) == [
        {"text": "caf\u00e9, \u201cyes\u201d", "label": "1"},
        {"text": "b", "label": "0"},
    ]


def test_bare_double_quotes_are_text_unless_the_file_is_csv(tmp_path):
    assert tables.read(write(tmp_path / "a.tsv", 'text\tlabel\n"He said\t1\nno" she\t0\n')) == [
        {"text": '"He said', "label": "1"},
        {"text": 'no" she', "label": "0"},
    ]
    assert tables.read(write(tmp_path / "a.csv", 'text,label\n"two\nlines, ""quoted""",1\n')) == [
        {"text": 'two\nlines, "quoted"', "label": "1"}
    ]
    # the STS benchmark's .csv has tabs, and no quoting
    file = write(tmp_path / "b.csv", '"a\tb,c\n')
    assert tables.read(file, header=("x", "y"), quoted=False) == [{"x": '"a', "y": "b,c"}]


def test_a_header_is_given_or_the_first_line(tmp_path):
    file = write(tmp_path / "a.tsv", "gj04\t1\t\tA sentence.\n\ngj05\t0\t*\tAnother.\tmore\n")
    assert tables.read(file, header=("source", "label", "mark", "sentence")) == [
        {"source": "gj04", "label": "1", "mark": "", "sentence": "A sentence."},
        {"source": "gj05", "label": "0", "mark": "*", "sentence": "Another."},
    ]
    assert tables.read(file)[0] == {"gj04": "gj05", "1": "0", "": "*", "A sentence.": "Another."}
    assert tables.read(write(tmp_path / "b.tsv", ""), header=("x",)) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.tsv", "", "is empty: its first line must name the columns"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", "row 3 has 1 columns, not 2: text, label"),
        ("a.json", "{", "cannot be read as json in UTF-8"),
        ("a.json", "", "cannot be read as json in UTF-8"),
        ("a.json", '{"text": "a"}', "must hold a list of objects, a row each"),
        ("a.json", "[1]", "must hold a list of objects, a row each"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "cannot be read as jsonl in UTF-8"),
        ("a.jsonl", "3\n", "must hold a list of objects, a row each"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, name, text, said):
    with pytest.raises(LexibitError, match=rf"{name}: {said}"):
        tables.read(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
def test_a_file_that_is_not_utf_8_or_not_there_is_refused(tmp_path, name):
    with pytest.raises(LexibitError, match=rf"{name}: cannot be read as {name[2:]} in UTF-8"):
        tables.read(write(tmp_path / name, "caf\u00e9", "latin-1"))
    with pytest.raises(LexibitError, match=r"b\.tsv: cannot be read"):
        tables.read(tmp_path / "b.tsv")


def test_a_file_is_found_by_the_first_name_and_the_first_folder(tmp_path):
    inner = write(tmp_path / "RTE" / "dev.tsv", "")
    assert tables.find(tmp_path, ["dev.tsv"], ["RTE"]) == inner
    assert tables.find(tmp_path, ["train.tsv", "dev.tsv"], ["QNLI", "RTE"]) == inner
    outer = write(tmp_path / "dev.tsv", "")
    assert tables.find(tmp_path, ["dev.tsv"], ["RTE"]) == outer
    second = write(tmp_path / "dev_b.tsv", "")
    first = write(tmp_path / "dev_a.tsv", "")
    assert tables.find(tmp_path, ["dev_*.tsv"]) == first != second
    assert tables.find(tmp_path, ["test.tsv"]) is None
    (tmp_path / "test.tsv").mkdir()
    assert tables.find(tmp_path, ["test.tsv"]) is None


def test_a_column_is_every_rows_or_an_error():
    rows = [{"text": "a", "label": 0}, {"text": "b"}, {"text": None, "label": 1}]
    assert tables.column("here", rows[:1], "label") == [0]
    with pytest.raises(LexibitError, match="here: row 2 has no 'label': its columns are text"):
        tables.column("here", rows, "label")
    with pytest.raises(LexibitError, match="here: row 3 has no 'text'"):
        tables.column("here", rows, "text")


def test_the_hub_gives_rows(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"text": "a", "label": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tables.from_hub("nyu-mll/glue", "rte", "validation") == [{"text": "a", "label": 1}]
    assert asked == [("nyu-mll/glue", "rte", "validation")]


def test_a_hub_that_is_out_of_reach_is_an_error_with_a_way_out(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        LexibitError, match=r"no/such: the hub did not give this data set \(.*name a local folder with --data"
    ):
        tables.from_hub("no/such", None, "train")


def test_the_suffixes_are_those_that_can_be_read(tmp_path):
    for suffix in tables.SUFFIXES:
        text = json.dumps([{"a": 1}]) if suffix == ".json" else '{"a": 1}' if suffix == ".jsonl" else "a\n1\n"
        assert [str(row["a"]) for row in tables.read(write(tmp_path / f"x{suffix}", text))] == ["1"]
