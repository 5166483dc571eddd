"""What pyproject.toml cannot say: the C plug-in of `compot_deploy.llama` is optional.

Without a compiler the package installs all the same, and factorized GGUF files are expanded when loaded.
"""

import sys
import warnings

from setuptools import Extension, setup

# Contraction of a*b+c would round activations differently on different machines.
FLAGS = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden"]

# An editable install warns of folders that are named like the package and would be imported first. Here that folder is
# the package.
warnings.filterwarnings("ignore", message="Editable installation")

setup(
    ext_modules=[
        Extension(
            "compot_deploy.llama._plugin",
            sources=[
                "compot_deploy/llama/module.c",
                "compot_deploy/llama/plugin.c",
                "compot_deploy/llama/plugin_graph.c",
                "compot_deploy/llama/kernels.c",
                "compot_deploy/llama/leaf.c",
                "compot_deploy/llama/tiles.c",
            ],
            depends=[
                "compot_deploy/llama/kernels.h",
                "compot_deploy/llama/leaf.h",
                "compot_deploy/llama/plugin.h",
                "compot_deploy/llama/kernels_avx2.h",
                "compot_deploy/llama/kernels_avx512.h",
                "compot_deploy/llama/kernels_neon.h",
                "compot_deploy/llama/kernels_tiles.h",
            ],
            extra_compile_args=FLAGS,
            py_limited_api=True,
            optional=True,
        )
    ]
)
