"""Build of the extension modules; everything else is declared in pyproject.toml.

Environment
-----------
SPEECHRNT_WERROR
    ``1`` makes C++ compiler warnings errors, as the Makefile and the release builds do.
SPEECHRNT_BUILD
    ``debug``, ``tsan`` or ``asan`` makes a build for tests, with assertions and a sanitizer.
    All but ``tsan`` have rings of 4 slots, so that they fill and wrap around all the time.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Errors, ExprNodes, Options, PyrexTypes, Symtab
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

# No -march: one binary runs everywhere, and code that gains from SIMD dispatches at run time.
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
if os.environ.get("SPEECHRNT_WERROR") == "1":
    CXX_FLAGS.append("-Werror")

TEST_FLAGS = ["-O1", "-UNDEBUG"]
SMALL_RINGS = ["-DSPEECHRNT_RING=4"]
BUILDS = {
    "": ([], []),
    "debug": ([*TEST_FLAGS, *SMALL_RINGS], []),
    # What spills from a small ring goes through a mutex, which would hide mistakes of the ring.
    # gcc warns that the sanitizer knows no fences; ours order nothing but who sleeps.
    "tsan": ([*TEST_FLAGS, "-Wno-tsan"], ["-fsanitize=thread"]),
    "asan": ([*TEST_FLAGS, *SMALL_RINGS], ["-fsanitize=address"]),
}
build_flags, sanitizer = BUILDS[os.environ.get("SPEECHRNT_BUILD", "")]


def refuse_performance_hint(position, message, env):
    """Stand in for Cython's function of the same arguments, which only prints the hint."""
    if env.directives["show_performance_hints"]:
        Errors.error(position, f"performance hint: {message}")


# Cython can make its warnings errors, but not its performance hints, each of which is a hidden
# call or a taken GIL. Every module that imported the function by name holds its own reference.
Options.warning_errors = True
for module in (Errors, ExprNodes, PyrexTypes, Symtab):
    module.performance_hint = refuse_performance_hint

headers = [str(path) for path in sorted(Path("speechrnt").glob("*.h"))]
extensions = [
    Extension(
        f"speechrnt.{source.stem}",
        [str(source)],
        language="c++",
        extra_compile_args=[*CXX_FLAGS, *build_flags, *sanitizer],
        extra_link_args=sanitizer,
        depends=headers,
    )
    for source in sorted(Path("speechrnt").glob("*.pyx"))
]

setup(
    ext_modules=cythonize(extensions, build_dir="build/cython", compiler_directives=DIRECTIVES),
    options={"build_ext": {"parallel": True}},
)
