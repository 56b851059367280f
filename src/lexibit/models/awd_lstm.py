"""AWD-LSTM: the word-level language model of Merity, Keskar and Socher 2017, as a model of transformers.

"Regularizing and Optimizing LSTM Language Models", https://arxiv.org/abs/1708.02182.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    get_constant_schedule,
)
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from lexibit.errors import LexibitError
from lexibit.models.nt_asgd import NTASGD, NTASGDCallback

UNKNOWN, END = "<unk>", "<eos>"

# of every layer, its hidden state and its cell: [1, batch, size of the layer] each
State = tuple[tuple[Tensor, Tensor], ...]


class AWDLSTMConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What an AWD-LSTM is made of.

    The defaults are the paper's for Penn Treebank, but for ``batch_columns``, its number for WikiText-2 (40
    for Penn Treebank); for WikiText-2 it raises ``input_dropout`` to 0.65. ``evaluation_columns`` is what the
    authors' code has for validation.

    Attributes:
        vocab_size: words, ``<unk>`` and ``<eos>`` among them.
        embedding_size: of the word vectors, and so of the last layer, as the softmax is tied to them.
        hidden_size: of the other layers.
        num_hidden_layers: LSTM layers.
        embedding_dropout: share of the vocabulary's words that a training step drops, all their occurrences.
        input_dropout: variational dropout of the word vectors.
        hidden_dropout: variational dropout between layers.
        output_dropout: variational dropout of the last layer's output.
        weight_dropout: DropConnect of the hidden-to-hidden matrices.
        activation_regularization: the paper's alpha (AR).
        temporal_regularization: the paper's beta (TAR).
        bptt: words that a training step goes back through, on average nearly.
        batch_columns: how many parts the training text is cut into, to be read side by side.
        evaluation_columns: how many parts an evaluated text is cut into at most.
        tie_word_embeddings: whether the softmax has the word vectors for weights.
    """

    model_type = "awd-lstm"

    vocab_size: int = 10000
    embedding_size: int = 400
    hidden_size: int = 1150
    num_hidden_layers: int = 3
    embedding_dropout: float = 0.1
    input_dropout: float = 0.4
    hidden_dropout: float = 0.3
    output_dropout: float = 0.4
    weight_dropout: float = 0.5
    activation_regularization: float = 2.0
    temporal_regularization: float = 1.0
    bptt: int = 70
    batch_columns: int = 80
    evaluation_columns: int = 10
    tie_word_embeddings: bool = True
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the numbers."""
        for name, default in SETTINGS.items():
            value = getattr(self, name)
            high, said = math.inf, "1 or more" if isinstance(default, int) else "0 or more"
            if name.endswith("dropout"):
                high, said = math.nextafter(1.0, 0.0), "0 to less than 1"
            if not int(isinstance(default, int)) <= value <= high:
                raise LexibitError(f"{self.model_type}: {name} must be {said}, not {value}")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


# the settings of a new model, and their defaults
SETTINGS: dict[str, int | float] = {
    name: getattr(AWDLSTMConfig, name)
    for name in AWDLSTMConfig.__annotations__
    if name not in ("tie_word_embeddings", "eos_token_id")
}


@dataclass
class AWDLSTMOutput(ModelOutput):
    """What an AWD-LSTM gives.

    Attributes:
        loss: mean negative log-likelihood in nats; in training with AR and TAR added.
        logits: ``[batch, words, vocabulary]``.
        state: of every layer, behind the last word.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class WeightDropLSTM(nn.LSTM):
    """One LSTM layer, with DropConnect on its hidden-to-hidden matrix (the paper's section 2).

    The dropped matrix is made afresh from ``self.weight_hh_l0`` at every forward pass, and never set: so the
    weight may as well be in codes, which decode as they are read and pass their gradient on.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, input_size: int, hidden_size: int, weight_dropout: float) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)
        self.weight_dropout = weight_dropout

    def forward(  # type: ignore[override]
        self, input: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All hidden states ``[batch, words, hidden]``, and the state behind the last word.

        Args:
            input: ``[batch, words, input]``.
            state: to go on from, ``[1, batch, hidden]`` twice; zeros if not given.
        """
        if state is None:
            zeros = input.new_zeros(1, len(input), self.hidden_size)
            state = zeros, zeros
        dropped = F.dropout(self.weight_hh_l0, self.weight_dropout, self.training)
        weights = [self.weight_ih_l0, dropped, self.bias_ih_l0, self.bias_hh_l0]
        output, hidden, cell = torch.lstm(
            input,
            state,
            weights,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=self.training,
            bidirectional=False,
            batch_first=True,
        )
        return output, (hidden, cell)


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Variational dropout (Gal and Ghahramani 2016): one mask a sequence, the same for all its words.

    Args:
        x: ``[batch, words, features]``.
        p: share that is dropped.
        training: nothing is dropped if not.
    """
    return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), p) if training and p else x


class AWDLSTMForCausalLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The AWD-LSTM.

    The paper says: dropout of whole words in the embedding, variational dropout on input, between layers and
    on the output, DropConnect on the hidden-to-hidden matrices, a softmax tied to the word vectors, and two
    more terms in the loss: alpha times the L2 norm of the last layer's output after dropout (AR), and beta
    times that of the difference between its outputs at neighbouring words (TAR). We take the *mean* of the
    squares for the norm, as the authors' code does. Weights begin uniform within 1/sqrt(size of the layer),
    word vectors within 0.1; the softmax's bias begins at zero.

    Text is read in chunks. Either the caller carries the state from one to the next (``state``), or the model
    does (``reset``): then a chunk goes on from where the last one given with ``reset`` ended, without
    gradients between the two. What the model carries is no part of its weights and is not saved.
    """

    config_class = AWDLSTMConfig
    config: AWDLSTMConfig
    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "embed_tokens.weight"
    }

    carries_state: ClassVar[bool] = True
    """Tells tasks to give it a text in order, by ``state`` or ``reset``, in columns and chunks as its
    configuration says."""

    training_arguments: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 30.0,
        "max_grad_norm": 0.25,
        "weight_decay": 1.2e-6,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    """How it is trained, as ``transformers.TrainingArguments`` calls it: the paper's numbers, but the weight
    decay, which is from the authors' code. A batch is one chunk of all columns."""

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        between = [config.hidden_size] * (config.num_hidden_layers - 1)
        sizes = [config.embedding_size, *between, config.embedding_size]
        self.layers = nn.ModuleList(
            WeightDropLSTM(size, next_size, config.weight_dropout) for size, next_size in pairwise(sizes)
        )
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self._carried: State | None = None
        self.chunk_length = config.bptt  # words in the last chunk that it was trained on
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            bound = 1 / math.sqrt(module.hidden_size)
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding | nn.Linear):
            init.uniform_(module.weight, -0.1, 0.1)
            if isinstance(module, nn.Linear):
                init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        reset: Tensor | bool | None = None,
        state: State | None = None,
    ) -> AWDLSTMOutput:
        """The next word's logits at every word.

        Args:
            input_ids: ``[batch, words]``.
            labels: like ``input_ids``, of which each word is what the one before should predict; -100 counts
                nothing.
            shift_labels: what each word should predict itself: the next one, also beyond the last.
            reset: carry the state in the model: from zeros if true, on from the last chunk if false.
            state: carry the state outside: the one that the chunk before gave.
        """
        if reset is not None:
            state = None if bool(reset) else self._carried
        config, training = self.config, self.training
        x = locked_dropout(self._embedded(input_ids), config.input_dropout, training)
        states = []
        for index, layer in enumerate(self.layers):
            raw, after = layer(x, None if state is None else state[index])
            states.append(after)
            last = index == len(self.layers) - 1
            x = locked_dropout(raw, config.output_dropout if last else config.hidden_dropout, training)
        logits = self.lm_head(x)
        if reset is not None:
            self._carried = tuple((hidden.detach(), cell.detach()) for hidden, cell in states)
            if training:
                self.chunk_length = input_ids.shape[1]
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = None
        if shift_labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), shift_labels.flatten())
            if training:
                loss = loss + config.activation_regularization * x.square().mean()
                if raw.shape[1] > 1:
                    steps = (raw[:, 1:] - raw[:, :-1]).square().mean()
                    loss = loss + config.temporal_regularization * steps
        return AWDLSTMOutput(loss, logits, tuple(states))

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """The words' vectors; in training without those of the words that are dropped, everywhere."""
        vectors: Tensor = self.embed_tokens(input_ids)
        p = self.config.embedding_dropout
        if not self.training or not p:
            return vectors
        words = F.dropout(vectors.new_ones(self.config.vocab_size, 1), p)
        return vectors * words[input_ids]

    def forget(self) -> None:
        """Carry no state on: the next chunk begins from zeros."""
        self._carried = None

    def training_setup(
        self,
        learning_rate: float = 30.0,
        *,
        parameters: Iterable[Any] | None = None,
        weight_decay: float = 1.2e-6,
        patience: int = 5,
    ) -> tuple[Optimizer, LRScheduler, list[TrainerCallback]]:
        """How the paper trains it (Algorithm 1): NT-ASGD, at a constant learning rate.

        For ``Trainer(optimizers=(optimizer, scheduler), callbacks=[..., *callbacks])`` with arguments from
        :attr:`training_arguments`, on one process. What else the trainer must do, and what the callbacks do,
        see :class:`lexibit.models.nt_asgd.NTASGDCallback`.

        Args:
            learning_rate: of chunks of ``bptt`` words; of others in proportion to their length.
            parameters: what to train, or groups of it as PyTorch's optimizers take them, with learning rates
                of their own; all parameters of the model if not given.
            weight_decay: L2 penalty.
            patience: the paper's n: averaging begins when an evaluation is worse than the best of those more
                than that many evaluations ago.
        """
        trained = self.parameters() if parameters is None else parameters
        optimizer = NTASGD(trained, lr=learning_rate, weight_decay=weight_decay, patience=patience)
        return optimizer, get_constant_schedule(optimizer), [NTASGDCallback(self, optimizer)]


def create(
    texts: Iterable[str], settings: Mapping[str, int | float], seed: int
) -> tuple[AWDLSTMForCausalLM, PreTrainedTokenizerFast]:
    """A new model, and a tokenizer that knows the words of its training text.

    Args:
        texts: the training text, in pieces of whole lines.
        settings: some of ``SETTINGS``; ``vocab_size`` keeps that many of the words, the most frequent.
        seed: of the weights.

    Raises:
        LexibitError: a setting out of range, or a text without words.
    """
    values: dict[str, Any] = dict(settings)
    words = AWDLSTMConfig(**values).vocab_size if "vocab_size" in values else None
    tokenizer = word_tokenizer(texts, words)
    values |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = AWDLSTMConfig(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AWDLSTMForCausalLM(config), tokenizer


def word_tokenizer(texts: Iterable[str], words: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of a text: what stands between white space, and ``<eos>`` for a line's end.

    Args:
        texts: the text, in pieces of whole lines.
        words: how many to keep, the most frequent, with ``<eos>`` and ``<unk>``, which stands for all others;
            all if not given.

    Raises:
        LexibitError: there are no words.
    """
    counts = Counter(word for text in texts for word in text.split())
    if not counts:
        raise LexibitError("awd-lstm: the training text holds no words: its tokenizer is made from them")
    special = [UNKNOWN, END]
    others = sorted(counts.keys() - special, key=lambda word: (-counts[word], word))
    known = [*special, *others][:words]
    vocabulary = {word: number for number, word in enumerate(known)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Replace("\n", f" {END} ")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token=UNKNOWN, eos_token=END
    )


AutoConfig.register(AWDLSTMConfig.model_type, AWDLSTMConfig)
AutoModelForCausalLM.register(AWDLSTMConfig, AWDLSTMForCausalLM)
