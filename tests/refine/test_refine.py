"""The solvers: against brute force and closed forms, for every form of levels and any groups."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lexibit import LexibitError, Recipe, quantize_tensor
from lexibit.groups import Groups
from lexibit.levels import LevelForm
from lexibit.refine import GPTQ, Effort, Moments, Problem, Solution, refine
from lexibit.refine.descent import descend
from lexibit.refine.feedback import feedback
from lexibit.refine.refit import refit
from lexibit.refine.remainder import remainder
from lexibit.schemes import scheme

RECIPES: list[dict[str, Any]] = [
    {"scheme": "kmeans", "bits": 2, "groups": "row"},
    {"scheme": "kmeans", "bits": 3, "groups": "matrix"},
    {"scheme": "kmeans", "bits": 2, "groups": "columns:7"},
    {"scheme": "kmeans", "bits": 2, "groups": "rows:5", "levels_dtype": "float16"},
    {"scheme": "binary", "bits": 3},
    {"scheme": "binary", "bits": 1},
    {"scheme": "lq", "bits": 3, "groups": "row"},
    {"scheme": "lq", "bits": 4, "groups": "columns:8", "options": {"affine": True}},
    {"scheme": "aciq", "bits": 2},
    {"scheme": "linear", "bits": 4},
    {"scheme": "ocs", "bits": 4, "options": {"ratio": 0.1}},
    {"scheme": "kmeans", "bits": 8},
]


def inputs(columns: int, seed: int = 0, count: int = 400) -> Tensor:
    """Inputs that know of each other, some larger than others."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=draw) / columns**0.5
    return torch.randn(count, columns, generator=draw) @ (
        mixed + torch.diag(torch.rand(columns, generator=draw))
    )


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def moments(x: Tensor, y: Tensor | None = None) -> Moments:
    return Moments(x.T @ x, None if y is None else y.T @ x, len(x))


def problem(
    matrix: Tensor, x: Tensor, bits: int = 2, form: LevelForm = LevelForm.TABLE, groups: str = "row"
) -> Problem:
    second = moments(x).damped(0.01)
    return Problem.of(matrix, second, Groups.parse(groups, tuple(matrix.shape)), form, bits, 1)


def output_error(w: Tensor, decoded: Tensor, x: Tensor, y: Tensor | None = None) -> float:
    return float(((x if y is None else y) @ w.T - x @ decoded.T).double().square().sum())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_outputs_are_nearer_than_by_the_scheme_alone_whatever_the_scheme(recipe: dict[str, Any]) -> None:
    w, x = weight(12, 30), inputs(30)
    plain = quantize_tensor(w, Recipe(**recipe))
    better = quantize_tensor(w, Recipe(**recipe), moments=moments(x))
    assert better.spec == plain.spec
    assert not torch.equal(better.codes, plain.codes)
    assert output_error(w, better.decode(), x) < 0.9 * output_error(w, plain.decode(), x)


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[1], RECIPES[10]], ids=str)
def test_conv1d_has_its_inputs_on_the_other_axis(recipe: dict[str, Any]) -> None:
    w, x = weight(12, 30), inputs(12)
    plain = quantize_tensor(w, Recipe(**recipe | {"groups": "matrix"}), kind="conv1d")
    better = quantize_tensor(w, Recipe(**recipe | {"groups": "matrix"}), kind="conv1d", moments=moments(x))
    assert output_error(w.T, better.decode().T, x) < 0.9 * output_error(w.T, plain.decode().T, x)


def test_conv1d_is_the_transposed_linear_layer() -> None:
    w, x = weight(12, 30), inputs(30)
    linear = quantize_tensor(w, Recipe(bits=3), moments=moments(x))
    conv1d = quantize_tensor(w.T.contiguous(), Recipe(bits=3), moments=moments(x), kind="conv1d")
    torch.testing.assert_close(conv1d.decode(), linear.decode().T)


@given(
    seed=st.integers(0, 999),
    bits=st.integers(1, 4),
    groups=st.sampled_from(["row", "matrix", "columns:5", "rows:3"]),
)
def test_no_step_that_should_not_makes_it_worse(seed: int, bits: int, groups: str) -> None:
    w, x = weight(7, 16, seed), inputs(16, seed)
    p = problem(w, x, bits, groups=groups)
    chosen = scheme("kmeans", None).choose(w, Groups.parse(groups, (7, 16)), bits, None, 0, 1)
    found = Solution(chosen.levels, chosen.codes)
    error = p.error(found)
    for step in (descend, refit, descend, refit):
        found = step(p, found)
        new = p.error(found)
        assert new <= error * (1 + 1e-5)
        error = new


@given(seed=st.integers(0, 99))
def test_a_few_weights_are_as_good_as_trying_everything(seed: int) -> None:
    w, x = weight(1, 4, seed), inputs(4, seed)
    p = problem(w, x, 1)
    levels = torch.tensor([[-0.1, 0.1]])

    def error(codes: tuple[int, ...], levels: Tensor) -> float:
        return p.error(Solution(levels, torch.tensor([codes], dtype=torch.uint8)))

    tried = {codes: error(codes, levels) for codes in itertools.product(range(2), repeat=4)}
    start = min(tried.values()) if seed % 2 else max(tried.values())
    codes = next(codes for codes, value in tried.items() if value == start)
    found = descend(p, Solution(levels, torch.tensor([codes], dtype=torch.uint8)), sweeps=4)
    # no single code could be better
    for place in range(4):
        other = found.codes.clone()
        other[0, place] ^= 1
        assert p.error(found) <= p.error(Solution(levels, other)) * (1 + 1e-6)
    fitted = refit(p, found)
    b = torch.stack([(found.codes[0] == code).double() for code in range(2)])
    used = b.sum(1) > 0
    h = p.moments.double()
    best = torch.linalg.lstsq(b[used] @ h @ b[used].T, b[used] @ h @ w[0].double()).solution
    torch.testing.assert_close(fitted.levels[0, used].double(), best, rtol=1e-3, atol=1e-4)


def test_inputs_without_correlation_give_back_plain_k_means() -> None:
    w = weight(6, 50)
    plain = quantize_tensor(w, Recipe(bits=3, groups="row"))
    same = quantize_tensor(w, Recipe(bits=3, groups="row"), moments=Moments(torch.eye(50), None, 50))
    # an optimum of exact k-means cannot be bettered
    assert torch.equal(same.codes, plain.codes)
    torch.testing.assert_close(same.levels, plain.levels, rtol=1e-4, atol=1e-6)


def gptq(w: Tensor, h: Tensor, levels: Tensor) -> Tensor:
    """The algorithm as Frantar et al. 2022 print it: by the Cholesky factor of the inverse, row by row."""
    factor = torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True)
    w = w.double().clone()
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        nearest = (w[:, i, None] - levels.double()).abs().argmin(1, keepdim=True)
        out[:, i] = levels.double().gather(1, nearest)[:, 0]
        error = (w[:, i] - out[:, i]) / factor[i, i]
        w[:, i:] -= error[:, None] * factor[i, i:]
    return out.float()


@pytest.mark.parametrize("columns", [5, 64, 150])
def test_a_uniform_grid_with_error_feedback_is_gptq(columns: int) -> None:
    w, x = weight(40, columns), inputs(columns)
    recipe = Recipe("lq", 4, "row", {"affine": True})
    plain = quantize_tensor(w, recipe)
    found = quantize_tensor(w, recipe, moments=moments(x), effort=GPTQ)
    assert torch.equal(found.levels, plain.levels)
    expected = gptq(w, moments(x).damped(0.01), found.table())
    agree = (found.decode() - expected).abs().amax(1) < 1e-5
    assert (
        agree.float().mean() > 0.9
    )  # float32 against float64: a code on the border turns the rest of its row
    assert output_error(w, found.decode(), x) <= 1.01 * output_error(w, expected, x)


def test_feedback_in_pieces_is_feedback_in_one() -> None:
    w, x = weight(600, 200), inputs(200)
    p = problem(w, x)
    levels = scheme("kmeans", None).choose(w, Groups.parse("row", (600, 200)), 2, None, 0, 1).levels
    whole = feedback(p, levels)
    expected = gptq(w, p.moments, levels)
    agree = (p.decoded(whole) - expected).abs().amax(1) < 1e-5
    assert agree.float().mean() > 0.9


def test_changed_inputs_are_made_good_for() -> None:
    w, y = weight(20, 32), inputs(32, count=2000)
    x = y + 0.2 * inputs(32, seed=5, count=2000)
    recipe = Recipe(bits=4, groups="row")
    found = {
        share: output_error(
            w,
            quantize_tensor(w, recipe, moments=moments(x, y), effort=Effort(correction=share)).decode(),
            x,
            y,
        )
        for share in (0.0, 0.5, 1.0)
    }
    assert found[1.0] < found[0.5] < found[0.0]


def test_the_whole_correction_is_the_least_squares_solution() -> None:
    w, y = weight(3, 8), inputs(8, count=500)
    x = y + 0.3 * inputs(8, seed=2, count=500)
    expected = torch.linalg.lstsq(x.double(), (y @ w.T).double()).solution.T
    torch.testing.assert_close(moments(x, y).corrected(w, 1.0, 1e-9), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    w, x = weight(700, 70), inputs(70)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = quantize_tensor(w, Recipe(bits=3), moments=moments(x))
        torch.set_num_threads(1)
        expected = quantize_tensor(w, Recipe(bits=3), moments=moments(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.levels, expected.levels)


def test_inputs_that_are_always_zero_leave_their_weights_near() -> None:
    w, x = weight(10, 20), inputs(20)
    x[:, 3] = 0
    found = quantize_tensor(w, Recipe(bits=4, groups="row"), moments=moments(x)).decode()
    assert (found[:, 3] - w[:, 3]).abs().max() < 0.1
    assert found.isfinite().all()


def test_fewer_inputs_than_channels_are_enough() -> None:
    w, x = weight(10, 60), inputs(60, count=5)
    plain = quantize_tensor(w, Recipe(bits=3, groups="row"))
    found = quantize_tensor(w, Recipe(bits=3, groups="row"), moments=moments(x))
    assert output_error(w, found.decode(), x) < output_error(w, plain.decode(), x)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 65), (0, 4), (2, 3, 5)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = inputs(shape[-1])
    found = quantize_tensor(w, Recipe(bits=2), moments=moments(x))
    assert found.decode().shape == shape
    assert found.decode().isfinite().all()


def test_equal_weights_stay_what_they_are() -> None:
    w = torch.full((4, 10), 0.25)
    found = quantize_tensor(w, Recipe(bits=3, groups="row"), moments=moments(inputs(10)))
    torch.testing.assert_close(found.decode(), w)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Moments(torch.eye(5), None, 1), "must be float32 \\[4, 4\\]"),
        (Moments(torch.full((4, 4), torch.nan), None, 1), "NaN or infinite in 16 places"),
        (Moments(torch.eye(4), torch.full((4, 4), torch.inf), 1), "NaN or infinite in 16 places"),
        (Moments(torch.zeros(4, 4), None, 1), "all zero"),
    ],
)
def test_moments_that_cannot_be_are_refused(wrong: Moments, said: str) -> None:
    with pytest.raises(LexibitError, match=f"w: .*{said}"):
        quantize_tensor(weight(3, 4), moments=wrong, name="w")


def test_importance_and_inputs_at_once_are_refused() -> None:
    w = weight(3, 4)
    with pytest.raises(LexibitError, match="both an importance and its inputs"):
        quantize_tensor(w, importance=torch.ones(3, 4), moments=moments(inputs(4)))


@pytest.mark.parametrize(
    "wrong", [{"feedbacks": 0}, {"rounds": -1}, {"rounds": 1.5}, {"correction": 2}, {"damping": 0}]
)
def test_efforts_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LexibitError, match=f"effort: {next(iter(wrong))}"):
        Effort(**wrong)


def test_what_is_told_is_what_the_outputs_lost() -> None:
    w, x = weight(5, 12), inputs(12)
    p = Problem.of(w, moments(x).second, Groups.parse("row", (5, 12)), LevelForm.TABLE, 2, 1)
    chosen = scheme("kmeans", None).choose(w, Groups.parse("row", (5, 12)), 2, None, 0, 1)
    told = refine(p, Solution(chosen.levels, chosen.codes), Effort(damping=1e-6))
    whole = float((x @ w.T).double().square().sum())
    assert told.after <= told.before
    assert told.after == pytest.approx(output_error(w, p.decoded(told.solution), x) / whole, rel=1e-2)
    assert told.before == pytest.approx(
        output_error(w, p.decoded(Solution(chosen.levels, chosen.codes)), x) / whole, rel=1e-2
    )


# What the GPTQ class of neural-compressor-pt 3.10 (Apache-2.0) gives for the matrix, inputs and grid below,
# with blocksize=16 and percdamp=0.01: the codes of each row as hexadecimal digits.
_PUBLISHED = [
    "efd84125aefd84125aefd84125befc83126befc7",
    "3126befc83126befc83126befc73126befc83127",
    "befc73126befc73127bffc73137bffb73127befb",
    "73137cffb72137cfeb62137cfeb62137cfeb7213",
    "7cfeb62137cfeb62138cfeb62138cfeb62238cff",
    "b62138cfea62148dfea52148dfea62148dfda611",
]


def test_gptq_gives_the_codes_of_a_published_implementation() -> None:
    w = torch.sin(torch.arange(6 * 40) * 0.7 + 1).view(6, 40) * 0.1
    x = torch.sin(torch.arange(200 * 40) * 1.3).view(200, 40) + torch.cos(torch.arange(200) * 0.9)[:, None]
    recipe = Recipe("lq", 4, "row")
    found = quantize_tensor(w, recipe, moments=moments(x), effort=GPTQ).unpacked_codes()
    assert not torch.equal(found, quantize_tensor(w, recipe).unpacked_codes())
    assert ["".join(f"{code:x}" for code in row) for row in found.tolist()] == _PUBLISHED


def test_moments_that_rounding_left_indefinite_are_damped_until_they_are_not() -> None:
    x = inputs(20, count=3)
    second = x.T @ x
    wrong = second - 0.05 * second.diagonal().mean() * torch.eye(20)
    damped = Moments(wrong, None, 3).damped(0.01)
    assert torch.linalg.eigvalsh(damped.double()).min() > 0
    found = quantize_tensor(weight(5, 20), Recipe(bits=3, groups="row"), moments=Moments(wrong, None, 3))
    assert found.decode().isfinite().all()


# outliers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [0, 64])
def test_what_is_added_to_outliers_is_the_least_squares_solution(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr("lexibit.refine.remainder._TOGETHER", together)
    w, x = weight(5, 9), inputs(9)
    given = problem(w, x)
    codes = torch.zeros(5, 9, dtype=torch.uint8)
    solution = Solution(torch.tensor([[-0.1, 0.0, 0.1, 0.2]]).expand(5, 4).contiguous(), codes)
    where = torch.zeros(5, 9, dtype=torch.bool)
    where[0, [1, 4, 8]] = where[2, 3] = True
    where[4] = True
    found = remainder(given, solution, where)
    assert (found[~where] == 0).all()
    root = torch.linalg.cholesky(given.moments.double())
    lost = (w - given.decoded(solution)).double()
    for row in range(5):
        expected = torch.linalg.lstsq(root.T[:, where[row]], root.T @ lost[row]).solution
        torch.testing.assert_close(found[row, where[row]].double(), expected, rtol=2e-3, atol=1e-5)
    assert given.without(found).error(solution) < given.error(solution)


@pytest.mark.parametrize("recipe", [*RECIPES[:3], RECIPES[4], RECIPES[6], RECIPES[10]], ids=str)
def test_outliers_make_outputs_nearer(recipe: dict[str, Any]) -> None:
    w, x = weight(12, 30), inputs(30)
    w[3, 4], w[7, 20], w[11, 29] = 3.0, -4.0, 2.5
    without = quantize_tensor(w, Recipe(**recipe), moments=moments(x))
    found = quantize_tensor(w, Recipe(outliers=0.02, **recipe), moments=moments(x))
    assert found.spec.outliers == 7
    assert found.outliers is not None
    assert torch.equal(found.outliers, found.outliers.half().float())
    assert output_error(w, found.decode(), x) < 0.8 * output_error(w, without.decode(), x)


def test_outliers_of_conv1d_are_those_of_the_transposed_layer() -> None:
    w, x = weight(12, 30), inputs(30)
    w[3, 4] = 3.0
    linear = quantize_tensor(w, Recipe(bits=3, outliers=0.02), moments=moments(x))
    conv1d = quantize_tensor(
        w.T.contiguous(), Recipe(bits=3, outliers=0.02), moments=moments(x), kind="conv1d"
    )
    torch.testing.assert_close(conv1d.decode(), linear.decode().T)
