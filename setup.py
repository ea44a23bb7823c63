"""Two packages, an extension in each; everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

WARNINGS = ["-Wall", "-Wextra"]  # errors in csrc/Makefile, for us; another compiler may warn of something else

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
            extra_compile_args=["-O3", *WARNINGS],
        ),
        Pybind11Extension(
            "rmt_kernels._cpu",
            sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted([*glob("csrc/cpu/*.hpp"), *glob("csrc/*.hpp")]),
            cxx_std=17,
            # No flag for an instruction set: each file of csrc/cpu says which it is for, and the CPU is asked at run
            # time. A product and a sum are one instruction wherever they can be. -Wno-psabi: wide vectors as arguments
            # never leave their file.
            extra_compile_args=["-O3", "-ffp-contract=fast", *WARNINGS, "-Wno-psabi"],
            libraries=["dl"],
        ),
    ],
)
