"""Build of the extension modules; everything else is declared in pyproject.toml.

Environment
-----------
SPEECHRNT_WERROR
    ``1`` makes C++ compiler warnings errors, as the Makefile and the release builds do.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Errors, Options
from setuptools import Extension, setup

DIRECTIVES = {
    "language_level": 3,
    "binding": True,
    "boundscheck": False,
    "cdivision": True,
    "embedsignature": True,
    "embedsignature.format": "python",
    "freethreading_compatible": True,
    "initializedcheck": False,
    "wraparound": False,
}

CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
if os.environ.get("SPEECHRNT_WERROR") == "1":
    CXX_FLAGS.append("-Werror")


def refuse_performance_hint(position, message, env):
    """Turn Cython's performance hints into errors: each is a hidden call or a taken GIL."""
    if env.directives["show_performance_hints"]:
        Errors.error(position, f"performance hint: {message}")


def make_hints_errors():
    # The hint function is imported by name, so every module that holds it is patched.
    from Cython.Compiler import ExprNodes, PyrexTypes, Symtab

    for module in (Errors, ExprNodes, PyrexTypes, Symtab):
        module.performance_hint = refuse_performance_hint


def extensions():
    headers = [str(path) for path in sorted(Path("speechrnt").glob("*.h"))]
    return [
        Extension(
            f"speechrnt.{source.stem}",
            [str(source)],
            language="c++",
            extra_compile_args=CXX_FLAGS,
            depends=headers,
        )
        for source in sorted(Path("speechrnt").glob("*.pyx"))
    ]


Options.warning_errors = True
make_hints_errors()
setup(ext_modules=cythonize(extensions(), build_dir="build/cython", compiler_directives=DIRECTIVES))
