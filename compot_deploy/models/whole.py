"""A whole model in torch: the original, with some matrices replaced, or filled from compressed matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import InputError
from compot_deploy.models.checkpoint import may_be_absent
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.configuration import for_model
from compot_deploy.models.sites import Site
from compot_deploy.models.skeleton import without_parameters
from compot_deploy.models.source import ModelSource


def whole_model(
    source: ModelSource, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The original with all its weights, in evaluation mode.

    Parameters that a checkpoint may lack and nothing reads, a pooler's for example, are zero.
    """
    place = torch.device(device)
    model = source.skeleton(device=place, dtype=dtype, head=True)
    for block in source.layout.blocks:
        source.load(model, block, device=place, dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                zeros = torch.zeros(parameter.shape, device=place, dtype=dtype)
                setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@contextmanager
def replaced(model: Any, source: ModelSource, matrices: Mapping[str, Matrix]) -> Iterator[Any]:
    """The same model with the values of some matrices in the place of its own, until the context ends.

    What was replaced is read from the checkpoint again, so nothing is held twice.

    Args:
        model: of `whole_model`.
        source: that it was made of.
        matrices: by name; read one after the other.
    """
    try:
        yield put_in(model, source.sites, matrices)
    finally:
        for name in matrices:
            if name in source.sites:
                site = source.sites[name]
                place_of(model, site).copy_(oriented(source.weight(name), site))


def put_in(model: Any, sites: Mapping[str, Site], matrices: Mapping[str, Matrix]) -> Any:
    """The same model with the values of some matrices in the place of its own, for good; see `replaced`."""
    for name, matrix in matrices.items():
        if name in sites:
            target = place_of(model, sites[name])
            target.copy_(oriented(matrix.dequantize(), sites[name]).to(target))
    return model


def place_of(model: Any, site: Site) -> Tensor:
    """The memory of a matrix in a model, as its parameter keeps it."""
    parameter: Tensor = model.get_parameter(site.parameter).data
    return parameter if site.index is None else parameter[site.index]


def oriented(weight: Tensor, site: Site) -> Tensor:
    """A weight (in, out) as its parameter keeps it."""
    return weight.T if site.transposed else weight


def model_of(model: CompressedModel, *, matrices: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A compressed model in torch: every matrix multiplied out, everything else as it is.

    Needs no original checkpoint, only the compressed model, so a folder can be checked on its own.

    Args:
        model: what an exporter is given, or reads back.
        matrices: False leaves the matrices out, on the device ``meta``: for tracers, which put something else there.
        dtype: computed in.

    Raises:
        InputError: a weight is missing, unknown, or has another shape than the configuration says.
        UnsupportedModelError: a configuration that transformers has no model for.
    """
    made = unfilled(model, dtype=dtype)
    fill(made, model, matrices=matrices)
    return made


def unfilled(model: CompressedModel, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers that a compressed model fills; its parameters are on the device ``meta``.

    Raises:
        InputError: a weight is missing, unknown, or belongs to two matrices.
        UnsupportedModelError: a configuration that transformers has no model for.
    """
    settings = for_model(model.stored_config)
    made = without_parameters(settings, model.task, dtype)
    known = made.state_dict(keep_vars=True)
    names = [name for name in model.tensors if not name.endswith(_COMPUTED)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(f"The model has no tensor {unknown[0]} to fill.")
    owners: dict[int, str] = {}
    for name in model.matrices:
        parameter, _ = _matrix_place(made, name, known)
        if id(known[parameter]) in owners:
            raise InputError(
                f"{name} and {owners[id(known[parameter])]} are tied in this model: replace one of them only."
            )
        owners[id(known[parameter])] = name
    filled = set(owners) | {id(known[name]) for name in names}
    missing = sorted(
        name for name, value in known.items() if id(value) not in filled and isinstance(value, nn.Parameter)
    )
    missing = [name for name in missing if not may_be_absent(name)]
    if missing:
        raise InputError(f"The compressed model lacks {missing[0]}. Compress the model again.")
    return made


_COMPUTED: Final = "rotary_emb.inv_freq"
"""Ends the names of tensors that old checkpoints store and every model computes."""


def fill(
    made: Any,
    model: CompressedModel,
    wanted: Callable[[str], bool] = lambda _: True,
    *,
    matrices: bool = True,
) -> None:
    """Put the weights of a compressed model into its model of transformers, all or some.

    Parameters that a checkpoint may lack and nothing reads are zero.

    Args:
        made: of `unfilled`.
        model: the compressed model.
        wanted: whether a tensor or matrix of this name is put in its place now.
        matrices: False leaves the matrices where they are.

    Raises:
        InputError: a weight has another shape than the configuration says.
    """
    dtype, known = made.dtype, made.state_dict(keep_vars=True)
    for name in model.tensors:
        if wanted(name) and not name.endswith(_COMPUTED):
            _put(made, name, model.tensors[name], dtype)
    for name in model.matrices:
        if matrices and wanted(f"{name}.weight"):
            parameter, turned = _matrix_place(made, name, known)
            weight = model.matrices[name].dequantize()
            _put(made, parameter, weight.T if turned else weight, dtype)
    if model.embedding is None or wanted(f"{model.embedding}.weight"):
        made.tie_weights()
    for path, module in made.named_modules():
        for name, value in module.named_parameters(recurse=False):
            here = wanted(f"{path}.{name}") and (matrices or not isinstance(module, nn.Linear | nn.Embedding))
            if value.is_meta and here:
                zeros = torch.zeros(value.shape, dtype=dtype)
                setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    for value in made.parameters():
        value.requires_grad_(False)


def _matrix_place(made: Any, name: str, known: Mapping[str, Tensor]) -> tuple[str, bool]:
    """The parameter of a matrix, and whether it is kept as (out, in)."""
    if f"{name}.weight" in known:
        module = made.get_submodule(name)
        return f"{name}.weight", type(module).__name__ != "Conv1D"
    raise InputError(f"The model has no weight {name}.weight to replace.")


def _put(made: Any, name: str, values: Tensor, dtype: torch.dtype) -> None:
    path, _, last = name.rpartition(".")
    module = made.get_submodule(path)
    old = getattr(module, last)
    if tuple(old.shape) != tuple(values.shape):
        raise InputError(f"{name} has the shape {tuple(old.shape)} in the model, not {tuple(values.shape)}.")
    values = values.to(dtype) if values.is_floating_point() else values
    if isinstance(old, nn.Parameter):
        setattr(module, last, nn.Parameter(values.contiguous(), requires_grad=False))
    else:
        module.register_buffer(last, values)
