"""Build of the extension modules; everything else is declared in pyproject.toml.

Environment
-----------
SPEECHRNT_WERROR
    ``1`` makes C++ compiler warnings errors, as the Makefile and the release builds do.
SPEECHRNT_BUILD
    ``debug``, ``tsan`` or ``asan`` makes a build for tests, with assertions and a sanitizer.
    All but ``tsan`` have rings of 4 slots, so that they fill and wrap around all the time.
SPEECHRNT_GPU
    ``1`` makes it an error if the GPU modules cannot be built, as the release builds do; ``0``
    leaves them out. Otherwise they are built where cuda-bindings and cuda.h are installed.
"""

import importlib.metadata
import os
import re
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


def find_cuda():
    """Return the directory of cuda.h, and None; or None, and why the GPU modules cannot be built.

    The header must be at least as new as cuda-bindings, whose declarations name its types.
    """
    if os.environ.get("SPEECHRNT_GPU") == "0":
        return None, "SPEECHRNT_GPU is 0"
    try:
        bindings = importlib.metadata.version("cuda-bindings")
        from cuda import pathfinder
    except ImportError:
        return None, "cuda-bindings is not installed"
    directory = pathfinder.find_nvidia_header_directory("cudart")
    if directory is None:
        return None, "cuda.h was not found; nvidia-cuda-runtime-cu12 has it"
    header = (Path(directory) / "cuda.h").read_text(encoding="utf-8", errors="replace")
    version = int(re.search(r"^#define CUDA_VERSION (\d+)", header, re.MULTILINE)[1])
    header_version = (version // 1000, version // 10 % 100)
    if header_version < tuple(int(part) for part in bindings.split(".")[:2]):
        return None, "cuda.h is {}.{}, older than cuda-bindings {}".format(
            *header_version, bindings
        )
    return directory, None


cuda_include, why_no_cuda = find_cuda()
if why_no_cuda is not None:
    if os.environ.get("SPEECHRNT_GPU") == "1":
        raise SystemExit(f"the GPU modules cannot be built: {why_no_cuda}")
    print(f"building without the GPU modules: {why_no_cuda}")

headers = [str(path) for path in sorted(Path("speechrnt").glob("*.h"))]
sources = sorted(Path("speechrnt").glob("*.pyx"))
gpu_modules = {path.stem for path in sources if path.stem.startswith(("_gpu", "capi_gpu"))}
extensions = [
    Extension(
        f"speechrnt.{source.stem}",
        [str(source)],
        language="c++",
        include_dirs=[cuda_include] if source.stem in gpu_modules else [],
        extra_compile_args=[*CXX_FLAGS, *build_flags, *sanitizer],
        extra_link_args=sanitizer,
        depends=headers,
    )
    for source in sources
    if why_no_cuda is None or source.stem not in gpu_modules
]

setup(
    ext_modules=cythonize(extensions, build_dir="build/cython", compiler_directives=DIRECTIVES),
    options={"build_ext": {"parallel": True}},
)
