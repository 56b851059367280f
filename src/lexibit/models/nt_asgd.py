"""NT-ASGD: SGD that begins to average when validation gets no better.

Merity, Keskar and Socher 2017, "Regularizing and Optimizing LSTM Language Models", Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lexibit.errors import LexibitError


class NTASGD(torch.optim.SGD):
    """SGD that is told the validation's perplexities, and averages its iterates from a point that they tell.

    The paper says: at every evaluation, if there were more than n before and it is worse than the best of
    those more than n evaluations ago, begin to average; the result is the mean of all iterates from then on.
    And it scales the learning rate by the length of a chunk of text against the usual one.

    All that a step depends on is in ``state_dict``: also the perplexities, the averages, and whether these
    stand in the model at the moment, with the iterates kept here.

    Attributes:
        patience: the paper's n.
        length_scale: what the next step's learning rate is multiplied by.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float = 30.0, weight_decay: float = 1.2e-6, patience: int = 5
    ) -> None:
        if patience < 1:
            raise LexibitError(f"NT-ASGD: its patience must be 1 or more, not {patience}")
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.patience = patience
        self.length_scale = 1.0
        self._record.update(perplexities=[], averaged=0, in_model=False)

    @property
    def _record(self) -> dict[str, Any]:
        # a place that state_dict keeps
        return self.param_groups[0]

    @property
    def averaging(self) -> bool:
        """Whether averaging has begun."""
        return bool(self._record["averaged"])

    @property
    def perplexities(self) -> list[float]:
        """What :meth:`observe` was told."""
        return list(self._record["perplexities"])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of SGD, and into the averages with it if they have begun."""
        if self._record["in_model"]:
            raise RuntimeError("the averages stand in the model: step after use_averages(False)")
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= self.length_scale
        try:
            loss = super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        if self.averaging:
            self._record["averaged"] += 1
            for parameter in self._parameters():
                self.state[parameter]["average"].lerp_(parameter, 1 / self._record["averaged"])
        return loss

    @torch.no_grad()
    def observe(self, perplexity: float) -> None:
        """Take the perplexity of an evaluation, and begin to average if it says so."""
        past = self.perplexities
        if not self.averaging and len(past) > self.patience and perplexity > min(past[: -self.patience]):
            self._record["averaged"] = 1
            for parameter in self._parameters():
                self.state[parameter]["average"] = parameter.detach().clone()
        self._record["perplexities"] = [*past, perplexity]

    @torch.no_grad()
    def use_averages(self, use: bool) -> None:
        """Put the averages into the model, or the iterates back; nothing if they are there, or none are."""
        if not self.averaging or self._record["in_model"] == use:
            return
        for parameter in self._parameters():
            average = self.state[parameter]["average"]
            iterate = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(iterate)
        self._record["in_model"] = use


class Stateful(Protocol):
    """What the callback asks of a model."""

    config: Any
    chunk_length: int

    def forget(self) -> None:
        """Carry no state on."""


class NTASGDCallback(TrainerCallback):
    """What makes transformers' Trainer train by :class:`NTASGD` a model that reads text in order.

    The trainer must

    - give the features in their order, one a batch, on one process (a dataset with ``ordered = True``);
    - clip gradients (``max_grad_norm``);
    - put ``eval_perplexity`` into the metrics of every evaluation during training.

    Then the callback

    - scales each step's learning rate by the length of its chunk;
    - hands every evaluation's perplexity to the optimizer;
    - puts the averages, once there are any, into the model for every evaluation, checkpoint and end of an
      epoch, so that what is evaluated, saved or left after training are averages; and the iterates back
      before the next step;
    - lets the carried state begin from zeros behind every checkpoint, so that a run that is resumed there
      goes on as one that never stopped.
    """

    def __init__(self, model: Stateful, optimizer: NTASGD) -> None:
        self.model = model
        self.optimizer = optimizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what a model that carries its state cannot do."""
        self.model.forget()
        for name, value, wanted in (
            ("processes", args.world_size, 1),
            ("gradient_accumulation_steps", args.gradient_accumulation_steps, 1),
            ("train_batch_size", args.train_batch_size, 1),
        ):
            if value != wanted:
                raise LexibitError(
                    f"{name} is {value}: a model that carries its state from chunk to chunk is trained with "
                    f"{wanted}; batch_columns in its settings says how much text it reads side by side"
                )
        if not args.max_grad_norm:
            raise LexibitError("max_grad_norm is 0: NT-ASGD needs it, 0.25 in the paper")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the iterates."""
        self.optimizer.use_averages(False)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scale the learning rate."""
        self.optimizer.length_scale = self.model.chunk_length / self.model.config.bptt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate and save the averages."""
        if control.should_evaluate or control.should_save:
            self.optimizer.use_averages(True)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End with the averages."""
        self.optimizer.use_averages(True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimizer see the perplexity."""
        self.optimizer.observe(float(kwargs["metrics"]["eval_perplexity"]))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin from zeros, as a run that is resumed from this checkpoint will."""
        self.model.forget()
