"""Runs of a model on batches, from a point on and no further than needed, side by side."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from lexibit.calibration.route import Place, Point, Stage, given
from lexibit.errors import LexibitError
from lexibit.plan import Use
from lexibit.replay import Replay
from lexibit.threads import side_by_side

Batch = Mapping[str, Any]


_OF_ENCODER = re.compile(
    r"(encoder_attn|cross_?attn|cross_?attention|EncDecAttention)\..*?\.?(k|v|key|value)(_proj)?$"
)


def hidden(output: Any) -> Tensor:
    """What a block hands on to the next: the first of several things."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


class _Enough(Exception):  # noqa: N818 - it is no error
    """What a run is for has been seen."""


class Runs:
    """Runs a model on the same batches again and again.

    Args:
        model: in evaluation mode.
        batches: what it is called with, by name; ``attention_mask`` and ``decoder_attention_mask`` say what
            is padding.
        chains: of its route.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], chains: list[list[nn.Module]]) -> None:
        self._model, self._batches = model, batches
        self._here = threading.local()
        self._chains = chains
        self._replays = [Replay(chain, lambda: int(self._here.number)) for chain in chains]
        self._names = {module: name for name, module in model.named_modules()}

    @property
    def count(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    @property
    def point(self) -> Point:
        """From where on the model runs."""
        return tuple(replay.first for replay in self._replays)

    def block(self, place: Place) -> nn.Module:
        """The block in a place."""
        return self._chains[place[0]][place[1]]

    def advance(self, point: Point) -> None:
        """Go on from a point, which is no earlier than the last one: what lies in front of it is kept."""
        for replay, chain, first in zip(self._replays, self._chains, point, strict=True):
            if first > replay.first:
                replay.advance(first, partial(self._up_to, chain[first - 1]))

    def _up_to(self, module: nn.Module) -> None:
        """Run all batches until a module has ended; the chain that it is in replays itself."""

        def stop(*_: Any) -> None:
            raise _Enough

        with ExitStack() as undo:
            for replay, chain in zip(self._replays, self._chains, strict=True):
                if module not in chain:
                    undo.enter_context(replay.replaying())
            undo.callback(module.register_forward_hook(stop).remove)
            list(side_by_side(self.run, range(len(self._batches))))

    def hands_on(self, place: Place, number: int) -> Tensor:
        """What the block in a place, at which runs go on, was given by the one before it on a batch."""
        return hidden(self._replays[place[0]].kept(number))

    def unpadded(self, block: nn.Module, number: int, x: Tensor) -> Tensor:
        """What of a block's output on a batch is no padding: ``[n, channels]``."""
        batch = self._batches[number]
        masks = (batch.get(name) for name in _masks(self._names[block]))
        return _kept(x, [mask.bool() for mask in masks if mask is not None], 1)

    @contextmanager
    def reaching(self, block: nn.Module) -> Iterator[Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Gives what runs a batch, by its number, up to a block, and tells what that is called with."""
        here = self._here

        def reached(_: nn.Module, args: Any, kwargs: Any) -> None:
            if getattr(here, "reaches", False):
                here.call = args, kwargs
                raise _Enough

        def call(number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            here.reaches = True
            try:
                self.run(number)
            finally:
                here.reaches = False
            call: tuple[tuple[Any, ...], dict[str, Any]] = here.call
            return call

        with ExitStack() as undo:
            for replay in self._replays:
                undo.enter_context(replay.replaying())
            undo.callback(block.register_forward_pre_hook(reached, with_kwargs=True).remove)
            yield call

    def run(self, number: int) -> None:
        """Run one batch, as far as a hook lets it."""
        self._here.number, self._here.calls, self._here.inputs = number, 0, []
        # not in inference mode, whose tensors a block whose levels are trained could not keep
        with torch.no_grad(), suppress(_Enough):
            self._model(**self._batches[number])

    @contextmanager
    def watching(self, stage: Stage) -> Iterator[Callable[[int], list[Tensor]]]:
        """Gives what runs a batch, by its number, and tells what the weights of a stage are multiplied with.

        That is the inputs of every call, ``[n, channels]``, or the rows looked up, ``[n]``; padding left out.
        """
        here, (last, times) = self._here, stage.last

        def seen(use: Use, x: Any, output: Any = None) -> None:
            batch = self._batches[here.number]
            masks = (batch.get(name) for name in _masks(use.module_name))
            here.inputs.append(_inputs(use, x, output, [mask.bool() for mask in masks if mask is not None]))

        def counted(*_: Any) -> None:
            here.calls += 1
            if here.calls == times:
                raise _Enough

        looked_up = [use for use in stage.uses if use.kind == "embedding"]

        def run(number: int) -> list[Tensor]:
            with _LookUps(looked_up, seen) if looked_up else nullcontext():
                self.run(number)
            found: list[Tensor] = here.inputs
            return found

        with ExitStack() as undo:
            for replay in self._replays:
                undo.enter_context(replay.replaying())
            for use in stage.uses:
                if use.kind != "embedding":
                    undo.callback(_watch(use, seen).remove)
            # these have run when their inputs are known
            if isinstance(last, nn.RNNBase | nn.Embedding):
                undo.callback(last.register_forward_hook(counted).remove)
            else:
                undo.callback(last.register_forward_pre_hook(counted).remove)
            yield run


class _LookUps(TorchFunctionMode):
    """Shows which rows of embeddings are looked up: some modules work them out themselves, from a mask."""

    def __init__(self, uses: Sequence[Use], seen: Callable[..., None]) -> None:
        super().__init__()
        self._uses, self._seen = {id(use.module.get_parameter(use.parameter)): use for use in uses}, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            use = self._uses.get(id(args[1]))
            if use is not None:
                self._seen(use, args[0])
        return func(*args, **(kwargs or {}))


def _watch(use: Use, seen: Callable[..., None]) -> Any:
    """A hook that shows what a use is called with, and if it is recurrent what it gave."""
    if use.kind == "recurrent":
        return use.module.register_forward_hook(
            lambda _, args, kwargs, output: seen(use, given(args, kwargs), output), with_kwargs=True
        )
    return use.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen(use, given(args, kwargs)), with_kwargs=True
    )


def _masks(name: str) -> tuple[str, str]:
    """The masks that may tell what of a module's inputs is padding, the likelier first.

    A decoder's inputs are its own, but for keys and values of its attention to the encoder.
    """
    masks = ("attention_mask", "decoder_attention_mask")
    own = "decoder" in name.split(".") and not _OF_ENCODER.search(name)
    return masks[::-1] if own else masks


def _inputs(use: Use, x: Any, output: Any, masks: list[Tensor]) -> Tensor:
    if use.kind == "recurrent":
        return _recurrent(use, x, output, masks)
    # what is multiplied may be a parameter itself, like DeBERTa's relative positions
    return _kept(x, masks, 0) if use.kind == "embedding" else _kept(x.detach(), masks, 1).float()


def _kept(x: Tensor, masks: list[Tensor], axes: int) -> Tensor:
    """What stands in the places that no mask leaves out: ``[n]``, and the last axes of x."""
    places, inside = x.shape[: x.dim() - axes], x.shape[x.dim() - axes :]
    for mask in masks:
        if places == mask.shape:
            return x[mask].view(-1, *inside)
        if places == (mask.numel(),):
            return x[mask.reshape(-1)].view(-1, *inside)
    return x.reshape(-1, *inside)


def why_not(use: Use) -> str:
    """Why nothing is known of what a weight is multiplied with, or nothing."""
    if use.kind == "parameter":
        return "nothing is known of how it is used"
    if use.kind == "recurrent":
        module = use.module
        assert isinstance(module, nn.RNNBase)
        if module.num_layers > 1 or module.bidirectional or module.proj_size:
            return "only recurrent modules of one layer, in one direction, show all of their inputs"
    return ""


def _recurrent(use: Use, x: Any, output: Any, masks: list[Tensor]) -> Tensor:
    """The inputs, or the states in front of each step but the first, which is zero."""
    if isinstance(x, PackedSequence):
        raise LexibitError(f"{use.name}: its module takes packed sequences: calibrate on padded ones")
    seen: Tensor = x if "_ih_" in use.parameter else output[0]
    if seen.dim() == 3 and not use.module.batch_first:
        seen = seen.transpose(0, 1)
    if "_ih_" not in use.parameter:
        seen = seen[..., :-1, :]
        masks = [mask[..., 1:] for mask in masks]
    return _kept(seen, masks, 1).float()
