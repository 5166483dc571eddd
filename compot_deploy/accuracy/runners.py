"""The runtimes by the kind of artifact that they open. A runtime is one function and one line in `RUNNERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import torch

from compot_deploy.accuracy.onnx_runner import onnx_runner
from compot_deploy.accuracy.runner import Runner, RunnerFactory
from compot_deploy.accuracy.texts import OnnxTexts, TextRunner, TorchTexts
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.accuracy.towers import OnnxTowers, TorchTowers
from compot_deploy.accuracy.towers_gate import towers_objection
from compot_deploy.errors import ArtifactError, CompotDeployError, first_line
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Task


class TextRunnerFactory(Protocol):
    """Opens an artifact of one kind whose model reads whole texts."""

    def __call__(self, folder: Path, task: Task, *, exact: bool = False) -> TextRunner:
        """A runner for an exported folder; `exact` switches the runtime's approximations off."""
        ...


def llama_runner(folder: Path, *, exact: bool = False, threads: int = 0) -> Runner:
    """An exported GGUF file in llama.cpp; see `compot_deploy.llama.runner.LlamaRunner`.

    Args:
        folder: the folder that holds it, or the file.
        exact: factors multiplied out in float32, a float32 cache.
        threads: 0 takes half of the processors.
    """
    from compot_deploy.llama.runner import LlamaRunner

    return LlamaRunner(folder, exact=exact, threads=threads)


def llama_objection(source: ModelSource) -> str | None:
    """What a tiny model of the same features shows, see `compot_deploy.llama.gate`; tests prove the native types."""
    if source.architecture is not None:
        return None
    from compot_deploy.llama.gate import objection

    return objection(source.config)


def huggingface_runner(folder: Path, *, exact: bool = False, threads: int = 0) -> TorchRunner:
    """An exported Hugging Face folder of a decoder in transformers, in float32; see `_in_transformers`."""
    model, name = _in_transformers(folder, "AutoModelForCausalLM", exact)
    return TorchRunner(model, name)


def onnx_texts(folder: Path, task: Task, *, exact: bool = False) -> TextRunner:
    """An exported ONNX folder: `exact`, the float32 reference, computes every quantized multiplication in float32."""
    return (OnnxTowers if task.has_towers else OnnxTexts)(folder, exact=exact)


def huggingface_texts(folder: Path, task: Task, *, exact: bool = False) -> TorchTexts:
    """An exported Hugging Face folder in transformers, in float32; see `_in_transformers`."""
    model, name = _in_transformers(folder, task.auto_class, exact)
    return (TorchTowers if task.has_towers else TorchTexts)(model, task, name)


def _in_transformers(folder: Path, auto_class: str, exact: bool) -> tuple[Any, str]:
    """The model of an exported Hugging Face folder, and what is run and how.

    Packed factors are computed exactly as they are; only bitsandbytes' own modules, which a plain model may
    consist of, round activations, and `exact` multiplies them out.

    The folder is loaded as a user would, by the Auto class, but no code of it is run: see
    `compot_deploy.transformers_plugin.folder.read_config`.

    Raises:
        ArtifactError: files and configuration disagree, or point elsewhere.
    """
    import transformers

    from compot_deploy.exporters.huggingface.bnb import dequantized
    from compot_deploy.exporters.huggingface.bnb_folder import is_bnb
    from compot_deploy.exporters.huggingface.exporter import EXPORTER
    from compot_deploy.quant.bnb import require_bitsandbytes
    from compot_deploy.transformers_plugin.folder import read_config

    plain = is_bnb(folder)
    if plain:
        require_bitsandbytes()
        EXPORTER.read_model(folder)  # refuses what is not as we write it
    else:
        read_config(folder)
    try:
        model = getattr(transformers, auto_class).from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except CompotDeployError:
        raise
    except Exception as error:  # transformers' own errors share no base class
        raise ArtifactError(f"{folder}: transformers cannot load it: {first_line(error)}.") from error
    version = f"transformers {transformers.__version__}"
    if not plain:
        return model.unpack().eval(), f"{version}, packed factors"
    if exact:
        return dequantized(model).eval(), f"{version}, bitsandbytes multiplied out"
    return model.eval(), f"{version}, bitsandbytes"


RUNNERS: Final[Mapping[str, RunnerFactory]] = MappingProxyType(
    {"onnx": onnx_runner, "gguf": llama_runner, "huggingface": huggingface_runner}
)
"""Kind of artifact → the function that opens it."""

OBJECTIONS: Final[Mapping[str, Callable[[ModelSource], str | None]]] = MappingProxyType(
    {"gguf": llama_objection, "onnx": towers_objection}
)
"""Kind of artifact → why its runtime would not compute a model as torch does, where it can be asked before any work."""

TEXT_RUNNERS: Final[Mapping[str, TextRunnerFactory]] = MappingProxyType(
    {"onnx": onnx_texts, "huggingface": huggingface_texts}
)
"""The same for models that read whole texts."""
