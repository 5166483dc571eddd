"""What a recipe means for one model: storage, grids, device, candidates, bytes; and what contradicts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.storage import PaperStorage, Storage
from compot_deploy.errors import RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.gguf.storage import ProductStorage
from compot_deploy.models.checkpoint import Checkpoint, checkpoint_shape
from compot_deploy.numerics.spectrum import singular_spectrum
from compot_deploy.planning.candidates import Search
from compot_deploy.planning.schemes import GridChoice, Plain
from compot_deploy.planning.sizing import MatrixSize, Precision, Sparsity
from compot_deploy.planning.spectral import ALLOCATIONS, Allocation
from compot_deploy.quant import require_bitsandbytes
from compot_deploy.recipe import DEFAULT_GROUP, Recipe, override


def check_groups(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Refuse a group size, asked for by name, that does not divide the inputs of some linear.

    The default group may leave a shorter last group, which formats pad; a size that somebody chose may not.

    Raises:
        RecipeError: names the linear and a size that works.
    """
    group = recipe.dictionary_group
    if group is None and recipe.dictionary_grid is not None and recipe.dictionary_grid.table:
        group = (
            recipe.dictionary_grid.group
        )  # bitsandbytes' blocks must not cross from one output to the next
    if group is None or recipe.quant == "none":
        return
    for name in checkpoint.architecture.linear_names(checkpoint.layers):
        inputs, _ = shape_of(checkpoint, name)
        if inputs % group:
            fitting = [size for size in (16, 32, 64, 128, 256) if inputs % size == 0]
            hint = f"Use {' or '.join(map(str, fitting))}." if fitting else "Leave --dictionary-group out."
            raise RecipeError(f"{name}: {inputs} inputs do not split into groups of {group}. {hint}")


def check_quantizer(recipe: Recipe) -> None:
    """Refuse a quantizer whose package is missing, before any work is done.

    Raises:
        MissingDependencyError: names the extra.
    """
    if recipe.quantizer == "bnb":
        require_bitsandbytes()


def rival_of(recipe: Recipe) -> Recipe | None:
    """The recipe of what bitsandbytes is compared with: GPTQ on integers of the same bits and groups."""
    if recipe.quantizer != "bnb":
        return None
    return override(recipe, quantizer="gptq", quant="int8" if recipe.quant == "int8" else "int4")


def check_format(recipe: Recipe, checkpoint: Checkpoint, kind: str) -> None:
    """Refuse a format that does not exist, or that cannot hold what the recipe asks for.

    Raises:
        RecipeError, UnsupportedModelError: before any work.
    """
    if kind not in EXPORTERS:
        raise RecipeError(f"--format {kind}: choose one of {', '.join(EXPORTERS)}.")
    grids = {
        "dictionary": recipe.dictionary_grid,
        "codes": recipe.code_grid,
        "embedding": table_grid(recipe.embeddings),
        "head": table_grid(recipe.head),
    }
    exporter = EXPORTERS[kind]
    exporter.check(checkpoint.architecture, checkpoint.config, grids, exporter.options(asdict(recipe)))
    _check_budget(recipe, checkpoint)


def _check_budget(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Refuse a budget that a dense GGUF file cannot keep: it holds products, whatever the factors take."""
    if not recipe.planned:
        return
    storage = storage_of(recipe)
    if not multiplies_out(storage):
        return
    if recipe.gguf_type != "auto":
        raise RecipeError(
            f"--gguf-type {recipe.gguf_type} decides the bytes of every linear, so --bits and --size have "
            "nothing to choose: leave one of them out."
        )
    if recipe.size_bytes is not None:
        return  # what a size leaves for the linears is known when the rest of the output has been rehearsed
    budget = budget_of(recipe, checkpoint, storage, 0)
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    least = sum(storage.leaf_bytes(*shape_of(checkpoint, name), Grid(4, DEFAULT_GROUP)) for name in names)
    if budget < least:
        raise RecipeError(
            f"{budget} bytes are too few for the linears of a dense GGUF file, in which factors are multiplied "
            f"out: {least} is the least (Q4_0). Use --gguf-layout sparse, or allow more."
        )


def storage_of(recipe: Recipe) -> Storage:
    """What a byte is: the paper's accounting without quantization, the first format's with it."""
    if recipe.quant == "none":
        return PaperStorage()
    exporter = EXPORTERS[recipe.format[0]]
    return exporter.storage(exporter.options(asdict(recipe)))


def table_grid(precision: str) -> Grid | None:
    """Grid of a token embedding or head; None for floating point."""
    return None if precision == "none" else Grid(int(precision.removeprefix("int")), DEFAULT_GROUP)


def device_of(recipe: Recipe) -> str:
    """The device to compute on.

    Raises:
        RecipeError: one that torch does not have here.
    """
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=recipe.device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"--device {recipe.device}: torch cannot use it ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from None
    return recipe.device


_GROUPS: Final = {
    2: (16, 32, 64, 128, 256),
    3: (16, 32, 64, 128, 256),
    4: (16, 32, 64, 128),
    8: (16, 32, 64, 128),
}
"""Groups that are tried, by bits. Scales of groups of 128 are 6 % of the bytes at 2 bits, half of that at 4."""


_MEASURE_ALL: Final = 30_000_000
"""Weights of all linears up to which every form is measured: it takes 20 minutes on one core of a CPU at most, and
a plan of few matrices needs all sizes to fill its budget with."""

_TOLERANCE: Final = 0.03
"""Of larger models: a form is measured if it promises to lie 3 % below what was measured before. See LOG.md."""


def search_of(recipe: Recipe, checkpoint: Checkpoint) -> Search:
    """Which forms are listed, and by how much one must promise to be better to be measured."""
    return replace(_listed(recipe, checkpoint), tolerance=_tolerance(recipe, checkpoint))


def _tolerance(recipe: Recipe, checkpoint: Checkpoint) -> float:
    if recipe.search != "auto":
        return _TOLERANCE if recipe.search == "coarse" else 0.0
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    return _TOLERANCE if sum(math.prod(shape_of(checkpoint, name)) for name in names) > _MEASURE_ALL else 0.0


def _listed(recipe: Recipe, checkpoint: Checkpoint) -> Search:
    """Which forms are listed: every grid that the format takes, or floating point without quantization.

    Forms with sparse codes are tried only where the format stores them in fewer bytes than dense ones: those
    of --code-pattern, and the strongest of a whole column.
    """
    if recipe.quant == "none":
        shares = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
        return Search(
            GridChoice({}), unquantized=True, floating=shares, floating_per_kept=recipe.atoms_per_nonzero
        )
    exporter = EXPORTERS[recipe.format[0]]
    options = exporter.options(asdict(recipe))
    storage = storage_of(recipe)
    if multiplies_out(storage):
        # Factors are multiplied out: they would cost what the product costs, and finer grids as much as Q4_0.
        return Search(
            GridChoice(dict.fromkeys((4, 8), (DEFAULT_GROUP,))), rates=(), sparse=(), unquantized=True
        )

    def takes(grid: Grid) -> bool:
        try:
            exporter.check(checkpoint.architecture, checkpoint.config, {"dictionary": grid}, options)
        except RecipeError:
            return False
        return stores(storage, grid)  # some formats refuse the grid only here

    groups = {
        bits: tuple(group for group in sizes if takes(Grid(bits, group))) for bits, sizes in _GROUPS.items()
    }
    grids = GridChoice({bits: found for bits, found in groups.items() if found}, step=16)

    def packs(pattern: Pattern) -> bool:
        four = [grid for grid in grids.grids if grid.bits == 4]
        return any(
            storage.leaf_bytes(64, 64, grid, pattern) < storage.leaf_bytes(64, 64, grid) for grid in four
        )

    fixed = recipe.fixed_pattern
    return Search(
        grids,
        head=16,
        unstructured=packs(Pattern(32, 64)),
        patterns=(fixed,) if fixed is not None and packs(fixed) else (),
        unquantized=True,
    )


def stores(storage: Storage, grid: Grid) -> bool:
    """Whether a format has room for the integers of a grid, its groups included."""
    try:
        storage.leaf_bytes(256, 1, grid)
    except RecipeError:
        return False
    return True


def multiplies_out(storage: Storage) -> bool:
    """Whether a format stores the product of dictionary and codes, rounded, instead of both."""
    return isinstance(storage, ProductStorage)


def budget_of(recipe: Recipe, checkpoint: Checkpoint, storage: Storage, other: int) -> int:
    """Bytes for the linears, from --bits, --ratio or --size; the last a first guess, see `footprint.fit_size`.

    Raises:
        RecipeError: a size that the rest of the output uses up.
    """
    shapes = [shape_of(checkpoint, name) for name in checkpoint.architecture.linear_names(checkpoint.layers)]
    if recipe.bits is not None:
        return int(recipe.bits * sum(math.prod(shape) for shape in shapes) / 8)
    size = recipe.size_bytes
    if size is not None:
        if size <= other:
            raise RecipeError(
                f"--size {recipe.size}: embeddings, norms, tokenizer and graph alone need about {other} bytes. "
                "Allow more, or store the embedding in fewer bits."
            )
        return size - other
    plain = Plain(recipe.dictionary_grid)
    return math.floor((1 - recipe.ratio) * sum(plain.bytes(*shape, storage) for shape in shapes))


def size_of(recipe: Recipe, name: str, weight: Float[Tensor, "inputs outputs"]) -> MatrixSize:
    """What a rule that counts atoms wants to know of a matrix; its singular values only where it looks at them."""
    spectrum = singular_spectrum(weight) if recipe.allocator != "uniform" else ()
    return MatrixSize(name, weight.shape[0], weight.shape[1], spectrum)


def spread(recipe: Recipe, sizes: Sequence[MatrixSize], storage: Storage) -> Allocation:
    """The ratio of a recipe, spread over matrices by its rule that counts atoms.

    Raises:
        RecipeError: a ratio that cannot be met, saying which can.
    """
    return ALLOCATIONS[recipe.allocator](
        sizes,
        ratio=recipe.ratio,
        storage=storage,
        precision=Precision(recipe.dictionary_grid, recipe.dictionary_grid, recipe.code_grid),
        sparsity=Sparsity(
            1.0 if recipe.method == "svd-llm" else recipe.atoms_per_nonzero, recipe.fixed_pattern
        ),
    )


def shape_of(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Shape of a linear, (in, out), without reading its values."""
    outputs, inputs = checkpoint_shape(checkpoint, f"{name}.weight")
    return inputs, outputs
