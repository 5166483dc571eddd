"""Models in torch: the original, some of its matrices replaced, or a compressed model multiplied out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from compot_deploy.accuracy.runner import greedy, stream
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import InputError, UnsupportedModelError, a_few, first_line
from compot_deploy.models.compressed import CompressedModel


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
            output = self._model(
                input_ids=tokens.to(self._model.device), past_key_values=cache, use_cache=True
            )
        return output.logits, output.past_key_values


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
        raise InputError(f"{source} does not load in transformers: {first_line(error)}.") from error
    for problem, keys in (
        ("lacks the weights", loading["missing_keys"]),
        ("has weights of another shape than its config.json says:", loading["mismatched_keys"]),
        ("has weights that its config.json does not know:", loading["unexpected_keys"]),
    ):
        # Old checkpoints carry the rotary frequencies, which follow from the configuration.
        names = sorted(str(key) for key in keys if not str(key).endswith("rotary_emb.inv_freq"))
        if names:
            raise InputError(f"{source} {problem} {a_few(names)}. Convert or download the checkpoint again.")
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
        raise InputError(f"The compressed model lacks {a_few(missing)}. Compress the model again.")
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
