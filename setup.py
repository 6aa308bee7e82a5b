"""Build the optional CPU kernels; everything else about the package stands in pyproject.toml.

The library is plain C loaded with ctypes. Where it cannot be built, the package installs and runs without it.
"""

from setuptools import Extension, setup

PARTS = ("gelu", "jobs", "vector", "depthwise", "pointwise", "forward", "amx", "undef")
FOLDER = "src/sagittal/kernels"

setup(
    ext_modules=[
        Extension(
            "sagittal.kernels._cpu",
            sources=[f"{FOLDER}/_cpu.c"],
            depends=[f"{FOLDER}/_cpu_{part}.h" for part in PARTS],
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-Wno-psabi",
                "-pthread",
            ],
            libraries=["m"],
            optional=True,
        )
    ],
)
