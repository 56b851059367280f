"""Studies in files: what is read, and what is refused."""

from __future__ import annotations

import pytest

from lexibit import LexibitError
from lexibit.study import Study, read


def test_yaml_and_python_say_the_same(settings, write, tmp_path):
    python = tmp_path / "tiny.py"
    python.write_text(f"from lexibit.study import Study\nstudy = Study(**{settings!r}, name='tiny')\n")
    assert read(python) == read(write(settings))


def test_python_may_make_settings_only(settings, tmp_path):
    python = tmp_path / "tiny.py"
    python.write_text(f"study = {settings!r}\nstudy['bits'] = [bits for bits in range(1, 9)]\n")
    assert read(python).bits == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_study_is_called_as_its_file(settings, write):
    assert read(write(settings, "some-name.yaml")).name == "some-name"


def test_fields_can_be_changed_when_it_is_read(settings, write):
    assert read(write(settings), data="elsewhere").data == "elsewhere"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "unknown field of a study 'model': did you mean .*models"),
        ({"models": None}, "needs models"),
        ({"models": []}, "needs models"),
        ({"models": ["tiny"]}, "models must be settings by name"),
        ({"models": {"tiny": {"option": 1}}}, "models.tiny: give either a source, or create"),
        ({"models": {"tiny": {"source": "x", "sauce": 1}}}, "unknown setting in models.tiny 'sauce'"),
        ({"tasks": "mrpc"}, "tasks must be names"),
        ({"tasks": {"mrpc": {"date": "x"}}}, "unknown setting in tasks.mrpc 'date': did you mean 'data'"),
        ({"schemes": {"float": {}}}, "schemes.float: the name is that of the float models"),
        ({"schemes": {"one": 3}}, "schemes.one must be settings by name"),
        ({"bits": 3}, "bits must be a list"),
        ({"bits": []}, "bits must be a list"),
        ({"seeds": "0"}, "seeds must be a list"),
        ({"bits": ["4"]}, r"bits must be like \[2, 3, 4\], not '4'"),
        ({"bits": [True]}, "bits must be like"),
        ({"seeds": ["0"]}, "seeds must be like"),
        ({"groups": [4]}, "groups must be like"),
        ({"importance": [{"E": 1}]}, "importance must be like"),
        ({"schemes": {"one": {"bits": "4"}}}, "schemes.one.bits must be like"),
        ({"models": {"one": None}}, "models.one must be a folder or a hub name"),
        ({"models": {"one": {"source": "x", "option": ["a=1"]}}}, "models.one: option goes with create"),
        ({"tasks": 5}, "tasks must be names"),
        ({"published": ["x"]}, "published must be a model's name"),
        ({"cpus": -1}, "cpus must be a number"),
        ({"cpus": 1.5}, "cpus must be a number, whole and 1 or more, not 1.5"),
        ({"gpus": -0.5}, "gpus must be a number, 0 or more"),
        ({"finetune": 3}, "finetune must be settings by name"),
        ({"published": {"other": "bert-base"}}, "unknown setting in published 'other'"),
    ],
)
def test_what_is_no_study_is_one_message_that_names_the_field(settings, write, changes, message):
    file = write(settings | changes)
    with pytest.raises(LexibitError, match=message) as raised:
        read(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: [3]\nbits: [4]", "is no YAML: 'bits' is given twice"),
        ("schemes: {a: {bits: 3}, a: {bits: 4}}", "is no YAML: 'a' is given twice"),
        ("a: [", "is no YAML"),
        ("- 1", "holds no study"),
        ("", "holds no study"),
        ("a: 1\n\tb: 2", "is no YAML"),
    ],
)
def test_a_file_that_is_no_yaml_of_a_study(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(LexibitError, match=message):
        read(file)


def test_files_that_are_not_there(tmp_path):
    for name in ("no.yaml", "no.py"):
        with pytest.raises(LexibitError, match=f"{name}: cannot be read"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"), [("x = 1", "by the name of 'study'"), ("1 / 0", "ZeroDivisionError")]
)
def test_python_that_makes_no_study(tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(LexibitError, match=message):
        read(file)


def test_what_is_left_out_may_be_said(settings):
    study = Study(**settings | {"finetune": False, "schemes": {"recommended": None}})
    assert study.how("finetune", "tiny", "classification") is None
    assert study.by_scheme() == {"recommended": {}}


def test_settings_of_a_model_and_a_task_add_to_the_studys(settings):
    study = Study(
        **settings
        | {
            "models": {"tiny": {"source": "x", "finetune": {"epochs": 2, "limit": 9}}, "other": "y"},
            "tasks": {"mrpc": {"finetune": {"limit": 7}}, "rte": {"finetune": False}},
        }
    )
    assert study.how("finetune", "tiny", "mrpc") == {"max_steps": 3, "epochs": 2, "limit": 7}
    assert study.how("finetune", "other", "mrpc") == {"max_steps": 3, "limit": 7}
    assert study.how("finetune", "tiny", "rte") is None
    assert study.how("tune", "other", "rte") == {"max_steps": 2}


def test_a_model_can_be_elsewhere(settings):
    study = Study(**settings).with_model("tiny", "/there")
    assert study.models == {"tiny": {"source": "/there"}}
    created = {"lm": {"create": "awd-lstm", "option": {"layers": 2}, "tune": False}}
    made = Study(**settings | {"models": created}).with_model("lm", "/there")
    assert made.models == {"lm": {"tune": False, "source": "/there"}}
    with pytest.raises(LexibitError, match="unknown model of the study 'tinny': did you mean 'tiny'"):
        study.with_model("tinny", "/there")
