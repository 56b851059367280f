"""How much each weight's error counts: by its magnitude, or by tensors that a user brings or gathers.

Every scheme that minimises an error takes importances. They are named by text, in a recipe and on the command
line:

============================  =======================================================================
spelling                      importance
============================  =======================================================================
``E=1,C=0.999,P=0.05``        by magnitude (:class:`Magnitude`); what is left out has its default
``E=1,P=0.05,mask``           the same, and the pruned weights become exactly zero
``path/to/file.safetensors``  tensors of the weights' shapes under the weights' names
============================  =======================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lexibit.errors import LexibitError, unknown
from lexibit.files import replacing
from lexibit.groups import matrix_shape
from lexibit.nn import codebooks
from lexibit.nn.modes import evaluating
from lexibit.progress import progress_bar

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Magnitude:
    """Importance by magnitude, as in Kwon, Lee et al. 2020.

    Their code says: with ``a = |w|`` over the whole matrix and ``s`` its sorted values,
    ``m = min(1, a / Q_C)^E * [a > Q_P]``, where ``Q_C = s[int(n C)]`` (the largest if ``C = 1``) and
    ``Q_P = s[int(n P)]`` (no indicator if ``P = 0``).

    We chose: ``E = 0`` makes all of the first factor 1, also of zeros; so does ``Q_C = 0``, where all that
    counts is zero. Setting pruned weights to exactly zero would add a level that k bits cannot hold. So P
    only takes their importance away, and each still takes a level like any other weight; with ``mask``
    they do become zero, by a mask that is stored, and takes one bit a weight. Where many
    weights lie on the border ``Q_P`` itself, the mask takes only those below it, so that it takes one weight
    more than P at most, and zeros, which lose nothing.

    Attributes:
        E: exponent, 0 to 1 in the paper's searches, any number from 0.
        C: share of the weights below the magnitude from which all count alike, 0 to 1.
        P: share of the weights that count nothing, the smallest, 0 to less than 1.
        mask: whether these become exactly zero.
    """

    E: float = 1.0
    C: float = 1.0
    P: float = 0.0
    mask: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, low, high, said in (
            ("E", 0.0, math.inf, "0 or more"),
            ("C", 0.0, 1.0, "0 to 1"),
            ("P", 0.0, math.nextafter(1.0, 0.0), "0 to less than 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise LexibitError(f"importance: {name} must be a number, not {value!r}")
            if not (low <= value <= high and math.isfinite(value)):
                raise LexibitError(f"importance: {name} must be {said}, not {value}")
        if self.mask and not self.P:
            raise LexibitError("importance: mask stores what P prunes, and P is 0: add P or drop mask")

    def of(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Importance of a float32 matrix, and where it becomes zero if there is a mask.

        Returns:
            float32 like the matrix, and bool like it or None.
        """
        importance = matrix.abs()
        if importance.numel() == 0:
            return importance, torch.zeros_like(importance, dtype=torch.bool) if self.mask else None
        clip = _order_statistic(importance, self.C) if self.E else 0.0
        border = _order_statistic(importance, self.P) if self.P else -1.0
        pruned = importance <= border
        zero = None
        if self.mask:
            zero = pruned
            if int(pruned.sum()) > importance.numel() * self.P + 1:
                zero = (importance < border) | (importance == 0)
        if clip > 0:
            importance.div_(clip).clamp_(max=1.0)
            if self.E != 1:
                importance.pow_(self.E)
        else:
            importance.fill_(1.0)
        return importance.masked_fill_(pruned, 0.0), zero


def _order_statistic(a: Tensor, share: float) -> float:
    """``s[int(n share)]`` of the sorted values, the largest for a share of 1."""
    at = min(int(a.numel() * share), a.numel() - 1)
    return float(a.max() if at == a.numel() - 1 else np.partition(a.numpy().ravel(), at)[at])


def parse(text: str) -> Magnitude | Path:
    """What a spelling (see the module's table) means.

    Raises:
        LexibitError: it means nothing.
    """
    if text.endswith(".safetensors"):
        return Path(text)
    settings: dict[str, Any] = {}
    for setting in text.split(","):
        name, equals, value = setting.strip().partition("=")
        if name in settings:
            raise LexibitError(f"importance {text!r}: {name} is given twice")
        if name == "mask":
            if equals:
                raise LexibitError(f"importance {text!r}: write mask alone, without '='")
            settings[name] = True
            continue
        if name not in ("E", "C", "P"):
            known = ["E", "C", "P", "mask", "FILE.safetensors"]
            raise unknown("importance setting", name, known)
        try:
            settings[name] = float(value)
        except ValueError:
            raise LexibitError(f"importance {text!r}: write {name}=NUMBER") from None
    return Magnitude(**settings)


def save(importances: Tensors, path: str | Path) -> None:
    """Save importances to a safetensors file, under their weights' names.

    Raises:
        LexibitError: one of them is no tensor, or the file cannot be written.
    """
    for name, importance in importances.items():
        _check_kind(name, importance)
    # copies, as safetensors refuses tensors that share memory
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in importances.items()}
    with replacing(Path(path)) as staged:
        save_file(copies, staged)


def load(path: str | Path) -> dict[str, Tensor]:
    """The importances of a file of :func:`save`, by their weights' names."""
    with _opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def names(path: Path) -> list[str]:
    """The names in a file of importances; reads no tensor."""
    with _opened(path) as file:
        return list(file.keys())


def find(source: Tensors | Path, aliases: Iterable[str]) -> Tensor | None:
    """The importance of the weight of that name, or of any of its other names; None if there is none.

    Raises:
        LexibitError: two of its names have different ones.
    """
    if isinstance(source, Path):
        with _opened(source) as file:
            known = set(file.keys())
            return _only({name: file.get_tensor(name) for name in aliases if name in known})
    return _only({name: source[name] for name in aliases if name in source})


def _only(found: Tensors) -> Tensor | None:
    """The importance that all names agree on."""
    if not found:
        return None
    first, *others = found
    for other in others:
        if found[first] is not found[other] and not torch.equal(found[first], found[other]):
            raise LexibitError(f"{first} and {other} are one weight with two importances: give it one")
    return found[first]


def _check_kind(name: str, importance: object) -> None:
    if not isinstance(importance, Tensor) or importance.is_complex():
        kind = importance.dtype if isinstance(importance, Tensor) else type(importance).__name__
        raise LexibitError(f"{name}: its importance must be a tensor of real numbers, not {kind}")


def checked(name: str, shape: tuple[int, ...], importance: Tensor) -> Tensor:
    """A given importance as a float32 matrix on the CPU.

    Raises:
        LexibitError: it has another shape than its weight, is negative, not finite, or all zero.
    """
    _check_kind(name, importance)
    if tuple(importance.shape) != shape:
        raise LexibitError(f"{name}: its importance is {list(importance.shape)}, must be {list(shape)}")
    values = importance.detach().to("cpu").reshape(matrix_shape(shape))
    if values.numel() == 0:
        return values.float()
    low, high = values.aminmax()
    if not (low >= 0 and high.isfinite()):
        raise LexibitError(f"{name}: its importance must be finite and not negative, it is {_extent(values)}")
    if high == 0:
        raise LexibitError(
            f"{name}: its importance is all zero, so that no error would count: leave the weight out of the "
            "importances to have its errors count alike"
        )
    # only their ratios count: the largest is 1, whatever the scale they came in
    return (values.double() / high.double()).float()


def _extent(values: Tensor) -> str:
    bad = int((~values.isfinite()).sum())
    return f"NaN or infinite in {bad} places" if bad else f"as low as {float(values.min()):.3g}"


@contextmanager
def _opened(path: Path) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise LexibitError(f"importance {path}: no safetensors file that can be read ({error})") from error


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Gather squared gradients: how much the loss minds an error of each weight.

    The mean over the batches of ``(d loss / d w)^2``, the diagonal of the empirical Fisher information if a
    batch holds one example (with more, their gradients are averaged before they are squared). Kept in memory
    are one sum a weight, in float32, and one gradient at a time.

    Args:
        model: a float model; as it was afterwards, but for the state of random generators. Runs without
            dropout.
        batches: what ``loss`` takes, each at least once.
        loss: gives the loss, a scalar, of the model on a batch; ``model(**batch).loss`` if not given.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        Importances of every weight of two axes or more that the loss depends on, by name, on the CPU. Tied
        weights come once.

    Raises:
        LexibitError: no batch, no scalar loss, or a gradient that is NaN or infinite.
    """
    loss = loss or _own_loss
    total: dict[str, Tensor] = {}
    count = 0

    def collect(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            parameter.grad = None
            if name not in total:
                total[name] = torch.zeros_like(gradient, dtype=torch.float32)
            total[name].addcmul_(gradient.float(), gradient.float())

        return add

    with ExitStack() as undo:
        undo.enter_context(_without_traces(model))
        wanted = {name: p for name, p in model.named_parameters() if p.dim() >= 2 and p.is_floating_point()}
        if codebooks(model) or not wanted:
            raise LexibitError(f"{type(model).__name__} is not a float model: gather from the float model")
        # cuDNN has no gradients for recurrent layers in evaluation mode
        undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        for name, parameter in wanted.items():
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(collect(name))  # type: ignore[no-untyped-call]
            undo.callback(hook.remove)
        bar = undo.enter_context(progress_bar(progress))
        for batch in bar.track(batches, description="gradients"):
            with torch.enable_grad():
                value = loss(model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise LexibitError("the loss must be a tensor of one number that depends on the weights")
                if not value.isfinite():
                    raise LexibitError(f"the loss of batch {count} is {value.item()}: look at the batch")
                value.backward()  # type: ignore[no-untyped-call]
            count += 1
    if not count:
        raise LexibitError("no batch to gather gradients from")
    for name, gathered in total.items():
        if not gathered.isfinite().all():
            raise LexibitError(f"{name}: some of its gradients are NaN or infinite: look at the loss")
    return {name: gathered.div_(count).cpu() for name, gathered in total.items()}


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model gives if the batch has labels."""
    value = getattr(model(**batch), "loss", None)
    if not isinstance(value, Tensor):
        raise LexibitError(f"{type(model).__name__} gave no loss: put labels in the batches, or give loss=")
    return value


@contextmanager
def _without_traces(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, and all as it was afterwards."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, (requires_grad, grad) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
