"""One extension, two packages; everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["rmt_engine", "rmt_engine.*"]) + find_packages("kernels"),
    # The folder kernels/ is no package: a top-level `kernels` would hide the one that transformers imports.
    package_dir={"rmt_kernels": "kernels/rmt_kernels"},
    ext_modules=[
        Pybind11Extension(
            "rmt_engine._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Werror"],
        )
    ],
)
