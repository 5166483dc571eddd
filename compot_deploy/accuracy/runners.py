"""Tokens in, logits out, through torch or a runtime: what the accuracy checker compares.

A runner hides a runtime behind two calls. `Runner.logits` reads windows of tokens and yields the logits a few
positions at a time, so that nobody ever holds the logits of a whole text; `Runner.generate` continues a
prompt greedily. Both walk through the key-value cache, the way the model is used when it is deployed, so a
broken cache shows up in every figure.

    torch_runner        the original model, its matrices replaced by dequantized ones where they are given
    compressed_runner   a CompressedModel: every weight as an exporter writes it, multiplied out, in float32
    onnx_runner         an exported ONNX folder, as shipped or with the runtime's approximations switched off

`RUNNERS` maps the kind of an artifact to the function that opens it. A runtime is one such function; the
loops `stream` and `greedy` are shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import ArtifactError, InputError, UnsupportedModelError
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.transformers_versions import cache_of, forward_with_cache

if TYPE_CHECKING:
    import onnxruntime

State = TypeVar("State")
"""What a runtime carries from one call to the next: its key-value cache."""


@runtime_checkable
class Runner(Protocol):
    """A model that can be asked for logits and for greedy text."""

    @property
    def name(self) -> str:
        """What is run and how, for reports: ``onnxruntime 1.32.0, as shipped``."""
        ...

    @property
    def vocabulary(self) -> int:
        """Width of the logits; every token id must be below it."""
        ...

    @property
    def context(self) -> int | None:
        """Longest sequence that the model can read, None where it does not say."""
        ...

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """Logits at every position, float32 on the CPU, in pieces of `chunk` positions, the last one shorter.

        Args:
            tokens: windows without padding, each read from its start with an empty cache.
            chunk: positions per piece, at least 1.
        """
        ...

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """Exactly `new_tokens` greedy tokens after the prompt; end-of-text tokens do not stop it."""
        ...


@runtime_checkable
class RunnerFactory(Protocol):
    """Opens an artifact of one kind."""

    def __call__(self, folder: Path, *, exact: bool = False, threads: int = 0) -> Runner:
        """A runner for an exported folder or file.

        Args:
            folder: the artifact.
            exact: switch the runtime's approximations off (int8 activations, float16 cache), so that what
                remains is the error of the exported file. The shipped settings otherwise.
            threads: of the runtime; 0 lets it choose.
        """
        ...


Advance = Callable[[Tensor, State | None], tuple[Tensor, State]]
"""(tokens, state) → (logits of these tokens, next state): one call into a runtime; no state is the start."""


def stream(
    advance: Advance[State], tokens: Int64[Tensor, "batch length"], chunk: int
) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
    """Walk windows through a runtime, `chunk` positions per call."""
    state: State | None = None
    for piece in tokens.split(chunk, dim=1):
        logits, state = advance(piece, state)
        yield logits.float().cpu()


def greedy(advance: Advance[State], prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    """The most likely token, again and again; among equals the lowest id.

    Raises:
        InputError: the prompt is empty.
    """
    if not prompt:
        raise InputError("A prompt without tokens cannot be continued: give at least one token.")
    generated: list[int] = []
    state: State | None = None
    step = torch.tensor([list(prompt)])
    for _ in range(new_tokens):
        logits, state = advance(step, state)
        generated.append(int(logits[0, -1].argmax()))
        step = torch.tensor([generated[-1:]])
    return tuple(generated)


# torch


class TorchRunner:
    """A transformers decoder.

    Args:
        model: a causal language model; switched to evaluation.
        name: for reports.
    """

    def __init__(self, model: Any, name: str = "torch") -> None:
        self._model = model.eval()
        self.name = name
        self.vocabulary = int(model.config.vocab_size)
        context = getattr(model.config, "max_position_embeddings", None)
        self.context: int | None = None if context is None else int(context)

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """See `Runner.logits`."""
        return stream(self._advance, tokens, chunk)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """See `Runner.generate`."""
        return greedy(self._advance, prompt, new_tokens)

    @contextmanager
    def replaced(self, matrices: Mapping[str, Matrix]) -> Iterator[None]:
        """The same model with some linears dequantized from `matrices`, until the context ends."""
        kept: dict[str, nn.Parameter] = {}
        try:
            for path, matrix in matrices.items():
                module = self._model.get_submodule(path)
                kept[path] = module.weight
                weight = matrix.dequantize().T.to(module.weight)
                module.weight = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for path, weight in kept.items():
                self._model.get_submodule(path).weight = weight

    def _advance(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        # Not a decorator on `stream`: a grad mode set inside a generator leaks to whoever consumes it.
        with torch.inference_mode():
            output = forward_with_cache(self._model, cache, input_ids=tokens.to(self._model.device))
        return output.logits, cache_of(output)


def torch_runner(
    source: Path,
    replacements: Mapping[str, Matrix] | None = None,
    *,
    name: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> TorchRunner:
    """The model of a local transformers folder, optionally with some matrices replaced.

    Nothing is downloaded and no code of the folder is run. Weights that the folder lacks are an error; the
    transformers library alone would fill them with random numbers.

    Args:
        source: folder with config.json and safetensors.
        replacements: matrices by module path, dequantized and put in place of the original weights. A tied
            head follows the embedding.
        name: for reports.
        device: where it runs.
        dtype: computed in; float32 holds bfloat16 and float16 weights exactly.
        allow_pickle: also read ``pytorch_model.bin``, with torch's restricted unpickler.

    Raises:
        InputError: the folder is not a readable model, lacks weights or has some that its configuration does
            not know, or a replacement does not fit.
    """
    import transformers

    if not (source / "config.json").is_file():
        raise InputError(f"{source} is not a transformers folder: it has no config.json.")
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, SafetensorError, …: whatever a damaged folder provokes
        raise InputError(f"{source} does not load in transformers: {_first_line(error)}") from error
    for problem, keys in (
        ("lacks the weights", loading["missing_keys"]),
        ("has weights of another shape than its config.json says:", loading["mismatched_keys"]),
        ("has weights that its config.json does not know:", loading["unexpected_keys"]),
    ):
        # Old checkpoints carry the rotary frequencies, which follow from the configuration.
        names = sorted(str(key) for key in keys if not str(key).endswith("rotary_emb.inv_freq"))
        if names:
            raise InputError(f"{source} {problem} {_some(names)}. Convert or download the checkpoint again.")
    if replacements is not None:
        _place_matrices(model, replacements)
    label = "original" if replacements is None else "dequantized"
    return TorchRunner(model.to(device), name or f"torch {torch.__version__}, {label} weights")


def compressed_runner(
    model: CompressedModel,
    *,
    name: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TorchRunner:
    """A compressed model in torch: every matrix dequantized and multiplied out, everything else as it is.

    Needs no original checkpoint, only the compressed model, so a folder can be checked on its own.

    Args:
        model: what the exporters were given, or read back from an artifact.
        name: for reports.
        device: where it runs.
        dtype: computed in.

    Raises:
        InputError: a weight is missing, unknown, or has another shape than the configuration says.
    """
    import transformers

    config = transformers.AutoConfig.for_model(**_config_arguments(model))
    torch_model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    placed = _place_matrices(torch_model, model.matrices)
    placed |= _place_tensors(torch_model, model.tensors)
    # named_parameters leaves out the second name of a tied weight.
    missing = sorted(set(dict(torch_model.named_parameters())) - placed)
    if missing:
        raise InputError(f"The compressed model lacks {_some(missing)}. Compress the model again.")
    return TorchRunner(torch_model.to(device), name or f"torch {torch.__version__}, dequantized weights")


def _config_arguments(model: CompressedModel) -> dict[str, Any]:
    # A checkpoint may tie its head while the compressed model stores it apart, at another precision.
    return {**model.config, "tie_word_embeddings": model.tied}


def _place_matrices(model: nn.Module, matrices: Mapping[str, Matrix]) -> set[str]:
    """Put dequantized matrices into the linears and embeddings of a model; the parameter names written."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    written: dict[int, str] = {}
    for path, matrix in matrices.items():
        name = f"{path}.weight"
        if name not in parameters:
            raise InputError(f"The model has no weight {name} to replace.")
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise UnsupportedModelError(
                f"{path} is a {type(module).__name__}: only the matrices of Linear and Embedding can be "
                "replaced."
            )
        parameter = parameters[name]
        if id(parameter) in written:
            raise InputError(
                f"{path} and {written[id(parameter)]} are tied in this model: replace one of them only."
            )
        written[id(parameter)] = path
        # Linear keeps (out, in); Embedding keeps (vocabulary, hidden), and we (hidden, vocabulary).
        _copy(parameter, matrix.dequantize().T, name)
    return {name for name, parameter in parameters.items() if id(parameter) in written}


def _place_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Put tensors in place by checkpoint name; the parameter names written."""
    targets: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    placed: set[str] = set()
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in targets:
            raise InputError(f"The model has no tensor {name} to fill.")
        _copy(targets[name], tensor, name)
        placed.add(name)
    return placed


def _copy(target: Tensor, values: Tensor, name: str) -> None:
    if target.shape != values.shape:
        raise InputError(
            f"{name} has the shape {tuple(target.shape)} in the model, not {tuple(values.shape)}."
        )
    with torch.no_grad():
        target.copy_(values)


# ONNX Runtime


class OnnxRunner:
    """An exported ONNX folder in ONNX Runtime, on the CPU.

    Reads the inputs that every consumer agrees on, ``input_ids``, ``attention_mask``, ``position_ids`` where
    the graph has it, ``past_key_values.{i}.key|value``, and returns ``logits`` and ``present.{i}.key|value``.

    Args:
        folder: holds ``onnx/model.onnx``, ``onnx/model.onnx_data`` and, for the context length,
            ``config.json``.
        accuracy_level: of quantized multiplications: 0 computes in float32, 4 rounds activations to int8.
            None leaves what the file says. Set in memory; no file is changed or written.
        threads: 0 lets the runtime choose.
        name: for reports.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: the folder lacks the model, or the runtime refuses it, or its inputs have other names.
    """

    def __init__(
        self,
        folder: Path,
        accuracy_level: int | None = None,
        *,
        threads: int = 0,
        name: str | None = None,
    ) -> None:
        from compot_deploy.exporters.onnx.session import open_session
        from compot_deploy.exporters.onnx.tensors import GRAPH

        self._path = folder / GRAPH
        self._session: onnxruntime.InferenceSession = open_session(folder, accuracy_level, threads)
        import onnxruntime  # after open_session, which says how to install it where it is missing

        setting = "as shipped" if accuracy_level is None else f"accuracy level {accuracy_level}"
        self.name = name or f"onnxruntime {onnxruntime.__version__}, {setting}"
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        outputs = {entry.name: entry for entry in self._session.get_outputs()}
        self._positions = "position_ids" in inputs
        self._past = [past for past in inputs if past.startswith("past_key_values.")]
        self._present = [past.replace("past_key_values.", "present.", 1) for past in self._past]
        self._check_names(inputs, outputs)
        self._empty = [_empty_cache(inputs[past], self._path) for past in self._past]
        config = _read_config(folder)
        width = outputs["logits"].shape[-1]
        if not isinstance(width, int):
            width = config.get("vocab_size")
        if not isinstance(width, int):
            raise ArtifactError(
                f"{self._path}: neither the logits nor config.json tell the size of the vocabulary."
            )
        self.vocabulary = width
        context = config.get("max_position_embeddings")
        self.context: int | None = context if isinstance(context, int) else None

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """See `Runner.logits`."""
        if len(tokens) > 1 and chunk < tokens.shape[1]:
            # GroupQueryAttention continues by several positions at once only in a batch of one.
            rows = [stream(self._advance, row[None], chunk) for row in tokens]
            return (torch.cat(pieces) for pieces in zip(*rows, strict=True))
        return stream(self._advance, tokens, chunk)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """See `Runner.generate`."""
        return greedy(self._advance, prompt, new_tokens)

    def _check_names(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        known = {"input_ids", "attention_mask", "position_ids", *self._past}
        for problem, names in (
            ("lacks the inputs", {"input_ids", "attention_mask"} - set(inputs)),
            ("has inputs that are not understood:", set(inputs) - known),
            ("lacks the outputs", {"logits", *self._present} - set(outputs)),
        ):
            if names:
                raise ArtifactError(f"{self._path} {problem} {_some(sorted(names))}. Export the model again.")
        if not self._past:
            raise ArtifactError(f"{self._path} has no key-value cache: no input past_key_values.0.key.")

    def _advance(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        batch, length = tokens.shape
        past_length, past = state or (0, None)
        if past is None:
            past = [self._value(empty.expand(batch, -1, -1, -1).numpy()) for empty in self._empty]
        total = past_length + length
        feed = {
            "input_ids": self._value(tokens.contiguous().numpy()),
            "attention_mask": self._value(torch.ones(batch, total, dtype=torch.int64).numpy()),
            **dict(zip(self._past, past, strict=True)),
        }
        if self._positions:
            positions = torch.arange(past_length, total).repeat(batch, 1)
            feed["position_ids"] = self._value(positions.numpy())
        try:
            logits, *present = self._session.run_with_ort_values(["logits", *self._present], feed)
        except Exception as error:  # see above
            raise ArtifactError(
                f"{self._path} fails at positions {past_length} to {total - 1}: {_first_line(error)}"
            ) from error
        return torch.from_numpy(logits.numpy()), (total, present)


def onnx_runner(folder: Path, *, exact: bool = False, threads: int = 0) -> OnnxRunner:
    """An exported ONNX folder: `exact` computes every quantized multiplication in float32."""
    return OnnxRunner(folder, 0 if exact else None, threads=threads)


def llama_runner(folder: Path, *, exact: bool = False, threads: int = 0) -> Runner:
    """An exported GGUF file in llama.cpp; see `compot_deploy.llama.runner.LlamaRunner`.

    Args:
        folder: the folder that holds it, or the file.
        exact: factors multiplied out in float32, a float32 cache.
        threads: 0 takes half of the processors.
    """
    from compot_deploy.llama.runner import LlamaRunner

    return LlamaRunner(folder, exact=exact, threads=threads)


def huggingface_runner(folder: Path, *, exact: bool = False, threads: int = 0) -> TorchRunner:
    """An exported Hugging Face folder in transformers, in float32.

    Packed factors are computed exactly as they are; only bitsandbytes' own modules, which a plain model may
    consist of, round activations, and `exact` multiplies them out.

    The folder is loaded as a user would, by the Auto class, but no code of it is run: see
    `compot_deploy.transformers_plugin.layout.read_config`.

    Raises:
        ArtifactError: files and configuration disagree, or point elsewhere.
    """
    import transformers

    from compot_deploy.exporters.huggingface.bnb import dequantized
    from compot_deploy.exporters.huggingface.exporter import EXPORTER, is_bnb
    from compot_deploy.quant import require_bitsandbytes
    from compot_deploy.transformers_plugin.layout import read_config

    plain = is_bnb(folder)
    if plain:
        require_bitsandbytes()
        EXPORTER.read_model(folder)  # refuses what is not as we write it
    else:
        read_config(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    if plain:
        how = "bitsandbytes multiplied out" if exact else "bitsandbytes"
        return TorchRunner(
            dequantized(model) if exact else model, f"transformers {transformers.__version__}, {how}"
        )
    return TorchRunner(model.unpack(), f"transformers {transformers.__version__}, packed factors")


RUNNERS: Final[Mapping[str, RunnerFactory]] = MappingProxyType(
    {"onnx": onnx_runner, "gguf": llama_runner, "huggingface": huggingface_runner}
)
"""Kind of artifact → the function that opens it."""


def _empty_cache(entry: Any, path: Path) -> Tensor:
    """A cache of no tokens for one window: (1, heads, 0, head size)."""
    types = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
    if entry.type not in types:
        raise ArtifactError(f"{path}: {entry.name} is a {entry.type}, not a float or float16 tensor.")
    if len(entry.shape) != 4 or not all(isinstance(entry.shape[axis], int) for axis in (1, 3)):
        raise ArtifactError(
            f"{path}: {entry.name} has the shape {entry.shape}, not (batch, heads, past, head size) with "
            "fixed heads and head size."
        )
    return torch.zeros(1, entry.shape[1], 0, entry.shape[3], dtype=types[entry.type])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} does not hold a JSON object.")
    return config


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _some(names: Sequence[str]) -> str:
    """A few names of many."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
