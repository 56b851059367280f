"""The C++ kernels against the reference: decoded to the last bit, products but for the order of additions."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lexibit import CodebookWeight, LexibitError, ops
from lexibit.groups import Groups
from lexibit.levels import LevelForm
from lexibit.ops import native, reference
from lexibit.ops.reference import Stored
from lexibit.packing import pack, pack_places

Make = Callable[..., CodebookWeight]
KERNELS = [name for name in native.available() if name != "reference"]

pytestmark = pytest.mark.skipif(not KERNELS, reason="no kernels for this CPU, or built without a compiler")


# all sets of instructions have the same kernels for float32
@pytest.fixture(params=KERNELS[-1:], autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with ops.kernels(request.param):
        yield


@st.composite
def weights(draw: st.DrawFn) -> Stored:
    """Any weight that can be stored, random codes and levels."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    bits, form = draw(st.integers(1, 8)), draw(st.sampled_from(list(LevelForm)))
    extra = draw(st.sampled_from([(0, 0), (0, 0), (3, 0), (0, 2)]))
    counted = st.builds("{}:{}".format, st.sampled_from(["rows", "blocks", "columns"]), st.integers(1, 40))
    groups = Groups.parse(
        draw(st.sampled_from(["matrix", "row"]) | counted), (rows + extra[0], columns + extra[1])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    codes = torch.randint(1 << bits, (groups.rows, groups.columns), generator=generator, dtype=torch.uint8)
    own = rows if extra[0] else columns
    zero = torch.rand(rows, columns, generator=generator) < 0.2
    count = draw(st.sampled_from([0, 0, 1, 7]))
    places = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    count = len(places)
    return Stored(
        pack(codes, bits),
        torch.randn(groups.count, form.width(bits), generator=generator),
        torch.randint(own, (sum(extra),), generator=generator, dtype=torch.int32) if any(extra) else None,
        pack(zero.to(torch.uint8), 1) if draw(st.booleans()) else None,
        torch.randn(count, generator=generator) if count else None,
        pack_places(places) if count else None,
        [rows, columns],
        bits,
        list(groups.block),
        form.value,
        list(extra),
    )


def close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within rounding of the exact product: a part of the sum of the magnitudes."""
    x, weight, bias = x.double(), weight.double(), torch.zeros(1) if bias is None else bias.double()
    size = x.abs() @ weight.abs().t() + bias.abs()
    assert ((found - (x @ weight.t() + bias)).abs() <= 1e-6 * size + 1e-30).all()


@settings(max_examples=300, deadline=None)
@given(weights(), st.data())
def test_everything_a_weight_does_is_what_the_reference_does(weight: Stored, data: st.DataObject) -> None:
    assert native.takes(weight)
    decoded = reference.decode(weight)
    assert torch.equal(native.decode(weight), decoded)
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    ids = torch.randint(rows, (2, 3), generator=generator)
    assert torch.equal(native.embedding(ids, weight), decoded[ids])
    tokens, transposed = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 9])), data.draw(st.booleans())
    inside, outside = (rows, columns) if transposed else (columns, rows)
    x = torch.randn(tokens, inside, generator=generator)
    bias = torch.randn(outside, generator=generator) if data.draw(st.booleans()) else None
    found = native.linear(x, weight, bias, transposed)
    # what the codes say and what is added to it are multiplied each for itself
    in_codes = reference.decode(weight._replace(outliers=None, gaps=None))
    added = reference.add_outliers(torch.zeros_like(in_codes), weight)
    both = [part.t() if transposed else part for part in (in_codes, added)]
    close(found, torch.cat([x, x], 1), torch.cat(both, 1), bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corrections", [{}, {"extra": (0, 5)}, {"extra": (5, 0)}, {"mask": True}], ids=str)
@pytest.mark.parametrize("groups", ["matrix", "row", "columns:16", "columns:20"])
def test_a_token_is_the_same_in_every_batch_and_on_any_number_of_threads(
    random_weight: Make, groups: str, corrections: dict[str, object], transposed: bool
) -> None:
    weight = random_weight((300, 200), 3, groups, "table", **corrections)
    x = torch.randn(23, 300 if transposed else 200)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(weight.linear(x, transposed=transposed))
            for count in (1, 2, 3, 4, 7):
                part = weight.linear(x[5 : 5 + count], transposed=transposed)
                assert torch.equal(part, results[0][5 : 5 + count])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, results[0]) for one in results)


def test_inputs_of_any_shape_and_memory(random_weight: Make) -> None:
    weight = random_weight((7, 11), 3, "row")
    decoded = reference.decode(weight.stored())
    for x in (
        torch.randn(11),
        torch.randn(0, 11),
        torch.randn(2, 0, 11),
        torch.randn(11, 3).t(),
        torch.randn(3, 2, 11).transpose(0, 1),
        torch.randn(3, 22)[:, ::2],
    ):
        bias = torch.randn(14)[::2]
        found = weight.linear(x, bias)
        assert found.shape == (*x.shape[:-1], 7)
        torch.testing.assert_close(found, x @ decoded.t() + bias, rtol=1e-5, atol=1e-5)
    assert weight.embedding(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 11)
    assert torch.equal(weight.embedding(torch.tensor([[1, 6]]).int()), decoded[torch.tensor([[1, 6]])])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_weights_without_a_row_or_a_column(random_weight: Make, shape: tuple[int, int]) -> None:
    weight = random_weight(shape, 3, "row")
    assert weight.decode().shape == shape
    bias = torch.randn(shape[0])
    assert torch.equal(weight.linear(torch.randn(2, shape[1]), bias), bias.expand(2, -1))


@pytest.mark.parametrize("tokens", [2, 9])
def test_a_bad_number_stays_in_its_token(random_weight: Make, tokens: int) -> None:
    weight = random_weight((33, 13), 3, "row")
    x = torch.randn(tokens, 13)
    good = weight.linear(x)
    x[1, 12], x[0, 3] = float("nan"), float("inf")
    found = weight.linear(x)
    assert found[1].isnan().all()
    assert not found[0].isfinite().any()
    assert torch.equal(found[2:], good[2:])


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_level_that_no_code_names_counts_for_nothing(random_weight: Make, tokens: int) -> None:
    weight = random_weight((3, 11), 3, "row")
    # behind a row's last column stand the codes of the next
    weight.codes.copy_(pack(torch.tensor([0, 1, 2])[:, None].expand(3, 11).to(torch.uint8), 3))
    weight.levels[:] = float("nan")
    for row in range(3):
        weight.levels[row, row] = row + 1
    expected = torch.tensor([11.0, 22.0, 33.0]).expand(tokens, 3)
    assert torch.equal(weight.linear(torch.ones(tokens, 11)), expected)


def test_other_dtypes_take_the_reference(random_weight: Make) -> None:
    weight = random_weight((7, 11)).to(torch.bfloat16)
    stored = weight.stored()
    assert not native.takes(stored)
    x = torch.randn(2, 11, dtype=torch.bfloat16)
    assert torch.equal(weight.linear(x), x @ reference.decode(stored).t())
    assert not native.takes(random_weight((7, 11)).stored(), x)


def test_wrong_inputs_are_told_and_nothing_is_read_behind_the_end(random_weight: Make) -> None:
    weight = random_weight((7, 11), 3, "row", extra=(0, 2))
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        weight.linear(torch.randn(2, 12))
    with pytest.raises(RuntimeError):
        weight.linear(torch.randn(2, 11), torch.randn(8))
    with pytest.raises(IndexError, match="of 7 rows"):
        weight.embedding(torch.tensor([7]))
    with pytest.raises(TypeError, match="int64 or int32"):
        weight.embedding(torch.tensor([1.0]))
    stored = weight.stored()
    with pytest.raises(ValueError, match="its layout asks for"):
        native.decode(stored._replace(codes=stored.codes[:-1]))
    assert stored.origins is not None
    with pytest.raises(TypeError, match=r"is torch.int64 on cpu, not torch.int32"):
        native.decode(stored._replace(origins=stored.origins.long()))
    for wrong in ({"bits": 9}, {"block": [0, 11]}, {"extra": [-1, 2]}, {"extra": [1, 1]}):
        with pytest.raises(ValueError, match="no layout of a weight"):
            native.decode(stored._replace(**wrong))
    with pytest.raises(IndexError, match="origin 11 of 11"):
        native.decode(stored._replace(origins=torch.tensor([0, 11], dtype=torch.int32)))


def test_outliers_behind_the_end_are_told(random_weight: Make) -> None:
    stored = random_weight((7, 11), 3, "row", outliers=3).stored()
    far = torch.tensor([0, 70, 5], dtype=torch.uint16)  # the last is weight 77 of 77
    x = torch.randn(2, 11)
    for wrong, error in (
        ({"gaps": far}, IndexError),
        ({"gaps": far[:2]}, ValueError),
        ({"gaps": None}, ValueError),
        ({"outliers": torch.empty(50, 0), "gaps": far}, ValueError),
        ({"gaps": far.int()}, TypeError),
        ({"outliers": None}, ValueError),
    ):
        with pytest.raises(error):
            native.linear(x, stored._replace(**wrong), None, False)
        with pytest.raises(error):
            native.decode(stored._replace(**wrong))


def test_gradients_are_those_of_the_reference(random_weight: Make) -> None:
    weight = random_weight((33, 13), 3, "row")
    levels = weight.train_levels()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 13, generator=generator, requires_grad=True)
    found = []
    for name in (native.chosen().name, "reference"):
        with ops.kernels(name):
            weight.linear(x, torch.ones(33)).square().sum().backward()
        found.append((levels.grad, x.grad))
        levels.grad = x.grad = None
    for one, other in zip(*found, strict=True):
        # sums of numbers that cancel: rounding is a part of the greatest, not of what is left
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def test_a_compiler_may_follow(random_weight: Make) -> None:
    weight = random_weight((7, 11), 3, "row")
    compiled = torch.compile(lambda x: weight.linear(x).relu(), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 11)
    assert torch.equal(compiled(x), weight.linear(x).relu())


@pytest.mark.parametrize("shape", [(1,), (), (1, 7), (2, 7)])
def test_a_bias_is_broadcast_as_torch_does(random_weight: Make, shape: tuple[int, ...]) -> None:
    weight, x, bias = random_weight((7, 11), 3, "row"), torch.randn(2, 11), torch.randn(shape)
    torch.testing.assert_close(weight.linear(x, bias), x @ weight.decode().t() + bias)


def test_tracers_transforms_and_modes_see_the_operator(random_weight: Make) -> None:
    weight, x, other = random_weight((7, 11), 3, "row"), torch.randn(2, 11), torch.randn(2, 11)
    expected = weight.linear(other)

    def product(x: Tensor) -> Tensor:
        return weight.linear(x)

    graph = make_fx(product)(x)
    assert "lexibit.linear" in graph.code
    assert torch.equal(graph(other), expected)
    torch.testing.assert_close(torch.vmap(product)(other), expected)
    assert torch.equal(weight.linear(torch._neg_view(other)), weight.linear(-other))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        traced = torch.jit.trace(product, x)
    assert torch.equal(traced(other), expected)


def test_memory_that_ends_in_a_thread_is_an_error() -> None:
    program = (
        "import resource, torch\n"
        "from lexibit.ops import native\n"
        "from lexibit.ops.reference import Stored\n"
        "columns = 1 << 22\n"
        "codes, levels = torch.zeros(16 * columns // 8, dtype=torch.uint8), torch.zeros(1, 2)\n"
        "nothing = [None] * 4\n"
        "weight = Stored(codes, levels, *nothing, [16, columns], 1, [16, columns], 'table', [0, 0])\n"
        "x = torch.ones(8, columns)\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(1 << 20).exp()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 25), -1))\n"
        "try:\n"
        "    native.linear(x, weight, None, False)\n"
        "except MemoryError:\n"
        "    print('told')\n"
    )
    done = chosen(native.chosen().name, program)
    assert done.stdout.strip() == "told", done.stderr


def test_threads_may_call_at_once(random_weight: Make) -> None:
    weight, name = random_weight((256, 256), 3, "row"), native.chosen().name
    x = torch.randn(8, 256)
    expected, wrong = weight.linear(x), []

    def work() -> None:
        with ops.kernels(name):
            wrong.extend(1 for _ in range(200) if not torch.equal(weight.linear(x), expected))

    four = [threading.Thread(target=work) for _ in range(4)]
    for one in four:
        one.start()
    for one in four:
        one.join()
    assert not wrong


def test_a_process_made_by_fork_computes_alone(random_weight: Make) -> None:
    weight = random_weight((256, 256), 3, "row")
    x = torch.randn(64, 256)
    expected = weight.linear(x)  # the pool of threads is there
    assert native.parallel() == (sys.platform == "linux")
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if not native.parallel() and torch.equal(weight.linear(x), expected) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def chosen(name: str | None, program: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != native.VARIABLE}
    environment |= {} if name is None else {native.VARIABLE: name}
    line = [sys.executable, "-c", program]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses() -> None:
    program = "from lexibit.ops import native; print(native.chosen().name)"
    for name, expected in ((None, KERNELS[0]), ("", KERNELS[0]), ("reference", "reference")):
        assert chosen(name, program).stdout.strip() == expected
    failed = chosen("avx", program)
    assert "unknown kernels in LEXIBIT_KERNELS 'avx': did you mean 'avx2'" in failed.stderr
    with pytest.raises(LexibitError, match="unknown kernels"), ops.kernels("fast"):
        pass


def test_without_kernels_it_works_and_says_so_once() -> None:
    program = (
        "import sys; sys.modules['lexibit._kernels'] = None\n"
        "import torch, lexibit\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))\n"
        "lexibit.quantize(model, lexibit.LexibitConfig(bits=3), progress=False)\n"
        "print(model(torch.randn(2, 8)).shape, lexibit.ops.native.chosen().name)"
    )
    done = chosen(None, program)
    assert done.stdout.strip() == "torch.Size([2, 8]) reference"
    assert done.stderr.count("the C++ kernels were not built") == 1
