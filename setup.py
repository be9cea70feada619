"""Builds the native linear layers, where there is a compiler; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "outrider.kernels.native._linear",
            sources=["kernels/native/linear.cpp"],
            depends=["kernels/native/weights.hpp", "kernels/native/binding.hpp"],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-g0",
                "-Wno-maybe-uninitialized",
            ],
            optional=True,  # without it PyTorch's own products are used
        )
    ]
)
