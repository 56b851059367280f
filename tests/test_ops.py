"""The reference operators against the float operations that they stand for, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexibit import CodebookWeight, LexibitConfig, quantize
from lexibit.nn import Quantized
from lexibit.ops import reference

Make = Callable[..., CodebookWeight]

pytestmark = pytest.mark.usefixtures("exact")

# bits, groups, form: every width, every shape of group, every form
LAYOUTS = [
    (1, "matrix", "table"),
    (2, "row", "symmetric"),
    (3, "columns:5", "table"),
    (4, "rows:3", "binary"),
    (5, "columns:4", "affine"),
    (6, "blocks:2", "table"),
    (7, "row", "binary"),
    (8, "matrix", "table"),
]


CORRECTIONS = [
    {"extra": (0, 2)},
    {"extra": (3, 0)},
    {"mask": True},
    {"extra": (0, 5), "mask": True},
    {"extra": (1, 0), "mask": True},
    {"outliers": 4},
    {"extra": (0, 2), "mask": True, "outliers": 3},
]


def stored(weight: CodebookWeight) -> tuple[object, ...]:
    return tuple(weight.stored())


def check(operator: object, *arguments: object) -> None:
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


# registration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
def test_decode_is_a_well_formed_operator(random_weight: Make, bits: int, groups: str, form: str) -> None:
    check(torch.ops.lexibit.decode.default, *stored(random_weight((7, 11), bits, groups, form)))


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS[::2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_linear_is_a_well_formed_operator(
    random_weight: Make, bits: int, groups: str, form: str, bias: bool, transposed: bool
) -> None:
    weight = random_weight((7, 11), bits, groups, form)
    inside, outside = (7, 11) if transposed else (11, 7)
    x = torch.randn(2, 3, inside, requires_grad=True)
    b = torch.randn(outside, requires_grad=True) if bias else None
    check(torch.ops.lexibit.linear.default, x, b, *stored(weight), transposed)


@pytest.mark.parametrize("transposed", [True, False])
def test_linear_is_a_well_formed_operator_for_any_memory(random_weight: Make, transposed: bool) -> None:
    weight = random_weight((7, 7))
    for x in (torch.randn(7), torch.randn(0, 7), torch.randn(7, 3).t(), torch.randn(3, 2, 7).transpose(0, 1)):
        for bias in (None, torch.randn(7)):
            check(torch.ops.lexibit.linear.default, x, bias, *stored(weight), transposed)


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
def test_embedding_is_a_well_formed_operator(random_weight: Make, bits: int, groups: str, form: str) -> None:
    weight = random_weight((7, 11), bits, groups, form)
    check(torch.ops.lexibit.embedding.default, torch.tensor([[0, 6], [3, 3]]), *stored(weight))


@pytest.mark.parametrize("corrections", CORRECTIONS, ids=str)
def test_all_operators_are_well_formed_for_corrected_weights(
    random_weight: Make, corrections: dict[str, object]
) -> None:
    weight = random_weight((7, 11), 3, "row", "binary", **corrections)
    x = torch.randn(2, 11, requires_grad=True)
    check(torch.ops.lexibit.decode.default, *stored(weight))
    check(torch.ops.lexibit.linear.default, x, torch.randn(7), *stored(weight), False)
    check(torch.ops.lexibit.embedding.default, torch.tensor([[0, 6], [3, 3]]), *stored(weight))


# corrections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("corrections", CORRECTIONS, ids=str)
@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
def test_corrected_weights_multiply_and_look_up_as_they_decode(
    random_weight: Make, bits: int, groups: str, form: str, corrections: dict[str, object]
) -> None:
    weight = random_weight((7, 11), bits, groups, form, **corrections)
    decoded, x = weight.decode(), torch.randn(3, 11)
    assert torch.equal(weight.linear(x), F.linear(x, decoded))
    assert torch.equal(weight.linear(x[:, :7], transposed=True), x[:, :7] @ decoded)
    ids = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(weight.embedding(ids), decoded[ids])
    assert weight.embedding(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 11)


@pytest.mark.parametrize("corrections", CORRECTIONS, ids=str)
def test_a_gradient_goes_through_a_corrected_weight(
    random_weight: Make, corrections: dict[str, object]
) -> None:
    weight = random_weight((7, 11), 3, "row", "table", **corrections)
    x = torch.randn(3, 11, requires_grad=True)
    weight.linear(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.decode().sum(0).expand(3, 11))


# decode ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
@pytest.mark.parametrize("shape", [(37, 5), (16, 3), (9, 8), (1, 40)])
def test_decoding_in_pieces_equals_decoding_at_once(
    random_weight: Make,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    groups: str,
    form: str,
    shape: tuple[int, int],
) -> None:
    weight = random_weight(shape, bits, groups, form)
    whole = weight.decode()
    calls = []
    real = reference.unpack
    monkeypatch.setattr(reference, "unpack", lambda *a: calls.append(a) or real(*a))
    monkeypatch.setattr(reference, "_CHUNK", 1)
    assert torch.equal(weight.decode(), whole)
    assert len(calls) == -(-shape[0] // 8)


# linear ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
@pytest.mark.parametrize("batch", [(5,), (2, 3), (), (0,), (2, 0), (1, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_bits_of_the_float_layer(
    random_weight: Make, bits: int, groups: str, form: str, batch: tuple[int, ...], bias: bool
) -> None:
    weight = random_weight((7, 11), bits, groups, form)
    x = torch.randn(*batch, 11)
    b = torch.randn(7) if bias else None
    result = weight.linear(x, b)
    assert result.shape == (*batch, 7)
    assert torch.equal(result, F.linear(x, weight.decode(), b))


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
@pytest.mark.parametrize("batch", [(5,), (2, 3), (), (0,)])
def test_a_transposed_linear_has_the_bits_of_conv1d(
    random_weight: Make, bits: int, groups: str, form: str, batch: tuple[int, ...]
) -> None:
    weight = random_weight((7, 11), bits, groups, form)
    x, b = torch.randn(*batch, 7), torch.randn(11)
    result = weight.linear(x, b, transposed=True)
    assert torch.equal(result, torch.addmm(b, x.view(-1, 7), weight.decode()).view(*batch, 11))
    plain = weight.linear(x, transposed=True)
    assert torch.equal(plain, torch.mm(x.view(-1, 7), weight.decode()).view(*batch, 11))


@pytest.mark.parametrize("transposed", [True, False])
def test_linear_takes_input_that_is_not_contiguous(random_weight: Make, transposed: bool) -> None:
    weight = random_weight((11, 11))
    matrix = weight.decode() if transposed else weight.decode().t()
    for x in (torch.randn(11, 5).t(), torch.randn(3, 2, 11).transpose(0, 1), torch.randn(4, 22)[:, ::2]):
        assert not x.is_contiguous()
        torch.testing.assert_close(weight.linear(x, None, transposed), x @ matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_linear_computes_in_the_dtype_of_its_levels(random_weight: Make, dtype: torch.dtype) -> None:
    weight = random_weight((7, 11), dtype=dtype)
    x, b = torch.randn(5, 11, dtype=dtype), torch.randn(7, dtype=dtype)
    result = weight.linear(x, b)
    assert result.dtype == dtype
    assert torch.equal(result, F.linear(x, weight.decode(), b))


def test_linear_refuses_an_input_of_another_size(random_weight: Make) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        random_weight((7, 11)).linear(torch.randn(2, 10))


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_equal_those_of_the_float_layer(
    random_weight: Make, bits: int, groups: str, form: str, transposed: bool
) -> None:
    weight = random_weight((7, 11), bits, groups, form, dtype=torch.float64)
    inside, outside = (7, 11) if transposed else (11, 7)
    matrix = weight.decode().t() if transposed else weight.decode()
    upstream = torch.randn(2, 3, outside, dtype=torch.float64)
    gradients = []
    for run in (lambda x, b: weight.linear(x, b, transposed), lambda x, b: F.linear(x, matrix, b)):
        torch.manual_seed(1)
        x = torch.randn(2, 3, inside, dtype=torch.float64, requires_grad=True)
        b = torch.randn(outside, dtype=torch.float64, requires_grad=True)
        run(x, b).backward(upstream)
        gradients.append((x.grad, b.grad))
    (x_ours, b_ours), (x_float, b_float) = gradients
    torch.testing.assert_close(x_ours, x_float, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b_ours, b_float, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (7,), (2, 1, 7)])
def test_gradients_equal_finite_differences(
    random_weight: Make, transposed: bool, shape: tuple[int, ...]
) -> None:
    weight = random_weight((7, 7), 4, "row", dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: weight.linear(x, b, transposed), (x, b))


def test_only_what_needs_a_gradient_gets_one(random_weight: Make) -> None:
    weight = random_weight((7, 11))
    x, b = torch.randn(2, 11), torch.randn(7, requires_grad=True)
    weight.linear(x, b).sum().backward()
    assert x.grad is None
    assert torch.equal(b.grad, torch.full((7,), 2.0))
    assert not weight.linear(x, b.detach()).requires_grad


def test_the_backward_pass_keeps_codes_and_no_float_weight(random_weight: Make) -> None:
    weight = random_weight((7, 11))
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        weight.linear(torch.randn(2, 11, requires_grad=True)).sum()
    assert any(t.dtype == torch.uint8 for t in kept)
    assert all(t.numel() < 77 for t in kept if t.is_floating_point())


# embedding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
@pytest.mark.parametrize("columns", [11, 8, 1])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (), (0,), (2, 0), (1, 2, 2)])
def test_embedding_has_the_rows_of_the_decoded_weight(
    random_weight: Make, bits: int, groups: str, form: str, columns: int, shape: tuple[int, ...]
) -> None:
    weight = random_weight((7, columns), bits, groups, form)
    ids = torch.randint(0, 7, shape)
    rows = weight.embedding(ids)
    assert rows.shape == (*shape, columns)
    assert torch.equal(rows, weight.decode()[ids])


@pytest.mark.parametrize("bits", range(1, 9))
def test_embedding_reads_the_first_and_the_last_row(random_weight: Make, bits: int) -> None:
    for columns in range(1, 10):
        weight = random_weight((5, columns), bits)
        ids = torch.tensor([4, 0, 4])
        assert torch.equal(weight.embedding(ids), weight.decode()[ids])


def test_embedding_takes_32_bit_ids_and_ids_that_are_not_contiguous(random_weight: Make) -> None:
    weight = random_weight((7, 11))
    ids = torch.tensor([[0, 6, 2], [3, 3, 1]])
    assert torch.equal(weight.embedding(ids.int()), weight.decode()[ids])
    assert torch.equal(weight.embedding(ids.t()), weight.decode()[ids.t()])


@pytest.mark.parametrize("columns", [8, 11])
@pytest.mark.parametrize("wrong", [-1, 7, 10**6])
def test_an_id_out_of_range_is_an_index_error(random_weight: Make, columns: int, wrong: int) -> None:
    weight = random_weight((7, columns))
    with pytest.raises(IndexError, match="7 rows"):
        weight.embedding(torch.tensor([0, wrong, 6]))


def test_embedding_decodes_only_the_rows_asked_for(
    random_weight: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight((1000, 8))
    expected = weight.decode()[3:5]
    counts = []
    real = reference.unpack
    monkeypatch.setattr(reference, "unpack", lambda p, b, count: counts.append(count) or real(p, b, count))
    assert torch.equal(weight.embedding(torch.tensor([3, 4])), expected)
    assert counts == [16]


# modes -----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_all_work_in_inference_mode(random_weight: Make) -> None:
    weight = random_weight((7, 11))
    x, ids = torch.randn(2, 11), torch.tensor([1, 2])
    assert weight.decode().is_inference()
    assert torch.equal(weight.linear(x), F.linear(x, weight.decode()))
    assert torch.equal(weight.embedding(ids), weight.decode()[ids])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 11)
        self.first = nn.Linear(11, 5)
        self.second = nn.Linear(5, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.words(ids)))) + self.first.weight.sum()


def test_a_model_compiles_without_a_graph_break() -> None:
    model = Model().eval()
    quantize(model, LexibitConfig(scheme="linear", bits=3), progress=False)
    assert all(isinstance(module, Quantized) for module in model.children())
    compiled = torch.compile(model, fullgraph=True)
    for size in (2, 4):
        ids = torch.randint(0, 9, (size, 3))
        torch.testing.assert_close(compiled(ids), model(ids))


def test_operators_are_called_where_somebody_follows_what_is_computed(random_weight: Make) -> None:
    weight, x = random_weight((7, 11)), torch.randn(2, 11)
    assert "linear_op" in str(weight.linear(x.clone().requires_grad_()).grad_fn).replace(
        "lexibit_linear", "linear_op"
    )
    assert weight.linear(x).grad_fn is None
