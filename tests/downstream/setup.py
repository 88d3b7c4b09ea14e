"""Build the one extension module; cimport finds speechrnt's declarations where it is installed."""

from Cython.Build import cythonize
from setuptools import Extension, setup

extension = Extension("sr_downstream.buffers", ["sr_downstream/buffers.pyx"])
directives = {"language_level": 3, "freethreading_compatible": True}
setup(ext_modules=cythonize([extension], compiler_directives=directives))
