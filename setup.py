"""The one thing that pyproject.toml cannot say: the C plug-in of `compot_deploy.llama` is optional.

Without a compiler the package installs all the same, and factorised GGUF files are expanded when loaded.
"""

import sys

from setuptools import Extension, setup

# Contraction of a*b+c would round activations differently on different machines.
FLAGS = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden"]

setup(
    ext_modules=[
        Extension(
            "compot_deploy.llama._plugin",
            sources=["runtime/module.c", "runtime/plugin.c", "runtime/kernels.c"],
            depends=[
                "runtime/kernels.h",
                "runtime/kernels_avx2.h",
                "runtime/kernels_avx512.h",
                "runtime/kernels_neon.h",
                "runtime/kernels_tiles.h",
            ],
            extra_compile_args=FLAGS,
            py_limited_api=True,
            optional=True,
        )
    ]
)
