"""Builds the CPU kernels of `csrc/`; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError, CompileError

MISSING = """
prototok: the C++ kernels were NOT built ({error}, see above).
prototok: the package works without them, more slowly on a CPU; install a C++17 compiler and
prototok: reinstall to get them.
"""


class OptionalBuild(build_ext):
    """An installation without a compiler succeeds and says what it lacks."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, CompileError, OSError) as error:
            print(MISSING.format(error=type(error).__name__), file=sys.stderr)
            # An editable or in-place build copies what was built; there is nothing to copy.
            self.extensions = []


ParallelCompile().install()  # as many sources at a time as there are processors
setup(
    ext_modules=[
        Pybind11Extension(
            "prototok_kernels._cpu",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(str(path) for path in Path("csrc").rglob("*.[hi]*")),
            cxx_std=17,
            # Neither changes a result: errno is never read, and contraction is GCC's own default.
            extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=fast"],
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
)
