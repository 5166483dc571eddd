"""What a recipe means for one model, resolved once: storage, search, device, bytes; and what contradicts it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final

import torch

from compot_deploy.accuracy.runners import OBJECTIONS
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.storage import InMemory, PaperStorage, Storage
from compot_deploy.errors import RecipeError, UnsupportedModelError
from compot_deploy.exporters import EXPORTERS, Exporter
from compot_deploy.models.source import ModelSource
from compot_deploy.planning.candidates import Search
from compot_deploy.planning.knapsack import Plan
from compot_deploy.planning.schemes import GridChoice, Plain
from compot_deploy.quant.bnb import require_bitsandbytes
from compot_deploy.recipe import DEFAULT_GROUP, Recipe, override

_GROUPS: Final = {
    2: (16, 32, 64, 128, 256),
    3: (16, 32, 64, 128, 256),
    4: (16, 32, 64, 128),
    8: (16, 32, 64, 128),
}
"""Groups that are tried, by bits. Scales of groups of 128 are 6 % of the bytes at 2 bits, half of that at 4."""

_TABLE_GROUPS: Final = (32, 64, 128)
"""Groups of token embeddings and output heads that are tried."""

_TABLE_GRID: Final = Grid(8, DEFAULT_GROUP)
"""Of tables that nothing is known of: hardly measurable in any model so far."""

_MEASURE_ALL: Final = 1_000_000
"""Weights of all linears up to which every scheme is measured: a plan of small matrices needs all sizes to fill its
budget with, and a sample of their outputs would be all of them."""

_TOLERANCE: Final = 0.03
"""Of a coarse search: a scheme is measured if it is predicted to lie 3 % below what was measured before. See LOG.md."""

_FINER_RATES: Final = (0.7, 1.0, 1.3, 1.6, 1.9, 2.3, 2.7, 3.1, 3.5)
"""Bits per weight of factorized schemes where every matrix is to be factorized, whatever plain grids could do."""


@dataclass(frozen=True)
class Settings:
    """A recipe and the model that it is for.

    Attributes:
        recipe: checked.
        source: the original.
        exporter: of the first format, whose bytes decide the plan.
        storage: what a byte is to a plan: of the file, or of the loaded graph.
        device: where to compute.
    """

    recipe: Recipe
    source: ModelSource
    exporter: Exporter
    storage: Storage
    device: str

    @cached_property
    def search(self) -> Search:
        """Which schemes are listed, and how large the predicted gain of one must be for it to be measured."""
        listed, large = _listed(self), self.weights > _MEASURE_ALL
        asked = self.recipe.search
        predicted = asked == "predicted" or (asked == "auto" and large)
        coarse = asked == "coarse" or (predicted and not listed.grids.groups)  # there are no grids to sample
        return replace(
            listed,
            predicted=predicted and not coarse,
            tolerance=_TOLERANCE if coarse else 0.0,
            method=self.recipe.method,
            plain=self.plain,
        )

    @property
    def plain(self) -> Plain:
        """The scheme that a matrix is compared with: plain at the precision that was asked for."""
        return Plain(self.recipe.dictionary_grid)

    @property
    def plain_bytes(self) -> int:
        """Bytes of all matrices in that scheme."""
        return sum(self.plain.bytes(*site.shape, self.storage) for site in self.source.layout.sites)

    @property
    def weights(self) -> int:
        """Weights of all matrices."""
        return sum(math.prod(site.shape) for site in self.source.layout.sites)

    @property
    def multiplies_out(self) -> bool:
        """Whether the first format stores the product of dictionary and codes, rounded, instead of both."""
        return self.recipe.quant != "none" and self.exporter.multiplies_out(
            options_of(self.recipe, self.exporter)
        )

    @property
    def precisions(self) -> dict[str, str]:
        """What was asked for the token embedding and, where it is a matrix of its own, for the output head."""
        layout, recipe = self.source.layout, self.recipe
        found: dict[str, str] = {}
        if layout.embedding is not None:
            found[layout.embedding] = recipe.embeddings
        if layout.head is not None and not layout.tied:
            found[layout.head] = recipe.head
        return found

    def tables(self, plan: Plan) -> dict[str, Grid | None]:
        """Grids of the tables: those that a plan chose, the others as they were asked for."""
        found = {name: table_grid(precision) for name, precision in self.precisions.items()}
        for entry in plan.tables:
            assert isinstance(entry.candidate.scheme, Plain)
            found[entry.names[0]] = entry.candidate.scheme.grid
        return found

    @cached_property
    def table_grids(self) -> dict[str, tuple[Grid, ...]]:
        """Grids that a plan chooses from, of every table that is to be quantized; those that all formats hold."""
        if not self.recipe.planned:
            return {}
        found = {}
        for name, precision in self.precisions.items():
            grid = table_grid(precision)
            if grid is not None:
                found[name] = self._grids_of(name) if precision == "auto" else (grid,)
        return found

    def _grids_of(self, name: str) -> tuple[Grid, ...]:
        if self.multiplies_out:
            return tuple(Grid(bits, DEFAULT_GROUP) for bits in (4, 8))  # finer ones cost as much as Q4_0
        layout = self.source.layout
        roles = ["embedding"] if name == layout.embedding else []
        roles += ["head"] if name == layout.head or layout.tied else []

        def takes(grid: Grid) -> bool:
            try:
                for kind in self.recipe.format:
                    exporter = EXPORTERS[kind]
                    grids = dict.fromkeys(roles, grid)
                    exporter.check(self.source, grids, options_of(self.recipe, exporter))
            except RecipeError:
                return False
            return stores(self.storage, grid)

        tried = [Grid(bits, group) for bits, groups in _GROUPS.items() for group in groups]
        found = tuple(grid for grid in tried if grid.group in _TABLE_GROUPS and takes(grid))
        return found or (_TABLE_GRID,)

    @property
    def baseline(self) -> Recipe | None:
        """The recipe of what bitsandbytes is compared with: GPTQ on integers of the same bits and groups."""
        if self.recipe.quantizer != "bnb":
            return None
        return override(
            self.recipe, quantizer="gptq", quant="int8" if self.recipe.quant == "int8" else "int4"
        )

    def budget(self, other: int) -> int:
        """Bytes for the matrices, from --bits, --ratio or --size.

        Args:
            other: bytes of everything else that --size counts.

        Raises:
            RecipeError: a size that the rest of the model uses up.
        """
        recipe = self.recipe
        if recipe.bits is not None:
            return int(recipe.bits * self.weights / 8)
        size = recipe.size_bytes
        if size is None:
            return math.floor((1 - recipe.ratio) * self.plain_bytes)
        if size <= other:
            raise RecipeError(
                f"--size {recipe.size}: embeddings, norms, tokenizer and graph alone need {other} bytes. "
                "Allow more, or store the embedding in fewer bits."
            )
        return size - other


def resolve(recipe: Recipe, source: ModelSource) -> Settings:
    """Everything that a recipe means for a model; refuses what cannot be done, before any work.

    Raises:
        RecipeError: a format that does not exist or cannot hold what is asked for; a group that does not fit; a
            budget that a format cannot keep.
        UnsupportedModelError: a format that has no way for the model.
        MissingDependencyError: a quantizer whose package is not installed.
    """
    if recipe.quantizer == "bnb":
        require_bitsandbytes()
    if recipe.calibration == "self" and not source.task.generates:
        raise RecipeError(
            f"--calibration self: a {source.task.noun} writes no text that it could be calibrated on; give a file."
        )
    if recipe.calibration is None and source.task.listens:
        raise RecipeError(
            f"A {source.task.noun} is calibrated on speech, and noise is none: give --calibration FOLDER, a folder "
            "of WAV files."
        )
    for kind in recipe.format:
        _check_format(recipe, source, kind)
    _check_groups(recipe, source)
    exporter = EXPORTERS[recipe.format[0]]
    storage: Storage = PaperStorage()
    if recipe.quant != "none":
        storage = exporter.storage(options_of(recipe, exporter))
    planned: Storage = InMemory(storage) if recipe.budget == "memory" else storage
    settings = Settings(recipe, source, exporter, planned, device_of(recipe))
    if recipe.cluster is not None and settings.device != "cpu":
        raise RecipeError(
            f"--cluster {recipe.cluster} computes on processors, and the device here is {settings.device}: add "
            "--device cpu, or leave --cluster out."
        )
    _check_budget(settings)
    return settings


def options_of(recipe: Recipe, exporter: Exporter, **more: Any) -> Any:
    """What a recipe says to an exporter."""
    return exporter.options(asdict(recipe) | more)


def table_grid(precision: str) -> Grid | None:
    """Grid of a token embedding or head; None for floating point, and where a plan chooses, what it falls back on."""
    if precision == "auto":
        return _TABLE_GRID
    return None if precision == "none" else Grid(int(precision.removeprefix("int")), DEFAULT_GROUP)


def device_of(recipe: Recipe) -> str:
    """The device to compute on.

    Raises:
        RecipeError: one that torch does not have here.
    """
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.device.partition(":")[0] == "meta":
        raise RecipeError(f"--device {recipe.device}: nothing is computed there. Use auto or cpu.")
    try:
        torch.empty(0, device=recipe.device)
    except Exception as error:  # of many kinds: RuntimeError, AssertionError, OverflowError
        raise RecipeError(
            f"--device {recipe.device}: torch cannot use it ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from None
    return recipe.device


def stores(storage: Storage, grid: Grid) -> bool:
    """Whether a format has room for the integers of a grid, its groups included."""
    try:
        storage.leaf_bytes(256, 1, grid)
    except RecipeError:
        return False
    return True


def _check_format(recipe: Recipe, source: ModelSource, kind: str) -> None:
    if kind not in EXPORTERS:
        raise RecipeError(f"--format {kind}: choose one of {', '.join(EXPORTERS)}.")
    exporter = EXPORTERS[kind]
    reason = exporter.supports(source)
    if reason is not None:
        able = [other for other in EXPORTERS if EXPORTERS[other].supports(source) is None]
        hint = f" Use --format {' or '.join(able)}." if able else ""
        raise UnsupportedModelError(f"--format {kind}: {reason}{hint}")
    grids = {
        "dictionary": recipe.dictionary_grid,
        "codes": recipe.code_grid,
        "embedding": table_grid(recipe.embeddings),
        "head": table_grid(recipe.head),
    }
    exporter.check(source, grids, options_of(recipe, exporter))
    promised, wanted = exporter.context(source.config), min(recipe.length, source.context)
    if promised is not None and promised < wanted:
        raise RecipeError(
            f"--format {kind}: the file can be asked for {promised} positions, and windows of text have {wanted}: give "
            f"--length {promised}."
        )
    asked = OBJECTIONS.get(kind)
    reason = None if asked is None else asked(source)
    if reason is not None:
        raise UnsupportedModelError(f"--format {kind}: {reason}")


def _check_groups(recipe: Recipe, source: ModelSource) -> None:
    """Refuse a group size, asked for by name, that does not divide the inputs of some matrix.

    The default group may leave a shorter last group, which formats pad; a size that somebody chose may not.
    """
    group = recipe.dictionary_group
    if group is None and recipe.dictionary_grid is not None and recipe.dictionary_grid.table:
        group = (
            recipe.dictionary_grid.group
        )  # bitsandbytes' blocks must not cross from one output to the next
    if group is None or recipe.quant == "none":
        return
    for site in source.layout.sites:
        if site.inputs % group:
            fitting = [size for size in (16, 32, 64, 128, 256) if site.inputs % size == 0]
            hint = f"Use {' or '.join(map(str, fitting))}." if fitting else "Leave --dictionary-group out."
            raise RecipeError(
                f"{site.name}: {site.inputs} inputs do not split into groups of {group}. {hint}"
            )


def _check_budget(settings: Settings) -> None:
    """Refuse a budget that a dense GGUF file cannot keep: it holds products, whatever the factors take."""
    recipe = settings.recipe
    if not recipe.planned or not settings.multiplies_out:
        return
    if recipe.gguf_type != "auto":
        raise RecipeError(
            f"--gguf-type {recipe.gguf_type} decides the bytes of every linear, so --bits and --size have "
            "nothing to choose: leave one of them out."
        )
    if recipe.size_bytes is not None:
        return  # what a size leaves for the matrices is known when the rest of the model has been counted
    budget = settings.budget(0)
    grid = Grid(4, DEFAULT_GROUP)
    least = sum(settings.storage.leaf_bytes(*site.shape, grid) for site in settings.source.layout.sites)
    if budget < least:
        raise RecipeError(
            f"{budget} bytes are too few for the linears of a dense GGUF file, in which factors are multiplied "
            f"out: {least} is the least (Q4_0). Use --gguf-layout sparse, or allow more."
        )


def _listed(settings: Settings) -> Search:
    """Which schemes are listed: every grid that the format takes, or floating point without quantization.

    Schemes with sparse codes are tried only where the format stores them in fewer bytes than dense ones: those
    of --code-pattern, and the strongest of a whole column.
    """
    recipe, exporter, storage = settings.recipe, settings.exporter, settings.storage
    if recipe.quant == "none":
        shares = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
        per_kept = 1.0 if recipe.method == "svd-llm" else recipe.atoms_per_nonzero
        return Search(GridChoice({}), unquantized=True, floating=shares, floating_per_kept=per_kept)
    if settings.multiplies_out:
        # Factors are multiplied out: they would cost what the product costs, and finer grids as much as Q4_0.
        return Search(
            GridChoice(dict.fromkeys((4, 8), (DEFAULT_GROUP,))), rates=(), sparse=(), unquantized=True
        )
    options = options_of(recipe, exporter)

    def takes(grid: Grid) -> bool:
        try:
            exporter.check(settings.source, {"dictionary": grid}, options)
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
    search = Search(
        grids,
        head=16,
        unstructured=packs(Pattern(32, 64)),
        patterns=(fixed,) if fixed is not None and packs(fixed) else (),
        unquantized=True,
    )
    return replace(search, rates=_FINER_RATES) if recipe.method in ("compot", "svd-llm") else search
