"""Weights into codes: one tensor, or many in threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lexibit import importance as importances
from lexibit import outliers, refine, schemes
from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import LexibitError
from lexibit.groups import Groups, matrix_shape
from lexibit.importance import Tensors
from lexibit.levels import LevelForm
from lexibit.nn import install
from lexibit.plan import PlannedWeight, input_axis, spec_of
from lexibit.progress import progress_bar
from lexibit.refine import Effort, Moments, Refined
from lexibit.weight import CodebookWeight, WeightSpec

_BAND = 1 << 22  # weights of a large matrix that are worked on at a time


def quantize_tensor(
    weight: Tensor,
    recipe: Recipe | None = None,
    *,
    importance: Tensor | None = None,
    moments: Moments | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    name: str = "weight",
    kind: str = "linear",
) -> CodebookWeight:
    """Choose levels and codes for one weight.

    Args:
        weight: floating point, two axes or more, on any device; not changed.
        recipe: scheme, bits, groups, importance; k-means with 4 bits for the whole matrix if not given.
        importance: how much each weight's error counts: finite, >= 0, of the weight's shape. Weights that
            share levels and count nothing at all are taken to count alike.
        moments: of the inputs that the weight is multiplied with (see :mod:`lexibit.refine`).
        effort: how long levels and codes are made better by the moments.
        seed: of any random choice.
        name: what errors call the tensor, and its name in a file of importances.
        kind: what uses the weight: ``conv1d`` is transformers' Conv1D, whose input channels are rows.

    Raises:
        LexibitError: NaN or infinite weights, a wrong shape, importances the scheme cannot use.
    """
    recipe = recipe or Recipe()
    if weight.dim() < 2 or not weight.is_floating_point():
        raise LexibitError(
            f"{name} is {weight.dtype} {list(weight.shape)}: only floating-point weights of two "
            "axes or more are quantized"
        )
    spec = spec_of(tuple(weight.shape), weight.dtype, recipe, name=name, kinds={kind})
    given = None if importance is None else {name: importance}
    source = recipe.weighing()
    if isinstance(source, Path) and name not in importances.names(source):
        raise LexibitError(
            f"importance {source}: has none for {name!r}: give the tensor's name there as name="
        )
    return _quantize(weight, spec, recipe, [name], given, seed, input_axis({kind}), moments, effort)[0]


def quantize_planned(
    planned: PlannedWeight, weight: Tensor, *, seed: int, given: Tensors | None = None
) -> CodebookWeight:
    """Choose levels and codes for a weight of a plan; ``given`` importances count where its scheme weighs."""
    given = given if planned.recipe.fitting().weighs else None
    kinds = {use.kind for use in planned.uses}
    return _quantize(weight, planned.spec, planned.recipe, planned.names, given, seed, input_axis(kinds))[0]


def quantize_calibrated(
    planned: PlannedWeight, weight: Tensor, moments: Moments, effort: Effort, *, seed: int
) -> tuple[CodebookWeight, Refined]:
    """Choose levels and codes for a weight of a plan whose inputs are known."""
    axis = input_axis({use.kind for use in planned.uses})
    found, refined = _quantize(
        weight, planned.spec, planned.recipe, planned.names, None, seed, axis, moments, effort
    )
    assert refined is not None
    return found, refined


def _quantize(
    weight: Tensor,
    spec: WeightSpec,
    recipe: Recipe,
    names: list[str],
    given: Tensors | None,
    seed: int,
    axis: int,
    moments: Moments | None = None,
    effort: Effort | None = None,
) -> tuple[CodebookWeight, Refined | None]:
    """Choose levels and codes for one weight; ``given`` may have its importance, by any of its names."""
    name, scheme = names[0], recipe.fitting()
    source = recipe.weighing()
    if moments is None and given is None and source is None and (height := _band(scheme, spec)):
        return _packed(
            name, spec, _in_bands(scheme, weight, spec, seed, axis, name, height), None, weight
        ), None
    values = weight.detach().to("cpu", torch.float32).reshape(matrix_shape(spec.shape))
    check_finite(name, weight, values)
    found = None if given is None else importances.find(given, names)
    pruned = None
    if found is not None and source is not None:
        raise LexibitError(f"{name}: its importance is given twice, as {recipe.importance!r} and as a tensor")
    if isinstance(source, Path):
        found = importances.find(source, names)
    if found is not None:
        if not scheme.weighs:
            raise LexibitError(f"{name}: {schemes.does_not_weigh(recipe.scheme)}")
        found = importances.checked(name, spec.shape, found)
    elif isinstance(source, importances.Magnitude):
        found, pruned = source.of(values)
    if moments is None or values.numel() == 0:
        choice = outliers.choose(scheme, values, spec, found, seed, axis, zero=pruned)
        del values  # packing takes memory of its own
        return _packed(name, spec, choice, pruned, weight), None
    if found is not None or source is not None:
        raise LexibitError(
            f"{name}: both an importance and its inputs say how its errors count: give one of the two"
        )
    choice, refined = refine.choose(
        scheme, values, spec, seed, axis, moments.checked(name, values.shape[axis]), effort or Effort()
    )
    return _packed(name, spec, choice, pruned, weight), refined


def is_banded(planned: PlannedWeight) -> bool:
    """Whether a weight is worked on some rows at a time, so that no float32 copy of all of it is made."""
    recipe = planned.recipe
    return recipe.importance is None and _band(recipe.fitting(), planned.spec) > 0


def _band(scheme: schemes.Scheme, spec: WeightSpec) -> int:
    """How many rows of a large weight are worked on at a time; 0 if they are not independent, or few."""
    rows, columns = matrix_shape(spec.shape)
    if rows * columns <= _BAND or spec.outliers or any(spec.extra) or not scheme.separate:
        return 0
    height = max(_BAND // (spec.block[0] * columns), 1) * spec.block[0]
    return height if height < rows else 0


def _in_bands(
    scheme: schemes.Scheme, weight: Tensor, spec: WeightSpec, seed: int, axis: int, name: str, height: int
) -> schemes.Choice:
    """What a scheme chooses, of so many rows at a time: all of a large weight in float32 takes memory."""
    matrix = weight.detach().reshape(matrix_shape(spec.shape))
    levels, codes = [], torch.empty(matrix.shape, dtype=torch.uint8)
    for first in range(0, len(matrix), height):
        rows = matrix[first : first + height]
        values = rows.to("cpu", torch.float32)
        check_finite(name, rows, values, first)
        block = min(spec.block[0], len(rows)), spec.block[1]
        groups = Groups(len(rows), matrix.shape[1], block)
        choice = scheme.choose(values, groups, spec.bits, None, seed, axis)
        levels.append(choice.levels)
        codes[first : first + height] = choice.codes
    return schemes.Choice(torch.cat(levels), codes)


def _packed(
    name: str, spec: WeightSpec, choice: schemes.Choice, pruned: Tensor | None, weight: Tensor
) -> CodebookWeight:
    """What was chosen as it will be stored and computed with, on the weight's device."""
    own = getattr(torch, spec.dtype)  # the weight may have come in float32, for its values' sake
    stored = choice.levels.to(getattr(torch, spec.levels_dtype)).to(own)
    packed = CodebookWeight.from_codes(spec, choice.codes, stored, choice.origins, pruned, choice.outliers)
    reach = _reach(spec, stored, choice)
    if reach >= torch.finfo(own).max and not packed.decode().isfinite().all():
        # a scale that was rounded up may carry the largest weight over the end of its dtype
        if spec.form is not LevelForm.TABLE:
            scales = packed.levels[:, :1] if spec.form is LevelForm.AFFINE else packed.levels
            scales.mul_(1 - torch.finfo(own).eps)
        if not packed.decode().isfinite().all():
            raise _does_not_fit(name, spec, reach)
    elif _drowned(spec, choice.levels, stored):
        exact = CodebookWeight.from_codes(
            spec, choice.codes, choice.levels, choice.origins, pruned, choice.outliers
        ).decode()
        values = weight.detach().cpu().double()
        lost, had = ((w.double() - values).square().sum() for w in (packed.decode(), exact))
        if lost > 1.1 * had + 1e-6 * values.square().sum():
            raise _does_not_fit(name, spec, reach)
    return packed.to(weight.device)


def _reach(spec: WeightSpec, levels: Tensor, choice: schemes.Choice) -> float:
    """A bound of what a level, or the sum of a split channel's, can come to, outliers added."""
    origins = choice.origins
    size = levels.double().abs()
    if levels.numel() == 0:
        return 0.0
    if spec.form in (LevelForm.SYMMETRIC, LevelForm.AFFINE):
        size[:, 0] *= 1 << (spec.bits - 1)
    largest = size.max() if spec.form is LevelForm.TABLE else size.sum(1).max()
    parts = 1 if origins is None or not len(origins) else 1 + int(origins.bincount().max())
    added = 0.0 if choice.outliers is None else float(choice.outliers[1].abs().max())
    return float(largest) * parts + added


def _drowned(spec: WeightSpec, levels: Tensor, stored: Tensor) -> bool:
    """Whether rounding may take what tells a group's levels apart, as at the lower end of a dtype."""
    if spec.form in (LevelForm.SYMMETRIC, LevelForm.AFFINE):
        levels, stored = levels[:, :1], stored[:, :1]
    lost = (stored.double() - levels.double()).abs()
    return bool((lost > 2**-6 * levels.abs().amax(1, keepdim=True)).any()) if levels.numel() else False


def _does_not_fit(name: str, spec: WeightSpec, reach: float) -> LexibitError:
    if spec.levels_dtype != "float32":
        return LexibitError(
            f"{name}: its levels, up to {reach:.3g}, do not fit {spec.levels_dtype}: use "
            "levels_dtype='float32'"
        )
    remedy = "exclude it" if spec.form is LevelForm.TABLE else "choose scheme 'kmeans' for it, or exclude it"
    return LexibitError(f"{name}: its levels, up to {reach:.3g}, do not fit {spec.dtype}: {remedy}")


def check_finite(name: str, weight: Tensor, values: Tensor, first: int = 0) -> None:
    """Refuse a weight that is not finite, or whose float32 matrix ``values`` is not.

    Args:
        name: what errors call it.
        weight: the weight, or some rows of it.
        values: the same in float32.
        first: the number of the first row.

    Raises:
        LexibitError: some of it are NaN, infinite, or beyond float32.
    """
    # one pass without a mask as large as the weight: NaN and infinities survive min and max
    if values.numel() == 0 or torch.stack(values.aminmax()).isfinite().all():
        return
    bad = (~values.isfinite()).nonzero()
    fault = "beyond float32" if weight.isfinite().all() else "NaN or infinite"
    raise LexibitError(
        f"{name}: {len(bad)} of its {values.numel()} weights are {fault}, the first in row "
        f"{first + int(bad[0, 0])}, column {int(bad[0, 1])}: repair the model or exclude the tensor"
    )


def install_everywhere(planned: PlannedWeight, weight: CodebookWeight) -> None:
    """Put one weight in all the places that use it, so that they go on sharing it."""
    for use in planned.uses:
        install(use.module, use.parameter, weight)


@contextmanager
def installed(weights: Iterable[tuple[PlannedWeight, CodebookWeight]]) -> Iterator[None]:
    """The model with some weights in codes inside; with its float weights, as it was, afterwards."""
    weights = list(weights)
    with restored(planned for planned, _ in weights):
        for planned, weight in weights:
            install_everywhere(planned, weight)
        yield


@contextmanager
def restored(weights: Iterable[PlannedWeight]) -> Iterator[None]:
    """Whatever is installed inside in the place of these weights, they are there again afterwards."""
    uses = [use for planned in weights for use in planned.uses]
    before = {use.module: (type(use.module), dict(use.module._parameters)) for use in uses}
    try:
        yield
    finally:
        for use in uses:
            use.module._modules.pop(use.parameter + CodebookWeight.SUFFIX, None)
        for module, (cls, parameters) in before.items():
            module.__class__ = cls
            # in their own order
            module._parameters.clear()
            module._parameters.update(parameters)
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()


class Quantizing:
    """Quantizes weights in threads, as they come: as many at a time as PyTorch has threads.

    The result does not depend on how many: every weight is worked on by one thread alone.
    """

    def __init__(
        self, config: LexibitConfig, total: int, progress: bool, given: Tensors | None = None
    ) -> None:
        self._config, self._given = config, given
        self._threads = max(torch.get_num_threads(), 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._futures: list[tuple[PlannedWeight, Future[CodebookWeight]]] = []
        self._bar = progress_bar(progress)
        self._task = self._bar.add_task("quantizing", total=total)
        self._bar.start()

    def add(self, planned: PlannedWeight, weight: Tensor) -> None:
        """Take a weight; waits while all threads are busy, so that few float weights are held."""
        try:
            busy = [future for _, future in self._futures if not future.done()]
            if len(busy) >= self._threads:
                wait(busy, return_when=FIRST_COMPLETED)
            future = self._pool.submit(self._quantize, planned, weight)
            self._futures.append((planned, future))
        except BaseException:
            self.close(wait=False)
            raise

    def _quantize(self, planned: PlannedWeight, weight: Tensor) -> CodebookWeight:
        result = quantize_planned(planned, weight, seed=self._config.seed, given=self._given)
        self._bar.advance(self._task)
        return result

    def results(self) -> list[tuple[PlannedWeight, CodebookWeight]]:
        """All weights in codes, in the order in which they came.

        Raises:
            LexibitError: what one of them raised.
        """
        try:
            done = [(planned, future.result()) for planned, future in self._futures]
        except BaseException:
            self.close(wait=False)
            raise
        self.close()
        return done

    def close(self, wait: bool = True) -> None:
        """Drop what has not begun; a thread that has begun ends with its weight, waited for or not."""
        self._pool.shutdown(wait=wait, cancel_futures=True)
        self._bar.stop()
