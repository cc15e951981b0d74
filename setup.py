"""Builds the CPU kernels of `csrc/` and the description for a package index.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError, CompileError

# Neither changes a result: errno is never read, and contraction is GCC's own default.
FLAGS = ["-fno-math-errno", "-ffp-contract=fast"]
# The environment's flags come first on the command line; where they choose, as for a build with
# sanitizers, this must not choose again.
# Which of the two variables reaches the compiler differs between versions of setuptools.
CHOSEN = shlex.split(f"{os.environ.get('CFLAGS', '')} {os.environ.get('CXXFLAGS', '')}")
if not any(flag.startswith("-O") for flag in CHOSEN):
    FLAGS.insert(0, "-O3")

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


def description() -> str:
    """Return the README for a package index, where files beside it are not at hand.

    Pictures go, and a link to a file becomes its text and its place in the source distribution.
    """
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"<picture>.*?</picture>\n\n", "", text, flags=re.DOTALL)

    def plain(link: re.Match[str]) -> str:
        return f"{link[1]} (`{link[2]}`)" if link[1] != link[2] else f"`{link[2]}`"

    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)", plain, text)


ParallelCompile().install()  # as many sources at a time as there are processors
setup(
    ext_modules=[
        Pybind11Extension(
            "prototok_kernels._cpu",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(str(path) for path in Path("csrc").rglob("*.[hi]*")),
            cxx_std=17,
            extra_compile_args=FLAGS,
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
    long_description=description(),
    long_description_content_type="text/markdown",
)
