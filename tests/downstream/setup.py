"""Build the extension modules; cimport finds speechrnt's declarations where it is installed."""

from Cython.Build import cythonize
from setuptools import Extension, setup

extensions = [
    Extension(f"sr_downstream.{name}", [f"sr_downstream/{name}.pyx"])
    for name in ("buffers", "gpu_blocks", "tasks")
]
directives = {"language_level": 3, "freethreading_compatible": True}
setup(ext_modules=cythonize(extensions, compiler_directives=directives))
