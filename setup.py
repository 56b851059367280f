"""What pyproject.toml cannot say: the C++ kernels, which are built where there is a compiler.

Two environment variables are for those who work on lexibit: with LEXIBIT_BUILD=required an installation
without kernels is an error, and LEXIBIT_SANITIZE=address,undefined compiles them to look for such faults.
"""

import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = Path("src/lexibit/kernels")
# one build serves all versions of Python, but for those without the global lock
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
# products are rounded before they are added, as PyTorch does: levels have the same bits
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
SANITIZE = os.environ.get("LEXIBIT_SANITIZE", "")
if SANITIZE:
    FLAGS = [*FLAGS, f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1", "-g1"]
# for files whose names begin so, which are only run where the CPU has these
AVX2 = ["-mavx2", "-mfma"]
AVX512VNNI = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "vbmi"))]
AVX512BF16 = [*AVX512VNNI, "-mavx512bf16"]
AMX = [*AVX512BF16, *(f"-mamx-{part}" for part in ("tile", "int8", "bf16"))]
INSTRUCTION_SETS = (
    {"avx2": AVX2, "avx512vnni": AVX512VNNI, "avx512bf16": AVX512BF16, "amx": AMX}
    if platform.machine() in ("x86_64", "AMD64")
    else {}
)


class Build(build_ext):
    """Compiles each file for its own instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension: without AMX where the compiler has none, as GCC before 11."""
        if "amx" in INSTRUCTION_SETS and not self._takes(AMX):
            ext.sources = [one for one in ext.sources if not Path(one).name.startswith("amx")]
            ext.define_macros.append(("LEXIBIT_WITHOUT_AMX", "1"))
        plain = self.compiler._compile

        def for_its_set(
            obj: str, src: str, suffix: str, cc_args: Any, extra: list[str], pp_opts: Any
        ) -> None:
            plain(
                obj,
                src,
                suffix,
                cc_args,
                extra + INSTRUCTION_SETS.get(Path(src).stem.split("_")[0], []),
                pp_opts,
            )

        self.compiler._compile = for_its_set
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = plain

    def _takes(self, flags: list[str]) -> bool:
        """Whether the compiler takes these flags."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        nothing = folder / "nothing.cpp"
        nothing.write_text("")
        try:
            self.compiler.compile([str(nothing)], str(folder), extra_preargs=flags)
        except CompileError:
            return False
        return True


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "lexibit._kernels",
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=sorted(map(str, KERNELS.glob("*.h"))),
            extra_compile_args=FLAGS,
            extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
            language="c++",
            py_limited_api=LIMITED,
            optional=os.environ.get("LEXIBIT_BUILD") != "required",
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
