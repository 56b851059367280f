"""Weights into codes: one tensor, or many in threads."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import LexibitError
from lexibit.groups import matrix_shape
from lexibit.levels import LevelForm
from lexibit.nn import install
from lexibit.plan import PlannedWeight, spec_of
from lexibit.weight import CodebookWeight, WeightSpec


def quantize_tensor(
    weight: Tensor,
    recipe: Recipe | None = None,
    *,
    importance: Tensor | None = None,
    seed: int = 0,
    name: str = "weight",
) -> CodebookWeight:
    """Choose levels and codes for one weight.

    Args:
        weight: floating point, two axes or more, on any device; not changed.
        recipe: scheme, bits, groups; k-means with 4 bits for the whole matrix if not given.
        importance: how much each weight's error counts: >= 0, of the weight's shape.
        seed: of any random choice.
        name: what errors call the tensor.

    Raises:
        LexibitError: NaN or infinite weights, a wrong shape, importances the scheme cannot use.
    """
    recipe = recipe or Recipe()
    if weight.dim() < 2 or not weight.is_floating_point():
        raise LexibitError(
            f"{name} is {weight.dtype} {list(weight.shape)}: only floating-point weights of two "
            "axes or more are quantized"
        )
    spec = spec_of(tuple(weight.shape), weight.dtype, recipe)
    values = weight.detach().to("cpu", torch.float32).reshape(matrix_shape(spec.shape))
    # a float64 weight may leave float32's range: look at what will be worked with
    _check_finite(name, weight, values)
    scheme = recipe.fitting()
    if importance is not None:
        importance = _checked_importance(name, spec.shape, importance, recipe, scheme.weighs)
    groups = spec.groups
    levels = torch.zeros(spec.levels_shape)
    parts = []
    weighing = groups.split(importance) if importance is not None else None
    for batch, (index, part) in enumerate(groups.split(values)):
        m = weighing[batch][1].contiguous() if weighing else None
        levels[index], codes = scheme.fit(part.contiguous(), recipe.bits, m, seed)
        parts.append(codes)
    codes = groups.join(parts).view(spec.shape)
    return _packed(name, spec, codes, levels, weight)


def _packed(name: str, spec: WeightSpec, codes: Tensor, levels: Tensor, weight: Tensor) -> CodebookWeight:
    """Codes and levels (float32) as they will be stored and computed with, on the weight's device."""
    stored = levels.to(getattr(torch, spec.levels_dtype)).to(weight.dtype)
    packed = CodebookWeight.from_codes(spec, codes, stored)
    largest = float(stored.abs().max()) if stored.numel() else 0.0
    if largest * (1 << spec.bits) >= torch.finfo(weight.dtype).max:
        # a scale that was rounded up may carry the largest weight over the end of its dtype
        if spec.form is not LevelForm.TABLE and not packed.decode().isfinite().all():
            scales = packed.levels[:, :1] if spec.form is LevelForm.UNIFORM else packed.levels
            scales.mul_(1 - torch.finfo(weight.dtype).eps)
        if not packed.decode().isfinite().all():
            raise LexibitError(
                f"{name}: its levels, up to {levels.abs().max():.3g}, do not fit {spec.levels_dtype}: "
                "use levels_dtype='float32'"
            )
    return packed.to(weight.device)


def _check_finite(name: str, weight: Tensor, values: Tensor) -> None:
    # one pass without a mask as large as the weight: NaN and infinities survive min and max
    if values.numel() == 0 or torch.stack(values.aminmax()).isfinite().all():
        return
    bad = (~values.isfinite()).nonzero()
    fault = "beyond float32" if weight.isfinite().all() else "NaN or infinite"
    raise LexibitError(
        f"{name}: {len(bad)} of its {values.numel()} weights are {fault}, the first in row "
        f"{int(bad[0, 0])}, column {int(bad[0, 1])}: repair the model or exclude the tensor"
    )


def _checked_importance(
    name: str, shape: tuple[int, ...], importance: Tensor, recipe: Recipe, weighs: bool
) -> Tensor:
    if not weighs:
        raise LexibitError(f"scheme {recipe.scheme!r} does not use importances ({name})")
    if tuple(importance.shape) != shape:
        raise LexibitError(f"{name}: its importance is {list(importance.shape)}, must be {list(shape)}")
    values = importance.detach().to("cpu", torch.float32).reshape(matrix_shape(shape))
    if values.numel() and not (values.isfinite().all() and bool(values.min() >= 0)):
        raise LexibitError(f"{name}: its importance must be finite and not negative")
    return values


def install_everywhere(planned: PlannedWeight, weight: CodebookWeight) -> None:
    """Put one weight in all the places that use it, so that they go on sharing it."""
    for use in planned.uses:
        install(use.module, use.parameter, weight)


class Quantizing:
    """Quantizes weights in threads, as they come: as many at a time as PyTorch has threads.

    The result does not depend on how many: every weight is worked on by one thread alone.
    """

    def __init__(self, config: LexibitConfig, total: int, progress: bool) -> None:
        self._config = config
        self._threads = max(torch.get_num_threads(), 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._futures: list[tuple[PlannedWeight, Future[CodebookWeight]]] = []
        self._bar = _progress_bar(progress)
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
        result = quantize_tensor(weight, planned.recipe, seed=self._config.seed, name=planned.name)
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


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not show,
    )
