"""Text from an exported folder, greedily, through the runtime that its format is made for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compot_deploy.accuracy.onnx_runner import onnx_runner
from compot_deploy.accuracy.runner import Runner
from compot_deploy.accuracy.runners import huggingface_runner, huggingface_texts
from compot_deploy.accuracy.towers import OnnxTowers
from compot_deploy.core.json_files import read_object
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.models.configuration import CONFIG, context_of, read_config, settings_of
from compot_deploy.models.generation import end_tokens, read_generation
from compot_deploy.models.tasks import Task, Utterance, task_of
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.models.writing import load_writer
from compot_deploy.transformers_plugin.folder import MODEL_TYPE, reveal
from compot_deploy.transformers_plugin.folder import read_config as read_compressed_config


@dataclass(frozen=True)
class Generated:
    """Text, and how fast it came.

    Attributes:
        text: what was added to the prompt.
        tokens: its ids.
        tokens_per_second: decoding speed, reading the prompt left out where the same tower continues it.
    """

    text: str
    tokens: tuple[int, ...]
    tokens_per_second: float


def generate(path: Path, prompt: str, *, tokens: int = 64, threads: int = 1) -> Generated:
    """Continue a prompt greedily, up to a token that ends a text; special tokens in the prompt are read as such.

    A model of two towers reads the prompt with its encoder, and its decoder writes what it makes of it.

    Args:
        path: an exported ONNX, GGUF or Hugging Face folder, or a GGUF file.
        prompt: text.
        tokens: most tokens to add.
        threads: of the runtime.

    Raises:
        ArtifactError: nothing that can be run lies there.
        InputError: a prompt without tokens, or one longer than the context; or a model that writes no text.
        MissingDependencyError: the runtime is not installed.
    """
    if path.suffix == ".gguf" or (path.is_dir() and list(path.glob("*.gguf"))):
        from compot_deploy.llama.model import find_gguf
        from compot_deploy.llama.model import generate as generate_in_llama

        made = generate_in_llama(find_gguf(path), prompt, max_tokens=tokens, threads=threads)
        return Generated(made.text, made.tokens, made.tokens_per_second)
    onnx = any((path / graph).is_file() for graph in ("onnx/model.onnx", "onnx/decoder_model_merged.onnx"))
    if not onnx and not list(path.glob("model*.safetensors")):
        raise ArtifactError(
            f"{path} holds neither onnx/model.onnx nor a GGUF file nor model.safetensors: export a model there "
            "first."
        )
    config = _config(path)
    task = task_of(config)
    if task is not None and task.has_towers and not task.listens:
        return _written(path, task, config, prompt, tokens, threads if onnx else None)
    if task is None or not task.generates:
        raise InputError(
            f"{path} holds a model that gives embeddings or scores and writes no text: read it with onnxruntime or "
            "optimum."
            if task is None or not task.listens
            else f"{path} holds a model that writes down what it hears and continues no text: run it with optimum or "
            "transformers.js."
        )
    tokenizer = load_tokenizer(path)
    ids = [*tokenizer.first, *tokenizer.encode(prompt)]
    runner: Runner = onnx_runner(path, threads=threads) if onnx else huggingface_runner(path)
    if not ids:
        raise InputError("The prompt has no tokens: give at least one word.")
    if runner.context is not None and len(ids) + tokens > runner.context:
        raise InputError(
            f"{len(ids)} tokens of prompt and {tokens} new ones are more than the model's context of "
            f"{runner.context}. Give a shorter prompt or fewer --tokens."
        )
    runner.generate(ids, 1)  # the first call of a session pays for its memory
    begin = time.perf_counter()
    runner.generate(ids, 1)
    first = time.perf_counter()
    drawn = runner.generate(ids, tokens)
    seconds = max(1e-9, (time.perf_counter() - first) - (first - begin))
    ends = end_tokens(read_generation(path), config)
    added = tuple(itertools.takewhile(lambda token: token not in ends, drawn))
    return Generated(tokenizer.decode(added), added, (len(drawn) - 1) / seconds)


def _written(
    path: Path, task: Task, config: Mapping[str, Any], prompt: str, tokens: int, threads: int | None
) -> Generated:
    """What a decoder writes of a prompt that its encoder reads; without threads, in transformers."""
    tokenizer, writer = load_tokenizer(path), load_writer(path, config)
    read = tokenizer.whole(prompt, context_of(settings_of(config, str(path / CONFIG), ArtifactError)))
    begun = Utterance(torch.tensor(writer.beginning), torch.tensor(read), len(writer.beginning), "input_ids")
    runner: Any = huggingface_texts(path, task) if threads is None else OnnxTowers(path, threads=threads)
    writer = replace(writer, longest=min(writer.longest, len(writer.beginning) + tokens))
    runner.write(begun, writer)  # the first call of a session pays for its memory
    started = time.perf_counter()
    added = runner.write(begun, writer)
    seconds = max(1e-9, time.perf_counter() - started)
    return Generated(tokenizer.decode(added), added, (len(added) + 1) / seconds)


def _config(folder: Path) -> Mapping[str, Any]:
    """The configuration of a folder's model; of the model that was compressed, where the folder is of our type."""
    if read_object(folder / CONFIG).get("model_type") != MODEL_TYPE:
        return read_config(folder)
    return reveal(read_compressed_config(folder)["base_config"])
