"""What holds for every scheme, and a scheme of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lexibit import LexibitConfig, LexibitError, Recipe, dequantize, quantize, quantize_tensor, schemes
from lexibit.levels import LevelForm
from lexibit.nn import Quantized, codebooks
from lexibit.schemes import Scheme

GROUPS = ["matrix", "row", "rows:3", "blocks:4", "columns:4"]
SHAPES = [(1, 1), (1, 13), (13, 1), (7, 11), (0, 5), (5, 0), (3, 5, 7)]
CASES = [
    *[("linear", {}, bits) for bits in range(1, 9)],
    *[("lq", {}, bits) for bits in range(2, 9)],
    *[("kmeans", {}, bits) for bits in (2, 5, 8)],
    *[("kmeans", {"init": "optimal"}, bits) for bits in range(1, 9)],
    *[("aciq", {"prior": prior}, bits) for prior in ("best", "laplace", "gauss") for bits in (2, 3, 8)],
    *[("mse", {}, bits) for bits in (2, 3, 8)],
    *[("kl", {}, bits) for bits in (2, 3, 8)],
    *[(name, {"affine": True}, bits) for name in ("lq", "aciq", "mse", "kl", "ocs") for bits in (1, 2, 4, 8)],
    *[("ocs", {"split": "naive", "clip": clip}, bits) for clip in ("max", "aciq", "mse") for bits in (2, 5)],
    *[("binary", {"method": "greedy"}, bits) for bits in (1, 2, 3, 8)],
    *[("binary", {"method": "refined"}, bits) for bits in (1, 2, 3, 8)],
    *[("binary", {}, bits) for bits in range(1, 9)],
    *[("kmeans", {"init": "k-means++"}, bits) for bits in range(1, 9)],
]
# the schemes whose levels reach from the smallest weight to the largest
OUTERMOST = ("linear", "lq", "kmeans")
MAKERS = {
    "normal": lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    "constant": lambda shape: torch.full(shape, -0.3),
    "zero": lambda shape: torch.zeros(shape),
}


@pytest.mark.parametrize(("name", "options", "bits"), CASES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_every_shape_and_every_group_is_taken(
    name: str, options: dict[str, object], bits: int, kind: str
) -> None:
    for shape in SHAPES if kind == "normal" else [(1, 1), (7, 11), (3, 5, 7)]:
        for groups in GROUPS if kind == "normal" else ["matrix", "columns:4"]:
            w = MAKERS[kind](shape)
            if name == "ocs" and "split" not in options and groups.startswith("columns"):
                continue  # refused: the halves of a split channel would lie on different grids
            weight = quantize_tensor(w, Recipe(name, bits, groups, options))
            assert weight.spec.scheme == name
            codes, decoded = weight.unpacked_codes(), weight.decode()
            assert decoded.shape == shape
            assert codes.numel() == weight.spec.groups.rows * weight.spec.groups.columns
            assert (codes.int() < 2**bits).all()
            assert decoded.isfinite().all()
            if kind != "normal" and options.get("split") != "naive":
                torch.testing.assert_close(decoded, w, rtol=1e-6, atol=0)
            elif w.numel() and name in OUTERMOST:
                # these do not go beyond the weights, and are not worse than one level in their middle
                assert decoded.abs().max() <= w.abs().max() * (1 + 1e-6)
                assert (decoded - w).abs().max() <= w.max() - w.min() + 1e-6
            elif w.numel():
                assert (decoded - w).abs().max() <= 2 * w.abs().max() + 1e-6


@pytest.mark.parametrize(("name", "options", "bits"), CASES, ids=str)
@pytest.mark.parametrize("scale", [1e38, 1e-38])
def test_huge_and_tiny_weights_decode_to_finite_ones(
    name: str, options: dict[str, object], bits: int, scale: float
) -> None:
    if scale > 1 and (name not in OUTERMOST or options.get("affine")):
        scale /= 10  # their levels may reach beyond the weights, and must still be float32
    w = torch.linspace(-3, 3, 60).view(6, 10) * scale
    for groups in GROUPS:
        if name == "ocs" and "split" not in options and groups.startswith("columns"):
            continue
        decoded = quantize_tensor(w, Recipe(name, bits, groups, options)).decode()
        assert decoded.isfinite().all()
        error = (decoded - w).double().abs()
        assert (error <= (6.1 / 2 ** (bits - 1) if name in OUTERMOST else 6.1) * scale).all()


# left out: the groups of k-means++ draw from one stream of random numbers, and OCS splits for all groups
@pytest.mark.parametrize(
    ("name", "options", "bits"), [case for case in CASES[:-8] if case[0] != "ocs"], ids=str
)
def test_groups_do_not_know_of_each_other(name: str, options: dict[str, object], bits: int) -> None:
    w = torch.randn(4, 30, generator=torch.Generator().manual_seed(bits))
    recipe = Recipe(name, bits, "row", options)
    together = quantize_tensor(w, recipe).decode()
    for row in range(4):
        alone = quantize_tensor(w[row : row + 1], recipe).decode()
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-7)


# the registry ----------------------------------------------------------------------------------


def test_the_schemes_are_known_by_name() -> None:
    assert list(schemes.names()) == ["aciq", "binary", "kl", "kmeans", "linear", "lq", "mse", "ocs"]
    for name in schemes.names():
        assert schemes.scheme(name).name == name


def test_an_unknown_scheme_is_refused_with_the_nearest() -> None:
    with pytest.raises(LexibitError, match="unknown scheme 'k-means': did you mean 'kmeans'"):
        schemes.scheme("k-means")


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(LexibitError, match=r"unknown option of scheme 'kmeans' 'iteration'.*'iterations'"):
        schemes.scheme("kmeans", {"iteration": 3})
    with pytest.raises(LexibitError, match="unknown option of scheme 'linear' 'init'"):
        schemes.scheme("linear", {"init": "optimal"})


def test_options_reach_the_scheme_and_stay_as_they_are() -> None:
    scheme = schemes.scheme("kmeans", {"init": "k-means++", "iterations": 7})
    assert (scheme.init, scheme.iterations) == ("k-means++", 7)
    with pytest.raises(FrozenInstanceError):
        scheme.iterations = 8


# a scheme of one's own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy(Scheme):
    """Levels are quantiles of the group, from ``margin`` to ``1 - margin``."""

    name: ClassVar[str] = "toy"
    max_bits: ClassVar[int] = 6

    margin: float = 0.0

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        at = torch.linspace(self.margin, 1 - self.margin, 1 << bits)
        levels = values.quantile(at, dim=1).t().contiguous()
        codes = (values[:, :, None] - levels[:, None]).abs().argmin(-1)
        return levels, codes.to(torch.uint8)


@pytest.fixture
def toy() -> Iterator[type[Scheme]]:
    before = dict(schemes._SCHEMES)
    yield schemes.register(Toy)
    schemes._SCHEMES.clear()
    schemes._SCHEMES.update(before)


@pytest.mark.usefixtures("toy")
def test_a_scheme_of_ones_own_quantizes_a_model() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5))
    before = model[1].weight.detach().clone()
    config = LexibitConfig(scheme="toy", bits=2, options={"margin": 0.125}, groups="row")
    plan = quantize(model, config, progress=False)

    assert all(isinstance(module, Quantized) for module in model)
    assert {weight.spec.scheme for weight in codebooks(model).values()} == {"toy"}
    assert {weight["scheme"] for weight in plan.to_dict()["weights"]} == {"toy"}
    levels = before.quantile(torch.tensor([0.125, 0.375, 0.625, 0.875]), dim=1).t()
    torch.testing.assert_close(model[1].weight_codebook.levels, levels)
    nearest = levels.gather(1, (before[:, :, None] - levels[:, None]).abs().argmin(-1))
    torch.testing.assert_close(model[1].weight, nearest)


@pytest.mark.usefixtures("toy")
def test_a_scheme_of_ones_own_is_saved_loaded_and_undone() -> None:
    config = LexibitConfig(scheme="toy", bits=3)
    source, target = nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Linear(6, 5))
    for model in (source, target):
        quantize(model, config, progress=False)
    state = source.state_dict()
    assert (state["0.weight"].dtype, state["0.weight_levels"].shape) == (torch.uint8, (1, 8))
    target.load_state_dict(state)
    assert torch.equal(target[0].weight, source[0].weight)

    expected = source[0].weight
    dequantize(source)
    assert type(source[0]) is nn.Linear
    assert torch.equal(source[0].weight, expected)


@pytest.mark.usefixtures("toy")
def test_a_scheme_of_ones_own_follows_the_rules_of_all() -> None:
    assert "toy" in schemes.names()
    with pytest.raises(LexibitError, match="'toy' works with 1 to 6 bits, not 7"):
        LexibitConfig(scheme="toy", bits=7)
    with pytest.raises(LexibitError, match="'toy' does not use importances"):
        quantize_tensor(torch.randn(3, 4), Recipe(scheme="toy"), importance=torch.ones(3, 4))
    with pytest.raises(LexibitError, match="unknown option of scheme 'toy' 'marge': did you mean 'margin'"):
        LexibitConfig(scheme="toy", options={"marge": 0.1})
    assert schemes.register(Toy) is Toy  # once more is no harm


@pytest.mark.usefixtures("toy")
def test_a_name_that_is_taken_is_refused() -> None:
    @dataclass(frozen=True)
    class Other(Toy):
        form: ClassVar[LevelForm] = LevelForm.TABLE

    with pytest.raises(LexibitError, match="scheme name 'toy' is taken"):
        schemes.register(Other)
    assert isinstance(schemes.scheme("toy"), Toy)
    assert not isinstance(schemes.scheme("toy"), Other)


def test_the_tests_leave_the_registry_as_it_was() -> None:
    assert "toy" not in schemes.names()
