"""What pyproject.toml cannot say: the C++ kernels, which are built where there is a compiler."""

import platform
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("src/lexibit/kernels")
# products are rounded before they are added, as PyTorch does: levels have the same bits
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# for files that are only run where the CPU has these
INSTRUCTION_SETS = {"avx2": ["-mavx2", "-mfma"]} if platform.machine() in ("x86_64", "AMD64") else {}


class Build(build_ext):
    """Compiles each file for its own instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        compiled = self.compiler._compile

        def compile(obj: str, src: str, ext: str, cc_args: Any, extra: list[str], pp_opts: Any) -> None:
            compiled(obj, src, ext, cc_args, extra + INSTRUCTION_SETS.get(Path(src).stem, []), pp_opts)

        self.compiler._compile = compile
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compiled


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "lexibit._kernels",
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=sorted(map(str, KERNELS.glob("*.h"))),
            extra_compile_args=FLAGS,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
