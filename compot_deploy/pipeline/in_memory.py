"""Any transformers model of linears, compressed in memory: for programs that hold a model already.

A first batch shows which linears read the same tensor; those share a Gram. Every linear is then compressed by the rule
that counts atoms, as the pipeline does with ``--allocation spectral``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.packed import PackedStorage
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import InputError, RecipeError, UnsupportedModelError
from compot_deploy.models.experts import routers, unstack
from compot_deploy.models.sites import Gram, InputGroup, Products, Site, add_gram, real_rows, tables_of
from compot_deploy.numerics.spectrum import singular_spectrum
from compot_deploy.numerics.whiten import whiten
from compot_deploy.planning.by_rule import allocate, chosen_of
from compot_deploy.planning.candidates import Search, realize
from compot_deploy.planning.records import LinearRecord, linear_record
from compot_deploy.planning.schemes import GridChoice
from compot_deploy.planning.sizing import MatrixSize
from compot_deploy.progress import Progress, silent
from compot_deploy.quant import QUANTIZERS
from compot_deploy.quant.bnb import require_bitsandbytes
from compot_deploy.recipe import recipe_from_mapping
from compot_deploy.transformers_plugin.folder import AUTO_CLASSES, door_name
from compot_deploy.transformers_plugin.layout import Entry, entry_of, to_json
from compot_deploy.transformers_plugin.modeling import compressed_class, linears_of
from compot_deploy.transformers_plugin.modules import CompotLinear


@dataclass(frozen=True)
class Factorization:
    """A compressed model and how it came about.

    Attributes:
        model: the model that was given, changed in place; ``save_pretrained`` writes the packed factors.
        linears: one per linear, in the order of the model.
        bytes: of the linears, packed.
        plain_bytes: of the same linears, plain at the same precision.
        shared: linears that read one input, by the name of the first.
    """

    model: Any
    linears: tuple[LinearRecord, ...]
    bytes: int
    plain_bytes: int
    shared: Mapping[str, tuple[str, ...]]


def factorize(
    model: Any,
    calibration: Iterable[Mapping[str, Tensor]],
    *,
    skip: Sequence[str] = (),
    progress: Progress = silent,
    **options: Any,
) -> Factorization:
    """Factorize and quantize every linear of a model, in place.

    Args:
        model: of transformers, in memory; its Auto class must be one of
            `compot_deploy.transformers_plugin.layout.AUTO_CLASSES`, so that it loads again.
        calibration: batches as the model's forward takes them, ``input_ids`` and ``attention_mask`` for
            example; rows that the mask excludes are left out of the statistics.
        skip: module paths that stay as they are. Output heads that are tied to an embedding always do.
        progress: told how far the work is.
        **options: of `compot_deploy.recipe.Recipe`: ``quant``, ``ratio``, ``method``, ``quantizer`` and so on.

    Raises:
        UnsupportedModelError: a model without linears, or one that no Auto class loads.
        InputError: no batches, or one in which a linear never ran.
        RecipeError: an option out of range, or a ratio that cannot be met.
    """
    recipe = recipe_from_mapping(options, origin="factorize()").counting_atoms()
    if recipe.method == "plain":
        raise RecipeError("factorize() with --method plain would factorize nothing: use compot or svd-llm.")
    if recipe.planned:
        raise RecipeError(
            "factorize() takes a --ratio: budgets by --bits or --size are planned by deploy(), for models in folders."
        )
    if recipe.heal_steps is not None:
        raise RecipeError(
            f"factorize() with heal={recipe.heal} tunes nothing: models in folders are healed by deploy()."
        )
    if recipe.quantizer == "bnb":
        require_bitsandbytes()
    base, door = type(model), _door(model)
    unstack(model)
    grams = collect_grams(model, calibration, skip)
    sites = [site for group in grams for site in group.sites]
    weights = {site.name: _weight(model, site) for site in sites}
    storage, search = PackedStorage(), Search(GridChoice({}))
    sizes = []
    for name, weight in weights.items():
        spectrum = singular_spectrum(weight) if recipe.allocator != "uniform" else ()
        sizes.append(MatrixSize(name, weight.shape[0], weight.shape[1], spectrum))
    choices = allocate(recipe, sizes, storage).choices
    matrices: dict[str, Matrix] = {}
    linears: dict[str, LinearRecord] = {}
    for group, gram in grams.items():
        whitening = whiten(gram.matrix)
        for name in group.names:
            progress(len(linears), len(sites), "Factorize, quantize")
            entry = chosen_of(choices[name], recipe)
            quantizer = QUANTIZERS[recipe.quantizer]
            made = realize(
                entry.candidate.scheme, {name: weights[name]}, whitening, search, quantizer=quantizer
            )
            matrices |= made.matrices
            linears[name] = linear_record(name, entry, made, whitening)
    progress(len(sites), len(sites), "Factorize, quantize")
    order = [name for name, _ in model.named_modules() if name in matrices]
    _install(model, base, door, {name: matrices[name] for name in order})
    grid = recipe.dictionary_grid
    plain = sum(storage.leaf_bytes(*matrix.shape, grid) for matrix in matrices.values())
    shared = {group.names[0]: group.names for group in grams}
    size = sum(matrix_bytes(matrices, storage).values())
    return Factorization(model, tuple(linears[name] for name in order), size, plain, shared)


def collect_grams(
    model: Any, calibration: Iterable[Mapping[str, Tensor]], skip: Sequence[str] = ()
) -> dict[InputGroup, Gram]:
    """Grams of the inputs of all linears of a model that is in memory.

    Raises:
        UnsupportedModelError: there are no linears.
        InputError: no batches, or linears that do not run on them.
    """
    embedding, head, tied = tables_of(model)
    tables = [path for path in (embedding, head if tied else None) if path is not None]
    left_out = [model.get_submodule(path).weight for path in tables]
    skip = (*skip, *routers(model))
    wanted = {name for name in linears_of(model) if name not in skip and not (tied and name == head)}
    if not wanted:
        raise UnsupportedModelError(f"{type(model).__name__} has no linears to factorize.")
    groups: dict[str, InputGroup] = {}
    sums: dict[str, Gram] = {}
    model.eval()
    for number, batch in enumerate(calibration):
        mode = Products(model, "", left_out)
        with mode, torch.no_grad():
            model(**batch)
        mask = batch.get("attention_mask")
        masks = () if mask is None else (mask.bool(),)
        for seen, values in mode.groups(""):
            sites = tuple(site for site in seen.sites if site.name in wanted)
            if sites and number == 0:
                groups[sites[0].name] = InputGroup("", sites)
            if sites and sites[0].name in groups:
                add_gram(sums, sites[0].name, real_rows(values.detach(), *masks))
    if not groups:
        raise InputError("There are no calibration batches: give at least one.")
    idle = sorted(wanted - {name for group in groups.values() for name in group.names})
    if idle:
        raise InputError(
            f"{idle[0]} and {len(idle) - 1} more linears did not run on the calibration batches, so nothing is "
            f"known of their inputs: name them in skip."
        )
    return {group: sums[name] for name, group in groups.items()}


def _weight(model: Any, site: Site) -> Tensor:
    stored = model.get_parameter(site.parameter).detach().float()
    return (stored.T if site.transposed else stored).contiguous()


def _door(model: Any) -> str:
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        found = mapping.get(type(model.config), ())
        if type(model) in (found if isinstance(found, tuple) else (found,)):
            return door_name(name)
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a model that one of {', '.join(AUTO_CLASSES)} loads, so it could not be "
        "loaded again once it is compressed."
    )


def _install(model: Any, base: type, door: str, matrices: Mapping[str, Matrix]) -> None:
    """Put the matrices into the model, and make it one that saves them."""
    owners: dict[str, str] = {}
    entries: list[Entry] = []
    for name, matrix in matrices.items():
        if isinstance(matrix, Dense):
            continue
        module: nn.Module = model.get_submodule(name)
        made = CompotLinear.of(matrix)
        made.bias = module.bias  # type: ignore[assignment]
        made.to(module.weight.device)  # type: ignore[arg-type]
        model.set_submodule(name, made)
        entries.append(entry_of(name, matrix, owners))
    model.__class__ = compressed_class(base, door)
    model._compot_entries = tuple(entries)
    model.config.compot = to_json(entries, base.__name__)
