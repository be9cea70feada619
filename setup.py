"""Builds the native kernels, where there is a compiler; everything else is in pyproject.toml."""

import numpy as np
from setuptools import Extension, setup

FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-psabi",
]


def native(name: str, *headers: str) -> Extension:
    """A module of ``kernels/native``, without which something slower does the same."""
    return Extension(
        f"outrider.kernels.native._{name}",
        sources=[f"kernels/native/{name}.cpp"],
        depends=[f"kernels/native/{header}" for header in headers],
        include_dirs=[np.get_include()],
        extra_compile_args=FLAGS,
        optional=True,
    )


setup(
    ext_modules=[
        native(
            "linear",
            "numbers.hpp",
            "openmp.hpp",
            "tiles.hpp",
            "compact.hpp",
            "weights.hpp",
            "compact_steps.hpp",
            "avx2.hpp",
            "blocks.hpp",
            "int8.hpp",
            "int8_whole.hpp",
            "amx.hpp",
            "selecting.hpp",
            "attention_job.hpp",
            "attention_arguments.hpp",
            "reading.hpp",
            "layer_calls.hpp",
            "binding.hpp",
            "stack.hpp",
        ),
        native(
            "layers",
            "numbers.hpp",
            "openmp.hpp",
            "tiles.hpp",
            "vectors.hpp",
            "pointwise.hpp",
            "noise.hpp",
            "guesses.hpp",
            "race.hpp",
            "attention.hpp",
            "products.hpp",
            "products_by_tiles.hpp",
            "products_by_vectors.hpp",
            "attention_pairs.hpp",
            "attention_job.hpp",
            "attention_arguments.hpp",
            "reading.hpp",
            "layer_calls.hpp",
            "selecting.hpp",
            "layers_binding.hpp",
        ),
        native("batching", "reading.hpp"),
        native("replication", "grafting.hpp", "reading.hpp"),
    ]
)
