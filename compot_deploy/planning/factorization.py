"""Any transformers model of linears, compressed in memory: encoders, GPT-2, whatever has nn.Linear or Conv1D.

No architecture table is needed. A first batch shows which linears read the same tensor; those share a Gram.
Every linear is then compressed with the settings of a `Recipe`, as the pipeline does for decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.packed import PackedStorage
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import InputError, RecipeError, UnsupportedModelError
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.planning.compress import LinearFacts, compress_linear
from compot_deploy.planning.settings import check_quantizer, size_of, spread
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import recipe_from_mapping
from compot_deploy.transformers_plugin.folder import AUTO_CLASSES, door_name
from compot_deploy.transformers_plugin.layout import Entry, entry_of, to_json
from compot_deploy.transformers_plugin.modeling import compressed_class, linears_of, weight_of
from compot_deploy.transformers_plugin.modules import CompotLinear


@dataclass(frozen=True)
class Factorization:
    """A compressed model and how it came about.

    Attributes:
        model: the model that was given, changed in place; ``save_pretrained`` writes the packed factors.
        facts: one per linear, in the order of the model.
        bytes: of the linears, packed.
        plain_bytes: of the same linears, plain at the same precision.
        shared: linears that read one input, by the name of the first.
    """

    model: Any
    facts: tuple[LinearFacts, ...]
    bytes: int
    plain_bytes: int
    shared: Mapping[str, tuple[str, ...]]


def factorize(
    model: Any,
    calibration: Iterable[Mapping[str, Tensor]],
    *,
    skip: Sequence[str] = (),
    progress: Progress = silent,
    **knobs: Any,
) -> Factorization:
    """Factorise and quantize every linear of a model, in place.

    Args:
        model: of transformers, in memory; its Auto class must be one of
            `compot_deploy.transformers_plugin.folder.AUTO_CLASSES`, so that it loads again.
        calibration: batches as the model's forward takes them, ``input_ids`` and ``attention_mask`` for
            example; rows that the mask excludes are left out of the statistics.
        skip: module paths that stay as they are. Output heads that are tied to an embedding always do.
        progress: told how far the work is.
        **knobs: of `compot_deploy.recipe.Recipe`: ``quant``, ``ratio``, ``method``, ``quantizer`` and so on.

    Raises:
        UnsupportedModelError: a model without linears, or one that no Auto class loads.
        InputError: no batches, or one in which a linear never ran.
        RecipeError: a knob out of range, or a ratio that cannot be met.
    """
    recipe = recipe_from_mapping(knobs, origin="factorize()").counting_atoms()
    if recipe.method == "plain":
        raise RecipeError("factorize() with --method plain would factorise nothing: use compot or svd-llm.")
    if recipe.planned:
        raise RecipeError(
            "factorize() takes a --ratio: budgets by --bits or --size are planned for decoders only."
        )
    check_quantizer(recipe)
    base, door = type(model), _door(model)
    linears = {name: module for name, module in _linears(model).items() if name not in skip}
    if not linears:
        raise UnsupportedModelError(f"{base.__name__} has no linears to factorise.")
    grams, shared = grams_by_input(model, linears, calibration)
    storage = PackedStorage()
    sizes = [size_of(recipe, name, weight_of(module).float()) for name, module in linears.items()]
    choices = spread(recipe, sizes, storage).choices
    matrices: dict[str, Matrix] = {}
    facts: list[LinearFacts] = []
    whitenings: dict[str, Whitening] = {}
    for number, (name, module) in enumerate(linears.items()):
        progress(number, len(linears), "Factorise, quantize")
        first = next(key for key, names in shared.items() if name in names)
        if first not in whitenings:
            whitenings = {first: whiten(grams[first])}
        result = compress_linear(
            weight_of(module).float().contiguous(), whitenings[first], choices[name], recipe
        )
        matrices[name] = result.matrix
        facts.append(result.facts)
    progress(len(linears), len(linears), "Factorise, quantize")
    _install(model, base, door, matrices)
    grid = recipe.dictionary_grid
    plain = sum(storage.leaf_bytes(*matrix.shape, grid) for matrix in matrices.values())
    return Factorization(model, tuple(facts), sum(matrix_bytes(matrices, storage).values()), plain, shared)


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


def _linears(model: Any) -> dict[str, nn.Module]:
    """Linears but for a head that is the embedding."""
    table = model.get_input_embeddings()
    tied = getattr(table, "weight", None)
    return {name: module for name, module in linears_of(model).items() if module.weight is not tied}


def grams_by_input(
    model: Any, linears: Mapping[str, nn.Module], calibration: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Grams by the first linear of each input, and the linears that share it by the same name.

    Raises:
        InputError: no batches, or linears that do not run on them.
    """
    seen: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    shared: dict[str, tuple[str, ...]] = {}
    mask: list[Tensor | None] = [None]

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]  # kept alive, so that no other tensor can take its place in memory

        return hook

    def collect(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows, real = inputs[0].detach(), mask[0]
            if real is not None and rows.shape[: real.dim()] == real.shape:
                rows = rows[real.bool()]
            rows = rows.reshape(-1, rows.shape[-1]).double()
            product = rows.T @ rows
            sums[name] = sums[name] + product if name in sums else product

        return hook

    model.eval()
    with ExitStack() as hooks, torch.no_grad():
        for number, batch in enumerate(calibration):
            mask[0] = batch.get("attention_mask")
            if number == 0:
                with ExitStack() as first:
                    for name, module in linears.items():
                        first.callback(module.register_forward_pre_hook(remember(name)).remove)
                    model(**batch)
                shared = _same_inputs(seen)
                seen.clear()
                for name in shared:
                    hooks.callback(linears[name].register_forward_pre_hook(collect(name)).remove)
            model(**batch)
    if not shared:
        raise InputError("There are no calibration batches: give at least one.")
    idle = sorted(set(linears) - {name for names in shared.values() for name in names})
    if idle:
        raise InputError(
            f"{idle[0]} and {len(idle) - 1} more linears did not run on the calibration batches, so nothing is "
            f"known of their inputs: name them in skip."
        )
    return sums, shared


def _same_inputs(seen: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Linears by the tensor that they read: same memory, same shape."""
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in seen.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def _install(model: Any, base: type, door: str, matrices: Mapping[str, Matrix]) -> None:
    """Put the matrices into the model, and make it one that saves them."""
    owners: dict[str, str] = {}
    entries: list[Entry] = []
    for name, matrix in matrices.items():
        if isinstance(matrix, Dense):
            continue
        module = model.get_submodule(name)
        made = CompotLinear.of(matrix)
        made.bias = module.bias
        made.to(module.weight.device)
        model.set_submodule(name, made)
        entries.append(entry_of(name, matrix, owners))
    model.__class__ = compressed_class(base, door)
    model._compot_entries = tuple(entries)
    model.config.compot = to_json(entries, base.__name__)
