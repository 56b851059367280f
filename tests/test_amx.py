"""The kernels for AMX, where there is none: tiles are emulated, all else runs as it would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from shutil import which

import pytest

from lexibit.ops import native

HERE = Path(__file__).parent
COMPILER = which("cc") or which("gcc")

pytestmark = [
    pytest.mark.skipif("amx" in native.available(), reason="this CPU has AMX: all tests are run with it"),
    pytest.mark.skipif("avx512bf16" not in native.available(), reason="no AVX-512 with BF16 on this CPU"),
    pytest.mark.skipif(not COMPILER, reason="no C compiler"),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that does what tiles do where it is loaded."""
    library = tmp_path_factory.mktemp("emulator") / "amx.so"
    source = HERE / "emulator" / "amx.c"
    flags = ["-O3", "-mavx2", "-mfma", "-shared", "-fPIC"]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(library)], check=True)
    return library


def emulated(emulator: Path, *command: str) -> str:
    """What a command of Python prints that runs with the emulator, if it ends well."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", native.VARIABLE))}
    environment["LEXIBIT_TEST_AMX"] = str(emulator)
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parent, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


COUNTED = """
import ctypes, os
from itertools import product
import torch
import lexibit
from lexibit import LexibitConfig, ops
from lexibit.ops import native
from lexibit.ops.reference import Stored
from lexibit.packing import pack
from transformers import BertConfig, BertModel

emulator = ctypes.CDLL(os.environ["LEXIBIT_TEST_AMX"])
native._kernels.assume("amx")
torch.manual_seed(0)


def products():
    assert ctypes.c_long.in_dll(emulator, "lexibit_amx_configured").value == 0
    return ctypes.c_long.in_dll(emulator, "lexibit_amx_products").value
"""

PRODUCTS = """
for compute, rows, columns, tokens in product(("int8", "bfloat16"), (5, 32, 70), (30, 1100), (3, 9, 40)):
    weight = Stored(
        pack(torch.randint(8, (rows, columns), dtype=torch.uint8), 3), torch.randn(rows, 8), *[None] * 4,
        [rows, columns], 3, [1, columns], "table", [0, 0],
    )
    x, before = torch.randn(tokens, columns), products()
    with ops.kernels("amx"):
        found = ops.linear_rounded(x, None, *weight, "none", compute)
    print(products() - before)
    with ops.kernels("avx512bf16"):
        beside = ops.linear_rounded(x, None, *weight, "none", compute)
    torch.testing.assert_close(found, beside, **({"rtol": 0, "atol": 0 if compute == "int8" else 1e-3}))
"""

LAYERS = """
config = BertConfig(
    vocab_size=100, hidden_size=96, intermediate_size=160, num_hidden_layers=1, num_attention_heads=3
)
model = BertModel(config, add_pooling_layer=False).eval()
lexibit.quantize(model, LexibitConfig(bits=4, groups="row"), progress=False)
lexibit.optimize(model)
for tokens in (8, 9, 40):
    ids, before, found = torch.randint(100, (1, tokens)), products(), []
    for name in ("amx", "avx512bf16"):
        with ops.kernels(name), torch.inference_mode():
            found.append(model(ids).last_hidden_state)
    print(products() - before)
    assert torch.equal(*found)
"""


def test_products_are_done_by_tiles(emulator: Path) -> None:
    found = iter(map(int, emulated(emulator, "-c", COUNTED + PRODUCTS).split()))
    for compute, rows, columns, tokens in product(("int8", "bfloat16"), (5, 32, 70), (30, 1100), (3, 9, 40)):
        wide = {"int8": 64, "bfloat16": 32}[compute]
        tiles = -(-rows // 16) * -(-tokens // 16) * -(-columns // wide)
        # few tokens in int8 are multiplied as without AMX, to the same whole numbers
        assert next(found) == (0 if compute == "int8" and tokens <= 8 else tiles)
    assert next(found, None) is None


def test_layers_are_done_by_tiles(emulator: Path) -> None:
    found = list(map(int, emulated(emulator, "-c", COUNTED + LAYERS).split()))
    # four weights of 96 x 96, one of 160 x 96 and one of 96 x 160
    tiles = 4 * 6 * 2 + 10 * 2 + 6 * 3
    assert found == [0, tiles, 3 * tiles]


@pytest.mark.parametrize(
    ("file", "chosen", "least"),
    [
        ("test_ops_rounded.py", "amx", 60),
        ("nn/test_encoder.py", "parts_one_after or threads or padding or bad_number or at_once", 40),
    ],
    ids=["products", "layers"],
)
def test_the_tests_of_the_other_kernels_pass(emulator: Path, file: str, chosen: str, least: int) -> None:
    # pytest's own handler of faults would take the signal
    options = ["-q", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    printed = emulated(emulator, "-m", "pytest", *options, f"tests/{file}")
    passed = re.search(r"(\d+) passed", printed)
    assert passed, printed
    assert int(passed[1]) >= least, printed


def test_what_no_tiles_are_ends_the_process(emulator: Path) -> None:
    # a product without a configuration: tdpbusd tmm0, tmm4, tmm6
    code = "\n".join(
        [
            "import ctypes, mmap, os",
            "ctypes.CDLL(os.environ['LEXIBIT_TEST_AMX'])",
            "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
            "page.write(bytes.fromhex('c4e2495ec4c3'))",
            "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"LEXIBIT_TEST_AMX": str(emulator)})
    assert done.returncode == -4  # SIGILL
