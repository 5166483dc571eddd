"""Plans that need no measurement: every matrix on one grid, or atoms of one scheme allocated by size or spectrum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.core.storage import Storage
from compot_deploy.errors import RecipeError
from compot_deploy.numerics.spectrum import singular_spectrum
from compot_deploy.planning.knapsack import Chosen, Plan
from compot_deploy.planning.rate_points import Candidate
from compot_deploy.planning.schemes import Plain, Separate
from compot_deploy.planning.settings import Settings, stores
from compot_deploy.planning.sizing import Choice, MatrixSize, Precision, Sparsity
from compot_deploy.planning.spectral import ALLOCATIONS, Allocation
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import DEFAULT_GROUP, Recipe, override


def plan_by_rule(settings: Settings, progress: Progress = silent, workers: Workers = ALONE) -> Plan:
    """The plan of a recipe that is not planned by measured schemes.

    Where groups of 32 atoms are too coarse for the ratio and no group was asked for, groups of 16 are tried,
    and that is noted.

    Raises:
        RecipeError: a ratio that cannot be met, saying which can.
    """
    recipe, source, storage = settings.recipe, settings.source, settings.storage
    if recipe.method == "plain":
        chosen = tuple(
            _plain(site.name, settings.plain.bytes(*site.shape, storage), recipe)
            for site in source.layout.sites
        )
        spent = sum(entry.candidate.bytes for entry in chosen)
        return Plan(chosen, spent, math.nan, ("nothing was factorized: --method plain",))
    sites = source.layout.sites
    spectra: Iterable[tuple[float, ...]] = ((),) * len(sites)
    if recipe.allocator != "uniform":
        weights = (source.weight(site.name).to(torch.float32, copy=True) for site in sites)
        progress(0, len(sites), "Read spectra")
        spectra = workers.map(spectrum_of, None, weights)
    sizes = []
    for number, (site, spectrum) in enumerate(zip(sites, spectra, strict=True), 1):
        if recipe.allocator != "uniform":
            progress(number, len(sites), "Read spectra")
        sizes.append(MatrixSize(site.name, *site.shape, spectrum))
    try:
        return plan_of(allocate(recipe, sizes, storage), recipe, settings)
    except RecipeError:
        finer = DEFAULT_GROUP // 2
        grid = recipe.code_grid
        if recipe.code_group is not None or grid is None or grid.table:
            raise
        if not stores(storage, replace(grid, group=finer)):
            raise
        recipe = override(recipe, code_group=finer)
        note = f"groups of {DEFAULT_GROUP} atoms are too coarse for this ratio: codes use groups of {finer}"
        plan = plan_of(allocate(recipe, sizes, storage), recipe, settings)
        return replace(plan, notes=(note, *plan.notes))


def spectrum_of(_: None, weight: Float[Tensor, "inputs outputs"]) -> tuple[float, ...]:
    """Singular values of one matrix."""
    return singular_spectrum(weight)


def allocate(recipe: Recipe, sizes: Iterable[MatrixSize], storage: Storage) -> Allocation:
    """The ratio of a recipe, allocated to matrices by its rule that counts atoms.

    Raises:
        RecipeError: a ratio that cannot be met, saying which can.
    """
    return ALLOCATIONS[recipe.allocator](
        list(sizes),
        ratio=recipe.ratio,
        storage=storage,
        precision=Precision(recipe.dictionary_grid, recipe.dictionary_grid, recipe.code_grid),
        sparsity=Sparsity(
            1.0 if recipe.factorizer == "svd-llm" else recipe.atoms_per_nonzero, recipe.fixed_pattern
        ),
    )


def plan_of(allocation: Allocation, recipe: Recipe, settings: Settings) -> Plan:
    """An allocation of atoms as a plan."""
    chosen = tuple(chosen_of(choice, recipe) for choice in allocation.choices.values())
    return Plan(chosen, allocation.budget, math.nan, why_by_rule(settings))


def chosen_of(choice: Choice, recipe: Recipe) -> Chosen:
    """What one matrix gets."""
    if not choice.factorized:
        return _plain(choice.name, choice.bytes, recipe, choice.reason)
    scheme = Separate(
        method=recipe.factorizer,
        atoms=choice.atoms,
        pattern=choice.pattern,
        dictionary=recipe.dictionary_grid,
        codes=recipe.code_grid,
        rounds=recipe.rounds,
        paper_exact=recipe.paper_exact,
    )
    return Chosen((choice.name,), Candidate(scheme, choice.bytes, ()))


def _plain(name: str, size: int, recipe: Recipe, reason: str = "") -> Chosen:
    return Chosen((name,), Candidate(Plain(recipe.dictionary_grid), size, ()), reason)


def why_by_rule(settings: Settings) -> tuple[str, ...]:
    """Where the spectral rule was nobody's explicit choice: what ruled a plan out, or what would be smaller."""
    recipe = settings.recipe
    if recipe.allocation != "auto":
        return ()
    if settings.multiplies_out:
        return (
            "a dense GGUF file stores the products of factors, which are no smaller for it: --gguf-layout sparse "
            "stores the factors, and --method plain with --gguf-type Q4_K or IQ3_XXS is small in every llama.cpp",
        )
    if recipe.quant == "none" or recipe.quantizer == "bnb":
        return ()
    return (
        f"{recipe.why_one_scheme} settles the scheme of every factorized matrix, so the ratio was allocated "
        "by singular values, as with --allocation spectral; without it, each matrix gets the scheme that costs the "
        "model least for its bytes, plain integers among them",
    )
