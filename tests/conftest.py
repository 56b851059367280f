"""What tests of several modules share: no network, no progress bars, tiny models."""

import os

# before any test imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # as many workers as cores: one thread for each, and for the processes that it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import ctypes
import json
import re
import sys

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lexibit import CodebookWeight, cli, ops
from lexibit.groups import Groups, matrix_shape
from lexibit.levels import LevelForm
from lexibit.ops import native
from lexibit.weight import WeightSpec

if emulator := os.environ.get("LEXIBIT_TEST_AMX"):
    # tests/test_amx.py runs others so: what the CPU lacks this library does
    ctypes.CDLL(emulator)
    native._kernels.assume("amx")

# no deadlines: the first example of a test may pay for an import
settings.register_profile("lexibit", deadline=None, max_examples=40)
settings.load_profile("lexibit")

VOCABULARY = 97
POSITIONS = 40

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
}
_ROBERTA = _BERT | {"max_position_embeddings": POSITIONS + 2}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 40,
    "max_position_embeddings": POSITIONS,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MARIAN = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 2,
}
_LLAMA = _BERT | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}

# name: class, configuration
_TINY = {
    "bert": ("BertModel", "BertConfig", _BERT),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _BERT),
    "albert-mlm": ("AlbertForMaskedLM", "AlbertConfig", _BERT | {"embedding_size": 16}),
    "distilbert-classifier": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTILBERT),
    "distilbert-mlm": ("DistilBertForMaskedLM", "DistilBertConfig", _DISTILBERT),
    "roberta-mlm": ("RobertaForMaskedLM", "RobertaConfig", _ROBERTA),
    "roberta-qa": ("RobertaForQuestionAnswering", "RobertaConfig", _ROBERTA),
    "longformer": ("LongformerModel", "LongformerConfig", _ROBERTA | {"attention_window": [4, 4]}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2-classifier": ("GPT2ForSequenceClassification", "GPT2Config", _GPT2 | {"pad_token_id": 0}),
    "marian": ("MarianMTModel", "MarianConfig", _MARIAN),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model():
    """A function that makes a tiny transformers model with random weights, none of them zero."""

    def make(name, *, seed=0, **changes):
        cls, config, values = _TINY[name]
        torch.manual_seed(seed)
        model = getattr(transformers, cls)(getattr(transformers, config)(**values | changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # not Marian's sinusoids
                    parameter.normal_(0, 0.3)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A function that makes a tokenizer of the tiny models' vocabulary: a word, a token."""

    def make():
        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
        words = special + [f"w{index}" for index in range(len(special), VOCABULARY)]
        vocabulary = {word: index for index, word in enumerate(words)}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            unk_token="[UNK]",
            mask_token="[MASK]",
        )

    return make


@pytest.fixture
def float_folder(tmp_path, tiny_model, tiny_tokenizer):
    """A function that saves a tiny float model and its tokenizer to a folder."""

    def make(name="bert-classifier", folder="float", **changes):
        out = tmp_path / folder
        tiny_model(name, **changes).save_pretrained(out)
        tiny_tokenizer().save_pretrained(out)
        return out

    return make


@pytest.fixture
def exact():
    """The reference in place of the kernels: what runs from codes has the bits of the decoded weights."""
    with ops.kernels("reference"):
        yield


@pytest.fixture(scope="session")
def random_weight():
    """A function that makes a weight of random codes and levels."""

    def make(
        shape,
        bits=3,
        groups="matrix",
        form="table",
        dtype=torch.float32,
        levels_dtype="float32",
        seed=0,
        extra=(0, 0),
        mask=False,
        outliers=0,
    ):
        rows, columns = matrix_shape(shape)
        block = Groups.parse(groups, (rows + extra[0], columns + extra[1])).block
        form = LevelForm(form)
        spec = WeightSpec(shape, bits, block, form, levels_dtype, "float32", "random", extra, mask, outliers)
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(
            0, 2**bits, (spec.groups.rows, spec.groups.columns), generator=generator, dtype=torch.uint8
        )
        levels = torch.randn(spec.levels_shape, generator=generator).to(getattr(torch, levels_dtype))
        own = rows if extra[0] else columns
        origins = torch.randint(0, max(own, 1), (sum(extra),), generator=generator, dtype=torch.int32)
        zero = torch.rand(shape, generator=generator) < 0.3
        places = torch.randperm(rows * columns, generator=generator)[:outliers].sort().values
        added = places, torch.randn(outliers, generator=generator).half()
        return CodebookWeight.from_codes(
            spec,
            codes,
            levels.to(dtype),
            origins if any(extra) else None,
            zero if mask else None,
            added if outliers else None,
        )

    return make


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command line: exit code, standard output, standard error."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["lexibit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return main


@pytest.fixture
def run_json(run):
    """The same for a command that succeeds and prints one JSON document."""

    def main(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return main


@pytest.fixture
def fails(run):
    """The same for a command that fails: a single error, no traceback, nothing on standard output."""

    def main(*arguments, code=1):
        found, out, err = run(*arguments)
        assert found == code, (out, err)
        assert out == ""
        assert "Traceback" not in err
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())

    return main
