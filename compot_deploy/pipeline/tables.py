"""The token embedding and the output head in the grids that a plan or the user chose, kept in the work folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compot_deploy.core.matrix import Dense, Quantized
from compot_deploy.core.store import load_matrices, save_matrices
from compot_deploy.core.work_files import is_sound
from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.knapsack import Plan
from compot_deploy.planning.records import LinearRecord
from compot_deploy.planning.settings import Settings
from compot_deploy.planning.table_effects import known_effects
from compot_deploy.planning.tables import FINE, TablePoints, head_gram, round_table, table_error


@dataclass(frozen=True)
class MadeTables:
    """Tables that were made.

    Attributes:
        files: file of each, (hidden, vocabulary).
        records: what happened to those that a plan knows something of.
    """

    files: Mapping[str, Path]
    records: tuple[LinearRecord, ...]


def make_tables(
    settings: Settings, context: PlanningContext, plan: Plan, tables: Sequence[TablePoints]
) -> MadeTables:
    """Make the token embedding and, where it is a matrix of its own, the output head.

    Args:
        settings: resolved.
        context: whose work folder has what is known of the tables.
        plan: that was carried out.
        tables: what it could choose from.
    """
    source, work = context.source, context.work
    known = {one.name: one for one in tables}
    effects = known_effects(work) if known else {}
    files: dict[str, Path] = {}
    records = []
    for name, grid in settings.tables(plan).items():
        how, gram = "", None
        if grid is not None and grid.bits < FINE and context.quantizer == "gptq":
            gram = head_gram(context, name)
            # Without a plan nothing is known of the rows of a table; what a head reads is.
            how = "" if gram is None else "-head"
            if name in known:
                how, gram = ("-fitted", effects[name].gram(gram)) if known[name].gptq else ("", None)
        scheme = "" if grid is None else f"-{grid.bits}-{grid.group}{how}"
        path = files[name] = work / f"{name.rsplit('.', 1)[-1]}{scheme}.safetensors"
        if not is_sound(path):
            made = (
                Dense(source.weight(name).float()) if grid is None else round_table(source, name, grid, gram)
            )
            save_matrices(path, {name: made})
        if name in known:
            (matrix,) = load_matrices(path).values()
            assert isinstance(matrix, Quantized)
            records.append(
                LinearRecord(name, table_error(source, name, matrix, effects[name]), 0.0, 0.0, False)
            )
    return MadeTables(files, tuple(records))
