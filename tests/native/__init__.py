"""Extensions that only tests and benchmarks need, compiled on first use."""

import functools
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from speechrnt import _sched_core

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O2", "-UNDEBUG", f"-DSPEECHRNT_RING={_sched_core.RING_CAPACITY}"]
SANITIZERS = {"tsan": ["-fsanitize=thread", "-Wno-tsan"], "asan": ["-fsanitize=address"]}


@functools.cache
def load(name, sources=HERE):
    """Compile ``sources/name.pyx`` for the build of speechrnt that is tested, and import it."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    flags = SANITIZERS.get(os.environ.get("SPEECHRNT_BUILD", ""), [])
    package = Path(_sched_core.__file__).parent
    directory = Path(tempfile.mkdtemp(prefix=f"speechrnt-{name}-"))
    extension = Extension(
        name,
        [str(sources / f"{name}.pyx")],
        language="c++",
        include_dirs=[str(package), str(sources)],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=flags,
    )
    modules = cythonize(
        [extension],
        build_dir=str(directory),
        include_path=[str(package.parent)],
        compiler_directives={"language_level": 3, "freethreading_compatible": True},
        quiet=True,
    )
    distribution = Distribution({"name": name, "ext_modules": modules})
    command = distribution.get_command_obj("build_ext")
    command.build_lib = command.build_temp = str(directory)
    distribution.run_command("build_ext")
    specification = importlib.util.spec_from_file_location(name, command.get_ext_fullpath(name))
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module
