"""A Transformer for translation, made from nothing: encoder, decoder, and a tokenizer for both languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from lexibit.errors import LexibitError

# the settings of a new model, and their defaults
SETTINGS: dict[str, int | float] = {
    "vocab_size": 8000,
    "d_model": 256,
    "layers": 3,
    "heads": 4,
    "ffn_dim": 1024,
    "dropout": 0.1,
    "positions": 256,
}

_PAD, _END = "<pad>", "</s>"
_LEAST = 256 + 2  # tokens: every byte is one, and these two


def create(
    texts: Iterable[str], settings: Mapping[str, int | float], seed: int
) -> tuple[MarianMTModel, PreTrainedTokenizerFast]:
    """A new model, and a tokenizer learned from its training texts.

    The Transformer of Vaswani et al. 2017 in the form of transformers' Marian: sinusoidal positions,
    normalization behind each sub-layer, ReLU, and one embedding matrix for both languages and the output. The
    tokenizer cuts the bytes of both languages into pieces by one byte-pair encoding (Sennrich et al. 2016).
    We chose the sizes for small data and a few CPU cores. The paper's base model has a vocabulary of 37000,
    ``d_model`` 512, 6 layers, 8 heads and ``ffn_dim`` 2048.

    Args:
        texts: of both languages, to train on.
        settings: some of ``SETTINGS``: tokens at most; width of the embeddings and layers; layers of the
            encoder, and again of the decoder; heads of an attention; width inside a layer; dropout in
            training; tokens of a text at most.
        seed: of the weights.

    Raises:
        LexibitError: a setting out of range, or no texts.
    """
    values: dict[str, Any] = SETTINGS | dict(settings)
    least = dict.fromkeys(SETTINGS, 1) | {"vocab_size": _LEAST, "dropout": 0, "positions": 2}
    for name, value in values.items():
        if not value >= least[name] or (name == "dropout" and not value < 1):
            raise LexibitError(
                f"transformer: {name} must be {least[name]} "
                f"{'to less than 1' if name == 'dropout' else 'or more'}, not {value}"
            )
    if values["d_model"] % (2 * values["heads"]):
        raise LexibitError(
            f"transformer: d_model must be an even number for each of {values['heads']} heads, which "
            f"{values['d_model']} is not: give a multiple of {2 * values['heads']}"
        )
    tokenizer = _tokenizer(texts, values["vocab_size"], values["positions"])
    sides = {
        f"{side}_{name}": values[value]
        for side in ("encoder", "decoder")
        for name, value in (("layers", "layers"), ("attention_heads", "heads"), ("ffn_dim", "ffn_dim"))
    }
    config = MarianConfig(
        **sides,
        vocab_size=len(tokenizer),
        d_model=values["d_model"],
        dropout=values["dropout"],
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=values["positions"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # a translation starts from padding, as Marian's do
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MarianMTModel(config), tokenizer


def _tokenizer(texts: Iterable[str], vocab_size: int, positions: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of some texts, which ends every text with a token."""
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise LexibitError("transformer: the training text is empty: its tokenizer is made from it")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # a text begins like any other word: with a space, which is not the text's
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", pair=f"$A $B {_END}", special_tokens=[(_END, backend.token_to_id(_END))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_END,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
